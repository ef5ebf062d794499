"""A linear layer on a quantized matrix, without any library."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from lora_ext.arguments import describe
from lora_ext.quant.bitsandbytes import DTYPES, INT8_FACTOR, STATE
from lora_ext.quant.call import cast_by, compute_dtype, dequantized, in_dtype_of
from lora_ext.quant.checks import FLOATS, fail
from lora_ext.quant.codebooks import four_bit
from lora_ext.quant.encode import quantize
from lora_ext.quant.kinds import OWN
from lora_ext.quant.operator import Operands, operands_of
from lora_ext.quant.read import read_state_dict
from lora_ext.quant.weight import NestedScales, QuantizedWeight

QUANT_TYPES = ("nf4", "fp4", "int8")
# What bitsandbytes saves beside 4-bit codes.
_BESIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"{STATE}nf4", f"{STATE}fp4")
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _is_of(matrix: QuantizedWeight, quant_type: str) -> bool:
    """Whether `quantize` could have made it, as this type: state dicts can say no more."""
    if matrix.rounding is not torch.float32 or matrix.zero_point is not None:
        return False
    if quant_type == "int8":
        scales = isinstance(matrix.scales, Tensor) and matrix.scales.dtype is torch.float32
        by_rows = matrix.packing == "int8" and matrix.block_size == matrix.shape[1]
        return by_rows and scales and matrix.factor == INT8_FACTOR and matrix.shift is None
    if matrix.packing != "high_first" or matrix.factor is not None or matrix.shift is not None:
        return False
    expected = four_bit(quant_type, matrix.device)
    return matrix.codebook is not None and torch.equal(matrix.codebook, expected)


class Linear(nn.Linear):
    """`y = x W^T + b` with W in the codes of bitsandbytes' NF4, FP4 or LLM.int8().

    `weight` is a frozen parameter: the packed codes [ceil(N K / 2), 1] in uint8, or the rows [N, K]
    in int8. State dicts have the keys and tensors of bitsandbytes' Linear4bit and Linear8bitLt. A
    forward dequantises W for the call; backward keeps the codes, and dequantises again.

    Attributes:
        quant_type: "nf4", "fp4" or "int8".
        compute_dtype: that of the product; that of x if None.
        source_cls: transformers' Conv1D where the layer is in the place of one, as that calls it.
    """

    source_cls: type[nn.Module] | None = None
    quant_type: str
    compute_dtype: torch.dtype | None
    _matrix: QuantizedWeight
    _cast_to: torch.dtype | None = None

    def __init__(self) -> None:
        raise TypeError("lora_ext.quant.Linear: is made by from_linear, from_weight or quantize_")

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        quant_type: str = "nf4",
        *,
        block_size: int | None = None,
        nested: bool = False,
        compute_dtype: torch.dtype | None = None,
        name: str = "weight",
    ) -> Self:
        """The layer with its weight quantized; shares the bias, and the mode.

        Args:
            quant_type, block_size, nested, name: see `quantize`.

        Raises:
            TypeError: linear is not exactly an nn.Linear.
            ValueError: see `quantize`.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"lora_ext.quant.Linear.from_linear: linear: got {type(linear).__qualname__}, "
                "expected exactly an nn.Linear"
            )
        matrix = quantize(linear.weight, quant_type, block_size, nested, name)
        matrix = replace(matrix, dtype=linear.weight.dtype)  # int8 does not tell
        self = cls.from_weight(matrix, quant_type, linear.bias, compute_dtype)
        return self.train(linear.training)

    @classmethod
    def from_weight(
        cls,
        matrix: QuantizedWeight,
        quant_type: str,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
    ) -> Self:
        """A layer on a matrix that is quantized already, as `quantize` does it.

        Raises:
            ValueError: it is quantized in another way.
        """
        if quant_type not in QUANT_TYPES:
            fail(matrix.name, "quant_type", quant_type, f"one of {list(QUANT_TYPES)}")
        if compute_dtype is not None and compute_dtype not in FLOATS:
            expected = f"None or one of {list(FLOATS)}"
            fail("lora_ext.quant.Linear", "compute_dtype", repr(compute_dtype), expected)
        if not _is_of(matrix, quant_type):
            fail(
                matrix.name, "matrix", repr(matrix), f"one that quantize(..., {quant_type!r}) made"
            )
        self: Self = cls.__new__(cls)
        nn.Module.__init__(self)
        self.out_features, self.in_features = matrix.shape
        self.quant_type, self.compute_dtype = quant_type, compute_dtype
        shape = matrix.shape if quant_type == "int8" else (-1, 1)
        self.weight = nn.Parameter(matrix.codes.view(shape), requires_grad=False)
        self.register_parameter("bias", bias)
        self._matrix = matrix
        return self

    @property
    def quantized_weight(self) -> QuantizedWeight:
        """The matrix, on the bytes of `weight`."""
        if self._matrix.codes.data_ptr() != self.weight.data_ptr():
            self._rebind()
        return self._matrix

    def traced_operands(self) -> Operands:
        """What operators take for the matrix, for compiled code: it cannot look whether the
        parameter's bytes are others, so they are taken from there."""
        tensors, layout, numbers = operands_of(self._matrix)
        return [self.weight.view(-1), *tensors[1:]], layout, numbers

    def __getstate__(self) -> dict[str, Any]:
        """The matrix without its codes: they are the parameter's, and would be pickled twice."""
        fields = {name: value for name, value in vars(self._matrix).items() if name != "codes"}
        return self.__dict__ | {"_matrix": fields}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._rebind(state["_matrix"])

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """A cast is one of the matrix's dtype: codes and scales stay."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        dtype = cast_by(fn)
        if dtype in FLOATS:
            self._matrix = replace(self._matrix, dtype=dtype)
        self._cast_to = dtype or self._cast_to
        if self._matrix.device != self.weight.device:
            self._rebind()
        return self

    def _rebind(self, fields: dict[str, Any] | None = None, copy: bool = False) -> None:
        """Makes the matrix, or one of these fields, one of the parameter's bytes, which may be
        others, elsewhere."""
        fields = vars(self._matrix) if fields is None else fields
        weight = self.weight.detach()
        device = weight.device

        def moved(tensor: Any) -> Any:
            if isinstance(tensor, NestedScales):
                codes, codebook, absmax = map(moved, tensor.tensors())
                return replace(tensor, codes=codes, codebook=codebook, absmax=absmax)
            return tensor.to(device, copy=copy) if isinstance(tensor, Tensor) else tensor

        parts = {name: moved(fields[name]) for name in ("codebook", "scales")}
        self._matrix = QuantizedWeight(**(fields | parts | {"codes": weight.view(-1)}))

    def forward(self, input: Tensor) -> Tensor:
        """x [..., in_features] → [..., out_features]."""
        if not input.is_floating_point():
            raise TypeError(
                f"lora_ext.quant.Linear ({self._matrix.name}): input: got {describe(input)}, "
                "expected floating point: code that casts x to the dtype of this layer's weight, "
                "which is codes? leave the layer out (exclude_modules of quantize_)"
            )
        dtype = compute_dtype(self.compute_dtype, input)
        bias = None if self.bias is None else self.bias.to(dtype)
        with dequantized(self.quantized_weight, dtype) as weight:
            y = nn.functional.linear(input.to(dtype), weight, bias)
        return in_dtype_of(input, y)

    def extra_repr(self) -> str:
        nested = ", nested" if isinstance(self._matrix.scales, NestedScales) else ""
        size = "" if self.quant_type == "int8" else f", block_size={self._matrix.block_size}"
        return f"{super().extra_repr()}, quant_type={self.quant_type}{size}{nested}"

    # State dicts, as bitsandbytes'

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        matrix = self.quantized_weight
        if self.quant_type == "int8":
            destination[f"{prefix}SCB"] = matrix.scales
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)
            return
        fields: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": matrix.block_size,
            "dtype": _NAMES[matrix.dtype],
            "shape": matrix.shape,
        }
        key, scales = f"{prefix}weight", matrix.scales
        if isinstance(scales, NestedScales):
            destination[f"{key}.absmax"] = scales.codes
            destination[f"{key}.nested_absmax"] = scales.absmax
            destination[f"{key}.nested_quant_map"] = scales.codebook
            fields["nested_blocksize"] = scales.block_size
            fields["nested_dtype"] = _NAMES[scales.absmax.dtype]
            fields["nested_offset"] = scales.offset
        else:
            destination[f"{key}.absmax"] = scales
        destination[f"{key}.quant_map"] = matrix.codebook
        packed = torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)
        destination[f"{key}.{STATE}{self.quant_type}"] = packed

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """The whole of a quantized weight, or nothing: codes without their scales are refused."""
        key = f"{prefix}weight"
        own = {f"{key}.{name}" for name in _BESIDE} | {f"{prefix}SCB", f"{prefix}weight_format"}
        if key in state_dict:
            try:
                matrix = read_state_dict(state_dict, key)
                self._check_loaded(matrix, state_dict, key)
            except ValueError as error:
                error_msgs.append(str(error))
                return
            assign = local_metadata.get("assign_to_params_buffers", False)
            if assign:  # the weight may be on the meta device
                codes = matrix.codes.view(self.weight.shape)
                self.weight = nn.Parameter(codes, requires_grad=False)
            else:
                codes = matrix.codes.to(self.weight.device, copy=True)
                self.weight.data = codes.view(self.weight.shape)
            dtype = self._matrix.dtype if self.quant_type == "int8" else matrix.dtype
            self._matrix = replace(matrix, dtype=dtype, name=self._matrix.name)
            self._rebind(copy=not assign)
        hidden = {name: value for name, value in state_dict.items() if name not in own}
        if key in hidden:
            hidden[key] = self.weight.detach()
        super()._load_from_state_dict(
            hidden, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _check_loaded(self, matrix: QuantizedWeight, state: dict[str, Any], key: str) -> None:
        if matrix.shape != self._matrix.shape:
            fail(key, "shape", list(matrix.shape), str(list(self._matrix.shape)))
        int8 = matrix.packing == "int8"
        if int8 != (self.quant_type == "int8") or (
            not int8 and f"{key}.{STATE}{self.quant_type}" not in state
        ):
            four = next((one for one in QUANT_TYPES if f"{key}.{STATE}{one}" in state), None)
            got = "'int8'" if int8 else repr(four)
            fail(key, "quant_type", got, f"{self.quant_type!r}, which the layer is")


OWN.add(Linear)
