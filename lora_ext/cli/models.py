"""Models in folders of transformers: loaded, or only their outlines. Nothing is downloaded, no
pickle is read, and no code of the folder is run."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ext.cli.errors import WrongUse, need

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lora_ext.adapters import LoraModel

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
# Of a PEFT task: an adapter for it has this head, whatever the base's files are of.
_HEADS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


def is_model(folder: Path) -> bool:
    """Whether it is a folder of transformers."""
    return (folder / CONFIG).is_file()


def outline(
    folder: Path,
    task: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> nn.Module:
    """The folder's model without its values. Its tensors are as large as the model's, but the
    system gives no memory on the CPU for what is never written.

    Args:
        task: a PEFT task, which chooses the head.
        dtype: that of the parameters; the config's if None.
    """
    import torch

    config = _config(folder)
    with _quiet(), torch.device("meta"):
        model = _kind(config, folder, task)(config)
    wanted = dtype or getattr(config, "dtype", None)
    if isinstance(wanted, torch.dtype) and wanted.is_floating_point:
        model = model.to(wanted)
    model = model.to_empty(device=device)
    model.tie_weights()  # to_empty gave each of them memory of its own
    model.eval()
    checked: nn.Module = model
    return checked


def load(folder: Path, task: str | None = None) -> tuple[nn.Module, set[str]]:
    """The folder's model, in the dtype of its files, and the names of parameters that the files
    do not have."""
    if (folder / "adapter_config.json").exists():
        raise WrongUse(f"{folder} is an adapter, expected the folder of a model; swap the two?")
    config = _config(folder)
    weight_files(folder)
    model, found = _from_files(config, folder, task, dtype="auto")
    wrong = sorted(found["mismatched_keys"], key=str)
    if wrong:
        name, in_file, expected = wrong[0]
        raise ValueError(
            f"{folder}: '{name}' has shape {list(in_file)} in its files and {list(expected)} by "
            f"its {CONFIG}: they are of different models"
        )
    return model, set(found["missing_keys"])


def names_missing(folder: Path, task: str | None = None) -> set[str] | None:
    """The names of parameters that the folder's files do not have, without their values; None
    where there are no files, or transformers cannot tell (for which it wants accelerate).

    Raises:
        ValueError: a file is damaged, or there is none of a name in the index.
    """
    if not weight_files(folder) or importlib.util.find_spec("accelerate") is None:
        return None
    try:
        _, found = _from_files(_config(folder), folder, task, device_map="meta")
    except Exception:  # of a base in a quantised format, say, which takes another package
        return None
    return set(found["missing_keys"])


def not_in_adapter(missing: Collection[str], lora: LoraModel) -> list[str]:
    """Those of the names that the adapter has no values for either."""
    own = tuple(f"{name}." for name, _ in lora.saved_modules())
    return [name for name in missing if not name.startswith(own)]


def say_missing(
    folder: Path, kind: str, lost: Collection[str], every: Collection[str], missing: Collection[str]
) -> str:
    """What it means that neither base nor adapter has some parameters: the files are incomplete,
    or the model's class has a part that the class of the files has not.

    Args:
        kind: the name of the model's class.
        lost: the names of the parameters.
        every: those of all parameters of the model.
        missing: those that the base's files do not have.
    """
    first = min(lost)
    says = f"{folder}: has no values for '{first}' ({len(lost)} such in all)"
    parts = first.split(".")
    wrote = getattr(_config(folder), "architectures", None) or []
    for count in range(1, len(parts) if kind not in wrote else 0):
        module = ".".join(parts[:count]) + "."
        if all(name in missing for name in every if name.startswith(module)):
            return (
                f"{says}, and neither has the adapter: transformers starts them at random each "
                f"time, so what the adapter learned beside them is lost; train with "
                f"modules_to_save=['{parts[count - 1]}'], so that they are saved with the adapter"
            )
    return f"{says}; the model's files are incomplete"


def _from_files(
    config: Any, folder: Path, task: str | None, **options: Any
) -> tuple[nn.Module, dict[str, Any]]:
    with _quiet():
        model, found = _kind(config, folder, task).from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told by the caller, better
            **options,
        )
    return model, found


def weight_files(folder: Path) -> list[Path]:
    """The folder's files of weights, each of which is whole; transformers would not say which is
    not, and after reading others."""
    from safetensors import SafetensorError, safe_open

    from lora_ext.io import inside

    index, paths = folder / INDEX, [folder / WEIGHTS]
    if not paths[0].is_file():
        paths = []
        if index.is_file():
            try:
                names = set(json.loads(index.read_bytes())["weight_map"].values())
                for name in names:
                    inside(folder, name)
                paths = [folder / name for name in sorted(names)]
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(
                    f"{index}: is no index of weights ({error}); the file is damaged"
                ) from None
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path}: is not there, which {INDEX} names; files are missing")
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(
                f"{path}: {error}; the file is damaged, or not all of it was copied"
            ) from None
    return paths


def _config(folder: Path) -> Any:
    if not is_model(folder):
        raise WrongUse(f"{folder} has no {CONFIG}, expected the folder of a model of transformers")
    need("transformers", f"the model in {folder}")
    import transformers

    try:
        with _quiet():
            return transformers.AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except ValueError as error:
        if "model_type" in (folder / CONFIG).read_text(errors="replace"):
            raise
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        raise WrongUse(
            f"{folder / CONFIG}: says no model_type, expected the folder of a model of transformers"
            + (f"; `merge` takes {files[0]} by itself, by the names in it" if files else "")
        ) from error


def _kind(config: Any, folder: Path, task: str | None) -> Any:
    """The class of the model: that of the task's head, or the one that wrote the files."""
    import transformers

    names = getattr(config, "architectures", None) or []
    own = next((kind for name in names if (kind := getattr(transformers, str(name), None))), None)
    head = getattr(transformers, _HEADS.get(task or "", ""), None)
    if head is not None and type(config) in head._model_mapping:
        chosen = head._model_mapping[type(config)]
        kinds = chosen if isinstance(chosen, tuple) else (chosen,)
        return own if own in kinds else kinds[0]
    if own is None:
        mapping = transformers.AutoModel._model_mapping
        if type(config) not in mapping:
            raise WrongUse(
                f"{folder}: its architecture {names} is none of this transformers; install a "
                "newer one (code of a model's folder is not run)"
            )
        own = mapping[type(config)]
    return own


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and notes of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
