"""All instruction sets that this CPU has: the same masks, and right results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lora_ext

CAPABILITIES = ["default", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
BEST = lora_ext.build_info()["cpu_capability"]

SCRIPT = """
import hashlib, json, torch, lora_ext
mask = lora_ext.dropout_mask(torch.tensor([99, 8]), 70, 1000, 0.37)
print(json.dumps({"capability": lora_ext.build_info()["cpu_capability"],
                  "mask": hashlib.sha256(mask.numpy().tobytes()).hexdigest()}))
"""


def run(capability: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LORA_EXT_CPU_CAPABILITY": capability}
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True
    )


def skip_without(capability: str) -> None:
    if CAPABILITIES.index(capability) > CAPABILITIES.index(BEST):
        pytest.skip(f"this CPU has no {capability}; its best is {BEST}")


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_masks_do_not_depend_on_it(capability: str) -> None:
    skip_without(capability)
    outputs = [json.loads(run(c, "-c", SCRIPT).stdout) for c in ("default", capability)]
    assert outputs[1]["capability"] == capability
    assert outputs[0]["mask"] == outputs[1]["mask"]


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        (
            "LORA_EXT_CUDA_PATH",
            "fuse",
            "got 'fuse', expected 'auto', 'fused', 'hybrid', 'composed'",
        ),
        ("LORA_EXT_CUDA_OFF", "cluster,clock", "got 'clock', expected of 'cluster', 'self_check'"),
    ],
)
def test_wrong_values_for_the_gpu_are_told_by_every_build(
    name: str, wrong: str, expected: str
) -> None:
    told = subprocess.run(
        [sys.executable, "-c", "import lora_ext; lora_ext.build_info()"],
        env=os.environ | {name: wrong}, capture_output=True, text=True,
    )  # fmt: skip
    assert told.returncode == 1 and f"{name}: {expected}" in told.stderr
    doctor = subprocess.run(
        [sys.executable, "-m", "lora_ext", "doctor"],
        env=os.environ | {name: wrong}, capture_output=True, text=True,
    )  # fmt: skip
    assert doctor.returncode == 1 and name in doctor.stdout


def test_spaces_behind_commas_are_fine() -> None:
    environment = os.environ | {"LORA_EXT_CUDA_OFF": "cluster, together , self_check"}
    program = "import lora_ext; lora_ext.build_info()"
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)


@pytest.mark.parametrize("capability", CAPABILITIES[:-1])
def test_results_are_right_on_lower_ones(capability: str) -> None:
    skip_without(capability)
    folder = Path(__file__).parent
    chosen = ["test_values_and_gradients", "test_empty", "test_error_against", "test_mask_is",
              "test_panels", "test_ties", "test_16_bits_across", "test_column_scale",
              "test_fp32[1x768x64x1-0.0", "test_fp32[16x64x768x1-0.9",
              "test_fp32[7x64x256x4-0.1"]  # fmt: skip
    words = " or ".join(name.replace("[", " and ") for name in chosen)
    result = run(
        capability, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "not cuda", "-k", words,
        str(folder / "test_lora_linear.py"), str(folder / "test_precision.py"),
        str(folder / "test_dora_linear.py"), str(folder / "test_dropout.py"),
        str(folder / "test_embedding.py"),
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-3000:]
    assert " passed" in result.stdout and "failed" not in result.stdout
    missing = [name for name in chosen if name not in result.stdout]
    assert not missing  # else they have other names now, and nothing of them ran
