"""`lora_ext.batch`: which rows have which adapter, in which layers, in which thread; and every kind
of layer under a plan, against the same rows by themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext
from lora_ext.batching import current_plan
from lora_ext.nn.lora_layer import LoraLayer

SETTINGS: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8, "init_lora_weights": False},
    "b": {"r": 8, "lora_alpha": 4, "init_lora_weights": False},
}
NAMES = ["a", None, "b", "a", None]


def linear(**more: Any) -> lora_ext.nn.Linear:
    return with_adapters(lora_ext.nn.Linear(16, 12), **more)


def with_adapters(layer: Any, **more: Any) -> Any:
    for name, settings in SETTINGS.items():
        layer.add_adapter(name, **settings, **more)
    return layer


def ids(plan: lora_ext.batching.BatchPlan, *leading: int) -> list[int]:
    """The place of its name that each row has."""
    rows = plan.assign(leading, torch.device("cpu"), plan.names, "test")
    found = torch.full((torch.Size(leading).numel(),), -1)
    for name, index, _ in rows.by_name():
        found[index.long()] = plan.names.index(name)
    return found.tolist()


# Plans alone


def test_a_name_for_each_request_holds_for_all_its_rows() -> None:
    plan = lora_ext.batch(["a", None, "__base__", "b"])
    assert ids(plan, 4) == [0, -1, -1, 1]
    assert ids(plan, 4, 2) == [0, 0, -1, -1, -1, -1, 1, 1]
    assert ids(plan, 4, 0) == []
    flat = lora_ext.batch(["a", None], rows=(2, 3))
    assert ids(flat, 6) == ids(flat, 2, 3) == [0, 0, 0, -1, -1, -1]
    assert ids(flat, 2, 1) == [0, -1]  # a later token of each


def test_segments_and_rows() -> None:
    assert ids(lora_ext.batch(["a", "b", None, "a"], lengths=[2, 0, 1, 2]), 1, 5) == [
        0,
        0,
        -1,
        0,
        0,
    ]
    plan = lora_ext.batch(["a", None, "b"], ids=torch.tensor([[2, 1], [-1, 0]]))
    assert ids(plan, 4) == ids(plan, 2, 2) == [1, -1, -1, 0]


def test_after_counts_within_a_request() -> None:
    plan = lora_ext.batch(["a", "b", "a"], after=[1, 0, None])
    assert ids(plan, 3, 2) == [-1, 0, 1, 1, -1, -1]
    packed = lora_ext.batch(["a", "b"], lengths=[3, 2], after=torch.tensor([2, 1]))
    assert ids(packed, 5) == [-1, -1, 0, -1, 1]
    prompt = lora_ext.batch(["a", "b"], rows=(2, 4), after=[3, None])
    assert ids(prompt, 2, 4) == [-1, -1, -1, 0] + 4 * [-1]
    assert ids(prompt, 2, 1) == [0, -1]  # what follows the prompt, from a cache
    assert ids(prompt, 2, 5) == [-1, -1, -1, 0, 0] + 5 * [-1]  # without a cache


def test_one_adapter_on_all_rows_is_seen() -> None:
    cpu = torch.device("cpu")
    assert lora_ext.batch(["a", "a"]).assign((2, 3), cpu, ["a"], "test").alone
    assert not lora_ext.batch(["a", "b"]).assign((2, 3), cpu, ["a"], "test").alone
    strengths = lora_ext.batch(["a", "a"], scale=torch.ones(2))
    assert not strengths.assign((2, 3), cpu, ["a"], "test").alone


REFUSED: list[tuple[type[Exception], str, Callable[[], Any]]] = [
    (TypeError, "adapters: got None", lambda: lora_ext.batch()),
    (TypeError, "adapters: got 'a'", lambda: lora_ext.batch("a")),
    (TypeError, "adapters: got 3", lambda: lora_ext.batch([3])),  # type: ignore[list-item]
    (ValueError, "rows: got", lambda: lora_ext.batch(["a"], rows=(2, 3))),
    (ValueError, "lengths: got", lambda: lora_ext.batch(["a"], lengths=[1, 2])),
    (ValueError, "lengths: got -1", lambda: lora_ext.batch(["a"], lengths=[-1])),
    (ValueError, "lengths: got rows", lambda: lora_ext.batch(["a"], lengths=[1], rows=(1, 1))),
    (ValueError, "ids: got 1", lambda: lora_ext.batch(["a"], ids=torch.tensor([1]))),
    (ValueError, "ids: got -2", lambda: lora_ext.batch(["a"], ids=torch.tensor([-2]))),
    (TypeError, "ids: got", lambda: lora_ext.batch(["a"], ids=torch.tensor([0.5]))),
    (ValueError, "ids: got rows", lambda: lora_ext.batch(["a"], ids=torch.tensor([0]), after=[0])),
    (TypeError, "scale: got 'x'", lambda: lora_ext.batch(["a"], scale=["x"])),  # type: ignore[list-item]
    (TypeError, "scale: got 2.0", lambda: lora_ext.batch(["a"], scale=2.0)),  # type: ignore[arg-type]
    (ValueError, "scale: got shape", lambda: lora_ext.batch(["a"], scale=torch.ones(2))),
    (ValueError, "after: got", lambda: lora_ext.batch(["a"], after=[1, 2])),
    # What would mean another number, or none
    (TypeError, "adapters: got 1", lambda: lora_ext.batch(1)),  # type: ignore[arg-type]
    (TypeError, "rows: got 5", lambda: lora_ext.batch(["a"], rows=5)),  # type: ignore[arg-type]
    (TypeError, "rows: got .1, 2, 3", lambda: lora_ext.batch(["a"], rows=(1, 2, 3))),  # type: ignore[arg-type]
    (TypeError, "rows: got .1, 2.5", lambda: lora_ext.batch(["a"], rows=(1, 2.5))),  # type: ignore[arg-type]
    (TypeError, "rows: got .1, -2", lambda: lora_ext.batch(["a"], rows=(1, -2))),
    (TypeError, "lengths: got .4.5", lambda: lora_ext.batch(["a"], lengths=[4.5])),  # type: ignore[list-item]
    (TypeError, "lengths: got .True", lambda: lora_ext.batch(["a"], lengths=[True])),
    (TypeError, "lengths: got .None", lambda: lora_ext.batch(["a"], lengths=[None])),  # type: ignore[list-item]
    (TypeError, "after: got 2,", lambda: lora_ext.batch(["a"], after=2)),  # type: ignore[arg-type]
    (TypeError, "after: got .1.5", lambda: lora_ext.batch(["a"], after=[1.5])),  # type: ignore[list-item]
    (TypeError, "ids: got a bool", lambda: lora_ext.batch(["a"], ids=torch.ones(3).bool())),
    (
        ValueError,
        r"scale: got shape \[2\], expected \[3\], one number for each request",
        lambda: lora_ext.batch(["a", "b"], gates=torch.ones(3, 2), scale=torch.ones(2)),
    ),
]


@pytest.mark.parametrize(("error", "message", "make"), REFUSED, ids=[one[1] for one in REFUSED])
def test_arguments_that_do_not_fit(
    error: type[Exception], message: str, make: Callable[[], Any]
) -> None:
    with pytest.raises(error, match=f"batch: {message}"):
        make()


# In layers


def test_a_plan_that_does_not_fit_names_layer_and_rows() -> None:
    layer = linear()
    with lora_ext.batch(["a", "b"]), pytest.raises(ValueError, match=r"Linear: batch: .* 2 .* 3"):
        layer(torch.randn(3, 16))
    with (
        lora_ext.batch(["a"], lengths=[4]),
        pytest.raises(ValueError, match="Linear: batch: lengths: got an input of 3 rows"),
    ):
        layer(torch.randn(3, 16))
    with (
        lora_ext.batch(["a"]),
        pytest.raises(ValueError, match=r"comes 3 times in a row.*repeats=True"),
    ):
        layer(torch.randn(3, 2, 16))
    assert current_plan() is None


def test_strengths_may_be_a_list() -> None:
    layer, x = linear(), torch.randn(2, 3, 16)
    with lora_ext.batch(["a", "b"], scale=[0.5, 2]):
        y = layer(x)
    with lora_ext.batch(["a", "b"], scale=torch.tensor([0.5, 2.0])):
        assert torch.equal(y, layer(x))


def test_a_plan_keeps_the_numbers_it_was_made_of() -> None:
    """Whatever becomes of the tensors, such as a server's buffers."""
    layer, x = linear(), torch.randn(2, 3, 16)
    names = ["a", "b"]

    def results(change: bool) -> list[Tensor]:
        ids, after, lengths = torch.zeros(6).long(), torch.tensor([1, 2]), torch.tensor([2, 4])
        plans = [
            lora_ext.batch(names, ids=ids),
            lora_ext.batch(names, after=after),
            lora_ext.batch(names, lengths=lengths),
        ]
        if change:
            ids.fill_(1)
            after.zero_()
            lengths.copy_(torch.tensor([4, 2]))
        ys = []
        for plan in plans:
            with plan:
                ys.append(layer(x))
        return ys

    for y, kept in zip(results(True), results(False), strict=True):
        assert torch.equal(y, kept)


def test_gates_that_do_not_fit_are_named() -> None:
    layer = linear()
    with (
        lora_ext.batch(["a", "b"], gates=torch.ones(2, 2)),
        pytest.raises(ValueError, match="Linear: batch: gates: got those of 2 requests"),
    ):
        layer(torch.randn(3, 16))
    with (
        lora_ext.batch(["a", "b"], gates=torch.ones(2, 3, 2)),
        pytest.raises(ValueError, match="Linear: batch: gates: got an input of 8 rows"),
    ):
        layer(torch.randn(2, 4, 16))


@pytest.mark.parametrize("gated", [False, True])
def test_transposed_rows_are_refused(gated: bool) -> None:
    """They would be other tokens' adapters; in any other form they are the rows in their order."""
    layer, ids = linear(), torch.tensor([[0, 1, -1], [1, 1, 0]])
    gates = None
    if gated:
        ids = ids.unsqueeze(2)
        gates = torch.ones(2, 3, 1)
    plan = lora_ext.batch(["a", "b"], ids=ids, gates=gates)
    x = torch.randn(2, 3, 16)
    with plan:
        y = layer(x)
        for shape in ((6, 16), (1, 6, 16), (6, 1, 16)):
            assert torch.equal(layer(x.reshape(shape)), y.reshape(*shape[:-1], -1))
        name = "gates" if gated else "ids"
        with pytest.raises(ValueError, match=rf"Linear: batch: {name}: got .*\[2, 3\].*\[3, 2\]"):
            layer(x.transpose(0, 1))


def test_an_adapter_that_no_layer_has_is_an_error() -> None:
    layer = linear()
    with pytest.raises(ValueError, match="got 'typo', which no layer"), lora_ext.batch(["typo"]):
        layer(torch.randn(1, 16))
    with lora_ext.batch(["a"]), pytest.raises(KeyError):  # which stays what it was
        raise KeyError


def test_a_merged_layer_is_refused() -> None:
    layer = linear()
    layer.merge()
    with lora_ext.batch(["a"]), pytest.raises(ValueError, match="merged"):
        layer(torch.randn(1, 16))


def test_plans_nest_and_end() -> None:
    outer, inner = lora_ext.batch(["a"]), lora_ext.batch(["b"])
    with outer:
        with inner:
            assert current_plan() is inner
        assert current_plan() is outer
    assert current_plan() is None


def test_threads_do_not_see_each_others_plans() -> None:
    layer = linear().eval()
    x = torch.randn(4, 16)
    alone = {}
    for name in ("a", "b"):
        layer.set_adapter(name)
        alone[name] = layer(x)
    wrong: list[str] = []
    gate = threading.Barrier(8)

    def serve(name: str) -> None:
        gate.wait()
        for _ in range(50):
            with lora_ext.batch([name] * 4):
                if not torch.equal(layer(x), alone[name]):
                    wrong.append(name)

    threads = [threading.Thread(target=serve, args=(name,)) for name in 4 * ["a", "b"]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and torch.equal(layer(x), alone["b"])


def test_a_compiled_layer_follows_the_plan_of_each_call() -> None:
    layer = linear().eval()
    compiled = torch.compile(layer, backend="eager")
    x = torch.randn(2, 16)
    assert torch.equal(compiled(x), layer(x))
    for names in (["a", "b"], ["b", None], ["a", "a"]):
        with lora_ext.batch(names):
            assert torch.equal(compiled(x), layer(x))
    torch.testing.assert_close(compiled(x), layer(x))


def test_gradients_only_for_adapters_that_have_rows() -> None:
    layer = linear()
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    with lora_ext.batch([None, "b"]):
        layer(torch.randn(2, 3, 16)).sum().backward()
    assert all(p.grad is None for p in layer.parts("a").values())
    assert all(p.grad is not None for p in layer.parts("b").values())


def test_zero_gradients_where_they_are_asked_for() -> None:
    layer = linear(lora_bias=True)
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    x = torch.randn(4, 16)
    with lora_ext.batch(["a", "b"], ids=torch.tensor([1, -1, 1, -1]), zero_grads=True):
        layer(x).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parts("a").values())
    assert all(p.grad is not None and p.grad.any() for p in layer.parts("b").values())
    with lora_ext.batch(["a"], after=[None], rows=(1, 4), zero_grads=True):
        y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    assert y.requires_grad


def test_zero_gradients_of_copies_that_have_no_rows() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    config = lora_ext.LoraConfig(target_modules=["0"], modules_to_save=["1"])
    model = lora_ext.get_peft_model(net, config, "a")
    model.add_adapter("b", config)
    copies = model.get_base_model()[1].modules_to_save
    for copy in copies.values():
        copy.requires_grad_(True)
    with lora_ext.batch(["a", None], zero_grads=True):
        model(torch.randn(2, 4)).sum().backward()
    assert copies["a"].weight.grad is not None and copies["b"].weight.grad is None
    with lora_ext.batch(["a", "b"], ids=torch.tensor([0, 0]), zero_grads=True):
        model(torch.randn(2, 4)).sum().backward()
    assert torch.equal(copies["b"].weight.grad, torch.zeros(2, 4))


def test_strengths_multiply_and_have_gradients() -> None:
    layer = linear(lora_bias=True)
    x = torch.randn(3, 5, 16)
    scale = torch.tensor([2.0, 0.5, 1.0], requires_grad=True)
    with lora_ext.batch(["a", "b", None], scale=scale):
        y = layer(x)
    with lora_ext.batch(["a", "b", None]):
        once = layer(x)
    base = nn.functional.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(y, base + scale[:, None, None] * (once - base))
    y.sum().backward()
    wanted = (once - base).sum((1, 2)).detach()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, wanted, rtol=1e-4, atol=1e-4)


def rows_alone(layer: Any, x: Any, run: Callable[[Any], Tensor]) -> Tensor:
    """Each request by itself, with its adapter active."""
    results = []
    for i, name in enumerate(NAMES):
        layer.enable_adapters(name in layer.adapters)
        if name in layer.adapters:
            layer.set_adapter(name)
        results.append(run(x[i : i + 1]))
    layer.enable_adapters(True)
    return torch.cat(results)


def call(layer: Any) -> Callable[[Any], Tensor]:
    return lambda x: layer(x)


def attention(batch_first: bool, **more: Any) -> tuple[Any, Callable[[Any], Tensor]]:
    layer = lora_ext.nn.MultiheadAttention(16, 4, batch_first=batch_first, **more)

    def run(x: Tensor) -> Tensor:
        x = x if batch_first else x.transpose(0, 1)
        other = torch.flip(x, [-1])
        y = layer(x, x, x)[0] + layer(x, other, other)[0]
        return y if batch_first else y.transpose(0, 1)

    return with_adapters(layer), run


class Called(nn.Linear):
    """A base that is called."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def layers() -> dict[str, tuple[Any, Callable[[Any], Tensor], Tensor]]:
    torch.manual_seed(0)
    floats, image = torch.randn(5, 6, 16), torch.randn(5, 4, 7, 7)
    tokens = torch.randint(0, 30, (5, 6))
    found: dict[str, Any] = {
        "Linear": (linear(), floats),
        "Linear-transposed": (
            with_adapters(lora_ext.nn.Linear(16, 12, fan_in_fan_out=True)),
            floats,
        ),
        "Linear-lora_bias": (linear(lora_bias=True), floats),
        "Linear-DoRA": (linear(use_dora=True), floats),
        "Linear-called": (with_adapters(lora_ext.nn.Linear.from_linear(Called(16, 12), 0)), floats),
        "MergedLinear": (
            with_adapters(lora_ext.nn.MergedLinear(16, 12, enable_lora=[True, False, True])),
            floats,
        ),
        "Embedding": (with_adapters(lora_ext.nn.Embedding(30, 8)), tokens),
        "Embedding-DoRA": (with_adapters(lora_ext.nn.Embedding(30, 8), use_dora=True), tokens),
        "Conv1d": (with_adapters(lora_ext.nn.Conv1d(4, 8, 3)), image[:, :, 0]),
        "Conv2d": (with_adapters(lora_ext.nn.Conv2d(4, 8, 3, groups=2)), image),
        "Conv2d-DoRA": (with_adapters(lora_ext.nn.Conv2d(4, 8, 3), use_dora=True), image),
        "Conv3d": (with_adapters(lora_ext.nn.Conv3d(4, 8, 3)), torch.randn(5, 4, 4, 4, 4)),
    }
    ready = {name: (layer, call(layer), x) for name, (layer, x) in found.items()}
    for name, batch_first, more in (
        ("MultiheadAttention", True, {}),
        ("MultiheadAttention-PEFT", True, {"enable_lora": None}),
        ("MultiheadAttention-length-first", False, {"enable_lora": None}),
    ):
        ready[name] = (*attention(batch_first, **more), floats)
    return ready


LAYERS = layers()


@pytest.mark.parametrize("kind", LAYERS)
def test_each_request_is_what_it_is_alone(kind: str) -> None:
    layer, run, x = LAYERS[kind]
    wanted = rows_alone(layer, x, run)
    layer.set_adapter(["a", "b"])  # they train; which are active does not matter
    with lora_ext.batch(NAMES):
        y = run(x)
        path = layer._lora_explain(8)
    torch.testing.assert_close(y, wanted)
    assert path[0] in ("lora_linear_grouped", "composed")

    y.square().sum().backward()
    found = {n: p.grad for n, p in layer.named_parameters() if "lora" in n}
    layer.zero_grad()
    for name in ("a", "b"):
        layer.set_adapter(name)
        requests = [i for i, one in enumerate(NAMES) if one == name]
        run(x[requests]).square().sum().backward()
        for attribute, parameter in layer.adapter_parameters(name).items():
            torch.testing.assert_close(found[attribute], parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in LAYERS if "DoRA" not in kind])
def test_requests_without_adapter_are_the_base(kind: str) -> None:
    layer, run, x = LAYERS[kind]
    layer.enable_adapters(False)
    base = run(x)
    layer.enable_adapters(True)
    with lora_ext.batch(NAMES):
        y = run(x)
    rows = [1, 4]
    if "Attention" in kind:  # its base is torch's own kernel
        torch.testing.assert_close(y[rows], base[rows])
    else:
        assert torch.equal(y[rows], base[rows])


@pytest.mark.parametrize(
    ("layer", "x", "message"),
    [
        (with_adapters(lora_ext.nn.Conv1d(4, 8, 3)), torch.randn(4, 9), "no batch"),
        (
            lora_ext.nn.AnyLayer.from_module(nn.Bilinear(3, 3, 3), ["weight"], adapter_name="a"),
            torch.randn(1, 3),
            "one weight",
        ),
    ],
    ids=["Conv1d-unbatched", "AnyLayer"],
)
def test_what_cannot_follow_a_plan_is_refused(layer: LoraLayer, x: Tensor, message: str) -> None:
    with lora_ext.batch(["a"]), pytest.raises(ValueError, match=f"batch: .*{message}"):
        layer(x) if message == "no batch" else layer(x, x)


def test_plans_are_left_in_the_reverse_order() -> None:
    outer, inner = lora_ext.batch(["a"]), lora_ext.batch(["b"])
    with outer:
        inner.__enter__()
        with pytest.raises(RuntimeError, match="not the innermost"):
            outer.__exit__(None, None, None)
        inner.__exit__(None, None, None)


def test_a_plan_that_is_used_again_sees_what_changed_in_its_layers() -> None:
    layer, x = linear(lora_dropout=0.1).eval(), torch.randn(5, 16)
    dropping = replace(layer.adapters["a"], lora_dropout=0.5)

    def again(**settings: Any) -> None:
        layer.delete_adapter("a")
        layer.add_adapter("a", **settings, init_lora_weights=False)

    changes: dict[str, Callable[[], Any]] = {
        "nothing": lambda: None,
        "dropout": lambda: layer.train(),
        "another dropout": lambda: layer.adapters.update(a=dropping),
        "a scale": lambda: layer.set_scale("a", 3.0),
        "another parameter": lambda: setattr(layer, "lora_B_b", nn.Parameter(torch.randn(12, 8))),
        "an adapter without rows": lambda: layer.add_adapter("c", r=2),
        "another adapter of a name": lambda: again(r=3, use_dora=True),
        "and another": lambda: again(r=2),
        "no adapter of a name": lambda: layer.delete_adapter("b"),
    }
    kept = lora_ext.batch(NAMES)
    for what, change in changes.items():
        change()
        found = []
        for plan in (kept, lora_ext.batch(NAMES)):
            torch.manual_seed(3)
            plan.note(["b"])  # once it is deleted
            with plan:
                found.append(layer(x))
        assert torch.equal(*found), what
