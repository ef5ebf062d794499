"""Bases whose files hold quantized weights, which commands do not read as numbers: codes without
their scales would be weights of another model."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

# How the names of tensors end that are beside codes, or are codes, and in what format.
_ENDS = (
    (("SCB", "weight_format"), "LLM.int8() of bitsandbytes"),
    (("weight.absmax", "weight.quant_map", "weight.nested_absmax"), "4 bits of bitsandbytes"),
    (("qweight", "qzeros"), "GPTQ or AWQ"),
    (("W_q",), "HQQ"),
    (("weight_packed",), "compressed-tensors"),
    (("weight_scale", "weight_scale_inv"), "8 bits with scales"),
    (("weight_qdata", "weight:qdata", "weight_quantized_data"), "torchao"),
)
_CODES = ("I8", "U8", "F8_E4M3", "F8_E5M2")  # safetensors' dtypes
CURE = (
    "give the base in floating point: that which was quantized, or this one made dense: load it "
    "with transformers (by the quantization_config of its config.json), "
    "lora_ext.quant.dequantize_(model), model.save_pretrained(FOLDER)"
)


def quantized_by_names(dtypes: Iterable[tuple[str, str]]) -> str | None:
    """Which tensor says that a base is quantized, and in what format, for a message.

    Args:
        dtypes: names of tensors and their dtypes, as safetensors spells them; "" if unknown.
    """
    for name, dtype in dtypes:
        for ends, kind in _ENDS:
            if any(name == end or name.endswith(f".{end}") for end in ends):
                return f"'{name}' is of {kind}"
        if ".quant_state." in name:
            return f"'{name}' is of 4 bits of bitsandbytes"
        if name.endswith("weight") and dtype in _CODES:
            return f"'{name}' is {dtype}, codes of a quantized weight"
    return None


def quantized_in(base: Path) -> str | None:
    """The same of a folder of a model, or of a file: by its safetensors' headers, then by
    config.json. What cannot be read is left to who reads it."""
    from safetensors import SafetensorError, safe_open

    config = base / "config.json"
    for path in [base] if base.is_file() else sorted(base.glob("*.safetensors")):
        with suppress(SafetensorError, OSError), safe_open(path, "pt") as file:
            names = list(file.keys())
            weights = [name for name in names if name.endswith("weight")]
            told = ((n, str(file.get_slice(n).get_dtype())) for n in weights)
            if found := quantized_by_names((n, "") for n in names) or quantized_by_names(told):
                return found
    if base.is_dir() and config.is_file():
        with suppress(OSError, ValueError, RecursionError):
            values = json.loads(config.read_bytes())
            given = values.get("quantization_config") if isinstance(values, dict) else None
            if given:
                method = given.get("quant_method") if isinstance(given, dict) else None
                named = f" of {str(method)[:40]}" if method else ""
                return f"its config.json has a quantization_config{named}"
    return None
