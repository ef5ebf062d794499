"""The one pass over data that all initialisations from data are made of: statistics hooked on
layers, a bar, and a checkpoint from which a pass that was killed goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lora_ext._progress import progress
from lora_ext.arguments import listed
from lora_ext.calibration.checkpoint import Checkpoint

EVERY = 16  # batches between checkpoints, which are as large as all statistics


class Statistic(Protocol):
    """What a pass collects of one layer."""

    seen: int  # how much went into it; 0 is nothing

    def state(self) -> dict[str, Tensor]:
        """All of it, for a checkpoint."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from what `state()` returned."""


class Pass:
    """Batches of a data loader, counted, while statistics are collected.

    Args:
        where: the function, for messages.
        statistics: by the names of layers. They go on from the checkpoint, if there is one.
        checkpoint_file: where the pass is kept every `every` batches; removed by `finish()`.
        settings: what has to be the same for a checkpoint to be of this pass.
    """

    def __init__(
        self,
        where: str,
        statistics: Mapping[str, Statistic],
        checkpoint_file: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        every: int = EVERY,
    ) -> None:
        self.where, self.statistics, self.every = where, statistics, every
        self.passes = self.batches = 0  # whole passes, and batches of the present one
        self._checkpoint = None
        if checkpoint_file is not None:
            what = {"pass": where, "layers": list(statistics), **(settings or {})}
            self._checkpoint = Checkpoint(where, Path(checkpoint_file), what)
            self._go_on()

    def shown_over(self, dataloader: Iterable[Any], show: bool) -> Iterator[Any]:
        """`over`, with a bar on stderr."""
        total = len(dataloader) if isinstance(dataloader, Sized) else None
        with progress("Calibrating", total) if show else nullcontext() as advance:
            for batch in self.over(dataloader):
                yield batch
                if advance is not None:
                    advance(1)

    def over(self, dataloader: Iterable[Any]) -> Iterator[Any]:
        """The batches of one pass, without those that a checkpoint has already. What is done with a
        batch before the next one is asked for counts as collected.

        Raises:
            ValueError: there is no batch, or fewer than the checkpoint has.
        """
        skipped, rest = self.batches, iter(dataloader)
        if sum(1 for _ in islice(rest, skipped)) < skipped:
            raise ValueError(
                f"{self.where}: checkpoint_file: has {skipped} batches, and the data loader fewer, "
                "expected the loader that the pass began with"
            )
        for batch in rest:
            yield batch
            self.batches += 1
            if self._checkpoint is not None and self.batches % self.every == 0:
                self._keep()
        if self.batches == 0:
            raise ValueError(
                f"{self.where}: dataloader: got one without batches: dataloader is empty; where it "
                "is gone through several times a generator is empty after the first: use a list"
            )
        self.passes, self.batches = self.passes + 1, 0

    def finish(self) -> None:
        """Checks that every layer was reached, and removes the checkpoint.

        Raises:
            ValueError: a layer was not.
        """
        check_reached(self.where, self.statistics)
        if self._checkpoint is not None:
            self._checkpoint.remove()

    def _keep(self) -> None:
        states = {name: one.state() for name, one in self.statistics.items() if one.seen}
        assert self._checkpoint is not None
        self._checkpoint.write({"passes": self.passes, "batches": self.batches}, states)

    def _go_on(self) -> None:
        assert self._checkpoint is not None
        counts, states = self._checkpoint.read()
        self.passes, self.batches = counts.get("passes", 0), counts.get("batches", 0)
        for name, state in states.items():
            self.statistics[name].load(state)


def check_reached(where: str, statistics: Mapping[str, Statistic]) -> None:
    """ValueError where a layer was never called with data."""
    missed = [name for name, one in statistics.items() if not one.seen]
    if missed:
        raise ValueError(
            f"{where}: the data never reached {listed(missed)}, expected calls of every layer that "
            "is adapted: give data that uses it, or leave it out with exclude_modules"
        )


@contextmanager
def watching(
    layers: Mapping[str, nn.Module], observe: Callable[[str, Any], None]
) -> Iterator[None]:
    """Within this context `observe(name, arguments)` is called after each call of a layer."""
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(hook_on(layer, name, observe))
        yield


def hook_on(layer: nn.Module, name: str, observe: Callable[[str, Any], None]) -> Callable[[], None]:
    """Has a layer call `observe(name, arguments)`; returns what takes that off."""

    @torch.no_grad()
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        observe(name, args or tuple(kwargs.values())[:1])

    return layer.register_forward_hook(hook, with_kwargs=True).remove


@contextmanager
def as_before(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Within this context the model trains, or does not; each of its modules is as it was, and
    every parameter trains as it did, after it."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)


def to_device(batch: Any, device: torch.device | None) -> Any:
    """A batch of tensors, in any nesting, on a device."""
    if device is None:
        return batch
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        moved = {key: to_device(value, device) for key, value in batch.items()}
        return moved if type(batch) is dict else type(batch)(moved)  # type: ignore[call-arg]
    if isinstance(batch, tuple | list):
        parts = [to_device(value, device) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def check_function(where: str, argument: str, given: object) -> None:
    """TypeError for what cannot be called: a loader of batches has an argument of its own."""
    if given is not None and not callable(given):
        raise TypeError(
            f"{where}: {argument}: got a {type(given).__name__}, expected a function without "
            "arguments; batches are dataloader="
        )


def device_of(model: nn.Module) -> torch.device | None:
    """The one device of a model's parameters; None where there are several."""
    devices = {parameter.device for parameter in model.parameters() if not parameter.is_meta}
    return next(iter(devices)) if len(devices) == 1 else None


def forward_fn_dict(model: nn.Module, inputs: Any) -> Any:
    """How a batch is run unless you say otherwise: a mapping as keyword arguments, as in PEFT; a
    list or tuple as positional ones; anything else as the one argument."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
