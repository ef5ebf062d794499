"""lora_linear_quantized as an operator: derivatives, transforms, autocast, graphs, what it keeps,
its messages, its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from problems import Problem, kept_for_backward
from quant_matrices import MATRICES, quantized, values
from test_quant_linear import call, problem_on
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import lora_ext
from lora_ext.paths import lora_linear_quantized_path
from lora_ext.quant import QuantizedWeight
from lora_ext.quant.operator import (
    lora_linear_quantized,
    operands_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NF4 = quantized("nf4")(6, 10)


def double_problem(dropout_p: float, M: int = 3) -> Problem:
    return problem_on(NF4, (M,), 2, dtype=torch.float64, lora_bias=True, dropout_p=dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("M", [1, 3, 18])
def test_gradcheck(M: int, dropout_p: float) -> None:
    p = double_problem(dropout_p, M)
    x, _, *others = p.operands

    def function(x: Tensor, *others: Tensor) -> Tensor:
        return call(p, NF4, x, None, *others)

    assert torch.autograd.gradcheck(function, (x, *others), fast_mode=M > 3)
    if M == 3:
        assert torch.autograd.gradgradcheck(function, (x, *others))


@pytest.mark.parametrize("wanted", ["x", "lora_A", "lora_B", "bias", "lora_bias"])
def test_only_what_is_wanted(wanted: str) -> None:
    p = double_problem(0.0)
    names = ("x", "bias", "lora_A", "lora_B", "lora_bias")
    leaves = {name: getattr(p, name).detach().requires_grad_(name == wanted) for name in names}
    y = lora_linear_quantized(weight=NF4, **leaves, scaling=p.scaling)
    y.backward(p.dy)
    assert {name for name in names if leaves[name].grad is not None} == {wanted}
    x, *others = (leaves[name] for name in names)
    dense = lora_ext.lora_linear(x, p.weight.detach(), *others, scaling=p.scaling)
    want = torch.autograd.grad(dense, leaves[wanted], p.dy)[0]
    torch.testing.assert_close(leaves[wanted].grad, want, rtol=1e-12, atol=1e-12)


def test_double_backward_without_x() -> None:
    p = double_problem(0.0)
    y = lora_linear_quantized(p.x, NF4, None, p.lora_A.detach(), p.lora_B)
    with pytest.raises(RuntimeError, match=r"^lora_linear_quantized: double backward: x was not"):
        torch.autograd.grad(y.sum(), p.lora_B, create_graph=True)


@pytest.mark.parametrize("M", [2, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept(dtype: torch.dtype, M: int) -> None:
    """The weight's own tensors, x, and h only where x is not kept: nothing of N times K."""
    weight = quantized("nf4", nested=True)(40, 72)
    own = {tensor.data_ptr() for tensor in operands_of(weight)[0]}
    p = problem_on(weight, (M,), dtype=dtype)
    kept = kept_for_backward(lambda: call(p, weight))
    assert own <= {tensor.data_ptr() for tensor in kept}
    others = [tensor for tensor in kept if tensor.data_ptr() not in own]
    assert sum(tensor.numel() for tensor in others) == M * 72 + M * 8 + 8 * (40 + 72)
    x = p.x.detach()
    kept = kept_for_backward(
        lambda: lora_linear_quantized(x, weight, None, p.lora_A.detach(), p.lora_B)
    )
    assert sum(tensor.numel() for tensor in kept) == M * 8 + 8 * (40 + 72)


def test_codes_that_change_before_backward() -> None:
    weight = quantized("int8")(6, 10)
    p = problem_on(weight, (4,))
    y = call(p, weight)
    weight.codes.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_inference_and_no_grad() -> None:
    p = problem_on(NF4, (9,), 2)
    with torch.no_grad():
        y = call(p, NF4)
    assert not y.requires_grad and torch.equal(y, call(p, NF4))
    with torch.inference_mode():
        assert torch.equal(call(p, NF4), y)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [5, 30])
def test_autocast(M: int, adapter: torch.dtype) -> None:
    """x and bias are cast, scales are not; a float32 adapter stays."""
    weight = quantized("nf4")(40, 72)
    p = problem_on(weight, (M,), dtype=torch.bfloat16, adapter_dtype=adapter)
    want = [call(p, weight), *torch.autograd.grad(call(p, weight), [p.x, p.lora_A], p.dy)]
    p.x, p.bias = p.x.detach().float().requires_grad_(), p.bias.detach().float()
    with torch.autocast("cpu", torch.bfloat16):
        y = call(p, weight)
    for got, other in zip([y, *torch.autograd.grad(y, [p.x, p.lora_A], p.dy)], want, strict=True):
        assert torch.equal(got.to(other.dtype), other)
    assert y.dtype is torch.bfloat16


def test_transforms() -> None:
    """vmap, jacrev, jvp and forward mode are those of the dequantized matrix."""
    p = double_problem(0.0, 4)
    x, weight, *others = (None if t is None else t.detach() for t in p.operands)

    def both(f: Any) -> tuple[Any, Any]:
        return (
            f(lambda x: lora_linear_quantized(x, NF4, *others)),
            f(lambda x: lora_ext.lora_linear(x, weight, *others)),
        )

    func = torch.func
    tangent = torch.randn_like(x)
    for transform in (
        lambda f: func.vmap(f)(x),
        lambda f: func.jacrev(f)(x),
        lambda f: func.jacfwd(f)(x),
        lambda f: func.jvp(f, (x,), (tangent,))[1],
        lambda f: func.vmap(func.grad(lambda row: f(row).square().sum()))(x),
    ):
        got, want = both(transform)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        got, want = both(lambda f: torch.autograd.forward_ad.unpack_dual(f(dual)).tangent)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


class Net(torch.nn.Module):
    """Two layers on matrices that differ in their numbers, too."""

    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p
        self.weights = [quantized("nf4", nested=True)(96, 64), quantized("int8")(32, 96)]
        generator = torch.Generator().manual_seed(0)
        for i, weight in enumerate(self.weights):
            N, K = weight.shape
            for name, shape in (("A", (4, K)), ("B", (N, 4)), ("bias", (N,))):
                value = torch.randn(shape, generator=generator) * 0.1
                self.register_parameter(f"{name}{i}", torch.nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        for i, weight in enumerate(self.weights):
            A, B, bias = (getattr(self, f"{name}{i}") for name in ("A", "B", "bias"))
            x = torch.tanh(
                lora_linear_quantized(x, weight, bias, A, B, scaling=2.0, dropout_p=self.dropout_p)
            )
        return x


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_compile(dropout_p: float) -> None:
    torch._dynamo.reset()
    counters.clear()
    net = Net(dropout_p)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)

    def run(function: Any, x: Tensor) -> list[Tensor]:
        torch.manual_seed(3)
        y = function(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])]

    for M in (3, 5, 40):
        x = torch.randn(M, 64, requires_grad=True)
        for got, want in zip(run(compiled, x), run(net, x), strict=True):
            assert torch.equal(got, want)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_compiled_for_several_matrices() -> None:
    """One function called with matrices of other numbers: compiled again, never broken."""
    torch._dynamo.reset()
    counters.clear()
    A, B, x = torch.randn(2, 64), torch.randn(32, 2), torch.randn(20, 64)

    def function(weight: QuantizedWeight, scaling: float) -> Tensor:
        return lora_linear_quantized(x, weight, None, A, B, scaling=scaling)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for i in range(4):
        weight = quantized("nf4", nested=True)(32, 64)
        object.__setattr__(weight.scales, "offset", 0.01 * i)
        torch.testing.assert_close(compiled(weight, 0.5 * i), function(weight, 0.5 * i))
    assert not counters["graph_break"]


def test_fake_tensors_and_flops() -> None:
    p = problem_on(NF4, (2, 3), 2)
    with FlopCounterMode(display=False) as counted:
        call(p, NF4).sum().backward()
    x, weight, *others = (None if t is None else t.detach().requires_grad_() for t in p.operands)
    with FlopCounterMode(display=False) as dense:
        lora_ext.lora_linear(x, weight.detach(), *others).sum().backward()
    assert counted.get_total_flops() == dense.get_total_flops() > 0
    tensors, layout, numbers = operands_of(NF4)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t.detach()) for t in (p.x, p.lora_A, p.lora_B)]
        held = [mode.from_tensor(t) for t in tensors]
        y = torch.ops.lora_ext.lora_linear_quantized(
            fake[0], held, layout, numbers, None, fake[1], fake[2]
        )
    assert y.shape == (2, 3, 6) and y.dtype is torch.float32


T = torch.ones
RIGHT: dict[str, Any] = {"x": T(5, 10), "weight": NF4, "bias": T(6), "lora_A": T(2, 10)}
RIGHT |= {"lora_B": T(6, 2), "lora_bias": T(6)}
SAME_AS_DENSE: dict[str, dict[str, Any]] = {
    "x 0-d": {"x": T(())},
    "x of integers": {"x": T(5, 10).int()},
    "x too narrow": {"x": T(5, 9)},
    "x sparse": {"x": T(5, 10).to_sparse()},
    "x and A too narrow": {"x": T(5, 9), "lora_A": T(2, 9)},
    "A": {"lora_A": T(2, 9)},
    "A's dtype": {"lora_A": T(2, 10).double(), "lora_B": T(6, 2).double()},
    "B": {"lora_B": T(6, 3)},
    "B's dtype": {"lora_B": T(6, 2).bfloat16()},
    "bias": {"bias": T(5)},
    "bias's dtype": {"bias": T(6).double()},
    "lora_bias": {"lora_bias": T(6, 1)},
    "elsewhere": {"lora_A": T(2, 10, device="meta")},
    "p": {"dropout_p": 1.5},
    "rng_state": {"dropout_p": 0.5, "rng_state": T(2)},
    "scaling": {"scaling": T(2)},
    "scaling that trains": {"scaling": T((), requires_grad=True)},
    "scaling of text": {"scaling": "2"},
    "x of a list": {"x": [1.0]},
    "A of None": {"lora_A": None},
}


@pytest.mark.parametrize("name", SAME_AS_DENSE)
def test_errors_are_those_of_lora_linear(name: str) -> None:
    arguments = RIGHT | SAME_AS_DENSE[name]
    with pytest.raises((ValueError, TypeError, RuntimeError)) as wanted:
        lora_ext.lora_linear(**arguments | {"weight": values(NF4, torch.float32)})
    message = str(wanted.value).replace("lora_linear", "lora_linear_quantized")
    with pytest.raises(type(wanted.value)) as found:
        lora_linear_quantized(**arguments)
    assert str(found.value).splitlines()[0] == message.splitlines()[0]


def test_weights_of_another_kind() -> None:
    with pytest.raises(TypeError, match=r"^lora_linear_quantized: weight: got a float32 tensor of"):
        lora_linear_quantized(**RIGHT | {"weight": T(6, 10)})


def changed(place: int, value: Any, of: int) -> tuple[Any, ...]:
    operands = tuple(list(part) for part in operands_of(quantized("nf4", nested=True)(6, 10)))
    operands[of][place] = value
    return operands


WRONG_OPERANDS = {
    "no layout": (*operands_of(NF4)[:1], [], []),
    "no rows": changed(0, 0, 1),
    "too many": changed(1, 1 << 62, 1),
    "packing": changed(2, 6, 1),
    "block_size": changed(3, 0, 1),
    "rounding": changed(4, -1, 1),
    "parts": changed(5, 256, 1),
    "parts that are missing": changed(5, 255, 1),
    "nested block size": changed(6, 0, 1),
    "codes cut": changed(0, torch.zeros(29, dtype=torch.uint8), 0),
    "codes of another dtype": changed(0, torch.zeros(30, dtype=torch.int8), 0),
    "codes elsewhere": changed(0, torch.zeros(30, dtype=torch.uint8, device="meta"), 0),
    "codebook": changed(1, T(15), 0),
    "codebook with strides": changed(1, T(16, 2)[:, 0], 0),
    "nested codes": changed(2, torch.zeros(2, dtype=torch.uint8), 0),
    "nested codebook": changed(3, T(255), 0),
    "absmax": changed(4, T(2), 0),
    "without tensors": ([], *operands_of(NF4)[1:]),
}


@pytest.mark.parametrize("name", WRONG_OPERANDS)
def test_wrong_operands(name: str) -> None:
    """Of the operator called by itself: no kernel reads what is not there."""
    operands = WRONG_OPERANDS[name]
    for op in ("lora_linear_quantized", "lora_linear_quantized_fwd"):
        with pytest.raises(
            (ValueError, TypeError, RuntimeError), match=r"^lora_linear_quantized: weight: "
        ):
            getattr(torch.ops.lora_ext, op)(T(5, 10), *operands, None, T(2, 10), T(6, 2))
    arguments = (T(5, 6), T(5, 10), None, *operands, T(2, 10), T(6, 2), 1.0, None, 0.0, None)
    with pytest.raises(
        (ValueError, TypeError, RuntimeError), match=r"^lora_linear_quantized_bwd: weight: "
    ):
        torch.ops.lora_ext.lora_linear_quantized_bwd(*arguments, [True] * 5)


@pytest.mark.parametrize("name", MATRICES)
def test_composed_as_other_devices_do(name: str) -> None:
    """The form out of ATen's operators has the same values, to the bit, on each backend."""
    weight = MATRICES[name](24, 160)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        eye = torch.eye(160, dtype=dtype)
        A, B = torch.zeros(1, 160, dtype=dtype), torch.zeros(24, 1, dtype=dtype)
        y = torch.func.vmap(lambda x: lora_linear_quantized(x, weight, None, A, B))(eye)  # noqa: B023
        assert torch.equal(y.t(), values(weight, dtype)), dtype


def test_explained() -> None:
    A = torch.zeros(8, 10)
    for tokens, how in ((16, "by its codes"), (17, "by parts")):
        path, reason = lora_linear_quantized_path(torch.empty(NF4.shape), A, 0.0, tokens)
        assert path.startswith("cpu ") and path.endswith(f", quantized base {how}")
        assert "quantized" in reason or "codes" in reason


PROGRAM = """
import torch
from lora_ext.quant import quantize
from lora_ext.quant.operator import lora_linear_quantized
weight = quantize(torch.randn(40, 72), "nf4")
A, B = torch.randn(4, 72), torch.randn(40, 4, requires_grad=True)
for M in (3, 18):
    for _ in range(2):
        x = torch.randn(M, 72, requires_grad=True)
        lora_linear_quantized(x, weight, None, A, B).sum().backward()
"""


def test_printed() -> None:
    environment = os.environ | {"LORA_EXT_PRINT_PATHS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    lines = [line for line in ran.stderr.splitlines() if line.startswith("lora_ext: ")]
    assert len(lines) == 4, ran.stderr
    for line, (of, M, how) in zip(
        lines,
        [
            ("forward", 3, "by its codes"),
            ("backward", 3, "by parts"),
            ("forward", 18, "by parts"),
            ("backward", 18, "by parts"),
        ],
        strict=True,
    ):
        assert line.startswith(f"lora_ext: {of} of {M} rows, 72 -> 40, r 4, float32: cpu ")
        assert f"quantized base {how}: " in line


MEMORY = """
import resource, sys, torch
from lora_ext.quant import QuantizedWeight
from lora_ext.quant.operator import lora_linear_quantized
dtype = getattr(torch, sys.argv[1])
M, N, K = 512, 4096, 4096
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
def run(M, N, K):
    codes = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8)
    weight = QuantizedWeight(
        (N, K), codes, "high_first", torch.rand(N * K // 64) / 64, 64, dtype, torch.randn(16)
    )
    A, B = torch.randn(8, K, requires_grad=True), torch.randn(N, 8, requires_grad=True)
    x, dy = torch.zeros(M, K, dtype=dtype, requires_grad=True), torch.zeros(M, N, dtype=dtype)
    lora_linear_quantized(x, weight, None, A.to(dtype), B.to(dtype)).backward(dy)
run(300, 640, 640)  # what libraries allocate once
before = peak()
run(M, N, K)
held = N * K // 2 + N * K // 16 + dtype.itemsize * M * (2 * N + 2 * K)
print(peak() - before - held)
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory(dtype: str) -> None:
    """Beside codes, scales, x, y, dx and dy at most 32 MiB, where the matrix would be 64 or 32."""
    program = [sys.executable, "-c", MEMORY, dtype]
    extra = int(subprocess.run(program, capture_output=True, text=True, check=True).stdout)
    assert extra <= 32 << 20, f"{extra >> 20} MiB"
