"""Models in folders of transformers: loaded, or only their outlines. Nothing is downloaded, no
pickle is read, and no code of the folder is run."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_ext.cli.errors import WrongUse, need

if TYPE_CHECKING:
    import torch
    from torch import nn

CONFIG = "config.json"
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
    with _quiet():
        model, found = _kind(config, folder, task).from_pretrained(
            folder,
            config=config,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    return model, set(found["missing_keys"])


def _config(folder: Path) -> Any:
    if not is_model(folder):
        raise WrongUse(f"{folder} has no {CONFIG}, expected the folder of a model of transformers")
    need("transformers", f"the model in {folder}")
    import transformers

    with _quiet():
        return transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )


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
