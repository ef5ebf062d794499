"""What is said of an error: one sentence."""

from __future__ import annotations

from collections.abc import Sequence

import click

# What lora_ext, torch and the system raise of bad input, whose texts are meant to be read.
_EXPECTED = (ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError)

_LONGEST = 900


class WrongUse(click.ClickException):
    """What cannot be done as it was asked, exit code 2."""

    exit_code = 2


def sentence(error: Exception) -> str:
    """An error's text on one line."""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        text = " ".join(error.format_message().split())
        return f"{text.removesuffix('.')}; `{error.ctx.command_path} --help` says what it takes"
    if isinstance(error, click.ClickException):
        return error.message
    if isinstance(error, MemoryError):
        return "there is not enough memory for this"
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    if not isinstance(error, _EXPECTED) or not text:
        text = f"{type(error).__name__}: {text}; --traceback shows where"
    if isinstance(error, ImportError) and "lora_ext" in text:
        text += "; `lora-ext doctor` says more"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def wants_traceback(arguments: Sequence[str]) -> bool:
    """Whether errors are to be shown as Python shows them."""
    return "--traceback" in arguments[:1]


def need(package: str, what: str) -> None:
    """WrongUse where an optional package is missing."""
    import importlib.util

    if importlib.util.find_spec(package) is None:
        raise WrongUse(f"{what} needs {package}, which is not installed: pip install {package}")
