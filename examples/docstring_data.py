"""A text-classification data set that every Python installation carries: which standard-library
module does this docstring come from?

The sources are parsed, never imported, so building the set runs no foreign code and needs no
network. The result depends only on the Python version and the seed.
"""

from __future__ import annotations

import ast
import functools
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Class label -> file or package below the standard library. Only modules that every supported
# Python (3.11 and later) has in pure Python, with enough docstrings for a balanced class.
STDLIB_SOURCES: Mapping[str, str] = {
    "asyncio": "asyncio",
    "decimal": "_pydecimal.py",  # decimal itself is C; this is the same module in Python
    "email": "email",
    "http": "http",
    "importlib": "importlib",
    "logging": "logging",
    "mailbox": "mailbox.py",
    "multiprocessing": "multiprocessing",
    "tarfile": "tarfile.py",
    "unittest": "unittest",
    "urllib": "urllib",
    "xml": "xml",
}

MIN_CHARS = 24  # shorter docstrings ("Close.") carry no information about their module
KEY_CHARS = 48  # see text_key

Example = tuple[str, int]  # (text, class index)


@dataclass(frozen=True)
class DocstringData:
    """A class-balanced data set in which every text_key occurs once, so in one part only."""

    labels: tuple[str, ...]
    train: tuple[Example, ...]
    held_out: tuple[Example, ...]


def text_key(text: str) -> str:
    """Identity of a text for deduplication: the letters and digits it opens with. Case, spaces,
    punctuation and a changed ending (the stdlib copies docstrings between sibling classes) do not
    make two texts different, so near duplicates cannot leak into the held-out part either."""
    return re.sub(r"[\W_]+", "", text.lower())[:KEY_CHARS]


def build_dataset(
    per_class: int = 88, held_out_share: float = 0.25, seed: int = 0
) -> DocstringData:
    """`per_class` docstrings of every module; the last `held_out_share` of each is held out."""
    by_label = _docstrings_by_label()
    labels = tuple(name for name, texts in by_label.items() if len(texts) >= per_class)
    if len(labels) < 2:
        raise ValueError(
            f"only {len(labels)} module(s) have {per_class} docstrings of at least {MIN_CHARS} "
            "characters; ask for fewer per class (is the standard library's source installed?)"
        )
    rng = random.Random(seed)
    n_train = per_class - round(per_class * held_out_share)
    train: list[Example] = []
    held_out: list[Example] = []
    for index, label in enumerate(labels):
        chosen = [(text, index) for text in rng.sample(by_label[label], per_class)]
        train += chosen[:n_train]
        held_out += chosen[n_train:]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return DocstringData(labels, tuple(train), tuple(held_out))


@functools.cache  # parsing all sources takes a second
def _docstrings_by_label() -> dict[str, list[str]]:
    """All usable docstrings of every module. A text that more than one module has is dropped,
    because its label would be ambiguous."""
    found = {label: _docstrings(source) for label, source in STDLIB_SOURCES.items()}
    owners = Counter(text_key(text) for texts in found.values() for text in texts)
    return {
        label: [text for text in texts if owners[text_key(text)] == 1]
        for label, texts in found.items()
    }


def _docstrings(source: str) -> list[str]:
    """Docstrings of all functions and classes in a file or package, module names removed."""
    texts: dict[str, str] = {}  # by key, so that a docstring repeated in a module counts once
    for file in _python_files(Path(sysconfig.get_path("stdlib")) / source):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                text = _without_module_names(ast.get_docstring(node) or "")
                if len(text) >= MIN_CHARS:
                    texts.setdefault(text_key(text), text)
    return list(texts.values())


def _python_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
    else:  # sorted, because the order of a directory differs between file systems
        files = sorted(path.rglob("*.py"))
        # Some installations ship a package's tests and some do not.
        yield from (f for f in files if not {"test", "tests"} & set(f.relative_to(path).parts))


# Every label is removed from every text, also inside identifiers (HTTPResponse -> Response):
# removing only a text's own label would turn the absence of a name into the leak.
_MODULE_NAMES = re.compile("|".join(STDLIB_SOURCES), re.IGNORECASE)


def _without_module_names(text: str) -> str:
    return " ".join(_MODULE_NAMES.sub(" ", text).split())
