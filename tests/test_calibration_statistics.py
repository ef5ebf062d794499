"""What a calibration pass collects, against formulas and PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibration_models import pefts, points
from torch import Tensor

from lora_ext.calibration.statistics import Covariance, MeanGradient, PrincipalComponents


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
