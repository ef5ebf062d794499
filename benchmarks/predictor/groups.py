"""Layers of one x (`lora_linear_multi`): together, by a call for each, and frozen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from predictor import blas
from predictor.cards import SCENARIOS, Card, Scenario
from predictor.kernels import Pass, Timer, made_by, passes_over_dy
from predictor.launches import Call, RecordedLaunch, launchers
from predictor.model import predict

Calls = tuple[Call, ...]  # of the same M, K, adapters and dropout


@dataclass(frozen=True)
class GroupPrediction:
    """us, forward and backward. What adds up the dx of frozen layers, or of calls for each, is not
    in it: a single one has none of it."""

    calls: Calls
    path: str
    alone: tuple[list[str], list[str]]  # of each layer, forward and backward: why it has a call
    frozen: tuple[float, float]
    separate: tuple[float, float]
    together: tuple[float, float]
    additions: float  # of dx, not counted above
    passes: tuple[list[Pass], list[Pass]]  # of the layers together

    def ratios(self, of: tuple[float, float]) -> tuple[float, float]:
        """Forward, and forward and backward, over the frozen layers."""
        return of[0] / self.frozen[0], sum(of) / sum(self.frozen)


def padded(r: int) -> int:
    """As ranks lie beside each other."""
    return math.ceil(r / 16) * 16


@dataclass
class GroupTimer(Timer):
    """Of a group's launches; `call` is that of a layer whose rank is that of all."""

    layers: Calls = ()
    over_dy: list[Call] = field(default_factory=list, init=False)  # the layers of passes to come

    def _made(self, names: Sequence[str]) -> list[tuple[str, ...] | None]:
        passes = [passes_over_dy(layer.r) for layer in self.layers]
        made = made_by(names, [one for of_layer in passes for one in of_layer])
        launches = sum(1 for one in made if one and {"dh", "dB"} & {*one})
        sm90 = any("low_rank_sm90" in name for name in names)
        self.over_dy = [
            layer
            for layer, own in zip(self.layers, passes, strict=True)
            for _ in range(len(own) if sm90 else launches // len(self.layers))
        ]
        return made

    def _is_finished(self, following: Sequence[str]) -> bool:
        """In forward a kernel takes h of the layers apart, also where no parts are left."""
        if self.backward:
            return super()._is_finished(following)
        return len(following) > 1 and all("finish" in name for name in following[:2])

    def _low_rank(
        self, name: str, launch: RecordedLaunch, made: tuple[str, ...], finished: bool
    ) -> tuple[str, tuple[float, str]]:
        whole = self.call
        if {"dh", "dB"} & {*made}:
            self.call = self.over_dy.pop(0)
        timed = super()._low_rank(name, launch, made, finished)
        self.call = whole
        return timed

    def _product_sm90(self, name: str, launch: RecordedLaunch) -> tuple[float, str]:
        terms = 2 if self.call.fp32_adapters else 1
        if self.backward:
            depths, ranks = [one.N for one in self.layers], [self.call.r] * terms
            moved = self._product_bytes(self.call.K, sum(depths))
            return self._products_sm90(name, launch, [(self.call.K, depths, ranks)], moved)
        products = [(one.N, [one.K], [one.r] * terms) for one in self.layers]
        moved = self._product_bytes(sum(one.N for one in self.layers), self.call.K)
        return self._products_sm90(name, launch, products, moved)


@dataclass(frozen=True)
class Together:
    """Of the layers of a group, in one direction: which run together, and what they launch."""

    alone: list[str]  # of each layer: why it has a call of its own; or ""
    path: str
    launches: list[RecordedLaunch]


@cache
def record_group(
    calls: Calls, capability: int, multiprocessors: int, wish: str, backward: bool
) -> Together:
    kernels = launchers()
    kernels.gpu(capability, multiprocessors)
    kernels.wish(wish)
    one = calls[0]
    sizes = [(call.N, call.r) for call in calls]
    alone = kernels.alone(one.M, one.K, sizes, one.types, one.dropout_p, backward)
    several = [size for size, why in zip(sizes, alone, strict=True) if not why]
    if not several:
        return Together(alone, "", [])
    launches = kernels.dry_run_multi(one.M, one.K, several, one.types, one.dropout_p, backward)
    return Together(alone, kernels.path, launches)


def additions_us(card: Card, how: Scenario, calls: Calls) -> float:
    one = calls[0]
    return (len(calls) - 1) * blas.elementwise_us(card, how, 6.0 * one.M * one.K)


def predict_group(
    card: Card,
    calls: Sequence[Call],
    counts: dict[str, Any],
    asked: str = "auto",
    scenario: str = "central",
) -> GroupPrediction:
    how, layers = SCENARIOS[scenario], tuple(calls)
    alone = [predict(card, call, counts, asked, scenario) for call in layers]
    separate, together = [0.0, 0.0], [0.0, 0.0]
    passes: list[list[Pass]] = [[], []]
    reasons: list[list[str]] = []
    path = alone[0].path
    for i, backward in enumerate((False, True)):
        separate[i] = sum(one.layer[i] for one in alone)
        found = record_group(layers, card.capability, card.multiprocessors, asked, backward)
        reasons.append(found.alone)
        own = [one for one, why in zip(alone, found.alone, strict=True) if why]
        together[i] = sum(one.layer[i] for one in own)
        if not found.launches:
            continue
        several = tuple(one for one, why in zip(layers, found.alone, strict=True) if not why)
        whole = replace(several[0], r=sum(padded(call.r) for call in several))
        timer = GroupTimer(card, how, counts["kernels"], whole, backward, layers=several)
        passes[i] = list(timer.times(found.launches))
        together[i] += sum(one.us for one in passes[i])
        path = found.path
    return GroupPrediction(
        layers,
        path,
        (reasons[0], reasons[1]),
        (sum(one.frozen[0] for one in alone), sum(one.frozen[1] for one in alone)),
        (separate[0], separate[1]),
        (together[0], together[1]),
        additions_us(card, how, layers),
        (passes[0], passes[1]),
    )
