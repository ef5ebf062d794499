"""CorDA's preprocessing (arXiv:2406.05223): weights decomposed along the covariance of their
inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext._progress import progress
from lora_ext.adapters.config import LoraConfig
from lora_ext.calibration.checkpoint import is_there, load_cache, of_cache, save_cache
from lora_ext.calibration.layers import check_not_quantized, leave, linear_targets, matrix
from lora_ext.calibration.running import (
    EVERY,
    Pass,
    as_before,
    check_function,
    check_reached,
    device_of,
    forward_fn_dict,
    to_device,
    watching,
)
from lora_ext.calibration.statistics import Covariance, check_finite
from lora_ext.nn.calibrated import CordaEigens

_WHERE = "preprocess_corda"
_PARTS = ("S_WC", "U_WC", "V_WC")
_DAMP, _INVERSE_ERROR = 0.01, 0.05  # of PEFT, of the paper's code
_DOUBLINGS = 30


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: LoraConfig,
    run_model: Callable[[], Any] | None = None,
    hooked_model: nn.Module | None = None,
    *,
    dataloader: Iterable[Any] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] = forward_fn_dict,
    checkpoint_file: str | Path | None = None,
    checkpoint_every: int = EVERY,
    show_progress_bar: bool = True,
) -> None:
    """Leaves at each linear layer that a config adapts what `init_lora_weights="corda"` needs, as
    PEFT's function of this name, whose files and attributes are the same.

    Args:
        model: without adapters yet, or with others.
        lora_config: with a corda_config, whose cache_file and covariance_file are used if they are
            there, and written otherwise.
        run_model: runs the model over a sample of data.
        hooked_model: what run_model runs, if that is not `model`.
        dataloader: batches for `forward_fn(model, batch)`, instead of run_model. Each sample of a
            batch counts as a call in PEFT, which takes one sample at a time.
        checkpoint_file: with dataloader: where the pass is kept every `checkpoint_every` batches;
            a pass that was killed goes on from there, with a loader of the same order.
        show_progress_bar: with dataloader, on stderr.

    Raises:
        ValueError: there is no data, it never reaches a layer, or is not finite; a file is not of
            this model. Nothing is left at the model then.
        TypeError: an argument is of another kind.
    """
    config = LoraConfig.of(lora_config, _WHERE)
    corda = config.corda_config
    if corda is None:
        raise ValueError(
            f"{_WHERE}: lora_config: corda_config: got None, expected a CordaConfig, with "
            "init_lora_weights='corda'"
        )
    layers = linear_targets(_WHERE, model, config)
    check_not_quantized(_WHERE, layers)
    device, file = device_of(model) or "cpu", corda.cache_file
    if file is not None and is_there(file):
        cache = load_cache(_WHERE, file, device)
        eigens = {
            name: CordaEigens(
                *(of_cache(_WHERE, file, cache, f"{name}.eigens.{p}") for p in _PARTS)
            )
            for name in layers
        }
    else:
        hooked = model if hooked_model is None else hooked_model
        if corda.covariance_file is not None and is_there(corda.covariance_file):
            found = load_cache(_WHERE, corda.covariance_file, device)
            covariances = {
                name: of_cache(_WHERE, corda.covariance_file, found, name) for name in layers
            }
        else:
            if (run_model is None) == (dataloader is None):
                raise ValueError(
                    f"{_WHERE}: run_model, dataloader: expected one of them: run_model must be "
                    "specified when covariance file and cache file aren't built"
                )
            check_function(_WHERE, "run_model", run_model)
            dtype = torch.float16 if corda.use_float16_for_covariance else torch.float32
            statistics = {name: Covariance(dtype) for name in layers}
            watched = layers if hooked is model else linear_targets(_WHERE, hooked, config)
            watched = {name: layer for name, layer in watched.items() if name in layers}
            with as_before(hooked, training=False), watching(watched, _observer(statistics)):
                if dataloader is None:
                    assert run_model is not None
                    run_model()
                    check_reached(_WHERE, statistics)
                else:
                    settings = {"dtype": str(dtype)}
                    run = Pass(_WHERE, statistics, checkpoint_file, settings, checkpoint_every)
                    _run(run, hooked, dataloader, forward_fn, show_progress_bar)
            covariances = {name: one.mean for name, one in statistics.items()}
            if corda.covariance_file is not None:
                save_cache(corda.covariance_file, covariances)
            if checkpoint_file is not None:
                Path(checkpoint_file).unlink(missing_ok=True)
        eigens = {}
        with progress("CorDA", len(layers)) if corda.verbose else nullcontext() as advance:
            for name, layer in layers.items():
                r = config.settings_for(name).r
                eigens[name] = _eigens(
                    name, matrix(layer), covariances[name], r, corda.corda_method
                )
                if advance is not None:
                    advance(1)
        if file is not None:
            parts = {
                f"{name}.eigens.{part}": getattr(one, part)
                for name, one in eigens.items()
                for part in _PARTS
            }
            save_cache(file, parts)
    leave(layers, "corda", eigens)


def _observer(statistics: dict[str, Covariance]) -> Callable[[str, Any], None]:
    def observe(name: str, arguments: Any) -> None:
        x: Tensor = arguments[0].detach()
        if x.numel() == 0:
            return
        check_finite(_WHERE, name, x)
        if not statistics[name].update(x):
            raise ValueError(
                f"{_WHERE}: the largest element of an input of '{name}' is 0, by which samples are "
                "divided, expected another: Invalid value found in input, please check your input "
                "data"
            )

    return observe


def _run(
    run: Pass,
    model: nn.Module,
    dataloader: Iterable[Any],
    forward_fn: Callable[[nn.Module, Any], Any],
    show: bool,
) -> None:
    device = device_of(model)
    for batch in run.shown_over(dataloader, show):
        forward_fn(model, to_device(batch, device))
    check_reached(_WHERE, run.statistics)


def _eigens(name: str, weight: Tensor, covariance: Tensor, r: int, method: str) -> CordaEigens:
    """The first r singular triplets (ipm), or the last (kpm), of W C, with V times C's inverse."""
    where, (N, K) = f"{_WHERE}: '{name}'", weight.shape
    if r > min(N, K):
        raise ValueError(
            f"{where}: r: got {r} for a weight of shape {(N, K)}, expected at most {min(N, K)}; "
            "give this layer a smaller rank with rank_pattern"
        )
    if covariance.shape != (K, K):
        raise ValueError(
            f"{where}: covariance: got shape {tuple(covariance.shape)}, expected {(K, K)}: its "
            "file is of another model"
        )
    if not bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(covariance).all()):
        raise ValueError(
            f"{where}: weight or covariance hold NaN or Inf: Invalid value found in covariance; "
            "calibrate with finite data, and without use_float16_for_covariance"
        )
    C, inverse = _damped(where, covariance.to(weight.device, torch.float32))
    U, S, Vh = torch.linalg.svd(weight.detach().float() @ C, full_matrices=False)
    chosen = slice(r) if method == "ipm" else slice(len(S) - r, None)
    V = (Vh[chosen] @ inverse).t()
    # Of their own: what is saved, or kept, of a slice would be the whole.
    return CordaEigens(S[chosen].clone(), U[:, chosen].contiguous(), V.contiguous())


def _damped(where: str, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """A covariance with so much of its mean variance on the diagonal that it can be inverted, and
    the inverse."""
    identity = torch.eye(len(covariance), device=covariance.device)
    variance, damp = covariance.diag().mean(), _DAMP
    for _ in range(_DOUBLINGS):
        C = covariance + damp * variance * identity
        inverse, info = torch.linalg.inv_ex(C)
        if int(info) == 0 and float(torch.dist(C @ inverse, identity)) < _INVERSE_ERROR:
            return C, inverse
        damp *= 2
    raise ValueError(
        f"{where}: the covariance of its inputs cannot be inverted, expected data that is not all "
        "the same: more samples, or other ones"
    )
