"""llama.cpp's file as an adapter in PEFT's terms; see gguf.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_ext.arguments import short, warn
from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.formats import LoadedAdapter
from lora_ext.io.convert.gguf_experts import join_experts
from lora_ext.io.convert.gguf_file import GgufFile, open_gguf
from lora_ext.io.convert.gguf_keys import A_END, ALPHA, B_END, GENERAL, TEXTS, TOKENS, WEIGHT
from lora_ext.io.convert.gguf_names import EMBEDDING, Base
from lora_ext.io.convert.gguf_pairs import PREFIX, Pair, ends_of

_UINT32 = 4


def read_adapter(path: Path, base: Base) -> LoadedAdapter:
    """
    Raises:
        AdapterFileError: it is no whole and well-formed adapter, or one of another base; names the
            tensor. Nothing of the tensors' size is allocated before all was checked.
    """
    with open_gguf(path) as file:
        _check_values(file, base)
        shapes = _shapes_of_pairs(file)
        stacks, modules = {}, {}
        for name, (A, B) in shapes.items():
            if name in base.experts.values():
                _check_stack(file, name, A, B, base)
            else:
                with _names(file, name + WEIGHT):
                    modules[name] = base.module_of(name)
                    _check_pair(file, name, modules[name], A, B, base)
        alpha = float(file.values.get(ALPHA, 0.0))
        pairs: dict[str, Pair] = {}
        for name, (_, B) in shapes.items():
            left, right = (file.tensor(f"{name}{WEIGHT}{end}") for end in (A_END, B_END))
            pair = Pair(left, right, alpha / B[-1] if alpha else 1.0)
            if name in modules:
                pairs[modules[name]] = _as_module(pair, name, modules[name], base)
            else:
                stacks[name] = pair
        with _names(file, "experts"):
            experts = join_experts(stacks, base)
        return _adapter(file.values, alpha, pairs, experts, base)


@contextmanager
def _names(file: GgufFile, what: str) -> Iterator[None]:
    """Puts the file, and what of it, before what does not fit the base."""
    try:
        yield
    except AdapterFileError as error:
        before = "" if str(error).startswith(file.path) else f"{file.path}: {short(what)}: "
        raise AdapterFileError(f"{before}{error}") from None


def _check_values(file: GgufFile, base: Base) -> None:
    for key, value in (GENERAL | {"general.architecture": base.family.arch}).items():
        if file.values.get(key) != value:
            cure = ""
            if key == "general.architecture":
                cure = f", that of {base.folder}; give the base that the adapter was made for"
            elif file.values.get(key) == "model" or key not in file.values:
                cure = "; this is no adapter but a model"
            raise AdapterFileError(
                f"{file.path}: {key} is {short(file.values.get(key))}, expected {value!r}{cure}"
            )
    alpha = file.values.get(ALPHA, 0.0)
    if not isinstance(alpha, float) or not abs(alpha) < 1e30:
        raise AdapterFileError(f"{file.path}: {ALPHA} is {short(alpha)}, expected a number")
    if TOKENS in file.types and file.types[TOKENS] != _UINT32:
        raise AdapterFileError(
            f"{file.path}: {TOKENS} is an array of type {file.types[TOKENS]}, expected UINT32 "
            "(4), without which llama.cpp does not load it"
        )
    if TOKENS in file.values and not isinstance(file.values[TOKENS], tuple):
        raise AdapterFileError(f"{file.path}: {TOKENS} is no array")
    for key in TEXTS.values():
        if not isinstance(file.values.get(key, ""), str):
            raise AdapterFileError(f"{file.path}: {key} is no text")


def _shapes_of_pairs(file: GgufFile) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """A's and B's, by the name of the base's tensor without ".weight"."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    norms = []
    for name, tensor in file.tensors.items():
        end = next((end for end in (A_END, B_END) if name.endswith(WEIGHT + end)), None)
        if end is not None:
            found.setdefault(name.removesuffix(WEIGHT + end), {})[end] = tensor.shape
        elif name.endswith("_norm.weight"):
            norms.append(name)
        else:
            raise AdapterFileError(
                f"{file.path}: {short(name)} does not end in .weight.lora_a or .weight.lora_b; it "
                "is no tensor of an adapter"
            )
    if norms:
        warn(
            f"{file.path}: {len(norms)} weights of norms, such as {short(norms[0])}, are left out, "
            "as by llama.cpp"
        )
    for name, parts in found.items():
        if len(parts) != 2:
            (end,) = parts
            raise AdapterFileError(
                f"{file.path}: {short(name + WEIGHT)} has {end} alone, expected {A_END} and {B_END}"
            )
    if not found:
        raise AdapterFileError(f"{file.path}: has no tensors of an adapter")
    return {name: (parts[A_END], parts[B_END]) for name, parts in found.items()}


def _check_pair(
    file: GgufFile, name: str, module: str, A: tuple[int, ...], B: tuple[int, ...], base: Base
) -> None:
    what = f"{file.path}: {short(name + WEIGHT)}"
    embedding = name == EMBEDDING
    if len(A) != 2 or len(B) != 2 or A[1 if embedding else 0] != B[1]:
        raise AdapterFileError(
            f"{what}: {A_END} is {list(A)} and {B_END} {list(B)}, expected "
            f"{'[vocabulary, r]' if embedding else '[r, in]'} and [out, r]"
        )
    base.check_weight(module, A[0 if embedding else 1], B[0], embedding)
    base.order(module, B[0])


def _check_stack(
    file: GgufFile, name: str, A: tuple[int, ...], B: tuple[int, ...], base: Base
) -> None:
    E = base.count_of_experts()
    if len(A) != 3 or len(B) != 3 or A[0] != E or B[0] != E or A[1] != B[2]:
        raise AdapterFileError(
            f"{file.path}: {short(name + WEIGHT)}: {A_END} is {list(A)} and {B_END} {list(B)}, "
            f"expected [{E}, r, in] and [{E}, out, r]"
        )


def _as_module(pair: Pair, name: str, module: str, base: Base) -> Pair:
    if name == EMBEDDING:
        return Pair(pair.A.T.contiguous(), pair.B, pair.scaling, True)
    order = base.order(module, pair.B.shape[0])
    if order is None:
        return pair
    return Pair(pair.A, pair.B[torch.argsort(order)], pair.scaling)


def _adapter(
    values: Mapping[str, Any],
    alpha: float,
    pairs: Mapping[str, Pair],
    experts: Mapping[str, Mapping[str, Pair]],
    base: Base,
) -> LoadedAdapter:
    """PEFT's config and tensors: what is in a block of experts is named by its parameters, since
    PEFT takes names of modules there for those of experts."""
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Pair] = {}
    parameters: dict[str, Pair] = {}
    for module, pair in pairs.items():
        of_parameter = bool(base.experts) and ".mlp." in module
        parameters.update({f"{module}.weight": pair} if of_parameter else {})
        modules.update({} if of_parameter else {module: pair})
        ends = ("lora_embedding_A", "lora_embedding_B")
        if not pair.embedding:
            ends = ("lora_A.weight", "lora_B.weight")
        tensors |= {
            f"{PREFIX}{module}.{end}": t for end, t in zip(ends, (pair.A, pair.B), strict=True)
        }
    for module, own in experts.items():
        for depth, (parameter, pair) in enumerate(reversed(list(own.items()))):
            parameters[f"{module}.{parameter}"] = pair
            where = f"{PREFIX}{module}.{'base_layer.' * depth}"
            tensors |= {f"{where}lora_A.weight": pair.A, f"{where}lora_B.weight": pair.B}
    count = base.count_of_experts() if experts else 1
    stacked = {f"{module}.{name}" for module, own in experts.items() for name in own}
    ranks = {
        name: pair.rank // (count if name in stacked else 1)
        for name, pair in (modules | parameters).items()
    }
    alphas = {n: _alpha(pair, ranks[n], alpha) for n, pair in (modules | parameters).items()}
    r, lora_alpha = _most_common(ranks.values()), _plain(alpha or _most_common(alphas.values()))
    known = [f"{module}.{p}" for module, _ in base.experts for p in ("gate_up_proj", "down_proj")]
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": base.family.transposed,
        "target_modules": ends_of(modules, base.modules),
        "rank_pattern": {name: one for name, one in ranks.items() if one != r},
        "alpha_pattern": {
            name: _plain(one) for name, one in alphas.items() if _plain(one) != lora_alpha
        },
    }
    if parameters:
        config["target_parameters"] = _ends_of_parameters(parameters, base, known)
    if values.get(TOKENS):
        config["alora_invocation_tokens"] = list(values[TOKENS])
    for field, key in TEXTS.items():
        if key in values:
            config[field] = values[key]
    return LoadedAdapter(config, tensors)


def _alpha(pair: Pair, r: int, alpha: float) -> float:
    """lora_alpha of a pair: the file's, where that is it."""
    own = pair.scaling * r
    return alpha if math.isclose(own, alpha, rel_tol=1e-12) else own


def _ends_of_parameters(chosen: Mapping[str, Pair], base: Base, known: list[str]) -> list[str]:
    """By what is below a layer, where every layer has it."""
    known = known + [f"{module}.weight" for module in base.modules if ".mlp." in module]
    below: dict[str, set[str]] = {}
    for name in known:
        below.setdefault(_below_layer(name, base), set()).add(name)
    ends = {_below_layer(name, base) for name in chosen}
    whole = {end for end in ends if below.get(end, set()) <= chosen.keys()}
    return sorted(whole | {name for name in chosen if _below_layer(name, base) not in whole})


def _below_layer(name: str, base: Base) -> str:
    return name.removeprefix(f"{base.family.layers}.").partition(".")[2]


def _most_common(numbers: Any) -> Any:
    found = list(numbers)
    return max(dict.fromkeys(found), key=found.count)


def _plain(number: float) -> float:
    """Whole numbers as such: what people write into configs."""
    return int(number) if number == int(number) else number
