"""Bases that are nothing but named tensors: a model is made of them in which adapters can be loaded
and merged as in any other, by the same code."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lora_ext.adapters.checkpoint.base_tensors import EMBEDDINGS
from lora_ext.adapters.checkpoint.keys import PREFIX
from lora_ext.errors import AdapterFileError

_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    3: nn.Conv1d,
    4: nn.Conv2d,
    5: nn.Conv3d,
}
# Parts of an adapter in PEFT's files, below the name of the module.
_EMBEDDING_PARTS = ("lora_embedding_A", "lora_embedding_B")
_LINEAR_PARTS = ("lora_A.weight", "lora_B.weight", "lora_B.bias")
_MAGNITUDES = ("lora_magnitude_vector.weight", "lora_magnitude_vector")
# Names that transformers gives a Conv1D; some models have linear layers of these names.
_OF_CONV1D = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
PARTS = (*_LINEAR_PARTS, *_EMBEDDING_PARTS, *_MAGNITUDES)


class Tensors(nn.Module):
    """A module of a name, with parameters and modules in it; it has no call."""

    def get_input_embeddings(self) -> nn.Module | None:
        return _called(self, EMBEDDINGS[0])

    def get_output_embeddings(self) -> nn.Module | None:
        return _called(self, EMBEDDINGS[1])


def _called(model: nn.Module, last: str) -> nn.Module | None:
    return next((m for name, m in model.named_modules() if name.rpartition(".")[2] == last), None)


def split_key(key: str) -> tuple[str, str] | None:
    """(module, part) of an adapter's own key; None for others."""
    for part in PARTS:
        if key.startswith(PREFIX) and key.endswith(f".{part}"):
            return key[len(PREFIX) : -len(part) - 1], part
    return None


def adapted_modules(keys: Collection[str]) -> dict[str, set[str]]:
    """Name of a module to the parts that an adapter has of it."""
    found: dict[str, set[str]] = {}
    for key in keys:
        if split := split_key(key):
            found.setdefault(split[0], set()).add(split[1])
    return found


def model_of(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: str
) -> nn.Module:
    """A model whose state dict is `tensors`, in which the modules that an adapter is on are layers.

    Args:
        shapes: of the adapter's file, by its keys.
        where: the base, for messages.

    Raises:
        AdapterFileError: the base lacks the weight of one, or its shape leaves open what it is.
    """
    root = Tensors()
    for name, parts in adapted_modules(shapes).items():
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            some = next((one for one in tensors if one.endswith(".weight")), "none")
            raise AdapterFileError(
                f"{where}: has no tensor '{name}.weight', which the adapter changes (it has "
                f"'{some}', say); give the base that the adapter was made for"
            )
        bias = f"{name}.bias" in tensors
        layer = _layer(name, weight, bias, parts, shapes, where)
        _put(root, name, layer, where)
    for name, tensor in tensors.items():
        module_name, _, part = name.rpartition(".")
        owner = _module(root, module_name, where)
        if part in owner._modules:
            raise AdapterFileError(f"{where}: '{name}' is a tensor and a module; cannot be merged")
        owner.register_parameter(part, nn.Parameter(tensor, requires_grad=False))
    return root.eval()


def check_layouts(
    base: Mapping[str, tuple[int, ...]], adapter: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Refuses to guess whether weights are [out, in], as nn.Linear's, or [in, out], as those of
    transformers' Conv1D (GPT-2): a square one can be either, and adapters that earlier versions
    wrote do not say it.

    A Conv1D always has a bias. Biases of weights that are not square tell what layers the base has:
    where one is a Conv1D, any square weight with a bias may be; where they are all linear, none is;
    where there are none, GPT-2's names are not trusted.

    Args:
        base, adapter: shapes by the names of tensors.
        where: the base, for messages.

    Raises:
        AdapterFileError: a weight is a Conv1D's, or may be.
    """
    cure = "give the folder of the model, with its config.json"
    stored: tuple[list[str], list[str]] = [], []  # as [out, in]; as [in, out]
    for key, shape in base.items():
        bias = base.get(f"{key.removesuffix('weight')}bias", ()) if key.endswith(".weight") else ()
        if len(shape) == 2 and len(bias) == 1 and shape[0] != shape[1] and bias[0] in shape:
            stored[shape.index(bias[0])].append(key)
    for name in adapted_modules(adapter):
        A, B = (adapter.get(f"{PREFIX}{name}.{part}", ()) for part in _LINEAR_PARTS[:2])
        shape = base.get(f"{name}.weight", ())
        if not len(A) == len(B) == len(shape) == 2:
            continue
        wanted = B[0], A[1]
        if shape != wanted and shape == wanted[::-1]:
            raise AdapterFileError(
                f"{where}: '{name}.weight' has shape {list(shape)}, expected {list(wanted)} as "
                "lora_B and lora_A have: it is stored transposed, as [in, out] (GPT-2's Conv1D), "
                f"which merging by names does not do; {cure}"
            )
        if shape[0] != shape[1] or f"{name}.bias" not in base:
            continue
        if stored[1] or (not stored[0] and name.rpartition(".")[2] in _OF_CONV1D):
            why = f"as '{stored[1][0]}' is" if stored[1] else "as GPT-2's of this name are"
            raise AdapterFileError(
                f"{where}: '{name}.weight' is square, so that its shape does not tell whether it "
                f"is [out, in] or stored transposed, [in, out] (a Conv1D), {why}; {cure}"
            )


def _layer(
    name: str,
    weight: Tensor,
    bias: bool,
    parts: set[str],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> nn.Module:
    """A module of torch on "meta", which gets its tensors later."""
    if parts & set(_EMBEDDING_PARTS) and weight.dim() == 2:
        return nn.Embedding(weight.shape[0], weight.shape[1], device="meta")
    if weight.dim() == 2:
        return nn.Linear(weight.shape[1], weight.shape[0], bias, device="meta")
    lora_A = shapes.get(f"{PREFIX}{name}.lora_A.weight", ())
    if weight.dim() in _CONVOLUTIONS and len(lora_A) == weight.dim():
        with_dora = parts & set(_MAGNITUDES)
        groups = 1 if not weight.shape[1] else lora_A[1] // weight.shape[1]
        if not with_dora and groups and groups * weight.shape[1] == lora_A[1]:
            kind = _CONVOLUTIONS[weight.dim()]
            sizes = (lora_A[1], weight.shape[0], tuple(weight.shape[2:]))
            return kind(*sizes, groups=groups, bias=bias, device="meta")  # type: ignore[arg-type]
    raise AdapterFileError(
        f"{where}: '{name}.weight' has shape {list(weight.shape)}, from which one cannot tell how "
        "the adapter changes it; give the folder of the model, with its config.json"
    )


def _module(root: nn.Module, name: str, where: str) -> nn.Module:
    """The module of a name, made if there is none."""
    owner = root
    for part in name.split(".") if name else ():
        if owner._modules.get(part) is None:
            if not part or owner._parameters.get(part) is not None or hasattr(owner, part):
                raise AdapterFileError(f"{where}: {name!r} is no name that a module can have")
            owner.add_module(part, Tensors())
        child = owner._modules[part]
        assert child is not None
        owner = child
    return owner


def _put(root: nn.Module, name: str, layer: nn.Module, where: str) -> None:
    above, _, last = name.rpartition(".")
    owner = _module(root, above, where)
    if not last or last in owner._modules or hasattr(owner, last):
        raise AdapterFileError(f"{where}: {name!r} is the name of several modules")
    owner.add_module(last, layer)
