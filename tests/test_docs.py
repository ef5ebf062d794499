"""Every Python block of README and docs runs, as a reader would paste it."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import torchrun
from tiny_models import llama
from torch import nn

import lora_ext
import lora_ext.integrations.peft as fused

ROOT = Path(lora_ext.__file__).parents[1]
BLOCKS = {
    f"{page.name}:{i}": block
    for page in sorted([*ROOT.glob("README.md"), *ROOT.glob("docs/*.md")])
    for i, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))
}

# Of the quick starts: a block and what it prints.
QUICK_STARTS = {
    heading: (block, said)
    for heading, block, said in re.findall(
        r"^## ([^\n]+)\n(?:(?!^##).)*?^```python\n(.*?)^```\n\n```text\n(.*?)^```",
        (ROOT / "docs" / "quick_starts.md").read_text() if BLOCKS else "",
        re.M | re.S,
    )
}
BLOCKS = {
    name: block
    for name, block in BLOCKS.items()
    if block not in [block for block, _ in QUICK_STARTS.values()]
}

# Pages whose blocks are pasted into one session, one after the other, with nothing else in it.
IN_ORDER = ("README.md", "many_adapters.md")

BLOCK, FORMER = "a block of the documentation", DeprecationWarning


def given() -> dict[str, Any]:
    """What the pages take for given: libraries, a reader's model, operands."""
    model = llama()[0]
    return {
        "copy": copy, "torch": torch, "nn": nn, "lora_ext": lora_ext,
        "model": model, "base_model": copy.deepcopy(model),
        "x": torch.randn(3, 8), "lora_A": torch.randn(2, 8), "lora_B": torch.randn(4, 2),
        "lora_bias": torch.randn(4), "weight": torch.randn(4, 8), "bias": torch.randn(4),
        "s": 2.0, "p": 0.1,
    }  # fmt: skip


def run_blocks(blocks: Iterable[str], names: dict[str, Any]) -> None:
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for block in blocks:
                exec(compile(block, BLOCK, "exec"), names)
    finally:
        fused.unpatch()
    former = [str(w.message) for w in caught if w.filename == BLOCK and w.category is FORMER]
    assert not former, former


ALONE = {n: block for n, block in BLOCKS.items() if n.partition(":")[0] not in IN_ORDER}


@pytest.mark.skipif(not BLOCKS, reason="docs/ is not here: an installed copy is tested")
@pytest.mark.parametrize("block", ALONE.values(), ids=ALONE)
def test_block(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_blocks([block], given())


@pytest.mark.skipif(not BLOCKS, reason="docs/ is not here: an installed copy is tested")
@pytest.mark.parametrize("page", IN_ORDER)
def test_blocks_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block for name, block in BLOCKS.items() if name.startswith(f"{page}:")]
    assert len(blocks) >= 3
    run_blocks(blocks, {"__name__": "__main__"})


@pytest.mark.skipif(not BLOCKS, reason="docs/ is not here: an installed copy is tested")
@pytest.mark.parametrize("name", QUICK_STARTS)
def test_a_quick_start_runs_alone_and_prints_what_the_page_says(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    block, said = QUICK_STARTS[name]
    monkeypatch.chdir(tmp_path)
    if block.startswith("# fsdp2.py"):
        (tmp_path / "fsdp2.py").write_text(block)
        printed = torchrun("fsdp2.py", cwd=tmp_path)
    else:
        try:
            exec(compile(block, BLOCK, "exec"), {"__name__": "__main__"})
        finally:
            fused.unpatch()
        printed = capsys.readouterr().out
    want, got = (re.sub(r"\d[\d.,]*(e-\d+)?", "#", text).split("\n") for text in (said, printed))
    assert got == want
    losses = re.findall(r"(?:^step.*loss |'loss': ')([\d.]+)", printed, re.M)
    assert len(losses) > 1 and float(losses[-1]) < float(losses[0])


def test_every_quick_start_is_tested() -> None:
    assert len(QUICK_STARTS) in (0, 7)


def test_the_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("myst_parser", reason="sphinx and myst-parser are not installed")
    if not (ROOT / "docs" / "conf.py").exists():
        pytest.skip("docs/ is not here: an installed copy is tested")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    done = subprocess.run(
        [*command, "docs", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "lora_linear" in (tmp_path / "reference" / "functional.html").read_text()


def test_errors_of_the_troubleshooting_page_are_those_of_the_code() -> None:
    page = ROOT / "docs" / "troubleshooting.md"
    if not page.exists():
        pytest.skip("docs/ is not here: an installed copy is tested")
    python = [*ROOT.glob("lora_ext/**/*.py"), ROOT / "setup.py"]
    code = re.sub(r"\{[^{}]*\}", "", "".join(path.read_text() for path in python))  # values
    sources = [*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h")]
    code += "".join(path.read_text() for path in sources)
    code = re.sub(r"\"\s*f?\"", "", code)  # sentences over several lines
    said = re.findall(r"^\| `([^`]+)` \|", page.read_text(), re.M)
    assert len(said) > 12
    torchs = {"element 0 of tensors does not require grad"}
    missing = [text for text in said if text not in code and text not in torchs]
    assert not missing, missing
