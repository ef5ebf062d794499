"""Mistakes for tests/test_kernel_mistakes.py: what stands in the kernels, and what replaces it."""

from __future__ import annotations

# The product's kernels and that of few rows are checked by programs of tests/simt, as are the
# low-rank passes of sm_90a (low_rank_mistakes.py): program → what is planted → (file, what stands
# there, what takes its place). What ends with a semicolon is a statement, else an expression: of a
# text with two ` only what is between them.
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
            "product_sm80.h", "loading.step(shared + `free`);", "full",
        ),
        "stores below the last row": (
            "product_sm80.h", "if (m >= params.M) continue;", "",
        ),
        "stores right of the last column": (
            "product_sm80.h", "if (n >= params.N) continue;", "",
        ),
        "a segment one step too short": (
            "product_sm80.h", "if (`left > 0`) return false;", "left > Shape::kK",
        ),
        "a mask of the wrong rows": (
            "product_sm80.h", "params.dropout.threshold, `row`, column,", "tile.m",
        ),
        "bits of the wrong rows": (
            "product_sm80.h", "sums.drop(params.kept, `row`, column,", "tile.m",
        ),
        "bits of the wrong columns": (
            "product_sm80.h", "sums.drop(params.kept, row, `column`,", "tile.n",
        ),
        "bits of the first rows": (
            "product_sm80.h", "KeptLanes::load(words, `i * 16 + half * 8`,", "0",
        ),
        "bits of the first slots": (
            "product_sm80.h", "bytes(lane) >> `first_slot`;", "0",
        ),
        "rows read beyond the matrix": (
            "tile_sm80.h", "bytes(`i * kApart < rows_`)", "i * kApart <= rows_",
        ),
        "chunks not permuted for one operand": (
            "tile_sm80.h", "Tile::offset(row + lane % 16, column / 8 + lane / 16)",
            "(row + lane % 16) * Tile::kChunks * 16 + (column / 8 + lane / 16) * 16",
        ),
    },
    "test_few_rows": {
        "few rows: no wait for the copies": (
            "few_rows_sm80.h", "arch::cp_async_wait<Shape::kRing - 2>();", "",
        ),
        "few rows: a wait for one group too few": (
            "few_rows_sm80.h", "arch::cp_async_wait<Shape::kRing - 2>();",
            "arch::cp_async_wait<Shape::kRing - 1>();",
        ),
        "few rows: no barrier after the wait": (
            "few_rows_sm80.h", "`__syncthreads();`  // the stage", "",
        ),
        "few rows: a slot filled while it is read": (
            "few_rows_sm80.h", "load(stage(next), k_of(next));", "load(stage(step), k_of(next));",
        ),
        "few rows: sums over a ring that is still read": (
            "few_rows_sm80.h", "`__syncthreads();`  // the ring", "",
        ),
        "few rows: no barrier before h is used": (
            "few_rows_sm80.h", "`__syncthreads();`\n    add_low_rank", "",
        ),
        "few rows: no barrier before the sums of the warps are added": (
            "few_rows_sm80.h", "} else {\n      `__syncthreads();`", "",
        ),
        "few rows: no barrier before the sums of the blocks are added": (
            "few_rows_sm80.h", "arch::cluster_sync_stores();", "",
        ),
        "few rows: a block that ends while others read from it": (
            "few_rows_sm80.h", "arch::cluster_sync();", "",
        ),
        "few rows: sums of one block alone": (
            "few_rows_sm80.h", "arch::shared_address(first), `split`)", "0",
        ),
        "few rows: sums of one warp alone": (
            "few_rows_sm80.h", "sum += first[`depth * apart`];", "0",
        ),
        "few rows: blocks with the same part of x": (
            "few_rows_sm80.h", "step * Shape::kSplits + `rank_`", "0",
        ),
        "few rows: warps with the same part of a step": (
            "few_rows_sm80.h", "i * Shape::kDepths + `depth_`", "0",
        ),
        "few rows: rows read beyond the matrix": (
            "few_rows_sm80.h", "`i * kApart < count`", "true",
        ),
        "few rows: columns read beyond the matrix": (
            "few_rows_sm80.h", "`k + column < columns`", "true",
        ),
        "few rows: ranks beyond the last": (
            "few_rows_sm80.h", "sum += `j < params_.r` ?", "true",
        ),
        "few rows: columns written beyond the last": (
            "few_rows_sm80.h", "if (n >= N) continue;", "",
        ),
        "few rows: h rounded to 16 bits": (
            "few_rows_sm80.h", "multiply<Low>(sums_of_y_, rest, t, b);", "",
        ),
        "few rows: a float adapter rounded to 16 bits": (
            "few_rows_sm80.h", "multiply<Low>(sums_of_h_, low, t, rest);", "",
        ),
    },
    "test_product_sm90": {
        "sm90: no wait for a full slot": (
            "product_sm90.h", "arch::mbarrier_wait(ring.full(at.slot), at.parity);", "",
        ),
        "sm90: no wait for an empty slot": (
            "product_sm90.h",
            "arch::mbarrier_wait_bounded(ring.empty(at.slot), at.parity ^ 1, params.report, m, n);",
            "",
        ),
        "sm90: a wait for the turn before": (
            "product_sm90.h",
            "arch::mbarrier_wait_bounded(ring.empty(at.slot), at.parity ^ 1, params.report, m, n);",
            "arch::mbarrier_wait_bounded(ring.empty(at.slot), at.parity, params.report, m, n);",
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
        "sm90: the result before at the edge of two": (
            "product_sm90.h", "product += `column >= params.first[i]`;", "column > params.first[i]",
        ),
        "sm90: columns as if results were one": (
            "product_sm90.h", "n -= int64_t{params.first[product]} * Shape::kN;", "",
        ),
        "sm90: the bias of the first result": (
            "product_sm90.h", "params.bias[`tile.product`]", "0",
        ),
        "sm90: the width of the first result": (
            "product_sm90.h", "column, params.N[`tile.product`], lane", "0",
        ),
        "sm90: everything into the first result": (
            "product_sm90.h", "store<T>(sums, params.out[`tile.product`],", "0",
        ),
        "sm90: segments of the results before": (
            "product_sm90.h", "product > 0 ? `params.ends[product - 1]` : 0", "0",
        ),
        "sm90: a result without its last segment": (
            "launch_product_sm90.h", "params.ends[i] = `segments`;", "segments - 1",
        ),
        "sm90: a result without its last columns": (
            "launch_product_sm90.h", "static_cast<int>(`column_tiles<Shape>(product.N)`)",
            "product.N / Shape::kN",
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
        "sm90: bits of the tile before": (
            "product_sm90.h", "load_bits(next);", "",
        ),
        "sm90: bits of the first tile of rows": (
            "product_sm90.h", "bits.load(params.kept, `tile.m + row_in_tile`,", "row_in_tile",
        ),
        "sm90: bits of the first columns": (
            "epilogue_sm90.h", "kept.at(row, `column / kDropoutBlock + block`)", "block",
        ),
        "sm90: bits of the first row for both": (
            "epilogue_sm90.h", "KeptLanes::load(words, `8`, lane)", "0",
        ),
        "sm90: bits of the first slots": (
            "epilogue_sm90.h", "bytes(lane) >> `first_slot`;", "0",
        ),
        "sm90: bits of the first quarters": (
            "kept_bits.h", "`lane % 4 / 2 * 2`", "0",
        ),
        "sm90: bits of the first pair of a quarter": (
            "kept_bits.h", "`odd * 0x1111u`", "0",
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
}  # fmt: skip

# The others by forward and backward as a whole.
LAUNCHES = {
    "few rows: warps that have the same steps": (
        "few_rows_sm80.h", "i * Shape::kDepths + `depth_`", "0",
    ),
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
        "low_rank_up_grad_sm80.h", "  if (wants_dB) {\n    `__syncthreads();`", "",
    ),
    "down_grad: no wait for the copies": (
        "low_rank_down_grad_sm80.h", "arch::cp_async_wait<0>();", "",
    ),
    "down_grad: a mask of the wrong columns": (
        "low_rank_down_grad_sm80.h", "`column_block`, params.kept", "0",
    ),
    "down_grad: no barrier after dropout": (
        "low_rank_down_grad_sm80.h", "      });\n      `__syncthreads();`", "",
    ),
    "down_grad: the other four of eight columns dropped": (
        "low_rank_down_grad_sm80.h", "`own.quarter % 2` * 8", "(1 - own.quarter % 2)",
    ),
    "down_grad: bits that no group of ranks leaves": (
        "launch_low_rank_sm80.h", ".kept = `first == 0 ? kept : KeptBits{}`,", "KeptBits{}",
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
    "up_grad alone: dh that is not scaled": (
        "lora_linear_run.h", "float_hidden<T>(M, r, `call.scaling`, call.dh);", "1.0f",
    ),
    "several: h of the first layer": (
        "lora_linear_multi_run.h", "shared + `ranks.first[i]`,", "0",
    ),
    "several: sums of a layer's h as if they lay alone": (
        "lora_linear_multi_run.h", "ranks.first[i], 1, `ranks.total`, h}", "call.r",
    ),
    "several: dh of a layer as if it lay alone": (
        "lora_linear_multi_run.h", "up.dh.stride = `ranks.total`,", "up.dh.padded",
    ),
    "several: one layer's lora_A over the one before": (
        "lora_linear_multi_run.h", "const int64_t begin = `ranks.first[i]` *", "0",
    ),
    "several: dh of all layers in one place": (
        "lora_linear_multi_run.h", "up.dh.value = `value + first`;", "value",
    ),
    "several: the remainder of another layer's dh": (
        "lora_linear_multi_run.h", "up.dh.remainder = remainder ? `remainder + first` :",
        "remainder",
    ),
    "several: dA of another layer": (
        "lora_linear_multi_run.h", "left.add({dA + `ranks.first[i]` * K", "0",
    ),
    "several: dx without a layer's dy": (
        "lora_linear_multi_run.h", "dx.segments[`dx.count++`] = {call.dy, call.weight.stored};",
        "(dx.count = 2, 1)",
    ),
    "several: dx without the low-rank part": (
        "lora_linear_multi_run.h", "if (`ranks.total > 0`) add_segments(dx", "false",
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
