"""delete_adapter: what is there and what runs afterwards is as with PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft_programs import TOKENS, Net, assert_same, config_of

import lora_ext

DELETED = "was active which is now deleted. Setting active adapter to"


def model_of(lib: Any, *names: str, copies: str = "", **fields: Any) -> Any:
    """With adapters of these names, the first active; those named in `copies` save the head."""
    torch.manual_seed(3)
    model: Any = None
    for name in names:
        saved = ["head"] if name in copies.split() else None
        config = config_of(lib, modules_to_save=saved, **fields)
        if model is None:
            model = lib.get_peft_model(Net(), config, name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def values_like(model: Any, like: Any) -> Any:
    """`model` with the values of PEFT's, so that outputs compare."""
    for name in like.peft_config:
        state = {k: v.clone() for k, v in peft.get_peft_model_state_dict(like, None, name).items()}
        lora_ext.set_peft_model_state_dict(model, state, name)
    return model


def facts(model: Any) -> Any:
    """What can be seen of a model: adapters, which run, merge, train, where, and its result."""
    rows = model.get_layer_status() if model.peft_config else []
    return [
        sorted(model.peft_config),
        list(model.active_adapters),
        list(model.base_model.active_adapters),
        {
            row.name: [
                *(list(row.active_adapters), list(row.merged_adapters), row.enabled),
                *(dict(row.requires_grad), sorted(row.available_adapters)),
            ]
            for row in rows
        },
        run(model),
    ]


def run(model: Any) -> torch.Tensor:
    """Of the model inside: PEFT's own asks for the config of an adapter that may be gone."""
    result: torch.Tensor = model.base_model.model(TOKENS)
    return result.detach()


# Each deletes in a model of one of the libraries, which has the adapters that are named.


def the_active(model: Any) -> None:
    model.delete_adapter("default")


def the_active_by_keyword(model: Any) -> None:
    model.delete_adapter(adapter_name="default")


def one_that_does_not_run(model: Any) -> None:
    model.delete_adapter("zebra")


def one_of_several_active(model: Any) -> None:
    model.base_model.set_adapter(["zebra", "default"])
    model.delete_adapter("zebra")


def all_of_several_active(model: Any) -> None:
    model.base_model.set_adapter(["zebra", "default"])
    model.delete_adapter("zebra")
    model.delete_adapter("default")


def none_is_active(model: Any) -> None:
    model.base_model.set_adapter([])
    model.delete_adapter("default")


def one_after_another(model: Any) -> None:
    model.delete_adapter("default")
    model.delete_adapter("apple")


def while_switched_off(model: Any) -> None:
    model.base_model.disable_adapter_layers()
    model.delete_adapter("default")


def and_switched_on_again(model: Any) -> None:
    while_switched_off(model)
    model.base_model.enable_adapter_layers()


def beside_a_merged_one(model: Any) -> None:
    model.merge_adapter(["apple"])
    model.delete_adapter("zebra")


def the_active_beside_a_merged_one(model: Any) -> None:
    model.merge_adapter(["zebra"])
    model.delete_adapter("default")


def after_unmerging(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()
    model.delete_adapter("default")


def and_chosen_anew(model: Any) -> None:
    model.delete_adapter("default")
    model.set_adapter("zebra")


SCENARIOS: tuple[Callable[[Any], None], ...] = (
    *(the_active, the_active_by_keyword, one_that_does_not_run, one_of_several_active),
    *(all_of_several_active, none_is_active, one_after_another, while_switched_off),
    *(and_switched_on_again, beside_a_merged_one, the_active_beside_a_merged_one),
    *(after_unmerging, and_chosen_anew),
)


def compare(delete: Callable[[Any], None], *names: str, **options: Any) -> None:
    theirs = model_of(peft, *names, **options)
    ours = values_like(model_of(lora_ext, *names, **options), theirs)
    said: list[list[str]] = []
    for model in (theirs, ours):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            delete(model)
        texts = [str(one.message) for one in caught]
        said.append([text.partition("Adapter ")[2] for text in texts if DELETED in text])
    # PEFT says it for each layer, once where warnings are shown once.
    assert list(dict.fromkeys(said[0])) == said[1]
    assert_same(facts(theirs), facts(ours))


@pytest.mark.parametrize("delete", SCENARIOS, ids=lambda one: one.__name__)
def test_what_is_left_is_as_with_peft(delete: Callable[[Any], None]) -> None:
    compare(delete, "default", "zebra", "apple")


# PEFT's wrapper of such a module cannot be without an active adapter, or have several.
WITH_COPIES = [
    one for one in SCENARIOS if "several" not in one.__name__ and "none" not in one.__name__
]


@pytest.mark.parametrize("copies", ["default", "default apple", "default zebra apple"])
@pytest.mark.parametrize("delete", WITH_COPIES, ids=lambda one: one.__name__)
def test_copies_of_modules_to_save_go_with_their_adapters(
    delete: Callable[[Any], None], copies: str
) -> None:
    compare(delete, "default", "zebra", "apple", copies=copies)


@pytest.mark.parametrize("name", ["default", "apple"])
def test_trained_rows_of_embeddings_go_with_their_adapter(name: str) -> None:
    compare(
        lambda model: model.delete_adapter(name),
        *("default", "apple"),
        target_modules=["first", "second"],
        trainable_token_indices={"words": [1, 3]},
    )


def test_the_last_one() -> None:
    """The model is its base then, and takes other adapters, none of which is active by itself."""
    results = []
    for lib in (peft, lora_ext):
        model = model_of(lib, "default")
        model.delete_adapter("default")
        found = [dict(model.peft_config), list(model.active_adapters), run(model)]
        model.add_adapter("late", config_of(lib))
        found += [list(model.active_adapters), sorted(model.peft_config), run(model)]
        model.set_adapter("late")
        results.append([*found, list(model.active_adapters)])
    assert_same(*results)
    base = Net()(TOKENS).detach()
    assert_same([{}, [], base, [], ["late"], base, ["late"]], results[1])


def test_the_last_one_with_a_copy() -> None:
    """PEFT takes no other adapter then."""
    model = model_of(lora_ext, "default", copies="default")
    model.delete_adapter("default")
    assert_same(Net()(TOKENS).detach(), run(model))
    model.add_adapter("late", config_of(lora_ext, modules_to_save=["head"]))
    model.set_adapter("late")
    assert model.get_base_model().head.active_adapter == "late"


def test_biases_of_the_base_go_on_as_with_peft() -> None:
    results = []
    for lib in (peft, lora_ext):
        model = model_of(lib, "default", bias="all")
        model.add_adapter("apple", config_of(lib))
        model.delete_adapter("default")
        base = [p for name, p in model.named_parameters() if "lora_" not in name]
        results.append([parameter.requires_grad for parameter in base])
    assert results[0] == results[1] and any(results[0])


REFUSED = {
    "unknown": ("nothing", lambda model: None, "Adapter nothing does not exist"),
    "deleted before": (
        "zebra",
        lambda model: model.delete_adapter("zebra"),
        "Adapter zebra does not exist",
    ),
    "merged": (
        "default",
        lambda model: model.merge_adapter(),
        r"Cannot delete adapter\(s\) \['default'\] while they are merged",
    ),
}


@pytest.mark.parametrize(("name", "before", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_changes_nothing(
    name: str, before: Callable[[Any], Any], text: str
) -> None:
    theirs = model_of(peft, "default", "zebra")
    ours = values_like(model_of(lora_ext, "default", "zebra"), theirs)
    for model in (theirs, ours):
        before(model)
        state = facts(model)
        with pytest.raises(ValueError, match=text):
            model.delete_adapter(name)
        assert_same(state, facts(model))
    assert_same(facts(theirs), facts(ours))


def test_a_layer_alone() -> None:
    """As what deletes in each layer by itself, without a model, counts on."""
    results = []
    for lib in (peft, lora_ext):
        model = model_of(lib, "default", "zebra", "apple")
        layer = model.get_base_model().first
        with pytest.warns(UserWarning, match=f"Adapter default {DELETED} apple"):
            layer.delete_adapter("default")
        found = [list(layer.active_adapters)]
        layer.set_adapter(["zebra", "apple"])
        layer.delete_adapter("apple")
        found.append(list(layer.active_adapters))
        layer.delete_adapter("zebra")
        results.append([*found, list(layer.active_adapters)])
    assert results[0] == results[1] == [["apple"], ["zebra"], []]


# What differs on purpose: docs/peft.md.


def test_what_is_frozen_stays_frozen() -> None:
    model = model_of(lora_ext, "default", "zebra")
    model.set_adapter("default", inference_mode=True)
    with pytest.warns(UserWarning, match=f"default {DELETED} zebra"):
        model.delete_adapter("default")
    assert model.active_adapters == ["zebra"]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_layers_do_alike_where_adapters_are_in_different_ones() -> None:
    """The model's active adapter is that of all layers, in the first of which it is not."""
    model = lora_ext.get_peft_model(Net(), config_of(lora_ext, target_modules=["words", "first"]))
    model.add_adapter("zebra", config_of(lora_ext, target_modules=["first"]))
    model.add_adapter("apple", config_of(lora_ext, target_modules=["second"]))
    with pytest.warns(UserWarning, match=f"default {DELETED} apple"):
        model.delete_adapter("default")
    net = model.get_base_model()
    active = [tuple(getattr(net, name).active_adapters) for name in ("words", "first", "second")]
    assert active == [(), (), ("apple",)] and model.active_adapters == ["apple"]


def test_the_copy_of_what_becomes_active_runs() -> None:
    """Also where the deleted adapter had none: PEFT leaves the module itself there then."""
    model = model_of(lora_ext, "default", "apple", copies="apple")
    head = model.get_base_model().head
    with pytest.warns(UserWarning, match=f"default {DELETED} apple"):
        model.delete_adapter("default")
    assert head.active_module is head.modules_to_save["apple"]
    assert all(parameter.requires_grad for parameter in head.modules_to_save["apple"].parameters())
