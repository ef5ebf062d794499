"""EVA (arXiv:2410.07170): lora_A from the principal components of a layer's inputs, and ranks from
the variance that they explain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_ext._progress import progress
from lora_ext.adapters.calibrated_configs import EvaConfig
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.inject import adapted
from lora_ext.adapters.names import plain_name
from lora_ext.arguments import check_mapping, check_module, warn
from lora_ext.calibration.eva_inputs import (
    gathered,
    prepare_layer_inputs_fn_language_modeling,
    prepare_model_inputs_fn_language_modeling,
)
from lora_ext.calibration.eva_layers import (
    PREFIX,
    LayerInputs,
    layers_of,
    per_layer,
    rho_of,
    switched_off,
)
from lora_ext.calibration.eva_model import put_components
from lora_ext.calibration.eva_pass import WHERE, same_inputs, settle
from lora_ext.calibration.running import (
    EVERY,
    Pass,
    as_before,
    device_of,
    forward_fn_dict,
    to_device,
)
from lora_ext.calibration.statistics import PrincipalComponents, check_finite
from lora_ext.nn.adapter import DEFAULT


@torch.no_grad()
def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    peft_config: LoraConfig | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any]
    | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = DEFAULT,
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    *,
    checkpoint_file: str | Path | None = None,
    checkpoint_every: int = EVERY,
) -> dict[str, Tensor]:
    """The components of each layer's inputs, as many as its new rank: PEFT's function of this name,
    with the same keys, ranks and values. The data is gone through, again if need be, until the
    components of those ranks stay what they are.

    Args:
        model: with an adapter of this name, which is switched off meanwhile; or without, and
            peft_config.
        dataloader: batches for `forward_fn(model, batch)`.
        prepare_model_inputs_fn: called with a batch and the config; its result goes to the next.
        prepare_layer_inputs_fn: makes of a layer's arguments, that result and the layer's name the
            rows [n, K]; or a dict of such by names. None, or a name without: all rows.
        gather_distributed_inputs: whether each process takes the rows of all.
        checkpoint_file, checkpoint_every: as of `preprocess_corda`.

    Returns:
        [rank, K] by names of layers; of rank 0 for layers that are better left alone.

    Raises:
        ValueError: there is no data, it never reaches a layer or is not finite, no batch has as
            many rows as a layer may get ranks, or the components never settle.
        TypeError: an argument is of another kind.
    """
    check_module(WHERE, "model", model)
    found, layers, config = layers_of(model, peft_config, adapter_name)
    functions = per_layer(layers, prepare_layer_inputs_fn)
    eva = config.eva_config or EvaConfig()
    ranks = {name: config.settings_for(name.removeprefix(PREFIX)).r for name in layers}
    rho = rho_of(model, config, eva)
    counts = {name: round(rank * rho) for name, rank in ranks.items()}
    device = device_of(model)

    prepared: list[Any] = [None]  # of the present batch

    def rows(name: str, arguments: Any) -> Tensor:
        x = functions[name](arguments, prepared[0], name)
        check_finite(WHERE, name, x)
        return gathered(x) if gather_distributed_inputs else x

    def run_batch(batch: Any) -> None:
        batch = to_device(batch, device)
        fn = prepare_model_inputs_fn
        prepared[0] = batch if fn is None else fn(batch, config)
        forward_fn(model, batch)

    if dist.is_available() and dist.is_initialized() and gather_distributed_inputs:
        warn(
            f"{WHERE}: torch.distributed is initialized and gather_distributed_inputs is True: "
            "inputs of all ranks are gathered, expected other data on each"
        )
    with as_before(model, training=False), switched_off(found):
        same = same_inputs(layers, dataloader, run_batch, rows)
        for one, other in same.items():
            counts[one] = counts[other] = max(counts[one], counts[other])
        for one, other in same.items():
            counts[one] = counts[other]
        own = {name: layer for name, layer in layers.items() if name not in same}
        statistics = {name: PrincipalComponents(counts[name], eva.tau) for name in own}
        settings = {"counts": counts, "tau": eva.tau}
        run = Pass(WHERE, statistics, checkpoint_file, settings, checkpoint_every)
        bar = progress("EVA, layers that settled", len(own)) if show_progress_bar else nullcontext()
        with bar as advance:
            budget = sum(ranks.values())
            new = settle(run, own, same, counts, budget, dataloader, run_batch, rows, advance)
        run.finish()
    return _components(new, statistics, same, eva, device)


def initialize_lora_eva_weights(
    model: nn.Module,
    dataloader: Iterable[Any] | None = None,
    eva_state_dict: Mapping[str, Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    prepare_model_inputs_fn: Callable[[Any, Any], Any]
    | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: LayerInputs
    | Mapping[str, LayerInputs]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = DEFAULT,
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
    **options: Any,
) -> None:
    """Starts the adapter of a model as EVA does, in place: PEFT's function of this name. Layers get
    other ranks, and those of rank 0 lose the adapter; the model's config says so.

    Args:
        dataloader: not needed with `eva_state_dict`.
        eva_state_dict: what `get_eva_state_dict`, ours or PEFT's, returned for this model.
        options: of `get_eva_state_dict`, as are the others.

    Raises:
        TypeError, ValueError: as it; ValueError also for a model with several active adapters, or
            whose adapter's init_lora_weights is not "eva". The model is as it was then.
    """
    where = "initialize_lora_eva_weights"
    found, injected = adapted(model, where)
    found._check_names([adapter_name])
    if len(found.active_adapters) > 1:
        raise ValueError(
            f"{where}: model: got active adapters {found.active_adapters}, expected one: it "
            "currently only works with a single active adapter"
        )
    kind = found.peft_config[adapter_name].init_lora_weights
    if kind != "eva":
        raise ValueError(
            f"{where}: '{adapter_name}' has init_lora_weights={kind!r}: can only be used with "
            "`init_lora_weights='eva'`"
        )
    if eva_state_dict is None:
        if dataloader is None:
            raise ValueError(f"{where}: dataloader is required if eva_state_dict is not provided")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            None,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
            **options,
        )
    check_mapping(where, "eva_state_dict", eva_state_dict, Tensor, "tensors")
    put_components(
        found,
        adapter_name,
        {plain_name(name).removeprefix(PREFIX): one for name, one in eva_state_dict.items()},
    )
    if injected:
        vars(model)["peft_config"] = found.peft_config


def _components(
    ranks: Mapping[str, int],
    statistics: Mapping[str, PrincipalComponents],
    same: Mapping[str, str],
    eva: EvaConfig,
    device: torch.device | None,
) -> dict[str, Tensor]:
    result = {}
    for name, rank in ranks.items():
        one = statistics[same.get(name, name)]
        values = one.components[:rank].float()
        if eva.whiten:
            values = values / one.singular_values[:rank].float().sqrt()[:, None]
        result[name] = values if device is None else values.to(device)
    return result
