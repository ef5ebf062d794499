"""What an adapter does beyond the state in which its initialisation left it: a plain adapter of
twice the rank, for the weights that the initialisation changed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.adapters.calibrated_configs import PLAIN
from lora_ext.adapters.checkpoint.keys import PREFIX, layers_in_file
from lora_ext.adapters.combine.tensors import Adapter, alpha_factor, subtract_mutated_init
from lora_ext.adapters.config import LoraConfig
from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_file import TensorSpec
from lora_ext.io.adapter_folder import open_adapter
from lora_ext.io.files import short
from lora_ext.nn.calibrated import LEFT_AT
from lora_ext.nn.init import is_loftq, mutates_weight

_EXPECTED = (
    "expected as path_initial_model_for_weight_conversion (--initial) the adapter that this one "
    "was trained from, as save_pretrained wrote it before the first step; nothing is written"
)
# Factors were computed in float32 or better, and their last product perhaps in TF32.
_EPS, _UNIT = 2.0**-23, 2.0**-11


def without_initial(
    model: AdaptedModel,
    adapter_name: str,
    config: LoraConfig,
    tensors: dict[str, Tensor],
    known: Mapping[str, Tensor],
    folder: Path,
) -> dict[str, Tensor]:
    """The tensors with each adapter replaced by what it does beyond its initial state.

    Args:
        tensors: what is to be written of the adapter.
        known: all that a file of it may have.
        folder: of the initial adapter.

    Raises:
        AdapterFileError: its files are damaged or do not fit.
        ValueError: it cannot be what the adapter was trained from.
    """
    if is_loftq(_kind(model, adapter_name, config)):
        raise ValueError(
            f"save_pretrained: path_initial_model_for_weight_conversion: '{adapter_name}' was "
            "initialised by LoftQ, which quantized the base: no adapter makes that up exactly; "
            "expected another kind; save it without, for the quantized base"
        )
    with open_adapter(folder) as files:
        kind = _kind(model, adapter_name, config)
        where = f"save_pretrained: {folder}"
        _check_config(kind, config, files.config, where)
        present = files.header().keys() & known.keys()
        shapes = {k: tuple(v.shape) for k, v in known.items() if k in present or k in tensors}
        initial = files.tensors({key: TensorSpec(shape) for key, shape in shapes.items()})
    if kind is True:
        kind = _said(files.config)
    pairs = list(_pairs(model, adapter_name))
    missing = [key for A, B, _ in pairs for key in (A, B) if key not in initial]
    if missing:
        raise AdapterFileError(f"{folder}: has no {missing[0]}")
    initial = {key: value.to(known[key]) for key, value in initial.items()}
    if all(torch.equal(tensors[key], initial[key]) for A, B, _ in pairs for key in (A, B)):
        raise ValueError(
            f"{where}: has the very values of lora_A and lora_B that '{adapter_name}' has: it is "
            f"the trained adapter itself, or nothing was trained since; {_EXPECTED}"
        )
    result = dict(tensors)
    for A, B, scaling in pairs:
        _check_start(kind, A, initial[A], initial[B], where)
        now, then = (Adapter(values[A], values[B], scaling) for values in (tensors, initial))
        both = subtract_mutated_init(now, then)
        result[A], result[B] = both.lora_A, both.lora_B
    return result


def of_twice_the_rank(config: LoraConfig) -> LoraConfig:
    """`config`, changed to that of what `without_initial` returns."""
    factor = alpha_factor(config.use_rslora)
    vars(config).update(PLAIN)
    config.r, config.lora_alpha = 2 * config.r, factor * config.lora_alpha
    config.rank_pattern = {name: 2 * r for name, r in (config.rank_pattern or {}).items()}
    config.alpha_pattern = {
        name: factor * alpha for name, alpha in (config.alpha_pattern or {}).items()
    }
    return config


def _pairs(model: AdaptedModel, adapter_name: str) -> Iterator[tuple[str, str, float]]:
    """Keys of lora_A and lora_B, and the scaling."""
    for name, layer in layers_in_file(model, adapter_name):
        for prefix in layer.PREFIXES:
            if f"{prefix}lora_A" in layer.parts(adapter_name):
                A, B = (
                    f"{PREFIX}{name}.{layer.PEFT_NAMES[prefix + part]}"
                    for part in ("lora_A", "lora_B")
                )
                yield A, B, layer.adapters[adapter_name].scaling


def _kind(model: AdaptedModel, adapter_name: str, config: LoraConfig) -> bool | str:
    """The initialisation, as far as the model knows. True says little: PEFT wants it in the config
    of an initial adapter, whatever that is, and users leave it there; the layers know more."""
    if config.init_lora_weights is not True:
        return config.init_lora_weights
    layers = model.layers_with(adapter_name)
    kinds = {layer.adapters[adapter_name].init_lora_weights for _, layer in layers}
    return next((kind for kind in kinds if kind is not True), True)


def _said(fields: Mapping[str, Any]) -> bool | str:
    kind = fields.get("init_lora_weights", True)
    return kind.lower() if isinstance(kind, str) else kind is not False


def _check_config(
    kind: bool | str, config: LoraConfig, fields: Mapping[str, Any], where: str
) -> None:
    said = _said(fields)
    if kind is not True and said is not True and said != kind:
        raise ValueError(
            f"{where}: its init_lora_weights is {short(str(said))} and that of the trained "
            f"adapter {kind!r}; {_EXPECTED}"
        )
    for field in ("r", "lora_alpha", "use_rslora"):
        now, then = getattr(config, field), fields.get(field, getattr(config, field))
        if now != then:
            raise ValueError(
                f"{where}: its {field} is {short(str(then))} and that of the trained adapter "
                f"'{now}'; {_EXPECTED}"
            )


def _check_start(kind: bool | str, key: str, A: Tensor, B: Tensor, where: str) -> None:
    """ValueError for what the initialisation `kind` certainly did not leave."""
    if not isinstance(kind, str) or not mutates_weight(kind):
        return
    if "lora_embedding_A" in key:
        start = not A.count_nonzero()
        what = "zeros, as it leaves the lora_A of embeddings"
    elif A.dim() != 2 or B.dim() != 2 or len(A) != B.shape[1]:
        return
    elif kind == "olora":
        start = _is_olora(A, B)
        what = "a lora_B with orthonormal columns, the Q of a QR decomposition"
    elif kind in LEFT_AT:
        products, bounds = _products(B.t(), max(len(B), A.shape[1]))
        start = bool(((products - products.diag().diag()).abs() <= bounds).all())
        what = "columns of lora_B that are orthogonal, singular vectors times numbers"
    else:
        start = _is_pissa(A, B)
        what = (
            "rows of lora_A and columns of lora_B that are orthogonal and of equal lengths, those "
            "of a singular value decomposition"
        )
    if not start:
        raise ValueError(
            f"{where}: {short(key)}: is not as {kind!r} starts: expected {what}; it was trained "
            f"since, or is of another initialisation; {_EXPECTED}"
        )


def _is_olora(A: Tensor, B: Tensor) -> bool:
    products, bounds = _products(B.t(), max(len(B), A.shape[1]))
    return bool(((products - torch.eye(len(A), dtype=torch.double)).abs() <= bounds).all())


def _is_pissa(A: Tensor, B: Tensor) -> bool:
    size = max(len(B), A.shape[1])
    of_A, bounds_A = _products(A, size)
    of_B, bounds_B = _products(B.t(), size)
    lengths = (of_A - of_B).abs() <= bounds_A + bounds_B
    apart = (of_A - of_A.diag().diag()).abs() <= bounds_A
    return bool((lengths & apart).all())


def _products(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Products of all pairs of rows, and how far those of the stored rows can be from those of the
    exact ones.

    An element was rounded by a relative u, or by an absolute t where it is subnormal, a row v of
    length n therefore by e = u |v| + t sqrt(n); before that, v and w of a decomposition were
    orthogonal to `size` eps |v| |w|.
    """
    unit, least = _rounding(rows)
    rows = rows.cpu().double()
    length = rows.norm(dim=1)
    error = unit * length + least * rows.shape[1] ** 0.5
    bounds = error[:, None] * length + length[:, None] * error + error[:, None] * error
    return rows @ rows.t(), bounds + size * _EPS * length[:, None] * length


def _rounding(values: Tensor) -> tuple[float, float]:
    """Relative and absolute: of the coarsest dtype that the values could have been in, as an
    adapter of a bfloat16 base may be in float32 later."""
    unit, least = _UNIT, 0.0
    for dtype in (torch.float16, torch.bfloat16):
        if torch.equal(values.to(dtype).to(values.dtype), values):
            info = torch.finfo(dtype)
            unit = max(unit, info.eps / 2)
            least = max(least, info.smallest_normal * info.eps / 2)
    return unit, least
