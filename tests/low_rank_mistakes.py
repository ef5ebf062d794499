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
        "arch::wgmma_wait<0>();\n"
        "          if (!(row_ends && adds_p)) release(stages.empty(slot));",
        "if (!(row_ends && adds_p)) release(stages.empty(slot));\n arch::wgmma_wait<0>();",
    ),
    "low rank: a slot that is not released": (
        "low_rank_sm90.h",
        "arch::wgmma_wait<0>();\n"
        "          if (!(row_ends && adds_p)) release(stages.empty(slot));",
        "arch::wgmma_wait<0>();",
    ),
    "low rank: a slot of R that is not released": (
        "low_rank_sm90.h", "release_R(Rs.empty(at_R.slot));", "",
    ),
    "low rank: a slot released by too few warps": (
        "low_rank_sm90.h", "stages.initialise(Shape::kMultipliers * kWarpgroup / 32);",
        "stages.initialise(1);",
    ),
    "low rank: no wait for the products": (
        "low_rank_sm90.h",
        "arch::wgmma_wait<0>();\n"
        "          if (!(row_ends && adds_p)) release(stages.empty(slot));",
        "if (!(row_ends && adds_p)) release(stages.empty(slot));",
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
        "low_rank_sm90.h", "arch::cluster_sync();", "",
    ),
    "low rank: a barrier of one block after the barriers are made": (
        "low_rank_sm90.h", "arch::cluster_sync();", "__syncthreads();",
    ),
    "low rank: no fence after dropout": (
        "low_rank_sm90.h", "`arch::fence_proxy_async();`\n      if constexpr", "",
    ),
    "low rank: a fence after dropout by one thread": (
        "low_rank_sm90.h", "`arch::fence_proxy_async();`\n      if constexpr",
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
        "drop_tile.h", "number(own.row, `next * DropPlace::kNextRow`);", "0",
    ),
    "low rank: nothing borrowed from equal signs": (
        "drop_tile.h", "`(~word | threshold) & difference`", "0u",
    ),
    "low rank: bits of the wrong rows": (
        "drop_tile.h", "kept.at(`own_row`, block)", "number(own.row, 0)",
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
        "low_rank_sm90.h", "`int64_t{part} * params.Q_part`,", "0",
    ),
    "low rank: sums put where others still read": (
        "low_rank_sm90.h", "arch::barrier_sync(3, Shape::kMultipliers * kWarpgroup);", "",
    ),
    "low rank: no wait before other blocks' sums are read": (
        "low_rank_sums_sm90.h", "meet(barriers);", "",
    ),
    "low rank: arrivals that no other block waits for": (
        "low_rank_sums_sm90.h",
        "mbarrier_arrive_cluster(arch::cluster_address(barrier, `first_block() + lane`",
        "cluster.rank",
    ),
    "low rank: a wait that does not see what other blocks stored": (
        "low_rank_sums_sm90.h", "arch::mbarrier_wait_cluster(barrier, parity);",
        "arch::mbarrier_wait(barrier, parity);",
    ),
    "low rank: a block that leaves while others read": (
        "low_rank_sums_sm90.h", "meet(barriers + 8);", "",
    ),
    "low rank: sums of the turn before": (
        "low_rank_sums_sm90.h", "parity ^= 1;", "",
    ),
    "low rank: its own sums in the place of others": (
        "low_rank_sums_sm90.h", "static_cast<uint32_t>(begin), `from_block`)", "cluster.rank",
    ),
    "low rank: the other blocks' sums in the wrong order": (
        "low_rank_sums_sm90.h", "all.sum[k] += bits_to_float(`words[i]`.word[k])",
        "words[blocks > 2 && i < 2 ? 1 - i : i]",
    ),
    "low rank: the last block's sums left out": (
        "low_rank_sums_sm90.h", "first < `blocks`; first += kAtOnce", "blocks - kAtOnce + 1",
    ),
    "low rank: shares of the sums that overlap": (
        "low_rank_sums_sm90.h", "unit = `units * rank() / blocks` + thread", "0",
    ),
    "low rank: shares of the sums with a gap": (
        "low_rank_sums_sm90.h", "`units * (rank() + 1) / blocks`;",
        "units * rank() / blocks + units / blocks / 2",
    ),
    "low rank: a slot of R released to one block alone": (
        "low_rank_sm90.h", "release_R(Rs.empty(at_R.slot));", "release(Rs.empty(at_R.slot));",
    ),
    "low rank: a slot of R released by the warps of one block": (
        "low_rank_sm90.h", "Pass::shares_R(params, cluster) ? `cluster.size` : 1", "1",
    ),
    "low rank: the same share of R from all blocks": (
        "low_rank_sm90.h", "const int skipped = shares ? `cluster.rank` *", "0",
    ),
    "low rank: shares of R in the wrong rows": (
        "low_rank_sm90.h", "box * Shape::kRankBox, `row + skipped`,", "row",
    ),
    "low rank: a share of R for one block alone": (
        "low_rank_sm90.h", "`(1u << cluster.size) - 1`", "1u << cluster.rank",
    ),
    "low rank: a box of R as if there were no cluster": (
        "launch_low_rank_sm90.h", "cut.along_rows ? 1 : `cut.cluster`", "1",
    ),
    "low rank: the last block's sums at another slot": (
        "low_rank_sm90.h", "const int last = `stages.offset(last_slot(walk, row_tile, left))`;",
        "others",
    ),
    "low rank: no fence before a stage of sums is filled": (
        "low_rank_sm90.h", "`arch::fence_proxy_async();`\n      release", "",
    ),
    "low rank: sums of a tile of rows below the last": (
        "low_rank_sm90.h", "if (`row + 8 < out.M`)", "true",
    ),
    "low rank: columns of the operand beyond the rank that are not zero": (
        "lora_linear_sums.h", "return `column < r` ?", "true",
    ),
    "low rank: no wait for the kernel before": (
        "low_rank_sm90.h", "arch::wait_for_previous_kernel();", "",
    ),
    "low rank: a thread that does not wait for the kernel before": (
        "low_rank_sm90.h", "arch::wait_for_previous_kernel();",
        "if (thread >= kWarpgroup) arch::wait_for_previous_kernel();",
    ),
}  # fmt: skip

# What one case alone of the program notices, after all others have run.
OF_CLUSTERS = (
    "low rank: a barrier of one block after the barriers are made",
    "low rank: one tile too many",
    "low rank: stores right of the last column, one by one",
    "low rank: blocks that write the same part",
    "low rank: arrivals that no other block waits for",
    "low rank: its own sums in the place of others",
    "low rank: the other blocks' sums in the wrong order",
    "low rank: shares of the sums that overlap",
    "low rank: a box of R as if there were no cluster",
    "low rank: the last block's sums at another slot",
    "low rank: columns of the operand beyond the rank that are not zero",
)
CASES = dict.fromkeys(OF_CLUSTERS, "clusters_make_the_same_results")
