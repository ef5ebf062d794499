"""Every example runs as its first lines say, and prints what it is about. finetune_encoder.py,
finetune_quantized.py and train_distributed.py have tests of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SAYS = {
    "convolutions_and_attention.py": r"adapted: (100|9\d)% of new turned images",
    "half_precision.py": r"lora_ext +keeps 1\.00 times",
    "peft_one_line.py": r"patched they differ by \d\.\de-0[5-9]",
    "trainer.py": r"the same, bit for bit: True\s+.*goes on after \[7, 8, 9\]: \[10, 11, 12,",
    "train_many.py": r"(\w +\d+ +\d+ +\d\.\d+ +True\s+){8}",
    "several_adapters.py": r"sum +loss \d\.\d+ -> 0\.0",
    "variants.py": r"DoRA +\d\.\d+ +0\.000\d+",
}


@pytest.mark.skipif(
    not EXAMPLES.exists(), reason="examples/ is not here: an installed copy is tested"
)
@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(SAYS[name], done.stdout), done.stdout
    assert (EXAMPLES / name).read_text().startswith('"""')


def test_the_list_of_examples_is_whole() -> None:
    page = (EXAMPLES / "README.md").read_text()
    listed = set(re.findall(r"^\| `(\w+\.py)`", page, re.M))
    scripts = {p.name for p in EXAMPLES.glob("*.py") if "def main()" in p.read_text()}
    assert listed == scripts
