"""What nvcc made of the kernels: instructions of a step, of the end of a tile, of dropout.

The kernels are compiled to cubins, which nvdisasm prints. Counts are of one warp. A loop counts
once; of branches the way is taken that multiplies, or stores, the most, with the fewest other
instructions, so that neither unaligned operands nor a bias are in it.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from predictor.flow import Block, Flow, Loop

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "kernels"
# What is compiled, and for which target: the kernels with loops, for one type of the base, since
# they are the same for the other.
UNITS = {"product_sm90": "90a", "low_rank_sm90": "90a", "product_sm80": "80", "low_rank_sm80": "80"}
UNITS["lora_linear_run"] = "90a"  # few rows
UNITS["lora_linear_grouped_run"] = "80"
SMALL = ("lora_linear_", "grouped_finish", "grouped_pack", "grouped_reduce")

TENSOR = ("HGMMA", "HMMA", "MMA", "OMMA", "QMMA")
STORES = ("STG", "STSM", "UTMASTG", "UBLKCP")
COPIES = ("LDGSTS", "UTMALDG", "LDG")
# Which units of a multiprocessor execute an instruction, where that may limit it. From "Throughput
# of Native Arithmetic Instructions" in CUDA's programming guide: integers and selects 64 lanes in a
# cycle, that is two cycles of a scheduler for a warp.
ALU = ("LOP3", "IADD3", "VIADD", "ISETP", "SEL", "FSEL", "SHF", "LEA", "PLOP3", "PRMT", "FSETP")
ALU += ("FMNMX", "IMNMX", "VIMNMX", "VIADDMNMX", "F2FP", "MOV", "FSWZADD")
MEMORY = ("SHFL", "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDGSTS", "LDL", "STL", "ATOM", "RED")
# Philox's multipliers, as signed numbers
PHILOX = ("-0x2daee0ad", "-0x326172a9", "0xd2511f53", "0xcd9e8d57")


class NoTool(RuntimeError):
    """Says which program is missing and how to get it."""


def find_nvcc() -> str:
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if found is None:
        raise NoTool("no nvcc: install CUDA's toolkit, or pip install nvidia-cuda-nvcc")
    return found


def find_nvdisasm() -> str:
    """Of the PATH, of CUDA's toolkit, or of the package nvidia-cuda-nvdisasm (5 MB)."""
    found = shutil.which("nvdisasm") or shutil.which("nvdisasm", path="/usr/local/cuda/bin")
    if found is None:
        try:
            files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        found = next((str(one.locate()) for one in files if one.name == "nvdisasm"), None)
    if found is None:
        raise NoTool("no nvdisasm: pip install nvidia-cuda-nvdisasm (5 MB)")
    return found


def version(tool: str) -> str:
    """As it tells it: "13.0.88"."""
    told = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V(\d[\d.]*)", told)[-1]


def sources_hash() -> str:
    """Of all sources that the kernels are made of."""
    digest = hashlib.sha256()
    for path in sorted([*KERNELS.rglob("*"), *(ROOT / "csrc" / "common").glob("*.h")]):
        if path.is_file():
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def short_name(name: str) -> str:
    """Of a kernel, from what c++filt and the emulator tell: without namespaces and arguments."""
    name = name.removeprefix("void ")
    return re.sub(r"\blora_ext::(\w+::)*", "", name[: name.rindex("(")]).replace("> >", ">>")


@dataclass(frozen=True)
class Kernel:
    """One kernel of a cubin, with what ptxas said of it."""

    name: str  # short
    flow: Flow
    registers: int
    spilled: int  # bytes of stores and loads
    stack: int  # bytes


def compile_unit(unit: str, folder: Path) -> list[Kernel]:
    """Compiles csrc/kernels/<unit>.cu and takes it apart."""
    return compile_source(KERNELS / f"{unit}.cu", UNITS[unit], folder)


def compile_source(source: Path, target: str, folder: Path) -> list[Kernel]:
    nvcc, nvdisasm = find_nvcc(), find_nvdisasm()
    cubin = folder / f"{source.stem}.cubin"
    command = [nvcc, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "-DLORA_EXT_SM90"]
    command += ["-DLORA_EXT_BASE=Bf16", "-Xptxas", "-v", f"-arch=sm_{target}", "-cubin"]
    built = subprocess.run([*command, "-o", cubin, source], capture_output=True, text=True)
    if built.returncode != 0:
        raise RuntimeError(f"nvcc could not compile {source.name}:\n{built.stderr[-4000:]}")
    printed = subprocess.run([nvdisasm, "-c", cubin], capture_output=True, text=True)
    if printed.returncode != 0:
        raise RuntimeError(f"nvdisasm could not read {cubin.name}:\n{printed.stderr[-4000:]}")
    used = dict(_usage(built.stderr))
    parts = re.findall(r"^\.text\.(\S+):\n(.*?)(?=^//-----|\Z)", printed.stdout, re.M | re.S)
    names = _demangled([symbol for symbol, _ in parts])
    return [
        Kernel(short_name(name), Flow(text), *used[symbol])
        for (symbol, text), name in zip(parts, names, strict=True)
    ]


def _usage(log: str) -> list[tuple[str, tuple[int, int, int]]]:
    """Of each kernel's symbol: registers, bytes spilled, bytes of stack."""
    found = []
    for part in log.split("Compiling entry function ")[1:]:
        symbol, stack, stores, loads, registers = re.search(
            r"'(\S+)' for .*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
            r"loads.*?Used (\d+) registers",
            part,
            re.S,
        ).groups()  # type: ignore[union-attr]
        found.append((symbol, (int(registers), int(stores) + int(loads), int(stack))))
    return found


def _demangled(symbols: list[str]) -> list[str]:
    filt = shutil.which("c++filt")
    if filt is None:
        raise NoTool("no c++filt: it comes with the compiler, in binutils")
    told = subprocess.run([filt], input="\n".join(symbols), capture_output=True, text=True)
    return told.stdout.splitlines()


def count_path(flow: Flow, path: list[int]) -> dict[str, int]:
    """Instructions of these blocks, and how many of them go to which unit."""
    ones = [one for at in path for one in flow.blocks[at].instructions]
    wide = sum(one.opcode.startswith(("IMAD.WIDE", "IMAD.HI")) for one in ones)
    return {
        "instructions": len(ones),
        "tensor": sum(one.name in TENSOR for one in ones),
        "alu": sum(one.name in ALU for one in ones),
        "imad": sum(one.name == "IMAD" for one in ones) - wide,
        "wide": wide,
        "memory": sum(one.name in MEMORY for one in ones),
    }


def _tensor(block: Block) -> int:
    return block.count(*TENSOR)


def _philox(block: Block) -> int:
    return sum(
        one.name == "IMAD" and any(number in one.operands for number in PHILOX)
        for one in block.instructions
    )


def _reads_bits(block: Block) -> bool:
    """Makes predicates of the bits of a register: of dropout's decisions, which are kept so."""
    return block.count("R2P") > 1 and not _philox(block)


def zero_adds(block: Block) -> int:
    """Additions of a uniform register that was set to zero: nvcc 13.0 makes one of the upper half
    of each product of 64 bits that is written as one of two 64-bit factors."""
    zero: set[str] = set()
    found = 0
    for one in block.instructions:
        operands = [text.strip().removesuffix(".reuse") for text in one.operands.split(",")]
        if one.name in ("VIADD", "IADD3"):
            added = {text for text in operands[1:] if text != "RZ"}
            found += len(added) == 2 and bool(added & zero)
        if operands[0].startswith("UR"):
            is_zero = one.opcode == "UMOV" and operands[1] in ("URZ", "0x0")
            zero = zero | {operands[0]} if is_zero else zero - {operands[0]}
    return found


def _waits(flow: Flow, loop: Loop) -> bool:
    """For what is to be multiplied: with wgmma on an mbarrier."""
    return any(flow.blocks[at].count("SYNCS") for at in loop.blocks)


def _step_loop(flow: Flow) -> Loop | None:
    """The loop around the most products: of several the smallest. With wgmma it has to wait for
    operands; where threads copy for the ring that they multiply from, it is that which copies."""

    def products(loop: Loop) -> int:
        path = flow.best_path([loop.header], loop.blocks, _tensor)
        return sum(_tensor(flow.blocks[at]) for at in path)

    def copies(loop: Loop) -> bool:
        return any(flow.blocks[at].count("LDGSTS") for at in loop.blocks)

    asynchronous = any(block.count("HGMMA") for block in flow.blocks)
    loops = [loop for loop in flow.loops if products(loop) > 0]
    if asynchronous:
        loops = [loop for loop in loops if _waits(flow, loop)]
    else:
        loops = [loop for loop in loops if copies(loop)] or loops
    return max(loops, key=lambda loop: (products(loop), -len(loop.blocks)), default=None)


def _end_of_tile(flow: Flow, step: Loop) -> list[int]:
    """From the products of a tile to the end of its stores. A step stores nothing but decisions of
    dropout."""
    loops = [
        loop
        for loop in flow.loops
        if any(_tensor(flow.blocks[at]) for at in loop.blocks)
        and not any(flow.blocks[at].count(*STORES) for at in loop.blocks - step.blocks)
    ]
    if not loops:
        return []
    body = max(loops, key=lambda loop: len(loop.blocks)).blocks
    exits = {after for at in body for after in flow.blocks[at].next} - body

    def worth(block: Block) -> float:
        dropping = _philox(block) or _reads_bits(block)
        return -1e6 if dropping or _tensor(block) else block.count(*STORES)

    return flow.best_path(exits, set(flow.order) - body, worth)


def count(kernel: Kernel) -> dict[str, Any]:
    """All counts of a kernel, as they stand in sass_counts.json."""
    flow = kernel.flow
    every = [one for block in flow.blocks for one in block.instructions]
    counts: dict[str, Any] = {
        "registers": kernel.registers,
        "spilled_bytes": kernel.spilled,
        "stack_bytes": kernel.stack,
        "local_memory": sum(one.name in ("LDL", "STL") for one in every),
        "instructions": len(every),
    }

    def worth(block: Block) -> float:
        return (
            -1e6
            if _philox(block) or _reads_bits(block)
            else 1000 * _tensor(block) + block.count(*COPIES[:2])
        )

    if step := _step_loop(flow):
        counts["step"] = count_path(flow, flow.best_path([step.header], step.blocks, worth))
        # The loop over a matrix and its remainder, which is once in the step
        inner = [loop for loop in flow.loops if loop.blocks < step.blocks]
        paths = [flow.best_path([loop.header], loop.blocks, worth) for loop in inner]
        terms = [count_path(flow, path) for path in paths]
        if most := max((term["tensor"] for term in terms), default=0):
            counts["term"] = next(term for term in terms if term["tensor"] == most)
        counts["end_of_tile"] = count_path(flow, _end_of_tile(flow, step))
    dropping = [at for at, block in enumerate(flow.blocks) if _philox(block)]
    if dropping:  # code that is there several times counts once
        most = max(dropping, key=lambda at: len(flow.blocks[at].instructions))
        zeros = {"zero_adds": zero_adds(flow.blocks[most])}
        counts["dropout"] = count_path(flow, [most]) | zeros
    if bits := [at for at, block in enumerate(flow.blocks) if _reads_bits(block)]:
        most = max(bits, key=lambda at: len(flow.blocks[at].instructions))
        counts["bits"] = count_path(flow, [most])
    return counts


def count_all() -> dict[str, Any]:
    """Compiles all units, some twenty seconds of one core."""
    kernels: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for unit in UNITS:
            for kernel in compile_unit(unit, Path(folder)):
                if kernel.name.startswith(SMALL):
                    continue  # small ones, whose code is not what they wait for
                kernels[kernel.name] = {"target": f"sm_{UNITS[unit]}"} | count(kernel)
    return {
        "nvcc": version(find_nvcc()),
        "nvdisasm": version(find_nvdisasm()),
        "sources": sources_hash(),
        "kernels": dict(sorted(kernels.items())),
    }
