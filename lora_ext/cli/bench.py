"""`lora-ext bench`: the benchmark."""

from __future__ import annotations

import click


@click.command(
    short_help="Measure LoRA layers against the frozen layer under them.",
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(arguments: tuple[str, ...]) -> int:
    """Passes everything on to `python -m lora_ext.bench`, whose options `lora-ext bench --help`
    shows."""
    from lora_ext.bench.__main__ import run

    try:
        return run(arguments)
    except SystemExit as end:  # of argparse: after --help, or of wrong use
        return end.code if isinstance(end.code, int) else 0
