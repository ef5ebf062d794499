"""A plugin of pytest: puts a mode's classes into `peft` before the tests import them, and writes
down how each test ended, in the file that PEFT_SUITE_REPORT names."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

MODES = ("plain", "swapped", "patched")


def _enter(mode: str) -> Callable[[], None]:
    """Returns what is to be called when the tests are imported."""
    if mode == "swapped":
        from tests.peft_suite.swap import swap

        return swap()
    if mode == "patched":
        from lora_ext.integrations.peft import patch

        patch()
    return lambda: None


_imported = _enter(os.environ.get("PEFT_SUITE_MODE", "plain"))
_ended: dict[str, dict[str, str]] = {}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Any:
    report = yield
    if call.excinfo is not None:
        lines = str(call.excinfo.value).strip().splitlines() or [""]
        where = call.excinfo.traceback[-1]
        report.user_properties.append(
            (
                "reason",
                f"{call.excinfo.typename}: {lines[0][:300]} ({where.path.name}:{where.lineno + 1})",
            )
        )
    return report


def pytest_collection_finish(session: Any) -> None:
    _imported()


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        lines = report.longreprtext.strip().splitlines() or [""]
        _ended[report.nodeid] = {"outcome": "failed", "reason": f"not collected: {lines[-1][:300]}"}


def pytest_runtest_logreport(report: Any) -> None:
    """Of a test's parts, the first that did not pass counts."""
    known = _ended.get(report.nodeid)
    if known and known["outcome"] != "passed":
        return
    outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
    reason = dict(report.user_properties).get("reason", "")
    if outcome == "skipped" and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
    _ended[report.nodeid] = {"outcome": outcome, "reason": reason}


def pytest_sessionfinish(session: Any) -> None:
    path = os.environ.get("PEFT_SUITE_REPORT")
    if path and os.environ["PEFT_SUITE_MODE"] == "patched":  # of each process of xdist, too
        from lora_ext.integrations.peft import calls

        with open(f"{path}.calls.{os.getpid()}", "w") as file:
            json.dump(calls, file)
    if path and not hasattr(session.config, "workerinput"):
        with open(path, "w") as file:
            json.dump(_ended, file, indent=1, sort_keys=True)
