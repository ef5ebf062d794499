"""A part of PEFT's own tests with our classes in the places of PEFT's: none fails but for what
`tests/peft_suite/differences.py` names. All of them: `python -m tests.peft_suite swapped`."""

from __future__ import annotations

import collections
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# One base of each kind of layer, plain.
WHICH = "LoRA-MHA-LoraConfig or LoRA-Conv2d-LoraConfig or LoRA-EmbConv1D-LoraConfig"


@pytest.mark.network
def test_of_a_part_nothing_fails_that_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for name in [name for name in sys.modules if name == "tests" or name.startswith("tests.")]:
        monkeypatch.delitem(sys.modules, name)
    from tests.peft_suite.__main__ import run
    from tests.peft_suite.differences import REAL, kind_of
    from tests.peft_suite.fetch import NotFetchedError

    try:
        ended = run("swapped", ("test_custom_models.py",), WHICH)
    except NotFetchedError as error:
        pytest.skip(f"PEFT's tests cannot be fetched: {error}")
    outcomes = collections.Counter(how["outcome"] for how in ended.values())
    failed = {test: how["reason"] for test, how in ended.items() if how["outcome"] == "failed"}
    assert outcomes["passed"] >= 250, outcomes
    assert [text for text in failed.items() if kind_of(*text) == REAL] == []
