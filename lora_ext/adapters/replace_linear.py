"""Swapping the linear layers of a model for LoRA layers, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lora_ext._patterns import compiled
from lora_ext.adapters.config_checks import ALL_LINEAR
from lora_ext.adapters.names import named_modules, unwrapped
from lora_ext.adapters.swap import swap_modules
from lora_ext.adapters.targets import matches, near_misses, warn_of_unused_names
from lora_ext.arguments import check_module, names_of, refuse
from lora_ext.nn.adapter import DEFAULT
from lora_ext.nn.kinds import layer_for
from lora_ext.nn.transaction import Transaction
from lora_ext.quant.kinds import quantized_kind


def replace_linear(
    model: nn.Module,
    target_modules: str | Iterable[str],
    r: int = 8,
    lora_alpha: float = 8,
    lora_dropout: float = 0.0,
    *,
    exclude_modules: str | Iterable[str] | None = None,
    **options: Any,
) -> list[str]:
    """Swaps `nn.Linear` modules of `model`, quantized ones too, for `lora_ext.nn.Linear` with the
    same parameters.

    Nothing is copied or frozen: weights tied to other modules stay tied, and a module registered
    under several names is swapped once, under all of them. Hooks, training mode, device and dtype
    are kept. If anything is wrong, it is said before the first swap.

    Args:
        model: searched through; changed in place.
        target_modules: as in PEFT: a list of names or last parts of names, a regular expression for
            the whole name, or "all-linear" (every nn.Linear but the output head that
            `model.get_output_embeddings()` names).
        r, lora_alpha, lora_dropout: see `lora_ext.nn.Linear`.
        exclude_modules: a list or regular expression of modules to leave alone.
        options: further keyword arguments of `lora_ext.nn.Linear.from_linear`.

    Returns:
        The names that were swapped, in the order of `model.named_modules()`.

    Raises:
        ValueError: nothing matched, or a match is not exactly an nn.Linear, nor a layer whose
            weight is quantized in a layout that is read; r is below 1.
        TypeError: model is not a module.
    """
    check_module("replace_linear", "model", model)
    target_modules = _checked("target_modules", target_modules)
    if exclude_modules is not None:
        exclude_modules = _checked("exclude_modules", exclude_modules)

    modules = dict(named_modules(model, remove_duplicate=False))
    chosen = _choose(model, modules, target_modules, exclude_modules)
    if not chosen:
        raise ValueError(_no_match(modules, target_modules))
    name = options.pop("adapter_name", DEFAULT)
    options |= {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    transaction = Transaction()
    replacements: dict[int, nn.Module] = {}
    for module_name, module in chosen.items():
        if id(module) not in replacements:
            layer = layer_for(module_name, module)
            transaction.draft(layer).add_adapter(name, **options)
            replacements[id(module)] = layer
    names = swap_modules(model, replacements, transaction)
    warn_of_unused_names("replace_linear", target_modules, modules)
    transaction.commit()
    return names


def _checked(argument: str, names: str | Iterable[str]) -> str | list[str]:
    if isinstance(names, Mapping):
        refuse("replace_linear", argument, names, "names or a regular expression")
    if not isinstance(names, str):
        return names_of(names, "replace_linear", argument)
    if names != ALL_LINEAR:
        try:
            compiled(argument, names)
        except Exception as error:
            raise ValueError(
                f"replace_linear: {argument}: got {names!r}, expected a list of names or a regular "
                f"expression ({error})"
            ) from None
    return names


def _choose(
    model: nn.Module,
    modules: dict[str, nn.Module],
    target_modules: str | list[str],
    exclude_modules: str | list[str] | None,
) -> dict[str, nn.Module]:
    if target_modules == ALL_LINEAR:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        head = unwrapped(head) if isinstance(head, nn.Module) else head
        named: dict[str, nn.Module] = {
            n: m for n, m in modules.items() if _is_linear(m) and m is not head
        }
    else:
        named = {n: m for n, m in modules.items() if matches(n, target_modules)}
    named = {n: m for n, m in named.items() if not matches(n, exclude_modules, "exclude_modules")}
    chosen: dict[str, nn.Module] = {}
    for name, module in named.items():
        if name == "":
            raise ValueError(
                "replace_linear: target_modules: names the model itself, which cannot be swapped "
                "in place; use lora_ext.nn.Linear.from_linear"
            )
        if not _is_linear(module):
            kind = type(module)
            raise ValueError(
                f"replace_linear: target_modules: '{name}' is a "
                f"{kind.__module__}.{kind.__qualname__}, expected exactly torch.nn.Linear, "
                "or one with a quantized weight; name other modules, or exclude this one with "
                "exclude_modules"
            )
        parts = ("weight", "bias") if quantized_kind(module) is None else ()
        computed = [part for part in parts if part not in module._parameters]
        if computed:
            raise ValueError(
                f"replace_linear: target_modules: '{name}' computes its {computed[0]} (pruning, "
                "weight_norm), expected a plain parameter; make that permanent first"
            )
        chosen[name] = module
    return chosen


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or quantized_kind(module) is not None


def _no_match(modules: dict[str, nn.Module], target_modules: str | list[str]) -> str:
    linears = [name for name, module in modules.items() if _is_linear(module)]
    wanted = [target_modules] if isinstance(target_modules, str) else target_modules
    hint = near_misses(wanted, linears)
    return f"replace_linear: target_modules: {target_modules!r} matches no module; {hint}"
