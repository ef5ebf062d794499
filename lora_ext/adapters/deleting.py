"""Taking an adapter out of a model, and what runs then."""

from __future__ import annotations

from lora_ext.adapters.activation import activate
from lora_ext.adapters.adapted_model import AdaptedModel
from lora_ext.arguments import short, warn
from lora_ext.nn.holds_adapters import deleted_text
from lora_ext.nn.transaction import Transaction

QUOTES = "'"


def delete_adapter(model: AdaptedModel, adapter_name: str) -> None:
    """Forgets an adapter: its parts in every layer, its copies of modules to save, its rows of
    embeddings, its config.

    What is active afterwards is as in PEFT, and the same in all layers: the other active adapters,
    if there are some; else, if this one was active, the first of the others by name, with a
    warning. They train if they did, or this one did: a model that is frozen stays so. What is
    merged stays merged.

    Raises:
        ValueError: there is none of that name, or it is merged. Nothing is changed then.
    """
    where = "LoraModel.delete_adapter"
    if not isinstance(adapter_name, str) or adapter_name not in model.peft_config:
        got = short(adapter_name)
        raise ValueError(
            f"{where}: adapter_name: got {got}: Adapter {got.strip(QUOTES)} does not exist, "
            f"expected one of {list(model.peft_config)}"
        )
    for name, layer in model.adapter_layers():
        if adapter_name in layer.merged_adapters:
            raise ValueError(
                f"{where}: adapter_name: Cannot delete adapter(s) ['{adapter_name}'] while they "
                f"are merged. Please unmerge them first. (In '{name}'; unmerge_adapter() does it)"
            )
    was_active, trained = adapter_name in model.active_adapters, False
    active = [name for name in model.active_adapters if name != adapter_name]
    others = {name: one for name, one in model.peft_config.items() if name != adapter_name}
    following = min(others) if was_active and others and not active else None
    with Transaction() as transaction:
        for _, layer in model.adapter_layers():
            if adapter_name in layer.adapters:
                parameters = layer.adapter_parameters(adapter_name).values()
                trained = trained or any(p.requires_grad for p in parameters)
                transaction.draft(layer)._delete_adapter(adapter_name)
        for _, module in model.saved_modules():
            if adapter_name in module.modules_to_save:
                copied = module.modules_to_save[adapter_name].parameters()
                trained = trained or any(p.requires_grad for p in copied)
                module.delete_adapter(adapter_name, transaction)
        strengths = {n: s for n, s in model._strengths.items() if n != adapter_name}
        transaction.set(model, peft_config=others, active_adapters=active, _strengths=strengths)
        transaction.commit()
        if following is not None:
            activate(model, [following], not trained, transaction, keep_merged=True)
            transaction.commit()
    if following is not None:
        warn(deleted_text("LoraModel", adapter_name, following))
