"""Blocks of a model as one operator each, in the place of their layers' calls: `fuse_blocks`.

A block keeps its module, its children and their names: what changes is the forward of the module
(an MLP), or of the children that read one x (q, k and v of an attention). Each call looks at the
layers as they are: where one has to run by itself (hooks, a plan, DoRA) all do, as before.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lora_ext.arguments import as_flag, check_module, warn
from lora_ext.blocks.operators import lora_mlp
from lora_ext.blocks.recognise import Mlp, groups_of_one_x, mlp_of, settings_of
from lora_ext.blocks.terms import (
    KINDS,
    NotFused,
    Terms,
    check_called_plainly,
    check_no_hooks_of_all,
    is_autocast_on,
    is_one_operator,
    same_dtype,
    terms_of,
)
from lora_ext.blocks.text import NotRecognised
from lora_ext.nn.linear import adapted_linears
from lora_ext.nn.lora_layer import LoraLayer


@dataclass(frozen=True)
class Block:
    """A module of a model, and what became of its layers.

    Attributes:
        name: the module's.
        kind: "mlp" or "one x"; None where it was not recognised.
        layers: the children's names, in the order of the calls.
        reason: why its layers run one by one now; None where they run as one operator.
        recompute: whether an MLP keeps its input alone for backward.
    """

    name: str
    kind: str | None
    layers: tuple[str, ...]
    reason: str | None
    recompute: bool = False

    @property
    def fused(self) -> bool:
        """Whether its layers run as one operator now."""
        return self.reason is None

    def __str__(self) -> str:
        one = "one operator, which keeps its input alone" if self.recompute else "one operator"
        what = one if self.fused else f"layer by layer: {self.reason}"
        return f"{self.name} ({', '.join(self.layers)}): {what}"


class _OfModule:
    """What was found in a module's forward."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self._forward = module, type(module).forward

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_forward"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forward = type(self.module).forward

    def check_forward(self) -> None:
        """NotFused where the class has another one since."""
        if type(self.module).forward is not self._forward:
            raise NotFused("its class has another forward since")


class _FusedMlp(_OfModule):
    """The forward of an MLP with a gate."""

    def __init__(self, module: nn.Module, roles: Mlp, recompute: bool) -> None:
        super().__init__(module)
        self.roles, self.recompute = roles, recompute
        self.layers = (*roles.entries, roles.down)
        f = roles.f and module._modules[roles.f]
        self._settings = settings_of(f) if isinstance(f, nn.Module) else ()

    def terms(self) -> list[Terms]:
        """Those of its layers; NotFused where they have to run one by one."""
        self.check_forward()
        check_no_hooks_of_all()
        children = self.module._modules
        found = []
        for name in self.roles.children:
            child = children.get(name)
            if child is None:
                raise NotFused(f"{name} is gone")
            try:
                check_called_plainly(child)
                if name in self.layers:
                    found.append(terms_of(child))
                elif settings_of(child) != self._settings:
                    raise NotFused("is another function than when it was fused")
            except NotFused as error:
                raise NotFused(f"{name} {error}") from None
        if not is_one_operator(found):
            raise NotFused("several adapters run, whose dropout probabilities differ")
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self.module
        if len(args) + len(kwargs) == 1:
            x = args[0] if args else kwargs.get(self.roles.argument)
            try:
                terms = self.terms()
                if isinstance(x, Tensor) and same_dtype(x, terms):
                    return self._run(x, terms)
            except NotFused:
                pass
        return type(module).forward(module, *args, **kwargs)

    def _run(self, x: Tensor, terms: list[Terms]) -> Tensor:
        adapters = [one.adapters[0] if one.adapters else None for one in terms]
        return lora_mlp(
            x,
            [one.weight for one in terms],
            [one.bias for one in terms],
            [one and one.lora_A for one in adapters],
            [one and one.lora_B for one in adapters],
            [one and one.lora_bias for one in adapters],
            activation=self.roles.activation,  # type: ignore[arg-type]
            scalings=[1.0 if one is None else one.scaling for one in adapters],
            dropout_p=[0.0 if one is None else one.dropout_p for one in adapters],
            recompute=self.recompute,
        )


class _OneX(_OfModule):
    """The forwards of layers that are called one after another with one x: the first makes what
    all do, and the others, called with the same tensor, have it made."""

    def __init__(self, module: nn.Module, layers: tuple[str, ...]) -> None:
        super().__init__(module)
        self.layers = layers

    def terms(self) -> list[Terms]:
        """Those of its layers; NotFused where they have to run one by one."""
        self.check_forward()
        found = []
        for name in self.layers:
            child = self.module._modules[name]
            assert child is not None
            try:
                if not is_forward_of(child, self):
                    other = "has a forward set on it"
                    raise NotFused(
                        other if "forward" in child.__dict__ else "is not the one that was fused"
                    )
                found.append(terms_of(child))
            except NotFused as error:
                raise NotFused(f"{name} {error}") from None
        if not is_one_operator(found):
            raise NotFused("several adapters run, whose dropout probabilities differ")
        return found

    def run(self, layer: nn.Module, place: int, x: Tensor) -> Tensor:
        """What the layer in this place makes of x."""
        # A graph has the layers' operators side by side. Of an x of inference mode nobody knows
        # whether it is changed between the calls. A single row is no pass to share.
        alone = x.numel() == x.shape[-1] if x.dim() > 0 else True
        alone = alone or self.module._modules[self.layers[place]] is not layer  # inside of another
        if not torch.compiler.is_compiling() and not x.is_inference() and not alone:
            made = _made_by_thread()
            found = self._made(x, made) if place == 0 else self._taken(layer, place, x, made)
            if found is not None:
                return found
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]

    def _made(self, x: Tensor, made: WeakKeyDictionary[_OneX, list[_Made | None]]) -> Tensor | None:
        """What the first layer makes of x, after all have; None where they run one by one."""
        made.pop(self, None)
        try:
            terms = self.terms()
        except NotFused:
            return None
        if not same_dtype(x, terms):
            return None
        weights, biases, adapters = zip(*terms, strict=True)
        y, *others = adapted_linears(x, weights, biases, adapters)
        layers = [self.module._modules[name] for name in self.layers[1:]]
        made[self] = [
            _Made(_State.now(x, layer, own), result)
            for layer, own, result in zip(layers, terms[1:], others, strict=True)
        ]
        return y

    def _taken(
        self,
        layer: nn.Module,
        place: int,
        x: Tensor,
        made: WeakKeyDictionary[_OneX, list[_Made | None]],
    ) -> Tensor | None:
        """What the first layer had made for this one, if nothing changed since."""
        results = made.get(self)
        if results is None:
            return None
        own, results[place - 1] = results[place - 1], None  # for one call
        try:
            same = own is not None and own.state == _State.now(x, layer, terms_of(layer))
        except NotFused:
            same = False
        if not same or not any(results):
            del made[self]
        return own.result if own is not None and same else None


@dataclass
class _State:
    """All that a layer's result is made of, kept so that no id is another tensor's later."""

    tensors: list[Tensor]
    versions: list[int]
    others: tuple[object, ...]

    @classmethod
    def now(cls, x: Tensor, layer: Any, terms: Terms) -> _State:
        tensors = [x, *layer.parameters()]
        wanted = [one.requires_grad for one in tensors]
        numbers = [(one.scaling, one.dropout_p) for one in terms.adapters]
        autocast = is_autocast_on(x) and torch.get_autocast_dtype(x.device.type)
        others = (numbers, wanted, torch.is_grad_enabled(), autocast)
        return cls(tensors, [one._version for one in tensors], others)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _State)
            and len(self.tensors) == len(other.tensors)
            and all(map(operator.is_, self.tensors, other.tensors))
            and self.versions == other.versions
            and self.others == other.others
        )


@dataclass
class _Made:
    """What a layer after the first is to return, as long as all is as it was."""

    state: _State
    result: Tensor


_LOCAL = threading.local()
_HOOKED = "_old_forward"  # where accelerate's hooks put a forward that was set on a module


def _made_by_thread() -> WeakKeyDictionary[_OneX, list[_Made | None]]:
    found: WeakKeyDictionary[_OneX, list[_Made | None]] | None = getattr(_LOCAL, "made", None)
    if found is None:
        found = _LOCAL.made = WeakKeyDictionary()
    return found


def _mlp_forward(block: _FusedMlp, *args: Any, **kwargs: Any) -> Any:
    return block(*args, **kwargs)


def _layer_forward(group: _OneX, layer: nn.Module, place: int, *args: Any, **kwargs: Any) -> Any:
    if len(args) == 1 and not kwargs:
        return group.run(layer, place, args[0])
    return type(layer).forward(layer, *args, **kwargs)


def block_of(module: nn.Module) -> _FusedMlp | _OneX | None:
    """The block that a module's forward is of."""
    return _asked_by(module.__dict__.get("forward"))


def _asked_by(forward: Any) -> _FusedMlp | _OneX | None:
    if isinstance(forward, functools.partial) and forward.func in (_mlp_forward, _layer_forward):
        found: _FusedMlp | _OneX = forward.args[0]
        return found
    return None


def is_forward_of(module: nn.Module, block: _OneX) -> bool:
    """Whether the module's forward is this block's."""
    return block_of(module) is block


def fuse_blocks(model: nn.Module, *, recompute: bool = False) -> list[Block]:
    """Runs the blocks of a model as one operator each, where their layers have no reason to run by
    themselves: MLPs with a gate by `lora_mlp`, layers that read one x (q, k and v of an attention)
    by `lora_linear_multi`. Values and gradients are those of the layers, within rounding.

    Blocks are known by what their forward does (transformers' Llama, Mistral, Qwen, Gemma, Phi-3,
    StableLM, OLMo, Granite and others like them). Modules, names, parameters and files stay as they
    are; hooks, merging, switching adapters, checkpointing and compiling work as before: each call
    looks at the layers, and runs them one by one where hooks, a plan of `lora_ext.batch`, DoRA or
    several dropout probabilities want it. Compiled code runs layers of one x one by one.

    Args:
        model: any module, with adapters or without.
        recompute: MLPs keep their input alone for backward, and make the products of gate and up
            once more there.

    Returns:
        A `Block` for each module with several linear layers: what runs as one operator, and why
        others do not.

    Raises:
        TypeError: model is not a module; recompute is not True or False.
    """
    check_module("fuse_blocks", "model", model)
    recompute = as_flag(recompute, "fuse_blocks", "recompute")
    if any(type(module).__module__.startswith("peft.") for module in model.modules()):
        import_module("lora_ext.integrations.peft.blocks")  # which knows PEFT's layers
    unfuse_blocks(model)
    found: list[Block] = []
    for name, module in model.named_modules():
        layers = tuple(n for n, child in module.named_children() if _is_linear(child))
        if len(layers) < 2:
            continue
        found += _fuse(name, module, layers, recompute)
    return found


def fuse_or_warn(model: nn.Module, where: str) -> None:
    """`fuse_blocks` for a function that has no place to say what came of it."""
    if not any(block.fused for block in fuse_blocks(model)):
        warn(
            f"{where}: fuse_blocks: no block of this model runs as one operator; "
            "lora_ext.fuse_blocks(model) says why"
        )


def unfuse_blocks(model: nn.Module) -> None:
    """Undoes `fuse_blocks`: every module has its class's forward again, also inside of a hook of
    accelerate.

    Raises:
        TypeError: model is not a module.
    """
    check_module("unfuse_blocks", "model", model)
    for module in model.modules():
        if block_of(module) is not None:
            del module.__dict__["forward"]
        if _asked_by(module.__dict__.get(_HOOKED)) is not None:
            module.__dict__[_HOOKED] = MethodType(type(module).forward, module)


def fused_blocks(model: nn.Module) -> list[Block]:
    """What the blocks that `fuse_blocks` made do now: their layers may have changed since.

    Raises:
        TypeError: model is not a module.
    """
    check_module("fused_blocks", "model", model)
    return [_now(name, block) for name, block in _blocks_in(model)]


def _blocks_in(model: nn.Module) -> Iterator[tuple[str, _FusedMlp | _OneX]]:
    for name, module in model.named_modules():
        own = block_of(module) or _asked_by(module.__dict__.get(_HOOKED))
        if isinstance(own, _FusedMlp):
            yield name, own
        groups = dict.fromkeys(block_of(child) for child in module.modules())
        mine = (one for one in groups if isinstance(one, _OneX) and one.module is module)
        yield from ((name, one) for one in mine)


def _fuse(
    name: str, module: nn.Module, layers: tuple[str, ...], recompute: bool
) -> Iterator[Block]:
    try:
        check_called_plainly(module)
    except NotFused as error:
        yield Block(name, None, layers, str(error))
        return
    try:
        roles = mlp_of(module)
    except NotRecognised as no_mlp:
        reason = f"it is no MLP with a gate ({no_mlp})"
    else:
        block = _FusedMlp(module, roles, recompute)
        module.forward = functools.partial(_mlp_forward, block)
        yield _now(name, block)
        return
    try:
        groups = groups_of_one_x(module, frozenset(layers))
        reason += ", and its forward calls no two layers of one variable, one after the other"
    except NotRecognised as error:
        groups = []
        reason += f", and {error}"
    rest = list(layers)
    for names in groups:
        group = _OneX(module, names)
        for place, one in enumerate(names):
            child = module._modules[one]
            assert child is not None
            if "forward" not in child.__dict__:
                child.forward = functools.partial(_layer_forward, group, child, place)
            rest.remove(one)
        yield _now(name, group)
    if len(rest) > 1:
        yield Block(name, None, tuple(rest), reason)


def _now(name: str, block: _FusedMlp | _OneX) -> Block:
    kind = "mlp" if isinstance(block, _FusedMlp) else "one x"
    recompute = isinstance(block, _FusedMlp) and block.recompute
    try:
        block.terms()
        if kind == "one x" and torch.is_inference_mode_enabled():
            raise NotFused("so they do in inference mode")
    except NotFused as error:
        return Block(name, kind, block.layers, str(error), recompute)
    return Block(name, kind, block.layers, None, recompute)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | LoraLayer) or type(module) in KINDS
