"""Mistakes in the low-rank passes of sm_90a for tests/test_kernel_mistakes.py, in the form of
planted_mistakes.py."""

from __future__ import annotations

MISTAKES = {
    "low rank: no wait for a full slot": (
        "low_rank_sm90.h", "arch::mbarrier_wait(stages.full(at.slot), at.parity);", "",
    ),
    "low rank: no wait for an empty slot": (
        "low_rank_sm90.h",
        "arch::mbarrier_wait_bounded("
        "stages.empty(at.slot), at.parity ^ 1, params.report, row, c);",
        "",
    ),
    "low rank: no wait for a full slot of R": (
        "low_rank_sm90.h", "arch::mbarrier_wait(Rs.full(at_R.slot), at_R.parity);", "",
    ),
    "low rank: no wait for an empty slot of R": (
        "low_rank_sm90.h",
        "arch::mbarrier_wait_bounded("
        "Rs.empty(at_R.slot), at_R.parity ^ 1, params.report, row, 0);",
        "",
    ),
    "low rank: turns that are not counted": (
        "ring_sm90.h", "slot = 0, parity ^= 1;", "slot = 0;",
    ),
    "low rank: a slot released while it is read": (
        "low_rank_sm90.h",
        "arch::wgmma_wait<0>();\n          release(empty);",
        "release(empty);\n          arch::wgmma_wait<0>();",
    ),
    "low rank: a slot that is not released": (
        "low_rank_sm90.h", "arch::wgmma_wait<0>();\n          release(empty);",
        "arch::wgmma_wait<0>();",
    ),
    "low rank: a slot of R that is not released": (
        "low_rank_sm90.h", "release(Rs.empty(at_R.slot));", "",
    ),
    "low rank: a slot released by too few warps": (
        "low_rank_sm90.h", "stages.initialise(Shape::kMultipliers * kWarpgroup / 32);",
        "stages.initialise(1);",
    ),
    "low rank: no wait for the products": (
        "low_rank_sm90.h", "arch::wgmma_wait<0>();\n          release(empty);",
        "release(empty);",
    ),
    "low rank: no fence before wgmma": (
        "low_rank_tile_sm90.h", "arch::wgmma_fence();", "",
    ),
    "low rank: too few bytes expected": (
        "low_rank_sm90.h", "static_cast<uint32_t>(bytes)", "static_cast<uint32_t>(bytes - 128)",
    ),
    "low rank: no fence after the barriers are made": (
        "low_rank_sm90.h", "arch::fence_mbarrier_init();", "",
    ),
    "low rank: no barrier after the barriers are made": (
        "low_rank_sm90.h", "__syncthreads();", "",
    ),
    "low rank: no fence after dropout": (
        "low_rank_sm90.h", "arch::fence_proxy_async();", "",
    ),
    "low rank: a fence after dropout by one thread": (
        "low_rank_sm90.h", "arch::fence_proxy_async();",
        "if (thread == 0) arch::fence_proxy_async();",
    ),
    "low rank: no barrier after dropout, of Q": (
        "low_rank_sm90.h", "arch::barrier_sync(1, Shape::kMultipliers * kWarpgroup);", "",
    ),
    "low rank: a mask of the wrong rows": (
        "low_rank_sm90.h", "`int64_t{row_tile} * Shape::kRows + number * 64`, column_tile",
        "number * 64",
    ),
    "low rank: a mask of the wrong columns": (
        "low_rank_sm90.h", "+ number * 64, `column_tile`, params.kept", "0",
    ),
    "low rank: both rows of a thread dropped as the first": (
        "drop_tile.h", "own.row + `next * DropPlace::kNextRow`;", "0",
    ),
    "low rank: nothing borrowed from equal signs": (
        "drop_tile.h", "`(~word | threshold) & difference`", "0u",
    ),
    "low rank: bits of the wrong rows": (
        "drop_tile.h", "kept.at(`own_row`, block)", "row + own.row",
    ),
    "low rank: bits of the wrong columns": (
        "drop_tile.h", "kept.at(own_row, `block`)", "0",
    ),
    "low rank: words in the order of their quarters": (
        "drop_tile.h", "place_of_quarter(own.quarter)", "own.quarter",
    ),
    "low rank: bits of both pairs in one place": (
        "kept_bits.h", "(`pair * kDropoutSlots` + slot)", "0",
    ),
    "low rank: bits that no group of ranks leaves": (
        "launch_low_rank_sm90.h", "if (`first == 0`) params.kept", "first > 0",
    ),
    "low rank: a mask for the tile before": (
        "low_rank_sm90.h", "row_ends ? walk.first_column : tile + 1", "tile",
    ),
    "low rank: a mask for a tile beyond the last": (
        "low_rank_sm90.h",
        "drops() && !(row_ends && row_tile + 1 == walk.last_row)", "drops()",
    ),
    "low rank: a mask that is not swizzled": (
        "low_rank_tile_sm90.h",
        "arch::swizzled(static_cast<uint32_t>(own.row * kRowBytes + own.quarter * 8), "
        "Swizzle::k128)",
        "static_cast<uint32_t>(own.row * kRowBytes + own.quarter * 8)",
    ),
    "low rank: the last columns left out": (
        "low_rank_sm90.h", "(size + step - 1) / step", "size / step",
    ),
    "low rank: one tile too many": (
        "low_rank_sm90.h", "return wanted < all ? wanted : all;", "return wanted;",
    ),
    "low rank: stores below the last row": (
        "low_rank_tile_sm90.h", "if (row + half * 8 >= rows) continue;", "",
    ),
    "low rank: stores right of the last column": (
        "low_rank_tile_sm90.h", "if (`column < rank`) *", "true",
    ),
    "low rank: stores right of the last column, one by one": (
        "low_rank_tile_sm90.h", "if (`column + 1 < rank`)", "true",
    ),
    "low rank: P that begins with that of the last rows": (
        "low_rank_sm90.h", "multiply_p(p, stage, tile == walk.first_column);",
        "multiply_p(p, stage, row_tile == walk.first_row && tile == walk.first_column);",
    ),
    "low rank: Q that begins anew with each tile of rows": (
        "low_rank_sm90.h", "`row_tile == walk.first_row`);", "true",
    ),
    "low rank: a remainder that is left out": (
        "low_rank_sm90.h", "`term < params.R_terms`; ++term) {\n        Tile",
        "term < 1",
    ),
    "low rank: both warpgroups multiply the same rows": (
        "low_rank_sm90.h", "Tile::multiply_p(p, stage + static_cast<uint32_t>(`number` *",
        "0",
    ),
    "low rank: the same ranks in both boxes": (
        "low_rank_sm90.h", "`box * Shape::kRankBox`, row", "0",
    ),
    "low rank: boxes of ranks at the wrong distance": (
        "low_rank_tile_sm90.h", "arch::wgmma_descriptor(tile, `Shape::kRankBoxBytes`,", "16",
    ),
    "low rank: the first products of a tile for all of them": (
        "low_rank_tile_sm90.h", "arch::further(of_x, `k * kRowBytes`)", "0",
    ),
    "low rank: blocks that write the same part": (
        "low_rank_sm90.h", "int64_t{blockIdx.y} * params.Q_part", "0",
    ),
    "low rank: no wait for the kernel before": (
        "low_rank_sm90.h", "arch::wait_for_previous_kernel();", "",
    ),
    "low rank: a thread that does not wait for the kernel before": (
        "low_rank_sm90.h", "arch::wait_for_previous_kernel();",
        "if (thread >= kWarpgroup) arch::wait_for_previous_kernel();",
    ),
}  # fmt: skip
