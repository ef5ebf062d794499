"""Which modules are an MLP with a gate, and which layers of a module read one x: by what their
forward does, whatever they are called.

An MLP's forward is a sequence of assignments, without branches, and a trace of it (torch.fx), with
its children as leaves, is `down(f(gate(x)) * up(x))`. An attention's forward has branches: its text
says which layers are called one after another, in one sequence of statements, with one variable.
"""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from lora_ext.blocks.text import (
    NotRecognised,
    called_child,
    check_straight,
    forward_of,
    is_torchs,
)

F = nn.functional

# f, by its name in `lora_mlp`.
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda e: F.gelu(e, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda e: F.relu(e).square(),
}


class Mlp(NamedTuple):
    """The roles of a module's children."""

    entries: tuple[str, ...]  # gate and up, or one that is both
    down: str
    activation: str
    f: str | None  # the child that f is, which a fused call does not call either
    argument: str  # the forward's, which x is

    @property
    def children(self) -> tuple[str, ...]:
        """All that a fused call does not call."""
        return (*self.entries, self.down, *([] if self.f is None else [self.f]))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def mlp_of(module: nn.Module) -> Mlp:
    """The roles of the children of an MLP with a gate.

    Raises:
        NotRecognised: it is none.
    """
    check_straight(module)  # which a trace does not tell
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever its forward does with a proxy
        raise NotRecognised("its forward cannot be traced") from error
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder" and node.users]
    if len(inputs) != 1:
        raise NotRecognised(f"its forward reads {len(inputs)} arguments")
    if any(not node.users for node in nodes if node.op not in ("placeholder", "output")):
        raise NotRecognised("its forward makes what it does not use")
    down = _argument_of(nodes[-1], "output")
    product = _argument_of(down, "call_module")
    if not _is_call(product, operator.mul, torch.mul, "mul") or len(product.args) != 2:
        raise NotRecognised("what its last layer reads is no product")
    for f, up in (product.args, product.args[::-1]):
        found = _roles(module, inputs[0], f, up)
        if found is not None:
            entries, activation, child = found
            roles = Mlp(entries, str(down.target), activation, child, str(inputs[0].target))
            if all(name in module._modules for name in roles.children):
                return roles
    raise NotRecognised("that product is not f(gate(x)) * up(x)")


def _roles(
    module: nn.Module, x: fx.Node, f: Any, up: Any
) -> tuple[tuple[str, ...], str, str | None] | None:
    if not isinstance(f, fx.Node) or not isinstance(up, fx.Node) or not f.args:
        return None
    gate = f.args[0]
    entries = _layers(x, gate, up)
    activation = None if entries is None else _activation(module, f)
    if entries is None or activation is None:
        return None
    return entries, activation, str(f.target) if f.op == "call_module" else None


def _layers(x: fx.Node, gate: Any, up: Any) -> tuple[str, ...] | None:
    """The layers of x that made both: two, or one of which they are the halves."""
    if _is_layer(gate, x) and _is_layer(up, x):
        return (str(gate.target), str(up.target)) if gate is not up else None
    if not (_is_call(gate, operator.getitem) and _is_call(up, operator.getitem)):
        return None
    (both, first), (also, second) = gate.args, up.args
    if both is not also or (first, second) != (0, 1) or not _is_call(both, torch.chunk, "chunk"):
        return None
    whole, *cut = both.args
    if sorted([*cut, *both.kwargs.values()]) != [-1, 2] or not _is_layer(whole, x):
        return None
    return (str(whole.target),)


def _is_layer(node: Any, x: fx.Node) -> bool:
    """Whether it is a child's result of x."""
    return isinstance(node, fx.Node) and node.op == "call_module" and node.args == (x,)


def _argument_of(node: fx.Node, op: str) -> fx.Node:
    """The one argument of a node of this kind."""
    if node.op != op or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        raise NotRecognised("its forward does not end with a layer's result")
    return node.args[0]


def _is_call(node: Any, *targets: object) -> bool:
    called = isinstance(node, fx.Node) and node.op in ("call_function", "call_method")
    return called and node.target in targets


def _activation(module: nn.Module, node: fx.Node) -> str | None:
    """Which function a node is, by its values and derivatives."""
    if len(node.args) != 1 or any(isinstance(value, fx.Node) for value in node.kwargs.values()):
        return None
    if node.op == "call_module" and not node.kwargs:
        child = module.get_submodule(str(node.target))
        # Of these nothing else happens in a call, and nothing changes with its mode.
        known = type(child).__module__.startswith(("torch.nn.", "transformers.activations"))
        return activation_name(child) if known and not any(_tensors_of(child)) else None
    if node.op == "call_function" and is_torchs(node.target):
        target: Any = node.target
        return activation_name(lambda e: target(e, **node.kwargs))
    return None


def _tensors_of(child: nn.Module) -> Iterator[object]:
    """And children: whatever an activation has none of."""
    yield from child.children()
    yield from child.parameters()
    yield from child.buffers()


_MODES = ("training", "call_super_init", "dump_patches")


def settings_of(child: nn.Module) -> tuple[object, ...]:
    """What a module without tensors computes by; equal in a copy of it."""
    own = [
        (key, _named(value))
        for key, value in vars(child).items()
        if key not in _MODES and key[0] != "_"
    ]
    return type(child), *sorted(own, key=lambda pair: pair[0])


def _named(value: object) -> object:
    if isinstance(value, functools.partial):
        return _named(value.func), value.args, value.keywords
    name = getattr(value, "__qualname__", None)
    return value if name is None else (getattr(value, "__module__", None), name)


_FAR = [10.5, 20.0, 1e2, 1e3, 1e4]


def activation_name(function: Callable[[Tensor], Any]) -> str | None:
    """Which of FUNCTIONS a function is, within float32's rounding of a tanh near -1."""
    e = torch.cat([torch.linspace(-8, 8, 129), *(torch.tensor([-far, far]) for far in _FAR)])
    found = _values(function, e)
    for name, other in FUNCTIONS.items():
        wanted = _values(other, e)
        assert wanted is not None
        if found is not None and all(
            torch.allclose(one, same, rtol=1e-6, atol=4e-6)
            for one, same in zip(found, wanted, strict=True)
        ):
            return name
    return None


def _values(function: Callable[[Tensor], Any], at: Tensor) -> tuple[Tensor, Tensor] | None:
    """What it makes, and its derivative; None where it has none."""
    try:
        with torch.enable_grad():
            e = at.clone().requires_grad_()
            values = function(e * 1)  # which it may change
            (derivative,) = torch.autograd.grad(values.sum(), e)
    except Exception:  # whatever it does with a vector
        return None
    return (values.detach(), derivative) if values.shape == at.shape else None


def groups_of_one_x(module: nn.Module, layers: frozenset[str]) -> list[tuple[str, ...]]:
    """Children, of `layers`, that its forward calls with one variable and nothing else, each once,
    in the order of the calls; no statement between them gives the variable another value.

    Raises:
        NotRecognised: the text of its forward is not known.
    """
    function = forward_of(module)
    counts: dict[str, int] = {}
    for node in ast.walk(function):
        name = called_child(node)
        if name is not None:
            counts[name] = counts.get(name, 0) + 1
    once = frozenset(name for name in layers if counts.get(name) == 1)
    return [group for body in _bodies(function) for group in _groups(body, once)]


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Sequences of statements."""
    for one in ast.walk(node):
        for field in ("body", "orelse", "finalbody"):
            body = getattr(one, field, None)
            if isinstance(body, list) and body and not isinstance(one, ast.IfExp | ast.Lambda):
                yield body


def _groups(body: list[ast.stmt], layers: frozenset[str]) -> Iterator[tuple[str, ...]]:
    open_groups: dict[str, list[str]] = {}
    for statement in body:
        if isinstance(statement, ast.Assign | ast.AnnAssign | ast.Return | ast.Expr):
            for name, variable in _calls(statement, layers):
                open_groups.setdefault(variable, []).append(name)
        elif any(isinstance(node, _LEAVES) for node in ast.walk(statement)):
            yield from (tuple(group) for group in open_groups.values() if len(group) > 1)
            open_groups.clear()  # the next call may not come
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                group = open_groups.pop(node.id, [])
                if len(group) > 1:
                    yield tuple(group)
    yield from (tuple(group) for group in open_groups.values() if len(group) > 1)


# What is in these runs any number of times.
_NOT_ONCE = (
    *(ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp),
    ast.GeneratorExp,
)
_LEAVES = (ast.Return, ast.Raise, ast.Break, ast.Continue)


def _calls(statement: ast.stmt, layers: frozenset[str]) -> list[tuple[str, str]]:
    """(child, variable) of the calls in a statement that always run, in order."""
    found: list[tuple[int, int, str, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, _NOT_ONCE):
            return
        if isinstance(node, ast.Call):
            name = called_child(node.func)
            if name in layers and len(node.args) == 1 and not node.keywords:
                x = node.args[0]
                if isinstance(x, ast.Name):
                    found.append((node.lineno, node.col_offset, str(name), x.id))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(statement)
    return [(name, variable) for _, _, name, variable in sorted(found)]
