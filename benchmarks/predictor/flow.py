"""Machine code of a kernel as blocks, loops and paths. It is read as nvdisasm prints it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]+\*/\s+(?P<guard>@!?U?P\w+ +)?(?P<text>[^;]*?) *;")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
# A call comes back, or is a jump in disguise, to where stores begin: both ways are followed.
_JUMPS = ("BRA", "CALL")
_ENDS = ("EXIT", "RET", "BRX", "JMX", "BPT")  # BPT.TRAP is an error


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "IMAD.WIDE.U32"
    operands: str
    guarded: bool  # by a predicate

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


@dataclass
class Block:
    """Instructions that follow each other whatever happens."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)  # the blocks that may follow

    def count(self, *names: str) -> int:
        return sum(one.name in names for one in self.instructions)


@dataclass(frozen=True)
class Loop:
    header: int
    blocks: frozenset[int]


class Flow:
    """The blocks of a kernel; the first one is where it begins."""

    def __init__(self, text: str) -> None:
        self.blocks: list[Block] = []
        labels: dict[str, int] = {}
        jumps: list[tuple[int, str]] = []
        open_block = False
        for line in text.splitlines():
            if label := re.match(r"(\.L_x_\d+):", line):
                labels[label[1]] = len(self.blocks)
                open_block = False
                continue
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            opcode, _, operands = match["text"].partition(" ")
            one = Instruction(opcode, operands.strip(), match["guard"] is not None)
            here = len(self.blocks) - open_block
            if not open_block:
                self.blocks.append(Block())
                open_block = True
            self.blocks[here].instructions.append(one)
            if one.name in _JUMPS and (target := _TARGET.search(one.operands)):
                jumps.append((here, target[1]))
            if one.name in (*_JUMPS, *_ENDS):
                open_block = False
        for here, block in enumerate(self.blocks[:-1]):
            last = block.instructions[-1]
            # "BRA P2, target" branches on a second predicate.
            always = not last.guarded and not re.match(r"!?U?P\d", last.operands)
            if not (always and last.name in ("BRA", *_ENDS)):
                block.next.append(here + 1)
        for here, label in jumps:
            if labels[label] < len(self.blocks):
                self.blocks[here].next.append(labels[label])

    @cached_property
    def order(self) -> list[int]:
        """The blocks that are reached, each before those that follow it but for loops."""
        seen, order = {0}, []
        stack = [(0, iter(self.blocks[0].next))]
        while stack:
            here, following = stack[-1]
            for after in following:
                if after not in seen:
                    seen.add(after)
                    stack.append((after, iter(self.blocks[after].next)))
                    break
            else:
                order.append(here)
                stack.pop()
        return order[::-1]

    @cached_property
    def dominators(self) -> dict[int, int]:
        """Of a block: those that every way to it leads through, itself too, a bit for each."""
        before: dict[int, list[int]] = {block: [] for block in self.order}
        for here in self.order:
            for after in self.blocks[here].next:
                before[after].append(here)
        found = dict.fromkeys(self.order, -1)  # all
        found[0] = 1
        changed = True
        while changed:
            changed = False
            for here in self.order[1:]:
                common = -1
                for block in before[here]:
                    common &= found[block]
                common |= 1 << here
                changed |= common != found[here]
                found[here] = common
        return found

    def is_back_edge(self, here: int, after: int) -> bool:
        return bool(self.dominators[here] >> after & 1)

    @cached_property
    def loops(self) -> list[Loop]:
        before: dict[int, list[int]] = {block: [] for block in self.order}
        bodies: dict[int, set[int]] = {}
        for here in self.order:
            for after in self.blocks[here].next:
                before[after].append(here)
                if self.is_back_edge(here, after):
                    bodies.setdefault(after, {after}).add(here)
        for header, body in bodies.items():
            open_blocks = [block for block in body if block != header]
            while open_blocks:
                for block in before[open_blocks.pop()]:
                    if block not in body:
                        body.add(block)
                        open_blocks.append(block)
        return [Loop(header, frozenset(body)) for header, body in bodies.items()]

    def best_path(
        self, starts: Iterable[int], within: Iterable[int], worth: Callable[[Block], float]
    ) -> list[int]:
        """Of the ways from one of `starts` that stay within these blocks, without going back in a
        loop, the one of the most worth; of several the one of the fewest instructions."""
        inside = set(within)
        best: dict[int, tuple[float, int, int | None]] = {}
        for here in reversed(self.order):
            if here not in inside:
                continue
            onward = [
                (best[after][0], best[after][1], after)
                for after in self.blocks[here].next
                if after in inside and not self.is_back_edge(here, after) and after in best
            ]
            value, fewer, after = max(onward, key=lambda way: way[:2], default=(0.0, 0, None))
            block = self.blocks[here]
            best[here] = (value + worth(block), fewer - len(block.instructions), after)
        here = max((start for start in starts if start in best), key=lambda at: best[at][:2])
        path: list[int] = []
        at: int | None = here
        while at is not None:
            path.append(at)
            at = best[at][2]
        return path
