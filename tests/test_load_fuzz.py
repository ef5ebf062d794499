"""Adapter folders changed at random: each loads or is refused as it has to be, in bounded time and
memory, and a refused one leaves the model as it was.

`python tests/test_load_fuzz.py 4000` tries so many; the test tries a sample.
"""

from __future__ import annotations

import json
import math
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from measured import MAX_BYTES, MAX_SECONDS
from safetensors.torch import load, save
from torch import nn

from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Fields = dict[str, Any]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)


class Net(nn.Module):
    """One of each kind of layer, half in float16."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(Attention() for _ in range(3))
        self.conv = nn.Conv1d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.half = nn.Linear(8, 8).half()
        self.head = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


ALL = ["embed", "q_proj", "v_proj", "conv", "attention", "half"]
CONFIGS: list[Fields] = [
    {"target_modules": ["q_proj", "v_proj", "half"], "rank_pattern": {"layers.1.q_proj": 3}},
    {"target_modules": ALL, "alpha_pattern": {"^embed": 4}, "modules_to_save": ["head", "norm"]},
    {"target_modules": r".*\.(q|v)_proj", "bias": "all", "use_rslora": True},
    {"target_modules": ["q_proj", "half", "embed"], "use_dora": True},
    {"target_modules": ["conv", "head"], "lora_bias": True},
    {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
    {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 3]]},
    {"target_modules": [], "target_parameters": ["head.weight"]},
]
EVIL = [r"(\w+\.?)+[!?]", "(?i)" + "[\0-\uffff]" * 200, "((a{99}){99}){99}", r"(?=(.*.*.*)*[!])x"]
EVIL += [
    "(?:" * 500 + "a" + ")*" * 500,
    "(?R)*",
    "(",
    "a" * 9000,
    "[a-z]{9}" * 900,
    "(?x)a{9 9#\n9}",
]
ODD: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 64, 10**5, 10**12, 10**400, 0.5, -0.0, 1e39, 1e308, "", "x",
    "8", "all-linear", "ALL-LINEAR", "q_proj", "\ud800", "\0", "a" * 3000, [], {}, [[]], [None],
    [1, 2], ["q_proj"], ["head"], [""], ["."], [[0, 1]], [[0, 3]] * 400, [[0, 3]] * 9000, [[2, 1]],
    {"x": 1}, {"q_proj": 2}, {"": 2}, {"q_proj": None}, {"q_proj": 1e999}, {"a": {"b": [{}]}},
    *EVIL, *({one: 3} for one in EVIL), *([one] for one in EVIL), EVIL, dict.fromkeys(EVIL, 2),
    {f"a{i}": 2 for i in range(9000)}, [f"a.{i}" for i in range(9000)], list(range(20000)),
    {f"{'.' * (i % 20)}{i}": 2 for i in range(9000)}, "pissa", "pissa_niter_10000000", "olora",
    "gaussian", "OLoRA", "orthogonal", "eva", math.inf, math.nan, "none", "all", "lora_only",
]  # fmt: skip
NAMES = [*LoraConfig.__dataclass_fields__, "unknown", "enable_lora", "\ud800", ""]


def change_fields(chance: random.Random, folder: Path) -> None:
    """Other values for some fields."""
    fields = json.loads((folder / CONFIG).read_text())
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        fields[chance.choice(NAMES)] = chance.choice(ODD)
    (folder / CONFIG).write_text(json.dumps(fields))


def change_bytes(name: str, first: int | None) -> Callable[[random.Random, Path], None]:
    """Other bytes in a file; most among the first."""

    def change(chance: random.Random, folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        for _ in range(chance.choice((1, 1, 2, 8))):
            place = chance.randrange(min(first or len(content), len(content)))
            match chance.randrange(4):
                case 0:
                    content[place] = chance.choice(b'0123456789{}[]",:FIB \\u\0\xff')
                case 1:
                    del content[place : place + chance.choice((1, 1, 9))]
                case 2:
                    content[place:place] = chance.choice((b"9", b"]", b"{", b"1e999", b'"', b"NaN"))
                case 3:
                    cut = chance.random() < 0.2
                    content = content[:place] if cut else content + content[:99]
            if not content:
                break
        (folder / name).write_bytes(content)

    return change


def change_tensors(chance: random.Random, folder: Path) -> None:
    """Other tensors."""
    tensors = load((folder / WEIGHTS).read_bytes())
    for _ in range(chance.choice((1, 1, 2))):
        key = chance.choice([*tensors])
        one = tensors[key]
        match chance.randrange(9):
            case 0:
                del tensors[key]
                if not tensors:
                    break
            case 1:
                tensors[key + chance.choice((".default", "x", "\0", "\ud7ff"))] = one.clone()
            case 2:
                tensors[key] = one.to(chance.choice((torch.float16, torch.int8, torch.float64)))
            case 3 if one.numel():
                value = chance.choice((math.nan, math.inf, 1e5, 3e38))
                tensors[key] = one.float().clone()
                tensors[key].view(-1)[chance.randrange(one.numel())] = value
            case 4:
                tensors[key] = one.mT.contiguous() if one.dim() > 1 else one[:, None].clone()
            case 5:
                tensors[key] = torch.zeros(0, *one.shape[1:])
            case 6:
                tensors[key] = torch.cat([one, one])
            case 7:
                tensors[chance.choice([*tensors])] = one.clone()
            case _:
                tensors[key] = torch.zeros(chance.choice(((), (1,), (2, 2), (1, 2, 3, 4, 5))))
    (folder / WEIGHTS).write_bytes(save(tensors))


def change_both(chance: random.Random, folder: Path) -> None:
    change_fields(chance, folder)
    change_tensors(chance, folder)


CHANGES = [
    *[change_fields] * 6, change_both, change_bytes(CONFIG, None), change_bytes(WEIGHTS, 600),
    *[change_tensors] * 3,
]  # fmt: skip


def good_folders() -> list[dict[str, bytes]]:
    result = []
    for fields in CONFIGS:
        with tempfile.TemporaryDirectory() as folder:
            config = LoraConfig(r=2, init_lora_weights=False, **fields)
            get_lora_model(Net(), config).save_pretrained(folder)
            result.append({n: (Path(folder) / n).read_bytes() for n in (CONFIG, WEIGHTS)})
    return result


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def fuzz(folder: Path, seeds: range) -> tuple[int, list[str]]:
    """How many folders were loaded, and what went wrong."""
    good, problems, loaded = good_folders(), [], 0
    for seed in seeds:
        chance = random.Random(seed)
        for name, content in chance.choice(good).items():
            (folder / name).unlink(missing_ok=True)
            (folder / name).write_bytes(content)
        chance.choice(CHANGES)(chance, folder)
        model = Net()
        before, names = model.state_dict(), [type(m) for m in model.modules()]
        wide, memory, error, seconds = chance.random() < 0.5, peak(), None, math.inf
        for _ in range(3):  # the quickest: others use this machine too
            start = time.process_time()
            try:
                adapted = LoraModel.from_pretrained(model, folder, autocast_adapter_dtype=wide)
            except AdapterFileError as raised:
                error = raised
            except Exception as raised:
                problems.append(f"{seed}: {type(raised).__name__}: {str(raised)[:200]}")
            seconds = min(seconds, time.process_time() - start)
            if error is None or seconds < MAX_SECONDS:
                break
        memory = peak() - memory
        if problems and problems[-1].startswith(f"{seed}:"):
            continue
        if error is None:
            loaded += 1
            adapted.peft_config["default"].to_json()  # what was loaded can be saved
            values = [t for t in adapted.state_dict().values() if t.is_floating_point()]
            if not all(bool(t.isfinite().all()) for t in values):
                problems.append(f"{seed}: loaded NaN or Inf")
            continue
        after = model.state_dict()
        if [type(m) for m in model.modules()] != names or before.keys() != after.keys():
            problems.append(f"{seed}: the model was changed: {error}")
        elif not all(torch.equal(before[key], after[key]) for key in before):
            problems.append(f"{seed}: a weight was changed: {error}")
        if seconds > MAX_SECONDS or memory > MAX_BYTES:
            problems.append(f"{seed}: {seconds:.2f} s, {memory >> 20} MiB: {str(error)[:200]}")
        if str(folder) not in str(error) or len(str(error)) > 2000:
            problems.append(f"{seed}: which file? {str(error)[:200]}")
    return loaded, problems


@pytest.mark.filterwarnings("ignore")
def test_changed_folders_load_or_are_refused(tmp_path: Path) -> None:
    loaded, problems = fuzz(tmp_path, range(400))
    assert not problems
    assert 20 < loaded < 200


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    start = time.process_time()
    with tempfile.TemporaryDirectory() as one:
        count = int(sys.argv[1])
        print(*(result := fuzz(Path(one), range(1000, 1000 + count)))[1], sep="\n")
    print(f"{result[0]} of {count} loaded, {len(result[1])} problems", time.process_time() - start)
