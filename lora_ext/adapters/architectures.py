"""What PEFT adapts when target_modules is None, by the model_type of transformers."""

from __future__ import annotations

_BY_NAMES = {
    ("q_proj", "v_proj"): "bart gemma gemma2 gemma3_text gpt_neo gptj llama llama4 mistral mixtral "
    "opt qwen2 qwen3 stablelm",
    ("query", "value"): "bert electra layoutlm roberta xlm-roberta",
    ("query_key_value",): "RefinedWeb RefinedWebModel bloom chatglm falcon gpt_neox",
    ("q", "v"): "mt5 t5",
    ("c_attn",): "gpt2 gpt_bigcode",
    ("q", "v", "q_proj", "v_proj"): "blip-2",
    ("query_proj", "value_proj"): "deberta-v2",
    ("in_proj",): "deberta",
    ("Wqkv",): "mpt",
    ("c_proj", "c_attn"): "btlm",
    ("qkv_proj",): "codegen",
    ("q_proj", "v_proj", "fc1", "fc2"): "phi",
    ("q_proj", "k_proj", "v_proj", "o_proj"): "nemotron_h",
    ("key", "value", "receptance", "output"): "rwkv",
    ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"): "rwkv7",
}

# A tuple holds last parts of names; a string is a regular expression for the whole name.
DEFAULT_TARGETS: dict[str, tuple[str, ...] | str] = {
    architecture: names
    for names, architectures in _BY_NAMES.items()
    for architecture in architectures.split()
}
DEFAULT_TARGETS["gemma4"] = r".*language_model\..*\.(q_proj|v_proj)"

# Their fused kernels read these modules' weights without calling them: an adapter would do nothing.
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
NOT_CALLED_IN_MAMBA = ("conv1d", "out_proj")

# The heads that a task adds to modules_to_save.
TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}

# The parameter that holds two projections of each expert.
FUSED = "gate_up_proj"
# Where transformers 5 stacks the experts of a model into parameters, PEFT lets the names that their
# projections had as modules mean these. By model_type: the old names and the parameter of each.
_STACKED = {
    ("w1", "w3", "w2"): "minimax minimax_m2 mixtral",
    ("gate_proj", "up_proj", "down_proj"): "afmoe beam cohere2_moe deepseek_v2 deepseek_v3 "
    "deepseek_v32 dots1 ernie4_5_moe exaone_moe flex_olmo glm4_moe glm4_moe_lite glm4v_moe "
    "glm_moe_dsa hunyuan_v1_moe longcat_flash mellum olmoe qwen3_moe qwen3_next qwen3_omni_moe "
    "qwen3_omni_moe_text qwen3_omni_moe_thinker sarvam_mla solar_open",
}
STACKED_EXPERTS: dict[str, dict[str, str]] = {
    architecture: {"gate": "gate.weight", gate: FUSED, up: FUSED, down: "down_proj"}
    for (gate, up, down), architectures in _STACKED.items()
    for architecture in architectures.split()
}
# Layers of a model_type whose weight the module around them reads without calling them, by the ends
# of their names.
_READ = {
    ("classifier",): "longcat_flash",
    ("dt_proj",): "falcon_mamba jamba mamba",
    ("predictions.dense", "predictions.decoder"): "mobilebert",
    ("bbox_attention.k_proj",): "conditional_detr detr",
    ("kernel",): "data2vec-audio unispeech-sat wav2vec2 wav2vec2-bert wav2vec2-conformer wavlm",
}
READ_NOT_CALLED = {
    architecture: names
    for names, architectures in _READ.items()
    for architecture in architectures.split()
}
