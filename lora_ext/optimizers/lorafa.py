"""LoRA-FA (arXiv:2308.03303): lora_A stays as it is, and the gradient of lora_B is what makes the
update's step nearest to that of full training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lora_ext.adapters.inject import adapted
from lora_ext.arguments import as_number, as_rate, warn
from lora_ext.nn import LoraLayer, ParamLayer

_DAMP = 1e-8  # on the diagonal of A Aᵀ, as in PEFT


class LoraFAOptimizer(Optimizer):
    """AdamW (that of transformers) whose gradients of lora_B are multiplied by (A Aᵀ)⁻¹ / s².

    Args:
        params: groups that say `names` and `scaling_factors` beside `params`, one for each
            parameter, as `create_lorafa_optimizer` makes them: a lora_B finds its lora_A by name.
        lr, betas, eps, weight_decay, correct_bias: as of AdamW; weight decay is decoupled.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
    ) -> None:
        where = "LoraFAOptimizer"
        lr, weight_decay = as_rate(lr, where, "lr"), as_rate(weight_decay, where, "weight_decay")
        eps = as_rate(eps, where, "eps")
        if not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"LoraFAOptimizer: betas: got {betas}, expected from 0 to below 1")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"correct_bias": correct_bias})
        self._warned = False

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; `closure`, if given, computes the loss again, and gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = dict(zip(group["names"], group["params"], strict=True))
            scales = dict(zip(group["names"], self._scales(group), strict=True))
            for name, parameter in parameters.items():
                path, dot, last = name.rpartition(".")
                if parameter.grad is None or "lora_A" in last:
                    continue
                gradient, lora_A = parameter.grad, None
                if "lora_B" in last:
                    lora_A = parameters.get(path + dot + last.replace("lora_B", "lora_A"))
                if lora_A is not None:
                    gradient = _projected(gradient, lora_A, scales[name])
                self._update(parameter, gradient, group)
        return loss

    def _scales(self, group: dict[str, Any]) -> list[float | None]:
        if "scaling_factors" in group:
            found: list[float | None] = group["scaling_factors"]
            return found
        if "scaling_factor" not in group:
            raise KeyError("LoraFAOptimizer: a group has no `scaling_factors`, expected some")
        if not self._warned:
            self._warned = True
            warn(
                "LoraFAOptimizer: `scaling_factor` is deprecated, expected `scaling_factors`, one "
                "for each parameter",
                FutureWarning,
            )
        return [group["scaling_factor"]] * len(group["params"])

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(parameter) for _ in range(2))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        mean = state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"]
        if group["correct_bias"]:
            step = state["step"]
            size *= math.sqrt(1 - beta2**step) / (1 - beta1**step)
        parameter.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0.0:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


def create_lorafa_optimizer(
    model: nn.Module,
    r: int,
    lora_alpha: float,
    lr: float,
    weight_decay: float = 0.0,
    use_rslora: bool | None = None,
) -> LoraFAOptimizer:
    """Freezes every lora_A of a model, and returns the optimizer of the rest. Backward then makes
    no gradient of lora_A, and keeps h = x Aᵀ [tokens, r] instead of x [tokens, K].

    Args:
        r, lora_alpha: kept for PEFT's sake: each layer's own scaling counts.
        use_rslora: deprecated; has to be what the configs of the active adapters say.

    Raises:
        TypeError: the model has no adapters, or a number is none.
        ValueError: a rate or decay is below 0, NaN or infinite, or r not above 0; use_rslora is
            another than theirs; or a layer has a scaling of 0, or an adapter in groups, for which
            there is no such step. Nothing is frozen then.
    """
    where = "create_lorafa_optimizer"
    found, _ = adapted(model, where)
    lr, weight_decay = as_rate(lr, where, "lr"), as_rate(weight_decay, where, "weight_decay")
    r = as_rate(r, where, "r", above_0=True)  # type: ignore[assignment]
    lora_alpha = as_number(lora_alpha, where, "lora_alpha")
    active = [name for name in found.active_adapters if name in found.peft_config]
    rs = {name: found.peft_config[name].use_rslora for name in active}
    if use_rslora is not None:
        if others := [name for name, one in rs.items() if one != use_rslora]:
            raise ValueError(
                f"{where}: `use_rslora={use_rslora}` was passed to create_lorafa_optimizer, but "
                f"the configs of {others} say otherwise; leave it out"
            )
        warn(f"{where}: use_rslora: is deprecated: the config says it", FutureWarning)
    scales: dict[int, float] = {}
    frozen: list[nn.Parameter] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name in layer.adapters:
            if name in layer._tied:  # the embedding's
                continue
            parts = layer.parts(name)
            scale = layer.get_scale(name)
            for part, parameter in parts.items():
                scales[id(parameter)] = scale
                if part.endswith("lora_A"):
                    frozen.append(parameter)
                    lora_B = parts[part.removesuffix("lora_A") + "lora_B"]
                    stacked = isinstance(layer, ParamLayer) or layer.adapters[name].has_blocks
                    _check(f"{where}: '{path}'", parameter, lora_B, scale, stacked)
    for parameter in frozen:
        parameter.requires_grad_(False)
    named = list(model.named_parameters())
    uses_rslora = bool(rs) and all(rs.values())
    group = {
        "params": [parameter for _, parameter in named],
        "names": [name for name, _ in named],
        "scaling_factors": [scales.get(id(parameter)) for _, parameter in named],
        "scaling_factor": lora_alpha / (math.sqrt(r) if uses_rslora else r),
        **{"lr": lr, "betas": (0.9, 0.999), "weight_decay": weight_decay},
    }
    return LoraFAOptimizer([group])


def _check(where: str, lora_A: Tensor, lora_B: Tensor, scale: float, stacked: bool) -> None:
    if scale == 0:
        raise ValueError(f"{where}: has the scaling 0, by which the step is divided, expected more")
    if stacked or len(lora_A) != lora_B[0].numel():
        raise ValueError(
            f"{where}: got lora_A and lora_B of shapes {tuple(lora_A.shape)} and "
            f"{tuple(lora_B.shape)}, expected one product of two matrices: LoRA-FA has no step for "
            "stacks, blocks, slices and groups"
        )


def _projected(gradient: Tensor, lora_A: Tensor, scale: float | None) -> Tensor:
    compute = torch.promote_types(lora_A.dtype, torch.float32)
    A = lora_A.detach().flatten(1).to(compute)
    damped = A @ A.t() + _DAMP * torch.eye(len(A), dtype=compute, device=A.device)
    inverse = torch.linalg.pinv(damped)
    result: Tensor = gradient.flatten(1).to(compute) @ inverse / (scale or 1.0) ** 2
    return result.to(gradient.dtype).view_as(gradient)
