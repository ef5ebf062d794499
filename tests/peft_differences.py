"""What is different from PEFT on purpose, for the fuzz test: stages, reason, in which cases."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from peft_fuzz import Case


class Differs(Exception):
    """What one finds different from the other."""


Exempt = tuple[tuple[str, ...], str, Callable[[Case, str], bool]]


def is_any(case: Case, **wanted: Any) -> bool:
    """Whether a config has one of these fields with such a value."""
    return any(
        value(config.get(name)) if callable(value) else config.get(name) == value
        for config in case.configs.values()
        for name, value in wanted.items()
    )


def is_changed(value: Any) -> bool:
    """By an initialisation that takes its product out of the weight."""
    return str(value).startswith(("pissa", "olora"))


def randomly_changed(case: Case) -> bool:
    """A random SVD changes the weight, another way each time it is loaded."""
    return is_any(case, init_lora_weights=lambda value: str(value).startswith("pissa_niter"))


def _fails(_: Case, text: str) -> bool:
    python = ("AttributeError", "TypeError", "KeyError", "RuntimeError")
    return text.startswith(tuple(f"PEFT: {name}" for name in python))


def _lacks_biases_alone(text: str) -> bool:
    """Of "PEFT only [], lora_ext only [keys]" or "[keys] is added"."""
    keys = text.removesuffix(" is added").rpartition("[")[2].strip("]").split(", ")
    return "PEFT only ['" not in text and all(key.strip("'").endswith(".bias") for key in keys)


_OUTPUTS = ("outputs", "gradients", "outputs after a step", "back")
_GROUPS = "groups 4"

DOCUMENTED: tuple[Exempt, ...] = (
    (
        ("accept", "accept another"),
        "where PEFT fails with an error of Python's instead of saying no, lora_ext may do it",
        _fails,
    ),
    (
        ("accept", "accept another"),
        "a rank beyond the matrix of an SVD or QR: PEFT's adapter then has another than it says",
        lambda _, text: "give this layer a smaller rank" in text,
    ),
    (
        ("PEFT's file",),
        "the same, in its file",
        lambda case, text: (
            "check the base model and the config's r" in text
            and is_any(case, init_lora_weights="olora")
        ),
    ),
    (
        ("accept", "accept another"),
        "an attention has no lora_bias",
        lambda case, text: case.kind == "attention" and "lora_bias: got True" in text,
    ),
    (
        ("accept", "accept another", "PEFT's file"),
        "an initialisation that takes its product out of a shared weight would do so twice",
        lambda _, text: "but other modules share it" in text,
    ),
    (
        ("accept another",),
        "layers are repeated for the first adapter alone",
        lambda _, text: "layer_replication: expected only in the config of a model's first" in text,
    ),
    (
        ("accept another",),
        "PEFT's all-linear takes its own modules for targets in a model with stacked experts",
        lambda case, text: "PEFT: ValueError: Target module" in text and case.kind == "mixtral",
    ),
    (
        ("accept", "accept another", "names", "trainable", "keys"),
        "all-linear leaves out the output of any model that names it, PEFT only transformers'",
        lambda case, _: "words" in case.kind and is_any(case, target_modules="all-linear"),
    ),
    (
        ("trainable",),
        "inference_mode: PEFT leaves biases and the adapters of embeddings to train",
        lambda case, _: is_any(case, inference_mode=True),
    ),
    (
        ("trainable",),
        "lora_A of a convolution with groups reads the channels of its group, PEFT's all",
        lambda case, _: _GROUPS in case.kind,
    ),
    (
        ("shapes", "PEFT's file", "back"),
        "with DoRA a convolution with groups has no form common to both",
        lambda case, _: _GROUPS in case.kind and is_any(case, use_dora=True),
    ),
    (
        ("inside",),
        "PEFT cannot save modules to save in which there are others, or another adapter's layers",
        lambda _, text: f"{os.sep}peft{os.sep}" in text,
    ),
    (
        ("accept another",),
        "the same: PEFT fails when it saves them, lora_ext refuses to add them",
        lambda _, text: "has adapters, expected a module without" in text,
    ),
    (
        ("keys", "back", "PEFT's file"),
        "the heads of a task are saved with the adapters of that task, in PEFT with all",
        lambda case, _: len({config.get("task_type") for config in case.configs.values()}) > 1,
    ),
    (
        ("trainable", "keys", "trains", "PEFT's file", *_OUTPUTS),
        "modules to save inside of others are saved with these",
        lambda case, _: (
            {"layers.1"} < {m for c in case.configs.values() for m in c.get("modules_to_save", ())}
        ),
    ),
    (
        ("keys", "resaved file"),
        "save_embedding_layers=True: PEFT leaves out an embedding if the other is adapted",
        lambda case, text: (
            case.save_embedding_layers is True
            and ("PEFT only [], lora_ext only" in text or text.endswith("is added"))
        ),
    ),
    (
        ("accept", "accept another"),
        "fan_in_fan_out beside target_parameters: PEFT switches it off at the first linear layer",
        lambda _, text: "fan_in_fan_out: got True, expected none" in text,
    ),
    (
        ("resaved config",),
        "fan_in_fan_out of Conv1D and linear layers together: PEFT's is that of the last one",
        lambda case, text: (
            case.kind == "transposed" and text.endswith("['fan_in_fan_out: False True']")
        ),
    ),
    (
        ("combine",),
        "PEFT does not initialise this in float64, and fails for convolutions with groups",
        lambda _, text: text.startswith(("PEFT: TypeError", "PEFT: RuntimeError")),
    ),
    (
        ("combine",),
        "lora_bias beside an adapter of an embedding: PEFT's config then says what is not there",
        lambda _, text: "no config describes both; combine them without lora_bias" in text,
    ),
    (
        ("combine",),
        "PEFT first initialises what it then writes over, and has no orthogonal one of odd rank",
        lambda _, text: text.startswith("PEFT: ValueError: Orthogonal initialization"),
    ),
    (
        ("combine",),
        "PEFT fails where the targets of both mean a layer that neither adapts",
        lambda _, text: text.startswith("PEFT: ValueError: No matching LoRAs found"),
    ),
    (
        ("keys", "trains", "resaved file"),
        "biases in modules that another adapter saves whole: PEFT's names for them are not read",
        lambda case, text: (
            len(case.configs) > 1
            and _lacks_biases_alone(text)
            and is_any(case, bias="all")
            and is_any(case, modules_to_save=bool)
        ),
    ),
    (
        ("combine",),
        "a magnitude cannot be combined; PEFT leaves it out",
        lambda _, text: "uses DoRA (use_dora), which cannot be combined" in text,
    ),
    (
        ("combine",),
        "biases of the base: PEFT refuses some combinations, and leaves them out of others",
        lambda _, text: (
            text.startswith("PEFT: ValueError: LoraModel supports only 1 adapter with")
            or "which a combined adapter would have to share with it" in text
        ),
    ),
    (
        ("merge",),
        "what PEFT trained on a convolution with groups is no update of its weight",
        lambda case, text: _GROUPS in case.kind and "its lora_A, trained by PEFT" in text,
    ),
    (
        ("merge",),
        "lora_bias has no place in a base without bias, in PEFT neither",
        lambda _, text: "lora_bias cannot be merged into a base without bias" in text,
    ),
    (
        ("shapes", "PEFT's file", "back"),
        "PEFT's QR of a transposed layer is that of its transpose: a file of other shapes",
        lambda case, _: (
            case.kind in ("gpt2", "transposed") and is_any(case, init_lora_weights="olora")
        ),
    ),
    (
        _OUTPUTS,
        "PEFT adds the update of an attention's out_proj twice",
        lambda case, _: case.kind == "attention",
    ),
    (
        ("keys", "trains", "resaved file"),
        "PEFT saves the bias of a module under each name of it",
        lambda case, text: (
            case.kind == "two names" and ("lora_ext only []" in text or text.endswith("is lost"))
        ),
    ),
    (
        _OUTPUTS,
        "PEFT does not read back what it saved as the bias of a layer that another adapter adapts",
        lambda case, _: len(case.configs) > 1 and is_any(case, bias="all"),
    ),
    (
        ("names", "trainable", "keys", "PEFT's file"),
        "the out_proj of an attention is part of it, and none of its own",
        lambda case, _: case.kind == "attention" and is_any(case, target_modules="all-linear"),
    ),
    (
        ("trains", "outputs after a step"),
        "biases train with the adapter whose config names them, in PEFT with any",
        lambda case, text: (
            text.startswith("other")
            and is_any(case, bias=lambda value: value in ("all", "lora_only"))
        ),
    ),
    (
        ("combine",),
        "an expression and a list of target_modules can be combined, not in PEFT",
        lambda _, text: "should follow the same target modules type" in text,
    ),
    (
        ("combined",),
        "PEFT's concatenation gives the ranks of a convolution's group to other groups",
        lambda case, _: (
            _GROUPS in case.kind and case.combination is not None and case.combination[0] == "cat"
        ),
    ),
    (
        (*_OUTPUTS, "combined"),
        "PEFT swaps a module under its first name only; what calls it by another gets the base",
        lambda case, _: case.kind == "two names",
    ),
    (
        ("combined",),
        "PEFT leaves out lora_bias and the factor of rsLoRA, and keeps the first one's patterns",
        lambda case, _: (
            is_any(case, lora_bias=True)
            or is_any(case, use_rslora=True)
            or is_any(case, rank_pattern=bool)
            or is_any(case, alpha_pattern=bool)
        ),
    ),
)


def exempt(stage: str, case: Case, text: str = "") -> bool:
    return any(stage in stages and applies(case, text) for stages, _, applies in DOCUMENTED)


def check(stage: str, case: Case, same: bool, text: str) -> None:
    if not same and not exempt(stage, case, text):
        raise Differs(f"{stage}: {text}")
