"""Mistakes for tests/test_kernel_mistakes.py: what stands in the kernels, and what replaces it."""

from __future__ import annotations

# The product's kernels and the low-rank passes of sm_90a are checked by programs of tests/simt:
# program → what is planted → (file, what stands there, what takes its place). What ends with a
# semicolon is a statement, else an expression: of a text with two ` only what is between them.
PRODUCTS = {
    "test_product_sm80": {
        "no wait for the copies": (
            "product_sm80.h", "arch::cp_async_wait<Shape::kRing - 2>();", "",
        ),
        "a wait for one group too few": (
            "product_sm80.h", "arch::cp_async_wait<Shape::kRing - 2>();",
            "arch::cp_async_wait<Shape::kRing - 1>();",
        ),
        "no barrier after the wait": (
            "product_sm80.h", "__syncthreads();", "",
        ),
        "a slot filled while it is read": (
            "product_sm80.h",
            "P::load(stage(step + Shape::kRing - 1), params, loading, m, n, thread);",
            "P::load(stage(step), params, loading, m, n, thread);",
        ),
        "stores below the last row": (
            "product_sm80.h", "if (m >= params.M) continue;", "",
        ),
        "stores right of the last column": (
            "product_sm80.h", "if (n >= params.N) continue;", "",
        ),
        "a segment one step too long": (
            "product_sm80.h", "k >= params.segments[segment].a.columns",
            "k > params.segments[segment].a.columns",
        ),
        "a mask of the wrong rows": (
            "product_sm80.h", "params.dropout.threshold, `m + warp_row`,", "m",
        ),
        "rows read beyond the matrix": (
            "tile_sm80.h", "bool inside = `r < rows`;", "r <= rows",
        ),
        "chunks not permuted for one operand": (
            "tile_sm80.h", "Tile::offset(row + lane % 16, column / 8 + lane / 16)",
            "(row + lane % 16) * Tile::kChunks * 16 + (column / 8 + lane / 16) * 16",
        ),
    },
    "test_product_sm90": {
        "sm90: no wait for a full slot": (
            "product_sm90.h", "arch::mbarrier_wait(ring.full(at.slot), at.parity);", "",
        ),
        "sm90: no wait for an empty slot": (
            "product_sm90.h",
            "arch::mbarrier_wait_bounded(ring.empty(at.slot), at.parity ^ 1, params.report);", "",
        ),
        "sm90: a wait for the turn before": (
            "product_sm90.h",
            "arch::mbarrier_wait_bounded(ring.empty(at.slot), at.parity ^ 1, params.report);",
            "arch::mbarrier_wait_bounded(ring.empty(at.slot), at.parity, params.report);",
        ),
        "sm90: turns that are not counted": (
            "ring_sm90.h", "slot = 0, parity ^= 1;", "slot = 0;",
        ),
        "sm90: a slot that is not released": (
            "product_sm90.h", "if (`held >= 0` && lane < cluster.size)", "false",
        ),
        "sm90: a slot released by too few warps": (
            "product_sm90.h", "`Shape::kMultipliers * kWarpgroup / 32` * cluster.size", "1",
        ),
        "sm90: a slot released by the warps of one block of two": (
            "product_sm90.h", "&& lane < `cluster.size`", "1",
        ),
        "sm90: a slot released twice to the same block": (
            "product_sm90.h", "arch::cluster_address(ring.empty(held), `lane`)",
            "arch::cluster_rank()",
        ),
        "sm90: a share of the weight for one block alone": (
            "product_sm90.h", "`(1u << cluster.size) - 1`", "1u << cluster.rank",
        ),
        "sm90: the same share of the weight from both blocks": (
            "product_sm90.h", "const int skipped = `cluster.rank` *", "0",
        ),
        "sm90: shares of the weight in the wrong rows": (
            "product_sm90.h", "load_B(params.b[segment], b, full, k, `n + skipped`, cluster);", "n",
        ),
        "sm90: shares of a transposed weight in the wrong rows": (
            "product_sm90.h", "full, n + column, `k + skipped`, cluster", "k",
        ),
        "sm90: an end that waits for no release": (
            "product_sm90.h", "`slot < ring.count`; ++slot", "false",
        ),
        "sm90: both blocks at the same rows": (
            "tile_walk.h", "at.row * size + `rank`", "0",
        ),
        "sm90: a box as if there were no cluster": (
            "launch_product_sm90.h", "kBoxRows<kMajorB> / `cluster`", "1",
        ),
        "sm90: a slot released while it is read": (
            "product_sm90.h", "release();\n          held = at.slot;",
            "held = at.slot;\n          release();",
        ),
        "sm90: no wait for the products of a slot": (
            "product_sm90.h", "arch::wgmma_wait<1>();", "",
        ),
        "sm90: no wait before the mask": (
            "product_sm90.h", "arch::wgmma_wait<0>();\n          arch::wgmma_fence_sums(sums);",
            "arch::wgmma_fence_sums(sums);",
        ),
        "sm90: no wait before the store": (
            "product_sm90.h", "arch::wgmma_wait<0>();\n      arch::wgmma_fence_sums(sums);",
            "arch::wgmma_fence_sums(sums);",
        ),
        "sm90: too few bytes expected": (
            "product_sm90.h", "arch::mbarrier_arrive_expect_tx(full, Shape::kStageBytes);",
            "arch::mbarrier_arrive_expect_tx(full, Shape::kStageBytes - 128);",
        ),
        "sm90: no fence after the barriers are made": (
            "product_sm90.h", "arch::fence_mbarrier_init();", "",
        ),
        "sm90: no barrier after the barriers are made": (
            "product_sm90.h", "arch::cluster_sync();", "",
        ),
        "sm90: a barrier of one block after the barriers are made": (
            "product_sm90.h", "arch::cluster_sync();", "__syncthreads();",
        ),
        "sm90: no fence before wgmma": (
            "product_sm90.h", "arch::wgmma_fence();", "",
        ),
        "sm90: sums that begin with those of the last tile": (
            "product_sm90.h", "bool accumulate = `false`;", "walk.index > blockIdx.x",
        ),
        "sm90: a segment without its last columns": (
            "product_sm90.h", "`k < depth`; k += 16", "k + 16 < depth",
        ),
        "sm90: a segment one stage too long": (
            "product_sm90.h", "k < params.depth[segment]", "k <= params.depth[segment]",
        ),
        "sm90: stores below the last row": (
            "launch_product_sm90.h", "out{product.out, `product.M`,", "product.M + 1",
        ),
        "sm90: stores right of the last column": (
            "launch_product_sm90.h", "out{product.out, product.M, `product.N`,", "product.N + 8",
        ),
        "sm90: a box filled while it is read": (
            "epilogue_sm90.h", "arch::tma_store_wait_read<Boxes::kCount - 1>();", "",
        ),
        "sm90: a wait for one box too few": (
            "epilogue_sm90.h", "arch::tma_store_wait_read<Boxes::kCount - 1>();",
            "arch::tma_store_wait_read<Boxes::kCount>();",
        ),
        "sm90: no fence before a box is stored": (
            "epilogue_sm90.h", "arch::fence_proxy_async();\n    __syncwarp();", "__syncwarp();",
        ),
        "sm90: a box stored before all lanes have fenced": (
            "epilogue_sm90.h", "arch::fence_proxy_async();\n    __syncwarp();",
            "arch::fence_proxy_async();",
        ),
        "sm90: an end that waits for no store": (
            "product_sm90.h", "arch::tma_store_wait_read<0>();", "{}",
        ),
        "sm90: boxes whose chunks are not permuted": (
            "epilogue_sm90.h", "`(lane / 16 ^ lane % 8)` * 16", "(lane / 16)",
        ),
        "sm90: boxes of one tile in the same columns": (
            "epilogue_sm90.h", "static_cast<int>(column) + `box * Boxes::kWidth`", "0",
        ),
        "sm90: a bias of the wrong columns": (
            "epilogue_sm90.h", "bias + column + `lane % 4 * 2`", "lane % 2 * 2",
        ),
        "sm90: both warpgroups multiply the same rows": (
            "product_sm90.h", "number * 64 * kRowBytes", "0 * kRowBytes",
        ),
        "sm90: a mask of the wrong columns": (
            "epilogue_sm90.h", "column / kDropoutBlock + block", "block",
        ),
        "sm90: boxes of the weight at the wrong distance": (
            "product_sm90.h", "`Shape::kK * kRowBytes`,", "kRowBytes",
        ),
        "sm90: tiles left out": (
            "tile_walk.h", "index / (band * columns) * band", "0",
        ),
        "sm90: no wait for the kernel before": (
            "product_sm90.h", "arch::wait_for_previous_kernel();", "",
        ),
    },
    "test_low_rank_sm90": {
        "low rank: no wait for a full slot": (
            "low_rank_sm90.h", "arch::mbarrier_wait(stages.full(at.slot), at.parity);", "",
        ),
        "low rank: no wait for an empty slot": (
            "low_rank_sm90.h",
            "arch::mbarrier_wait_bounded(stages.empty(at.slot), at.parity ^ 1, params.report);", "",
        ),
        "low rank: no wait for a full slot of R": (
            "low_rank_sm90.h", "arch::mbarrier_wait(Rs.full(at_R.slot), at_R.parity);", "",
        ),
        "low rank: no wait for an empty slot of R": (
            "low_rank_sm90.h",
            "arch::mbarrier_wait_bounded(Rs.empty(at_R.slot), at_R.parity ^ 1, params.report);", "",
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
            "low_rank_sm90.h", "+ number * 64, `column_tile`, thread", "0",
        ),
        "low rank: a mask for the tile before": (
            "low_rank_sm90.h", "row_ends ? walk.first_column : tile + 1", "tile",
        ),
        "low rank: a mask for a tile beyond the last": (
            "low_rank_sm90.h",
            "params.dropout.enabled && !(row_ends && row_tile + 1 == walk.last_row)",
            "params.dropout.enabled",
        ),
        "low rank: a mask that is not swizzled": (
            "low_rank_tile_sm90.h",
            "arch::swizzled(static_cast<uint32_t>(own_row * kRowBytes + chunk * 16), "
            "Swizzle::k128)",
            "static_cast<uint32_t>(own_row * kRowBytes + chunk * 16)",
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
            "low_rank_tile_sm90.h",
            "static_cast<uint32_t>(k) * kBytes, `Shape::kRankBoxBytes`,", "16",
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
    },
}  # fmt: skip

# The others by forward and backward as a whole.
LAUNCHES = {
    "down: no wait for the copies": (
        "low_rank_down_sm80.h", "arch::cp_async_wait<Shape::kRing - 2>();", "",
    ),
    "down: splits that overlap": (
        "low_rank_down_sm80.h", "const int64_t first = `steps * blockIdx.y / params.splits`;",
        "0",
    ),
    "up_grad: no barrier after the wait": (
        "low_rank_up_grad_sm80.h",
        "`__syncthreads();`  // the stage", "",
    ),
    "up_grad: h of the next rows over those that are read": (
        "low_rank_up_grad_sm80.h", "const int turn = `step / column_tiles % 2`;", "0",
    ),
    "up_grad: no barrier before the sums are stored": (
        "low_rank_up_grad_sm80.h", "  if (params.dB) {\n    `__syncthreads();`", "",
    ),
    "down_grad: no wait for the copies": (
        "low_rank_down_grad_sm80.h", "arch::cp_async_wait<0>();", "",
    ),
    "down_grad: a mask of the wrong columns": (
        "low_rank_down_grad_sm80.h", "`warp * kSlots`, lane);",
        "0",
    ),
    "no wait for the kernel before": (
        "elementwise.h", "arch::wait_for_previous_kernel();", "",
    ),
    "float adapters: h once, beside nothing": (
        "lora_linear_sums.h", "`copy < copies`; ++copy", "copy < 1",
    ),
    "float adapters: rows of rank that are not padded": (
        "lora_linear_run.h", ".padded_rows = `in_rows ? joined_rank(rows) : rows`,", "rows",
    ),
    "float adapters: a remainder in the place of the value": (
        "lora_linear_run.h", "in_columns ? `job.value + job.padded_columns`", "job.value",
    ),
    "few rows: no barrier before the sums of the warps are added": (
        "few_rows_sm80.h", "Shape::kAll);\n  `__syncthreads();`", "",
    ),
    "few rows: no barrier before h is used": (
        "few_rows_sm80.h", "    }\n  }\n  `__syncthreads();`", "",
    ),
    "few rows: warps with the same part of x": (
        "few_rows_sm80.h", "first = `warp * Shape::kStep`;", "0",
    ),
    "few rows: columns beyond the last": (
        "few_rows_sm80.h", "row >= M || `n >= N`", "false",
    ),
    "up_grad alone: dh that is not scaled": (
        "lora_linear_run.h", ".survivor = `call.scaling`,", "1.0f",
    ),
    "a factor of the scaling that is not read": (
        "lora_linear_sums.h", "factor ? value * *factor : value", "value",
    ),
    "several jobs: the first for all blocks": (
        "lora_linear_elementwise.h", "blockIdx.x >= `first_block[at + 1]`", "~0u",
    ),
    "several jobs: elements that are not counted from the job's first": (
        "lora_linear_elementwise.h", "int64_t{`first_block[at]`} *", "0",
    ),
}  # fmt: skip
