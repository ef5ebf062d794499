"""diffusers' files, of all its names: read by their meaning, `W + lora_alpha / r B A`, and written
byte for byte, metadata and all."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from converted import (
    Tensors,
    close,
    containers,
    loaded,
    refuses,
    refuses_to_write,
    same,
    values,
    without,
    write,
)
from diffusion_models import BLOCK, TEXT, TOKENS, Pipeline, Update, X, update, updated
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

import lora_ext
from lora_ext.io.convert import convert, recognised

FILE, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
UNET = [f"{BLOCK}.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
CROSS = [f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn2.to_v"]
FEED = [f"{BLOCK}.ff.net.0.proj", f"{BLOCK}.ff.net.2"]
CONVOLUTIONS = ["conv_in", "down_blocks.0.attentions.0.proj_in"]
MLP = [f"{TEXT}.1.mlp.fc1", f"{TEXT}.1.mlp.fc2"]
CLIP = [f"{TEXT}.0.self_attn.{name}_proj" for name in ("q", "k", "v", "out")]


@pytest.fixture
def pipeline() -> Pipeline:
    torch.manual_seed(0)
    return Pipeline().eval()


def tensors_of(updates: dict[str, Update], component: str = "") -> Tensors:
    """In PEFT's names."""
    start, file = f"{component}." if component else "", Tensors()
    for name, one in updates.items():
        file[f"{start}{name}.lora_A.weight"] = one.A
        file[f"{start}{name}.lora_B.weight"] = one.B
        if one.magnitude is not None:
            file[f"{start}{name}.lora_magnitude_vector"] = one.magnitude
        if one.bias is not None:
            file[f"{start}{name}.lora_B.bias"] = one.bias
    return file


def metadata_of(config: dict[str, Any], component: str = "") -> dict[str, str]:
    start = f"{component}." if component else ""
    return {
        METADATA: json.dumps({start + k: v for k, v in config.items()}, indent=2, sort_keys=True)
    }


def said_in(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return dict(json.loads(file.metadata()[METADATA]))


# Of each: component, modules with rank and alpha, and what else.
CASES: dict[str, tuple[str, dict[str, tuple[int, float]], dict[str, Any]]] = {
    "unet, scaling 1": ("unet", dict.fromkeys(UNET, (2, 2)), {}),
    "unet, scaling 2": ("unet", dict.fromkeys(UNET, (2, 4)), {}),
    "unet, rank 1": ("unet", dict.fromkeys(UNET, (1, 0.5)), {}),
    "unet, ranks": ("unet", {UNET[0]: (2, 2), UNET[1]: (3, 2), UNET[2]: (4, 2)}, {}),
    "unet, alphas": ("unet", {UNET[0]: (2, 2), UNET[1]: (2, 7), UNET[2]: (2, 0.25)}, {}),
    "unet, ranks and alphas": ("unet", {UNET[0]: (2, 2), UNET[1]: (3, 1), UNET[3]: (4, 8)}, {}),
    "unet, cross attention": ("unet", dict.fromkeys(CROSS, (3, 2)), {}),
    "unet, feed forward": ("unet", dict.fromkeys(FEED, (2, 2)), {}),
    "unet, convolutions": ("unet", dict.fromkeys(CONVOLUTIONS, (2, 3)), {}),
    "unet, dora": ("unet", dict.fromkeys(UNET, (2, 3)), {"use_dora": True}),
    "unet, dora of a convolution": ("unet", {"conv_in": (2, 3)}, {"use_dora": True}),
    "unet, rslora": ("unet", dict.fromkeys(UNET, (4, 3)), {"use_rslora": True}),
    "unet, lora_bias": ("unet", {UNET[3]: (2, 3), "conv_in": (2, 3)}, {"lora_bias": True}),
    "transformer": ("transformer", dict.fromkeys(UNET, (2, 5)), {}),
    "transformer, dora": ("transformer", dict.fromkeys(UNET, (2, 5)), {"use_dora": True}),
    "no component": ("", dict.fromkeys(UNET, (2, 3)), {}),
    "no component, dora": ("", {UNET[0]: (2, 3)}, {"use_dora": True}),
    "no component, convolution": ("", {"conv_in": (3, 2)}, {}),
    "text encoder": ("text_encoder", dict.fromkeys(CLIP, (2, 3)), {}),
    "text encoder, mlp": ("text_encoder", dict.fromkeys(MLP, (2, 3)), {}),
    "text encoder, ranks": ("text_encoder", {CLIP[0]: (1, 3), CLIP[3]: (3, 2)}, {}),
}  # fmt: skip


def config_of(case: str) -> dict[str, Any]:
    """PEFT's fields, as training scripts of diffusers write them."""
    _, modules, more = CASES[case]
    r, alpha = next(iter(modules.values()))
    return {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": sorted(modules),
        "rank_pattern": {n: one[0] for n, one in modules.items() if one[0] != r},
        "alpha_pattern": {n: one[1] for n, one in modules.items() if one[1] != alpha},
        "lora_dropout": 0.0, "bias": "none", "init_lora_weights": True, **more,
    }  # fmt: skip


def updates_of(case: str, model: nn.Module, dtype: torch.dtype) -> dict[str, Update]:
    _, modules, more = CASES[case]
    found = {}
    for at, (name, (rank, alpha)) in enumerate(modules.items()):
        scaling = alpha / (rank**0.5 if more.get("use_rslora") else rank)
        one = update(model, name, 10 * at, rank, scaling, "use_dora" in more, dtype)
        if "lora_bias" in more:
            one = Update(one.A, one.B, scaling, None, values(at, one.B.shape[0], dtype=dtype))
        if one.magnitude is not None and one.A.dim() == 4:  # PEFT's shape of a convolution's
            one = Update(one.A, one.B, scaling, one.magnitude.reshape(1, -1, 1, 1))
        found[name] = one
    return found


def model_of(case: str, pipeline: Pipeline) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    if CASES[case][0] == "text_encoder":
        return pipeline.text_encoder, (TOKENS,)
    return pipeline.unet, (X, values(2, 2, 4, 6))


def in_double(inputs: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
    return (x.double() if x.is_floating_point() else x for x in inputs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_with_metadata(case: str, dtype: torch.dtype, pipeline: Pipeline, tmp_path: Path) -> None:
    """What diffusers writes now: the config comes back as well as the tensors."""
    (model, inputs), component = model_of(case, pipeline), CASES[case][0]
    updates = updates_of(case, model, dtype)
    file, config = tensors_of(updates, component), config_of(case)
    path = write(tmp_path / FILE, file, **metadata_of(config, component))
    chosen = {"component": component or None}
    convert(path, tmp_path / "peft", **chosen)
    convert(tmp_path / "peft", tmp_path / "again", target="diffusers", **chosen)
    same(load_file(tmp_path / "again" / FILE), file)
    start = f"{component}." if component else ""
    assert said_in(tmp_path / "again" / FILE) == {start + k: v for k, v in config.items()}
    exact = updated(model, updates)(*in_double(inputs))
    close(loaded(model, tmp_path / "peft")(*inputs), exact)


@pytest.mark.parametrize("case", [case for case in CASES if not CASES[case][2].get("use_rslora")])
def test_with_alphas(case: str, pipeline: Pipeline, tmp_path: Path) -> None:
    """Without metadata: `.alpha` of each module, or scaling 1."""
    (model, inputs), component = model_of(case, pipeline), CASES[case][0]
    updates = updates_of(case, model, torch.float32)
    file, start = tensors_of(updates, component), f"{component}." if component else ""
    with_alphas = dict(file)
    for name, (rank, alpha) in CASES[case][1].items():
        if alpha != rank:
            with_alphas[f"{start}{name}.alpha"] = torch.tensor(float(alpha))
    path = write(tmp_path / FILE, with_alphas)
    chosen = {"component": component or None}
    convert(path, tmp_path / "peft", **chosen)
    convert(tmp_path / "peft", tmp_path / "again", target="diffusers", **chosen)
    same(load_file(tmp_path / "again" / FILE), file)  # the alphas are in the metadata now
    exact = updated(model, updates)(*in_double(inputs))
    close(loaded(model, tmp_path / "peft")(*inputs), exact)


# What diffusers wrote before it used PEFT, in terms of PEFT's.
SPELLINGS = {
    "lora.down": {"lora_A.weight": "lora.down.weight", "lora_B.weight": "lora.up.weight"},
    "lora_linear_layer": {
        "lora_A.weight": "lora_linear_layer.down.weight",
        "lora_B.weight": "lora_linear_layer.up.weight",
    },
    "processor": {
        **{f"to_{n}.lora_A.weight": f"processor.to_{n}_lora.down.weight" for n in "qkv"},
        **{f"to_{n}.lora_B.weight": f"processor.to_{n}_lora.up.weight" for n in "qkv"},
        "to_out.0.lora_A.weight": "processor.to_out_lora.down.weight",
        "to_out.0.lora_B.weight": "processor.to_out_lora.up.weight",
        **{f"{n}_proj.lora_A.weight": f"to_{n}_lora.down.weight" for n in ("q", "k", "v", "out")},
        **{f"{n}_proj.lora_B.weight": f"to_{n}_lora.up.weight" for n in ("q", "k", "v", "out")},
    },
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_older_names(spelling: str, component: str, pipeline: Pipeline, tmp_path: Path) -> None:
    case = f"{'unet, scaling 1' if component == 'unet' else 'text encoder'}"
    model, inputs = model_of(case, pipeline)
    updates = {
        k: Update(one.A, one.B, 1.0) for k, one in updates_of(case, model, torch.float32).items()
    }
    file, old = tensors_of(updates, component), Tensors()
    for key, tensor in file.items():
        for new, name in SPELLINGS[spelling].items():
            if key.endswith(f".{new}"):
                key = key[: -len(new)] + name
                break
        old[key] = tensor
    assert not old.keys() & file.keys()
    path = write(tmp_path / "old.safetensors", old)
    assert recognised(path) == "diffusers"
    convert(path, tmp_path / "peft", component=component)
    convert(tmp_path / "peft", tmp_path / "new", target="diffusers", component=component)
    same(load_file(tmp_path / "new" / FILE), file)
    exact = updated(model, updates)(*in_double(inputs))
    close(loaded(model, tmp_path / "peft")(*inputs), exact)


@pytest.mark.parametrize("said", ["metadata", "alphas", "nothing"])
def test_a_whole_pipeline(said: str, pipeline: Pipeline, tmp_path: Path) -> None:
    """Without a component, all of it, below the components' names; each with its own config."""
    unet = {n: update(pipeline.unet, n, 7 * i, 2, 2.5) for i, n in enumerate(UNET)}
    text = {n: update(pipeline.text_encoder, n, 5 * i, 3, 4 / 3) for i, n in enumerate(CLIP)}
    if said == "nothing":
        unet, text = (
            {n: Update(one.A, one.B, 1.0) for n, one in many.items()} for many in (unet, text)
        )
    file, more = {**tensors_of(unet, "unet"), **tensors_of(text, "text_encoder")}, Tensors()
    metadata = {}
    if said == "metadata":
        configs = {
            "unet": {"r": 2, "lora_alpha": 5, "target_modules": UNET},
            "text_encoder": {"r": 3, "lora_alpha": 4, "target_modules": CLIP},
        }
        every = {f"{one}.{k}": v for one, config in configs.items() for k, v in config.items()}
        metadata = {METADATA: json.dumps(every)}
    elif said == "alphas":
        more = {f"unet.{n}.alpha": torch.tensor([5.0]) for n in unet}
        more |= {f"text_encoder.{n}.alpha": torch.tensor(4.0) for n in text}
    path = write(tmp_path / FILE, {**file, **more}, **metadata)
    convert(path, tmp_path / "peft")
    convert(tmp_path / "peft", tmp_path / "again.safetensors", target="diffusers")
    same(load_file(tmp_path / "again.safetensors"), file)
    config = said_in(tmp_path / "again.safetensors")
    assert config["unet.r"] == 2 and config["text_encoder.r"] == 3
    exact = updated(
        pipeline, {f"unet.{n}": one for n, one in unet.items()}
        | {f"text_encoder.{n}": one for n, one in text.items()},
    )(X.double(), TOKENS)  # fmt: skip
    close(loaded(pipeline, tmp_path / "peft")(X, TOKENS), exact)


def test_an_embedding(pipeline: Pipeline, tmp_path: Path) -> None:
    name, model = "text_model.embeddings.token_embedding", pipeline.text_encoder
    one = update(model, name, 3, 2, 1.5)
    file = {
        f"text_encoder.{name}.lora_embedding_A": one.A,
        f"text_encoder.{name}.lora_embedding_B": one.B,
    }
    more = {f"text_encoder.{name}.alpha": torch.tensor(3.0)}
    path = write(tmp_path / FILE, {**file, **more})
    convert(path, tmp_path / "peft", source="diffusers", component="text_encoder")
    convert(tmp_path / "peft", tmp_path / "b", target="diffusers", component="text_encoder")
    same(load_file(tmp_path / "b" / FILE), file)
    exact = updated(model, {name: one})(TOKENS)
    close(loaded(model, tmp_path / "peft")(TOKENS), exact)


def test_all_of_pefts_config_is_kept(tmp_path: Path) -> None:
    """DoRA, patterns, what says nothing of tensors; and comes back."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4), nn.Linear(4, 4))
    config = lora_ext.LoraConfig(
        r=2, target_modules=["0", "1"], use_dora=True, rank_pattern={"1": 3}, lora_dropout=0.1
    )
    lora_ext.get_lora_model(model, config).save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", target="diffusers")
    assert (
        convert(tmp_path / "b", tmp_path / "c").config
        == convert(tmp_path / "a", tmp_path / "d").config
    )
    config_file = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert said_in(tmp_path / "b" / FILE) == config_file


# ---- diffusers itself ----------------------------------------------------------------------------


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_loads_what_is_written(dora: bool, tmp_path: Path) -> None:
    diffusers = pytest.importorskip(
        "diffusers", reason="diffusers is not installed; it is not needed but for this comparison"
    )
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=6,
        attention_head_dim=4,
    ).eval()  # fmt: skip
    theirs = copy.deepcopy(unet)
    names = ["to_q", "to_k", "to_v", "to_out.0", "conv_in"]
    config = lora_ext.LoraConfig(r=2, lora_alpha=5, target_modules=names, use_dora=dora,
                                 rank_pattern={"to_q": 3}, alpha_pattern={"to_k": 2})  # fmt: skip
    ours = lora_ext.get_lora_model(unet, config)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    ours.eval().save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", target="diffusers", component="unet")
    theirs.load_lora_adapter(str(tmp_path / "b"), prefix="unet", use_safetensors=True)
    x, y = values(1, 1, 4, 8, 8), values(2, 1, 3, 6)
    with torch.no_grad():
        found, expected = theirs(x, 5, y).sample, ours(x, 5, y).sample
        assert float((found - expected).abs().max()) < 1e-5
        theirs.save_lora_adapter(tmp_path / "c", adapter_name="default_0")
        convert(tmp_path / "c", tmp_path / "d", source="diffusers")  # what it writes is read
    same(load_file(tmp_path / "d" / "adapter_model.safetensors"),
         load_file(tmp_path / "a" / "adapter_model.safetensors"))  # fmt: skip


# ---- what is refused -----------------------------------------------------------------------------

A, B = "unet.a.lora_A.weight", "unet.a.lora_B.weight"
C, D = "unet.c.lora_A.weight", "unet.c.lora_B.weight"
GOOD: Tensors = {A: values(1, 4, 6), B: values(2, 7, 4), C: values(3, 4, 3, 3, 3),
                 D: values(4, 6, 4, 1, 1)}  # fmt: skip
BESIDE = ("three dimensions", "a row less")  # found where the other is compared with it
CONTAINERS = {
    key: (content, B if key in BESIDE else names)
    for key, (content, names) in containers(GOOD, A).items()
} | {f"convolution, {k}": one for k, one in containers(GOOD, D).items()
     if one[1] == D and k != "a row less"}  # fmt: skip
GOOD_CONFIG = {"unet.r": 4, "unet.lora_alpha": 4}
MALFORMED: dict[str, tuple[Tensors, str, str | None]] = {
    "no lora_B": (without(GOOD, B), A, None),
    "no lora_A": (without(GOOD, A), B, None),
    "another rank": ({**GOOD, B: values(2, 7, 3)}, B, None),
    "a kernel that is not 1 x 1": ({**GOOD, D: values(2, 6, 4, 3, 3)}, D, None),
    "a matrix and a kernel": ({**GOOD, D: values(2, 6, 4)}, D, None),
    "two spellings": ({**GOOD, "unet.a.lora.down.weight": values(1, 4, 6)}, "unet.a.lora", None),
    "bias of other rows": ({**GOOD, "unet.a.lora_B.bias": values(1, 6)}, "lora_B.bias", None),
    "magnitudes of other rows": (
        {**GOOD, "unet.a.lora_magnitude_vector": values(1, 6)}, "lora_magnitude_vector", None,
    ),
    "alpha of zero": ({**GOOD, "unet.a.alpha": torch.tensor(0.0)}, "unet.a.alpha", None),
    "alpha below zero": ({**GOOD, "unet.a.alpha": torch.tensor(-1.0)}, "unet.a.alpha", None),
    "alpha of two": ({**GOOD, "unet.a.alpha": torch.ones(2)}, "unet.a.alpha", None),
    "alpha without a pair": ({**GOOD, "unet.z.alpha": torch.tensor(1.0)}, "unet.z.alpha", None),
    "a whole weight": ({**GOOD, "unet.a.weight": values(1, 7, 6)}, "unet.a.weight", None),
    "a part alone": ({**GOOD, "lora_A.weight": values(1, 4, 6)}, "'lora_A.weight'", None),
    "no such component": (GOOD, "'vae'", None),
    "metadata is no JSON": (GOOD, METADATA, "{"),
    "metadata is a list": (GOOD, METADATA, "[]"),
    "metadata is a number": (GOOD, METADATA, "1"),
    "metadata is brackets": (GOOD, "brackets", "[" * 100_000),
    "metadata is deep": (GOOD, METADATA, '{"unet.r": ' + "[ " * 40 + "]" * 40 + " " * 2000 + "}"),
    "metadata twice": (GOOD, METADATA, '{"unet.r": 1, "unet.r": 2}'),
    "metadata with NaN": (GOOD, METADATA, '{"unet.r": 4, "unet.lora_alpha": NaN}'),
    "metadata of another component": (GOOD, METADATA, '{"text_encoder.r": 4}'),
    "metadata without a component": (GOOD, METADATA, '{"r": 4, "lora_alpha": 4}'),
    "metadata of another method": (
        GOOD, METADATA, json.dumps({**GOOD_CONFIG, "unet.peft_type": "LOHA"}),
    ),
    "metadata: alpha a text": (GOOD, "lora_alpha", '{"unet.r": 4, "unet.lora_alpha": "8"}'),
    "metadata: alpha infinite": (GOOD, "lora_alpha", '{"unet.r": 4, "unet.lora_alpha": 1e999}'),
    "metadata: pattern a list": (
        GOOD, "alpha_pattern", json.dumps({**GOOD_CONFIG, "unet.alpha_pattern": [1]}),
    ),
    "metadata: pattern of texts": (
        GOOD, "alpha_pattern", json.dumps({**GOOD_CONFIG, "unet.alpha_pattern": {"a": "b"}}),
    ),
    "metadata: no expression": (
        GOOD, "alpha_pattern", json.dumps({**GOOD_CONFIG, "unet.alpha_pattern": {"(": 1}}),
    ),
    "metadata: an expression with counts": (
        GOOD, "alpha_pattern",
        json.dumps({**GOOD_CONFIG, "unet.alpha_pattern": {"(a{999}){999}": 1}}),
    ),
    "metadata and alpha": (
        {**GOOD, "unet.a.alpha": torch.tensor(1.0)}, "unet.a.alpha", json.dumps(GOOD_CONFIG),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTAINERS)
def test_no_whole_file(case: str, tmp_path: Path) -> None:
    content, names = CONTAINERS[case]
    refuses(tmp_path, "diffusers", content, names)


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str, tmp_path: Path) -> None:
    tensors, names, said = MALFORMED[case]
    metadata = None if said is None else {METADATA: said}
    component = {"component": "vae"} if case == "no such component" else {}
    refuses(tmp_path, "diffusers", save(tensors, metadata=metadata), names, **component)


def test_fields_that_pairs_have_not(tmp_path: Path) -> None:
    """Of a whole pipeline: each component's config would be lost in one."""
    said = json.dumps({**GOOD_CONFIG, "unet.layer_replication": [[0, 2]]})
    refuses(tmp_path, "diffusers", save(GOOD, metadata={METADATA: said}), "layer_replication")


def test_pickles_are_refused_with_the_cure(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    torch.save(GOOD, tmp_path / "old" / "pytorch_lora_weights.bin")
    for path in (tmp_path / "old", tmp_path / "old" / "pytorch_lora_weights.bin"):
        refuses_to_write(lambda path=path: convert(path, tmp_path / "out"), ".bin", "weights_only")


def test_a_slow_expression_is_stopped(tmp_path: Path) -> None:
    name = f"unet.{'a' * 60}"
    file = {f"{name}.lora_A.weight": values(1, 4, 6), f"{name}.lora_B.weight": values(2, 7, 4)}
    said = json.dumps({**GOOD_CONFIG, "unet.alpha_pattern": {"(?:(?:a|a)+)+[^a]": 1}})
    refuses(tmp_path, "diffusers", save(file, {METADATA: said}), "alpha_pattern")
