"""A LoraConfig as a dict and as PEFT's adapter_config.json."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, ClassVar, Self

from lora_ext._not_built import FIELDS
from lora_ext._patterns import FILE_SECONDS, in_time
from lora_ext.adapters.bdlora import BdLoraConfig
from lora_ext.adapters.config_checks import ATOMS, is_off
from lora_ext.arguments import as_path, did_you_mean, former_names, listed, short, warn
from lora_ext.io.adapter_folder import CONFIG_NAME, read_config_file
from lora_ext.io.atomic import save_files
from lora_ext.io.files import json_text
from lora_ext.io.hub import downloaded, is_hub_id, options_of

PEFT_VERSION = "0.21.2"  # whose fields and files these are
UNSAVED = ("runtime_config", "unknown_fields", "absent_fields", "combined")  # not of a file
_MAX_UNKNOWN = 1000  # fields of other versions in a file


class ConfigFiles:
    """Reading and writing: part of `LoraConfig`."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    use_bdlora: BdLoraConfig | None
    auto_mapping: dict[str, Any] | None
    unknown_fields: dict[str, Any]
    absent_fields: frozenset[str]

    def to_dict(self) -> dict[str, Any]:
        """All fields and values that belong into a file, as PEFT's `to_dict`; a deep copy."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in UNSAVED}
        for name in ("use_bdlora", "eva_config", "corda_config", "lora_ga_config"):
            own[name] = asdict(own[name]) if own[name] else None
        return copied(own | self.unknown_fields)  # type: ignore[no-any-return]

    def to_file(self) -> dict[str, Any]:
        """What adapter_config.json is to hold: fields that the file this was read from did not
        have are left out, unless they changed."""
        values = self.to_dict()
        if self.absent_fields:
            default = type(self)().to_dict()
            for name in self.absent_fields & default.keys():
                if values[name] == default[name]:
                    del values[name]
        return values

    def to_json(self) -> str:
        """The text of adapter_config.json.

        Raises:
            TypeError, ValueError: auto_mapping or unknown_fields hold what JSON cannot.
        """
        return json_text(self.to_file())

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Writes adapter_config.json into the folder, which is made if there is none. In a model's
        `save_pretrained` the file's `inference_mode` is true; here it is the config's own.

        Args:
            options: `auto_mapping_dict`: what the file's `auto_mapping` is to be. Others are left
                alone, as in PEFT.

        Raises:
            OSError: the folder or file cannot be written.
            TypeError, ValueError: see `to_json`; nothing is written then.
        """
        values = self.to_file()
        if options.get("auto_mapping_dict") is not None:
            values["auto_mapping"] = options["auto_mapping_dict"]
        save_files(save_directory, {CONFIG_NAME: json_text(values).encode()})

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Self:
        """A config from fields, of those that there are: as `from_dict`.

        Raises:
            TypeError, ValueError, NotBuiltError: see the class; NotBuiltError for another
                `peft_type`, too.
        """
        config = cls.from_dict(kwargs)
        config.absent_fields = frozenset()  # of no file that is to be written back as it was
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike[str], **_: Any) -> dict[str, Any]:
        """What a config's file holds, read as `from_pretrained` does; not checked field by field.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged.
        """
        values = read_config_file(
            as_path(path_json_file, "LoraConfig.from_json_file", "path_json_file")
        )
        if values.pop("runtime_config", None) is not None:
            warn(
                f"{path_json_file}: runtime_config: is for a program's run, not of a file; ignored"
            )
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """A config from the values of a file or of PEFT's `to_dict`. Nothing is shared with it.

        Warns of fields that this version does not know and that are not off; they are kept.

        Raises:
            TypeError, ValueError, NotBuiltError: see the class.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"LoraConfig.from_dict: values: got {type(values)}, expected a mapping")
        return in_time(FILE_SECONDS, 0, lambda: cls._from_values(copied(dict(values))))

    @classmethod
    @former_names("LoraConfig.from_pretrained", folder_or_file="pretrained_model_name_or_path")
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **options: Any,
    ) -> Self:
        """A config from a folder's adapter_config.json, from the file itself, or from the hub.

        The file may come from anyone: it is read up to 1 MiB, as strict JSON, and nothing is
        allocated or executed for its values. Its regular expressions are compiled, and later
        matched, in bounded time.

        Args:
            subfolder: of the folder or the hub's repository.
            options: values of fields that the file does not have, and those of
                `huggingface_hub.hf_hub_download`.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError, NotBuiltError: see the class; the message starts with the path.
        """
        where = "LoraConfig.from_pretrained"
        path = as_path(pretrained_model_name_or_path, where, "pretrained_model_name_or_path")
        names = {one.name for one in fields(cls)} - set(UNSAVED[1:])
        own = {name: options.pop(name) for name in options.keys() & names - {"revision"}}
        options = options_of(where, options | {"subfolder": subfolder})
        if not path.exists() and is_hub_id(str(path)):
            (path,) = downloaded(str(path), (CONFIG_NAME,), options)
        elif path.is_dir():
            path = path / (subfolder or "") / CONFIG_NAME
        values = read_config_file(path)
        if "peft_type" not in values:
            raise ValueError(f"{path}: LoraConfig: peft_type: is missing, expected 'LORA'")
        try:
            return in_time(FILE_SECONDS, 0, lambda: cls._from_values(own | values))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise type(error)(f"{path}: {error}") from None

    @classmethod
    def _from_values(cls, values: dict[str, Any]) -> Self:
        known = {one.name for one in fields(cls)} - set(UNSAVED[1:])
        unknown = {name: values.pop(name) for name in values.keys() - known}
        if len(unknown) > _MAX_UNKNOWN:
            raise ValueError(
                f"LoraConfig: got {len(unknown)} fields that this version does not know, expected "
                f"at most {_MAX_UNKNOWN}"
            )
        absent = frozenset(known - values.keys())
        make: Any = cls
        config: Self = make(**values, unknown_fields=unknown, absent_fields=absent)
        kept = {name: getattr(config, name) for name in FIELDS.keys() & known}
        for name, value in {**unknown, **kept, "auto_mapping": config.auto_mapping}.items():
            _check_savable(name, value)
        without_effect = sorted(
            str(name) for name in unknown if name not in FIELDS and not is_off(unknown[name])
        )
        if without_effect:
            hints = "".join(did_you_mean(name, known) for name in without_effect[:20])
            warn(
                f"LoraConfig: {listed(without_effect)}: unknown to this version; kept, without "
                f"effect; {hints}".rstrip("; ")
            )
        return config


def _check_savable(name: str, value: Any) -> None:
    """ValueError for what could be kept, but not written back: a file may say 1e999."""
    try:
        json.dumps({name: value}, allow_nan=False, default=sorted)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"LoraConfig: {str(name)[:100]}: got {short(value)}, expected what JSON can "
            f"hold ({error})"
        ) from None


def copied(value: Any) -> Any:
    """A deep copy; of ten thousands of names and numbers in a tenth of deepcopy's time."""
    if type(value) is dict:
        return {k: v if type(v) in ATOMS else copied(v) for k, v in value.items()}
    if type(value) is list:
        return [v if type(v) in ATOMS else copied(v) for v in value]
    return copy.deepcopy(value)
