"""`lora-ext convert`: an adapter in another dtype or form."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_ext.cli.answers import Answer, counted, size, telling
from lora_ext.cli.errors import WrongUse
from lora_ext.cli.verify import PAIRS

if TYPE_CHECKING:
    from torch import Tensor

    from lora_ext.io.convert import LoadedAdapter

FORMATS = ("peft",)  # those of lora_ext.io.convert, whose import takes torch
_DTYPES = ("float32", "bfloat16", "float16")
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(short_help="Write an adapter in another dtype or form.")
@click.argument("adapter", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dtype", type=click.Choice(_DTYPES), help="That of all its tensors.")
@click.option(
    "--initial",
    type=_FOLDER,
    help="For pissa, olora, corda and lora_ga: the adapter as it was right after its "
    "initialisation. Writes a plain adapter of twice the rank, for the original base.",
)
@click.option(
    "--no-embeddings",
    is_flag=True,
    help="Leave out the embeddings of the base that PEFT saves beside an adapter.",
)
@click.option("--from", "source", type=click.Choice(FORMATS), help="Default: recognised.")
@click.option("--to", "target", type=click.Choice(FORMATS), default="peft", show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the adapter that is in OUT.")
@telling
def convert(
    adapter: Path,
    out: Path,
    dtype: str | None,
    initial: Path | None,
    no_embeddings: bool,
    source: str | None,
    target: str,
    overwrite: bool,
) -> Answer:
    """Write the adapter in ADAPTER into folder OUT, changed as the options say. Without options it
    is the same adapter, as lora_ext writes it. Both files of OUT are replaced as one, or none.

    Formats: peft (adapter_config.json and adapter_model.safetensors). Pickles (.bin) are not read:
    they can run code.

    \b
    Examples:
      lora-ext convert ./adapter ./adapter-bf16 --dtype bfloat16
      lora-ext convert ./pissa ./plain --initial ./pissa-before-training

    JSON: adapter, out, from, to, changes (a list of texts), tensors and bytes (counts).
    """
    from lora_ext.cli.adapters import adapters_in, check_memory
    from lora_ext.io.convert import FORMATS, LoadedAdapter, recognised

    name = source or recognised(adapter)
    if name is None:
        known = ", ".join(FORMATS)
        inner = adapters_in(adapter)
        raise WrongUse(f"{adapter}: is no adapter in a known format ({known}){inner}")
    if recognised(out) is not None and not overwrite:
        raise WrongUse(f"{out}: has an adapter already; --overwrite replaces it")
    # The tensors, those in the new dtype, and the bytes of the file.
    check_memory(3 * FORMATS[name].bytes_of(adapter), f"converting {adapter}")
    loaded, changes = FORMATS[name].read(adapter), list[str]()
    if no_embeddings:
        loaded = _without_embeddings(loaded, changes)
    if initial is not None:
        loaded = _plain(loaded, initial, changes)
    if dtype is not None:
        loaded = LoadedAdapter(loaded.config, _cast(loaded.tensors, dtype, changes))
    FORMATS[target].write(out, loaded)
    count = sum(tensor.nbytes for tensor in loaded.tensors.values())
    data = {
        "adapter": str(adapter), "out": str(out), "from": name, "to": target,
        "changes": changes, "tensors": len(loaded.tensors), "bytes": count,
    }  # fmt: skip
    what = "; ".join(changes) or "the same adapter"
    return Answer(data, f"{out}: {what}; {counted(len(loaded.tensors), 'tensor')}, {size(count)}")


def _cast(tensors: dict[str, Tensor], dtype: str, changes: list[str]) -> dict[str, Tensor]:
    import torch

    wanted: torch.dtype = getattr(torch, dtype)
    result, changed = {}, 0
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != wanted:
            result[key] = tensor.to(wanted)
            changed += 1
            if not bool(torch.isfinite(result[key]).all()):
                largest = float(tensor.double().abs().max())
                raise ValueError(
                    f"{key}: has values up to {largest:.3g}, too large for {dtype}; use bfloat16"
                )
        else:
            result[key] = tensor
    changes.append(f"{counted(changed, 'tensor')} to {dtype}")
    return result


def _without_embeddings(loaded: LoadedAdapter, changes: list[str]) -> LoadedAdapter:
    """Without the weights of embeddings that the config does not ask to save."""
    from lora_ext.adapters.checkpoint.base_tensors import EMBEDDINGS
    from lora_ext.cli.by_name import split_key
    from lora_ext.io.convert import LoadedAdapter

    asked = loaded.config.get("modules_to_save") or ()
    dropped = [
        key
        for key in loaded.tensors
        if split_key(key) is None
        and key.endswith((".weight", ".bias"))
        and (parts := key.replace(".base_layer", "").split("."))[-2] in EMBEDDINGS
        and not any(".".join(parts[:-1]).endswith(one) for one in asked)
        and not (parts[-1] == "bias" and loaded.config.get("bias", "none") != "none")
    ]
    changes.append(f"{counted(len(dropped), 'tensor')} of embeddings left out")
    kept = {key: tensor for key, tensor in loaded.tensors.items() if key not in dropped}
    return LoadedAdapter(loaded.config, kept)


def _plain(loaded: LoadedAdapter, initial: Path, changes: list[str]) -> LoadedAdapter:
    """What the adapter does beyond its initial state, as `save_pretrained` converts it, in a model
    made of its own tensors."""
    import torch

    from lora_ext.adapters import LoraModel
    from lora_ext.adapters.calibrated_configs import PLAIN
    from lora_ext.adapters.checkpoint.keys import PREFIX
    from lora_ext.cli.by_name import adapted_modules, model_of
    from lora_ext.io import save_adapter
    from lora_ext.io.convert import FORMATS
    from lora_ext.nn.init import mutates_weight

    kind = loaded.config.get("init_lora_weights")
    if not isinstance(kind, (str, bool)) or not mutates_weight(kind):
        hint = ""
        if kind is True:
            hint = (
                " (PEFT wants True in the initial adapter only: write the kind back into this one)"
            )
        raise WrongUse(
            f"--initial: the trained adapter's init_lora_weights is {kind!r}, expected pissa, "
            f"olora, corda or lora_ga{hint}"
        )
    shapes = {key: tuple(tensor.shape) for key, tensor in loaded.tensors.items()}
    base: dict[str, Tensor] = {}
    for key, tensor in loaded.tensors.items():
        if "lora_" not in key:
            base[key.removeprefix(PREFIX).replace(".base_layer", "")] = torch.empty_like(tensor)
    for name, parts in adapted_modules(shapes).items():
        for ends in PAIRS:
            if not {*ends} <= parts or f"{name}.weight" in base:
                continue
            A, B = (shapes[f"{PREFIX}{name}.{end}"] for end in ends)
            size = (B[0], *A[1:]) if ends == PAIRS[0] else (A[1], B[0])
            base[f"{name}.weight"] = torch.empty(size)  # never written: it takes no memory
    with tempfile.TemporaryDirectory(prefix="lora_ext-") as place:
        # Not initialised again, which would factorise weights that are not there.
        fields = loaded.config | PLAIN
        save_adapter(Path(place, "in"), fields, loaded.tensors)
        model = LoraModel.from_pretrained(
            model_of(base, shapes, "the adapter"), Path(place, "in"), autocast_adapter_dtype=False
        )
        model.peft_config["default"].init_lora_weights = kind  # which `initial` is compared with
        model.save_pretrained(
            Path(place, "out"), path_initial_model_for_weight_conversion=str(initial)
        )
        changes.append(f"{kind} to plain LoRA of twice the rank")
        return FORMATS["peft"].read(Path(place, "out"))
