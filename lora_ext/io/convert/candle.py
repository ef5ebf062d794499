"""candle-lora's files: `{prefix}.a{id}.weight` and `{prefix}.b{id}.weight`, as its `get_tensors`
gives them.

A prefix is the place of the module, or of what the module is a field of, and a name that the model
gave its conversion. Ids count the fields of one conversion in an order that changes with each run,
so where there are several the caller says which is which.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.alphas import alpha_of
from lora_ext.io.convert.convolutions import full, grouped
from lora_ext.io.convert.formats import Format, LoadedAdapter, Options
from lora_ext.io.convert.pairs import (
    Pair,
    as_adapter,
    as_pairs,
    check_names,
    is_embedding,
    refuse_dora_and_bias,
    refuse_whole,
    with_one_alpha,
)
from lora_ext.io.convert.tensor_file import Contents, contents, recogniser, size_of, write_file
from lora_ext.io.files import short

KEY = re.compile(r"(?:(?P<prefix>.+)\.)?(?P<what>[ab])(?P<id>0|[1-9][0-9]{0,8})\.weight")
# Names of conversions: of the module that they are below, as lora_linear and traced_lora_embed,
_CONVERSION = re.compile(r"(traced_)?lora_\w+")
# of one of its fields,
_OF_FIELD = {
    f"lora_{field}": field
    for field in ("qkv", "proj", "fc1", "fc2", "head", "query_key_value", "dense")
}
# and of all fields of it.
_OF_ALL = frozenset({"lora_llama", "lora_llama_block", "lora_llama_csa", "lora_falcon"})
_KINDS = {3: "conv1d", 4: "conv2d"}  # by the dimensions of lora_A
Shapes = tuple[tuple[int, ...], tuple[int, ...]]  # of a and b


@dataclass(frozen=True)
class _Place:
    """A prefix with one id: the module it is, or is in."""

    prefix: str
    id: str

    @property
    def path(self) -> tuple[str, str]:
        """The prefix without the name of the conversion, and that name."""
        above, _, last = self.prefix.rpartition(".")
        return (above, last) if _CONVERSION.fullmatch(last) else (self.prefix, "")

    def field_by(self, ids: dict[str, str]) -> str | None:
        """What a caller says of it: by its whole prefix, by the end of that, or by the id."""
        parts = self.prefix.split(".") if self.prefix else []
        ends = (".".join([*parts[at:], self.id]) for at in range(len(parts) + 1))
        return next((ids[end] for end in ends if end in ids), None)

    def key(self, what: str) -> str:
        return f"{self.prefix}.{what}{self.id}.weight".lstrip(".")


def _joined(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _read(path: Path, options: Options) -> LoadedAdapter:
    found = contents(path)
    places: dict[_Place, None] = {}
    for key in found.specs:
        match = KEY.fullmatch(key)
        if match is None:
            found.refuse(key, "is no candle-lora name (PREFIX.a0.weight); save get_tensors()")
        places[_Place(match["prefix"] or "", match["id"])] = None
    shapes = {place: _shapes(found, place) for place in places}
    names = _names(found, shapes, options)
    check_names(names.values(), options, str(path))
    for place, name in names.items():
        _check(found, place, name, shapes[place], options)
    alpha = alpha_of(options, found.metadata, str(path))
    tensors = found.tensors()
    pairs = [
        _pair(name, place, tensors[place.key("a")], tensors[place.key("b")], alpha, options)
        for place, name in names.items()
    ]
    return as_adapter(pairs, options, where=str(path))


def _shapes(found: Contents, place: _Place) -> Shapes:
    a, b = place.key("a"), place.key("b")
    A, B = found.shape(a, b), found.shape(b, a)
    fits = len(A) == len(B) == 2 and A[0] == B[1]
    if len(A) == len(B) == 4:
        fits = A[0] % B[1] == 0 and B[0] % (A[0] // B[1]) == 0 and B[2:] == (1, 1)
    if not fits:
        found.refuse(b, f"got {list(B)} with {short(a)} {list(A)}, expected one rank in both")
    return A, B


def _names(found: Contents, shapes: dict[_Place, Shapes], options: Options) -> dict[_Place, str]:
    """The module of each pair."""
    groups: dict[str, list[_Place]] = {}
    for place in shapes:
        groups.setdefault(place.prefix, []).append(place)
    names: dict[_Place, str] = {}
    for places in groups.values():
        above, last = places[0].path
        unknown = []
        for place in places:
            if (field := place.field_by(dict(options.ids))) is not None:
                names[place] = _joined(above, field)
            elif len(places) == 1 and last not in _OF_ALL and (above or last in _OF_FIELD):
                names[place] = _joined(above, _OF_FIELD.get(last, ""))
            else:
                unknown.append(place)
        if unknown:
            names |= _by_shape(found, above, unknown, set(names.values()), shapes, options)
    seen: dict[str, _Place] = {}
    for place, name in names.items():
        if not name or seen.setdefault(name, place) != place:
            found.refuse(place.key("a"), f"is of the module {name!r}, as is another; check ids")
    return names


def _by_shape(
    found: Contents,
    above: str,
    places: list[_Place],
    taken: set[str],
    shapes: dict[_Place, Shapes],
    options: Options,
) -> dict[_Place, str]:
    """Fields of a module of the base, where sizes leave no choice."""
    names: dict[_Place, str] = {}
    start = f"{above}." if above else ""
    for place in places:
        A, B = shapes[place]
        fitting = [
            name
            for name, layer in options.modules.items()
            if name.startswith(start) and "." not in name[len(start) :] and name not in taken
            if layer.shape == ((A[1], B[0]) if layer.kind == "embedding" else (B[0], *A[1:]))
        ]
        if len(fitting) != 1 or fitting[0] in names.values():
            ids = ", ".join(one.id for one in places[:8])
            said = _joined(place.prefix.rpartition(".")[2], place.id)
            could = f" (it could be {', '.join(fitting[:6])})" if fitting else ""
            found.refuse(
                place.key("a"),
                f"does not say which field of {short(above)} it is{could}: give ids={{'{said}': "
                f"'q_proj'}}, say (--id), for each of the ids {ids}; candle-lora "
                "numbers fields anew in each run",
            )
        names[place] = fitting[0]
    return names


def _check(
    found: Contents,
    place: _Place,
    name: str,
    shapes: Shapes,
    options: Options,
) -> None:
    """Whether the base's module takes it."""
    (A, B), layer = shapes, options.modules.get(name)
    shape = None if layer is None else layer.shape
    if shape is None or len(A) == 4 or len(shape) == 2:
        fitting = [(A[1], B[0]), (B[0], *A[1:])]
        if shape is None or shape in fitting:
            return
    elif len(shape) == 3 and shape[2] == 1 and shape[:2] == (B[0], A[1]):
        return
    what = "a Conv1d of a kernel above 1 is wrong there" if len(shape) == 3 else "check ids"
    found.refuse(
        place.key("b"), f"{list(B)} and {list(A)} are no update of {name!r} {list(shape)}; {what}"
    )


def _pair(name: str, place: _Place, A: Tensor, B: Tensor, alpha: float, options: Options) -> Pair:
    layer = options.modules.get(name)
    if layer is not None and layer.shape is not None and len(layer.shape) == 3 and A.dim() == 2:
        return Pair(name, A[..., None], B[..., None], alpha)
    if A.dim() == 4:
        return Pair(name, full(A, A.shape[0] // B.shape[1]), B, alpha)
    known = layer is not None and layer.kind is not None
    embedding = is_embedding(name, options) or (not known and "embed" in place.path[1])
    return Pair(name, A, B, alpha, embedding)


def _write(path: Path, adapter: LoadedAdapter, options: Options) -> None:
    wide, others = as_pairs(adapter, str(path))
    refuse_dora_and_bias(wide, path)
    refuse_whole(others, path)
    pairs, alpha = with_one_alpha(wide, options, path)
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        place, A, B = _placed(pair, options), pair.A, pair.B
        if A.dim() == 3 and A.shape[2] == 1:
            A, B = A[..., 0], B[..., 0]
        elif A.dim() == 4:
            own = grouped(A, pair.rank // B.shape[1])
            if own is None:
                raise AdapterFileError(
                    f"{path}: {short(pair.name)}: its lora_A links channels of different groups, "
                    "which candle-lora's does not"
                )
            A = own
        if pair.part or ".base_layer" in pair.name or A.dim() not in (2, 4):
            kind = "attention" if A.dim() == 2 else f"convolution in {A.dim() - 2} dimensions"
            raise AdapterFileError(
                f"{path}: {short(pair.name)}: candle-lora has no {kind} that works; "
                "merge the adapter instead (lora-ext merge)"
            )
        if place.key("a") in tensors:
            raise AdapterFileError(
                f"{path}: {short(pair.name)}: ids give it the name of another, "
                f"{short(place.key('a'))}"
            )
        tensors[place.key("a")], tensors[place.key("b")] = A, B
    write_file(path, tensors, {"lora_alpha": repr(alpha)})


def _placed(pair: Pair, options: Options) -> _Place:
    """Under which prefix and id a module is written: as ids say, else alone and by its kind."""
    kind = "embed" if pair.embedding else _KINDS.get(pair.A.dim(), "linear")
    return next(_said(pair.name, kind, options), _Place(f"{pair.name}.lora_{kind}", "0"))


def _said(name: str, kind: str, options: Options) -> Iterator[_Place]:
    for said, field in options.ids.items():
        prefix, _, number = said.rpartition(".")
        conversion = prefix.rpartition(".")[2]
        other = any(word in conversion for word in {"linear", "embed", *_KINDS.values()} - {kind})
        if not number.isdecimal() or (not field and (other or not prefix)):
            continue
        if field and name != field and not name.endswith(f".{field}"):
            continue
        above = name[: len(name) - len(field)].rstrip(".") if field else name
        inner, last = _Place(prefix, number).path
        if f".{above}".endswith(f".{inner}" if inner else ""):
            yield _Place(_joined(above, last), number)


CANDLE = Format(
    about="a file of candle-lora's get_tensors()",
    asks=frozenset({"alpha", "ids"}),
    recognises=recogniser(lambda key: KEY.fullmatch(key) is not None),
    bytes_of=size_of(),
    read=_read,
    write=_write,
)
