"""Whole models: `python -m lora_ext.bench --model tiny`.

A step of training (forward, loss, backward, the adapters' optimizer) of one random model, adapted
in different ways. The denominator is the frozen model, with gradients down to its embeddings.

    cases (what) → bases (the model) → ways (contenders) → check (against fp64)
        → run (times, bytes kept; the peak from memory, in processes of their own) → report
"""
