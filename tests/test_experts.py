"""Experts that transformers 5 stacks into parameters: what "all-linear" and the names that their
projections had as modules reach, with PEFT as the truth."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from peft.utils import transformers_weight_conversion as pefts
from torch import Tensor, nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.adapters.architectures import STACKED_EXPERTS
from lora_ext.nn import ParamLayer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
LATENT = {
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "MiniMaxM2": {"num_local_experts": 4, "head_dim": 8, "rotary_dim": 4},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]},
    # Dense layers and shared experts beside the stacks.
    "DeepseekV3": LATENT
    | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "Olmoe": {"num_experts": 4},
    "LongcatFlash": LATENT
    | {
        "n_routed_experts": 4,
        "num_layers": 1,
        "q_lora_rank": 16,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 24,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "head_dim": 8,
    },
    # PEFT takes these names for modules alone.
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 24},
    "GptOss": {"num_local_experts": 4, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": 4},
}
W = ["q_proj", "w1", "w2", "w3"]
PROJECTIONS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "w": {"target_modules": W},
    "projections": {"target_modules": PROJECTIONS},
    "projections, rslora": {"target_modules": PROJECTIONS, "use_rslora": True},
    "expression": {"target_modules": r".*\.(q_proj|gate_proj|up_proj|down_proj)"},
    "parameters": {"target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
    "patterns": {
        "target_modules": PROJECTIONS,
        "rank_pattern": {r".*1.*down_proj": 5},
        "alpha_pattern": {"q_proj": 7},
    },
}


def build(family: str) -> nn.Module:
    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family])
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # some are empty memory until they are loaded
            parameter.normal_(std=0.3, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
    return model


def disturb(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def outputs(model: nn.Module) -> Tensor:
    logits: Tensor = model(torch.arange(1, 9)[None]).logits
    return logits


def comparable(folder: Path) -> dict[str, Any]:
    config = json.loads((folder / "adapter_config.json").read_text())
    for field in ("target_modules", "target_parameters"):
        if isinstance(config[field], list):
            # all-linear is written by whole names of modules; none is what no names are.
            config[field] = sorted({name.rpartition(".")[2] for name in config[field]}) or None
    return {
        name: value
        for name, value in config.items()
        if name not in ("peft_version", "auto_mapping")
    }


# Families in which some of these names are no module and no expert have nothing to compare.
CASES = [
    (family, targets)
    for family in FAMILIES
    for targets in TARGETS
    if (targets == "w") == (family in ("Mixtral", "MiniMaxM2"))
    or targets in ("all-linear", "parameters")
    if family != "LongcatFlash"
    if not (family == "GraniteMoe" and targets == "parameters")
    if not (family in ("GptOss", "GraniteMoe") and targets == "patterns")
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "targets"), CASES, ids=[": ".join(case) for case in CASES])
def test_experts_are_pefts(family: str, targets: str, tmp_path: Path) -> None:
    base, fields = build(family), {"r": 2, "lora_alpha": 3} | TARGETS[targets]
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**copy.deepcopy(fields)))
    given = LoraConfig(**copy.deepcopy(fields))
    ours = get_lora_model(copy.deepcopy(base), given)
    assert given == LoraConfig(**fields)  # the user's own stays as it was
    assert ours.targeted_module_names == theirs.targeted_module_names
    assert sorted(ours.targeted_parameter_names) == sorted(theirs.targeted_parameter_names)
    for model, who in ((theirs, "theirs"), (ours, "ours")):
        disturb(model)
        model.eval().save_pretrained(tmp_path / who)
    if family not in ("Qwen2Moe", "GptOss", "GraniteMoe"):  # an expression stays one there
        assert comparable(tmp_path / "ours") == comparable(tmp_path / "theirs")

    read = LoraModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    expected = outputs(theirs)
    # Both add the same numbers in another order. A value passes up to eight products in each of two
    # layers, of up to 64 terms, each rounded to float32.
    tolerance = {"rtol": 0.0, "atol": 2 * 8 * 64 * 2**-24 * float(expected.abs().max())}
    torch.testing.assert_close(outputs(read), expected, **tolerance)
    assert not torch.allclose(outputs(base), expected, atol=1e-3)
    read.save_pretrained(tmp_path / "again")
    one, two = (
        safetensors.torch.load_file(tmp_path / who / "adapter_model.safetensors")
        for who in ("theirs", "again")
    )
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours"))
    torch.testing.assert_close(outputs(back), outputs(ours), **tolerance)

    before = {name: p.detach().clone() for name, p in read.get_base_model().named_parameters()}
    read.merge_adapter()
    torch.testing.assert_close(outputs(read), expected, **tolerance)
    read.unmerge_adapter()
    assert all(torch.equal(p, before[n]) for n, p in read.get_base_model().named_parameters())
    plain = read.merge_and_unload()
    assert [type(module) for module in plain.modules()] == [type(m) for m in base.modules()]
    torch.testing.assert_close(outputs(plain), expected, **tolerance)


def test_types_are_pefts() -> None:
    """Every family of the installed transformers for which PEFT turns names into parameters."""
    models = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    expected = {
        name: pefts._MOE_TARGET_MODULE_MAPPING[kind]
        for name, kind in pefts._MODEL_TO_CONVERSION_PATTERN.items()
        if kind in pefts._MOE_TARGET_MODULE_MAPPING and name in models
    }
    assert {n: kind for n, kind in STACKED_EXPERTS.items() if n in models} == expected


NOT_REACHED: dict[str, tuple[str, dict[str, Any], str]] = {
    "another family, all-linear": (
        "Qwen2Moe",
        {"target_modules": "all-linear"},
        r"'model\.layers\.0\.mlp\.experts\.gate_up_proj' and 4 more get no adapter",
    ),
    "another family, names": (
        "GptOss",
        {"target_modules": PROJECTIONS},
        r"as in \['experts\.gate_up_proj', 'experts\.down_proj'\]",
    ),
    "another family, expression": (
        "GraniteMoe",
        {"target_modules": r".*(q_proj|up_proj)"},
        r"'experts\.gate_up_proj', 'experts\.down_proj'",
    ),
    "linear layers alone": (
        "DeepseekV3",
        {"target_modules": r".*shared_experts\.(gate|up|down)_proj"},
        r"will not load",
    ),
    "a router that is not called": (
        "LongcatFlash",
        {"target_modules": "all-linear"},
        r"classifier' .* once it is merged",
    ),
    "names of another family": ("Mixtral", {"target_modules": PROJECTIONS}, r"does not reach"),
    "linear layers of these names": (
        "DeepseekV3",
        {"target_modules": PROJECTIONS},
        r"mlp\.gate_proj'.* get no adapter.*'shared_experts\.down_proj\.weight'",
    ),
    "some layers": (
        "Mixtral",
        {"target_modules": W, "layers_to_transform": [0]},
        r"in all layers: layers_to_transform do",
    ),
    "excluded": (
        "Mixtral",
        {"target_modules": "all-linear", "exclude_modules": ".*experts.*"},
        r"exclude_modules do not apply",
    ),
}


@pytest.mark.parametrize(
    ("family", "fields", "message"), NOT_REACHED.values(), ids=NOT_REACHED.keys()
)
def test_what_is_not_reached_is_said(family: str, fields: dict[str, Any], message: str) -> None:
    model = build(family)
    with pytest.warns(UserWarning, match=message):
        get_lora_model(model, LoraConfig(r=2, **fields))


def test_what_is_reached_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_lora_model(build("Olmoe"), LoraConfig(r=2, target_modules=PROJECTIONS))
        get_lora_model(build("GptOss"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def test_an_expression_means_the_layers_it_matches(tmp_path: Path) -> None:
    """PEFT takes the last parts of what it matches, and adapts these in all layers."""
    base = build("Olmoe")
    expression = r".*layers\.1\..*(q_proj|gate_proj|up_proj|down_proj)"
    model = get_lora_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=expression))
    assert model.targeted_module_names == ["model.layers.1.self_attn.q_proj"]
    experts = "model.layers.1.mlp.experts"
    assert model.targeted_parameter_names == [f"{experts}.gate_up_proj", f"{experts}.down_proj"]
    disturb(model)
    model.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert sorted(back.targeted_parameter_names) == sorted(model.targeted_parameter_names)
    torch.testing.assert_close(outputs(back), outputs(model), rtol=1e-4, atol=1e-5)


def test_ranks_and_scales_of_single_parameters() -> None:
    fields = {"r": 2, "lora_alpha": 3, "target_modules": PROJECTIONS, "use_rslora": True}
    model = get_lora_model(build("Olmoe"), LoraConfig(**fields))
    layer = model.get_base_model().model.layers[0].mlp.experts
    assert isinstance(layer, ParamLayer)
    assert layer.gate_up_proj_lora_A.shape == (4 * 4, 32) and layer.down_proj_lora_A.shape[0] == 8
    disturb(model)
    doubled, both = copy.deepcopy(model), copy.deepcopy(model)
    doubled.set_scale("default", 2.0)
    with torch.no_grad():
        for name, parameter in both.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2.0)
    assert torch.equal(outputs(doubled), outputs(both))


def test_settings_of_a_weight_that_is_not_there() -> None:
    layer = ParamLayer.from_module(nn.Bilinear(2, 3, 4), ["weight"], 2)
    with pytest.raises(
        ValueError, match=r"got settings of 'wieght', expected some of \['weight'\]"
    ):
        layer.add_adapter("other", weights={"wieght": (3, 1)})
    assert list(layer.adapters) == ["default"]
    layer.add_adapter("other", weights={"weight": (3, 1)})
    assert layer.weight_lora_A_other.shape == (4 * 3, 3)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "half": ({"target_modules": ["q_proj", "up_proj"]}, r"without 'gate_proj'"),
    "half, expression": ({"target_modules": r".*\.(q_proj|gate_proj)"}, r"without 'up_proj'"),
    "dropout": ({"target_modules": "all-linear", "lora_dropout": 0.1}, r"lora_dropout: got 0\.1"),
    "dora": ({"target_modules": PROJECTIONS, "use_dora": True}, r"mean stacked experts"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_is_refused_as_in_peft(fields: dict[str, Any], message: str) -> None:
    base = build("Olmoe")
    with pytest.raises(ValueError):
        peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, **fields))
    with pytest.raises(ValueError, match=message):
        get_lora_model(base, LoraConfig(r=2, **fields))
    assert not [name for name, _ in base.named_parameters() if "lora_" in name]
