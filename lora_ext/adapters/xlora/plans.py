"""Which gates which layer follows: plans of X-LoRA's two passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn

from lora_ext._assignment import Assignment
from lora_ext.batching import BatchPlan


def _everything(rows: int, names: Sequence[str]) -> Tensor:
    """The slots of rows that have all adapters."""
    return torch.arange(len(names), device="cpu").expand(rows, -1)


class UniformPlan(BatchPlan):
    """All rows of any input have all adapters, each by the same number; with 0 they are the base's:
    the pass that finds hidden states."""

    def __init__(self, names: Sequence[str], value: float) -> None:
        super().__init__(names if value else (), torch.empty(0, 0, dtype=torch.int64, device="cpu"))
        self._value = value
        self._of_rows: dict[int, BatchPlan] = {}

    def assign(
        self,
        leading: Sequence[int],
        device: torch.device,
        names: Collection[str],
        where: str,
        whole: bool = False,
    ) -> Assignment:
        if not self.names:
            none = torch.empty(0, dtype=torch.int32, device=device)
            return Assignment((), none, (), None, False, ())
        rows = math.prod(leading)
        if rows not in self._of_rows:
            size = rows, len(self.names)
            gates = torch.full(size, self._value, dtype=torch.float64, device="cpu")
            slots = _everything(rows, self.names)
            self._of_rows[rows] = BatchPlan(self.names, slots, per_row=True, gates=gates)
        return self._of_rows[rows].assign((rows,), device, names, where, whole)


class RoutedPlan(BatchPlan):
    """Each token has a mixture of adapters, in each layer another one. Which of them a layer has is
    asked by the layer itself, not by the order of calls: layers may be called several times, and
    again in backward.

    Args:
        gates: [layers, requests, tokens, k]; one layer stands for all.
        chosen: which adapters these are, in the same shape; None are all.
        places: of each layer, among the layers of gates.
        present: [requests, tokens], which tokens are no padding.
        kept: the tokens that later layers get (transformers' logits_to_keep).
    """

    def __init__(
        self,
        names: Sequence[str],
        gates: Tensor,
        chosen: Tensor | None,
        places: Mapping[nn.Module, int],
        present: Tensor | None = None,
        kept: slice | Tensor | None = None,
    ) -> None:
        super().__init__(names, torch.empty(0, 0, dtype=torch.int64, device="cpu"), gates=gates)
        self._chosen, self._places = chosen, places
        self._present, self._kept = present, kept
        self._layers: dict[int, _LayerPlan] = {}
        self._unbound: tuple[Tensor, ...] | None = None
        # Plans that know the rows: for a copy with other gates, too.
        self._known: dict[tuple[str, int], BatchPlan] = {}

    def with_gates(self, gates: Tensor) -> RoutedPlan:
        other = RoutedPlan(self.names, gates, self._chosen, self._places, self._present, self._kept)
        other._known = self._known
        return other

    def of(self, layer: object) -> BatchPlan:
        assert self.gates is not None and isinstance(layer, nn.Module)
        place = self._places[layer] if len(self.gates) > 1 else 0
        if self._unbound is None:  # at once: in backward their gradients are stacked, not added
            self._unbound = self.gates.unbind()
        if place not in self._layers:
            self._layers[place] = _LayerPlan(self, place, self._unbound[place])
        return self._layers[place]


class _LayerPlan(BatchPlan):
    """The plan of one layer; gates [requests, tokens, k]."""

    def __init__(self, routed: RoutedPlan, place: int, gates: Tensor) -> None:
        super().__init__(
            routed.names, torch.empty(0, 0, dtype=torch.int64, device="cpu"), gates=gates
        )
        self._routed, self._place, self._own = routed, place, gates
        chosen = routed._chosen
        self._chosen = None if chosen is None else chosen[place]

    def assign(
        self,
        leading: Sequence[int],
        device: torch.device,
        names: Collection[str],
        where: str,
        whole: bool = False,
    ) -> Assignment:
        requests, tokens, _ = self._own.shape
        rows = math.prod(leading)
        if rows == requests * tokens:
            plan = self._of_tokens("all", slice(None))
        elif tuple(leading) == (requests,):
            plan = self._of_requests()
        elif len(leading) == 2 and leading[0] == requests and leading[1] == self._kept_tokens():
            assert self._routed._kept is not None
            plan = self._of_tokens("kept", self._routed._kept)
        else:
            self._refuse(leading, where)
        return plan.assign(leading, device, names, where, whole)

    def _kept_tokens(self) -> int | None:
        kept = self._routed._kept
        if isinstance(kept, slice):
            return len(range(self._own.shape[1])[kept])
        return None if kept is None else kept.numel()

    def _of_tokens(self, what: str, which: slice | Tensor) -> BatchPlan:
        gates = self._own[:, which].flatten(0, 1)

        def slots() -> Tensor:
            if self._chosen is None:
                return _everything(len(gates), self.names)
            return self._chosen[:, which].flatten(0, 1).cpu()

        return self._known(what, slots, gates, per_row=True)

    def _of_requests(self) -> BatchPlan:
        """Inputs of one row for each request, such as images: the mean of its tokens."""
        gates = self._own
        if self._chosen is not None:
            every = gates.new_zeros(*gates.shape[:2], len(self.names))
            gates = every.scatter(-1, self._chosen, gates)
        present = self._routed._present
        if present is None:
            gates = gates.mean(1)
        else:
            weight = present.to(gates.dtype).unsqueeze(-1)
            gates = (gates * weight).sum(1) / weight.sum(1).clamp(min=1.0)
        return self._known(
            "requests", lambda: _everything(len(gates), self.names), gates, per_row=False
        )

    def _known(
        self, what: str, slots: Callable[[], Tensor], gates: Tensor, *, per_row: bool
    ) -> BatchPlan:
        """Which rows there are is the same for all layers, unless each chooses adapters."""
        shared = self._chosen is None or what == "requests"
        key = what, 0 if shared else self._place
        known = self._routed._known
        if key not in known:
            known[key] = BatchPlan(self.names, slots(), per_row=per_row, gates=gates.detach())
        return known[key].with_gates(gates)

    def _refuse(self, leading: Sequence[int], where: str) -> NoReturn:
        requests, tokens, _ = self._own.shape
        raise ValueError(
            f"{where}: X-LoRA: got an input whose leading dimensions are {list(leading)}, expected "
            f"[{requests}, {tokens}], tokens as the hidden states have them, or [{requests}]; "
            "leave the layer out of the adapters (exclude_modules)"
        )
