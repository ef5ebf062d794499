"""CorDA: factors and files as PEFT's, what they leave of a model, and what cannot be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from calibration_models import (
    TARGETS,
    Net,
    gpt2,
    llama,
    pefts,
    points,
    running,
    texts,
    twice,
)
from torch import Tensor, nn

import lora_ext
from lora_ext import CordaConfig, LoraConfig, preprocess_corda

theirs = pefts("tuners.lora.corda")
PeftCordaConfig: Any = pefts("tuners.lora.config").CordaConfig
LLAMA = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS}
NET = {"r": 3, "lora_alpha": 6, "target_modules": ["first", "second"]}


def own_config(fields: dict[str, Any], **corda: Any) -> LoraConfig:
    return LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(**corda), **fields)


def configs(fields: dict[str, Any], **corda: Any) -> tuple[peft.LoraConfig, LoraConfig]:
    config = PeftCordaConfig(**corda)
    return (
        peft.LoraConfig(init_lora_weights="corda", corda_config=config, **fields),
        own_config(fields, **corda),
    )


def products(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """U of each layer, and U S V^T."""
    return {
        name: (e.U_WC, e.U_WC * e.S_WC @ e.V_WC.t())
        for name, module in model.named_modules()
        if (e := vars(module).get("eigens")) is not None
    }


def check_alike(one: nn.Module, other: nn.Module) -> None:
    a, b = products(one), products(other)
    assert a.keys() == b.keys() and a
    for name, (U, product) in a.items():
        alike = torch.linalg.svdvals(U.double().t() @ b[name][0].double())
        assert float(alike.min()) >= 0.999, name
        # The inverse of a covariance multiplies float32's rounding by its condition.
        assert float((product - b[name][1]).norm() / product.norm()) < 1e-3, name


@pytest.mark.parametrize("method", ["ipm", "kpm"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_language_model_as_peft(seed: int, method: str) -> None:
    base, data = llama(seed), texts(seed, batches=10, rows=1)
    one, other = twice(base)
    a, b = configs(LLAMA, corda_method=method)
    theirs.preprocess_corda(one, a, running(one, data))
    preprocess_corda(other, b, running(other, data))
    check_alike(one, other)
    for_peft, own = peft.get_peft_model(one, a), lora_ext.get_peft_model(other, b)
    expected = base(**data[0]).logits
    torch.testing.assert_close(own(**data[0]).logits, expected, rtol=1e-4, atol=1e-5)
    assert not products(own)  # used up
    assert not torch.equal(
        other.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight
    )
    want = peft.get_peft_model_state_dict(for_peft)
    for key, tensor in lora_ext.get_peft_model_state_dict(own).items():
        assert tensor.shape == want[key].shape and tensor.count_nonzero()


def test_one_implementation_reads_what_the_other_left() -> None:
    """Attributes and their names are PEFT's."""
    base, data = Net(), points()
    one, other = twice(base)
    a, b = configs(NET)
    theirs.preprocess_corda(one, a, running(one, data))
    preprocess_corda(other, b, running(other, data))
    from_theirs, from_ours = lora_ext.get_peft_model(one, b), peft.get_peft_model(other, a)
    torch.testing.assert_close(from_theirs(data[0]), base(data[0]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(from_ours(data[0]), base(data[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", ["cache_file", "covariance_file"])
def test_files_go_both_ways(file: str, tmp_path: Path) -> None:
    base, data = Net(), points()
    places = {name: {file: str(tmp_path / name / "kept.pt")} for name in ("ours", "theirs")}
    a, b = configs(NET, **places["theirs"])
    one, other = twice(base)
    theirs.preprocess_corda(one, a, running(one, data))
    preprocess_corda(other, b)  # no data: PEFT's file
    check_alike(one, other)
    a, b = configs(NET, **places["ours"])
    third, fourth = twice(base)
    preprocess_corda(third, b, running(third, data))
    theirs.preprocess_corda(fourth, a)
    check_alike(third, fourth)
    check_alike(one, third)


def test_safetensors_and_bare_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = Net()
    one, other = twice(base)
    config = own_config(NET, cache_file="kept.safetensors", covariance_file="matrices.pt")
    preprocess_corda(one, config, running(one, points()))
    assert {p.name for p in tmp_path.iterdir()} == {"kept.safetensors", "matrices.pt"}
    preprocess_corda(other, config)
    for name, (_, product) in products(one).items():
        assert torch.equal(product, products(other)[name][1])


def test_ranks_of_layers_and_another_hooked_model() -> None:
    fields = NET | {"rank_pattern": {"second": 5}}
    one, other = twice(Net())
    a, b = configs(fields)
    theirs.preprocess_corda(one, a, running(one, points()))
    hooked = copy.deepcopy(other)
    preprocess_corda(other, b, running(hooked, points()), hooked)
    check_alike(one, other)
    assert not products(hooked)
    assert (
        len(lora_ext.get_peft_model(other, b).get_submodule("base_model.model.second").lora_A) == 5
    )


def test_conv1d_as_peft() -> None:
    fields = {"r": 3, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    base, data = gpt2(), texts(rows=1, batches=8)
    one, other = twice(base)
    a, b = configs(fields)
    theirs.preprocess_corda(one, a, running(one, data))
    preprocess_corda(other, b, running(other, data))
    check_alike(one, other)
    own = lora_ext.get_peft_model(other, b)
    torch.testing.assert_close(own(**data[0]).logits, base(**data[0]).logits, rtol=1e-4, atol=1e-5)


def test_samples_of_a_batch_count_as_calls() -> None:
    samples = torch.stack(points(batches=8, rows=12))
    net = Net()
    one, other = twice(net)
    config = own_config(NET)
    preprocess_corda(one, config, dataloader=list(samples), show_progress_bar=False)
    preprocess_corda(other, config, dataloader=list(samples.split(4)), show_progress_bar=False)
    check_alike(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_start_as_the_base(dtype: torch.dtype) -> None:
    base, data = llama().to(dtype), texts(rows=1, batches=8)
    before = base(**data[0]).logits.detach()
    config = own_config(LLAMA)
    preprocess_corda(base, config, running(base, data))
    own = lora_ext.get_peft_model(base, config)
    # Each weight was rounded once more, by half a unit in the last place.
    unit = torch.finfo(dtype).eps
    largest = float(before.abs().max())
    assert (
        float((own(**data[0]).logits.detach() - before).abs().max())
        <= 8 * max(unit, 1e-7) * largest
    )
    wide = torch.float32 if dtype is torch.bfloat16 else dtype
    assert {p.dtype for p in own.parameters() if p.requires_grad} == {wide}


def test_float16_covariances(tmp_path: Path) -> None:
    place = tmp_path / "c.pt"
    config = own_config(NET, use_float16_for_covariance=True, covariance_file=str(place))
    one, other = twice(Net())
    preprocess_corda(one, config, running(one, points()))
    kept = torch.load(place, weights_only=True)
    assert {t.dtype for t in kept.values()} == {torch.float16}
    preprocess_corda(other, own_config(NET), running(other, points()))
    for name, (U, _) in products(other).items():
        assert float(torch.linalg.svdvals(U.t() @ products(one)[name][0]).min()) > 0.98
