"""target_parameters: adapters on parameters of any module, as PEFT's ParamWrapper has them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.adapters.checkpoint import adapter_state_dict
from lora_ext.adapters.ties import shared_parameters
from lora_ext.io import WEIGHTS_NAME
from lora_ext.nn import AnyLayer, ParamLayer

E = 4


class Experts(nn.Module):
    """Two stacks of matrices and a matrix, registered out of alphabetical order."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        shapes = [(E, 6, 5), (E, 7, 6)]
        if transposed:
            shapes = [(E, 5, 6), (E, 6, 7)]
        self.up, self.down = (nn.Parameter(torch.randn(shape)) for shape in shapes)
        self.mix = nn.Parameter(torch.randn(5, 7))

    def forward(self, x: Tensor) -> Tensor:
        up, down = (w.mT if self.is_transposed else w for w in (self.up, self.down))
        hidden = torch.tanh(torch.einsum("bi,ehi->beh", x, up))
        return torch.einsum("beh,eoh->bo", hidden, down) @ self.mix.t()


class Net(nn.Module):
    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Experts(transposed), Experts(transposed)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def net_of(transposed: bool = False) -> Net:
    torch.manual_seed(0)
    return Net(transposed)


def rows() -> Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


CASES: dict[str, dict[str, Any]] = {
    "all of both layers": {"target_parameters": ["up", "down", "mix"]},
    "one": {"target_parameters": ["layers.1.down"], "use_rslora": True},
    "with a module": {"target_parameters": ["down", "up"], "target_modules": ["head"]},
    "a linear layer's weight": {"target_parameters": ["head.weight", "mix"]},
    "no module": {"target_parameters": ["up"], "target_modules": []},
    "ranks": {
        "target_parameters": ["up", "down"],
        "rank_pattern": {r"layers.0.(up|down)": 5},
        "alpha_pattern": {r"layers.1.(up|down)": 3},
    },
    "ranks of one layer": {
        "target_parameters": ["up", "down", "mix"],
        "rank_pattern": {"up": 5, r".*0\.mix": 1},
        "alpha_pattern": {"down": 0, r"layers.1.up": 7},
        "use_rslora": True,
    },
}


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_files_go_both_ways(fields: dict[str, Any], transposed: bool, tmp_path: Path) -> None:
    base, x = net_of(transposed), rows()
    fields = {"r": 2, "lora_alpha": 3} | fields
    torch.manual_seed(3)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(fields)))
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = get_lora_model(copy.deepcopy(base), LoraConfig(**fields))
    assert ours.targeted_parameter_names == theirs.targeted_parameter_names
    assert torch.equal(ours(x), base(x))
    for model, folder in ((theirs, tmp_path / "theirs"), (ours, tmp_path / "ours")):
        disturb(model)
        model.save_pretrained(folder)
    tensors = [
        safetensors.torch.load_file(tmp_path / who / WEIGHTS_NAME) for who in ("theirs", "ours")
    ]
    shapes = [{key: tuple(tensor.shape) for key, tensor in one.items()} for one in tensors]
    assert shapes[0] == shapes[1]
    read = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs", is_trainable=True)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    torch.testing.assert_close(back(x), ours(x))

    expected, actual = theirs(x), read(x)
    torch.testing.assert_close(actual, expected)
    assert not torch.allclose(actual, base(x), atol=1e-2)
    for output in (expected, actual):
        output.square().sum().backward()
    places = {p.data_ptr(): p for p in read.parameters()}
    gradients = {k: places[t.data_ptr()].grad for k, t in adapter_state_dict(read).items()}
    count = 0
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            gradient = gradients[name.replace(".default", "")]
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)
            count += 1
    assert count == len(gradients)

    before = {name: (p, p.detach().clone()) for name, p in read.get_base_model().named_parameters()}
    y = read(x)
    read.merge_adapter()
    torch.testing.assert_close(read(x), y, rtol=1e-5, atol=1e-5)
    read.unmerge_adapter()
    now = dict(read.get_base_model().named_parameters())
    assert all(now[name] is p and torch.equal(p, values) for name, (p, values) in before.items())
    plain = read.merge_and_unload()
    assert [type(module) for module in plain.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("init", [True, False, "gaussian"], ids=str)
def test_initial_values_are_pefts(init: bool | str) -> None:
    fields = {"r": 2, "target_parameters": ["up", "mix"], "init_lora_weights": init}
    torch.manual_seed(3)
    theirs = peft.get_peft_model(net_of(), peft.LoraConfig(**fields))
    torch.manual_seed(3)
    ours = get_lora_model(net_of(), LoraConfig(**fields))
    expected = peft.get_peft_model_state_dict(theirs)
    actual = adapter_state_dict(ours)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in actual.items())


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_adapters(dtype: torch.dtype, transposed: bool) -> None:
    net = net_of(transposed).to(dtype)
    base = net.layers[0].down.detach().double()
    fields = {"target_parameters": ["layers.0.down"], "init_lora_weights": False}
    model = get_lora_model(net, LoraConfig(r=2, lora_alpha=3, **fields))
    model.add_adapter("other", LoraConfig(r=3, lora_alpha=2, **fields))
    model.set_adapter(["default", "other"])
    layer: Any = net.layers[0]
    assert isinstance(layer, ParamLayer) and isinstance(layer, Experts)

    exact, terms = base.clone(), base.abs()
    for name, r, scaling in (("", 2, 1.5), ("_other", 3, 2 / 3)):
        A, B = (getattr(layer, f"down_lora_{part}{name}").detach().double() for part in "AB")
        for e in range(E):
            update = scaling * B[:, e::E] @ A[e * r : (e + 1) * r]
            exact[e] += update.t() if transposed else update
            terms[e] += (update.t() if transposed else update).abs()
    # A sum of six products in float32, rounded once.
    error = 8 * torch.finfo(torch.float32).eps * terms
    limit = error + torch.finfo(dtype).eps / 2 * (exact.abs() + error)
    assert ((layer._adapted("down").double() - exact).abs() <= limit).all()
    x = rows().to(dtype)
    y = model(x)
    model.merge_adapter()
    assert ((layer.down.double() - exact).abs() <= limit).all()
    torch.testing.assert_close(model(x), y)
    model.unmerge_adapter()
    assert torch.equal(layer.down.double(), base)
    with model.disable_adapter():
        assert torch.equal(model(x), net_of(transposed).to(dtype)(x))
    with pytest.raises(ValueError, match="target_parameters"):
        model.add_weighted_adapter(["default", "other"], [1, 1], "both", "cat")
    assert torch.equal(copy.deepcopy(model)(x), y)


def experts_of(family: str) -> nn.Module:
    options: dict[str, Any] = {"num_local_experts": 3, "num_experts_per_tok": 2}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
        **options,
    )
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # some are empty memory until they are loaded
            parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_experts_of_transformers(family: str, tmp_path: Path) -> None:
    base = experts_of(family)
    tokens = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(2))
    fields = {
        "r": 2,
        "target_modules": ["q_proj"],
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    }
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)).eval()
    disturb(theirs)
    theirs.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path)
    expected = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base(tokens).logits, expected, atol=1e-3)
    plain = ours.merge_and_unload()
    torch.testing.assert_close(plain(tokens).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_recurrent_layer_reads_its_own_weights(tmp_path: Path) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.GRU(5, 5), nn.GRU(5, 5)
            self.two.weight_ih_l0 = self.one.weight_ih_l0

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x)[0])[0]

    net, x = Reader(), torch.randn(6, 2, 5)
    assert id(net.one.weight_ih_l0) in shared_parameters(net)
    fields = {"r": 2, "target_parameters": ["weight_ih_l0"], "init_lora_weights": False}
    model = get_lora_model(net, LoraConfig(**fields))
    y = model(x)
    with pytest.warns(UserWarning, match="shared a weight"):
        merged = model.merge_and_unload()
    assert type(merged.one) is nn.GRU and merged.one.weight_ih_l0 is not merged.two.weight_ih_l0
    torch.testing.assert_close(merged(x), y)


def test_names_are_nested_in_the_order_of_the_module() -> None:
    for kind in (AnyLayer, ParamLayer):
        layer = kind.from_module(Experts(False), ["mix", "down", "up"], 2)
        assert {key.partition("lora")[0] for key in layer.peft_parameters("default")} == {
            "base_layer.base_layer.",
            "base_layer.",
            "",
        }
        named = {id(p): key for key, p in layer.peft_parameters("default").items()}
        assert named[id(layer.mix_lora_A)] == "lora_A.weight"
        assert named[id(layer.up_lora_A)] == "base_layer.base_layer.lora_A.weight"


def added(model: LoraModel, **fields: Any) -> None:
    model.add_adapter("new", LoraConfig(r=2, **fields))


WRONG: dict[str, tuple[Callable[[LoraModel], Any], str]] = {
    "no match": (lambda m: added(m, target_parameters=["dwon"]), r"did you mean \['down'\]"),
    "saved whole": (
        lambda m: added(m, target_parameters=["layers.1.down"], modules_to_save=["layers.1"]),
        r"'layers\.1\.down' is in a module that is saved whole",
    ),
    "other parameters": (lambda m: added(m, target_parameters=["layers.0.mix"]), "'up'"),
    "a vector": (lambda m: added(m, target_parameters=["head.bias"]), "'bias'"),
    "target module": (
        lambda m: added(m, target_parameters=["head.weight"], target_modules=["head"]),
        "one of the two",
    ),
    "init": (
        lambda m: added(m, target_parameters=["layers.0.up"], init_lora_weights="pissa"),
        "stack of matrices 'up'",
    ),
    "dropout": (lambda m: added(m, target_parameters=["up"], lora_dropout=0.1), "lora_dropout"),
    "dora": (lambda m: added(m, target_parameters=["up"], use_dora=True), "use_dora"),
}


@pytest.mark.parametrize(("call", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_and_changes_nothing(
    call: Callable[[LoraModel], Any], message: str
) -> None:
    model = get_lora_model(net_of(), LoraConfig(r=2, target_parameters=["layers.0.up"]))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        call(model)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="model itself"):
        get_lora_model(Experts(False), LoraConfig(target_parameters=["up"]))
    with pytest.raises(TypeError, match="target_parameters"):
        LoraConfig(target_parameters="up")


def test_a_router_in_a_mixed_batch_says_how_to_train_without_it() -> None:
    """And what the sentence and docs/many_adapters.md name runs."""
    tokens = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(2))
    stacks = ["experts.gate_up_proj", "experts.down_proj"]
    for fields in (
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj"], "target_parameters": stacks},
    ):
        model = get_lora_model(experts_of("Mixtral"), LoraConfig(**fields))
        if fields["target_modules"] != "all-linear":
            model(input_ids=tokens, adapter_names=["default", "__base__"])
            continue
        with pytest.raises(ValueError, match="or target_parameters that do not name it"):
            model(input_ids=tokens, adapter_names=["default", "__base__"])


def test_who_names_experts_as_modules_is_told_of_target_parameters() -> None:
    base = experts_of("Mixtral")
    for name, says in (
        ("experts", r"target_parameters=\['experts.gate_up_proj', 'experts.down_proj'\]"),
        ("gate_up_proj", "experts.gate_up_proj' is a parameter; name it in target_parameters"),
    ):
        with pytest.raises(ValueError, match=says):
            get_lora_model(base, LoraConfig(target_modules=[name]))
