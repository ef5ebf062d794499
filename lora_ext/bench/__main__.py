"""Entry point of `python -m lora_ext.bench`."""

import sys
from collections.abc import Sequence

OPTIONAL = ("rich", "matplotlib", "transformers")


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; tables and plots need packages that the rest of lora_ext does not."""
    try:
        from lora_ext.bench.cli import main

        return main(arguments)
    except ModuleNotFoundError as error:
        if error.name not in OPTIONAL:
            raise
        print(f"{error.name} is not installed: pip install 'lora-ext[bench]'", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(run())
