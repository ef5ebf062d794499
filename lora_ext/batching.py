"""Which rows of a batch have which adapter: the plan of one forward of a model, for all its layers.

    with lora_ext.batch(adapters=["french", None, "german"]):
        model(x)

A plan knows names alone. A layer asks it which rows of an input have which of its adapters
(`BatchPlan.assign`); the answer is made once for each shape, not once for each layer. Names that a
layer does not have leave its rows at the base.
"""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from lora_ext._assignment import Assignment, copied, counts_of
from lora_ext._batch_arguments import (
    integers,
    names_of,
    not_as_many,
    places_of,
    rows_of,
    slots_of_gates,
    slots_of_rows,
    strengths_of,
)
from lora_ext.arguments import listed, refuse

__all__ = ["BatchPlan", "Checkpointing", "batch"]

_NEVER = torch.iinfo(torch.int64).max


class Entered(NamedTuple):
    """A plan in a `with`, and the one around it."""

    plan: BatchPlan
    outer: Entered | None


# Of the thread, or of the task of asyncio: others do not see it.
_ENTERED: ContextVar[Entered | None] = ContextVar("lora_ext.batch", default=None)

# Whether any thread has a plan: what layers ask first, and compiled code may ask.
in_use = False
_users = 0
_LOCK = threading.Lock()


def current_plan() -> BatchPlan | None:
    """The plan that layers follow now."""
    if not in_use:
        return None
    entered = _ENTERED.get()
    return None if entered is None else entered.plan


def _enter(entered: Entered) -> None:
    _count(1)
    _ENTERED.set(entered)


def _leave(outer: Entered | None) -> None:
    _ENTERED.set(outer)
    _count(-1)


def _count(users: int) -> None:
    global in_use, _users
    with _LOCK:
        _users += users
        in_use = _users > 0


@contextmanager
def following(plan: BatchPlan) -> Iterator[None]:
    """Within this context layers follow the plan, in a part of what it is for."""
    outer = _ENTERED.get()
    _enter(Entered(plan, outer))
    try:
        yield
    finally:
        _leave(outer)


class Checkpointing:
    """`torch.utils.checkpoint.checkpoint`, or a function like it, so that what it runs again in
    backward follows the plan that it was called under. Gates and scale are inputs of what it runs,
    of which they get their gradients with `use_reentrant=True`, too."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        plan = current_plan()
        if plan is None:
            return self.checkpoint(function, *args, **kwargs)
        followed = plan

        def carried(gates: Tensor | None, scale: Tensor | None, *inputs: Any, **named: Any) -> Any:
            own = followed if gates is None else followed.with_gates(gates)
            with following(own if scale is None else own.with_scale(scale)):
                return function(*inputs, **named)

        return self.checkpoint(carried, plan.gates, plan.scale, *args, **kwargs)


class _Found:
    """What layers that ran have told a plan."""

    def __init__(self) -> None:
        self.asked = False
        self.names: set[str] = set()


class BatchPlan:
    """Made by `batch`; a context manager, in which every layer of `lora_ext.nn` follows it."""

    def __init__(
        self,
        names: Sequence[str],
        slots: Tensor,
        *,
        lengths: Tensor | None = None,
        rows: tuple[int, int] | None = None,
        per_row: bool = False,
        shape: tuple[int, ...] = (),
        gates: Tensor | None = None,
        scale: Tensor | None = None,
        after: Tensor | None = None,
        repeats: bool = False,
        zero_grads: bool = False,
    ) -> None:
        self.names = tuple(names)
        # int64 [.., k], on the CPU: the slots of each request, segment or row, k of them
        self._slots = slots
        self._lengths = lengths
        self._rows = rows
        self._per_row = per_row
        self._shape = shape  # of the rows of ids, or of gates, as they were given
        self._gates = gates  # in the shape of slots, or None
        self._scale = scale
        self._after = after
        self._repeats = repeats
        self._zero_grads = zero_grads
        # Whether an input of fewer rows is of tokens that follow those of the plan, as with a KV
        # cache, or of the last ones (transformers' logits_to_keep).
        self.tokens_follow = True
        # As long as the plan lives: a CUDA graph that was captured reads the rows again.
        self._made: dict[Any, tuple[Assignment, Tensor, Tensor]] = {}
        self._strengths: dict[Any, Tensor] = {}  # of other devices, copied
        self._found = _Found()

    def __repr__(self) -> str:
        kind = "rows" if self._per_row else "requests" if self._lengths is None else "segments"
        return f"BatchPlan({len(self._slots)} {kind}, adapters={listed(self.names)})"

    def __enter__(self) -> Self:
        _enter(Entered(self, _ENTERED.get()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entered = _ENTERED.get()
        if entered is None or entered.plan is not self:
            raise RuntimeError(
                "batch: got the end of a plan that is not the innermost, expected its: use `with`"
            )
        _leave(entered.outer)
        unknown = [name for name in self.names if name not in self._found.names]
        if kind is None and self._found.asked and unknown:
            raise ValueError(
                f"batch: adapters: got {unknown[0]!r}, which no layer that ran has: its rows were "
                "the base's; expected names of adapters of the model, or None for the base"
            )

    @property
    def requests(self) -> int | None:
        """How many, of a plan for requests; None of one for segments or rows."""
        return len(self._slots) if self._lengths is None and not self._per_row else None

    @property
    def has_scale(self) -> bool:
        """Whether rows have strengths."""
        return self._scale is not None or self._gates is not None

    @property
    def mixes(self) -> bool:
        """Whether rows have several adapters, each with a gate."""
        return self._gates is not None

    @property
    def gates(self) -> Tensor | None:
        """The gates, all of them in one tensor: what a checkpoint has to be given as an input."""
        return self._gates

    @property
    def scale(self) -> Tensor | None:
        """The strengths of requests: an input of a checkpoint, too."""
        return self._scale

    def with_gates(self, gates: Tensor) -> BatchPlan:
        """The same plan with other values for the gates, in the shape that they had. What is known
        of rows is shared; what is made of gates and scale is not."""
        assert self._gates is not None
        other = copy.copy(self)
        other._gates = gates.reshape(self._gates.shape)
        other._strengths = {}
        return other

    def with_scale(self, scale: Tensor) -> BatchPlan:
        """The same plan with other strengths, as `with_gates`."""
        other = copy.copy(self)
        other._scale, other._strengths = scale, {}
        return other

    def of(self, layer: object) -> BatchPlan:
        """The plan that one layer follows: this one; a plan with gates of its own for each layer
        has others."""
        return self

    @property
    def has_after(self) -> bool:
        """Whether adapters begin inside of a request."""
        return self._after is not None

    @property
    def says_where(self) -> bool:
        """Whether it says of rows, not of whole requests, which adapter they have."""
        return self._per_row or self.has_after

    def note(self, names: Collection[str]) -> None:
        """A layer, or a module to save, has these adapters."""
        self._found.asked = True
        self._found.names.update(names)

    def assign(
        self,
        leading: Sequence[int],
        device: torch.device,
        names: Collection[str],
        where: str,
        whole: bool = False,
    ) -> Assignment:
        """Which rows of an input with these leading dimensions have which of the adapters `names`,
        those of a layer. `whole`: wherever they begin (`after`), all rows of their requests.

        Raises:
            ValueError: the input does not have the rows that the plan is for, or `whole` requests
                have several adapters; names the layer.
        """
        if whole and self.mixes:
            raise ValueError(
                f"{where}: batch: gates: got a value, expected None: each adapter has a copy of "
                f"what is trained here, and copies are not mixed; leave {listed(self.names)} "
                "without modules_to_save and trainable_token_indices"
            )
        present = tuple([name for name in self.names if name in names])
        key = (tuple(leading), device, present, whole)
        made = self._made.get(key)
        if made is None:
            with torch.inference_mode(False):  # it may be kept for backward later
                made = self._made[key] = self._assign(tuple(leading), device, present, where, whole)
        assignment, owners, gated = made
        if not self.has_scale or not assignment.names:
            return assignment
        # Not kept: its gradient is that of one backward.
        factors = []
        if self._scale is not None:
            factors.append(self._on(device, self._scale).index_select(0, owners))
        if self._gates is not None:
            factors.append(self._on(device, self._gates).flatten().index_select(0, gated))
        factor = factors[0] if len(factors) == 1 else factors[0].double() * factors[1].double()
        return assignment._replace(factor=factor, alone=False)

    def _on(self, device: torch.device, strengths: Tensor) -> Tensor:
        """The scale or the gates there: copied once, but for those that train, whose every copy is
        a node of one backward."""
        if strengths.device == device or strengths.requires_grad:
            return strengths.to(device)
        key = (device, strengths is self._gates)
        if key not in self._strengths:
            with torch.inference_mode(False):
                self._strengths[key] = copied(strengths, device)
        return self._strengths[key]

    def _assign(
        self,
        leading: tuple[int, ...],
        device: torch.device,
        names: Sequence[str],
        where: str,
        whole: bool,
    ) -> tuple[Assignment, Tensor, Tensor]:
        """And of each entry of its order the request, segment or row of the plan, and the place
        of its gate."""
        owners, positions, lengths = self._owners(leading, where, whole)
        slots = self._slots.index_select(0, owners)
        if self._after is not None and not whole:
            after = self._after[owners]
            after = torch.where(after < 0, after + lengths, after)
            slots = torch.where((positions >= after).unsqueeze(1), slots, -1)
        # In the order of `names`; others are the base's.
        place_of = {name: place for place, name in enumerate(names)}
        places = torch.tensor([*(place_of.get(name, -1) for name in self.names), -1], device="cpu")
        slots, columns = places[slots].sort(1)  # -1 is the last place, which is -1
        # In an adapter those rows first for which it is the first one, then the second, ...: no row
        # is twice in such a part, so that its rows are independent.
        k = slots.shape[1]
        before = torch.arange(k, device="cpu") - (slots < 0).sum(1, keepdim=True)
        parts, order = (slots * k + before).flatten().sort(stable=True)
        counts, rounds = counts_of(parts, k, len(names))
        order = order[len(parts) - sum(counts) :]
        rows = order // k
        having = [
            (name, count)
            for name, count in zip(names, counts, strict=True)
            if count or self._zero_grads
        ]
        of, column = owners[rows], columns.flatten()[order]
        told = torch.stack([rows, of, of * k + column]).to(torch.int32)
        rows, of, gated = copied(told, device).unbind(0)
        assignment = Assignment(
            tuple(name for name, _ in having),
            rows,
            tuple(count for _, count in having),
            None,
            len(having) == 1 and len(order) == len(slots),
            rounds,
        )
        return assignment, of, gated

    def _owners(
        self, leading: tuple[int, ...], where: str, whole: bool
    ) -> tuple[Tensor, Tensor, Tensor | int]:
        """The request, segment or row of `ids` that each row of the input is of, its place there,
        and how long that is."""
        total, count = math.prod(leading), len(self._slots)
        if self._per_row or self._lengths is not None:
            ones = torch.ones(count, dtype=torch.int64, device="cpu")
            lengths = ones if self._lengths is None else self._lengths
            if total != int(lengths.sum()):
                what = "lengths" if self._lengths is not None else "gates" if self.mixes else "ids"
                raise ValueError(
                    f"{where}: batch: {what}: got an input of {total} rows, {list(leading)}, "
                    f"expected {int(lengths.sum())}, as many as the plan is for"
                )
            if leading != self._shape and leading == self._shape[::-1]:  # in any other, as packed
                what = "gates" if self.mixes else "ids"
                raise ValueError(
                    f"{where}: batch: {what}: got those of rows {list(self._shape)} for an input "
                    f"whose leading dimensions are {list(leading)}, expected the same order; "
                    "transpose them (MultiheadAttention: requests first, also without batch_first)"
                )
            begins = lengths.cumsum(0) - lengths
            owners = torch.arange(count, device="cpu").repeat_interleave(lengths)
            return owners, torch.arange(total, device="cpu") - begins[owners], lengths[owners]
        sequences = leading[0] if leading else 1
        flat = len(leading) == 1
        if flat and self._rows is not None and total == math.prod(self._rows):
            sequences = count
        elif sequences != count and not (self._repeats and count and sequences % count == 0):
            raise not_as_many(where, leading, count, self.mixes)
        each = total // sequences if sequences else 0
        in_one = flat and each == 1 and (sequences != count or self._rows is None)
        if in_one and self._after is not None and not whole:
            rows = f"{count} or {math.prod(self._rows)}" if self._rows else "[requests, rows, ...]"
            raise ValueError(
                f"{where}: batch: after: got {sequences} rows in one dimension, of which the places"
                f" in their requests cannot be told, expected {rows}; generate with a cache and "
                "without beams, or leave this layer out with exclude_modules"
            )
        owners = torch.arange(count, device="cpu").repeat_interleave(
            sequences // count if count else 0
        )
        positions, length = torch.arange(each, device="cpu"), each
        if self._rows is not None:
            length = self._rows[1]
            if each < length:
                positions = positions + (length if self.tokens_follow else length - each)
        return owners.repeat_interleave(each), positions.repeat(sequences), length


def batch(
    adapters: Sequence[str | None] | None = None,
    *,
    rows: tuple[int, int] | None = None,
    lengths: Sequence[int] | Tensor | None = None,
    ids: Tensor | None = None,
    gates: Tensor | None = None,
    scale: Tensor | Sequence[float] | None = None,
    after: Sequence[int | None] | Tensor | None = None,
    repeats: bool = False,
    zero_grads: bool = False,
) -> BatchPlan:
    """Which adapter each request, segment or row of the next batch has, whatever is active.

    Args:
        adapters: a name for each request; None, or PEFT's "__base__", is the base. With `ids`, the
            names that the numbers stand for. An input's first dimension is that of the requests.
        rows: (requests, rows of each), for inputs that have them in one dimension, and for `after`
            where later inputs, of fewer rows, are the tokens that follow (a KV cache).
        lengths: of segments that are packed one behind the other; `adapters` has one name for each.
        ids: int [rows] or [requests, rows]: of each row the place of its adapter in `adapters`;
            -1 is the base. With gates one dimension more, of the adapters that a row has. In the
            order of the input's rows; that of MultiheadAttention is requests first.
        gates: floating, several adapters for each row, whose updates they multiply: in the shape of
            ids; or without ids [requests, adapters] or [requests, rows, adapters], of all
            `adapters` then. They may require grad (X-LoRA, mixtures of adapters). Those of None,
            the base, which has no update, are not followed.
        scale: a list of finite numbers, or a floating tensor, [requests], or [segments], or with
            ids [rows]: multiplies the update of each one's rows. A tensor may require grad, and is
            not looked into, which would wait for a GPU. It and gates are best where the model is:
            others are copied there, once, or once for each layer if they require grad.
        after: the position in its request, or segment, from which on each one's adapter takes
            effect; negative ones count from its end, None is never.
        repeats: of inputs that have each request several times in a row, as beam search does.
        zero_grads: whether the plan's adapters without a row get gradients of zero, instead of
            None: for DDP, and where nothing else of the model is trained.

    Returns:
        The plan, a context manager. In it every layer of `lora_ext.nn` follows the plan, in this
        thread. It is made for one forward of a model, and may be used for more that have the same
        requests. With activation checkpointing call backward within it too.

    Raises:
        ValueError, TypeError: arguments that do not go together, by name.
    """
    given = names_of(adapters)
    names = tuple(dict.fromkeys(name for name in given if name is not None))
    if ids is not None:
        if rows is not None or lengths is not None or after is not None:
            raise ValueError("batch: ids: got rows, lengths or after beside it, expected none")
        slots = slots_of_rows(ids, given, names, gates)
    elif gates is not None:
        if lengths is not None:
            raise ValueError("batch: gates: got lengths beside it, expected ids or none of them")
        slots = slots_of_gates(gates, given, names)
    else:
        slots = places_of(given, names).unsqueeze(1)
    per_row = ids is not None or (gates is not None and gates.dim() == 3)
    if per_row and (rows is not None or after is not None):
        raise ValueError("batch: gates: got rows or after beside those of each row, expected none")
    shape: tuple[int, ...] = ()
    if per_row and gates is not None:
        shape = tuple(gates.shape[:-1])
    elif ids is not None:
        shape = tuple(ids.shape)
    requests = len(slots) if ids is None else len(given)
    if gates is not None:
        gates = gates.reshape(slots.shape)
    if lengths is not None:
        if rows is not None:
            raise ValueError("batch: lengths: got rows beside it, expected one of them")
        lengths = integers(lengths, "lengths", len(given))
        if (lengths < 0).any():
            raise ValueError(f"batch: lengths: got {int(lengths.min())}, expected at least 0")
    if rows is not None:
        rows = rows_of(rows, requests, "adapters" if gates is None else "gates")
    if after is not None:
        after = integers(after, "after", requests, none=_NEVER)
    if scale is not None:
        if isinstance(scale, list | tuple):
            scale = strengths_of(scale)
        if not isinstance(scale, Tensor) or not scale.is_floating_point():
            refuse("batch", "scale", scale, "a list of numbers or a floating-point tensor")
        if list(scale.shape) != [len(slots)]:
            raise ValueError(
                f"batch: scale: got shape {list(scale.shape)}, expected [{len(slots)}], one number "
                f"for each {'row' if per_row else 'request' if lengths is None else 'segment'}"
            )
    return BatchPlan(
        names,
        slots,
        lengths=lengths,
        rows=rows,
        per_row=per_row,
        shape=shape,
        gates=gates,
        scale=scale,
        after=after,
        repeats=repeats,
        zero_grads=zero_grads,
    )
