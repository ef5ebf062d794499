"""Adapters of diffusers: PEFT's names below those of a pipeline's components, in one file, with
PEFT's config in its metadata; and the names that diffusers wrote before it used PEFT."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_ext.errors import AdapterFileError
from lora_ext.io.convert.alphas import Alphas
from lora_ext.io.convert.formats import Format, LoadedAdapter, Options
from lora_ext.io.convert.pairs import (
    PREFIX,
    Pair,
    as_adapter,
    as_pairs,
    refuse_other_fields,
    refuse_whole,
)
from lora_ext.io.convert.parts import check_parts
from lora_ext.io.convert.tensor_file import (
    Contents,
    contents,
    file_in,
    recogniser,
    size_of,
    write_file,
)
from lora_ext.io.files import json_text, parse_json, short

FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
COMPONENTS = frozenset(
    "unet transformer transformer_2 text_encoder text_encoder_2 text_encoder_3 prior "
    "controlnet vae".split()
)
# Ends of keys: those of PEFT, those of diffusers between, and the oldest below `processor`.
_PARTS = {
    "lora_A.weight": "A",
    "lora_B.weight": "B",
    "lora.down.weight": "A",
    "lora.up.weight": "B",
    "lora_linear_layer.down.weight": "A",
    "lora_linear_layer.up.weight": "B",
    "lora_embedding_A": "embedding_A",
    "lora_embedding_B": "embedding_B",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "alpha": "alpha",
}
_OF_PEFT = ("lora_A", "lora_B", "lora_embedding_", "lora_magnitude_vector")
_OLD = re.compile(r"(?P<name>.+)\.to_(?P<which>q|k|v|out)_lora\.(?P<part>down|up)\.weight")
_OLD_ALPHA = re.compile(r"(?P<name>.+)\.to_(?P<which>q|k|v|out)_lora\.alpha")


def split(key: str, component: str) -> tuple[str, str] | None:
    """(module, part) of a key without its component; None where it is no such key."""
    old = key.replace(".processor.", ".")  # which was no module of the model; in PEFT's names it is
    if match := _OLD.fullmatch(old) or _OLD_ALPHA.fullmatch(old):
        part = match.groupdict().get("part")
        which, text = match["which"], component.startswith("text_encoder")
        last = f"{which}_proj" if text else "to_out.0" if which == "out" else f"to_{which}"
        return f"{match['name']}.{last}", {"down": "A", "up": "B", None: "alpha"}[part]
    for end, part in _PARTS.items():
        if key.endswith(f".{end}") and len(key) > len(end) + 1:
            return (key if end.startswith(_OF_PEFT) else old)[: -len(end) - 1], part
    return None


def _component_of(key: str, options: Options) -> tuple[str, str]:
    """The component and the rest of a key."""
    first, _, rest = key.partition(".")
    if first == options.component or (first in COMPONENTS and rest):
        return first, rest
    return "", key


@dataclass
class _Module:
    """Keys of one module's parts, and where in the pipeline it is."""

    component: str
    name: str
    parts: dict[str, str]


def _read(path: Path, options: Options) -> LoadedAdapter:
    path = file_in(path, FILE)
    found = contents(path)
    modules: dict[tuple[str, str], _Module] = {}
    for key in found.specs:
        component, rest = _component_of(key, options)
        if options.component is not None and component != options.component:
            continue
        place = split(rest, component)
        if place is None:
            found.refuse(key, "is no name of diffusers' adapters (MODULE.lora_A.weight)")
        module = modules.setdefault((component, place[0]), _Module(component, place[0], {}))
        if module.parts.setdefault(place[1], key) != key:
            found.refuse(key, f"is there in two spellings, also as {short(module.parts[place[1]])}")
    if not modules:
        has = sorted({_component_of(key, options)[0] for key in found.specs})
        but = f"but of {', '.join(filter(None, has))[:200]}"
        if has == [""]:
            but = "as its names have no component: leave component= (--component) out"
        raise AdapterFileError(
            f"{path}: holds nothing of the component {options.component!r:.60}, {but}"
        )
    for module in modules.values():
        _check(found, module)
    said = _metadata(found)
    for module in modules.values():
        if said and "alpha" in module.parts:
            found.refuse(
                module.parts["alpha"], f"is beside {METADATA}, which says lora_alpha; drop one"
            )
    components = {module.component for module in modules.values()}
    configs = {one: _config_of(said, one, path) for one in components}
    alphas = {one: Alphas(config, str(path)) for one, config in configs.items() if config}
    tensors = found.tensors()
    pairs = [
        _pair(found, one, tensors, alphas.get(one.component), options) for one in modules.values()
    ]
    adapter = as_adapter(pairs, options, where=str(path))
    for one, config in configs.items() if said else ():
        start = PREFIX if len(components) == 1 else f"{PREFIX}{one}."
        check_parts(config, [key for key in adapter.tensors if key.startswith(start)], str(path))
    (only,) = components if len(components) == 1 else (None,)
    if said and only is not None and only in (options.component, ""):
        return LoadedAdapter(configs[only], adapter.tensors)
    for one in components:
        refuse_other_fields(configs[one], str(path))
    return adapter


def _metadata(found: Contents) -> dict[str, Any]:
    text = found.metadata.get(METADATA)
    return {} if text is None else parse_json(text.encode(), f"{found.path}: {METADATA}")


def _config_of(said: Mapping[str, Any], component: str, path: Path) -> dict[str, Any]:
    """The component's fields; empty where the file says none."""
    start = f"{component}." if component else ""
    config = {name[len(start) :]: value for name, value in said.items() if name.startswith(start)}
    if said and "r" not in config:
        raise AdapterFileError(
            f"{path}: {METADATA} has no fields of {component or 'a config'!r}, expected "
            f"'{start}r' and so on; drop it or write the file again"
        )
    if config and config.setdefault("peft_type", "LORA") != "LORA":
        raise AdapterFileError(f"{path}: {METADATA}: peft_type is no LORA")
    return config


def _check(found: Contents, module: _Module) -> None:
    """Whole pairs whose sizes fit."""
    parts = module.parts
    kind = "embedding_" if "embedding_A" in parts or "embedding_B" in parts else ""
    A, B = f"{kind}A", f"{kind}B"
    if A not in parts or B not in parts:
        some = next(iter(parts.values()))
        found.refuse(some, f"has no {'lora_A' if A not in parts else 'lora_B'} beside it")
    check_sizes(found, parts[A], parts[B])
    out = found.specs[parts[B]].shape[0]
    if "bias" in parts and found.shape(parts["bias"]) != (out,):
        found.refuse(parts["bias"], f"expected [{out}], the rows of lora_B")
    if "magnitude" in parts and out not in found.shape(parts["magnitude"]):
        found.refuse(parts["magnitude"], f"expected {out} elements, the rows of lora_B")


def check_sizes(found: Contents, A: str, B: str) -> None:
    """Two matrices, or two kernels of which the second is 1 x 1, of one rank."""
    a, b = found.shape(A, B), found.shape(B, A)
    if len(a) != len(b) or len(a) < 2 or any(size != 1 for size in b[2:]):
        found.refuse(B, f"got {list(b)} with {list(a)}, expected matrices, or a kernel and a 1 x 1")
    groups, left = divmod(a[0], b[1])
    if left or (groups != 1 and (len(a) == 2 or b[0] % groups)):
        found.refuse(B, f"got {list(b)} with {list(a)}, expected one rank in both")


def number(found: Contents, key: str, tensors: Mapping[str, Tensor]) -> float:
    """A tensor of one number above 0."""
    if tensors[key].numel() != 1 or not float(tensors[key]) > 0:
        found.refuse(
            key,
            "expected one number above 0 (programs differ in whether 0 means the rank or nothing)",
        )
    return float(tensors[key])


def _pair(
    found: Contents,
    module: _Module,
    tensors: Mapping[str, Tensor],
    alphas: Alphas | None,
    options: Options,
) -> Pair:
    own = {part: tensors[key] for part, key in module.parts.items()}
    embedding = "embedding_A" in own
    A, B = (own["embedding_A"], own["embedding_B"]) if embedding else (own["A"], own["B"])
    if alphas is not None:
        alpha = alphas.of(module.name, A.shape[0])
    elif "alpha" in module.parts:
        alpha = number(found, module.parts["alpha"], tensors)
    else:  # diffusers: W + B A
        alpha = float(A.shape[0])
    prefix = "" if not module.component or options.component else f"{module.component}."
    bias, magnitude = own.get("bias"), own.get("magnitude")
    return Pair(f"{prefix}{module.name}", A, B, alpha, embedding, "", bias, magnitude)


def _write(path: Path, adapter: LoadedAdapter, options: Options) -> None:
    keys = {key: key.removeprefix(PREFIX) for key in adapter.tensors}
    components = {_component_of(name, Options())[0] for name in keys.values()}
    refuse_whole((name for name in keys.values() if split(name, "") is None), path)
    if options.component is not None:
        start = f"{options.component}."
        tensors = {start + name: adapter.tensors[key] for key, name in keys.items()}
        config = {start + name: value for name, value in adapter.config.items()}
    elif "" in components:
        tensors = {name: adapter.tensors[key] for key, name in keys.items()}
        config = dict(adapter.config)
    else:
        tensors, config = {}, {}
        pairs, others = as_pairs(adapter, str(path))
        refuse_whole(others, path)
        for component in sorted(components):
            start = f"{component}."
            own = [
                replace(pair, name=pair.name.removeprefix(start))
                for pair in pairs
                if pair.name.startswith(start)
            ]
            one = as_adapter(own, options, where=str(path))
            check_parts(one.config, one.tensors, str(path))
            tensors |= {start + key.removeprefix(PREFIX): t for key, t in one.tensors.items()}
            config |= {start + name: value for name, value in one.config.items()}
    write_file(path, tensors, {METADATA: json_text(config)}, FILE)


def _is_key(key: str) -> bool:
    return not key.startswith(PREFIX) and (
        key.endswith(tuple(f".{end}" for end, part in _PARTS.items() if part.endswith("A")))
        or _OLD.fullmatch(key) is not None
    )


DIFFUSERS = Format(
    about=f"a folder with {FILE}, or such a file",
    asks=frozenset({"component"}),
    recognises=recogniser(_is_key, FILE),
    bytes_of=size_of(FILE),
    read=_read,
    write=_write,
)
