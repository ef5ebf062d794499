"""What a call launches: recorded from the real launchers, by the emulator of the tests."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))

from emulated import SOURCE, EmulatedKernels, RecordedLaunch  # noqa: E402


@dataclass(frozen=True)
class Call:
    """A layer's call, bf16 or fp16: y [M, N] of x [M, K]."""

    M: int
    N: int
    K: int
    r: int
    fp32_adapters: bool = False
    dropout_p: float = 0.0
    fp16: bool = False

    @property
    def types(self) -> str:
        """As tests/simt names them."""
        return ("fp16" if self.fp16 else "bf16") + ("-fp32" if self.fp32_adapters else "")


@dataclass(frozen=True)
class Recorded:
    paths: tuple[str, str]  # of forward and backward
    reasons: tuple[str, str]
    forward: list[RecordedLaunch]
    backward: list[RecordedLaunch]

    @property
    def path(self) -> str:
        """As `explain` tells it."""
        forward, backward = self.paths
        return forward if forward == backward else f"{forward}, backward {backward}"

    @property
    def reason(self) -> str:
        forward, backward = self.reasons
        same = self.paths[0] == self.paths[1]
        return forward if same else f"{forward}; in backward {backward}"


@cache
def launchers() -> EmulatedKernels:
    """Compiled once for these sources, some ten seconds, into build/predict."""
    digest = hashlib.sha256()
    for folder in (ROOT / "csrc", SOURCE.parent):
        for path in sorted(folder.rglob("*.h")):
            digest.update(path.read_bytes())
    digest.update(SOURCE.read_bytes())
    folder = ROOT / "build" / "predict" / digest.hexdigest()[:16]
    library = folder / "liblora_linear.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        library = EmulatedKernels.compile(folder, "-O0")
    return EmulatedKernels.load(library)


@cache
def record(call: Call, capability: int, multiprocessors: int, wish: str) -> Recorded:
    """In training: h is kept for backward."""
    kernels = launchers()
    kernels.gpu(capability, multiprocessors)
    kernels.wish(wish)
    forward, backward = kernels.dry_run(call.M, call.N, call.K, call.r, call.types, call.dropout_p)
    return Recorded(kernels.dry_paths, kernels.dry_reasons, forward, backward)
