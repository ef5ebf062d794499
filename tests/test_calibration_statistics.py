"""What a calibration pass collects, against formulas and PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_models import loss, pefts, points
from torch import Tensor, nn

import lora_ext
from lora_ext import CordaConfig, EvaConfig, LoraConfig, LoraGAConfig
from lora_ext.calibration.statistics import Covariance, MeanGradient, PrincipalComponents

ROOT = Path(lora_ext.__file__).parent.parent
FIELDS = {"r": 2, "target_modules": ["first", "second"]}
CONFIGS = {
    "eva": LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(tau=0.9999), **FIELDS),
    "corda": LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(), **FIELDS),
    "lora_ga": LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **FIELDS),
}
METHODS = list(CONFIGS)
LEFT = {"corda": "eigens", "lora_ga": "_peft_loraga_grad"}
each_method = pytest.mark.parametrize("method", METHODS)


def calibrate(method: str, model: nn.Module, data: Any, **options: Any) -> dict[str, list[Tensor]]:
    """What a method makes of data, as tensors."""
    options = {"show_progress_bar": False, "checkpoint_every": 1} | options
    config = CONFIGS[method]
    if method == "eva":
        functions = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
        found = lora_ext.get_eva_state_dict(model, data, config, **functions, **options)
        return {name: [tensor] for name, tensor in found.items()}
    if method == "corda":
        lora_ext.preprocess_corda(model, config, dataloader=data, **options)
    else:
        lora_ext.preprocess_loraga(model, config, dataloader=data, forward_fn=loss, **options)
    found = {n: vars(m)[LEFT[method]] for n, m in model.named_modules() if LEFT[method] in vars(m)}
    if method == "corda":
        return {name: [one.U_WC, one.S_WC, one.V_WC] for name, one in found.items()}
    return {name: [one] for name, one in found.items()}


class Killed(Exception):
    pass


class Loader:
    """A loader that ends badly at one of its batches, counted over all passes."""

    def __init__(self, data: list[Tensor], at: int | None = None) -> None:
        self.data, self.at, self.given = data, at, 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.data:
            if self.given == self.at:
                raise Killed
            self.given += 1
            yield batch


@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_principal_components_are_those_of_all_rows(seed: int, count: int) -> None:
    data = points(seed, batches=8, rows=50)
    one = PrincipalComponents(count, 0.99)
    for batch in data:
        assert one.update(batch)
    rows = torch.cat(data).double()
    _, S, Vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    # Each step forgets what is beyond `count` components, of which each next one has half of the
    # variance (0.7 squared): what they explain is a few percent less, and they are turned a little.
    alike = torch.linalg.svdvals(one.components.double() @ Vh[:count].t())
    assert float(alike.min()) > 0.99
    total = float((S**2).sum())
    assert abs(one.scatter - total) < 1e-5 * total
    share = S[:count] ** 2 / total
    torch.testing.assert_close(one.explained(), share, rtol=0.1, atol=0)
    assert bool((one.components.gather(1, one.components.abs().argmax(1)[:, None]) > 0).all())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_principal_components_as_pefts(seed: int) -> None:
    theirs = pefts("utils.incremental_pca").IncrementalPCA(
        n_components=4, copy=True, lowrank=True, lowrank_seed=42
    )
    one = PrincipalComponents(4, 0.9)
    for batch in points(seed, batches=10, rows=30):
        theirs.partial_fit(batch)
        one.update(batch)
        torch.testing.assert_close(
            one.components.double(), theirs.components_.double(), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            one.explained(), theirs.explained_variance_ratio_.double(), rtol=1e-5, atol=1e-7
        )


def test_exact_where_all_components_are_kept() -> None:
    data = [torch.randn(20, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    one = PrincipalComponents(5, 0.99)
    for batch in data:
        one.update(batch)
    rows = torch.cat(data).double()
    S = torch.linalg.svdvals(rows - rows.mean(0))
    # float32 rows of the first batch: its rounding, times a few.
    torch.testing.assert_close(one.singular_values.double(), S, rtol=1e-5, atol=1e-5)
    assert not one.update(torch.randn(4, 5)) and one.seen == 80  # too few rows are left out


@pytest.mark.parametrize("shape", [(7, 5), (3, 7, 5), (2, 3, 7, 5)], ids=str)
def test_covariance_is_the_formula(shape: tuple[int, ...]) -> None:
    one, samples = Covariance(), []
    for seed in range(4):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        assert one.update(x)
        samples += list(x.double().reshape(-1, *shape[-2:]))
    expected = sum((s / s.max()).t() @ (s / s.max()) for s in samples) / len(samples)
    assert one.seen == len(samples)
    torch.testing.assert_close(one.mean.double(), expected, rtol=1e-4, atol=1e-5)
    assert not one.update(torch.zeros(shape))


def test_mean_gradient_is_added_in_float32() -> None:
    one, given = MeanGradient(), []
    for seed in range(300):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).bfloat16()
        one.update(x)
        given.append(x.double())
    # bfloat16 would have stopped at a relative 2^-8 of the sum.
    torch.testing.assert_close(one.mean().double(), sum(given) / 300, rtol=1e-4, atol=1e-6)


def test_states_go_around() -> None:
    made: list[tuple[Callable[[], Any], Tensor]] = [
        (lambda: PrincipalComponents(2, 0.9), torch.randn(9, 5)),
        (Covariance, torch.randn(9, 5)),
        (MeanGradient, torch.randn(9, 5)),
    ]
    for make, x in made:
        one, other = make(), make()
        one.update(x)
        other.load(one.state())
        one.update(x + 1)
        other.update(x + 1)
        assert one.seen == other.seen
        assert all(torch.equal(t, other.state()[name]) for name, t in one.state().items())
