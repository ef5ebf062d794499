"""EVA's pass over data: which layers share an input, whose components have settled, and how ranks
are shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.arguments import listed
from lora_ext.calibration.eva_inputs import digest
from lora_ext.calibration.running import Pass, watching
from lora_ext.calibration.statistics import PrincipalComponents

WHERE = "get_eva_state_dict"
_PASSES = 100  # over the data: components that have not settled by then never will

RunBatch = Callable[[Any], None]
Rows = Callable[[str, Any], Tensor]  # of a layer, by its name and the arguments of a call


def same_inputs(
    layers: Mapping[str, nn.Module],
    dataloader: Iterable[Any],
    run_batch: RunBatch,
    rows: Rows,
) -> dict[str, str]:
    """Layers whose input is another's, and which: of those the components are the same. From the
    first batch that has rows: without any, inputs of all layers are alike."""
    digests: dict[str, bytes] = {}
    empty: set[str] = set()

    def observe(name: str, arguments: Any) -> None:
        x = rows(name, arguments)
        if len(x):
            digests.setdefault(name, digest(x))
        else:
            empty.add(name)

    batch = None
    for batch in dataloader:
        with watching(layers, observe):
            run_batch(batch)
        if digests:
            break
    if batch is None:
        raise ValueError(f"{WHERE}: dataloader: got one without batches: dataloader is empty")
    digests |= {name: name.encode() for name in empty - digests.keys()}  # which are no one else's
    if missed := [name for name in layers if name not in digests]:
        raise ValueError(
            f"{WHERE}: the first batch never reached {listed(missed)}, expected calls of every "
            "layer that is adapted: leave it out with exclude_modules"
        )
    first: dict[bytes, str] = {}
    owners = {name: first.setdefault(digests[name], name) for name in layers}
    return {name: own for name, own in owners.items() if name != own}


def settle(
    run: Pass,
    own: dict[str, nn.Module],
    same: dict[str, str],
    counts: dict[str, int],
    budget: int,
    dataloader: Iterable[Any],
    run_batch: RunBatch,
    rows: Rows,
    advance: Callable[[int], None] | None,
) -> dict[str, int]:
    """Collects until the components of each layer's rank stay what they are; these ranks."""
    statistics: dict[str, PrincipalComponents] = run.statistics  # type: ignore[assignment]

    def observe(name: str, arguments: Any) -> None:
        x = rows(name, arguments)
        if x.dim() != 2 or statistics[name].count > x.shape[1]:
            raise ValueError(
                f"{WHERE}: '{name}': got rows of shape {tuple(x.shape)}, expected [n, K] with K of "
                f"at least {statistics[name].count}, the most ranks that eva_config.rho gives the "
                "layer; make rho or r smaller, or leave it out with exclude_modules"
            )
        statistics[name].update(x)

    shown = 0
    while True:
        for batch in run.over(dataloader):
            new = counts
            if all(one.seen for one in statistics.values()):
                new = _ranks(statistics, same, counts, budget)
            open_ = {n: m for n, m in own.items() if not _settled(statistics[n], new[n])}
            if advance is not None:
                advance(len(own) - len(open_) - shown)
                shown = len(own) - len(open_)
            if not open_:
                return new
            with watching(open_, observe):
                run_batch(batch)
        few = [name for name, one in statistics.items() if not one.seen]
        if few:
            most = statistics[few[0]].count
            raise ValueError(
                f"{WHERE}: dataloader: no batch has {most} rows for {listed(few)}, expected as "
                "many as the layer may get ranks (r times eva_config.rho); give larger batches, or "
                "use_label_mask=False if labels leave too few"
            )
        if run.passes >= _PASSES:
            raise ValueError(
                f"{WHERE}: components of {listed(list(open_))} still change after {_PASSES} passes "
                "over the data, expected them to settle; give more data, or a smaller "
                "eva_config.tau"
            )


def _settled(one: PrincipalComponents, rank: int) -> bool:
    return bool(one.converged[:rank].all())


def _ranks(
    statistics: Mapping[str, PrincipalComponents],
    same: Mapping[str, str],
    counts: Mapping[str, int],
    budget: int,
) -> dict[str, int]:
    """How the budget of ranks is shared: to the components that explain most of their layer's
    variance. Of layers with one input the one whose components are kept has the highest rank."""
    owner = {name: name for name in statistics} | dict(same)
    shares = {name: statistics[own].explained()[: counts[name]] for name, own in owner.items()}
    names = [name for name, share in shares.items() for _ in share]
    order = torch.cat([share.cpu().float() for share in shares.values()]).argsort(descending=True)
    chosen = Counter(names[i] for i in order[:budget].tolist())
    ranks = {name: chosen.get(name, 0) for name in owner}
    for name, own in same.items():
        if ranks[own] < ranks[name]:
            ranks[own], ranks[name] = ranks[name], ranks[own]
    return ranks
