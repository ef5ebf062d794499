"""`lora-ext info`: versions, and what this build can run here."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import click

from lora_ext.cli.answers import Answer, size, table, telling

_PACKAGES = ("torch", "safetensors", "transformers", "peft", "accelerate", "triton")
_CPU = {
    "default": "scalar and SSE kernels",
    "avx2": "AVX2 kernels",
    "avx512": "AVX-512 kernels",
    "avx512_bf16": "AVX-512 kernels with bf16 dot products",
    "amx_bf16": "AVX-512 kernels, with AMX's products of bf16",
}


@click.command(short_help="Tell versions, the build, CPU and GPU, and what runs on them.")
@telling
def info() -> Answer:
    """Tell versions, what the extension was built for, the CPU's and GPU's abilities, and what
    this build runs on them.

    JSON: versions, platform, folder, build, cpu, gpus, runs.
    """
    import torch

    import lora_ext

    build = lora_ext.build_info()
    cpu = {
        "model": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "capability": build["cpu_capability"],
    }
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    data = {
        "versions": {"lora_ext": lora_ext.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in _PACKAGES},
        "platform": " ".join((platform.system(), platform.machine(), *platform.libc_ver())),
        "folder": str(lora_ext.__path__[0]),
        "build": {name: _json_value(value) for name, value in build.items()},
        "cpu": cpu,
        "gpus": gpus,
        "runs": [_runs_on_cpu(build), *_runs_on_gpus(build, gpus)],
    }
    return Answer(data, _text(data))


def _text(data: dict[str, Any]) -> str:
    versions = [(name, version or "-") for name, version in data["versions"].items()]
    cpu = data["cpu"]
    machine = [
        ("platform", data["platform"]),
        ("folder", data["folder"]),
        ("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads"),
        *(("gpu", f"{g['name']}, sm_{g['capability']}, {size(g['memory'])}") for g in data["gpus"]),
    ]
    if not data["gpus"]:
        machine.append(("gpu", "none that torch can use"))
    build = [(name, _build_text(value)) for name, value in data["build"].items()]
    parts = (("versions", versions), ("machine", machine), ("build", build))
    blocks = [f"{title}\n{_indented(table(rows))}" for title, rows in parts]
    return "\n".join([*blocks, "runs", *(f"  {line}" for line in data["runs"])])


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _build_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _json_value(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_json_value(one) for one in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _runs_on_cpu(build: dict[str, Any]) -> str:
    return f"cpu: {_CPU.get(build['cpu_capability'], build['cpu_capability'])}, fused layers"


def _runs_on_gpus(build: dict[str, Any], gpus: list[dict[str, Any]]) -> list[str]:
    if build["cuda"] is None:
        cure = "; `lora-ext doctor` says what to install" if gpus else ""
        return [f"gpu: no kernels, as this is a CPU build{cure}"]
    paths = f"LORA_EXT_CUDA_PATH={build['cuda_path']}"
    return [
        f"gpu {gpu['name']}: "
        + ("CUDA kernels" if gpu["capability"] >= 80 else "cuBLAS products, as it is before sm_80")
        + f" ({paths}); `lora-ext explain` tells for each layer"
        for gpu in gpus
    ]


def _gpu(index: int) -> dict[str, Any]:
    import torch

    facts = torch.cuda.get_device_properties(index)
    capability = 10 * facts.major + facts.minor
    return {"name": facts.name, "capability": capability, "memory": facts.total_memory}


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    if package == "torch":
        import torch

        return torch.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
