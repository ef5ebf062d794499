"""The adapter that a constructor makes, under loralib's attribute names."""

from __future__ import annotations

from lora_ext.nn.lora_layer import DEFAULT, LoraLayer
from lora_ext.nn.settings import AdapterSettings


class DefaultAdapter(LoraLayer):
    """A layer whose constructor makes an adapter, "default", from loralib's arguments."""

    @property
    def _default(self) -> AdapterSettings | None:
        return self.adapters.get(DEFAULT)

    @property
    def r(self) -> int:
        """Rank of the adapter "default"; 0 without one."""
        return self._default.r if self._default else 0

    @property
    def lora_alpha(self) -> float:
        """Of the adapter "default"."""
        return self._default.lora_alpha if self._default else 1

    @property
    def lora_dropout(self) -> float:
        """Of the adapter "default"."""
        return self._default.lora_dropout if self._default else 0.0

    @property
    def scaling(self) -> float:
        """What multiplies the product of the adapter "default" now; see `set_scale`."""
        return self._scaling.get(DEFAULT, 0.0)

    def adapters_repr(self) -> str:
        """The adapters' settings, for `extra_repr`; begins with a comma, if there is any."""
        text = ""
        for name, settings in self.adapters.items():
            text += f", {'' if name == DEFAULT else name + ': '}r={settings.r}"
            text += f", lora_alpha={settings.lora_alpha}"
            if settings.lora_dropout > 0.0:
                text += f", lora_dropout={settings.lora_dropout}"
            if settings.use_rslora:
                text += ", use_rslora=True"
        return text
