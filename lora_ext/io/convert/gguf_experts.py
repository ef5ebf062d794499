"""Experts: one stack for each projection in GGUF; in PEFT's files a stack of gate and up together
and one of down (`target_parameters`), or a layer for each projection of each expert, as
transformers had them before version 5."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.gguf_names import Base
from lora_ext.io.convert.gguf_pairs import Pair, Scalings

GATE_UP, DOWN = "gate_up_proj", "down_proj"
_INNER = ".base_layer"  # PEFT puts a layer around a module for each of its parameters


def split_experts(
    pairs: Mapping[str, Pair], base: Base, scalings: Scalings
) -> tuple[dict[str, Pair], dict[str, Pair]]:
    """Pairs of stacks, by their names in llama.cpp, and those that are of no expert.

    Raises:
        AdapterFileError: what an adapter is on is not told, or not what the base has.
    """
    stacks: dict[str, Pair] = {}
    rest: dict[str, Pair] = {}
    single: dict[tuple[str, str], dict[int, Pair]] = {}
    modules = {module for module, _ in base.experts}
    for name, pair in pairs.items():
        module = name.removesuffix(_INNER)
        if module in modules:
            parameter = _parameter(name, module, pairs, scalings)
            stacks.update(_from_parameter(base, module, parameter, pair, scalings))
        elif (place := _one_by_one(name, base)) is not None:
            module, part, number = place
            scaling = scalings.of(name, pair.rank)
            single.setdefault((module, part), {})[number] = Pair(pair.A, pair.B, scaling)
        else:
            rest[name] = pair
    for (module, part), experts in single.items():
        name = base.experts[module, part]
        if name in stacks:
            raise AdapterFileError(f"{module}: has adapters of stacks, and of single experts too")
        stacks[name] = _stacked(experts, base.count_of_experts())
    return stacks, rest


def _parameter(name: str, module: str, pairs: Mapping[str, Pair], scalings: Scalings) -> str:
    """Which of the two: with both the first is inside of the second."""
    if name.endswith(_INNER):
        return GATE_UP
    if f"{name}{_INNER}" in pairs:
        return DOWN
    targeted = [one for one in (GATE_UP, DOWN) if scalings.is_targeted(f"{module}.{one}")]
    if len(targeted) != 1:
        raise AdapterFileError(
            f"{name}: has one adapter, and target_parameters means {len(targeted)} of "
            f"{GATE_UP} and {DOWN}; the config is not of this file"
        )
    return targeted[0]


def _from_parameter(
    base: Base, module: str, parameter: str, pair: Pair, scalings: Scalings
) -> dict[str, Pair]:
    E = base.count_of_experts()
    rows, columns = pair.A.shape
    if rows % E or (parameter == GATE_UP and pair.B.shape[0] % 2):
        raise AdapterFileError(
            f"{module}.{parameter}: lora_A is {list(pair.A.shape)} and lora_B "
            f"{list(pair.B.shape)}, expected ranks of {E} experts, and as many rows of gate as of "
            "up; give the base that the adapter was made for"
        )
    r = rows // E
    A = pair.A.view(E, r, columns)
    B = pair.B.view(-1, r, E).permute(2, 0, 1)
    scaling = scalings.of(f"{module}.{parameter}", r)
    if parameter == DOWN:
        return {base.experts[module, "down"]: Pair(A, B, scaling)}
    gate, up = B.chunk(2, 1)
    return {
        base.experts[module, "gate"]: Pair(A, gate, scaling),
        base.experts[module, "up"]: Pair(A, up, scaling),
    }


def _one_by_one(name: str, base: Base) -> tuple[str, str, int] | None:
    """The module that has the stacks now, "gate", "up" or "down", and the expert's number."""
    family = base.family
    if family.one_by_one is None or family.experts is None:
        return None
    former, *names = map(re.escape, family.one_by_one)
    pattern = rf"({re.escape(family.layers)}\.[0-9]+)\.{former}\.([0-9]+)\.({'|'.join(names)})"
    found = re.fullmatch(pattern, name)
    if found is None:
        return None
    place = f"{found[1]}.{family.experts}", ("gate", "up", "down")[names.index(found[3])]
    return (*place, int(found[2])) if place in base.experts else None


def _stacked(experts: Mapping[int, Pair], count: int) -> Pair:
    """Experts of the highest rank of them; zeros where one has less, or no adapter."""
    first = next(iter(experts.values()))
    r = max(pair.rank for pair in experts.values())
    same = len({(pair.scaling, pair.rank) for pair in experts.values()}) == 1
    A = first.A.new_zeros(count, r, first.A.shape[1])
    B = first.B.new_zeros(count, first.B.shape[0], r, dtype=None if same else torch.float32)
    for number, pair in experts.items():
        if number >= count:
            raise AdapterFileError(f"expert {number}: the base has {count}, by its config.json")
        if pair.A.shape[1] != A.shape[2] or pair.B.shape[0] != B.shape[1]:
            raise AdapterFileError(
                f"expert {number}: lora_A is {list(pair.A.shape)} and lora_B "
                f"{list(pair.B.shape)}, expected those of expert {min(experts)}"
            )
        A[number, : pair.rank] = pair.A
        B[number, :, : pair.rank] = pair.B if same else pair.B.double() * pair.scaling
    return Pair(A, B, first.scaling if same else 1.0)


def join_experts(stacks: Mapping[str, Pair], base: Base) -> dict[str, dict[str, Pair]]:
    """Pairs as PEFT's files have them, by module and parameter."""
    found: dict[str, dict[str, Pair]] = {}
    for module in {module: None for module, _ in base.experts}:
        gate, up, down = (stacks.get(base.experts[module, part]) for part in ("gate", "up", "down"))
        own: dict[str, Pair] = {}
        for name, one in ((GATE_UP, _together(gate, up)), (DOWN, down)):
            if one is not None:
                own[name] = _as_parameter(one, base, f"{module}.{name}")
        if own:
            found[module] = own
    return found


def _together(gate: Pair | None, up: Pair | None) -> Pair | None:
    """One pair for the rows of both: of the same rank if they share A, else of both ranks."""
    if gate is None and up is None:
        return None
    first, second = gate or _nothing(up), up or _nothing(gate)
    if first.B.shape[1] != second.B.shape[1] or first.A.shape[2] != second.A.shape[2]:
        raise AdapterFileError(
            f"gate of experts is {list(first.B.shape)} and up {list(second.B.shape)}, expected the "
            "same sizes"
        )
    if first.scaling != second.scaling:
        ratio = second.scaling / first.scaling
        second = Pair(second.A, (second.B.double() * ratio).float(), first.scaling)
    dtype = torch.promote_types(first.B.dtype, second.B.dtype)
    B = [first.B.to(dtype), second.B.to(dtype)]
    if first.A.dtype == second.A.dtype and torch.equal(first.A, second.A):
        return Pair(first.A, torch.cat(B, 1), first.scaling)
    shared = torch.promote_types(first.A.dtype, second.A.dtype)
    A = torch.cat([first.A.to(shared), second.A.to(shared)], 1)
    upper = torch.cat([B[0], torch.zeros_like(B[1])], 2)
    lower = torch.cat([torch.zeros_like(B[0]), B[1]], 2)
    return Pair(A, torch.cat([upper, lower], 1), first.scaling)


def _nothing(other: Pair | None) -> Pair:
    assert other is not None
    return Pair(other.A, torch.zeros_like(other.B), other.scaling)


def _as_parameter(pair: Pair, base: Base, name: str) -> Pair:
    E = base.count_of_experts()
    if pair.A.shape[0] != E:
        raise AdapterFileError(
            f"{name}: {pair.A.shape[0]} experts in the file, {E} in "
            f"{base.folder / 'config.json'}; give the base that the adapter was made for"
        )
    A: Tensor = pair.A.reshape(-1, pair.A.shape[2])
    B = pair.B.permute(1, 2, 0).reshape(pair.B.shape[1], -1)
    return Pair(A, B, pair.scaling)
