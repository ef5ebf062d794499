"""The example runs from end to end on a tiny random model, and its parts do what they promise."""

from __future__ import annotations

import io
import json
import math
import re
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch

for library in ("transformers", "peft", "rich", "matplotlib"):
    pytest.importorskip(library)

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def docstring_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    import docstring_data

    return docstring_data


@pytest.fixture
def finetune_encoder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    import finetune_encoder

    return finetune_encoder


@pytest.fixture
def tiny_bert(tmp_path: Path) -> Path:
    """A folder with a random two-layer BERT and a tokenizer that knows letters only."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    pieces = ["[PAD]", "[UNK]", *string.ascii_lowercase]
    pieces += [f"##{letter}" for letter in string.ascii_lowercase]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tiny_bert"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(folder)
    return folder


def run_example(model: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    sizes = {"steps": 40, "compare-steps": 6, "dropout-steps": 2, "batch-size": 8, "rank": 4}
    sizes |= {"max-length": 24, "per-class": 8, "alpha": 8, "bench-seconds": 0}
    command = [sys.executable, str(EXAMPLES / "finetune_encoder.py"), f"--model={model}"]
    command += [f"--out={out}", *(f"--{name}={size}" for name, size in sizes.items()), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_the_whole_way_and_three_implementations_that_train_alike(
    tiny_bert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    # A high rate moves lora_B off zero quickly, so that all of the adapter matters to the loss.
    result = run_example(tiny_bert, out, "--lr=0.03")
    assert result.returncode == 0, result.stdout + result.stderr
    told = " ".join(result.stdout.split())
    for step in ("get_lora_model", "save_pretrained", "from_pretrained", "merge_and_unload"):
        assert step in told
    assert "FAILED" not in told
    assert len(re.findall(r"\bok ", told)) == 7  # checks
    assert "step: 40 of 40 after" in told  # there is no terminal, so no bar
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (out / "adapter").iterdir()
    }
    assert (out / "finetune_encoder.png").stat().st_size > 10_000
    content = json.loads((out / "finetune_encoder.json").read_text())
    environment, runs = content["environment"], content["runs"]
    assert environment["device"] and environment["versions"]["torch"] == torch.__version__
    assert environment["other_load"] >= 0.0 and environment["command"].startswith("python examples")
    assert told.count("others used") >= 2  # below each cost table
    assert ("these times say little" in told) == (environment["busy"] is not None)
    assert set(runs) == {"dropout 0", "dropout 0.1"}
    losses = {run["name"]: run["losses"] for run in runs["dropout 0"]}
    assert set(losses) == {"lora_ext", "naive", "peft"}
    assert len(losses["naive"]) == 6
    for name in ("lora_ext", "peft"):
        # Rounding makes 1e-7 here; an update that is 1% too large would make more than 1e-4.
        assert losses[name] == pytest.approx(losses["naive"], rel=1e-5)
    for group in runs.values():
        assert all(run["saved_bytes"] > 0 for run in group)


def test_what_it_will_do_is_said_before_torch_is_loaded(
    finetune_encoder: ModuleType, tmp_path: Path
) -> None:
    program = (
        "import sys, runpy\n"
        "class NoTorch:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise SystemExit(7)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        f"sys.path.insert(0, {str(EXAMPLES)!r})\n"
        f"sys.argv = ['finetune_encoder.py', '--out={tmp_path}']\n"
        "runpy.run_module('finetune_encoder', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    for word in ("model", "data", "on", "time", "files"):
        assert re.search(rf"^   {word} +\S", done.stdout, re.M), done.stdout
    args = finetune_encoder.parse_args(["--compare-steps=0"])
    assert "plain PyTorch" in done.stdout and "plain PyTorch" not in finetune_encoder.plan(args)


def test_a_line_every_few_seconds_where_there_is_no_terminal(
    finetune_encoder: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    import progress
    from rich.console import Console

    now = iter(range(0, 1000, 4))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    console = Console(record=True, width=100, file=io.StringIO())
    assert list(progress.track(range(7), "step", console)) == list(range(7))
    assert console.export_text().split("\n") == [
        "   step: 3 of 7 after 12 s, about 16 s to go",
        "   step: 6 of 7 after 24 s, about 4 s to go",
        "   step: 7 of 7 after 28 s",
        "",
    ]


@pytest.mark.parametrize("code", [0, 3], ids=["works", "fails"])
def test_long_steps_of_make_show_that_they_go_on(code: int, tmp_path: Path) -> None:
    tool = EXAMPLES.parent / "tools" / "step.py"
    command = f"echo begun; echo '[7/9] compiling'; sleep 1.5; echo the reason >&2; exit {code}"
    program = "import sys, pathlib, step; sys.exit(step.main('a step', pathlib.Path(sys.argv[1]),"
    program += f" ['sh', '-c', {command!r}], every=0.0))"
    log = tmp_path / "logs" / "step.log"
    done = subprocess.run(
        [sys.executable, "-c", program, str(log)], cwd=tool.parent, capture_output=True, text=True
    )
    assert done.returncode == code
    assert done.stdout.startswith(f"a step (log: {log})\n  1 s [7/9]\n")
    assert ("done after" in done.stdout) == (code == 0)
    assert ("the reason\nfailed with exit code 3" in done.stderr) == (code == 3)


def test_a_check_that_fails_is_told_at_the_end(
    finetune_encoder: ModuleType, tiny_bert: Path, tmp_path: Path
) -> None:
    # An adapter that is larger than the model.
    result = run_example(tiny_bert, tmp_path, "--rank=512", "--steps=4", "--compare-steps=0")
    told = " ".join(result.stdout.split())
    assert result.returncode == 1
    assert re.search(r"FAILED: adapter and head take [\d.]+ MiB", told)
    assert "7. Compare" not in told and not (tmp_path / "finetune_encoder.png").exists()


@pytest.mark.parametrize(("other_load", "busy"), [(0.1, False), (3.0, True)])
def test_table_and_files_say_how_busy_the_machine_was(
    finetune_encoder: ModuleType, tmp_path: Path, other_load: float, busy: bool
) -> None:
    import finetune_report
    from rich.console import Console

    from lora_ext.bench.environment import describe

    environment = describe(torch.device("cpu"), [], "program")
    environment |= {"cpus": 4, "load_average": 0.5, "other_load": other_load}
    runs = [
        finetune_report.Measurement(name, [2.0, 1.0], [1.0, 1.0], saved_bytes=1)
        for name in ("naive", "peft", "lora_ext")
    ]
    console = Console(record=True, width=200)
    console.print(finetune_report.cost_table("Cost", runs, environment))
    finetune_report.save_json(tmp_path / "run.json", {}, {"p": runs}, environment)
    saved = json.loads((tmp_path / "run.json").read_text())["environment"]
    for shown in (console.export_text(), "\n".join(finetune_report.captions(environment))):
        text = " ".join(shown.split())
        assert (
            f"load 0.5 before, others used {other_load:g} of 4 CPUs" in text
            and torch.__version__ in text
        )
        assert ("these times say little" in text) == busy
    assert (saved["busy"] is not None) == busy
    finetune_report.save_plot(tmp_path / "run.png", {"p": runs}, environment, 1e-4)


@pytest.mark.parametrize("second_loss", [1.001, math.nan], ids=["off by 1e-3", "nan"])
def test_curves_that_differ_fail(finetune_encoder: ModuleType, second_loss: float) -> None:
    from compare_implementations import verdict
    from finetune_report import Measurement
    from rich.console import Console

    naive = Measurement("naive", [2.0, 1.0], [1.0, 1.0], saved_bytes=1)
    other = Measurement("lora_ext", [2.0, second_loss], [1.0, 1.0], saved_bytes=1)
    console = Console(record=True)
    assert "lora_ext" in verdict([other, naive], comparable=True, console=console)[0]
    assert verdict([naive], comparable=True, console=console) == []


def test_data_set_is_balanced_and_has_no_text_twice(docstring_data: ModuleType) -> None:
    data = docstring_data.build_dataset(per_class=40, held_out_share=0.25)
    classes = range(len(data.labels))
    assert len(data.labels) >= 8
    assert Counter(label for _, label in data.train) == dict.fromkeys(classes, 30)
    assert Counter(label for _, label in data.held_out) == dict.fromkeys(classes, 10)
    keys = [docstring_data.text_key(text) for text, _ in data.train + data.held_out]
    assert len(keys) == len(set(keys))


def test_data_set_does_not_name_the_modules(docstring_data: ModuleType) -> None:
    data = docstring_data.build_dataset(per_class=40)
    texts = " ".join(text for text, _ in data.train + data.held_out).lower()
    assert not [label for label in docstring_data.STDLIB_SOURCES if label in texts]


def test_data_set_depends_on_the_seed_only(docstring_data: ModuleType) -> None:
    assert docstring_data.build_dataset(seed=1) == docstring_data.build_dataset(seed=1)
    assert docstring_data.build_dataset(seed=1) != docstring_data.build_dataset(seed=2)


def test_the_encoder_over_codes(tiny_bert: Path) -> None:
    sizes = {"steps": 24, "batch-size": 8, "max-length": 24, "per-class": 8, "rank": 4}
    command = [sys.executable, str(EXAMPLES / "finetune_quantized.py"), f"--model={tiny_bert}"]
    command += [f"--{name}={size}" for name, size in sizes.items()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    bits = re.findall(r" MiB +(\d+\.\d+) bits", done.stdout)
    assert bits[0] == "32.00" and 4 < float(bits[1]) < 16  # with tables, for layers so small
    assert done.stdout.count("bit for bit: True") == 2
