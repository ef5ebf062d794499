"""LoftQ over bases that are quantized already: adapters that make up for the error."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lora_ext.adapters.inject import adapted
from lora_ext.arguments import refuse
from lora_ext.nn.adapter import DEFAULT
from lora_ext.nn.dora import MAGNITUDE
from lora_ext.nn.transaction import Transaction

if TYPE_CHECKING:
    from lora_ext.nn.quantized import QuantizedBase

_WEIGHTS = "model.safetensors"


@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | Path | None = None,
    adapter_name: str = DEFAULT,
    callback: Callable[[nn.Module, str], bool] | None = None,
) -> None:
    """Gives an adapter of each layer over a quantized base the values with which the layer is
    nearest to the one that was quantized (LoftQ, arXiv:2310.08659): the leading singular triplets
    of what quantizing lost, over the adapter's scaling. Weights come from the file one by one.

    Args:
        peft_model: with adapters over a base in any format that is read, 4 bits or others.
        model_path: of the base in full precision: model.safetensors, or the folder with it or with
            its parts and their index; by default what the model was loaded from, where that is a
            folder, or in the local cache.
        callback: called with the model and the layer's name after each layer; False gives the
            layer's adapter its former values back, to the bit.

    Raises:
        TypeError: the model has no adapters.
        ValueError: it has none over quantized bases, or none of this name; it is merged; or the
            file lacks a weight, or has another shape. Whatever is raised, by the callback too: all
            is as before.
        FileNotFoundError: there is no such file.
    """
    from lora_ext.nn.quantized import QuantizedBase  # only now: few need it

    where = "replace_lora_weights_loftq"
    if callback is not None and not callable(callback):
        refuse(where, "callback", callback, "a function of the model and a layer's name, or None")
    found, _ = adapted(peft_model, where)
    found._check_names([adapter_name])
    chosen = [(n, m) for n, m in found.layers_with(adapter_name) if isinstance(m, QuantizedBase)]
    if not chosen:
        raise ValueError(
            f"{where}: peft_model: got no layer over a quantized base that has '{adapter_name}', "
            "expected some: No bnb LoRA module found on the model; quantize the base first "
            "(lora_ext.quant.quantize_, or quantization_config of transformers)"
        )
    for name, layer in chosen:
        if layer.merged:
            raise ValueError(f"{where}: layer '{name}' is merged; call unmerge_adapter() first")
    base = found.get_base_model()
    weights = _Weights(_folder_of(base, model_path), getattr(base, "base_model_prefix", ""))
    with Transaction() as transaction:
        for name, layer in chosen:
            parts = layer.parts(adapter_name)
            old = {part: parameter.detach().clone() for part, parameter in parts.items()}
            weight = weights.get(f"{name}.weight")
            new = _nearest(layer, adapter_name, weight, f"{where}: '{name}'")
            _write(transaction, parts, new)
            if MAGNITUDE in parts:  # what makes it scale by 1
                norm = layer._weight_norm(adapter_name)
                _write(transaction, parts, {MAGNITUDE: norm})
            if callback is not None and not callback(peft_model, name):
                _write(transaction, parts, old)


def _write(
    transaction: Transaction, parts: Mapping[str, nn.Parameter], new: Mapping[str, Tensor]
) -> None:
    for part, tensor in new.items():
        transaction.write(parts[part], tensor)
    transaction.commit()


def _nearest(
    layer: QuantizedBase, adapter_name: str, weight: Tensor, where: str
) -> dict[str, Tensor]:
    """The parts of the adapter with which the layer is nearest to one with this weight."""
    from lora_ext.quant.call import values
    from lora_ext.quant.loftq import low_rank

    matrix, parts = layer._quantized, layer.parts(adapter_name)
    source = getattr(layer.base_layer, "source_cls", None)
    if source is not None and source.__name__ == "Conv1D":  # whose files have [K, N]
        weight = weight.t()
    if tuple(weight.shape) != matrix.shape:
        raise ValueError(
            f"{where}: got {list(weight.shape)} in the file, expected {list(matrix.shape)}: it is "
            "not of this model, or is quantized itself"
        )
    new = {part: torch.zeros_like(parts[part]) for part in parts if part != MAGNITUDE}
    lora_A, lora_B = new["lora_A"], new["lora_B"]
    if lora_A.shape[1] != matrix.shape[1] or lora_B.shape != (matrix.shape[0], len(lora_A)):
        raise ValueError(f"{where}: got an adapter of blocks or slices, expected one of matrices")
    residual = weight.to(matrix.device, torch.float32) - values(matrix, torch.float32)
    A, B = low_rank(residual, len(lora_A), layer.adapters[adapter_name].scaling)
    lora_A[: len(A)].copy_(A)  # singular triplets beyond min(N, K) are none
    lora_B[:, : len(A)].copy_(B)
    return new


class _Weights:
    """The tensors of a model's safetensors, read one at a time."""

    def __init__(self, path: Path, prefix: str) -> None:
        self._path, self._prefix = path, prefix
        self._parts: dict[str, str] | None = None
        index = path.parent / f"{_WEIGHTS}.index.json"
        if not path.exists() and index.exists():
            self._parts = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        elif not path.exists():
            raise FileNotFoundError(
                f"replace_lora_weights_loftq: model_path: Could not find file for {path}, ensure "
                "that there is a (sharded) safetensors file of the model."
            )

    def get(self, key: str) -> Tensor:
        """Of a name in the model; the file's may be without the level of the base model."""
        names = [key, key.removeprefix(f"{self._prefix}."), f"{self._prefix}.{key}"]
        if self._parts is None:
            with safe_open(self._path, "pt") as file:
                known = set(file.keys())
                found = next((name for name in names if name in known), None)
                if found is not None:
                    return file.get_tensor(found)  # type: ignore[no-any-return]
        else:
            found = next((name for name in names if name in self._parts), None)
            if found is not None:
                with safe_open(self._path.parent / self._parts[found], "pt") as file:
                    return file.get_tensor(found)  # type: ignore[no-any-return]
        raise ValueError(
            f"replace_lora_weights_loftq: model_path: {self._path} has no {key}, expected the "
            "weights of the model before it was quantized; is it of another model?"
        )


def _folder_of(base: Any, model_path: str | Path | None) -> Path:
    """Where model.safetensors is, or its index beside it."""
    if model_path is None:
        name = getattr(getattr(base, "config", None), "_name_or_path", "")
        if not name:
            raise ValueError(
                "replace_lora_weights_loftq: model_path: got None, but the model does not say what "
                "it was loaded from: it does not appear to be a transformers model; you must pass "
                "the model_path argument that points to the safetensors file"
            )
        if Path(name).is_dir():
            model_path = name
        else:
            from huggingface_hub import snapshot_download  # a model of its hub, so it is there

            model_path = snapshot_download(name, local_files_only=True)
    path = Path(model_path)
    return path if path.name.endswith(_WEIGHTS) else path / _WEIGHTS
