"""The regular expressions of a LoraConfig: what surrounds them when they meet a module's name."""

from __future__ import annotations

import re
from functools import lru_cache

# PEFT's. `%s` is the pattern from the config; it is not escaped there either, so a dot in a plain
# name stands for any character.
_AROUND = {
    "rank_pattern": r"(.*\.)?(%s)$",
    "alpha_pattern": r"(.*\.)?(%s)$",
    "modules_to_save": r"(^|.*\.)%s($|\..*)",
    "layers_pattern": r"(?:^|.*?\.)%s\.(?P<index>\d+)\.",
}

# Names and their parts, perhaps anchored: nothing in them can fail to compile.
_PLAIN = re.compile(r"\^?[\w.-]*\$?")


def is_plain(pattern: str) -> bool:
    """Whether the pattern is a name rather than an expression."""
    return _PLAIN.fullmatch(pattern) is not None


@lru_cache(maxsize=4096)
def compiled(field: str, pattern: str) -> re.Pattern[str]:
    """The expression that is matched from the start of a module's name for `pattern` in `field`.

    Kept, because a rank_pattern may have a key per layer of a large model and meets every name:
    the cache of `re` is too small for that.
    """
    return re.compile(_AROUND.get(field, "%s") % pattern)
