"""PEFT's `convert_to_lora` and `save_as_lora`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._patterns import keys_for
from lora_ext._progress import progress
from lora_ext.adapters.checkpoint.keys import PREFIX
from lora_ext.adapters.config import LoraConfig
from lora_ext.adapters.names import exact_targets
from lora_ext.arguments import as_flag, check_module, refuse
from lora_ext.conversion.factors import Svd, factors, thin_svd
from lora_ext.conversion.found import WHERE, Found, check_convertible, found_in
from lora_ext.io.adapter_folder import save_adapter
from lora_ext.nn.adapter import DEFAULT


@torch.no_grad()
def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = DEFAULT,
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """A plain LoRA adapter that does what an adapter does, as nearly as its rank allows: the
    largest singular values of what this adds to each weight, which are in lora_B. The model stays
    as it is.

    Args:
        model: one of PEFT's with LoHa, LoKr, VeRa or another kind that adds to the weights of
            linear layers, or with LoRA; or one with linear layers of `lora_ext.nn` (in a LoraModel
            or not), of LoRA, DoRA, BD-LoRA or slices: to make their ranks smaller, or to have them
            in a form that others read.
        rank: of every layer; a float from above 0 to 1 is the share of the squared singular values
            that each layer keeps, by the smallest rank that does.
        progressbar: shows progress, on stderr.
        compile_kwargs: of torch.compile, for the decomposition; None does not compile it.

    Returns:
        The config, with lora_alpha = r, and the tensors by the keys of PEFT's files.

    Raises:
        TypeError: a layer that has the adapter cannot be converted, by its class, or there is none.
        ValueError: the rank is out of range, or larger than a layer's weight has; no such adapter;
            the adapter has biases; a model that is divided between processes.
    """
    rank = _checked_rank(rank)
    check_module(WHERE, "model", model)
    bar = as_flag(progressbar, WHERE, "progressbar")
    if compile_kwargs is not None and not isinstance(compile_kwargs, Mapping):
        refuse(WHERE, "compile_kwargs", compile_kwargs, "a dict of torch.compile's arguments")
    found = found_in(model, adapter_name)
    check_convertible(found, adapter_name)
    svd: Svd = thin_svd if compile_kwargs is None else torch.compile(thin_svd, **compile_kwargs)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    with progress("Converting to LoRA", len(found.layers)) if bar else nullcontext(None) as tell:
        for name, layer in found.layers.items():
            lora_A, lora_B = factors(name, layer, adapter_name, rank, svd)
            ranks[name] = len(lora_A)
            key = f"{found.prefix}{found.keys[name]}"
            tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = lora_A, lora_B
            if tell is not None:
                tell(1)
    return _config(found, rank, ranks), tensors | found.saved


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: int | float,
    adapter_name: str = DEFAULT,
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Writes what `convert_to_lora` returns into a folder, which is made if there is none, as
    `LoraModel.save_pretrained` does: both files or none, for a model of the plain base.

    Raises:
        Others as `convert_to_lora`; nothing is written then.
        AdapterFileError: NaN or Inf.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    named = {key if key.startswith(PREFIX) else PREFIX + key: t for key, t in tensors.items()}
    save_adapter(path, config.to_file(), named)


def _checked_rank(rank: Any) -> int | float:
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(
                f"{WHERE}: rank: got {rank}, expected an integer, or a float above 0 and up to 1. "
                "If rank is a float, it is interpreted as a threshold"
            )
        return rank
    if isinstance(rank, bool) or not isinstance(rank, Integral):
        refuse(WHERE, "rank", rank, "an integer, or a float above 0 and up to 1")
    if int(rank) < 1:
        raise ValueError(
            f"{WHERE}: rank: got {rank}, expected at least 1: a rank of 0 doesn't make sense"
        )
    return int(rank)


# The config


def _config(found: Found, rank: int | float, ranks: Mapping[str, int]) -> LoraConfig:
    """One that means exactly the layers that were converted."""
    of_base = {
        field: value
        for field in ("base_model_name_or_path", "revision", "task_type", "layer_replication")
        if (value := getattr(found.config, field, None)) is not None
    }
    r = rank if isinstance(rank, int) else 1
    others = [name for name, own in ranks.items() if own != rank]  # all, where it is a share
    keys = keys_for(ranks)
    pattern = {keys[name]: ranks[name] for name in others}
    saved = getattr(found.config, "modules_to_save", None)
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=exact_targets(found.base, list(ranks), shortest=True),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        modules_to_save=list(saved) if saved and found.saved else None,
        **of_base,
    )
