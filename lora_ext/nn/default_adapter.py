"""The settings of the adapter "default" under loralib's names."""

from __future__ import annotations

from lora_ext.nn.settings import AdapterSettings

DEFAULT = "default"


class DefaultAdapter:
    """What a layer whose constructor made one adapter, "default", shows of it."""

    adapters: dict[str, AdapterSettings]
    _scaling: dict[str, float]

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
        """What `extra_repr` adds to that of the base."""
        text = ""
        for name, settings in self.adapters.items():
            text += f", {'' if name == DEFAULT else name + ': '}r={settings.r}"
            text += f", lora_alpha={settings.lora_alpha}"
            if settings.lora_dropout > 0.0:
                text += f", lora_dropout={settings.lora_dropout}"
            for flag in ("use_rslora", "use_dora"):
                if getattr(settings, flag):
                    text += f", {flag}=True"
        for flag in ("fan_in_fan_out", "merged"):
            if getattr(self, flag, False):
                text += f", {flag}=True"
        return text
