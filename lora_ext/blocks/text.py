"""What the text of a module's forward says that a trace of it does not: a trace has one way through
it, without contexts and without what is done to anything but tensors."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from typing import Any

from torch import nn


class NotRecognised(Exception):
    """Why a module is not what was looked for; not an error."""


def forward_of(module: nn.Module) -> ast.stmt:
    """The definition of its class's forward, whose first argument is called self.

    Raises:
        NotRecognised: its text is not known.
    """
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
        function = ast.parse(text).body[0]
    except (OSError, TypeError, SyntaxError) as error:
        raise NotRecognised("the text of its forward is not known") from error
    if isinstance(function, ast.FunctionDef) and function.args.args:
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        if not any(node.id == "self" for node in names):
            for node in names:
                if node.id == function.args.args[0].arg:
                    node.id = "self"
    return function


def called_child(node: ast.AST) -> str | None:
    """The child that an expression reads, `self.child`."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "self" else None
    return None


# What values are made of here.
_PLAIN = (
    *(ast.Call, ast.keyword, ast.Attribute, ast.Name, ast.Constant, ast.Tuple, ast.Subscript),
    *(ast.UnaryOp, ast.BinOp, ast.expr_context, ast.operator, ast.unaryop),
)


def check_straight(module: nn.Module) -> None:
    """NotRecognised unless the forward is a sequence of assignments to variables and a return,
    without decorators, that calls children, methods of tensors and torch's functions alone."""
    function = forward_of(module)
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        raise NotRecognised("its forward is decorated, or no plain function")
    has_docstring = ast.get_docstring(function, clean=False) is not None
    space = inspect.unwrap(type(module).forward).__globals__
    for statement in function.body[has_docstring:]:
        targets: list[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        elif not isinstance(statement, ast.Return):
            raise NotRecognised(f"its forward has a statement of kind {type(statement).__name__}")
        parts = [node for target in targets for node in ast.walk(target)]
        if not all(isinstance(node, ast.Name | ast.Tuple | ast.expr_context) for node in parts):
            raise NotRecognised("its forward sets other things than variables")
        for node in ast.walk(statement.value) if statement.value is not None else ():
            if not isinstance(node, _PLAIN):
                raise NotRecognised(f"its forward has a {type(node).__name__} in it")
            if isinstance(node, ast.Call):
                _check_call(module, node.func, space)


def _check_call(module: nn.Module, called: ast.expr, space: dict[str, Any]) -> None:
    child = called_child(called)
    if child is not None:
        found = module._modules.get(child, module.__dict__.get(child))
    elif isinstance(called, ast.Attribute) and _value(called.value, space) is None:
        return  # a method of a value
    else:
        found = _value(called, space)
    if not isinstance(found, nn.Module) and not is_torchs(found):
        raise NotRecognised("its forward calls others than children and torch's functions")


def _value(node: ast.expr, space: dict[str, Any]) -> Any:
    """What a dotted name of a module of Python stands for; None where it is another name."""
    if isinstance(node, ast.Name):
        return space.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _value(node.value, space)
        return getattr(owner, node.attr, None) if isinstance(owner, types.ModuleType) else None
    return None


def is_torchs(function: Any) -> bool:
    """Whether it is a function of torch."""
    name = getattr(function, "__module__", None) or ""
    return callable(function) and f"{name}.".startswith("torch.")
