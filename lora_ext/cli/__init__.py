"""The program `lora-ext`, also `python -m lora_ext`.

No module here imports torch, or what does, before a command needs it: help is quick, and `doctor`
works where `import lora_ext` fails.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence

OK, NO, WRONG_USE = 0, 1, 2  # exit codes: fine; the answer is no, or it failed; not understood
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        import click
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        need = "click is not installed, which the command line needs: pip install click"
        return _fail(need, WRONG_USE, arguments)
    from lora_ext.cli.errors import sentence, wants_traceback
    from lora_ext.cli.program import program

    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            result = program.main(list(arguments), prog_name="lora-ext", standalone_mode=False)
            return result if isinstance(result, int) else OK
    except click.ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # of click 8.2 and newer: shows the help
            error.show()
            return error.exit_code
        return _fail(sentence(error), error.exit_code, arguments)
    except (click.Abort, KeyboardInterrupt):
        return _fail("interrupted", INTERRUPTED, arguments)
    except Exception as error:
        if wants_traceback(arguments):
            _answer(sentence(error), arguments)
            raise
        return _fail(sentence(error), NO, arguments)


def _fail(text: str, code: int, arguments: Sequence[str]) -> int:
    _answer(text, arguments)
    _say(text)
    return code


def _answer(text: str, arguments: Sequence[str]) -> None:
    """The error as an object, where --json asks for one, also of a command line that is refused."""
    options = list(arguments)
    options = options[: options.index("--")] if "--" in options else options
    command = next((one for one in options if not one.startswith("-")), "")
    if "--json" in options and command != "bench":
        print(json.dumps({"error": text}, indent=2), flush=True)


def _say(text: str) -> None:
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    print(f"lora-ext: {text}", file=sys.stderr, flush=True)
