"""Adapter files: checked reading, durable and atomic writing."""

from lora_ext.io.adapter_file import TensorSpec, adapter_bytes, read_adapter_tensors, read_header
from lora_ext.io.adapter_folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterFolder,
    open_adapter,
    save_adapter,
)
from lora_ext.io.atomic import open_files, recover, save_files
from lora_ext.io.files import inside

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "AdapterFolder",
    "TensorSpec",
    "adapter_bytes",
    "inside",
    "open_adapter",
    "open_files",
    "read_adapter_tensors",
    "read_header",
    "recover",
    "save_adapter",
    "save_files",
]
