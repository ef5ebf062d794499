"""Benchmark library: LoRA linear layers against the frozen `nn.Linear` under them.

Run it with `python -m lora_ext.bench`. Everything LoRA adds is overhead, so every time is also
reported as a ratio to the frozen layer, measured next to it. Each contender is checked against an
fp64 reference before it is timed.

    cli → runner → problem (tensors), rivals (contenders), check (correctness), measure (times)
        → results (rows, JSON) → report (tables), plots (PNG), compare (regressions)
"""
