"""Changing layers and models: all of it or nothing, whatever exception comes, wherever.

What a change makes is prepared on the side, on drafts; then one call of C makes all of it true. A
signal handler (Ctrl-C) runs between two bytecodes and a trace function between two lines: inside
that call is neither, and nothing in it allocates tensors. If one of its steps fails all the same,
those before it are taken back.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import starmap
from operator import call
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from lora_ext.nn.sharded import tell_fsdp, to_rest

Step = tuple[Any, ...]  # a function of C and its arguments
Module = TypeVar("Module", bound=nn.Module)
Method = TypeVar("Method", bound=Callable[..., Any])


class Transaction:
    """Collects changes until `commit()` makes them. As a context it takes back what was committed
    in it if it ends with an exception."""

    def __init__(self) -> None:
        self._drafts: dict[int, tuple[nn.Module, Any]] = {}
        self._steps: list[Step] = []
        self._undo: list[Step] = []
        self._written: list[Tensor] = []
        self._changed: list[nn.Module] = []

    def draft(self, layer: Module) -> Module:
        """A copy of a layer whose parameters and other state can be replaced; `commit()` makes that
        the layer's. What both share, tensors, must not be changed in place."""
        if id(layer) not in self._drafts:
            to_rest(layer)
            draft = shallow(layer)
            space = vars(draft)
            for name in layer.DRAFTED:  # type: ignore[union-attr]
                if isinstance(space[name], dict):
                    space[name] = space[name].copy()
            space["_transaction"] = self
            self._drafts[id(layer)] = layer, draft
        return self._drafts[id(layer)][1]  # type: ignore[no-any-return]

    def set(self, target: object, **values: Any) -> None:
        """Attributes that target has in its `__dict__`."""
        self._steps.append((dict.update, vars(target), values))

    def set_attribute(self, target: object, name: str, value: Any) -> None:
        """An attribute of something that may keep it in another way."""
        self._steps.append((setattr, target, name, value))

    def put(self, registry: dict[str, Any], key: str, value: Any) -> None:
        """An entry that a dictionary has."""
        self._steps.append((dict.update, registry, {key: value}))

    def remove(self, target: object, name: str) -> None:
        """An attribute that target has in its `__dict__`."""
        self._steps.append((dict.pop, vars(target), name))

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """New values of a tensor."""
        self._steps.append((torch.Tensor.copy_, tensor, values))
        self._written.append(tensor)

    def require_grad(self, tensor: Tensor, flag: bool) -> None:
        """Whether a tensor trains.

        Raises:
            ValueError: it shall, and is an inference tensor.
        """
        if tensor.is_inference() and flag:
            if tensor.requires_grad:
                return
            raise ValueError(
                "requires_grad: got True for an inference tensor, expected one made outside of "
                "torch.inference_mode(); clone it there"
            )
        self._steps.append((setattr, tensor, "requires_grad", flag))

    def commit(self) -> None:
        """Makes all changes since the last time, or none if that fails."""
        steps = [*self._draft_steps(), *self._steps]
        self._changed += [layer for layer, _ in self._drafts.values()]
        with self._writing():
            undo = [_inverse(step) for step in reversed(steps)]
            self._undo[:0] = undo  # first: an exception may come as soon as the steps are done
            try:
                _at_once(steps)
            except BaseException:
                _at_once(undo)
                raise
            finally:
                self._tell_fsdp()
        self._drafts, self._steps = {}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if kind is not None:
            with self._writing():
                _at_once(self._undo)
                self._tell_fsdp()

    def _tell_fsdp(self) -> None:
        for layer in self._changed:
            tell_fsdp(layer)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Inference tensors can only be written in inference mode."""
        if not self._written:
            yield
            return
        with torch.inference_mode(any(t.is_inference() for t in self._written)), torch.no_grad():
            yield

    def _draft_steps(self) -> Iterator[Step]:
        for layer, draft in self._drafts.values():
            state = {name: vars(draft)[name] for name in layer.DRAFTED}  # type: ignore[union-attr]
            yield dict.update, vars(layer), state
            yield from _child_steps(layer, draft)


def all_or_nothing(method: Method) -> Method:
    """Makes a method of a layer run on a draft, which is committed when it returns. What it makes
    are ordinary tensors also in inference mode, which autograd takes."""

    @functools.wraps(method)
    def on_a_draft(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return on_a_draft(layer, *args, **kwargs)
        grad = torch.is_grad_enabled()
        try:
            if "_transaction" in vars(layer):  # is a draft
                return method(layer, *args, **kwargs)
            transaction = Transaction()
            result = method(transaction.draft(layer), *args, **kwargs)
            transaction.commit()
            return result
        except BaseException:
            torch.set_grad_enabled(grad)  # Ctrl-C at the end of a no_grad() leaves it off
            raise

    return cast(Method, on_a_draft)


class AtTheEnd:
    """As a context: calls when it ends; or only when it ends with an error. One within others is
    called again by them when a second exception comes while the call runs."""

    def __init__(self, call: Callable[[], object], *, only_of_an_error: bool = False) -> None:
        self._call, self._always = call, not only_of_an_error

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._always or kind is not None:
            self._call()


def put_parameter(draft: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Gives a draft another parameter; of a child, which is copied, for a dotted name."""
    owner, (*path, attribute) = draft, name.split(".")
    for part in path:
        child = owner._modules[part]
        assert child is not None
        copied = shallow(child)
        owner._modules[part] = copied
        owner = copied
    owner._parameters[attribute] = parameter


def shallow(module: Module) -> Module:
    """A module of its own with the same parameters, children and attributes."""
    copied: Module = object.__new__(type(module))
    vars(copied).update(vars(module))
    for registry in ("_parameters", "_modules"):
        vars(copied)[registry] = vars(module)[registry].copy()
    return copied


def _child_steps(module: nn.Module, draft: nn.Module) -> Iterator[Step]:
    """What makes the children's parameters those of a draft's children."""
    for name, child in draft._modules.items():
        own = module._modules[name]
        if own is not None and child is not None and child is not own:
            if own._parameters.keys() != child._parameters.keys():
                yield dict.update, vars(own), {"_parameters": child._parameters}
                continue
            changed = {
                key: value
                for key, value in child._parameters.items()
                if value is not own._parameters[key]
            }
            yield dict.update, own._parameters, changed
            yield from _child_steps(own, child)


def _inverse(step: Step) -> Step:
    function, target, *arguments = step
    if function is dict.update:
        return function, target, {name: target[name] for name in arguments[0]}
    if function is dict.pop:
        return dict.update, target, {arguments[0]: target[arguments[0]]}
    if function is setattr:
        return function, target, arguments[0], getattr(target, arguments[0])
    assert function is torch.Tensor.copy_
    return function, target, target.detach().clone()


def _at_once(steps: Iterable[Step]) -> None:
    """Calls all steps without a bytecode between them. (No context around it: one that is left by
    an exception on its last line stays entered.)"""
    deque(starmap(call, steps), maxlen=0)
