"""Mistakes for the CUDA kernels that walk rows or dequantize, as test_kernel_mistakes.py has them,
and the calls that have to notice each."""

from __future__ import annotations

import itertools

import torch
from emulated_dequantize import check_dequantize
from emulated_rows import Problem, RowKernels, check_column_scale, check_embedding, check_norms

WAIT = ("arch::wait_for_previous_kernel();", "")

MISTAKES = {
    "tile: no barrier after the factors are there": (
        "update_tile.h", "fill(first, ranks);\n      `__syncthreads();`", "",
    ),
    "tile: factors over those that are read": (
        "update_tile.h", "if (first > 0) `__syncthreads();`", "",
    ),
    "tile: the last rank left out": (
        "update_tile.h", "`rank < ranks`; ++rank) {\n      const Four l", "rank + 1 < ranks",
    ),
    "tile: columns of one factor in their own order": (
        "update_tile.h", "`column % 8 / 4 * 128 + column / 8 * 4 + column % 4` :", "column",
    ),
    "tile: the same where rows are not aligned": (
        "update_tile.h", "return `column / 128 * 128 + column % 32 * 4 + column / 32 % 4`;",
        "column",
    ),
    "span: stores right of the last column": (
        "span.h", "if (`!inside(e)`) continue;\n      if constexpr (kAligned) {\n        "
        "arch::Words words;", "false",
    ),
    "span: 16 bytes from any address": (
        "span.h", "`reinterpret_cast<uintptr_t>(data) % 16 == 0` &&", "true",
    ),
    "span: 16 bytes from rows that lie anyhow": (
        "span.h", "`stride % kVector == 0`;", "true",
    ),
    "norm: norms below the last row": (
        "weight_norm_tile.h", "lane < Tile::kWarpRows && `row + lane < at.rows`", "true",
    ),
    "norm: squares right of the last column": (
        "weight_norm_tile.h", "if (`span.inside(e)`) square +=", "true",
    ),
    "norm: squares below the last row": (
        "weight_norm_tile.h", "if (`row + i < at.rows`) square +=", "true",
    ),
    "norm: sums over the factors that are read": (
        "weight_norm_tile.h", "`__syncthreads();`  // the factors are read: the place is for sums "
        "over each warp's rows", "",
    ),
    "norm: no barrier before the warps' sums are added": (
        "weight_norm_tile.h", "= square;\n  }\n  `__syncthreads();`\n  // Warp w", "",
    ),
    "norm: tiles that write the same part": (
        "weight_norm_tile.h", "params.parts[`at.column_tile` * weight.rows + at.first_row + row",
        "0",
    ),
    "norm by mma: no barrier after the factors are there": (
        "weight_norm_tile.h", "`__syncthreads();`\n    tile.multiply", "",
    ),
    "norm by mma: factors over those that are read": (
        "weight_norm_tile.h", "if (first > 0) `__syncthreads();`", "",
    ),
    "norm by mma: sums over the factors that are read": (
        "weight_norm_tile.h", "`__syncthreads();`  // the factors are read: the place is for sums "
        "over each warp's part", "",
    ),
    "norm by mma: no barrier before the parts of a row are added": (
        "weight_norm_tile.h", "`__syncthreads();`\n    if (thread >= at.rows)", "",
    ),
    "norm by mma: no barrier before the parts of a column are added": (
        "weight_norm_tile.h", "`__syncthreads();`\n  if (thread >= at.left)", "",
    ),
    "norm by mma: squares right of the last column": (
        "weight_norm_tile.h", "if (`first + (kAligned ? 0 : e) < at.left`) square +=", "true",
    ),
    "norm by mma: squares below the last row": (
        "weight_norm_tile.h", "if (`tile.row_of(slot) < at.rows`) square +=", "true",
    ),
    "norm by mma: columns of R in their own order": (
        "update_tile_sm80.h",
        "`c / kHalf * kHalf + c % kEach / 2 * 8 + c % kHalf / kEach * 2 + c % 2`;", "c",
    ),
    "norm by mma: ranks beyond the last": (
        "update_tile_sm80.h", "`k < ranks && i < rows` ?", "i < rows",
    ),
    "norm by mma: both groups of warps multiply the same rows": (
        "update_tile_sm80.h", "left + `(row + lane % 16)` * kLeft", "(lane % 16)",
    ),
    "norm by mma: a remainder that is left out": (
        "update_tile_sm80.h", "`of_left < kTerms - term`; ++of_left", "of_left < 1",
    ),
    "norm: no wait for the kernel before": ("weight_norm.cu", *WAIT),
    "parts: no barrier before the groups' sums are added": (
        "sum_parts.cu", "__syncthreads();", "",
    ),
    "parts: the last group left out": (
        "sum_parts.cu", "`other < kGroups`; ++other", "other + 1 < kGroups",
    ),
    "parts: no wait for the kernel before": ("sum_parts.cu", *WAIT),
    "scale: rows below the last": (
        "column_scale.cu", "end = `M - begin < kRows` ?", "false",
    ),
    "scale: gradients of rows below the last": (
        "column_scale.cu", "end = `dy.rows - begin < rows` ?", "false",
    ),
    "scale: no barrier before the warps' sums are added": (
        "column_scale.cu", "__syncthreads();", "",
    ),
    "scale: blocks that write the same part": (
        "column_scale.cu", "(`row_block * kSums` + which) * dy.columns", "0",
    ),
    "scale: no wait for the kernel before": ("column_scale.cu", *WAIT),
    "embedding: stores below the last token": (
        "lora_embedding.cu", "if (`row + i < call.M`) span.store", "true",
    ),
    "embedding: a token that nobody checks": (
        "lora_embedding.cu", "token >= 0 && token < V", "true",
    ),
    "embedding: no barrier after the tokens are read": (
        "lora_embedding.cu", "__syncthreads();", "",
    ),
    "embedding: no wait for the kernel before": ("lora_embedding.cu", *WAIT),
    "dequantize: no barrier after the codebook is there": (
        "dequantize.cu", "__syncthreads();", "",
    ),
    "dequantize: stores right of the last value": (
        "dequantize.cu", "if (`left < kNeighbours`) {", "false",
    ),
    "dequantize: a block that ends within a thread's values": (
        "dequantize.cu", "if (`left == 0` && first", "false",
    ),
    "dequantize: nibbles in the other order": (
        "dequantize.cu", "data >> (`kFirstShift ^ e % 2 * 4`)", "kFirstShift ^ (e + 1) % 2 * 4",
    ),
    "dequantize: the low nibbles of a unit alone": (
        "dequantize.cu", ">> (`of_part < kHalf` ? 0", "true",
    ),
    "dequantize: two bits of another quarter": (
        "dequantize.cu", ">> `of_part / 32` * 2 & 3", "part",
    ),
    "dequantize: numbers that are not negative": (
        "dequantize.cu", "static_cast<float>(`static_cast<int8_t>(codes[e])`)",
        "static_cast<uint8_t>(codes[e])",
    ),
    "dequantize: one number for all nested blocks": (
        "dequantize.cu", "`quotient(block, numbers.block_size)`);", "0",
    ),
    "dequantize: values that are rounded once": (
        "dequantize.cu", "found[e] = `rounded_to(matrix.rounding, value)`;", "value",
    ),
}  # fmt: skip


def notice(kernels: RowKernels) -> None:
    """Fails of a mistake."""
    for seed in range(3):
        kernels.schedule("random", seed)
        check_dequantize(kernels, sizes=2, dtypes=(torch.bfloat16,))
        for size in [(37, 264, 40, 0), (40, 264, 5, 1), (70, 257, 8, 0), (33, 528, 5, 8)]:
            p = Problem(*size, torch.bfloat16, torch.bfloat16)
            for capability, by_column in itertools.product((75, 90), (False, True)):
                kernels.gpu(capability, 132)
                check_norms(kernels, p, by_column)
            check_column_scale(kernels, p)
            check_embedding(kernels, p)
    # More parts than groups that add them
    check_column_scale(kernels, Problem(520, 8, 1, 0, torch.bfloat16, torch.bfloat16))
    check_norms(kernels, Problem(37, 264, 8, 0, torch.bfloat16, torch.float32), False)
    p = Problem(33, 264, 8, 0, torch.bfloat16, torch.bfloat16)
    for capability, part in itertools.product((75, 90), (p.lora_A, p.lora_B)):
        kernels.gpu(capability)  # infinity counts in its own row or column alone
        part[0, 3] = torch.inf
        norms = kernels.weight_norm(p.weight, p.lora_A, p.lora_B, 0.5, part is p.lora_A)
        assert norms.isinf().sum() == 1 and not norms.isnan().any()
        part[0, 3] = 1
    try:
        kernels.lora_embedding(torch.tensor([33]), p.weight, p.of_tokens, p.of_dimensions, 1.0)
    except RuntimeError:
        return
    raise AssertionError("a token that is none")
