"""Adapters on the hub of Hugging Face: found in its cache or fetched into it, and uploaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_ext.arguments import as_path, check_names, refuse, warn
from lora_ext.errors import AdapterFileError, NotBuiltError
from lora_ext.io.adapter_folder import CONFIG_NAME, WEIGHTS_NAME

# What huggingface_hub takes to find a file.
OF_THE_HUB = (
    *(
        "subfolder",
        "revision",
        "cache_dir",
        "token",
        "local_files_only",
        "force_download",
        "proxies",
    ),
    *("repo_type", "endpoint", "etag_timeout", "library_name", "library_version", "user_agent"),
    *("headers", "local_dir", "use_auth_token"),
)
# What PEFT takes beside, and needs for models that are dispatched or read in another way.
_WITHOUT_EFFECT = (
    *("torch_device", "low_cpu_mem_usage", "device_map", "max_memory", "offload_folder"),
    *("offload_dir", "offload_index", "use_safetensors", "torch_dtype", "dtype"),
)
OPTIONS = (
    *("ephemeral_gpu_offload", "ignore_mismatched_sizes"),
    *OF_THE_HUB,
    *_WITHOUT_EFFECT,
)


def adapter_folder(
    where: str, model_id: str | os.PathLike[str], options: Mapping[str, Any]
) -> Path:
    """The folder of an adapter's files.

    Args:
        model_id: the folder, or an id on the hub.
        options: `subfolder`, those of `huggingface_hub.hf_hub_download`, and what PEFT takes.

    Raises:
        TypeError: an option that there is not.
        NotBuiltError: one that is not built.
        AdapterFileError: the hub has no such adapter, or it, and its cache, cannot be reached.
    """
    options = options_of(where, options)
    if options.get("ignore_mismatched_sizes"):
        raise NotBuiltError(
            f"{where}: ignore_mismatched_sizes: got True, which is not built here; leave it out "
            "(from_pretrained, load_adapter and set_peft_model_state_dict have it)"
        )
    if options.get("ephemeral_gpu_offload"):
        warn(
            f"{where}: ephemeral_gpu_offload: got True, which has no effect: nothing is moved to a "
            "GPU to be computed"
        )
    path = as_path(model_id, where, "model_id")
    if path.is_file():  # its name can be an id, too: the hub would be asked for it
        raise AdapterFileError(
            f"{where}: model_id: {path} is a file, expected the folder of an adapter: give the one "
            "it is in, or make one of another format's file (lora_ext.io.convert.convert)"
        )
    subfolder = options.get("subfolder")
    if not path.is_dir() and is_hub_id(str(model_id)):
        found = downloaded(str(model_id), (CONFIG_NAME, WEIGHTS_NAME), options)
        if found[0].parent != found[1].parent:
            raise AdapterFileError(f"{model_id}: changed on the hub meanwhile; try again")
        path = found[0].parent
    elif subfolder:
        path = path / subfolder
    return path


def options_of(where: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, checked by name: TypeError for one that there is not, or another `subfolder`."""
    check_names(where, options, OPTIONS)
    subfolder = options.get("subfolder")
    if subfolder is not None and (
        not isinstance(subfolder, str) or ".." in Path(subfolder).parts or Path(subfolder).anchor
    ):
        refuse(where, "subfolder", subfolder, "the name of a folder inside of the adapter's")
    return dict(options)


def is_hub_id(text: str) -> bool:
    """Whether it can be an id on the hub, `name` or `owner/name`, and huggingface_hub is there."""
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id
    except ImportError:
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def downloaded(repo_id: str, names: Sequence[str], options: Mapping[str, Any]) -> list[Path]:
    """Files of a repository on the hub, in its cache.

    Args:
        options: those of `huggingface_hub.hf_hub_download`; others are left alone.

    Raises:
        AdapterFileError: the hub has no such file, or it, and its cache, cannot be reached.
    """
    from huggingface_hub import hf_hub_download

    given = {name: options[name] for name in OF_THE_HUB if options.get(name) is not None}
    given["token"] = given.pop("use_auth_token", given.get("token"))
    found = []
    for name in names:
        try:
            found.append(Path(hf_hub_download(repo_id, name, **given)))
        except (OSError, ValueError) as error:
            raise AdapterFileError(
                f"{repo_id}: is no folder here, and Can't find '{name}' at '{repo_id}' on the hub "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
    return found


def push_folder(folder: str, repo_id: str, *, private: bool | None, **options: Any) -> Any:
    """Uploads a folder's files; the repository is made if there is none."""
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    return api.upload_folder(repo_id=repo_id, folder_path=folder, **options)
