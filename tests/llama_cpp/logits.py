"""Logits of llama.cpp for a GGUF model with adapters: a program, as llama.cpp ends its process
where it meets what it does not expect.

Arguments: the package's folder, the model, tokens as JSON, adapters, each followed by its scale.
Prints the logits of every token, and each adapter's invocation tokens (aLoRA), as JSON.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any


def main(folder: str, model_path: str, tokens: list[int], adapters: list[tuple[str, float]]) -> Any:
    sys.path.insert(0, folder)
    import llama_cpp as lib

    lib.llama_backend_init()
    options = lib.llama_model_default_params()
    options.n_gpu_layers = 0
    options.use_extra_bufts = False  # which repack weights, in blocks that tiny ones do not fill
    model = lib.llama_model_load_from_file(model_path.encode(), options)
    assert model, f"llama.cpp does not load {model_path}"
    wanted = lib.llama_context_default_params()
    wanted.n_ctx, wanted.n_batch, wanted.n_ubatch, wanted.n_threads = 64, 64, 64, 1
    wanted.n_threads_batch = 1
    wanted.type_k = wanted.type_v = 0  # F32
    wanted.flash_attn_type = 0  # off: it computes in halves
    context = lib.llama_init_from_model(model, wanted)
    assert context
    loaded = [lib.llama_adapter_lora_init(model, path.encode()) for path, _ in adapters]
    assert all(loaded), "llama.cpp does not load the adapter"
    if loaded:
        scales = (ctypes.c_float * len(loaded))(*(scale for _, scale in adapters))
        pointers = (lib.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
        assert lib.llama_set_adapters_lora(context, pointers, len(loaded), scales) == 0
    invocations = []
    for one in loaded:
        count = lib.llama_adapter_get_alora_n_invocation_tokens(one)
        found = lib.llama_adapter_get_alora_invocation_tokens(one)
        invocations.append([found[i] for i in range(count)])
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, i, 1, True
        batch.seq_id[i][0] = 0
    assert lib.llama_decode(context, batch) == 0
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    rows = [lib.llama_get_logits_ith(context, i)[:size] for i in range(len(tokens))]
    return {"logits": rows, "invocations": invocations}


if __name__ == "__main__":
    _, folder, model_path, tokens, *rest = sys.argv
    adapters = [(path, float(scale)) for path, scale in zip(rest[::2], rest[1::2], strict=True)]
    print(json.dumps(main(folder, model_path, json.loads(tokens), adapters)))
