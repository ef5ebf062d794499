"""What a calibration pass collects of a layer: principal components of its inputs (EVA), their
covariance (CorDA), or the mean gradient of its weight (LoRA-GA)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_SEED = 42  # of the randomised SVD; any would do, but the same one gives the same components
_ITERATIONS = 4


def check_finite(where: str, name: str, x: Tensor) -> None:
    """ValueError for data, or a model, that is not finite."""
    if not bool(torch.isfinite(x).all()):
        raise ValueError(
            f"{where}: the input of '{name}' holds NaN or Inf, expected finite values: Invalid "
            "value found in input, please check your input data (and the model, and its dtype)"
        )


class PrincipalComponents:
    """The leading right singular vectors of all rows so far, less their mean: incremental PCA.

    A batch of rows is stacked below the components times their singular values, and decomposed
    again, so that nothing but these is kept of what was before (Ross et al., 2008). As in PEFT by
    `torch.svd_lowrank` with twice as many vectors, and a batch of fewer rows than components is
    left out.

    Attributes:
        components: [count, K], orthonormal rows; their signs make the largest element positive.
        singular_values: [count].
        converged: [count], whether the last batch left each as it was, to a cosine of tau.
    """

    def __init__(self, count: int, tau: float) -> None:
        self.count, self.tau, self.seen = count, tau, 0
        self.components = self.singular_values = self.mean = torch.empty(0)
        self.scatter = 0.0  # the sum of squared distances from the mean, of all rows
        self.converged = torch.zeros(count, dtype=torch.bool)

    def update(self, x: Tensor) -> bool:
        """Adds rows [m, K]; False where they are too few."""
        m, seen = len(x), self.seen
        if m < self.count:
            return False
        if seen:
            self._move(x.device)  # what a checkpoint gave
        mean = x.sum(0, dtype=torch.float64) / m
        rows = x.float() - mean.float()
        self.scatter += float(rows.square().sum(dtype=torch.float64))
        if seen:
            apart = self.mean - mean
            weight = seen * m / (seen + m)
            self.scatter += float(weight * apart.square().sum())
            known = self.singular_values[:, None] * self.components
            # In float64, as in PEFT: what was before is rounded again with each batch.
            rows = torch.cat([known.double(), rows.double(), (weight**0.5 * apart)[None]])
            self.mean = (seen * self.mean + m * mean) / (seen + m)
        else:
            self.mean = mean
        former, self.seen = self.components, seen + m
        self.singular_values, self.components = _leading(rows, self.count)
        if seen:
            alike = torch.nn.functional.cosine_similarity(self.components, former)
            self.converged = alike >= self.tau
        return True

    def explained(self) -> Tensor:
        """The share of the rows' variance that each component explains."""
        return self.singular_values.double().square() / max(self.scatter, 1e-300)

    def state(self) -> dict[str, Tensor]:
        numbers = torch.tensor([self.seen, self.scatter], dtype=torch.float64)
        return {
            **{"components": self.components, "singular_values": self.singular_values},
            **{"mean": self.mean, "converged": self.converged, "numbers": numbers},
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.components, self.singular_values = state["components"], state["singular_values"]
        self.mean, self.converged = state["mean"], state["converged"]
        self.seen, self.scatter = int(state["numbers"][0]), float(state["numbers"][1])

    def _move(self, device: torch.device) -> None:
        self.components, self.singular_values = (
            tensor.to(device) for tensor in (self.components, self.singular_values)
        )
        self.mean, self.converged = self.mean.to(device), self.converged.to(device)


def _leading(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first singular values and right singular vectors [count, K]."""
    if 2 * count < min(rows.shape):
        with torch.random.fork_rng([rows.device] if rows.is_cuda else []):
            torch.manual_seed(_SEED)
            _, S, V = torch.svd_lowrank(rows, q=2 * count, niter=_ITERATIONS)
            Vh = V.t()
    else:
        _, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    Vh = Vh[:count]
    largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
    return S[:count], Vh * torch.where(largest < 0, -1.0, 1.0)


class Covariance:
    """The mean of Xᵀ X / max(X)² over samples X [tokens, K], as CorDA takes it: not centred, each
    sample divided by its largest element."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype, self.seen = dtype, 0
        self.mean = torch.empty(0)

    def update(self, x: Tensor) -> bool:
        """Adds samples [..., tokens, K]; False where one has nothing to divide by."""
        x = x.detach().float()
        x = x.reshape(-1, *x.shape[-2:]) if x.dim() > 1 else x.reshape(1, 1, -1)
        largest = x.amax((1, 2), keepdim=True).abs()
        if not bool((largest > 0).all()):
            return False
        x = (x / largest).flatten(0, 1)
        added = x.t() @ x
        if self.seen == 0:
            self.mean = torch.zeros_like(added, dtype=self.dtype)
        n = len(largest)
        # A mean and not a sum, which float16 could not hold.
        mean = self.mean.to(added.device, torch.float32)
        self.mean = (mean + (added - n * mean) / (self.seen + n)).to(self.dtype)
        self.seen += n
        return True

    def state(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "seen": torch.tensor(self.seen)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.mean, self.seen = state["mean"], int(state["seen"])


class MeanGradient:
    """The mean of a weight's gradients over backward passes, in float32."""

    def __init__(self) -> None:
        self.seen = 0
        self.total = torch.empty(0)

    def update(self, gradient: Tensor) -> None:
        """Adds that of one backward pass."""
        wide = torch.promote_types(gradient.dtype, torch.float32)
        if self.seen == 0:
            self.total = gradient.detach().to(wide, copy=True)
        else:
            self.total = self.total.to(gradient.device).add_(gradient.detach())
        self.seen += 1

    def mean(self) -> Tensor:
        """In the shape of the weight."""
        return self.total / self.seen

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total, "seen": torch.tensor(self.seen)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.total, self.seen = state["total"], int(state["seen"])
