"""Runs PEFT's tests in one of three modes and says how many pass, and why the others do not.

python -m tests.peft_suite swapped
python -m tests.peft_suite swapped --files test_custom_models.py -k "and Conv2d"
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.peft_suite.differences import kind_of
from tests.peft_suite.fetch import BUILD, PACKAGES, ROOT, SUITE, fetch
from tests.peft_suite.hub import make_hub
from tests.peft_suite.plugin import MODES

# Files whose tests are made for each kind of config: those of LoRA are chosen by their names.
BY_CONFIG = (
    *("test_custom_models.py", "test_decoder_models.py", "test_encoder_decoder_models.py"),
    *("test_feature_extraction_models.py", "test_seq_classifier.py", "test_config.py"),
)
# Files about LoRA alone, or about what every kind of adapter has.
WHOLE = (
    *("test_initialization.py", "test_lora_variants.py", "test_low_level_api.py"),
    *("test_tuners_utils.py", "test_target_parameters.py", "test_mapping.py"),
    *("test_other.py", "test_helpers.py", "test_auto.py", "test_hub_features.py"),
    *("test_integrations.py", "test_trainable_tokens.py"),
)
OTHERS = (
    "AdaLora VBLora RandLora UniLora TinyLora Delora Glora GraLora XLora PveraConfig VeraConfig"
)
LORA = "LoraConfig" + "".join(f" and not {name}" for name in OTHERS.split())


def run(
    mode: str, files: tuple[str, ...], which: str = "", jobs: int = 1
) -> dict[str, dict[str, str]]:
    """How each test ended, by its id: {"outcome": ..., "reason": ...}."""
    fetch()
    hub = make_hub()
    ended: dict[str, dict[str, str]] = {}
    for chosen, expression in ((BY_CONFIG, LORA), (WHOLE, "")):
        mine = [name for name in files if (name in BY_CONFIG) == (chosen is BY_CONFIG)]
        keyword = " and ".join(f"({text})" for text in (expression, which) if text)
        if mine:
            ended |= _pytest(mode, mine, keyword, jobs, hub)
    return ended


def _pytest(
    mode: str, files: list[str], keyword: str, jobs: int, hub: Path
) -> dict[str, dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(PACKAGES)]),
            "PEFT_SUITE_MODE": mode,
            "PEFT_SUITE_REPORT": str(report),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(hub),
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        command = [sys.executable, "-m", "pytest", "-p", "tests.peft_suite.plugin", *files]
        command += ["-q", "--tb=no", "--no-header", "-r", "", "-W", "ignore", "--timeout", "300"]
        command += ["-k", keyword] if keyword else []
        command += ["-n", str(jobs)] if jobs > 1 else ["-p", "no:xdist"]
        done = subprocess.run(command, cwd=SUITE, env=environment, capture_output=True, text=True)
        if not report.exists():
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        if done.returncode > 1:
            print(done.stdout[-2000:])
        if mode == "patched":
            calls: collections.Counter[str] = collections.Counter()
            for path in report.parent.glob(f"{report.name}.calls.*"):
                calls.update(json.loads(path.read_text()))
            print(fused_share(calls))
        result: dict[str, dict[str, str]] = json.loads(report.read_text())
        return result


def fused_share(calls: dict[str, int]) -> str:
    """How many calls of PEFT's linear layers and embeddings ran fused, of those with adapters that
    are no variants of LoRA but DoRA."""
    counted = ((n, reason) for reason, n in calls.items() if reason != "base alone")
    rows = sorted(counted, reverse=True)
    plain = sum(n for n, reason in rows if "variant" not in reason)
    share = calls.get("fused", 0) / max(plain, 1)
    return "\n".join([f"{share:.1%} fused", *(f"{n:7d}  {reason}" for n, reason in rows)])


def grouped(ended: dict[str, dict[str, str]]) -> list[tuple[str, list[str]]]:
    """The tests that fail, by reason, the most frequent first."""
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for test, how in ended.items():
        if how["outcome"] == "failed":
            reason = re.sub(r"'[^']*'|\"[^\"]*\"|\d+(\.\d+)?|0x[0-9a-f]+", "*", how["reason"])
            groups[reason[:160]].append(test)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def main() -> None:
    parser = argparse.ArgumentParser(prog="tests.peft_suite", description=__doc__)
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("--files", nargs="*", default=[*BY_CONFIG, *WHOLE])
    parser.add_argument("-k", default="", help="an expression of pytest, beside the choice of LoRA")
    parser.add_argument("-n", type=int, default=1, help="processes")
    parser.add_argument("--groups", type=int, default=40, help="how many reasons are printed")
    arguments = parser.parse_args()
    ended = run(arguments.mode, tuple(arguments.files), arguments.k, arguments.n)
    outcomes = collections.Counter(how["outcome"] for how in ended.values())
    by_file: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for test, how in ended.items():
        by_file[test.partition("::")[0]][how["outcome"]] += 1
    for reason, tests in grouped(ended)[: arguments.groups]:
        print(f"{len(tests):5d}  {reason}\n         such as {tests[0]}")
    kinds = collections.Counter(
        kind_of(test, how["reason"]) for test, how in ended.items() if how["outcome"] == "failed"
    )
    for name, counts in by_file.items():
        print(f"{name}: {dict(counts)}")
    print(f"{arguments.mode}: {dict(outcomes)} of {len(ended)}")
    if arguments.mode == "swapped":
        print(f"of those that fail: {dict(kinds)} (tests/peft_suite/differences.py)")
    report = BUILD / f"{arguments.mode}.json"
    report.write_text(json.dumps(ended, indent=1, sort_keys=True))
    print(f"each test's end is in {report.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
