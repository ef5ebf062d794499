"""Adapter files: checked reading, durable and atomic writing."""

from lora_ext.io.adapter_file import (
    TensorFile,
    TensorSpec,
    adapter_bytes,
    open_tensors,
    read_adapter_tensors,
    read_header,
)
from lora_ext.io.adapter_folder import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterFolder,
    open_adapter,
    save_adapter,
)
from lora_ext.io.atomic import open_files, recover, save_files
from lora_ext.io.files import inside
from lora_ext.io.whole_folder import new_folder

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "AdapterFolder",
    "TensorFile",
    "TensorSpec",
    "adapter_bytes",
    "inside",
    "new_folder",
    "open_adapter",
    "open_files",
    "open_tensors",
    "read_adapter_tensors",
    "read_header",
    "recover",
    "save_adapter",
    "save_files",
]
