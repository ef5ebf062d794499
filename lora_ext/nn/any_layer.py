"""LoRA on the weight matrices of any layer."""

from __future__ import annotations

import types
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self, TypeVar, Unpack

import torch
from torch import Tensor, nn

from lora_ext import batching
from lora_ext.arguments import names_of
from lora_ext.nn.adapter import DEFAULT, AdapterOptions, AdapterSettings
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.planned import follows_plan, planned_names, refuse_plan


class AnyLayer(LoraLayer):
    """A layer of any class whose chosen weights W are `W + scaling * lora_B lora_A` in every call.

    The update is formed in full: use this where no layer of `lora_ext.nn` extends the class (GRU,
    LSTM, Bilinear, modules of your own). The base's parameters keep their names and places; the
    adapter of weight `w` is `w_lora_A` [r, in] and `w_lora_B` [out, r], in being all dimensions of
    w but the first. Made by `from_module`.
    """

    # The names of the adapted weights; a class of its own for each base class and choice has them.
    WEIGHTS: ClassVar[tuple[str, ...]] = ()
    PATH: ClassVar[tuple[str, str]] = ("composed", "W + scaling * lora_B lora_A in every call")
    PEFT_NAMES: ClassVar[dict[str, str]] = {}

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        weights: Iterable[str],
        r: int = 8,
        lora_alpha: float = 8,
        *,
        adapter_name: str = DEFAULT,
        **options: Unpack[AdapterOptions],
    ) -> Self:
        """The same layer, an instance of its class too, with adapters on some weights; shares its
        parameters with `module` and keeps hooks, training mode, device and dtype.

        The layer's forward runs on a shallow copy that has the changed weights; attributes that
        a forward assigns to are lost with it.

        Args:
            weights: names of parameters of `module` itself with two dimensions or more.
            options: further fields of `AdapterSettings`; there is no input to drop from, and no
                output to add a bias to, so no lora_dropout and no lora_bias.

        Raises:
            TypeError: module is not a module.
            ValueError: a name is not such a parameter, or a setting is out of range.
        """
        if not isinstance(module, nn.Module) or isinstance(module, LoraLayer):
            raise TypeError(
                f"{cls.__name__}: module: got {type(module).__qualname__}, expected a Module "
                "without adapters"
            )
        chosen = dict.fromkeys(names_of(weights, cls.__name__, "weights"))
        matrices = [n for n, p in module._parameters.items() if p is not None and p.dim() >= 2]
        unknown = [name for name in chosen if name not in matrices]
        if unknown or not chosen:
            raise ValueError(
                f"{cls.__name__}: weights: got {unknown[0] if unknown else 'none'!r}, expected "
                f"some of {matrices} of {type(module).__qualname__}; adapt a child for its own"
            )
        names = tuple(name for name in matrices if name in chosen)
        self = _class_for(cls, type(module), names)._adopt(module, type(module))
        if r != 0:
            self.add_adapter(adapter_name, r=r, lora_alpha=lora_alpha, **options)
        return self

    def __reduce__(self) -> Any:
        kind = next(base for base in type(self).__mro__ if "_made" not in base.__dict__)
        return _blank, (kind, self._base_class, self.WEIGHTS), self.__getstate__()  # type: ignore[no-untyped-call]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's."""
        running = self._running
        if batching.in_use and follows_plan(self):
            if planned_names(self):
                refuse_plan(self, "the layer runs with one weight, W + scaling * B A, for all rows")
            running = ()
        if self.merged_adapters:
            self._check_merged()
        base = self._plain_base()
        for name in self.WEIGHTS if running else ():
            base.__dict__.pop(name, None)  # of a replica (nn.DataParallel), or pruned
            base._parameters[name] = self._adapted(name)  # type: ignore[assignment]
        if running and isinstance(base, nn.RNNBase):
            _list_weights(base)
            base._flat_weight_refs = [None] * len(base._flat_weights)  # else cuDNN flattens them
        return base.forward(*args, **kwargs)

    def _planned_path(self) -> tuple[str, str]:
        return "none", "one weight for all rows: a plan that names its adapters is refused"

    def _plain_base(self) -> nn.Module:
        base = super()._plain_base()
        if isinstance(base, nn.RNNBase):
            _list_weights(base)
        return base

    def _adapted(self, name: str) -> Tensor:
        """W + scaling * lora_B lora_A, in float32 or better with one rounding, as merged."""
        weight = getattr(self, name)
        stack = self._stack(self._running, prefix=f"{name}_").for_any()
        compute = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            total = torch.addmm(
                weight.flatten(1).to(compute),
                stack.lora_B.to(compute),
                stack.lora_A.to(compute),
                alpha=stack.scaling,
            )
        return total.to(weight.dtype).view_as(weight)

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        for option in ("lora_dropout", "lora_bias"):
            if getattr(settings, option):
                raise ValueError(
                    f"{type(self).__name__}: {option}: got {getattr(settings, option)}, expected "
                    "none: the update is one of the weight"
                )
        unknown = sorted(settings.weights.keys() - set(self.WEIGHTS))
        if unknown:
            raise ValueError(
                f"{type(self).__name__}: weights: got settings of {unknown[0]!r}, expected some of "
                f"{list(self.WEIGHTS)}, which have adapters"
            )
        shapes: dict[str, tuple[int, ...]] = {}
        for name in self.WEIGHTS:
            out_features, in_features = getattr(self, name).flatten(1).shape
            r = settings.of(name).r
            shapes[f"{name}_lora_A"] = (r, in_features)
            shapes[f"{name}_lora_B"] = (out_features, r)
        return shapes

    def _settings(self, name: str, prefix: str) -> AdapterSettings:
        return self.adapters[name].of(prefix.removesuffix("_"))

    def _scale_of(self, name: str, prefix: str) -> float:
        own, common, now = self._settings(name, prefix), self.adapters[name], self._scaling[name]
        if own is common:
            return now
        if now == common.scaling:
            return own.scaling
        return now * (own.scaling / common.scaling)  # set_scale; it is not called for 0 times 0

    def _weight_matrix(self, prefix: str = "") -> Tensor:
        weight: Tensor = getattr(self, prefix.removesuffix("_"))
        return weight.view(weight.shape[0], -1)

    def _merged_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.WEIGHTS}

    def _write_merged(self, names: Sequence[str]) -> None:
        for name in self.WEIGHTS:
            stack = self._stack(names, prefix=f"{name}_")
            matrix = self._weight_matrix(f"{name}_")
            torch.ops.lora_ext.merge_(matrix, stack.lora_A, stack.lora_B, stack.scaling)


def _list_weights(rnn: nn.RNNBase) -> None:
    """A recurrent layer reads its weights from a list, which must not be another's."""
    rnn._flat_weights = [getattr(rnn, name) for name in rnn._flat_weights_names]


Layer = TypeVar("Layer", bound=AnyLayer)
_CLASSES: dict[tuple[type, type, tuple[str, ...]], type] = {}


def _class_for(
    kind: type[Layer], base_class: type[nn.Module], weights: tuple[str, ...]
) -> type[Layer]:
    """The class, always the same one, for these weights of this base."""
    key = (kind, base_class, weights)
    if key not in _CLASSES:
        prefixes = tuple(f"{name}_" for name in weights)
        parts = tuple(prefix + part for prefix in prefixes for part in ("lora_A", "lora_B"))
        # PEFT wraps a layer once for each parameter in the layer's order, the last one outermost.
        depth = {name: i for i, name in enumerate(reversed(weights))}
        body = {
            "__module__": __name__,
            "_made": True,
            "WEIGHTS": weights,
            "PREFIXES": prefixes,
            "PARTS": parts,
            "PEFT_NAMES": {
                f"{name}_{part}": f"{'base_layer.' * depth[name]}{part}.weight"
                for name in weights
                for part in ("lora_A", "lora_B")
            },
        }
        _CLASSES[key] = types.new_class(
            f"Lora{base_class.__name__}",
            (kind, base_class),
            exec_body=lambda namespace: namespace.update(body),
        )
    return _CLASSES[key]


def _blank(kind: type[Layer], base_class: type[nn.Module], weights: tuple[str, ...]) -> Layer:
    made = _class_for(kind, base_class, weights)
    return made.__new__(made)
