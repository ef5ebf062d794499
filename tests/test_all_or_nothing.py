"""An exception at any point of a call that changes a model leaves it as it was or as it becomes.

With LORA_EXT_ALL_POINTS=1 every line of every call is tried on every kind of layer, and 2,000
moments: many minutes. Else a sample.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from interruptions import (
    AtLine,
    AtLines,
    AtOperator,
    Interruption,
    duration,
    handler,
    interrupted_after,
)
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model, loralib, quant
from lora_ext.adapters import replace_lora_weights_loftq
from lora_ext.io import save_files
from lora_ext.nn import AnyLayer, Linear, LoraLayer, MergedLinear
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.trainable_tokens import TrainableTokensLayer

ALL_POINTS = bool(os.environ.get("LORA_EXT_ALL_POINTS"))


class Kind(NamedTuple):
    """How to make a layer, what a config says of it, and an input."""

    make: Callable[[], nn.Module]
    fields: dict[str, Any]
    x: Tensor
    takes: frozenset[str] = frozenset({"pissa", "weighted", "plain"})
    second: dict[str, Any] = {}  # noqa: RUF012 - of the second adapter alone


def floats(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, int(torch.tensor(shape).prod())).view(*shape)


class Own(nn.Linear):
    """A base that is kept as it is and called."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


TARGETS: dict[str, Any] = {"target_modules": ["a", "b"]}
WEIGHTED = frozenset({"weighted", "plain"})
KINDS = {
    "Linear": Kind(lambda: nn.Linear(4, 4), TARGETS, floats(2, 4)),
    "subclass": Kind(lambda: Own(4, 4), TARGETS, floats(2, 4)),
    "fan_in_fan_out": Kind(lambda: Linear(4, 4, fan_in_fan_out=True), TARGETS, floats(2, 4)),
    "lora_bias": Kind(
        lambda: nn.Linear(4, 4), TARGETS | {"lora_bias": True}, floats(2, 4), WEIGHTED
    ),
    "DoRA": Kind(
        lambda: nn.Linear(4, 4),
        TARGETS | {"use_dora": True},
        floats(2, 4),
        frozenset({"pissa", "plain"}),
    ),
    "base biases": Kind(
        lambda: nn.Linear(4, 4), TARGETS | {"bias": "all"}, floats(2, 4), frozenset()
    ),
    "Embedding": Kind(lambda: nn.Embedding(5, 4), TARGETS, torch.arange(5), WEIGHTED),
    "tokens": Kind(
        lambda: nn.Embedding(5, 4),
        {"target_modules": ["plain"], "trainable_token_indices": {"a": [1, 3], "b": [0]}},
        torch.arange(5),
        WEIGHTED,
        {"trainable_token_indices": {"a": [0, 2], "b": [4]}},
    ),
    "Conv1d": Kind(lambda: nn.Conv1d(4, 4, 2), TARGETS, floats(1, 4, 3), WEIGHTED),
    "Conv2d": Kind(lambda: nn.Conv2d(4, 4, 2, groups=2), TARGETS, floats(1, 4, 3, 3), WEIGHTED),
    "Conv3d": Kind(lambda: nn.Conv3d(4, 4, 1), TARGETS, floats(1, 4, 2, 2, 2), WEIGHTED),
    "quantized": Kind(
        lambda: quant.Linear.from_linear(nn.Linear(4, 4), "nf4"),
        TARGETS,
        floats(2, 4),
        WEIGHTED | {"quantized"},
    ),
    "MergedLinear": Kind(
        lambda: MergedLinear(4, 6, enable_lora=[True, False, True]),
        TARGETS,
        floats(2, 4),
        frozenset(),
    ),
    "MultiheadAttention": Kind(lambda: nn.MultiheadAttention(4, 2), TARGETS, floats(3, 1, 4)),
    "AnyLayer": Kind(
        lambda: AnyLayer.from_module(nn.GRU(4, 4), ["weight_ih_l0", "weight_hh_l0"], r=0),
        TARGETS,
        floats(2, 4),
        frozenset(),
    ),
    "ParamLayer": Kind(
        lambda: nn.Linear(4, 4), {"target_parameters": ["weight"]}, floats(2, 4), frozenset()
    ),
}


class Net(nn.Module):
    """Two layers of a kind, a tied pair, and a module to save whole."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.a, self.b = kind.make(), kind.make()
        self.head, self.plain = nn.Linear(4, 3), nn.Linear(4, 4)
        if kind.make().__class__ is nn.Linear:
            self.plain.weight = self.b.weight

    def forward(self, x: Tensor) -> Any:
        inputs = (x, x, x) if isinstance(self.a, nn.MultiheadAttention) else (x,)
        return self.a(*inputs), self.b(*inputs), self.head(floats(2, 4)), self.plain(floats(2, 4))


def config_of(kind: Kind, **fields: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "init_lora_weights": False} | kind.fields | fields)


@functools.cache
def model_of(name: str) -> LoraModel:
    kind = KINDS[name]
    torch.manual_seed(0)
    model = get_lora_model(Net(kind), config_of(kind, modules_to_save=["head"]))
    model.add_adapter("two", config_of(kind, bias="none", **kind.second))
    return model.eval()


class Call(NamedTuple):
    call: Callable[[LoraModel, Kind, Path], object]
    before: Callable[[LoraModel], object] = lambda _: None
    needs: str = ""


def weighted(model: LoraModel) -> None:
    model.add_weighted_adapter(["default", "two"], [0.5, 0.25], "new", "cat")


def merged(model: LoraModel) -> None:
    model.merge_adapter(["default"])


def one_layer(model: LoraModel) -> LoraLayer:
    return next(layer for _, layer in model.layers_with("two"))


CALLS = {
    "merge": Call(lambda m, _, __: m.merge_adapter()),
    "merge on top": Call(lambda m, _, __: m.merge_adapter(["two"]), merged),
    "unmerge": Call(lambda m, _, __: m.unmerge_adapter(), merged),
    "merge and unload": Call(lambda m, _, __: m.merge_and_unload()),
    "merge others and unload": Call(
        lambda m, _, __: m.merge_and_unload(adapter_names=["two"]), merged
    ),
    "unload": Call(lambda m, _, __: m.unload(), merged),
    "add": Call(lambda m, k, _: m.add_adapter("new", config_of(k, bias="none"))),
    "add from the base": Call(
        lambda m, k, _: m.add_adapter(
            "new", config_of(k, init_lora_weights="olora", bias="none", target_modules=["a"])
        ),
        needs="pissa",
    ),
    "load": Call(lambda m, _, folder: m.load_adapter(folder, "new")),
    "combine": Call(lambda m, _, __: weighted(m), needs="weighted"),
    "wrap": Call(
        lambda m, k, _: get_lora_model(
            m.get_base_model(), config_of(k, bias="none", modules_to_save=["head"])
        ),
        lambda m: m.unload(),
        needs="plain",
    ),
    "load into a plain model": Call(
        lambda m, _, folder: LoraModel.from_pretrained(m.get_base_model(), folder),
        lambda m: m.unload(),
        needs="plain",
    ),
    "rename": Call(lambda m, _, __: m.rename_adapter("default", "type"), merged),
    "delete": Call(lambda m, _, __: m.delete_adapter("default")),
    "delete from a layer": Call(lambda m, _, __: one_layer(m).delete_adapter("default")),
    "set": Call(lambda m, _, __: m.set_adapter("two"), merged),
    "train": Call(lambda m, _, __: m.set_requires_grad(["default", "two"], False)),
    "scale": Call(lambda m, _, __: m.set_scale("default", 0)),
    "LoftQ": Call(lambda m, _, folder: replace_lora_weights_loftq(m, folder), needs="quantized"),
    "merge into codes": Call(lambda m, _, __: m.merge_adapter(requantize=True), needs="quantized"),
    "disable": Call(lambda m, _, __: m.disable_adapters(), merged),
}
COMBINATIONS = [
    pytest.param(kind, call, id=f"{kind}-{call}")
    for kind in KINDS
    for call in CALLS
    if CALLS[call].needs in ("", *KINDS[kind].takes)
]


def bits(tensor: Tensor) -> Any:
    return tensor.dtype, tensor.shape, tensor.detach().contiguous().numpy().tobytes()


def state_of(model: LoraModel, kind: Kind) -> Any:
    """All that a user can see of it."""
    net = model.get_base_model()
    modules: list[Any] = []
    for name, module in net.named_modules():
        assert "_transaction" not in vars(module)
        attributes = sorted(vars(module).keys() - {"_is_product"})  # found out once
        modules.append((name, type(module).__name__, attributes))
        if isinstance(module, LoraLayer):
            scales = [(n, module.get_scale(n)) for n in module.adapters]
            lists = module.active_adapters, module.merged_adapters, module.running_adapters
            parts = [(n, list(module.parts(n))) for n in module.adapters]
            modules.append((scales, lists, parts, module.disable_adapters, module._lora_variant))
        if isinstance(module, TrainableTokensLayer):
            lists = module.active_adapters, module.merged_adapters, module.running_adapters
            modules.append((lists, module.token_indices, module.disable_adapters))
        if isinstance(module, ModulesToSave):
            copies = list(module.modules_to_save)
            modules.append((copies, module.active_adapter, module.enabled))
    return (
        modules,
        [(n, bits(p), p.requires_grad) for n, p in net.named_parameters(remove_duplicate=False)],
        [(name, bits(tensor)) for name, tensor in net.state_dict().items()],
        [(name, vars(config)) for name, config in model.peft_config.items()],
        model.active_adapters,
        bits(torch.cat([y.flatten() for y in flat(net(kind.x))])),
    )


def flat(y: Any) -> list[Tensor]:
    return [y] if isinstance(y, Tensor) else [t for part in y for t in flat(part)]


class Trial:
    """A call on copies of a model, which it is to leave as they are or as it makes them."""

    def __init__(self, name: str, call: Call, folder: Path) -> None:
        self.name, self.kind, self.call, self.folder = name, KINDS[name], call, folder
        if call in (CALLS["load"], CALLS["load into a plain model"]):
            model_of(name).save_pretrained(folder, ["two"])
            self.folder = folder / "two"
        if call is CALLS["LoftQ"]:
            weights = {f"{name}.weight": floats(4, 4) for name in ("a", "b")}
            save_file(weights, folder / "model.safetensors")
        self.model = self.fresh()
        self.before = state_of(self.model, self.kind)
        self.operators = AtOperator()
        self.count(self.operators)
        self.lines = AtLine()
        done = self.count(self.lines)
        self.after = state_of(done, self.kind)

    def fresh(self) -> LoraModel:
        model = copy.deepcopy(model_of(self.name))
        self.call.before(model)
        layers = [layer for _, layer in model.lora_layers()]
        self.base = [(p, bits(p)) for layer in layers for p in base_parameters(layer)]
        return model

    def run(self, model: LoraModel) -> None:
        torch.default_generator.manual_seed(1)
        self.call.call(model, self.kind, self.folder)

    def count(self, counter: AtLine | AtOperator) -> LoraModel:
        model = self.fresh()
        with counter:
            self.run(model)
        return model

    def interrupt(self, how: Callable[[int], Any], n: int) -> None:
        try:
            with how(n):
                self.run(self.model)
        except Interruption as error:
            where = str(error)
        else:  # lines differ: something is remembered from the call before
            where = "the end"
        state = state_of(self.model, self.kind)
        assert state in (self.before, self.after), where
        if state != self.before:
            self.model = self.fresh()


def base_parameters(layer: LoraLayer) -> list[Any]:
    return list((layer.base_parameters or layer.merged_parameters(())).values())


def sample(first: int, last: int, size: int, rng: random.Random) -> list[int]:
    points = range(first, last + 1)
    return list(points) if ALL_POINTS or len(points) <= size else rng.sample(points, size)


@pytest.mark.parametrize(("kind", "call"), COMBINATIONS)
@pytest.mark.filterwarnings("ignore")
def test_an_exception_leaves_before_or_after(kind: str, call: str, tmp_path: Path) -> None:
    trial, rng = Trial(kind, CALLS[call], tmp_path), random.Random(f"{kind} {call}")
    assert trial.before != trial.after
    lines, operators = trial.lines, trial.operators.seen
    points = [
        *((AtLine, n) for n in sample(1, lines.prepared - 1, 2, rng)),
        *((AtLine, n) for n in sample(lines.prepared, lines.seen, 8, rng)),
        *((AtOperator, n) for n in sample(1, operators, 2, rng)),
    ]
    for how, n in points:
        base = trial.base
        trial.interrupt(how, n)
        if call != "add from the base":
            assert all(bits(parameter) == values for parameter, values in base)


@pytest.mark.parametrize("kind", ["Linear", "MultiheadAttention"])
@pytest.mark.parametrize("call", ["merge", "combine"])
def test_a_signal_at_any_moment_leaves_before_or_after(call: str, kind: str) -> None:
    trial, rng = Trial(kind, CALLS[call], Path()), random.Random(0)
    length = min(duration(functools.partial(trial.run, trial.fresh())) for _ in range(5))
    wanted, interrupted = 1000 if ALL_POINTS else 25, 0
    with handler():
        while interrupted < wanted:
            base = trial.base
            delay = rng.uniform(0, 1.1 * length)
            interrupted += interrupted_after(delay, lambda: trial.run(trial.model))
            state = state_of(trial.model, trial.kind)
            assert state in (trial.before, trial.after)
            assert all(bits(parameter) == values for parameter, values in base)
            if state != trial.before:
                trial.model = trial.fresh()


@pytest.mark.parametrize("name", ["Linear", "subclass", "MultiheadAttention"])
def test_an_exception_while_a_merged_model_moves_leaves_no_stray_parameter(name: str) -> None:
    """Which of its parameters are moved is torch's affair."""
    kind = KINDS[name]

    unmerged = state_of(model_of(name), kind)

    def fresh() -> LoraModel:
        model = copy.deepcopy(model_of(name))
        merged(model)
        return model

    model = fresh()
    with AtLine() as lines:
        model.double()
    for n in range(1, lines.seen + 1):
        model = fresh()
        names = [name for name, _ in model.get_base_model().named_parameters()]
        with contextlib.suppress(Interruption), AtLine(n):
            model.double()
        assert [name for name, _ in model.get_base_model().named_parameters()] == names
        model.float().unmerge_adapter()
        assert state_of(model, kind) == unmerged


@pytest.mark.parametrize("kind", [loralib.Linear, loralib.Conv2d], ids=lambda kind: kind.__name__)
def test_an_exception_while_loralib_layers_move_leaves_no_stray_parameter(kind: Any) -> None:
    arguments = (4, 4) if kind is loralib.Linear else (4, 4, 1)
    for n in range(1, 100):
        layer = kind(*arguments, r=2)
        nn.init.ones_(layer.lora_B)
        names = [name for name, _ in layer.named_parameters()]
        base = [bits(p) for p in layer.parameters()]
        layer.eval()
        try:
            with AtLine(n):
                layer.double()
            break
        except Interruption:
            assert [name for name, _ in layer.named_parameters()] == names
            assert [bits(p) for p in layer.float().train().parameters()] == base
    assert n > 5


def test_an_exception_while_saving_does_not_keep_the_lock(tmp_path: Path) -> None:
    with AtLine() as lines:
        save_files(tmp_path, {"a": b"0"})
    for n in range(1, lines.seen + 1):
        with contextlib.suppress(Interruption), AtLine(n):
            save_files(tmp_path, {"a": b"1"})
        save_files(tmp_path, {"a": b"2"}, lock_timeout=0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_two_exceptions_leave_no_adapter_disabled() -> None:
    """The second one while the first one's clean-up runs."""
    kind, model, rng = KINDS["Linear"], copy.deepcopy(model_of("Linear")), random.Random(0)

    def run() -> None:
        with model.disable_adapter():
            model(kind.x)

    with AtLines() as lines:
        run()
    before, twice = state_of(model, kind), 0
    for _ in range(3000 if ALL_POINTS else 60):
        first = rng.randint(1, lines.seen)
        with AtLines(first, first + rng.randint(1, 120)) as both, contextlib.suppress(Interruption):
            run()
        twice += both.raised == 2
        assert state_of(model, kind) == before
    assert twice > 20
