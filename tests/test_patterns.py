"""Names and regular expressions of a config: what PEFT's `re` says, in bounded time."""

from __future__ import annotations

import gc
import random
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import regex
from torch import nn

from lora_ext import LoraConfig, get_lora_model
from lora_ext import _patterns as patterns
from lora_ext._patterns import (
    FILE_SECONDS,
    SlowPatternError,
    compiled,
    in_time,
    matching,
    size,
)

AROUND = {"rank_pattern": r"(.*\.)?(%s)$", "modules_to_save": r"(^|.*\.)%s($|\..*)"}
PARTS = ["a", "b", "ab", "a-b", "0", "layers", "q_proj", "ß"]
EXPRESSIONS = ["a.*", "(?:a|b)", "[ab]+", r"\w+", ".*q", "", "^", "$", ".", r"(?!a).*", r"(.)\1"]


def a_name(chance: random.Random) -> str:
    name = ".".join(chance.choice(PARTS) for _ in range(chance.randint(1, 5)))
    return name + chance.choice(["", "", "", "", "\n", "."])


def a_pattern(chance: random.Random) -> str:
    text = a_name(chance)
    if chance.random() < 0.3:
        text = re.escape(text)
    if chance.random() < 0.2:  # a wildcard
        text = text.replace(chance.choice(text), ".", 1)
    text = chance.choice(["", "", "", "^"]) + text + chance.choice(["", "", "", "$"])
    return chance.choice(EXPRESSIONS) if chance.random() < 0.15 else text


@pytest.mark.parametrize("field", AROUND)
def test_patterns_match_as_in_peft(field: str) -> None:
    chance, matched = random.Random(3), 0
    for _ in range(300):
        patterns = list(dict.fromkeys(a_pattern(chance) for _ in range(chance.randint(1, 12))))
        for name in [a_name(chance) for _ in range(4)]:
            expected = [one for one in patterns if re.match(AROUND[field] % one, name)]
            assert list(matching(field, patterns, name)) == expected, (patterns, name)
            matched += len(expected)
    assert matched > 400


LOOKING = [r"(?!.*vision).*\.(?:q|v)_proj", r".*(?<=\.)(\w)\w*_\w+", r"(?i:LAYERS)\.\d{1,2}\..*"]


@pytest.mark.parametrize("expression", LOOKING)
def test_what_a_linear_engine_cannot_is_taken(expression: str) -> None:
    names = ["layers.0.q_proj", "layers.11.up_proj", "vision.q_proj", "q_proj", "layers.1.v_proj"]
    for name in names:
        found = compiled("target_modules", expression).fullmatch(name)
        assert (found is None) == (re.fullmatch(expression, name) is None)


CATASTROPHES: dict[str, Callable[[], Any]] = {
    "matching": lambda: compiled("x", r"(?:(.)|(.)|(.))*[!?]").fullmatch("abcdefgh" * 6),
    "compiling": lambda: [compiled("x", f"(?:a|b|){{{i}}}" * 40) for i in range(100, 160)],
    "many": lambda: [compiled("x", f"a{i}+").match("a") for i in range(5000)],
    "wild": lambda: list(matching("rank_pattern", WILD, "a" * 17)),
}
WILD = [f"{i:016b}".replace("0", ".").replace("1", "a") + "b" for i in range(1 << 16)]


@pytest.mark.parametrize("call", CATASTROPHES.values(), ids=CATASTROPHES)
def test_an_end_is_put(call: Callable[[], Any]) -> None:
    gc.disable()  # collections are not charged, and with all that the other tests made take longer
    try:
        start = time.thread_time()
        with pytest.raises(SlowPatternError, match=r"LoraConfig: .*: got .*takes too long"):
            in_time(FILE_SECONDS, 0, call)
        seconds = time.thread_time() - start
    finally:
        gc.enable()
    assert seconds < 0.4


def test_code_has_a_limit_too() -> None:
    model = nn.ModuleDict({"a_name_of_forty_letters_and_more_than_that": nn.Linear(2, 2)})
    config = LoraConfig(r=2, target_modules=r"(?:(\w)|(\w)|(\w))*[!?]")
    with pytest.raises(ValueError, match=r"target_modules: got .*takes too long"):
        get_lora_model(model, config)
    assert type(model["a_name_of_forty_letters_and_more_than_that"]) is nn.Linear


SIZES = {
    "abc": 3, "a{3}": 12, "a{1,2}": 6, "(a{10}){10}": 1100, "a{,3}": 5, "{}": 2, "a{2,}": 10,
    "(?x)a{1 0 0}": 1200, "(?x)a{1#\n0}": 110, "a{b}": 4,
    "a|b": 6, "(a|b){2}": 22,
}  # fmt: skip


@pytest.mark.parametrize("pattern", SIZES)
def test_size_counts_repetitions(pattern: str) -> None:
    assert size(pattern) == SIZES[pattern]


def test_nested_counts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target_modules: got .*at most 8192 characters"):
        LoraConfig(target_modules="((a{99}){99}){99}")


def test_a_profiler_does_not_make_patterns_slow() -> None:
    """A limit that holds by far is not passed because each call is looked at."""
    patterns = [f"model.layers.{i}.mlp" for i in range(200)]
    names = [f"base.{pattern}" for pattern in patterns]

    def look_up() -> list[str]:
        return [one for name in names for one in matching("rank_pattern", patterns, name)]

    def look_on(*_: object) -> None:
        end = time.thread_time() + 5e-6
        while time.thread_time() < end:
            pass

    assert in_time(FILE_SECONDS, len(names), look_up) == patterns
    before = sys.getprofile()
    sys.setprofile(look_on)
    try:
        assert in_time(FILE_SECONDS, len(names), look_up) == patterns
    finally:
        sys.setprofile(before)


def test_no_patterns_take_no_time() -> None:
    assert in_time(1e-9, 0, lambda: list(matching("alpha_pattern", [], "a"))) == []


def test_collections_are_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are of all the memory of a program, and come when they like: here while it compiles."""
    memory = [[] for _ in range(1_000_000)]  # type: ignore[var-annotated]
    start = time.thread_time()
    gc.collect()
    monkeypatch.setattr(patterns, "CODE_SECONDS", (time.thread_time() - start) / 2)
    compile_expression = regex.compile

    def compile_and_collect(text: str) -> Any:
        gc.collect()
        return compile_expression(text)

    monkeypatch.setattr(regex, "compile", compile_and_collect)
    assert patterns.Expression("rank_pattern", "a|b").match("a")
    assert len(memory) == 1_000_000
