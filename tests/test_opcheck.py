"""torch.library.opcheck on every operator of the extension; an operator without samples fails."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mlp_problems import PARTS, trained
from problems import make_problem
from quant_matrices import ANY_SIZE
from torch import Tensor

import lora_ext
from lora_ext.quant.operator import operands_of

Sample = tuple[tuple[Any, ...], dict[str, Any]]
DTYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def problems() -> Iterator[Any]:
    for (dtype, adapter), dropout_p in itertools.product(DTYPES, (0.0, 0.1)):
        yield make_problem(
            (2, 3),
            10,
            6,
            4,
            dtype=dtype,
            adapter_dtype=adapter,
            dropout_p=dropout_p,
            bias=dropout_p > 0,
            lora_bias=dtype == torch.float32,
        )
    yield make_problem((), 10, 6, 4)
    yield make_problem((0,), 10, 6, 4)


def detached(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach() for t in tensors]


def lora_linear_samples() -> Iterator[Sample]:
    for p in problems():
        yield p.operands, {"scaling": p.scaling, "dropout_p": p.dropout_p, "rng_state": p.rng_state}
    p = make_problem((4,))
    yield p.operands, {"scaling_tensor": torch.tensor(0.5)}
    yield tuple(detached(*p.operands)), {}


def lora_linear_fwd_samples() -> Iterator[Sample]:
    for i, p in enumerate(problems()):
        options = {"dropout_p": p.dropout_p, "rng_state": p.rng_state, "return_h": i % 2 == 0}
        yield tuple(detached(*p.operands)), options


def saved_h(x: Tensor, A: Tensor) -> Tensor:
    compute = torch.float64 if A.dtype == torch.float64 else torch.float32
    return x.reshape(-1, A.shape[1]).to(compute) @ A.t().to(compute)


def lora_linear_bwd_samples() -> Iterator[Sample]:
    for i, p in enumerate(problems()):
        x, weight, _, A, B, _ = detached(*p.operands)
        h = saved_h(x, A) if i % 3 == 0 else None
        mask = [True] * 6 if i % 2 == 0 else [True, False, False, True, True, False]
        yield (p.dy, x, h, weight, A, B, p.scaling, None, p.dropout_p, p.rng_state, mask), {}
    p = make_problem((4,))
    x, weight, _, A, B, _ = detached(*p.operands)
    only_b = [False, False, False, False, True, False]
    yield (p.dy, None, x @ A.t(), None, A, B, 1.0, torch.tensor(0.5), 0.0, None, only_b), {}


def draw_rng_state_samples() -> Iterator[Sample]:
    for shape in [(), (0,), (1,), (2, 3), (4, 5, 6), (1, 1, 1, 1)]:
        for dtype in (torch.float32, torch.bfloat16):
            yield (torch.zeros(shape, dtype=dtype),), {}


def dropout_mask_samples() -> Iterator[Sample]:
    for rows, columns in [(0, 4), (1, 1), (3, 127), (2, 128), (2, 129), (5, 0)]:
        for dropout_p in (0.0, 0.3):
            yield (torch.tensor([7, 0]), rows, columns, dropout_p), {}


def merge_samples() -> Iterator[Sample]:
    for (dtype, adapter), scaling in itertools.product(DTYPES, (1.0, -0.5)):
        p = make_problem((1,), 10, 6, 4, dtype=dtype, adapter_dtype=adapter)
        weight, A, B = detached(p.weight, p.lora_A, p.lora_B)
        yield (weight, A, B, scaling), {}
        yield (weight, A, B, scaling, torch.rand(6)), {}


def weight_norm_samples() -> Iterator[Sample]:
    for p in problems():
        yield tuple(detached(p.weight, p.lora_A, p.lora_B)), {"scaling": p.scaling}


def dropout_samples() -> Iterator[Sample]:
    for dtype, grad in itertools.product([d for d, _ in DTYPES], (False, True)):
        yield (torch.randn(3, 130).to(dtype).requires_grad_(grad), torch.tensor([7, 0]), 0.3), {}


def column_scale_samples() -> Iterator[Sample]:
    for p in problems():
        z, scale = p.dy.clone().requires_grad_(), torch.randn(6, requires_grad=True)
        yield (z, scale), {"bias": p.bias}
        yield tuple(detached(z, scale, p.bias)), {}


def column_scale_bwd_samples() -> Iterator[Sample]:
    masks = itertools.cycle([[True] * 3, [True, False, False], [False, True, True]])
    for p, mask in zip(problems(), masks, strict=False):
        yield (p.dy, p.dy.clone() if mask[1] else None, torch.randn(6), mask), {}


def lora_embedding_operands() -> Iterator[tuple[Tensor, ...]]:
    for i, (dtype, adapter) in enumerate(DTYPES):
        p = make_problem((1,), 7, 6, 4, dtype=dtype, adapter_dtype=adapter)
        weight = torch.randn(7, 6).to(dtype).requires_grad_(i % 2 == 0)
        for shape in [(5,), (2, 3)]:
            index_dtype = torch.int32 if i == 1 else torch.int64
            indices = torch.arange(math.prod(shape), dtype=index_dtype).view(shape) % 4
            yield indices, weight, p.lora_A, p.lora_B
    yield torch.tensor(3), weight, p.lora_A, p.lora_B
    yield torch.empty(0, dtype=torch.int64), weight, p.lora_A, p.lora_B


def lora_embedding_samples() -> Iterator[Sample]:
    for i, operands in enumerate(lora_embedding_operands()):
        lookup = {"padding_idx": 1} if i % 3 == 0 else {"scale_grad_by_freq": i % 3 == 1}
        yield operands, {"scaling": 0.5, **lookup}


def lora_embedding_fwd_samples() -> Iterator[Sample]:
    for operands in lora_embedding_operands():
        yield tuple(detached(*operands)), {"scaling": -2.0}


def lora_embedding_bwd_samples() -> Iterator[Sample]:
    for i, operands in enumerate(lora_embedding_operands()):
        indices, weight, A, B = (t.detach() for t in operands)
        dy = torch.randn(*indices.shape, 6).to(weight.dtype)
        mask = [i % 3 != 1, i % 3 != 2]
        yield (dy, indices, A, B, 0.5, i % 2 - 1, i % 4 == 0, mask), {}


def dora_linear_samples() -> Iterator[Sample]:
    state = torch.tensor([7, 0])
    for rows, (dtype, adapter) in itertools.product([(2, 3), (2, 40)], DTYPES):
        p = make_problem(rows, 10, 6, 4, dtype=dtype, adapter_dtype=adapter, bias=rows == (2, 3))
        x, weight, bias, A, B, _ = p.operands
        scale = torch.rand(6, requires_grad=True)
        yield (x, weight.detach(), bias, A, B, scale, p.scaling, 0.1, state), {}
    yield (x, weight, bias, A, B, scale, p.scaling, 0.1, state), {}


def dora_linear_fwd_samples() -> Iterator[Sample]:
    for (*tensors, scaling, dropout_p, state), _ in dora_linear_samples():
        yield (*detached(*tensors), scaling, dropout_p, state), {}


def dora_linear_bwd_samples() -> Iterator[Sample]:
    masks = itertools.cycle(
        [[True] * 5, [True, False, True, True, False], [False, True, False, True, True]]
    )
    for ((*tensors, scaling, dropout_p, state), _), mask in zip(
        dora_linear_samples(), masks, strict=False
    ):
        x, weight, _, A, B, scale = detached(*tensors)
        dy = torch.randn(*x.shape[:-1], 6).to(x.dtype)
        v = torch.randn_like(dy) if mask[4] else None
        yield (dy, x, v, weight, A, B, scale, scaling, dropout_p, state, mask), {}


def grouped_operands() -> Iterator[tuple[Any, ...]]:
    """x, weight, bias, the lists of adapters, and which rows have them: two, a third without."""
    for i, ((dtype, adapter), p) in enumerate(itertools.product(DTYPES, (0.0, 0.3))):
        first = make_problem((2, 3), 10, 6, 4, dtype=dtype, adapter_dtype=adapter, bias=i % 2 == 0)
        other = make_problem((2, 3), 10, 6, 3, dtype=dtype)
        biases = [first.lora_bias, other.weight.new_empty(0)] if first.lora_bias is not None else []
        rounds = [0, 3, 1, 1] if i % 5 == 0 else []
        order = torch.tensor([0, 1, 5, 0 if rounds else 3], dtype=torch.int32)
        factor = torch.rand(4, requires_grad=i % 4 < 2) if i % 3 == 0 else None
        yield (
            *(first.x, first.weight, first.bias, [first.lora_A, other.lora_A]),
            *([first.lora_B, other.lora_B], biases, order, [3, 1], factor, [2.0, 0.5]),
            *([p, 0.0], torch.tensor([7, 0]) if p else None, rounds, [], []),
        )
        # A stack: the first matrix has an adapter on both its rows, the third on three of four.
        weight = torch.stack([first.weight, first.weight, other.weight]).detach()
        bias = torch.randn(3, 6).to(dtype).requires_grad_() if i % 2 == 0 else None
        yield (
            *(first.x, weight.requires_grad_(i % 3 == 0), bias, [first.lora_A, other.lora_A]),
            *([first.lora_B, other.lora_B], biases, torch.tensor([0, 1, 0, 2, 3]).int(), [2, 3]),
            *(torch.rand(5, requires_grad=True) if i % 4 == 0 else None, [2.0, 0.5], [p, 0.0]),
            *(torch.tensor([7, 0]) if p else None, [], [2, 0, 4], [1, 0, 1]),
        )


def detached_all(operands: tuple[Any, ...]) -> list[Any]:
    return [
        [t.detach() for t in one]
        if isinstance(one, list) and one and isinstance(one[0], Tensor)
        else one.detach()
        if isinstance(one, Tensor)
        else one
        for one in operands
    ]


def lora_linear_grouped_samples() -> Iterator[Sample]:
    for operands in grouped_operands():
        yield operands, {}
    yield tuple(detached_all(operands)), {}


def lora_linear_grouped_fwd_samples() -> Iterator[Sample]:
    for i, operands in enumerate(grouped_operands()):
        yield (*detached_all(operands), i % 2 == 0), {}


def lora_linear_grouped_bwd_samples() -> Iterator[Sample]:
    for i, operands in enumerate(grouped_operands()):
        detached_operands = detached_all(operands)
        _, h = torch.ops.lora_ext.lora_linear_grouped_fwd(*detached_operands, return_h=True)
        x, weight, _, *adapters = detached_operands
        dy = torch.randn(2, 3, 6).to(x.dtype)
        mask = [True, i % 2 == 0, i % 3 == 0, adapters[5] is not None]
        wanted = [[3, 0], [7 if adapters[2] else 3, 3]][i % 2]
        yield (dy, x, h if mask[3] or i % 2 else None, weight, *adapters, mask, wanted), {}


def multi_operands() -> Iterator[tuple[Any, ...]]:
    """x, and the lists of three layers: the second without adapter, the third of another rank."""
    for i, ((dtype, adapter), p) in enumerate(itertools.product(DTYPES, (0.0, 0.3))):
        first = make_problem((2, 3), 10, 6, 4, dtype=dtype, adapter_dtype=adapter, bias=i % 2 == 0)
        other = make_problem((2, 3), 10, 5, 3, dtype=dtype, bias=i % 2 == 0)
        none = first.x.new_empty(0)
        biases = [first.bias, none, other.bias] if first.bias is not None else []
        lora_bias = [torch.ones(6, dtype=adapter), none, none] if i % 4 == 0 else []
        scaling_tensors = [torch.tensor(0.5), none, none] if i % 3 == 0 else []
        yield (
            *(first.x, [first.weight, first.weight.detach(), other.weight], biases),
            *([first.lora_A, none, other.lora_A], [first.lora_B, none, other.lora_B], lora_bias),
            *([2.0, 1.0, 0.5], scaling_tensors, [p, 0.0, 0.0]),
            [torch.tensor([7, 0]), none, none] if p else [],
        )


def lora_linear_multi_samples() -> Iterator[Sample]:
    for operands in multi_operands():
        yield operands, {}
    yield tuple(detached_all(operands)), {}
    x, *lists = next(
        operands for operands in multi_operands() if operands[0].dtype == torch.bfloat16
    )
    yield (x.detach().float().requires_grad_(), *lists, True), {}  # cast_x


def lora_linear_multi_fwd_samples() -> Iterator[Sample]:
    for i, operands in enumerate(multi_operands()):
        yield (*detached_all(operands), [i % 2, 0, 1]), {}


def lora_linear_multi_bwd_samples() -> Iterator[Sample]:
    for i, operands in enumerate(multi_operands()):
        x, weight, _, A, B, _, *others = detached_all(operands)
        arguments = detached_all(operands)
        _, h = torch.ops.lora_ext.lora_linear_multi_fwd(*arguments, [1, 0, 1])
        dy = [torch.randn(2, 3, len(one)).to(x.dtype) for one in weight]
        wanted = [[62, 6, 30], [24, 0, 8], [16, 2, 16]][i % 3]
        dx_type = torch.float32 if x.dtype == torch.bfloat16 and i % 4 != 3 else None
        arguments = dy, x, h if i % 2 else [], weight, A, B, *others, i % 4 != 3, wanted
        yield (arguments, {"dx_type": dx_type} if dx_type else {})


def mlp_operands() -> Iterator[tuple[Any, ...]]:
    for number in range(12):
        i, dtype = number % 2, (torch.float32, torch.bfloat16, torch.float64)[number % 3]
        problem = trained(dtype, 0.3 * i, (number % 4 * 3, 4, 5, 3))
        none = torch.empty(0, dtype=dtype)
        lists = [[getattr(one, name) for one in problem.layers] for name in PARTS]
        lists = [[none if one is None else one for one in entries] for entries in lists]
        states = [torch.tensor([7, 0])] * 3 if i else []
        yield (problem.x, *lists, [1.0, 0.5, 2.0], [], [0.3 * i] * 3, states, "silu")


def lora_mlp_samples() -> Iterator[Sample]:
    for i, operands in enumerate(mlp_operands()):
        yield (*operands, i % 4 > 1), {}
    yield (*detached_all(operands), False), {}
    x, *lists = next(operands for operands in mlp_operands() if operands[0].dtype == torch.bfloat16)
    yield (x.detach().float().requires_grad_(), *lists, False, True), {}  # cast_x


def lora_mlp_fwd_samples() -> Iterator[Sample]:
    for operands in mlp_operands():
        yield (*detached_all(operands), [0, 1, 1]), {}


def lora_mlp_bwd_samples() -> Iterator[Sample]:
    for i, operands in enumerate(mlp_operands()):
        x, *others = detached_all(operands)
        _, made, h = torch.ops.lora_ext.lora_mlp_fwd(x, *others, [1, 1, 1])
        dy = torch.randn(*x.shape[:-1], 3).to(x.dtype)
        made, h = ([], []) if i % 4 > 1 else (made, h)
        options = {"dx_type": torch.float32} if x.dtype == torch.bfloat16 else {}
        yield (dy, x, made, h, *others, i % 3 > 0, [[24, 16, 30], [0, 0, 24]][i % 2]), options


def quantized_problems() -> Iterator[tuple[Any, Any]]:
    """A problem each, and the operands of a matrix that is as large as its weight."""
    matrices = itertools.cycle(ANY_SIZE.values())
    for p, make in zip(problems(), matrices, strict=False):
        yield p, operands_of(make(6, 10))


def lora_linear_quantized_samples() -> Iterator[Sample]:
    for p, weight in quantized_problems():
        x, _, *others = p.operands
        options = {"scaling": p.scaling, "dropout_p": p.dropout_p, "rng_state": p.rng_state}
        yield (x, *weight, *others), options
    yield (x, *weight, *detached(*others)), {"scaling_tensor": torch.tensor(0.5)}


def lora_linear_quantized_fwd_samples() -> Iterator[Sample]:
    for i, (p, weight) in enumerate(quantized_problems()):
        x, _, *others = detached(*p.operands)
        options = {"dropout_p": p.dropout_p, "rng_state": p.rng_state, "return_h": i % 2 == 0}
        yield (x, *weight, *others), options


def lora_linear_quantized_bwd_samples() -> Iterator[Sample]:
    for i, (p, (tensors, *layout)) in enumerate(quantized_problems()):
        x, _, _, A, B, _ = detached(*p.operands)
        h = saved_h(x, A) if i % 3 == 0 else None
        mask = [True] * 5 if i % 2 == 0 else [False, False, True, True, False]
        tensors = tensors if mask[0] else []
        options = (p.scaling, None, p.dropout_p, p.rng_state, mask)
        yield (p.dy, x, h, tensors, *layout, A, B, *options), {}


def dequantize_samples() -> Iterator[Sample]:
    for i, (_, operands) in enumerate(quantized_problems()):
        yield (*operands, (torch.float32, torch.bfloat16, torch.float64)[i % 3]), {}


SAMPLES = {
    "dequantize": dequantize_samples,
    "dora_linear": dora_linear_samples,
    "dora_linear_fwd": dora_linear_fwd_samples,
    "dora_linear_bwd": dora_linear_bwd_samples,
    "lora_embedding": lora_embedding_samples,
    "lora_embedding_fwd": lora_embedding_fwd_samples,
    "lora_embedding_bwd": lora_embedding_bwd_samples,
    "lora_linear": lora_linear_samples,
    "lora_linear_fwd": lora_linear_fwd_samples,
    "lora_linear_bwd": lora_linear_bwd_samples,
    "lora_linear_grouped": lora_linear_grouped_samples,
    "lora_linear_grouped_fwd": lora_linear_grouped_fwd_samples,
    "lora_linear_grouped_bwd": lora_linear_grouped_bwd_samples,
    "lora_linear_multi": lora_linear_multi_samples,
    "lora_linear_multi_fwd": lora_linear_multi_fwd_samples,
    "lora_linear_multi_bwd": lora_linear_multi_bwd_samples,
    "lora_mlp": lora_mlp_samples,
    "lora_mlp_fwd": lora_mlp_fwd_samples,
    "lora_mlp_bwd": lora_mlp_bwd_samples,
    "lora_linear_quantized": lora_linear_quantized_samples,
    "lora_linear_quantized_fwd": lora_linear_quantized_fwd_samples,
    "lora_linear_quantized_bwd": lora_linear_quantized_bwd_samples,
    "draw_rng_state": draw_rng_state_samples,
    "dropout_mask": dropout_mask_samples,
    "dropout": dropout_samples,
    "merge_": merge_samples,
    "weight_norm": weight_norm_samples,
    "column_scale": column_scale_samples,
    "column_scale_bwd": column_scale_bwd_samples,
}
CASES = [
    pytest.param(name, *sample, id=f"{name}-{i}")
    for name, samples in SAMPLES.items()
    for i, sample in enumerate(samples())
]


def test_every_operator_has_twelve_samples() -> None:
    names = torch._C._dispatch_get_all_op_names()
    operators = {n.split("::")[1].split(".")[0] for n in names if n.startswith("lora_ext::")}
    assert operators == set(SAMPLES)
    for name, samples in SAMPLES.items():
        assert len(list(samples())) >= 12, name


@pytest.mark.parametrize(("name", "args", "kwargs"), CASES)
def test_opcheck(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # test_aot_dispatch compares two runs, and a draw differs from the next one by design.
    if name != "draw_rng_state":
        utils.append("test_aot_dispatch_dynamic")
    op = getattr(torch.ops.lora_ext, name).default
    torch.library.opcheck(op, args, kwargs, test_utils=utils)


def test_bound_function_builds_a_cpp_autograd_node() -> None:
    p = make_problem((4,))
    y = lora_ext._extension._C.lora_linear(*p.operands)
    assert type(y.grad_fn).__name__ == "CppFunction"
    assert "LoraLinear" in y.grad_fn.name()
