"""loralib's checkpoints: `<path>.lora_A` and `<path>.lora_B`, as `lora_state_dict` gives them, in a
safetensors file."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.alphas import alpha_of
from lora_ext.io.convert.convolutions import as_product, from_product, sizes_fit
from lora_ext.io.convert.formats import Format, LoadedAdapter, Options
from lora_ext.io.convert.pairs import (
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
from lora_ext.io.convert.slices import Slices, block_diagonal, blocks_of, slices_of
from lora_ext.io.convert.tensor_file import Contents, contents, recogniser, size_of, write_file
from lora_ext.io.files import short

KEY = re.compile(r"(?:(?P<name>.+)\.)?lora_(?P<what>[AB])")


@dataclass(frozen=True)
class Matrices:
    """What a pair of matrices is an update of.

    Attributes:
        name: the module's.
        A, B: their keys.
        slices: of a MergedLinear.
        shape: of a convolution's weight; None is another layer.
        groups: of a convolution.
        embedding: whether it is one.
    """

    name: str
    A: str
    B: str
    slices: Slices | None = None
    shape: tuple[int, ...] | None = None
    groups: int = 1
    embedding: bool = False

    def pair(self, A: Tensor, B: Tensor, alpha: float) -> Pair:
        """PEFT's, where this file's layers have been made with `alpha`."""
        if self.slices is not None:
            wide = block_diagonal(B, self.slices)
            return Pair(self.name, A, wide, alpha * self.slices.count)
        if self.shape is not None:
            r = A.shape[0] // self.shape[-1]
            wide_A, wide_B = from_product(A, B, self.shape, self.groups)
            return Pair(self.name, wide_A, wide_B, alpha * wide_A.shape[0] / r)
        return Pair(self.name, A, B, alpha, self.embedding)


def described(found: Contents, name: str, A: str, B: str, options: Options) -> Matrices:
    """What a pair of this name is, by the shapes and what the caller says.

    Raises:
        AdapterFileError: the shapes do not fit, or leave it open.
    """
    size_A, size_B = found.matrix(A, B), found.matrix(B, A)
    layer, one = options.modules.get(name), Matrices(name, A, B)
    shape = None if layer is None else layer.shape
    if layer is not None and layer.kind == "conv" and shape is not None:
        if not sizes_fit(shape, layer.groups, size_A, size_B):
            found.refuse(
                B, f"{list(size_B)} and lora_A {list(size_A)} are no update of {list(shape)}"
            )
        return replace(one, shape=shape, groups=layer.groups)
    where, r = f"{found.path}: {short(name)}", size_B[1]
    if size_A[0] % r:
        found.refuse(A, f"got {size_A[0]} rows, expected a multiple of the {r} columns of lora_B")
    if (given := by_suffix(options.slices, name)) is not None:
        slices = slices_of(given, where, rows=size_B[0])
        if slices.count * r != size_A[0]:
            found.refuse(A, f"got {size_A[0]} rows, expected {slices.count} x {r}, by the slices")
        total = sum(slices.sizes)
        if shape is not None and _rows(found, B, shape, size_A[1], total) != total:
            found.refuse(B, f"its slices have {total} rows, the base's weight is {list(shape)}")
        return replace(one, slices=slices)
    n = size_A[0] // r
    rows = None if shape is None else _rows(found, B, shape, size_A[1], size_B[0])
    if rows is not None and rows < size_B[0]:
        found.refuse(B, f"got {size_B[0]} rows, the base's weight is {list(shape or ())}")
    if n == 1 and rows in (None, size_B[0]):
        embedding = is_embedding(name, options)
        return replace(one, embedding=embedding)
    if rows == size_B[0] and rows % n == 0:  # all slices, of one size
        return replace(one, slices=Slices((rows // n,) * n, (True,) * n))
    found.refuse(
        B,
        f"{n} enabled slice(s) of a MergedLinear, of which the file does not say which they are: "
        f"give slices={{{short(name)}: [True, False, True]}}, say (--slices), or the shapes of the "
        "base (modules=, --base)",
    )


def _rows(found: Contents, B: str, shape: tuple[int, ...], columns: int, rows: int) -> int | None:
    """How many rows the update of a weight of this shape has."""
    if len(shape) != 2:
        return None
    # A linear layer's [out, in], or an embedding's or fan_in_fan_out's [in, out].
    fitting = [a for a, b in (shape, shape[::-1]) if b == columns]
    if not fitting:
        found.refuse(B, f"its lora_A has {columns} columns, the base's weight is {list(shape)}")
    return rows if rows in fitting else fitting[0]


def _read(path: Path, options: Options) -> LoadedAdapter:
    found = contents(path)
    names: dict[str, None] = {}
    biases = {}
    for key in found.specs:
        if match := KEY.fullmatch(key):
            if match["name"] is None:
                found.refuse(key, "is of a layer without a name; save the model that it is in")
            names[match["name"]] = None
        elif key.endswith(".bias"):
            found.shape(key)
            biases[key] = key
        else:
            found.refuse(
                key, "is neither of a layer's lora_A and lora_B nor a bias; save lora_state_dict()"
            )
    if not names:
        raise AdapterFileError(f"{path}: has no lora_A; save loralib's lora_state_dict(model)")
    check_names(names, options, str(path))
    matrices = [
        described(found, name, f"{name}.lora_A", f"{name}.lora_B", options) for name in names
    ]
    alpha = alpha_of(options, found.metadata, str(path))
    tensors = found.tensors()
    convolutions = {one.name for one in matrices if one.shape is not None}
    named = {_plain_bias(key, convolutions): tensors[key] for key in biases}
    pairs = [one.pair(tensors[one.A], tensors[one.B], alpha) for one in matrices]
    return as_adapter(pairs, options, named, str(path))


def _plain_bias(key: str, convolutions: set[str]) -> str:
    """loralib's convolutions hold the layer, with its bias, as `conv`."""
    name = key.removesuffix(".conv.bias")
    return f"{name}.bias" if name != key and name in convolutions else key


def narrowed(pair: Pair, options: Options, where: Path) -> Pair:
    """A pair as loralib's matrices."""
    if pair.part or pair.name.endswith(".base_layer.out_proj"):
        raise AdapterFileError(
            f"{where}: {short(pair.name)}: loralib has no attention; write LoRA-Torch (loratorch)"
        )
    layer = options.modules.get(pair.name)
    if pair.A.dim() > 2:
        groups = _groups(pair, layer.groups if layer is not None else None, where)
        product = as_product(pair.A, pair.B, groups)
        if product is None:
            raise AdapterFileError(
                f"{where}: {short(pair.name)}: this convolution's update (kernel "
                f"{list(pair.A.shape[2:])}, {groups} groups) is no product as loralib has it"
            )
        A, B, r = product
        return replace(pair, A=A, B=B, alpha=pair.alpha * r / pair.rank)
    if (given := by_suffix(options.slices, pair.name)) is None:
        return pair
    name = f"{where}: {short(pair.name)}"
    slices = slices_of(given, name, out=pair.B.shape[0])
    own = None if pair.rank % slices.count else blocks_of(pair.B, slices)
    if own is None:
        raise AdapterFileError(
            f"{name}: its lora_B is not zero outside of the blocks of {list(slices.enabled)}; "
            "leave slices out: it is written as a Linear"
        )
    return replace(pair, B=own, alpha=pair.alpha / slices.count)


def _groups(pair: Pair, known: int | None, where: Path) -> int:
    """Of a convolution, by its lora_B [out, rank / groups, 1, ...]."""
    groups, left = divmod(pair.rank, pair.B.shape[1])
    if left or known not in (None, groups) or pair.B.shape[0] % max(groups, 1):
        raise AdapterFileError(
            f"{where}: {short(pair.name)}: {list(pair.A.shape)} and {list(pair.B.shape)} are no "
            f"update of a convolution{f' with {known} groups' if known else ''}"
        )
    return groups


def _write(path: Path, adapter: LoadedAdapter, options: Options) -> None:
    wide, others = as_pairs(adapter, str(path))
    refuse_dora_and_bias(wide, path)
    refuse_whole(others, path, biases=True)
    convolutions = {pair.name for pair in wide if pair.A.dim() > 2}
    narrow = [narrowed(pair, options, path) for pair in wide]
    pairs, alpha = with_one_alpha(narrow, options, path)
    tensors = {}
    for pair in pairs:
        tensors[f"{pair.name}.lora_A"], tensors[f"{pair.name}.lora_B"] = pair.A, pair.B
    for key, tensor in others.items():
        name = key.removesuffix(".bias")
        tensors[f"{name}.conv.bias" if name in convolutions else key] = tensor
    write_file(path, tensors, {"lora_alpha": repr(alpha)})


LORALIB = Format(
    about="a file of lora_state_dict()",
    asks=frozenset({"alpha", "slices"}),
    recognises=recogniser(lambda key: KEY.fullmatch(key) is not None),
    bytes_of=size_of(),
    read=_read,
    write=_write,
)
