"""These run in a process that finds bitsandbytes and torchao before peft and transformers look for
them: tests/test_quantized_libraries.py starts it; by hand it is
PYTHONPATH=.venv/quantized pytest tests/quantized."""

from __future__ import annotations

from quantized_libraries import are_installed

collect_ignore_glob = [] if are_installed() else ["test_*.py"]
