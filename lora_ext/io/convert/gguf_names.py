"""What llama.cpp makes of a base: the names of its tensors, and the order of their rows.

A base is known by the model_type of its config.json. The package `gguf` has the names of tensors
for each architecture; which modules one has, and in what order llama.cpp keeps the rows of their
weights, is here. An architecture that is not here is refused: rows in another order would load
without an error and give another model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext.arguments import as_path, listed, short
from lora_ext.errors import AdapterFileError
from lora_ext.io.adapter_file import read_header
from lora_ext.io.convert.gguf_file import library
from lora_ext.io.files import open_inside, parse_json, read_all, typed_errors

MAX_CONFIG_BYTES, MAX_HEADER_BYTES = 4 << 20, 32 << 20
MAX_LAYERS, MAX_EXPERTS = 1024, 4096
# Names of llama.cpp.
EMBEDDING, OUTPUT = "token_embd", "output"

# Rows of a weight in llama.cpp, as their numbers in the module's weight.
Order = Callable[["Base", int], Tensor]


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        arch: its name in GGUF.
        layer: names of modules in a layer, which adapters may be on. Of several for one tensor the
            first is that of transformers 5.
        modules: of those outside of layers.
        layers: what comes before the layer's number.
        orders: of rows, by the last part of a module's name; the others' are as they are.
        experts: the module whose parameters gate_up_proj and down_proj are stacks of experts.
        one_by_one: its former name, and those of an expert's gate, up and down in it.
        transposed: whether its weights are [in, out] (`fan_in_fan_out`), which adapters are not.
        tied: whether the output layer is the input embedding where config.json does not say.
    """

    arch: str
    layer: tuple[str, ...]
    modules: tuple[str, ...] = ("model.embed_tokens", "lm_head")
    layers: str = "model.layers"
    orders: Mapping[str, Order] | None = None
    experts: str | None = None
    one_by_one: tuple[str, str, str, str] | None = None
    transposed: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Base:
    """A base model, as far as converting needs it. From `Base.of`.

    Attributes:
        modules: name in llama.cpp by name of the module; both without ".weight".
        experts: the same of stacks of experts, by the name of the module and what it is of them:
            "gate", "up" or "down".
        shapes: of tensors in the folder's safetensors, by name; empty without such files.
    """

    folder: Path
    family: Family
    config: Mapping[str, Any]
    modules: Mapping[str, str]
    experts: Mapping[tuple[str, str], str]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, folder: Path) -> Base:
        """Reads config.json, and the headers of safetensors.

        Raises:
            AdapterFileError: config.json is missing or cannot be read, or says what is not known.
        """
        folder = as_path(folder, "convert", "base")
        with typed_errors(folder / "config.json"), open_inside(folder, "config.json") as file:
            config = parse_json(read_all(file, MAX_CONFIG_BYTES), str(file.name))
        kind = config.get("model_type")
        family = FAMILIES.get(kind) if isinstance(kind, str) else None
        if family is None:
            raise AdapterFileError(
                f"{folder / 'config.json'}: model_type is {short(kind)}, of which it is not known "
                f"how llama.cpp keeps its weights; known are {', '.join(sorted(FAMILIES))}"
            )
        shapes = {
            name: spec.shape
            for path in sorted(folder.glob("*.safetensors"))
            for name, spec in read_header(path, max_header_bytes=MAX_HEADER_BYTES).items()
        }
        base = cls(folder, family, config, {}, {}, shapes)
        return base._with_names()

    def number(self, *names: str, default: int | None = None, most: int = 1 << 24) -> int:
        """A field of config.json, under the first of these names that is there."""
        found = next((self.config[n] for n in names if self.config.get(n) is not None), default)
        if type(found) is not int or not 1 <= found <= most:
            raise AdapterFileError(
                f"{self.folder / 'config.json'}: {names[0]} is {short(found)}, expected a number "
                f"from 1 to {most}"
            )
        return found

    def heads(self) -> int:
        return self.number("num_attention_heads", "n_head")

    def kv_heads(self) -> int:
        return self.number("num_key_value_heads", default=self.heads())

    def is_tied(self) -> bool:
        """Whether the output layer is the input embedding: there is one tensor for both then."""
        return bool(self.config.get("tie_word_embeddings", self.family.tied))

    def count_of_experts(self) -> int:
        return self.number("num_local_experts", "num_experts", most=MAX_EXPERTS)

    def order(self, module: str, rows: int) -> Tensor | None:
        """The rows of a module's weight as llama.cpp has them; None where that is the same.

        Raises:
            AdapterFileError: a weight of this base cannot have so many rows.
        """
        found = (self.family.orders or {}).get(module.rpartition(".")[2])
        if found is None:
            return None
        order = found(self, rows)
        if len(order) != rows:
            raise AdapterFileError(
                f"{module}: {rows} rows, expected {len(order)} by the heads in "
                f"{self.folder / 'config.json'}; give the base that the adapter was made for"
            )
        return order

    def check_weight(self, module: str, columns: int, rows: int, embedding: bool) -> None:
        """
        Raises:
            AdapterFileError: llama.cpp has no tensor of its own for it, or the folder's files have
                it in other sizes.
        """
        name = self.modules[module]
        if self.is_tied() and name in (EMBEDDING, OUTPUT):
            says = "has no tensor of its own for the output layer"
            if name == EMBEDDING:
                says = "would take the adapter for one of the output layer too, and end its process"
            raise AdapterFileError(
                f"{module}: input embedding and output layer are tied in {self.folder}: llama.cpp "
                f"{says}; merge the adapter into the base, and convert that"
            )
        expected = {(columns, rows) if embedding else (rows, columns)}
        if self.family.transposed:  # but not its output layer
            expected.add((columns, rows))
        shape = self.shapes.get(f"{module}.weight")
        if shape is not None and shape not in expected:
            raise AdapterFileError(
                f"{module}: the adapter is for a weight of {[rows, columns]}, that of "
                f"{self.folder} is {list(shape)}; give the base that the adapter was made for"
            )

    def module_of(self, name: str) -> str:
        """The module of a name in llama.cpp."""
        found = next((module for module, own in self.modules.items() if own == name), None)
        if found is None:
            raise AdapterFileError(
                f"{short(name)} is no tensor of {self.folder}, a {self.config['model_type']} with "
                f"{self._layers()} layers; give the base that the adapter was made for"
            )
        return found

    def tensor_of(self, module: str) -> str:
        """The name in llama.cpp of a module."""
        if module not in self.modules:
            some = listed(sorted({name.rpartition(".")[2] for name in self.modules}))
            raise AdapterFileError(
                f"{short(module)}: {self.config['model_type']} in llama.cpp has no weight for it "
                f"that an adapter can be on; those are {some}"
            )
        return self.modules[module]

    def _layers(self) -> int:
        return self.number("num_hidden_layers", "n_layer", "num_layers", most=MAX_LAYERS)

    def _with_names(self) -> Base:
        gguf, family, layers = library("converting to or from GGUF"), self.family, self._layers()
        (arch,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        names = gguf.get_tensor_name_map(arch, layers)

        own = [f"{family.layers}.{i}.{name}" for i in range(layers) for name in family.layer]
        found = {name: names.get_name(name) for name in (*family.modules, *own)}
        modules = {name: told for name, told in found.items() if told is not None}
        experts: dict[tuple[str, str], str] = {}
        for i in range(layers if family.experts else 0):
            for part in ("gate", "up", "down"):
                where = f"{family.layers}.{i}.{family.experts}"
                told = names.get_name(f"model.layers.{i}.mlp.experts.{part}_proj")
                experts[where, part] = told
        return Base(self.folder, family, self.config, modules, experts, self.shapes)


# Orders of rows


def _index(base: Base, rows: int, *shape: int) -> Tensor:
    """The numbers of the rows in this shape, of which one size is open (-1)."""
    known = 1
    for size in shape:
        known *= abs(size)
    if rows % known:
        raise AdapterFileError(
            f"{rows} rows do not go into {known} by the heads in {base.folder / 'config.json'}; "
            "give the base that the adapter was made for"
        )
    return torch.arange(rows).view(shape)


def _pairs(base: Base, rows: int, heads: int) -> Tensor:
    """Rotary embeddings turn neighbours in llama.cpp, and halves of a head in transformers."""
    return _index(base, rows, heads, 2, -1).transpose(1, 2).reshape(-1)


def _query(base: Base, rows: int) -> Tensor:
    return _pairs(base, rows, base.heads())


def _key(base: Base, rows: int) -> Tensor:
    return _pairs(base, rows, base.kv_heads())


def _multi_query(base: Base, rows: int) -> Tensor:
    if not base.config.get("multi_query", True):
        raise AdapterFileError(
            f"{base.folder / 'config.json'}: multi_query is false, expected true: llama.cpp has no "
            "other gpt_bigcode"
        )
    return torch.arange(rows)


def _head_by_head(base: Base, rows: int) -> Tensor:
    """Each head's query, key and value: all queries, then all keys, then all values."""
    return _index(base, rows, base.heads(), 3, -1).transpose(0, 1).reshape(-1)


def _falcon(base: Base, rows: int) -> Tensor:
    """The same of groups, of several queries each, with one key and one value."""
    heads = base.heads()
    if base.config.get("new_decoder_architecture"):
        groups = base.number("num_kv_heads", "n_head_kv", default=heads)
    else:
        groups = 1 if base.config.get("multi_query", True) else heads
    each = heads // groups + 2
    index = _index(base, rows, groups, each, -1)
    return torch.cat(
        [index[:, :-2].reshape(-1), index[:, -2].reshape(-1), index[:, -1].reshape(-1)]
    )


_ATTENTION = tuple(f"self_attn.{one}_proj" for one in "qkvo")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LLAMA = (*_ATTENTION, *_GATED)
_ROTARY: dict[str, Order] = {"q_proj": _query, "k_proj": _key}
_EXPERTS = ("mlp.experts", "gate_proj", "up_proj", "down_proj")
_SHARED = tuple(f"mlp.shared_expert.{one}_proj" for one in ("gate", "up", "down"))
_BLOOM = (
    *("self_attention.query_key_value", "self_attention.dense"),
    *("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
)
_WTE = ("transformer.wte", "lm_head")
_GPT2 = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")

# By model_type.
FAMILIES: dict[str, Family] = {
    **{
        kind: Family(arch, _LLAMA, orders=_ROTARY)
        for kind, arch in {
            **{"llama": "llama", "mistral": "llama", "smollm3": "smollm3"},
            **{"granite": "granite", "olmo": "olmo"},
        }.items()
    },
    **{
        kind: Family(arch, _LLAMA)
        for kind, arch in {
            **{"qwen2": "qwen2", "qwen3": "qwen3", "seed_oss": "seed_oss"},
            **{"olmo2": "olmo2", "stablelm": "stablelm"},
        }.items()
    },
    **{
        kind: Family(arch, _LLAMA, tied=True)
        for kind, arch in {
            **{"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"},
            **{"cohere": "command-r", "cohere2": "cohere2"},
        }.items()
    },
    "mixtral": Family(
        "llama",
        (*_ATTENTION, "mlp.gate", "block_sparse_moe.gate"),
        orders=_ROTARY,
        experts="mlp.experts",
        one_by_one=("block_sparse_moe.experts", "w1", "w3", "w2"),
    ),
    "qwen2_moe": Family(
        "qwen2moe",
        (*_ATTENTION, "mlp.gate", *_SHARED),
        experts="mlp.experts",
        one_by_one=_EXPERTS,
    ),
    **{
        kind: Family(arch, (*_ATTENTION, "mlp.gate"), experts="mlp.experts", one_by_one=_EXPERTS)
        for kind, arch in {"qwen3_moe": "qwen3moe", "olmoe": "olmoe"}.items()
    },
    "phi": Family("phi2", (*_ATTENTION[:3], "self_attn.dense", "mlp.fc1", "mlp.fc2")),
    "phi3": Family(
        "phi3", ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ),
    "starcoder2": Family("starcoder2", (*_ATTENTION, "mlp.c_fc", "mlp.c_proj"), tied=True),
    "gpt2": Family("gpt2", _GPT2, _WTE, "transformer.h", transposed=True, tied=True),
    "gpt_bigcode": Family(
        "starcoder", _GPT2, _WTE, "transformer.h", {"c_attn": _multi_query}, tied=True
    ),
    "gpt_neox": Family(
        "gptneox",
        ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        ("gpt_neox.embed_in", "lm_head", "embed_out"),
        "gpt_neox.layers",
        {"query_key_value": _head_by_head},
    ),
    "bloom": Family(
        "bloom",
        _BLOOM,
        ("transformer.word_embeddings", "lm_head"),
        "transformer.h",
        {"query_key_value": _head_by_head},
        tied=True,
    ),
    "falcon": Family(
        "falcon",
        _BLOOM,
        ("transformer.word_embeddings", "lm_head"),
        "transformer.h",
        {"query_key_value": _falcon},
        tied=True,
    ),
}
