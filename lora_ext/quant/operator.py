"""`lora_linear` on a quantized weight, as an operator: the matrix is never written down."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from lora_ext._extension import _C
from lora_ext._flops import Shape, _backward, _lora_linear
from lora_ext._scaling import is_for_any
from lora_ext.arguments import check_kinds, refuse
from lora_ext.quant.packing import PACKINGS
from lora_ext.quant.weight import NestedScales, QuantizedWeight

Operands = tuple[list[Tensor], list[int], list[float]]

# As csrc/quant/ counts them.
PACKING_INDEX = {name: index for index, name in enumerate(PACKINGS)}
ROUNDING_INDEX = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
CODEBOOK, ZERO_POINT, SHIFT, FACTOR = 1, 2, 4, 8
# Whether numbers of blocks are nested, and have an offset.
PARTS = {"scales": (16, 64), "shift": (32, 128)}


def operands_of(weight: QuantizedWeight) -> Operands:
    """The tensors, layout and numbers that operators take for a weight (csrc/quant/)."""
    tensors, parts = [weight.codes], 0
    block_sizes, numbers = [0, 0], [0.0, 0.0, 0.0]
    if weight.codebook is not None:
        parts |= CODEBOOK
        tensors.append(weight.codebook)
    for place, field in enumerate(("scales", "shift")):
        per_block = getattr(weight, field)
        if field == "shift" and weight.zero_point is not None:
            parts |= ZERO_POINT
            tensors.append(weight.zero_point)
        if per_block is None:
            continue
        if field == "shift":
            parts |= SHIFT
        if isinstance(per_block, NestedScales):
            nested, offset = PARTS[field]
            parts |= nested
            tensors += per_block.tensors()
            block_sizes[place] = per_block.block_size
            if per_block.offset is not None:
                parts |= offset
                numbers[1 + place] = per_block.offset
        else:
            tensors.append(per_block)
    if weight.factor is not None:
        parts |= FACTOR
        numbers[0] = weight.factor
    packing, rounding = PACKING_INDEX[weight.packing], ROUNDING_INDEX[weight.rounding]
    layout = [*weight.shape, packing, weight.block_size, rounding, parts, *block_sizes]
    return tensors, layout, numbers


def dequantize(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """`weight.dequantize(dtype)` by a kernel, in float64 too: values of float32 then."""
    return torch.ops.lora_ext.dequantize(*operands_of(weight), dtype)  # type: ignore[no-any-return]


def lora_linear_quantized(
    x: Tensor,
    weight: QuantizedWeight,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor:
    """`lora_linear(x, weight.dequantize(x.dtype), ...)`, which never holds the dequantized matrix.

    On the CPU parts of it are dequantized in cache and multiplied there, in forward and for the
    gradient of x; up to 16 rows are multiplied in forward by the codes. Other devices dequantize
    the whole into scratch. QLoRA, Dettmers et al., 2023 (arXiv:2305.14314).

    Differentiable twice in x, bias, lora_A, lora_B and lora_bias; the weight has no gradient. Keeps
    for backward what `lora_linear` does beside a frozen weight, the weight's own tensors among it.

    Args:
        x: [..., in_features], float64, float32, bfloat16 or float16, any strides: the dtype that
            the weight's values are rounded to.
        weight: [out_features, in_features], on the device of x.
        bias, lora_A, lora_B, lora_bias, scaling, dropout_p, rng_state: as for `lora_linear`.

    Returns:
        [..., out_features], dtype of x (of autocast, where it is on).

    Raises:
        As `lora_linear`.
    """
    try:
        operands = operands_of(weight)
    except AttributeError:
        if isinstance(weight, QuantizedWeight):
            raise
        refuse("lora_linear_quantized", "weight", weight, "a lora_ext.quant.QuantizedWeight")
    if not torch.compiler.is_compiling():
        try:
            return _C.lora_linear_quantized(
                x, *operands, bias, lora_A, lora_B, lora_bias, scaling, dropout_p, rng_state
            )
        except (TypeError, RuntimeError):
            optional: dict[str, Any] = {"bias": bias, "lora_bias": lora_bias}
            optional["rng_state"] = rng_state
            optional["scaling"] = None if isinstance(scaling, Tensor) else scaling
            given = {name: value for name, value in optional.items() if value is not None}
            required = {"x": x, "lora_A": lora_A, "lora_B": lora_B}
            check_kinds("lora_linear_quantized", **required, **given, dropout_p=dropout_p)
            raise
    return traced(x, operands, bias, lora_A, lora_B, lora_bias, scaling, dropout_p, rng_state)


def traced(
    x: Tensor,
    operands: Operands,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
    rng_state: Tensor | None = None,
) -> Tensor:
    """`lora_linear_quantized` as compiled code calls it, of the operands of a weight."""
    if dropout_p > 0.0 and rng_state is None:
        # Of an empty tensor: see lora_ext.functional.draw_rng_state.
        empty = torch.empty(0, device=x.device)
        rng_state = torch.ops.lora_ext.draw_rng_state(empty)
    if is_for_any(scaling):
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        scaling = torch.ones((), dtype=exact, device=x.device) * scaling
    factor, factor_tensor = (1.0, scaling) if isinstance(scaling, Tensor) else (scaling, None)
    return torch.ops.lora_ext.lora_linear_quantized(  # type: ignore[no-any-return]
        *(x, *operands, bias, lora_A, lora_B, lora_bias, factor, factor_tensor),
        *(dropout_p, rng_state),
    )


def _quantized_flops(
    x: Shape, tensors: object, layout: list[int], numbers: object, bias: object, lora_A: Shape,
    lora_B: Shape, *_: object, **options: object,
) -> int:  # fmt: skip
    return _lora_linear(x, layout[:2], bias, lora_A, lora_B)


def _quantized_bwd_flops(
    dy: Shape, x: object, h: object, tensors: object, layout: object, numbers: object,
    lora_A: Shape, lora_B: Shape, *others: Any, **options: object,
) -> int:  # fmt: skip
    dx, _, dA, dB, _ = others[-1]
    return _backward(dy, lora_A, lora_B, dx, dx, dA, dB)


for _name, _formula in (
    ("lora_linear_quantized", _quantized_flops),
    ("lora_linear_quantized_fwd", _quantized_flops),
    ("lora_linear_quantized_bwd", _quantized_bwd_flops),
):
    _operator = getattr(torch.ops.lora_ext, _name)
    if _operator not in flop_registry:  # once, also where the module is imported again
        register_flop_formula(_operator)(_formula)
