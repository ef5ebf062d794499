"""`lora-ext convert`: an adapter in another dtype or form."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lora_ext.cli.answers import Answer, counted, size, telling
from lora_ext.cli.errors import WrongUse, need
from lora_ext.cli.verify import PAIRS

if TYPE_CHECKING:
    from torch import Tensor

    from lora_ext.io.convert import LoadedAdapter

FORMATS = (
    "peft",
    "loralib",
    "loratorch",
    "candle",
    "diffusers",
    "kohya",
    "gguf",
)  # those of lora_ext.io.convert, whose import takes torch
_DTYPES = ("float32", "bfloat16", "float16")
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(short_help="Write an adapter in another dtype or form.")
@click.argument("adapter", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
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
@click.option(
    "--alpha",
    type=float,
    help="lora_alpha, which files of loralib, loratorch and candle do not hold: that of training, "
    "or that of the layers a file is written for.",
)
@click.option(
    "--base",
    type=click.Path(exists=True, path_type=Path),
    help="The base, for its modules' names (kohya), shapes (convolutions of loralib and loratorch) "
    "and heads (gguf, of which its folder alone): its folder, its safetensors, or a text file with "
    "a name in each line.",
)
@click.option(
    "--slices",
    multiple=True,
    metavar="NAME=1,0,1",
    help="Which parts of a fused projection have an adapter (enable_lora), with their rows where "
    "these differ: qkv=4096:1,1024:0,1024:1. For an attention of loratorch: q, k and v. "
    "Repeatable.",
)
@click.option(
    "--id",
    "ids",
    multiple=True,
    metavar="PREFIX.ID=FIELD",
    help="The field that a number in candle's names is of: lora_llama_csa.0=q_proj. Repeatable.",
)
@click.option("--component", help="Of a pipeline (diffusers, kohya), such as unet: it alone.")
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
    alpha: float | None,
    base: Path | None,
    slices: tuple[str, ...],
    ids: tuple[str, ...],
    component: str | None,
    overwrite: bool,
) -> Answer:
    """Write the adapter in ADAPTER to OUT, changed as the options say. Without options it is the
    same adapter, as lora_ext writes it. The files of OUT are replaced as one, or none.

    Formats: peft (a folder with adapter_config.json and adapter_model.safetensors), diffusers (a
    folder or a file), and one file each: loralib, loratorch (LoRA-Torch), candle (candle-lora),
    kohya (sd-scripts), gguf (llama.cpp). Pickles (.bin, .pt) are not read: they can run code.
    docs/formats.md says what each holds, asks and refuses.

    \b
    Examples:
      lora-ext convert ./adapter ./adapter-bf16 --dtype bfloat16
      lora-ext convert ./pissa ./plain --initial ./pissa-before-training
      lora-ext convert lora.safetensors ./adapter --alpha 16 --slices c_attn=1,0,1
      lora-ext convert ./adapter kohya.safetensors --to kohya --component unet
      lora-ext convert ./adapter adapter.gguf --to gguf --base ./llama

    JSON: adapter, out, from, to, changes (a list of texts), tensors and bytes (counts).
    """
    from lora_ext.cli.adapters import adapters_in, check_memory
    from lora_ext.cli.convert_options import options_of
    from lora_ext.io.convert import FORMATS, LoadedAdapter, check_asked, read, recognised
    from lora_ext.io.convert.peft import is_of_folder
    from lora_ext.io.convert.tensor_file import contents

    name = source or recognised(adapter)
    if name is None and adapter.is_file():
        contents(adapter)  # says what is wrong with it
    if name is None and is_of_folder(adapter):
        raise WrongUse(f"{adapter}: is one file of an adapter of PEFT's; give its folder")
    if name is None:
        known = ", ".join(FORMATS)
        inner = adapters_in(adapter)
        raise WrongUse(f"{adapter}: is no adapter in a known format ({known}){inner}")
    if "gguf" in (name, target):
        need("gguf", "converting to or from GGUF")
    if out.is_file() and target == "peft":
        raise WrongUse(f"{out}: is a file, expected a folder for {target}")
    if (out.is_file() or recognised(out) is not None) and not overwrite:
        what = "is there" if out.is_file() else "has an adapter"
        raise WrongUse(f"{out}: {what} already; --overwrite replaces it")
    # What asks for the base's modules; making their outline takes seconds.
    by_modules = not {name, target} <= {"peft", "gguf"}
    options = options_of(alpha, base, slices, ids, component, by_modules)
    try:
        check_asked(options, name, target)
    except ValueError as error:
        raise WrongUse(str(error)) from None
    # The tensors, those in the new dtype, and the bytes of the file.
    check_memory(3 * FORMATS[name].bytes_of(adapter), f"converting {adapter}")
    loaded, changes = read(adapter, name, options), list[str]()
    if component is not None and "component" in FORMATS[name].asks:
        changes.append(f"its {component}")
    if no_embeddings:
        loaded = _without_embeddings(loaded, changes)
    if initial is not None:
        loaded = _plain(loaded, initial, changes)
    if dtype is not None:
        loaded = LoadedAdapter(loaded.config, _cast(loaded.tensors, dtype, changes))
    FORMATS[target].write(out, loaded, options)
    if target != "gguf" and (needed := _alpha_in(out)) is not None:
        changes.append(f"for layers made with lora_alpha={needed}")
    count = sum(tensor.nbytes for tensor in loaded.tensors.values())
    data = {
        "adapter": str(adapter), "out": str(out), "from": name, "to": target,
        "changes": changes, "tensors": len(loaded.tensors), "bytes": count,
    }  # fmt: skip
    what = "; ".join(changes) or "the same adapter"
    return Answer(data, f"{out}: {what}; {counted(len(loaded.tensors), 'tensor')}, {size(count)}")


def _alpha_in(out: Path) -> str | None:
    """What the reader of a file has to know that does not say it but in its metadata."""
    from lora_ext.io import open_tensors
    from lora_ext.io.convert.tensor_file import HEADER

    if not out.is_file():
        return None
    with open_tensors(out, max_header_bytes=HEADER) as file:
        return file.metadata.get("lora_alpha")


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
    from lora_ext.io.convert import FORMATS, Options
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
        return FORMATS["peft"].read(Path(place, "out"), Options())
