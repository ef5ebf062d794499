"""`lora-ext explain`: which code each layer of a model runs with an adapter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import click

from lora_ext._progress import progress
from lora_ext.cli.adapters import ADAPTER
from lora_ext.cli.answers import Answer, telling
from lora_ext.cli.errors import WrongUse

_DTYPES = ("float32", "bfloat16", "float16")


@click.command(short_help="Tell which code each layer of a model runs with an adapter, and why.")
@click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--adapter",
    type=ADAPTER,
    help="An adapter folder, which is loaded.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, path_type=Path),
    help="An adapter_config.json, or a folder with one: a new adapter. Without this and --adapter: "
    "LoraConfig(), on the usual modules of the architecture.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=2048,
    show_default=True,
    help="Rows of x: batch times sequence.",
)
@click.option("--dtype", type=click.Choice(_DTYPES), help="Of the base. Default: its files'.")
@click.option(
    "--device", type=click.Choice(("cpu", "cuda")), help="Default: cuda where torch finds a GPU."
)
@click.option("--train", is_flag=True, help="In training mode, with dropout.")
@telling
def explain(
    model: Path,
    adapter: Path | None,
    config: Path | None,
    tokens: int,
    dtype: str | None,
    device: str | None,
    train: bool,
) -> Answer:
    """Tell which code every layer of MODEL, a folder of transformers, runs with an adapter, and
    why. The model's weights are not read; on a GPU their memory is needed. A quantized MODEL is
    refused: what its layers run depends on what loads it.

    JSON: model, tokens, device, dtype, layers (a list of name, path, reason), paths (how many
    layers run each).
    """
    if adapter is not None and config is not None:
        raise click.UsageError("--adapter and --config: expected at most one of the two")
    import torch

    from lora_ext.adapters import LoraConfig, LoraModel
    from lora_ext.adapters import explain as explain_model
    from lora_ext.adapters.calibrated_configs import PLAIN
    from lora_ext.cli.adapters import task_of, without_initialisation
    from lora_ext.cli.models import outline
    from lora_ext.cli.quantized import quantized_in

    if quantized := quantized_in(model):
        raise WrongUse(
            f"{model}: is quantized, and its layers run other code than those of its outline: "
            f"{quantized}; load it, with its adapter, and print(lora_ext.explain(model))"
        )
    if device == "cuda" and not torch.cuda.is_available():
        raise WrongUse("--device cuda: torch finds no CUDA device here")
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = LoraConfig() if config is None else LoraConfig.from_pretrained(config)
    task = wanted.task_type if adapter is None else task_of(adapter)
    with progress(f"Making the outline of {model}"):
        base = outline(model, task, dtype=getattr(torch, dtype) if dtype else None, device=where)
        if adapter is not None:
            with without_initialisation(adapter) as plain:
                lora = LoraModel.from_pretrained(base, plain, is_trainable=train)
        else:
            vars(wanted).update(PLAIN)  # there are no weights to initialise from
            lora = LoraModel(base, wanted)
    rows = explain_model(lora.train(train).get_base_model(), tokens)
    held = str(next(base.parameters()).dtype).removeprefix("torch.")
    paths = Counter(row.path for row in rows)
    data = {
        "model": str(model), "tokens": tokens, "device": where, "dtype": held,
        "layers": [{"name": r.name, "path": r.path, "reason": r.reason} for r in rows],
        "paths": dict(paths),
    }  # fmt: skip
    counts = ", ".join(f"{count} {path}" for path, count in paths.most_common())
    return Answer(data, f"{rows}\n\n{len(rows)} layers for {tokens} rows, {held}: {counts}")
