"""Adapters as pairs of lora_A and lora_B, each with its lora_alpha: what all formats have in
common; from PEFT's terms and into them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import regex
from torch import Tensor

from lora_ext._patterns import keys_for
from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.alphas import Alphas, scaled
from lora_ext.io.convert.formats import LoadedAdapter, Options
from lora_ext.io.files import short

PREFIX = "base_model.model."
OUT_PROJ = ".base_layer.out_proj"  # of nn.MultiheadAttention, in PEFT's keys
# Modules that are embeddings where nothing else says so: their last names in transformers.
EMBEDDINGS = frozenset(
    "embed_tokens wte wpe word_embeddings position_embeddings token_type_embeddings shared "
    "relative_attention_bias embed_in embed_positions token_embedding position_embedding "
    "tok_embeddings embedding emb embed".split()
)
# Fields of a config with a meaning that pairs have not.
_OTHERS = (
    *("layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora"),
    *("alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"),
    *("monteclora_config", "use_qalora"),
)
# Initialisations that change the weights of the base, on which the tensors then build.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Pair:
    """One update of a weight, `lora_alpha / rank * B A`.

    Attributes:
        name: the module's.
        A, B: as PEFT has them: [rank, ...] and [out, rank, ...].
        alpha: its lora_alpha.
        embedding: whether the weight is an embedding's.
        part: "q_", "k_" or "v_" for one projection of an attention, in lora_ext's keys.
        bias: of lora_B.
        magnitude: of DoRA.
    """

    name: str
    A: Tensor
    B: Tensor
    alpha: float
    embedding: bool = False
    part: str = ""
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


def is_embedding(name: str, options: Options) -> bool:
    """By what is known of the base, else by the usual names."""
    layer = options.modules.get(name)
    if layer is not None and layer.kind is not None:
        return layer.kind == "embedding"
    return name.rpartition(".")[2] in EMBEDDINGS


def check_names(names: Iterable[str], options: Options, where: str) -> None:
    """AdapterFileError for a module that the base, where all of it is known, has not."""
    known = options.modules
    for name in names if options.whole else ():
        # An attention has no weight of its own in a file of the base, its projections have.
        if name in known or any(one.startswith(f"{name}.") for one in known):
            continue
        ends = (one for one in known if f".{one}".endswith(f".{name}") or name.endswith(f".{one}"))
        other = next((f", but {short(one)}" for one in ends), "")
        raise AdapterFileError(
            f"{where}: {short(name)}: the base has no module of this name{other}; give the base "
            "that it was trained on, and check ids"
        )


def by_suffix(mapping: Mapping[str, Any], name: str) -> Any:
    """What a mapping says of a module's name or its last parts; the longest counts."""
    parts = name.split(".")
    ends = (".".join(parts[at:]) for at in range(len(parts)))
    return next((mapping[end] for end in ends if end in mapping), None)


def as_adapter(
    pairs: Iterable[Pair],
    options: Options,
    biases: Mapping[str, Tensor] | None = None,
    where: str = "",
) -> LoadedAdapter:
    """The config and PEFT's keys of pairs, and of the base's biases by their names in it."""
    tensors: dict[str, Tensor] = {}
    ranks, alphas = dict[str, int](), dict[str, float]()
    pairs = list(pairs)
    for pair in pairs:
        _put(tensors, pair)
        module = pair.name.removesuffix(OUT_PROJ)
        mine = pair.rank, pair.alpha
        if (ranks.setdefault(module, mine[0]), alphas.setdefault(module, mine[1])) != mine:
            raise AdapterFileError(
                f"{where}: {short(module)}: its projections have other ranks or alphas; PEFT has "
                "one for all"
            )
    kind = "none"
    for name, tensor in (biases or {}).items():
        module = name.removesuffix(".bias")
        inner = ".base_layer" if module in ranks else ""
        tensors[f"{PREFIX}{module}{inner}.bias"] = tensor
        kind = "all" if kind == "all" or not inner else "lora_only"
    keys = keys_for(ranks)
    r, lora_alpha = _usual(ranks.values()), _usual(alphas.values())
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": r,
        "lora_alpha": _plain(lora_alpha),
        "rank_pattern": {keys[n]: one for n, one in ranks.items() if one != r},
        "alpha_pattern": {keys[n]: _plain(one) for n, one in alphas.items() if one != lora_alpha},
        "target_modules": _targets(ranks, options),
        "bias": kind,
        "lora_bias": any(pair.bias is not None for pair in pairs),
        "lora_dropout": 0.0,
        "use_dora": any(pair.magnitude is not None for pair in pairs),
        "use_rslora": False,
        "fan_in_fan_out": any(_is_transposed(pair, options) for pair in pairs),
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    return LoadedAdapter(config, tensors)


def _is_transposed(pair: Pair, options: Options) -> bool:
    """Whether the base is known to store the weight as [in, out]."""
    layer = options.modules.get(pair.name)
    if layer is None or pair.embedding or pair.A.dim() != 2:
        return False
    sizes = pair.A.shape[1], pair.B.shape[0]
    return layer.transposed or (layer.shape == sizes and sizes[0] != sizes[1])


def _put(tensors: dict[str, Tensor], pair: Pair) -> None:
    stem = f"{PREFIX}{pair.name}"
    if pair.embedding:
        tensors[f"{stem}.lora_embedding_A"] = pair.A
        tensors[f"{stem}.lora_embedding_B"] = pair.B
    else:
        tensors[f"{stem}.{pair.part}lora_A.weight"] = pair.A
        tensors[f"{stem}.{pair.part}lora_B.weight"] = pair.B
    if pair.bias is not None:
        tensors[f"{stem}.lora_B.bias"] = pair.bias
    if pair.magnitude is not None:
        tensors[f"{stem}.lora_magnitude_vector"] = pair.magnitude


def _usual(values: Iterable[Any]) -> Any:
    """The most frequent value; of several the largest."""
    return max(Counter(values).items(), key=lambda item: (item[1], item[0]))[0]


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value


def _ends(names: Iterable[str]) -> set[str]:
    """All that names end in after a dot."""
    found = set()
    for name in names:
        while "." in name:
            name = name.partition(".")[2]
            found.add(name)
    return found


def _targets(names: Iterable[str], options: Options) -> list[str] | str:
    """All modules by name; an expression where a name is also the end of another module's."""
    own = sorted(names)
    ends = _ends(set(options.modules).difference(own))
    return "|".join(regex.escape(name) for name in own) if ends & set(own) else own


def as_pairs(adapter: LoadedAdapter, where: str) -> tuple[list[Pair], dict[str, Tensor]]:
    """The pairs of an adapter, and its other tensors by their names in the base.

    Raises:
        AdapterFileError: a field of the config is malformed, or has a meaning that pairs have not.
    """
    config = adapter.config
    if config.get("peft_type", "LORA") != "LORA":
        raise AdapterFileError(f"{where}: peft_type {config['peft_type']!r:.60} is no LoRA")
    refuse_other_fields(config, where)
    check_original_base(config, f"{where}: ")
    alphas = Alphas(config, where)
    found, others = dict[tuple[str, str], dict[str, Tensor]](), dict[str, Tensor]()
    for key, tensor in adapter.tensors.items():
        name = key.removeprefix(PREFIX)
        if match := _KEY.fullmatch(name):
            part = match["part"] or ""
            own = found.setdefault((match["name"], part if part in _PARTS else ""), {})
            own[match["what"]] = tensor
        else:
            others[name.replace(".base_layer.", ".")] = tensor
    pairs = []
    for (name, part), own in found.items():
        kind = "embedding_" if "embedding_A" in own else ""
        A, B = own.get(f"{kind}A"), own.get(f"{kind}B")
        if A is None or B is None or not _fit(A, B):
            raise AdapterFileError(
                f"{where}: {short(name)}: has no lora_A and lora_B of one rank, whose shapes fit; "
                "of lora_ext.nn.MergedLinear save a plain one, save_pretrained(as_plain_lora=True)"
            )
        alpha = alphas.of(name.removesuffix(OUT_PROJ), A.shape[0])
        bias, magnitude = own.get("bias"), own.get("magnitude")
        for one in (bias, magnitude):
            if one is not None and one.numel() != B.shape[0]:
                raise AdapterFileError(
                    f"{where}: {short(name)}: a tensor of {list(one.shape)} beside a lora_B of "
                    f"{B.shape[0]} rows"
                )
        pairs.append(Pair(name, A, B, alpha, bool(kind), part, bias, magnitude))
    return pairs, others


def _fit(A: Tensor, B: Tensor) -> bool:
    """Two matrices, or a kernel and one of 1 x 1 with or without groups."""
    if A.dim() < 2 or A.dim() != B.dim() or 0 in A.shape or 0 in B.shape:
        return False
    if not (A.is_floating_point() and B.is_floating_point()):
        return False
    groups, left = divmod(A.shape[0], B.shape[1])
    if left or any(size != 1 for size in B.shape[2:]):
        return False
    return groups == 1 or (A.dim() > 2 and B.shape[0] % groups == 0)


def refuse_other_fields(config: Mapping[str, Any], where: str) -> None:
    """AdapterFileError for a field with a meaning that pairs have not."""
    for name in _OTHERS:
        if config.get(name):
            raise AdapterFileError(f"{where}: this format cannot hold {name} of the config")


def check_original_base(config: Mapping[str, Any], before: str = "") -> None:
    """AdapterFileError for tensors that build on a base that the initialisation changed: a file
    that does not hold the config does not say so."""
    kind = config.get("init_lora_weights")
    if isinstance(kind, str) and kind.lower().startswith(_CHANGES_BASE):
        raise AdapterFileError(
            f"{before}init_lora_weights: got {short(kind)}, which changes the base's weights, "
            "expected an adapter for the original ones; lora-ext convert --initial makes one of "
            "pissa, olora, corda and lora_ga"
        )


_PARTS = ("q_", "k_", "v_")
_KEY = regex.compile(
    r"(?P<name>.+)\.(?:(?P<part>[qkv]_)?lora_(?P<what>A|B)\.weight|lora_(?P<what>embedding_[AB])"
    r"|lora_B\.(?P<what>bias)|lora_(?P<what>magnitude)_vector(?:\.weight)?)"
)


def with_one_alpha(
    pairs: Iterable[Pair], options: Options, where: Path
) -> tuple[list[Pair], float]:
    """The pairs with one lora_alpha, for a format whose files do not hold it: theirs, or that of
    the options, by which lora_B is scaled.

    Raises:
        AdapterFileError: they need several, and none is given.
    """
    pairs = list(pairs)
    needed = {pair.alpha: pair.name for pair in pairs}
    if options.alpha is None and len(needed) > 1:
        (one, a), (other, b) = list(needed.items())[:2]
        raise AdapterFileError(
            f"{where}: this format has no lora_alpha of single modules: {short(a)} needs "
            f"{one:g}, {short(b)} {other:g}; give the one that the layers will be made with "
            "(alpha=, --alpha), by which lora_B is scaled then"
        )
    alpha = next(iter(needed)) if options.alpha is None else float(options.alpha)
    return [
        pair if pair.alpha == alpha else replace(pair, B=scaled(pair.B, pair.alpha / alpha))
        for pair in pairs
    ], alpha


def refuse_dora_and_bias(pairs: Iterable[Pair], where: Path) -> None:
    """For formats that have neither."""
    for pair in pairs:
        if pair.magnitude is not None:
            raise AdapterFileError(
                f"{where}: {short(pair.name)}: has a lora_magnitude_vector: this format cannot "
                "hold DoRA; merge the adapter instead (lora-ext merge)"
            )
        if pair.bias is not None:
            raise AdapterFileError(
                f"{where}: {short(pair.name)}: has a bias of lora_B (lora_bias): this format "
                "cannot hold it; merge the adapter instead (lora-ext merge)"
            )


def refuse_whole(others: Iterable[str], where: Path, biases: bool = False) -> None:
    """For tensors of the base, which formats of pairs alone cannot hold."""
    for name in others:
        if not (biases and name.endswith(".bias")):
            raise AdapterFileError(
                f"{where}: {short(name)}: this format cannot hold whole tensors of the base (bias, "
                "modules_to_save, embeddings); leave them out, or keep them apart"
            )
