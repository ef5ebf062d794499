"""Why a test of PEFT's suite does not pass with our classes. The first pattern that is found in
"FILE::TEST reason" says its class; what none is found in is a mistake of ours, "real"."""

from __future__ import annotations

import re

NOT_BUILT = "not built"
DELIBERATE = "deliberate"
INTERNALS = "PEFT's internals"
UNREACHABLE = "needs the hub"
REAL = "real"

PATTERNS: tuple[tuple[str, str], ...] = (
    # What is not here, in every mode.
    (UNREACHABLE, r"couldn't connect to 'https|LocalEntryNotFoundError|not fully cached locally"),
    (UNREACHABLE, r"Can't find '.*' at '(peft-internal-testing|hf-internal-testing|ybelkada)/"),
    (UNREACHABLE, r"adapter model file not found in peft-internal-testing"),
    (UNREACHABLE, r"test_valid_hub_model|version of PEFT you are using is not compatible"),
    # Fail with PEFT's classes, too: models that are made here, with random weights.
    (UNREACHABLE, r"WordLevel error: Missing"),
    (UNREACHABLE, r"test_weight_tying_applied_when_model_is_tied|_auto\[peft_config1-True\]"),
    (UNREACHABLE, r"test_disable_adapter\[trl-internal-testing/tiny-Llama4"),
    # Refused by name, and tests of what is refused.
    (NOT_BUILT, r"NotBuiltError|is not built|peft_type: got"),
    (NOT_BUILT, r"'(IA3|LoKr|AdaLora|RandLora)Config' object has no|NoMatchingPeftModuleError"),
    (NOT_BUILT, r"test_prepare_model_for_compiled_hotswap|test_hotswap_works_different_ranks"),
    (NOT_BUILT, r"conv2d_groups_rank|test_hotswap_works_different_ranks_conv2d_groups"),
    (NOT_BUILT, r"test_kasa_|mixed_model"),
    (NOT_BUILT, r"test_lora_variants.py.*kasa|test_.*quantization_backend_(bnb|irreg)"),
    (NOT_BUILT, r"test_nested_config_survives|test_dora_caching"),
    (NOT_BUILT, r"disable_input_dtype_casting|UserWarning.*tie"),
    # The layers are loralib's and torch.nn's: lora_A is a parameter, r and scaling are numbers.
    (INTERNALS, r"IndexError: too many indices|object is not subscriptable|lora_embedding_[AB]"),
    (INTERNALS, r"'(float|int)' object has no attribute '(items|keys|copy)'|no attribute 'base_l"),
    (INTERNALS, r"_all_available_adapter_names|adapter_layer_names|dangling attributes"),
    (INTERNALS, r"Could not determine the dtype of this adapter|test_merge_layers_multi"),
    (INTERNALS, r"test_lora_mica_freezes_B"),
    (INTERNALS, r"disjunct_token_indices_merging_sequentially"),
    (INTERNALS, r"requires_grad_set_correctly|multiple values for argument 'r'|parameter_name'"),
    (INTERNALS, r"no attribute '(update_layer|_[a-z_]+|cast_input_dtype_enabled|lora_A)'"),
    (INTERNALS, r"unexpected keyword argument '(base_layer|config|is_target_conv_1d_layer)'"),
    (INTERNALS, r"test_default_target_modules_(list_of_)?str|no attribute 'from_json_file'"),
    (INTERNALS, r"test_self_targeting|test_prefixes_|test_set_adapter_non_overlapping"),
    (INTERNALS, r"KeyError: 'base_model"),
    (INTERNALS, r"test_get_peft_model_applies_find_target_modules|test_module_matching_lora"),
    (INTERNALS, r"test_target_parameter_result_caching|forward_under_autocast|MixedModel only"),
    (INTERNALS, r"test_active_adapters_large|test_with_modules_to_save|test_in_features_out"),
    (INTERNALS, r"test_model_with_injected_layers|test_auto_clear_cache|peft_version|naming_conf"),
    (INTERNALS, r"test_target_parameters(_and_target_modules)? |test_prefix_tuning"),
    (INTERNALS, r"test_multiple_active_adapters_|test_model_active_adapters|test_mha_exposes"),
    (INTERNALS, r"test_transient_attribute_access|test_save_pretrained_with_target_modules"),
    (INTERNALS, r"test_config.py.*test_(save_pretrained|methods|from_pretrained_forward)"),
    # Counts of nested wrappers; target_modules as a set; layers that transformers put in itself.
    (INTERNALS, r"test_target_multiple_parameters_on_same_module|test_add_lora_to_mixtral_v5"),
    (INTERNALS, r"test_qwen3_moe_(all_linear|regex|single_attention)|test_transformers_pipeline"),
    # docs/peft.md says why.
    (DELIBERATE, r"safe_serialization: got False|a pickle runs code"),
    (DELIBERATE, r"exiting_context_irregular_state|Regex pattern did not match|DID NOT WARN"),
    (DELIBERATE, r"DID NOT RAISE|matches no module|pissa|olora|missing_keys_warning"),
    (DELIBERATE, r"has adapters that are not this model|peft_type: is missing|bias: got 'invalid'"),
    (DELIBERATE, r"merge_tied|tied_embeddings_merge|mixed: got 'mixed'|existing_parametrization"),
    (DELIBERATE, r"targeting_param_equivalent|test_strict_|test_weighted_combination"),
    (DELIBERATE, r"AdapterFileError"),
    (DELIBERATE, r"test_lora_conversion.*argument of type 'NoneType' is not iterable"),
)


def kind_of(test: str, reason: str) -> str:
    """The class of a test that failed."""
    text = f"{test} {reason}"
    return next((kind for kind, pattern in PATTERNS if re.search(pattern, text)), REAL)
