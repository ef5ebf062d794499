"""Merging layers whose weight is also another module's: each gets one of its own, and unmerging
puts the shared parameter itself back."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import BUILDERS
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.adapters.ties import shared_parameters
from lora_ext.nn import Embedding, Linear, LoraLayer

TIED = r"shared a weight with another module"
NAMES = ["embed", "first", "twin", "head"]


class Tied(nn.Module):
    """An embedding tied to the head, and two layers tied to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.first, self.twin = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head.weight, self.twin.weight = self.embed.weight, self.first.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.twin(torch.tanh(self.first(self.embed(tokens)))))


def model_of(targets: list[str] = NAMES, dtype: torch.dtype = torch.float32) -> LoraModel:
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    return get_lora_model(Tied().to(dtype).eval(), config)


TOKENS = torch.arange(11).view(1, 11)


def merge(model: LoraModel, names: list[str] | None = None) -> None:
    with pytest.warns(UserWarning, match=TIED):
        model.merge_adapter(names)


def parameters(model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
    """By all names: the objects, and their values."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: (parameter, parameter.detach().clone()) for name, parameter in named}


def as_before(model: nn.Module, before: dict[str, tuple[nn.Parameter, Tensor]]) -> bool:
    now = dict(model.named_parameters(remove_duplicate=False))
    return list(now) == list(before) and all(
        now[name] is parameter and torch.equal(parameter.nan_to_num(7), values.nan_to_num(7))
        for name, (parameter, values) in before.items()
    )


def formula(layer: Any, weight: Tensor, adapter: str = "") -> Tensor:
    A, B = (getattr(layer, f"lora_{part}{adapter}").detach().double() for part in "AB")
    update = layer.scaling * B @ A
    return weight.double() + (update.t() if isinstance(layer, nn.Embedding) else update)


def near(actual: Tensor, exact: Tensor) -> bool:
    """Rounded once, after a sum of three products in float32 of numbers of about this size."""
    eps = torch.finfo(torch.float32).eps + torch.finfo(actual.dtype).eps
    return bool(((actual.double() - exact).abs() <= 4 * eps * exact.abs().max()).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", [NAMES, ["embed", "twin"], ["head", "first"]], ids=str)
def test_each_layer_gets_its_own_update(targets: list[str], dtype: torch.dtype) -> None:
    model = model_of(targets, dtype)
    net, before = model.get_base_model(), parameters(model.get_base_model())
    base = {"embed": net.embed.weight, "first": net.first.weight}
    base |= {"head": base["embed"], "twin": base["first"]}
    y = model(TOKENS)
    with pytest.warns(UserWarning, match=TIED) as raised:
        model.merge_adapter()
    told = [warning for warning in raised if "shared a weight" in str(warning.message)]
    assert len(told) == 1 and all(f"'{name}'" in str(told[0].message) for name in targets)
    for name in NAMES:
        layer = getattr(net, name)
        if name in targets:
            assert layer.weight is not base[name]
            assert layer.weight.requires_grad == base[name].requires_grad
            assert near(layer.weight, formula(layer, base[name]))
        else:
            assert layer.weight is base[name]
    if dtype == torch.float32:
        torch.testing.assert_close(model(TOKENS), y)
    model.unmerge_adapter()
    assert as_before(net, before) and torch.equal(model(TOKENS), y)


def test_parameters_over_the_same_memory_are_shared() -> None:
    net = Tied()
    memory = torch.randn(12, 6)
    net.first.weight, net.twin.weight = nn.Parameter(memory[:6]), nn.Parameter(memory[6:])
    assert shared_parameters(net) == {id(net.embed.weight)}
    net.twin.weight = nn.Parameter(memory[5:11])
    model = get_lora_model(net, LoraConfig(r=2, target_modules=["twin"], init_lora_weights=False))
    before = parameters(net)
    merge(model)
    assert as_before(net.first, {n: before[f"first.{n}"] for n in ("weight", "bias")})
    model.unmerge_adapter()
    assert as_before(net, before)


def test_one_module_under_two_names_is_merged_once() -> None:
    net = Tied()
    net.twin = net.first
    model = get_lora_model(net, LoraConfig(r=2, target_modules=["first"], init_lora_weights=False))
    values = net.first.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.merge_adapter()
    assert net.twin is net.first and near(net.first.weight, formula(net.first, values))


def test_more_adapters_are_merged_on_top() -> None:
    model = model_of(["first"])
    config = LoraConfig(r=2, target_modules=["first", "twin"], init_lora_weights=False)
    model.add_adapter("other", config)
    net, before = model.get_base_model(), parameters(model.get_base_model())
    weight = net.first.weight.detach().clone()
    merge(model)
    merge(model, ["other"])  # "twin" alone still holds the shared weight
    both = formula(net.first, weight) + net.first.get_scale("other") * (
        net.first.lora_B_other.detach().double() @ net.first.lora_A_other.detach().double()
    )
    assert near(net.first.weight, both) and not torch.equal(net.twin.weight, weight)
    model.unmerge_adapter()
    assert as_before(net, before)


def test_state_dict_is_the_base_and_tied_while_merged() -> None:
    model = model_of()
    before = {k: v.clone() for k, v in model.get_base_model().state_dict().items()}
    merge(model)
    now = model.get_base_model().state_dict()
    assert list(now) == list(before) and all(torch.equal(now[k], before[k]) for k in now)
    assert now["embed.weight"].data_ptr() == now["head.weight"].data_ptr()
    kept = model.get_base_model().state_dict(keep_vars=True)
    assert kept["first.weight"] is kept["twin.weight"]


@pytest.mark.parametrize("targets", [NAMES, ["embed"]], ids=str)
def test_loading_into_a_merged_model(targets: list[str]) -> None:
    model, other = model_of(targets), model_of(targets)
    net, before = model.get_base_model(), parameters(model.get_base_model())
    state = {k: v * 0.5 for k, v in other.get_base_model().state_dict().items()}
    merge(model)
    net.load_state_dict(state)
    assert all(layer.merged for _, layer in model.lora_layers())
    for name in targets:
        layer = getattr(net, name)
        assert near(layer.weight, formula(layer, state[f"{name}.weight"]))
    model.unmerge_adapter()
    loaded = {name: (before[name][0], state[name]) for name in before}
    assert as_before(net, loaded)


@pytest.mark.parametrize("targets", [NAMES, ["embed", "twin"]], ids=str)
def test_moving_and_casting_while_merged(targets: list[str]) -> None:
    model = model_of(targets)
    net, before = model.get_base_model(), parameters(model.get_base_model())
    merge(model)
    model.to(torch.float64)
    assert net.embed.weight.dtype == torch.float64
    model.unmerge_adapter()
    doubled = {name: (parameter, values.double()) for name, (parameter, values) in before.items()}
    assert as_before(net, doubled)
    merge(model)
    model.half()
    model.unmerge_adapter()
    assert as_before(net, {name: (p, values.half()) for name, (p, values) in before.items()})


def copied(model: LoraModel, how: str) -> LoraModel:
    if how == "deepcopy":
        return copy.deepcopy(model)
    if how == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        return torch.load(file, weights_only=False)
    return model


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_merged_model(how: str) -> None:
    model = model_of()
    before = parameters(model.get_base_model())
    merge(model)
    other = copied(model, how)
    assert torch.equal(other(TOKENS), model(TOKENS))
    other.unmerge_adapter()
    net = other.get_base_model()
    assert net.embed.weight is net.head.weight and net.first.weight is net.twin.weight
    assert net.embed.weight is not before["embed.weight"][0]
    assert torch.equal(net.embed.weight, before["embed.weight"][1])
    assert all(layer.merged for _, layer in model.lora_layers())
    model.unmerge_adapter()
    assert as_before(model.get_base_model(), before)


def test_a_failure_in_the_last_layer_leaves_all_tied() -> None:
    base, _ = BUILDERS["llama"]()
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "embed_tokens", "lm_head"],
        layer_replication=[[0, 3]] * 10 + [[0, 2]],
        init_lora_weights=False,
    )
    base.lm_head.weight = base.model.embed_tokens.weight
    model = get_lora_model(base, config)
    layers = [layer for _, layer in model.lora_layers()]
    assert len(layers) == 34 and len({id(layer.weight) for layer in layers}) == 4
    with torch.no_grad():
        layers[-1].lora_B[0, 0] = torch.nan
    before = parameters(base)
    with pytest.raises(ValueError, match="NaN"):
        model.merge_adapter()
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)
    assert as_before(base, before) and not any(layer.merged for layer in layers)


@pytest.mark.parametrize("on_top", [False, True], ids=["", "on top of another"])
def test_an_interrupted_merge_leaves_all_tied(
    on_top: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    config = LoraConfig(r=3, target_modules=["embed", "twin"], init_lora_weights=False)
    model.add_adapter("other", config)
    net, before = model.get_base_model(), parameters(model.get_base_model())
    if on_top:
        merge(model)
    y = model(TOKENS)
    merged = {name: values for name, (_, values) in parameters(net).items()}
    write = type(net.twin)._write_merged

    def interrupted(layer: LoraLayer, names: Any) -> None:
        write(layer, names)
        if layer.adapters == net.twin.adapters and "other" in names:  # a draft of it
            raise KeyboardInterrupt

    monkeypatch.setattr(type(net.twin), "_write_merged", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.merge_adapter(["other"])
    now = {name: values for name, (_, values) in parameters(net).items()}
    assert all(torch.equal(now[name], merged[name]) for name in merged)
    assert torch.equal(model(TOKENS), y)
    assert all(torch.equal(parameter, values) for parameter, values in before.values())
    if on_top:
        model.unmerge_adapter()
    assert as_before(net, before)


def test_layers_that_share_a_weight_merge_by_themselves_in_any_order() -> None:
    model = model_of()
    net, before, y = model.get_base_model(), parameters(model.get_base_model()), model(TOKENS)
    for order in (NAMES, NAMES[::-1]):
        for name in order:
            getattr(net, name).merge()
        for name in NAMES:
            assert near(getattr(net, name).weight, formula(getattr(net, name), base_of(net, name)))
        torch.testing.assert_close(model(TOKENS), y)
        for name in (*order[2:], *order[:2]):
            getattr(net, name).unmerge()
        assert as_before(net, before)


def base_of(net: Any, name: str) -> Tensor:
    return getattr(net, name).base_parameters["weight"].detach()


@pytest.mark.parametrize("cycles", [1, 3])
def test_tied_layers_follow_the_mode(cycles: int) -> None:
    """loralib's way, in which each layer merges by itself."""
    torch.manual_seed(0)
    net: Any = nn.Module()
    net.embed = Embedding(9, 6, r=2, init_lora_weights=False, merge_weights=True)
    net.head = Linear(6, 9, r=2, bias=False, init_lora_weights=False, merge_weights=True)
    net.head.weight = net.embed.weight
    tokens, base = torch.arange(9), net.embed.weight.detach().clone()
    y = net.head(net.embed(tokens))
    for _ in range(cycles):
        net.eval()
        torch.testing.assert_close(net.head(net.embed(tokens)), y)
        assert torch.equal(net.state_dict()["head.weight"], base)
        net.train()
        assert net.head.weight is net.embed.weight and torch.equal(net.head.weight, base)
    assert torch.equal(net.head(net.embed(tokens)), y)


class Own(nn.Linear):
    """A base that is kept as it is and called."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [nn.Linear, Own])
@pytest.mark.parametrize("targets", [["embed"], ["head"], ["embed", "head"]], ids=str)
@pytest.mark.parametrize("how", ["", "deepcopy", "pickle"])
def test_tying_again_while_merged(targets: list[str], how: str, kind: type[nn.Linear]) -> None:
    """As tie_weights() of transformers does: the layers stay merged, the others get the base's."""
    net = Tied()
    net.head = kind(6, 11, bias=False)
    net.head.weight = net.embed.weight
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    model = get_lora_model(net, config)
    names, y = list(model.state_dict()), model(TOKENS)
    net.head.weight = net.embed.weight
    assert torch.equal(model(TOKENS), y) and list(model.state_dict()) == names
    merge(model)
    model = copied(model, how)
    net, y = model.get_base_model(), model(TOKENS)
    (base,) = getattr(net, targets[0]).base_parameters.values()
    for name, source in (("head", "embed"), ("embed", "head")):
        getattr(net, name).weight = getattr(net, source).weight
        assert torch.equal(model(TOKENS), y)
    model.unmerge_adapter()
    assert net.head.weight is base and net.embed.weight is base


def test_another_module_can_be_given_a_merged_weight() -> None:
    model = model_of(["first"])
    merge(model)
    layer, plain = model.get_base_model().first, nn.Linear(6, 6)
    plain.weight = layer.weight
    assert plain.weight is layer.weight


def test_a_weight_given_to_a_merged_layer_is_its_base() -> None:
    model = model_of(["first"])
    merge(model)
    layer, values = model.get_base_model().first, torch.randn(6, 6)
    given = nn.Parameter(values.clone())
    layer.weight = given
    assert layer.merged and near(layer.weight, formula(layer, values))
    layer.unmerge()
    assert layer.weight is given and torch.equal(given, values)


@pytest.mark.parametrize("target", ["wte", "lm_head"])
def test_tie_weights_of_transformers_while_merged(target: str) -> None:
    base, inputs = BUILDERS["gpt2"]()
    config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    model = get_lora_model(base, config)
    merge(model)
    loss = model(**inputs).loss
    base.tie_weights()
    assert torch.equal(model(**inputs).loss, loss)
    model.unmerge_adapter()
    assert base.lm_head.weight is base.transformer.wte.weight


def test_unloading_gives_untied_modules() -> None:
    model = model_of()
    y, base = model(TOKENS), model.get_base_model().first.weight
    values = base.detach().clone()
    with pytest.warns(UserWarning, match="for good"):
        net = model.merge_and_unload()
    assert type(net.first) is nn.Linear and not any(isinstance(m, LoraLayer) for m in net.modules())
    assert len({id(p) for p in net.parameters()}) == 6 and torch.equal(base, values)
    torch.testing.assert_close(net(TOKENS), y)


def test_unloading_what_is_merged_says_so_in_the_config() -> None:
    base, inputs = BUILDERS["gpt2"]()
    config = LoraConfig(r=2, target_modules=["wte"], init_lora_weights=False)
    model = get_lora_model(base, config)
    merge(model)
    assert base.config.tie_word_embeddings  # until it is for good
    loss = model(**inputs).loss
    with pytest.warns(UserWarning, match="tie_word_embeddings is False"):
        plain = model.unload()
    assert not plain.config.tie_word_embeddings and torch.equal(plain(**inputs).loss, loss)
    plain.tie_weights()
    assert torch.equal(plain(**inputs).loss, loss)


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5", "mistral"])
@pytest.mark.parametrize("whole", [False, True], ids=["adapter", "modules_to_save"])
def test_reloading_an_untied_model(family: str, whole: bool, tmp_path: Path) -> None:
    base, inputs = BUILDERS[family]()
    head = next(name for name, m in base.named_modules() if m is base.get_output_embeddings())
    tied = base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert tied == base.config.tie_word_embeddings == (family != "mistral")
    fields: dict[str, Any] = {
        "target_modules": ["nothing" if whole else head, "query", "q", "c_attn", "q_proj"]
    }
    if whole:
        fields["modules_to_save"] = [head]
    model = get_lora_model(base, LoraConfig(r=4, init_lora_weights=False, **fields))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.requires_grad or "bias" in name:  # that of BERT's head is tied, too
                parameter.add_(0.05 * torch.randn_like(parameter))
    loss = model(**inputs).loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    # The T5 family computes something else if this is False; transformers loads both weights.
    assert merged.config.tie_word_embeddings == (family == "t5")
    merged.save_pretrained(tmp_path)
    again, report = type(base).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    for one, other in ((merged, loss), (again, loss)):
        assert (one(**inputs).loss - other).abs() <= 1e-5 * other.abs()


def bart() -> tuple[Any, dict[str, Tensor]]:
    config = transformers.BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        forced_eos_token_id=2,
    )  # fmt: skip
    tokens = torch.tensor([[3, 4, 5, 2]])
    model = transformers.BartForConditionalGeneration(config).eval()
    return model, {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("family", ["t5", "bart"])
@pytest.mark.parametrize(
    "targets", [["shared"], ["shared", "lm_head"], ["encoder.embed_tokens"]], ids=str
)
def test_one_of_several_tied_weights_is_reloaded(
    family: str, targets: list[str], tmp_path: Path
) -> None:
    base, inputs = (BUILDERS.get(family) or bart)()
    model = get_lora_model(base, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    loss = model(**inputs).loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)  # which drops names of what is still shared
    again = type(base).from_pretrained(tmp_path)
    for one in (merged, again):
        assert (one(**inputs).loss - loss).abs() <= 1e-5 * loss.abs()


def test_replicated_layers_can_be_saved_untied(tmp_path: Path) -> None:
    base, inputs = BUILDERS["llama"]()
    config = LoraConfig(
        r=2,
        target_modules="all-linear",
        layer_replication=[[0, 2], [1, 3]],
        init_lora_weights=False,
    )
    model = get_lora_model(base, config)
    inputs["use_cache"] = False
    loss = model(**inputs).loss
    with pytest.warns(UserWarning, match=r"and \d+ more"):
        merged = model.merge_and_unload()
    assert (merged(**inputs).loss - loss).abs() <= 1e-5 * loss.abs()
    for index, layer in enumerate(merged.model.layers):  # what was not adapted is still shared
        merged.model.layers[index] = copy.deepcopy(layer)
    merged.save_pretrained(tmp_path)
    again = type(base).from_pretrained(tmp_path)
    assert (again(**inputs).loss - loss).abs() <= 1e-5 * loss.abs()


@pytest.mark.parametrize("out", ["merge_and_unload", "unload"])
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_what_has_no_adapters_any_more_says_so(out: str, merge: str) -> None:
    config = LoraConfig(r=2, target_modules=["0"])
    model = get_lora_model(nn.Sequential(nn.Linear(4, 4)), config)
    getattr(model, out)()
    with pytest.raises(ValueError, match=r"without adapter layers \(merge_and_unload\(\)"):
        getattr(model, merge)()
