"""The commands of `lora-ext`."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import click

from lora_ext.cli.bench import bench
from lora_ext.cli.convert import convert
from lora_ext.cli.diff import diff
from lora_ext.cli.doctor import doctor
from lora_ext.cli.explain import explain
from lora_ext.cli.info import info
from lora_ext.cli.inspect import inspect
from lora_ext.cli.merge import merge
from lora_ext.cli.verify import verify

_COMMANDS = (info, doctor, inspect, verify, diff, merge, convert, explain, bench)


class _InOrder(click.Group):
    """Help lists the commands as they are given, not by the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _version(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    try:
        version = importlib.metadata.version("lora-ext")
    except importlib.metadata.PackageNotFoundError:
        version = f"of the folder {Path(__file__).parents[1]}, which is not installed"
    click.echo(f"lora-ext {version}")
    ctx.exit()


@click.group(
    cls=_InOrder,
    commands={str(command.name): command for command in _COMMANDS},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=(
        "Exit codes: 0 all is well; 1 the answer is no, a problem was found, or it failed (one "
        "sentence on stderr says why); 2 the command line cannot be used."
    ),
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version and exit.",
)
@click.option(
    "--traceback",
    is_flag=True,
    expose_value=False,
    help="Show errors as Python does; stands before the command.",
)
def program() -> None:
    """LoRA adapters on files, and what this installation of lora_ext can do.

    An adapter is a folder of PEFT's: adapter_config.json and adapter_model.safetensors. Nothing is
    downloaded, no pickle is read, and no code of a model's folder is run.
    """
