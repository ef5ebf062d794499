"""LoRA-GA's preprocessing (arXiv:2407.05000): gradients of the weights that get adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.adapters.config import LoraConfig
from lora_ext.arguments import refuse
from lora_ext.calibration.checkpoint import is_there, load_cache, of_cache, save_cache
from lora_ext.calibration.layers import check_not_quantized, leave, linear_targets
from lora_ext.calibration.running import (
    EVERY,
    Pass,
    as_before,
    check_function,
    check_reached,
    device_of,
    forward_fn_dict,
    to_device,
)
from lora_ext.calibration.statistics import MeanGradient
from lora_ext.nn.calibrated import LEFT_AT

_WHERE = "preprocess_loraga"
_KEY = LEFT_AT["lora_ga"]


def loss_of(model: nn.Module, inputs: Any) -> Tensor:
    """How a batch becomes a loss unless you say otherwise: the model's output, or what it calls
    `loss`, as models of transformers do."""
    return _loss(forward_fn_dict(model, inputs))


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        refuse(_WHERE, "forward_fn", output, "a loss, one number; give labels with the inputs")
    return loss


def preprocess_loraga(
    model: nn.Module,
    lora_config: LoraConfig,
    train_step: Callable[[], Any] | None = None,
    cache_file: str | Path | None = None,
    *,
    dataloader: Iterable[Any] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = loss_of,
    checkpoint_file: str | Path | None = None,
    checkpoint_every: int = EVERY,
    show_progress_bar: bool = True,
) -> None:
    """Leaves at each linear layer that a config adapts the mean gradient of its weight, for
    `init_lora_weights="lora_ga"`, as PEFT's function of this name, whose files and attributes are
    the same. Gradients are added in float32, and one weight's alone is in memory beside the sums;
    what the parameters' `grad` was, it still is.

    Args:
        lora_config: with a lora_ga_config.
        train_step: runs forward and backward, as often as it likes, without an optimizer's step.
        cache_file: used if it is there, written otherwise.
        dataloader: batches, instead of train_step: `forward_fn(model, batch)` is the loss of one,
            or an output that has it as `loss`.
        checkpoint_file, checkpoint_every, show_progress_bar: as of `preprocess_corda`.

    Raises:
        ValueError: there is no data, a layer has no gradient of it, or one that is not finite; a
            layer is quantized. Nothing is left at the model then.
        TypeError: an argument is of another kind.
    """
    config = LoraConfig.of(lora_config, _WHERE)
    if config.lora_ga_config is None:
        raise ValueError(
            f"{_WHERE}: lora_config: lora_ga_config: got None: If you want to use LoRA-GA, please "
            "initialize the LoraConfig with init_lora_weights='lora_ga' and "
            "lora_ga_config=LoraGAConfig(...)"
        )
    layers = linear_targets(_WHERE, model, config)
    check_not_quantized(_WHERE, layers)
    if cache_file is not None and is_there(cache_file):
        cache = load_cache(_WHERE, cache_file, device_of(model) or "cpu")
        gradients = {name: of_cache(_WHERE, cache_file, cache, f"{name}.{_KEY}") for name in layers}
    else:
        gradients = _estimated(
            model,
            layers,
            train_step,
            dataloader,
            forward_fn,
            (checkpoint_file, {}, checkpoint_every),
            show_progress_bar,
        )
        if cache_file is not None:
            save_cache(cache_file, {f"{name}.{_KEY}": one for name, one in gradients.items()})
        if checkpoint_file is not None:
            Path(checkpoint_file).unlink(missing_ok=True)
    leave(layers, "lora_ga", gradients)


def _estimated(
    model: nn.Module,
    layers: dict[str, nn.Module],
    train_step: Callable[[], Any] | None,
    dataloader: Iterable[Any] | None,
    forward_fn: Callable[[nn.Module, Any], Any],
    checkpoint: tuple[Any, dict[str, Any], int],
    show: bool,
) -> dict[str, Tensor]:
    if (train_step is None) == (dataloader is None):
        raise ValueError(
            f"{_WHERE}: train_step, dataloader: got {'none' if dataloader is None else 'both'} of "
            "them, expected one"
        )
    check_function(_WHERE, "train_step", train_step)
    statistics = {name: MeanGradient() for name in layers}
    device = device_of(model)
    with as_before(model, training=True), _gradients(model, layers, statistics):
        if dataloader is None:
            assert train_step is not None
            train_step()
        else:
            run = Pass(_WHERE, statistics, *checkpoint)
            for batch in run.shown_over(dataloader, show):
                _loss(forward_fn(model, to_device(batch, device))).backward()  # type: ignore[no-untyped-call]
    check_reached(_WHERE, statistics)
    means = {name: one.mean() for name, one in statistics.items()}
    for name, mean in means.items():
        if not bool(torch.isfinite(mean).all()):
            raise ValueError(
                f"{_WHERE}: the gradient of '{name}' holds NaN or Inf, expected finite values: "
                "please check your input data, and the model's dtype"
            )
        if not bool(mean.any()):
            raise ValueError(
                f"{_WHERE}: the gradient of '{name}' is zero, expected some: its output does not "
                "change the loss; leave it out with exclude_modules"
            )
    return means


@contextmanager
def _gradients(
    model: nn.Module, layers: dict[str, nn.Module], statistics: dict[str, MeanGradient]
) -> Iterator[None]:
    """Within this context backward passes add to the statistics, and nothing else has gradients."""
    weights: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, layer in layers.items():
        weight = (layer._modules.get("base_layer") or layer)._parameters.get("weight")
        if weight is None or weight.is_meta:
            raise ValueError(
                f"{_WHERE}: the weight of '{name}' is computed from others, or has no values, "
                "expected a plain parameter"
            )
        parameters[id(weight)] = weight
        weights.setdefault(id(weight), []).append(name)  # tied layers share one
    before = {place: weight.grad for place, weight in parameters.items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    hooks = []
    try:
        for place, weight in parameters.items():
            weight.grad = None
            weight.requires_grad_(True)
            names = weights[place]
            take = _taker([statistics[name] for name in names])
            hooks.append(weight.register_post_accumulate_grad_hook(take))  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for place, weight in parameters.items():
            weight.grad = before[place]


def _taker(statistics: list[MeanGradient]) -> Callable[[Tensor], None]:
    def take(weight: Tensor) -> None:
        assert weight.grad is not None
        for one in statistics:
            one.update(weight.grad)
        weight.grad = None

    return take
