"""An adapter in PEFT's terms as pairs of matrices with scalings, which is all that GGUF holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_ext.arguments import short
from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.alphas import Alphas
from lora_ext.io.convert.formats import LoadedAdapter
from lora_ext.io.convert.pairs import check_original_base

PREFIX = "base_model.model."
_PARTS = {
    ".lora_A.weight": ("A", False),
    ".lora_B.weight": ("B", False),
    ".lora_embedding_A": ("A", True),
    ".lora_embedding_B": ("B", True),
}
# What else PEFT's files have, by how keys end; the rest are weights of the base.
_OTHERS = {
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "use_dora",
    ".lora_magnitude_vector.weight": "use_dora",
    ".trainable_tokens_delta": "trainable_token_indices",
}
# Fields that say that the adapter is more than its pairs.
_REFUSED = (
    *("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "layer_replication"),
    *("use_bdlora", "use_qalora", "velora_config", "kasa_config", "monteclora_config"),
    *("arrow_config",),
)


@dataclass(frozen=True)
class Pair:
    """What an adapter does to one weight: scaling * B A.

    Attributes:
        A, B: [r, in] and [out, r], or stacks of these for experts, [E, r, in] and [E, out, r].
        embedding: whether it is of an embedding, whose A is [r, vocabulary].
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0
    embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


def check_can_be_pairs(config: Mapping[str, Any]) -> None:
    """
    Raises:
        AdapterFileError: the config has what pairs of matrices are not; names the field.
    """
    kind = config.get("peft_type", "LORA")
    if str(getattr(kind, "value", kind)) != "LORA":
        raise AdapterFileError(f"peft_type: got {short(kind)}, expected LORA: GGUF holds no other")
    for field in _REFUSED:
        if config.get(field):
            raise AdapterFileError(
                f"{field}: got {short(config[field])}, which GGUF adapters cannot hold; merge "
                "it into the base (lora-ext merge), and convert that"
            )
    if config.get("bias", "none") != "none":
        raise AdapterFileError(
            f"bias: got {short(config['bias'])}, expected 'none': GGUF adapters hold no biases"
        )
    check_original_base(config)


def pairs_of(adapter: LoadedAdapter) -> dict[str, Pair]:
    """The pairs by PEFT's names of modules, which are the keys of its files without `PREFIX` and
    the part; scalings are not told yet.

    Raises:
        AdapterFileError: a tensor is no part of a pair, or does not fit the other; names it.
    """
    check_can_be_pairs(adapter.config)
    found: dict[str, dict[str, Tensor]] = {}
    embeddings = set()
    for key, tensor in adapter.tensors.items():
        end = next((end for end in _PARTS if key.endswith(end)), None)
        if end is None or not key.startswith(PREFIX):
            raise _unknown(key)
        name = key[len(PREFIX) : -len(end)]
        part, of_embedding = _PARTS[end]
        found.setdefault(name, {})[part] = tensor
        if of_embedding:
            embeddings.add(name)
    pairs = {}
    for name, parts in found.items():
        if parts.keys() != {"A", "B"}:
            (part,) = parts
            raise AdapterFileError(f"{name}: has lora_{part} alone, expected lora_A and lora_B")
        A, B = parts["A"], parts["B"]
        if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1] or not A.numel() * B.numel():
            raise AdapterFileError(
                f"{name}: lora_A is {list(A.shape)} and lora_B {list(B.shape)}, expected [r, in] "
                "and [out, r]: GGUF holds adapters of linear layers, embeddings and experts"
            )
        pairs[name] = Pair(A, B, embedding=name in embeddings)
    if not pairs:
        raise AdapterFileError("the adapter has no tensors; there is nothing to convert")
    return pairs


def _unknown(key: str) -> AdapterFileError:
    field = next((field for end, field in _OTHERS.items() if key.endswith(end)), None)
    if field is not None:
        return AdapterFileError(f"{key}: belongs to {field}, which GGUF adapters cannot hold")
    return AdapterFileError(
        f"{key}: is a weight of the base (modules_to_save, or an embedding saved beside the "
        "adapter), which GGUF adapters cannot hold; lora-ext convert --no-embeddings leaves out "
        "embeddings that were not trained"
    )


class Scalings:
    """Those of a config's modules, by their names."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._alphas = Alphas(config, "config")
        parameters = config.get("target_parameters") or []
        if not isinstance(parameters, list):
            raise AdapterFileError(f"target_parameters: got {short(parameters)}, expected a list")
        self._parameters = tuple(map(str, parameters))

    def of(self, name: str, r: int) -> float:
        """Of a module or parameter whose adapter has rank r."""
        return self._alphas.of(name, r) / r

    def name_of(self, module: str) -> str:
        """What patterns call a module: by its weight where target_parameters does."""
        return f"{module}.weight" if self.is_targeted(f"{module}.weight") else module

    def is_targeted(self, parameter: str) -> bool:
        """Whether target_parameters means it."""
        return any(parameter == n or parameter.endswith(f".{n}") for n in self._parameters)


def with_one_alpha(pairs: Mapping[str, Pair]) -> tuple[float, dict[str, Pair]]:
    """The alpha that gives all pairs their scalings, alpha / rank each, and the pairs; or 0, which
    means 1 for all, and pairs whose scalings are in B, in float32."""
    alphas = {float(torch.tensor(pair.scaling * pair.rank)) for pair in pairs.values()}
    if len(alphas) == 1 and (alpha := alphas.pop()):
        return alpha, dict(pairs)
    return 0.0, {name: _folded(pair) for name, pair in pairs.items()}


def _folded(pair: Pair) -> Pair:
    B = pair.B if pair.scaling == 1.0 else (pair.B.double() * pair.scaling).float()
    return Pair(pair.A, B, 1.0, pair.embedding)


def ends_of(chosen: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names by their last parts where that means no others of the known ones."""
    chosen, result = set(chosen), set()
    ends: dict[str, set[str]] = {}
    for name in known:
        ends.setdefault(name.rpartition(".")[2], set()).add(name)
    for name in chosen:
        end = name.rpartition(".")[2]
        result.add(end if ends.get(end, set()) <= chosen else name)
    return sorted(result)
