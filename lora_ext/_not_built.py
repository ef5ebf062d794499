"""Names of PEFT's that are not built: asked for, each says so, and what to do instead."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# What of PEFT's LoRA is not built, and what there is instead.
INSTEAD = {
    "Arrow routing": "lora_ext.batch(...) gives each input the adapter that you choose",
    "KaSA": "plain LoRA and use_dora=True are there",
    "MonteCLoRA": "plain LoRA with lora_dropout is there",
    "PEFT 0.2's merged linear layers": "lora_ext.nn.MergedLinear is loralib's",
    "QALoRA": "plain LoRA is there",
    "VeLoRA": "gradient checkpointing saves the memory of activations, too",
    "choosing modules by KappaTune": "name them in target_modules",
    "mixing kinds of adapters": "several of LoRA go: add_adapter, set_adapter([...])",
}
_OTHERWISE = "; or use PEFT's own model with lora_ext.integrations.peft.patch()"

# Fields of a config that ask for one of these by not being empty.
FIELDS = {
    "arrow_config": "Arrow routing",
    "enable_lora": "PEFT 0.2's merged linear layers",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
}

# Names, as regular expressions, that are for one of these.
_NAMES = {
    "ArrowConfig|create_arrow_model": "Arrow routing",
    "KasaConfig": "KaSA",
    "Monteclora(Config|TrainerMixin)": "MonteCLoRA",
    "PeftMixedModel|MixedModel": "mixing kinds of adapters",
    "VeloraConfig": "VeLoRA",
    "find_kappa_target_modules|KappaTuneSelector": "choosing modules by KappaTune",
}
# Other names, and what to say of them.
_OTHER_NAMES = {
    "DoraCaching": "is not built, and nothing asks for it: leave it out",
    "LoraLayer|Linear|Embedding|Conv[123]d|MultiheadAttention": "is in lora_ext.nn",
    "BaseTunerLayer": "is lora_ext.nn.LoraLayer here",
    "ParamWrapper": "is lora_ext.nn.ParamLayer here",
    "(ModulesToSave|TrainableTokens|AuxiliaryTraining)Wrapper": (
        "is no public class here; get_layer_status(model) says which modules are saved whole"
    ),
    "(PEFT_TYPE|MODEL_TYPE|TRANSFORMERS_MODELS)_TO_[A-Z0-9_]+_MAPPING": (
        "is not built: there is LoRA alone, with LoraConfig and PeftModel"
    ),
    "PeftError|PeftWarning|NoMatchingPeftModuleError": (
        "is not built; errors and warnings are Python's ValueError, TypeError and UserWarning, and "
        "those of lora_ext.errors"
    ),
    "disable_input_dtype_casting": "is not built; give inputs in the dtype of the weight",
    "hotswap_adapter_from_state_dict|check_hotswap_configs_compatible": (
        "is not built; hotswap_adapter reads a folder, set_peft_model_state_dict takes a dict"
    ),
    "update_(forward_|generate_)?signature": (
        "is not built; forward and generate take the base's arguments as they are"
    ),
}
# Of PEFT's adapters that are not LoRA, of which no more is said.
_OTHER_KINDS = re.compile(
    "(AdaLora|Adamss|AdaptionPrompt|BOFT|Beft|C3A|CPT|Cartridge|Deft|Delora|FourierFT|Frod|Glora|"
    "Gralora|HRA|Hira|IA3|LNTuning|Lily|LoHa|LoKr|Miss|MultitaskPromptTuning|OFT|OSF|Peanut|Poly|"
    "Prefix|PrefixTuning|Prompt|PromptLearning|PromptTuning|Psoft|Pvera|RandLora|Road|Shadow|Shira|"
    "Supertuning|TinyLora|TrainableTokens|UniLora|VBLoRA|Vera|WaveFT)"
    "(Config|Model|Embedding|Encoder|EncoderConfig|EncoderReparameterizationType|Init)|"
    "bloom_model_postprocess_past_key_value|compose_cartridge_adapters|shift_tokens_right|"
    "initialize_kv_prefix_from_[a-z_]+|prompt_embeddings_from_past_key_values"
)
# PEFT's modules, of which none is here under its name.
_MODULES = frozenset("auto helpers mapping mixed_model peft_model tuners utils".split())


def field_text(field: str) -> str:
    """What a config's field asks for, and what there is instead."""
    what = FIELDS[field]
    return f"{what} is not built; leave the field out: {INSTEAD[what]}{_OTHERWISE}"


def name_text(name: str) -> str | None:
    """What to say who asks the package for a name; None for one that is not PEFT's."""
    for names, what in _NAMES.items():
        if re.fullmatch(names, name):
            return f"{name}: {what} is not built; {INSTEAD[what]}{_OTHERWISE}"
    for names, text in _OTHER_NAMES.items():
        if re.fullmatch(names, name):
            return f"{name} {text}"
    if _OTHER_KINDS.fullmatch(name):
        return f"{name} is not built: lora_ext has LoRA and X-LoRA; other adapters are peft's"
    if name in _MODULES:
        return (
            f"{name} is no module here: PEFT's names are in lora_ext itself, layers in lora_ext.nn"
        )
    return None


class _NotBuilt:
    """Finder that has `from lora_ext import X` say why there is no X: Python looks for a module of
    that name where the package has no such attribute, and would drop what the package said."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, last = name.rpartition(".")
        if package != "lora_ext" or (text := name_text(last)) is None:
            return None
        kind = ModuleNotFoundError if last in _MODULES else ImportError
        raise kind(f"lora_ext: {text}", name=name)


def answer_for(package: str, *later: ModuleType) -> None:
    """Has the package's attributes, and imports from it, say what is not built; what one of `later`
    has is imported when it is asked for."""

    def find(name: str) -> Any:
        for module in later:
            if name in module.__all__:
                return vars(sys.modules[package]).setdefault(name, getattr(module, name))
        text = name_text(name)
        raise AttributeError(
            f"module {package!r} has no attribute {name!r}" + (f": {text}" if text else "")
        )

    sys.modules[package].__getattr__ = find  # type: ignore[method-assign]
    if not any(type(finder).__name__ == _NotBuilt.__name__ for finder in sys.meta_path):
        sys.meta_path.append(_NotBuilt())
