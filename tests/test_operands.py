"""Every operand of every operator in every wrong shape, dtype and layout and on another device:
refused by name before any memory is touched. torch.ops.lora_ext.* are there for everybody."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from test_errors import (
    BWD,
    DORA,
    DORA_BWD,
    DROPOUT,
    FWD,
    LOOKUP,
    LOOKUP_BWD,
    MASK,
    MERGE,
    OPS,
    SCALES,
    SCALES_BWD,
    Arguments,
    lora_linear,
)
from torch import Tensor

from lora_ext.functional import (
    column_scale,
    dora_linear,
    dropout,
    dropout_mask,
    lora_embedding,
    weight_norm,
)

MERGE_SCALED = {**MERGE, "weight_scale": torch.zeros(3)}
OPERATORS: dict[str, tuple[Callable[..., object], Arguments]] = {
    "lora_linear": (lora_linear, FWD | {"dropout_p": 0.5, "rng_state": MASK["rng_state"]}),
    "lora_linear_fwd": (OPS.lora_linear_fwd, FWD),
    "lora_linear_bwd": (OPS.lora_linear_bwd, BWD),
    "dora_linear": (dora_linear, DORA),
    "dora_linear_bwd": (OPS.dora_linear_bwd, DORA_BWD),
    "lora_embedding": (lora_embedding, LOOKUP),
    "lora_embedding_bwd": (OPS.lora_embedding_bwd, LOOKUP_BWD),
    "column_scale": (column_scale, SCALES),
    "column_scale_bwd": (OPS.column_scale_bwd, SCALES_BWD),
    "dropout": (dropout, DROPOUT),
    "dropout_mask": (dropout_mask, MASK),
    "merge_": (OPS.merge_, MERGE_SCALED),
    "weight_norm": (weight_norm, MERGE),
}


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "sparse", t.to_sparse()
    if t.dim() == 2:
        yield "csr", t.to_sparse_csr()
        yield "nested", torch.nested.nested_tensor(list(t))
    if t.dtype == torch.float32:
        yield "mkldnn", t.to_mkldnn()


def dtypes(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    for dtype in (torch.complex64, torch.bool, torch.float8_e4m3fn, torch.uint8):
        yield str(dtype), t.to(dtype)
    if t.dtype == torch.float32:
        yield "qint8", torch.quantize_per_tensor(t, 1.0, 0, torch.qint8)


def shapes(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "0-d", t.new_zeros(())
    yield "another dimension", t[None]
    for i in range(t.dim()):
        for size in (0, 1, t.shape[i] + 1):
            yield f"size {size} of {i}", t.new_zeros(*t.shape[:i], size, *t.shape[i + 1 :])


# What is right all the same: any rows where nothing says how many, any width of dropout, any rank
# of indices where y follows them, a table of any length that has the tokens.
RIGHT = {("dropout", "x"), ("lora_embedding", "indices"), ("lora_linear", "x")}
RIGHT |= {("lora_linear_fwd", "x"), ("dora_linear", "x"), ("column_scale", "z")}
RIGHT |= {("lora_embedding_bwd", "lora_A")}


WITHOUT_KERNELS = ("sparse", "csr", "nested", "mkldnn", "qint8")


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.filterwarnings("ignore:.*prototype", "ignore:.*beta state", "ignore:.*quantize")
def test_wrong_operands_are_refused_by_name(operator: str) -> None:
    call, right = OPERATORS[operator]
    call(**right)
    tensors = {name: t for name, t in right.items() if isinstance(t, Tensor)}
    for name, tensor in tensors.items():
        wrong = [*layouts(tensor), *dtypes(tensor)]
        if len(tensors) > 1:  # one alone may be on any device
            wrong.append(("meta", tensor.to("meta")))
        if (operator, name) not in RIGHT:
            wrong += shapes(tensor)
        for what, value in wrong:
            told = f"{operator}: {name}: {what}"
            with pytest.raises((ValueError, TypeError, IndexError, RuntimeError)) as raised:
                call(**right | {name: value})
                pytest.fail(f"{told} is taken")
            message = str(raised.value)
            if what in WITHOUT_KERNELS and re.search("Could not run|NestedTensor", message):
                continue  # torch's own words
            assert message.startswith(operator.removesuffix("_fwd")), told
            assert "got" in message and "expected" in message, told


def test_one_row_of_hidden_for_many_rows_without_outputs() -> None:
    call = BWD | {"dy": torch.zeros(5, 0), "weight": torch.zeros(0, 4), "lora_B": torch.zeros(0, 2)}
    OPS.lora_linear_bwd(**call)
    for rows in (0, 1, 4, 6):
        with pytest.raises(ValueError, match=rf"h: got shape \[{rows}, 2\], expected \[M, 2\]"):
            OPS.lora_linear_bwd(**call | {"h": torch.zeros(rows, 2)})


@pytest.mark.parametrize("padding_idx", [4, 0, -1, -4, -5, None], ids=str)
@pytest.mark.parametrize("by_freq", [False, True], ids=["", "by frequency"])
def test_padding_counts_as_in_torch(padding_idx: int | None, by_freq: bool) -> None:
    index = torch.tensor([0, 4, 4, 1])
    lora_A, lora_B = torch.randn(2, 5, requires_grad=True), torch.randn(3, 2)
    weight = torch.randn(5, 3, requires_grad=True)
    plain = torch.nn.functional.embedding(index, weight, padding_idx, scale_grad_by_freq=by_freq)
    plain = (
        plain
        + torch.nn.functional.embedding(index, lora_A.t(), padding_idx, scale_grad_by_freq=by_freq)
        @ lora_B.t()
    )
    ours = lora_embedding(
        index, weight, lora_A, lora_B, padding_idx=padding_idx, scale_grad_by_freq=by_freq
    )
    dy = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, (weight, lora_A), dy)
    torch.testing.assert_close(torch.autograd.grad(ours, (weight, lora_A), dy), expected)


@pytest.mark.parametrize("padding_idx", [5, -6, 100])
def test_padding_out_of_range_is_refused(padding_idx: int) -> None:
    lookup = LOOKUP | {"padding_idx": padding_idx}
    with pytest.raises(ValueError, match=f"lora_embedding: padding_idx: got {padding_idx}, expec"):
        lora_embedding(**lookup)
    for mode in (torch.enable_grad, torch.inference_mode):
        with (
            mode(),
            pytest.raises(ValueError, match=f"_embedding: padding_idx: got {padding_idx},"),
        ):
            OPS.lora_embedding(**lookup)
    with pytest.raises(ValueError, match=f"bwd: padding_idx: got {padding_idx}, expected a row"):
        OPS.lora_embedding_bwd(**LOOKUP_BWD | {"padding_idx": padding_idx})
