"""Which modules are an MLP with a gate, and which layers of a module read one x: by what their
forward does, whatever they are called.

An MLP is traced (torch.fx), with its children as leaves, and is one if that is `down(f(gate(x)) *
up(x))`. An attention's forward has branches that cannot be traced: its text says which layers are
called one after another, in one sequence of statements, with the same variable.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

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
    others: tuple[str, ...]  # children that a fused call does not call either
    argument: str  # the forward's, which x is


class NotRecognised(Exception):
    """Why a module is not what was looked for; not an error."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def mlp_of(module: nn.Module) -> Mlp:
    """The roles of the children of an MLP with a gate.

    Raises:
        NotRecognised: it is none.
    """
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # whatever its forward does with a proxy
        raise NotRecognised("its forward cannot be traced") from error
    nodes = [node for node in graph.nodes if node.users or node.op == "output"]
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise NotRecognised(f"its forward reads {len(inputs)} arguments")
    down = _argument_of(nodes[-1], "output")
    product = _argument_of(down, "call_module")
    if not _is_call(product, operator.mul, torch.mul, "mul") or len(product.args) != 2:
        raise NotRecognised("what its last layer reads is no product")
    for f, up in (product.args, product.args[::-1]):
        found = _roles(module, inputs[0], f, up)
        if found is not None:
            entries, activation, others = found
            return Mlp(entries, str(down.target), activation, others, str(inputs[0].target))
    raise NotRecognised("that product is not f(gate(x)) * up(x)")


def _roles(
    module: nn.Module, x: fx.Node, f: Any, up: Any
) -> tuple[tuple[str, ...], str, tuple[str, ...]] | None:
    if not isinstance(f, fx.Node) or not isinstance(up, fx.Node) or not f.args:
        return None
    gate = f.args[0]
    entries = _layers(x, gate, up)
    activation = None if entries is None else _activation(module, f)
    if entries is None or activation is None:
        return None
    return entries, activation, (str(f.target),) if f.op == "call_module" else ()


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
    """Which function a node is, by its values."""
    if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
        child = module.get_submodule(str(node.target))
        if any(True for _ in child.parameters()) or any(True for _ in child.buffers()):
            return None
        return activation_name(child)
    if node.op == "call_function" and len(node.args) == 1 and callable(node.target):
        target, options = node.target, node.kwargs
        return activation_name(lambda e: target(e, **options))
    return None


def activation_name(function: Callable[[Tensor], Any]) -> str | None:
    """Which of FUNCTIONS a function is, within float32's rounding of a tanh near -1."""
    e = torch.linspace(-8, 8, 129, device="cpu")
    with torch.no_grad():
        values = function(e)
        for name, other in FUNCTIONS.items():
            if isinstance(values, Tensor) and torch.allclose(values, other(e), rtol=0, atol=2e-6):
                return name
    return None


def groups_of_one_x(module: nn.Module, layers: frozenset[str]) -> list[tuple[str, ...]]:
    """Children, of `layers`, that its forward calls with one variable and nothing else, each once,
    in the order of the calls; no statement between them gives the variable another value.

    Raises:
        NotRecognised: the text of its forward is not known.
    """
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
        function = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise NotRecognised("the text of its forward is not known") from error
    counts: dict[str, int] = {}
    for node in ast.walk(function):
        name = _called(node)
        if name is not None:
            counts[name] = counts.get(name, 0) + 1
    once = frozenset(name for name in layers if counts.get(name) == 1)
    return [group for body in _bodies(function) for group in _groups(body, once)]


def _called(node: ast.AST) -> str | None:
    """The child that an expression reads, `self.child`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else None
    return None


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
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                group = open_groups.pop(node.id, [])
                if len(group) > 1:
                    yield tuple(group)
    yield from (tuple(group) for group in open_groups.values() if len(group) > 1)


def _calls(statement: ast.stmt, layers: frozenset[str]) -> list[tuple[str, str]]:
    """(child, variable) of the calls in a statement that always run, in order."""
    found: list[tuple[int, int, str, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.IfExp | ast.BoolOp | ast.Lambda | ast.comprehension):
            return
        if isinstance(node, ast.Call):
            name = _called(node.func)
            if name in layers and len(node.args) == 1 and not node.keywords:
                x = node.args[0]
                if isinstance(x, ast.Name):
                    found.append((node.lineno, node.col_offset, str(name), x.id))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(statement)
    return [(name, variable) for _, _, name, variable in sorted(found)]
