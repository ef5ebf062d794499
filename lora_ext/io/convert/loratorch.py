"""LoRA-Torch's checkpoints: `<path>.w_lora_A` and `<path>.w_lora_B`, and those of an attention's
projections, as its `lora_state_dict` gives them, in a safetensors file.

An attention's fused projection has one lora_A and one lora_B [3 E, r], named after those of q, k
and v that were enabled; all its rows were trained and count, as in LoRA-Torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.alphas import alpha_of
from lora_ext.io.convert.formats import Format, LoadedAdapter, Options
from lora_ext.io.convert.loralib import Matrices, described, narrowed
from lora_ext.io.convert.pairs import (
    OUT_PROJ,
    Pair,
    as_adapter,
    as_pairs,
    by_suffix,
    check_names,
    is_embedding,
    refuse_dora_and_bias,
    refuse_whole,
    with_one_alpha,
)
from lora_ext.io.convert.tensor_file import Contents, contents, recogniser, size_of, write_file
from lora_ext.io.files import short

KEY = re.compile(r"(?:(?P<name>.+)\.)?(?P<part>w|q?k?v?|o)_lora_(?P<what>[AB])")


def _read(path: Path, options: Options) -> LoadedAdapter:
    found = contents(path)
    modules: dict[str, dict[str, str]] = {}  # parts to the stems of their keys
    biases = []
    for key in found.specs:
        if match := KEY.fullmatch(key):
            if match["name"] is None:
                found.refuse(key, "is of a layer without a name; save the model that it is in")
            modules.setdefault(match["name"], {})[match["part"]] = key[:-1]
        elif key.endswith(".bias"):
            found.shape(key)
            biases.append(key)
        else:
            found.refuse(
                key,
                "is neither of a layer's lora_A and lora_B nor a bias (in_proj_bias has no place "
                "in PEFT's files); save lora_state_dict(model), with bias='none'",
            )
    if not modules:
        raise AdapterFileError(f"{path}: has no w_lora_A; save lora_state_dict(model)")
    check_names(modules, options, str(path))
    plain, attentions = list[Matrices](), dict[str, dict[str, str]]()
    for name, parts in modules.items():
        if parts.keys() == {"w"}:
            plain.append(_described(found, name, parts["w"], options))
        else:
            _check_attention(found, name, parts)
            attentions[name] = parts
    alpha = alpha_of(options, found.metadata, str(path))
    tensors = found.tensors()
    pairs = [_pair(one, tensors, alpha) for one in plain]
    for name, parts in attentions.items():
        pairs += _projections(name, parts, tensors, alpha)
    return as_adapter(pairs, options, {key: tensors[key] for key in biases}, str(path))


def _described(found: Contents, name: str, stem: str, options: Options) -> Matrices:
    A, B = f"{stem}A", f"{stem}B"
    if not is_embedding(name, options):
        return described(found, name, A, B, options)
    size_A, size_B = found.matrix(A, B), found.matrix(B, A)
    if size_A[0] != size_B[1]:
        found.refuse(A, f"got {size_A[0]} rows, expected the {size_B[1]} columns of lora_B")
    layer = options.modules.get(name)
    if layer is not None and layer.shape not in (None, (size_B[0], size_A[1])):
        found.refuse(B, f"got {list(size_B)}, the base's weight is {list(layer.shape or ())}")
    return Matrices(name, A, B, embedding=True)


def _pair(one: Matrices, tensors: dict[str, Tensor], alpha: float) -> Pair:
    A, B = tensors[one.A], tensors[one.B]
    # An embedding's weight is [V, d] here too, and B A its update: the roles are swapped.
    return (
        one.pair(B.t().contiguous(), A.t().contiguous(), alpha)
        if one.embedding
        else one.pair(A, B, alpha)
    )


def _check_attention(found: Contents, name: str, parts: dict[str, str]) -> None:
    if "w" in parts:
        found.refuse(f"{parts['w']}A", "is of a layer, others of this name of an attention")
    sizes = {}
    for part, stem in parts.items():
        a, b = found.matrix(f"{stem}A", f"{stem}B"), found.matrix(f"{stem}B", f"{stem}A")
        if a[0] != b[1]:
            found.refuse(f"{stem}A", f"got {a[0]} rows, expected the {b[1]} columns of lora_B")
        sizes[part] = a, b
    fused = [part for part in parts if part != "o" and sizes[part][1][0] == 3 * sizes[part][0][1]]
    single = [part for part in parts if part != "o" and part not in fused]
    if any(len(part) != 1 for part in single) or len(fused) + bool(single) > 1:
        part = (single or fused)[-1]
        found.refuse(
            f"{parts[part]}B",
            f"got {list(sizes[part][1])} with lora_A {list(sizes[part][0])}: neither of a fused "
            "projection (3 x embed_dim rows) nor of one of q, k and v",
        )
    widths = {sizes[part][1][0] // (3 if part in fused else 1) for part in parts}
    if len(widths) > 1:
        found.refuse(f"{name}.{next(iter(parts))}_lora_B", "its projections have several widths")


def _projections(
    name: str, parts: dict[str, str], tensors: dict[str, Tensor], alpha: float
) -> Iterator[Pair]:
    fused = None
    for part, stem in parts.items():
        A, B = tensors[f"{stem}A"], tensors[f"{stem}B"]
        if part != "o" and B.shape[0] == 3 * A.shape[1]:
            fused = A
            yield Pair(name, A, B, alpha)
        elif part == "o":
            yield Pair(name + OUT_PROJ, A, B, alpha)
        else:
            yield Pair(name, A, B, alpha, part=f"{part}_")
    if fused is not None and "o" not in parts:  # PEFT's has both; zeros add nothing
        width = fused.shape[1]
        yield Pair(
            name + OUT_PROJ,
            fused.new_zeros(fused.shape[0], width),
            fused.new_zeros(width, fused.shape[0]),
            alpha,
        )


def _write(path: Path, adapter: LoadedAdapter, options: Options) -> None:
    wide, others = as_pairs(adapter, str(path))
    refuse_dora_and_bias(wide, path)
    refuse_whole(others, path, biases=True)
    attentions = {pair.name.removesuffix(OUT_PROJ) for pair in wide if pair.name.endswith(OUT_PROJ)}
    attentions |= {pair.name for pair in wide if pair.part}
    named = {}
    for pair in wide:
        name = pair.name.removesuffix(OUT_PROJ)
        if name not in attentions:
            named[f"{name}.w"] = narrowed(pair, options, path)
        elif name != pair.name:
            if not bool(pair.A.any() or pair.B.any()):
                continue  # not adapted
            named[f"{name}.o"] = pair
        else:
            named[f"{name}.{pair.part[:1] or _enabled(name, options, path)}"] = pair
    pairs, alpha = with_one_alpha(named.values(), options, path)
    tensors = {}
    for stem, pair in zip(named, pairs, strict=True):
        A, B = (pair.B.t(), pair.A.t()) if pair.embedding else (pair.A, pair.B)
        tensors[f"{stem}_lora_A"], tensors[f"{stem}_lora_B"] = A, B
    write_file(path, {**tensors, **others}, {"lora_alpha": repr(alpha)})


def _enabled(name: str, options: Options, path: Path) -> str:
    """The name of a fused projection: all of q, k and v unless the caller says which."""
    given = by_suffix(options.slices, name)
    if given is None:
        return "qkv"
    if len(given) != 3 or not all(one in (True, False) for one in given):
        raise AdapterFileError(
            f"{path}: {short(name)}: slices: got {given!r:.60}, expected three of True and False, "
            "for q, k and v"
        )
    return "".join(letter for letter, own in zip("qkv", given, strict=True) if own)


LORATORCH = Format(
    about="a file of LoRA-Torch's lora_state_dict()",
    asks=frozenset({"alpha", "slices"}),
    recognises=recogniser(lambda key: KEY.fullmatch(key) is not None),
    bytes_of=size_of(),
    read=_read,
    write=_write,
)
