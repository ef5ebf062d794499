"""What only a GPU has: streams, graphs, its own memory, and a CPU beside it to agree with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import NO_CUDA
from grouped_problems import Grouped, make_gated, make_grouped
from grouped_problems import bounds as grouped_bounds
from problems import NAMES, UNIT, Problem, make_problem, results, rms
from torch import Tensor

import lora_ext
from lora_ext._extension import _C
from lora_ext.tuning import PATHS

if NO_CUDA is not None:
    pytest.skip(NO_CUDA, allow_module_level=True)
pytestmark = pytest.mark.cuda
BF16 = torch.bfloat16


def assert_same(got: Tensor, want: Tensor) -> None:
    """But for the order of sums, which is cuBLAS's choice and not the same in every call."""
    bound = 2 * UNIT[got.dtype] + UNIT[torch.float32] * max(got.shape) ** 0.5
    assert rms(got - want) <= bound * rms(want)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.37, 0.5, 1.0])
@pytest.mark.parametrize("state", [(0, 0), (2**63 - 5, 4), (12345, 2**40 + 8)], ids=str)
@pytest.mark.parametrize("columns", [1, 129, 300, 4096])
def test_masks_are_the_cpus(columns: int, state: tuple[int, int], dropout_p: float) -> None:
    on_cpu = torch.tensor(state)
    expected = lora_ext.dropout_mask(on_cpu, 77, columns, dropout_p)
    got = lora_ext.dropout_mask(on_cpu.cuda(), 77, columns, dropout_p)
    assert torch.equal(got.cpu(), expected)


def test_h_is_kept_under_dropout() -> None:
    """On a CPU it is not (test_saved_for_backward.py)."""
    p = make_problem((50,), 64, 32, 8, dropout_p=0.1, dtype=BF16, device="cuda")
    kept: list[tuple[int, ...]] = []
    for tensor in (p.lora_A, p.lora_B):
        tensor.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(t.shape), t)[1], lambda t: t
    ):
        p.fused()
    assert (50, 8) in kept


@pytest.mark.parametrize("K", [264, 130])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
def test_every_product_drops_what_the_cpu_drops(dtype: torch.dtype, K: int) -> None:
    """With ones and identities the mask can be read off y, dA and dx."""
    place = {"dtype": dtype, "device": "cuda"}
    state = torch.tensor([12345678901, 44])
    keep = lora_ext.dropout_mask(state, 64, K, 0.5).cuda()
    options = {"dropout_p": 0.5, "rng_state": state.cuda()}
    x = torch.ones(64, K, **place, requires_grad=True)

    zero, identity = torch.zeros(64, K, **place), torch.eye(64, **place)
    for first in range(0, K, 64):  # lora_A picks columns
        lora_A = torch.eye(K, **place)[first : first + 64]
        r = len(lora_A)
        y = lora_ext.lora_linear(x, zero[:r], None, lora_A, identity[:r, :r], **options)
        assert torch.equal(y, 2 * keep[:, first : first + 64].to(dtype))

    lora_A = torch.ones(64, K, **place, requires_grad=True)
    y = lora_ext.lora_linear(x, zero, None, lora_A, identity, **options)
    dx, dA = torch.autograd.grad(y, [x, lora_A], identity)
    assert torch.equal(dA, 2 * keep.to(dtype))
    assert torch.equal(dx, 2 * keep.to(dtype))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("adapter_dtype", [BF16, torch.float32], ids=str)
def test_layers_of_one_x(adapter_dtype: torch.dtype, dropout_p: float) -> None:
    """Together, where the kernels run, as one by one; the last layer has no adapter."""
    x = torch.randn(1300, 264, dtype=BF16, device="cuda", requires_grad=True)
    layers = [
        make_problem((1300,), 264, N, r, dtype=BF16, adapter_dtype=adapter_dtype, seed=N,
                     dropout_p=dropout_p, device="cuda")
        for N, r in ((2056, 16), (1288, 40), (1032, 8))
    ]  # fmt: skip
    for p in layers:
        p.x = x
    frozen = layers[-1]
    adapted = [*layers[:-1], None]
    ys = lora_ext.lora_linear_multi(
        x,
        [p.weight for p in layers],
        [p.bias for p in layers],
        [p and p.lora_A for p in adapted],
        [p and p.lora_B for p in adapted],
        scalings=[p.scaling for p in layers],
        dropout_p=dropout_p,
        rng_states=[p and p.rng_state for p in adapted],
    )
    separate = [p.fused() for p in layers[:-1]]
    separate.append(torch.nn.functional.linear(x, frozen.weight, frozen.bias))
    leaves = [x, *(t for p in layers[:-1] for t in (p.lora_A, p.lora_B))]
    dys = [p.dy for p in layers]
    got = [*ys, *torch.autograd.grad(ys, leaves, dys)]
    want = [*separate, *torch.autograd.grad(separate, leaves, dys)]
    for one, other in zip(got, want, strict=True):
        # dx of the calls is rounded for each and for each sum of two
        assert rms(one - other) <= 4 * UNIT[BF16] * rms(other)


@pytest.mark.parametrize("make", [make_grouped, make_gated])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_rows_with_adapters_of_their_own(
    dtype: torch.dtype, make: Callable[[int, torch.dtype], Grouped]
) -> None:
    """As in float64, by kernels where sizes are multiples of 8; rows of none are the base's, bit
    for bit."""
    for seed in range(40):
        problem = make(seed, dtype)
        exact = problem.in_double()
        wanted = exact.results(exact.plain())
        found = on_cuda(problem)
        results = found.results(found.fused())
        for name, bound in grouped_bounds(problem, wanted).items():
            if name in results:
                assert rms(results[name].cpu().double() - wanted[name]) <= bound, (seed, name)
        base = torch.nn.functional.linear(found.x, found.weight, found.bias)
        rows = (problem.ids.view(len(problem.x), -1) == -1).all(1).cuda()
        assert torch.equal(results["y"][rows], base[rows])


def on_cuda(problem: Grouped) -> Grouped:
    def moved(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.detach().cuda().requires_grad_(tensor.requires_grad)

    adapters = {
        name: one._replace(
            lora_A=moved(one.lora_A), lora_B=moved(one.lora_B), lora_bias=moved(one.lora_bias)
        )
        for name, one in problem.adapters.items()
    }
    names = ("x", "weight", "bias", "scale", "gates", "rng_state", "dy")
    tensors = {name: moved(getattr(problem, name)) for name in names}
    return replace(problem, adapters=adapters, **tensors)  # type: ignore[arg-type]


def test_nobody_waits_for_rows_with_adapters_of_their_own() -> None:
    """Nor does a graph need memory of the host: it replays what it captured."""
    M, K, N, ranks = 300, 256, 136, [8, 40, 3]
    place = {"dtype": BF16, "device": "cuda"}
    x, weight, dy = (torch.randn(*of, **place) for of in ((M, K), (N, K), (M, N)))
    A, B = [torch.randn(r, K, **place) for r in ranks], [torch.randn(N, r, **place) for r in ranks]
    order = torch.randperm(M, device="cuda")[:250].int()
    rows = [], order, [100, 30, 120], None, [1.0, 2.0, 0.5], [0.0] * 3

    def call() -> list[Tensor]:
        y, h = torch.ops.lora_ext.lora_linear_grouped_fwd(
            x, weight, None, A, B, *rows, None, [], True
        )
        dx, _, _, _, dA, dB, _ = torch.ops.lora_ext.lora_linear_grouped_bwd(
            dy, x, h, weight, A, B, *rows, None, [], [], [], [True, False, False, False], [3, 3, 3]
        )
        return [y, dx, *dA, *dB]

    want = call()  # checks the kernels, if nobody has
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, captured = capture(call)
    graph.replay()
    for one, other, replayed in zip(want, again, captured, strict=True):
        assert torch.equal(one, other)
        assert_same(replayed, one)


def capture(call: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph, outputs


def test_a_plan_that_the_gpu_does_not_have_is_refused_in_a_capture() -> None:
    """Replays would copy its rows from memory of the host that is gone."""
    layer = lora_ext.nn.Linear(64, 64, r=4, device="cuda")
    x = torch.randn(6, 64, device="cuda")
    plan = lora_ext.batch(["default", None] * 3)
    with plan, torch.no_grad():
        with pytest.raises(RuntimeError, match="run the model once within the plan"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                layer(x)
        _, captured = capture(lambda: [layer(x)])
        assert captured[0].shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("n", [130, 136])
def test_graphs_draw_as_eager_calls_do(n: int, dtype: torch.dtype) -> None:
    """Forward and backward of two layers whose results are exact in any order of sums."""
    eye = torch.eye(n, dtype=dtype, device="cuda")
    x = torch.ones(50, n, dtype=dtype, device="cuda", requires_grad=True)
    zero, dy = torch.zeros_like(eye), torch.ones_like(x)

    def step() -> list[Tensor]:
        y = lora_ext.lora_linear(x, zero, None, eye, eye, dropout_p=0.5)
        y = lora_ext.lora_linear(y, zero, None, eye, eye, dropout_p=0.5)
        return [y.detach(), *torch.autograd.grad(y, [x], dy)]

    graph, outputs = capture(step)
    torch.manual_seed(11)
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append([t.clone() for t in outputs])
    torch.manual_seed(11)
    for got in replayed:
        for name, one, other in zip(("y", "dx"), got, step(), strict=True):
            assert torch.equal(one, other), name
    assert not torch.equal(replayed[0][0], replayed[1][0])
    assert torch.equal(replayed[0][0], replayed[0][1])  # the mask of forward is that of backward


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_a_graph_follows_its_inputs_and_its_scaling(dropout_p: float) -> None:
    p = make_problem((65,), 136, 72, 16, dtype=BF16, dropout_p=dropout_p, device="cuda")
    scaling = torch.tensor(1.0, device="cuda")
    operands = list(p.operands)

    def step() -> list[Tensor]:
        y = lora_ext.lora_linear(
            *p.operands, scaling=scaling, dropout_p=dropout_p, rng_state=p.rng_state
        )
        return list(results(y, operands, p.dy).values())

    graph, outputs = capture(step)
    for value in (0.5, -3.0):
        scaling.fill_(value)
        with torch.no_grad():
            p.x.add_(1.0)
        graph.replay()
        for got, want in zip(outputs, step(), strict=True):
            assert_same(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_work_goes_to_the_current_stream(dtype: torch.dtype) -> None:
    """On a stream that is busy for long before x is there: a kernel elsewhere would read NaN."""
    p = make_problem((65,), 136, 72, 16, dtype=dtype, dropout_p=0.1, device="cuda")
    operands = list(p.operands)
    wanted = results(p.fused(), operands, p.dy)
    late = torch.full_like(p.x, torch.nan).requires_grad_()
    values = p.x.detach().clone()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.data.copy_(values)
        operands[0] = late
        found = results(p.fused(*operands), operands, p.dy)
        merged = p.weight.detach().clone()
        torch.ops.lora_ext.merge_(merged, p.lora_A.detach(), p.lora_B.detach(), 1.0)
    stream.synchronize()
    for name, got in found.items():
        assert_same(got, wanted[name])
    assert merged.isfinite().all() and not torch.equal(merged, p.weight)


def peak_of(call: Callable[[], list[Tensor]]) -> int:
    """Bytes that a call allocates at its peak, besides what it returns."""
    call()  # workspaces of cuBLAS stay
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outputs = call()
    torch.cuda.synchronize()
    returned = sum(t.nbytes for t in outputs)
    return torch.cuda.max_memory_allocated() - before - returned


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_no_temporary_of_the_size_of_x_or_y(dropout_p: float) -> None:
    M, K, N, r = 16384, 2048, 2048, 16
    p = make_problem((M,), K, N, r, dtype=BF16, bias=False, dropout_p=dropout_p, device="cuda")
    p.mask = None
    p.weight.requires_grad_(False)
    half = p.x.nbytes // 2
    with torch.no_grad():
        assert peak_of(lambda: [p.fused()]) < half
    y = p.fused()
    leaves = [p.x, p.lora_A, p.lora_B]
    backward = peak_of(lambda: list(torch.autograd.grad(y, leaves, p.dy, retain_graph=True)))
    assert backward < half


FLOAT = torch.float32
DTYPES = [(BF16, BF16), (BF16, FLOAT), (torch.float16, torch.float16), (torch.float16, FLOAT)]
DTYPES += [(FLOAT, FLOAT), (torch.float64, torch.float64)]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1, 1, 1), (70, 264, 520, 40), (33, 257, 131, 8)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_dora_and_lookups_are_as_in_float64(
    size: tuple[int, int, int, int], dtypes: tuple[torch.dtype, torch.dtype], transposed: bool
) -> None:
    (M, N, K, r), (base, adapter) = size, dtypes
    torch.manual_seed(N)
    shapes = (N, K), (r, K), (N, r), (M, N), (M, N)
    W, A, B, z, dy = (torch.randn(shape, device="cuda") for shape in shapes)
    W, z, dy, A, B = W.to(base), z.to(base), dy.to(base), A.to(adapter), B.to(adapter)
    W = W.t().contiguous().t() if transposed else W
    scale = torch.randn(N, dtype=torch.promote_types(base, FLOAT), device="cuda")
    tokens = torch.randint(K, (M,), device="cuda")

    def results(dtype: torch.dtype | None) -> dict[str, Tensor]:
        w, a, b, x, g = (t.to(dtype or t.dtype) for t in (W, A, B, z, scale))
        leaves = [t.detach().requires_grad_() for t in (a, b, x, g)]
        a, b, x, g = leaves
        if dtype is None:
            norm = lora_ext.functional.weight_norm(w, a, b, 0.5)
            y = lora_ext.functional.column_scale(x, g)
            look_up = lora_ext.lora_embedding(tokens, w.t(), a, b, scaling=0.5, padding_idx=0)
        else:
            norm, y = (w + 0.5 * b @ a).norm(dim=1), x * g
            rows = torch.nn.functional.embedding(tokens, a.t(), padding_idx=0)
            look_up = w.t()[tokens] + 0.5 * rows @ b.t()
        gradients = torch.autograd.grad([y, look_up], leaves, [dy.to(y.dtype), dy.to(y.dtype)])
        found = {"norm": norm, "y": y, "look_up": look_up}
        return found | dict(zip(("A", "B", "z", "scale"), gradients, strict=True))

    got, want = results(None), results(torch.float64)
    compute = torch.promote_types(base, FLOAT)
    inner = 3 * UNIT[BF16] ** 2 if base.itemsize == 2 else 0.0  # a float as two of 16 bits
    for name, one in got.items():
        bound = 2 * UNIT[one.dtype] + inner + 2 * UNIT[compute] * max(M, N, K) ** 0.5
        assert rms(one.double() - want[name]) <= bound * rms(want[name]), name


@pytest.mark.parametrize("moved", [*NAMES[1:], "rng_state", "x"])
def test_tensors_on_different_devices_are_refused(moved: str) -> None:
    p: Problem = make_problem((5,), dtype=BF16, dropout_p=0.1, lora_bias=True, device="cuda")
    setattr(p, moved, getattr(p, moved).detach().cpu())
    message = "got device cuda:0, expected cpu" if moved == "x" else "got device cpu, expected cuda"
    with pytest.raises(RuntimeError, match=rf"lora_linear: \w+: {message}"):
        p.fused()


def test_merging_across_devices_is_refused() -> None:
    p = make_problem((5,), device="cuda")
    weight = p.weight.detach()
    before = weight.clone()
    with pytest.raises(RuntimeError, match="merge_: lora_A: got device cpu, expected cuda"):
        torch.ops.lora_ext.merge_(weight, p.lora_A.detach().cpu(), p.lora_B.detach(), 1.0)
    assert torch.equal(weight, before)


def test_a_layer_moves_between_devices() -> None:
    torch.manual_seed(0)
    layer = lora_ext.nn.Linear(72, 40, r=8, lora_alpha=16, init_lora_weights=False)
    x = torch.randn(9, 72)
    on_cpu = layer(x)
    on_gpu = layer.cuda()(x.cuda())
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)
    layer.merge()
    layer.cpu().unmerge()
    assert torch.equal(layer(x), on_cpu)


def test_a_transposed_weight_is_not_copied() -> None:
    """As GPT-2's Conv1D keeps it, in forward and backward."""
    p = make_problem((1024,), 2048, 2048, 8, dtype=BF16)
    x, weight, bias, A, B, _ = (t if t is None else t.detach().cuda() for t in p.operands)
    transposed, dy = weight.t().contiguous().t(), p.dy.cuda()
    forward, backward = torch.ops.lora_ext.lora_linear_fwd, torch.ops.lora_ext.lora_linear_bwd

    def run(weight: Tensor) -> list[Tensor]:
        y, h = forward(x, weight, bias, A, B, None, 0.5, None, 0.0, None, True)
        wanted = [True, False, False, True, True, False]
        gradients = backward(dy, x, h, weight, A, B, 0.5, None, 0.0, None, wanted)
        return [y, *(gradients[i] for i in (0, 3, 4))]

    want = run(weight)
    run(transposed)  # cuBLAS has its memory from now on
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    got = run(transposed)
    results_bytes = sum(t.numel() * t.element_size() for t in got)
    used = torch.cuda.max_memory_allocated() - before - results_bytes
    assert used < weight.numel() * weight.element_size()
    for a, b in zip(got, want, strict=True):
        assert_same(a, b)


def test_autotune_measures_once_and_is_heeded(tmp_path: Path) -> None:
    model = lora_ext.nn.Linear(264, 136, 8, dtype=BF16, device="cuda")
    if lora_ext.build_info()["cuda_path"] != "auto":
        with pytest.raises(RuntimeError, match=r"LORA_EXT_CUDA_PATH is .* nothing to measure"):
            lora_ext.autotune(model, [64], cache=tmp_path)
        assert list(tmp_path.iterdir()) == []
        return
    with pytest.raises(ValueError, match="with an adapter of rank 1 to 256"):
        lora_ext.autotune(lora_ext.nn.Linear(264, 300, 257, dtype=BF16, device="cuda"))
    torch.nn.init.normal_(model.lora_B)
    x = torch.randn(64, 264, dtype=BF16, device="cuda")
    before = model(x)
    tuned = lora_ext.autotune(model, [64], cache=tmp_path, rounds=3)
    try:
        assert [one.call.backward for one in tuned] == [False, True]
        assert all(one.path in PATHS and set(one.milliseconds) == set(PATHS) for one in tuned)
        assert all(time > 0 for one in tuned for time in one.milliseconds.values())
        (file,) = tmp_path.iterdir()
        written = file.read_text()
        assert lora_ext.autotune(model, [64, 127], cache=tmp_path) == tuned
        assert file.read_text() == written
        (row,) = lora_ext.explain(model, tokens=64)
        assert "autotune" in row.reason
        bound = 4 * UNIT[BF16] + UNIT[torch.float32] * 264**0.5
        assert rms(model(x) - before) <= bound * rms(before)
    finally:
        for one in tuned:
            _C.set_tuned_cuda_path(one.call.on(0), None)
