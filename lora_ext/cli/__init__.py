"""The program `lora-ext`, also `python -m lora_ext`.

No module here imports torch, or what does, before a command needs it: help is quick, and `doctor`
works where `import lora_ext` fails.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

OK, NO, WRONG_USE = 0, 1, 2  # exit codes: fine; the answer is no, or it failed; not understood
INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code."""
    try:
        import click
    except ModuleNotFoundError as error:
        if error.name != "click":
            raise
        return _fail("click is not installed, which the command line needs: pip install click")
    from lora_ext.cli.errors import sentence, wants_traceback
    from lora_ext.cli.program import program

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
            result = program.main(list(arguments), prog_name="lora-ext", standalone_mode=False)
            return result if isinstance(result, int) else OK
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _say("interrupted")
        return INTERRUPTED
    except Exception as error:
        if wants_traceback(arguments):
            raise
        return _fail(sentence(error), NO)


def _fail(text: str, code: int = WRONG_USE) -> int:
    _say(text)
    return code


def _say(text: str) -> None:
    text = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    print(f"lora-ext: {text}", file=sys.stderr, flush=True)
