"""kohya's adapters (sd-scripts): `lora_unet_<module>.lora_down.weight`, `.lora_up.weight` and
`.alpha`, where the module's name has `_` for each `.`, which only the base's names tell apart."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.diffusers import check_sizes, number
from lora_ext.io.convert.formats import Format, LoadedAdapter, Options
from lora_ext.io.convert.pairs import OUT_PROJ, Pair, as_adapter, as_pairs, refuse_whole
from lora_ext.io.convert.tensor_file import Contents, contents, recogniser, size_of, write_file
from lora_ext.io.files import short

# Starts of names, and the component of a pipeline that each means.
_STARTS = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
}
_KEY = re.compile(rf"(?P<start>{'|'.join(_STARTS)})_(?P<flat>[^.]+)\.(?P<part>.+)")
_CLIP = re.compile(r"encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12])")
_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha", "dora_scale": "scale"}
_OTHERS = {
    "lora_mid": "LoCon in Tucker form (lora_mid)",
    "hada": "LoHa",
    "lokr": "LoKr",
    "oft": "OFT",
    "diff": "a whole difference of weights (diff)",
    "on_input": "(IA)3",
    "a1": "GLoRA",
    "b1": "GLoRA",
}


@dataclass
class _Module:
    start: str
    flat: str
    parts: dict[str, str] = field(default_factory=dict)
    name: str = ""


def _read(path: Path, options: Options) -> LoadedAdapter:
    found = contents(path)
    modules: dict[tuple[str, str], _Module] = {}
    for key in found.specs:
        match = _KEY.fullmatch(key)
        if match is None:
            found.refuse(
                key, f"is no name of kohya's ({', '.join(_STARTS)}_MODULE.lora_down.weight)"
            )
        if options.component not in (None, _STARTS[match["start"]]):
            continue
        if match["part"] not in _PARTS:
            kind = next((k for n, k in _OTHERS.items() if match["part"].startswith(n)), "no part")
            found.refuse(
                key, f"is of {kind}, which is no LoRA; only lora_down and lora_up are read"
            )
        one = (match["start"], match["flat"])
        modules.setdefault(one, _Module(*one)).parts[_PARTS[match["part"]]] = key
    if not modules:
        matches = filter(None, map(_KEY.fullmatch, found.specs))
        has = sorted({_STARTS[match["start"]] for match in matches})
        raise AdapterFileError(
            f"{path}: holds nothing of the component {options.component!r:.60}, but of "
            f"{', '.join(has)}"
        )
    known = _flat_names(options)
    for module in modules.values():
        _check(found, module)
        module.name = _name(found, module, known, options)
    names: dict[str, _Module] = {}
    for module in modules.values():
        if names.setdefault(module.name, module) is not module:
            found.refuse(module.parts["A"], f"is of {short(module.name)}, as is another")
    tensors = found.tensors()
    pairs = [_pair(found, module, tensors) for module in modules.values()]
    return as_adapter(pairs, options, where=str(path))


def _flat_names(options: Options) -> dict[str, list[str]]:
    """The base's modules by their names with `_`."""
    flat: dict[str, list[str]] = {}
    for name in options.modules:
        start = f"{options.component}." if options.component else ""
        name = name.removeprefix(start)
        if name not in (own := flat.setdefault(name.replace(".", "_"), [])):
            own.append(name)
    return flat


def _name(found: Contents, module: _Module, known: dict[str, list[str]], options: Options) -> str:
    key = module.parts["A"]
    if not known:
        found.refuse(
            key,
            "'_' stands for '.' and for itself, so the file does not say which module this is: "
            "give the names of the base's modules (modules=, --base)",
        )
    component = _STARTS[module.start]
    wanted = module.flat if options.component else f"{component}_{module.flat}"
    names = known.get(wanted) or known.get(_other_flat(wanted, component), [])
    if not options.component:
        names = [name for name in names if name.startswith(f"{component}.")]
    if len(names) > 1:
        found.refuse(
            key,
            f"could be {short(names[0])} or {short(names[1])}; convert it by a base without one",
        )
    if not names and not options.component and module.flat in known:
        found.refuse(
            key,
            f"is of a pipeline's {component}, and the base is one model, which has a module of "
            f"this name: say that it is that component, component={component!r} "
            f"(--component {component})",
        )
    if not names:
        found.refuse(
            key,
            f"the base has no module of this name (wanted {short(wanted)}, '_' for each '.'); "
            "names of another base, or of the original UNet of Stable Diffusion (input_blocks)",
        )
    layer = options.modules.get(names[0]) or options.modules.get(f"{component}.{names[0]}")
    down, up = (found.specs[module.parts[part]].shape for part in "AB")
    fitting = [(up[0], *down[1:]), (down[1], up[0])]  # Conv1D of transformers is [in, out]
    if layer is not None and layer.shape is not None and layer.shape not in fitting:
        found.refuse(key, f"{list(up)} and {list(down)} are no update of {list(layer.shape or ())}")
    return names[0]


def _other_flat(flat: str, component: str) -> str:
    """A text encoder's module in a base whose names lack `text_model`, as those of CLIPTextModel
    in transformers 5, where the file has it, or the reverse."""
    start = f"{component}_" if flat.startswith(f"{component}_") else ""
    name = flat.removeprefix(start)
    if not component.startswith("text_encoder"):
        return flat
    bare = name.removeprefix("text_model_")
    return start + (bare if bare != name else f"text_model_{name}")


def _check(found: Contents, module: _Module) -> None:
    parts = module.parts
    if "A" not in parts or "B" not in parts:
        lost = "lora_up" if "A" in parts else "lora_down"
        found.refuse(next(iter(parts.values())), f"has no {lost}.weight beside it")
    check_sizes(found, parts["A"], parts["B"])
    if "alpha" in parts and found.specs[parts["alpha"]].shape not in ((), (1,)):
        found.refuse(parts["alpha"], "expected one number")
    if "scale" in parts:
        shape, out = found.shape(parts["scale"]), found.specs[parts["B"]].shape[0]
        if shape[0] != out or any(size != 1 for size in shape[1:]):
            found.refuse(
                parts["scale"],
                f"got {list(shape)}, expected one number for each of {out} rows: DoRA over the "
                "input's columns is not PEFT's",
            )


def _pair(found: Contents, module: _Module, tensors: dict[str, Tensor]) -> Pair:
    own = {part: tensors[key] for part, key in module.parts.items()}
    A, B = own["A"], own["B"]
    # sd-scripts: without one the update counts as it is.
    alpha = number(found, module.parts["alpha"], tensors) if "alpha" in own else float(A.shape[0])
    magnitude = own.get("scale")
    if magnitude is not None:
        magnitude = magnitude.reshape(-1) if A.dim() == 2 else magnitude.reshape(_conv(A))
    return Pair(module.name, A, B, alpha, magnitude=magnitude)


def _conv(A: Tensor) -> tuple[int, ...]:
    """PEFT's shape of the magnitudes of a convolution."""
    return (1, -1, *[1] * (A.dim() - 2))


def _write(path: Path, adapter: LoadedAdapter, options: Options) -> None:
    pairs, others = as_pairs(adapter, str(path))
    refuse_whole(others, path)
    starts = {component: start for start, component in reversed(_STARTS.items())}
    names = (*options.modules, *(pair.name for pair in pairs))
    if any(name.startswith("text_encoder_2.") for name in names):
        starts["text_encoder"] = "lora_te1"
    tensors: dict[str, Tensor] = {}
    for pair in pairs:
        kind = {"an embedding": pair.embedding, "a bias of lora_B": pair.bias is not None}
        kind["an attention"] = bool(pair.part) or pair.name.endswith(OUT_PROJ)
        for what, is_one in kind.items():
            if is_one:
                raise AdapterFileError(
                    f"{path}: {short(pair.name)}: has {what}, which kohya's format cannot hold; "
                    "merge the adapter instead (lora-ext merge)"
                )
        component, _, name = pair.name.partition(".")
        if options.component is not None:
            component, name = options.component, pair.name
        if component not in starts or not name:
            raise AdapterFileError(
                f"{path}: {short(pair.name)}: kohya's names say the component of a pipeline: give "
                f"component= (--component), one of {', '.join(sorted(starts))}"
            )
        if component.startswith("text_encoder") and _CLIP.fullmatch(name):
            name = f"text_model.{name}"  # which sd-scripts' names have, whatever the base's are
        stem = f"{starts[component]}_{name.replace('.', '_')}"
        if f"{stem}.alpha" in tensors:
            raise AdapterFileError(
                f"{path}: {short(pair.name)}: has the same name as another with '_' for '.', "
                f"{short(stem)}; this format cannot hold both"
            )
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = pair.A, pair.B
        tensors[f"{stem}.alpha"] = _alpha(pair)
        if pair.magnitude is not None:
            scale = pair.magnitude.reshape(-1, *[1] * (pair.A.dim() - 1))
            tensors[f"{stem}.dora_scale"] = scale
    write_file(path, tensors)


def _alpha(pair: Pair) -> Tensor:
    """In the dtype of the rest, as sd-scripts has it, where that holds it."""
    alpha = torch.tensor(pair.alpha, dtype=pair.A.dtype)
    return alpha if float(alpha) == pair.alpha else torch.tensor(pair.alpha, dtype=torch.float32)


KOHYA = Format(
    about="a file of sd-scripts (lora_unet_..., lora_te_...)",
    asks=frozenset({"component"}),
    recognises=recogniser(lambda key: _KEY.fullmatch(key) is not None),
    bytes_of=size_of(),
    read=_read,
    write=_write,
)
