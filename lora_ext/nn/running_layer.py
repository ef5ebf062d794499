"""Which adapters of a layer a forward runs, and what a fused call gets of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lora_ext import batching
from lora_ext.nn.adapter import AdapterSettings, LowRank, part_name, stacked, variant_of
from lora_ext.nn.adoption import AdoptingLayer
from lora_ext.nn.block_diagonal import block_diagonal
from lora_ext.nn.planned import follows_plan
from lora_ext.nn.tied import Tie, is_transposed
from lora_ext.nn.variant import AnyVariant


class RunningLayer(AdoptingLayer):
    """The part of a `LoraLayer` that runs adapters: alone or stacked, as products or as a variant
    of LoRA, and says by which code."""

    # What its adapters can be beyond low-rank products, from `lora_ext.nn.variants`.
    VARIANTS: ClassVar[tuple[AnyVariant, ...]] = ()
    # Whether its adapters may be activated by tokens, as PEFT's aLoRA.
    HAS_ALORA: ClassVar[bool] = False
    # Whether compiled code goes on when other adapters, of any rank up to one, take their place.
    HAS_CAPACITY: ClassVar[bool] = False
    # Whether their matrices may be block-diagonal, as PEFT's BD-LoRA.
    HAS_BLOCKS: ClassVar[bool] = False
    # (path, reason) for `explain`, of the kinds that have only one.
    PATH: ClassVar[tuple[str, str]] = ("composed", "in plain PyTorch")
    _scaling: dict[str, float]
    # Of adapters that are swapped under compiled code or CUDA graphs: the same numbers, in float64,
    # where these read them. Instances have their own.
    _scaling_tensors: dict[str, Tensor] = {}  # noqa: RUF012
    # Adapters that are an embedding's, whose weight is the layer's too.
    _tied: dict[str, Tie]
    _running: tuple[str, ...]
    # The names of lora_A, lora_B and lora_bias of the one adapter that runs, and whether it has the
    # last; None where another number does.
    _lora_alone: tuple[str, str, str, bool] | None
    _lora_variant: AnyVariant | None  # of those that run

    def _choose_running(self) -> None:
        runs = self._enabled and not self.merged_adapters
        self._running = tuple(
            name
            for name in self.active_adapters
            if runs
            and self._scaling[name] != 0.0
            and not self.adapters[name].alora_invocation_tokens
        )
        self._lora_variant = self._first_variant(self._running)
        self._lora_alone = None
        alone = len(self._running) == 1 and self._running[0] not in self._scaling_tensors
        name = self._running[0] if alone else ""
        if alone and not self.adapters[name].has_blocks and not is_transposed(self, name):
            A, B, bias = (part_name(part, name) for part in ("lora_A", "lora_B", "lora_bias"))
            self._lora_alone = A, B, bias, self.adapters[name].lora_bias

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle of 0.1.0 says `_runs_dora` of what runs, and no more."""
        super().__setstate__(state)
        self.__dict__.setdefault("_scaling_tensors", {})
        self.__dict__.setdefault("_tied", {})
        if self.__dict__.pop("_runs_dora", None) is not None:
            self._choose_running()

    def _lora_explain(self, tokens: int) -> tuple[str, str]:
        """(path, reason): the code that a call with so many rows runs now; see
        `lora_ext.explain`."""
        kind = self._base_class.__name__
        functional = {"Linear", "Conv1d", "Conv2d", "Conv3d", "Embedding"}
        base = f"torch.nn.functional.{kind.lower()}" if kind in functional else f"torch.nn.{kind}"
        if not self.adapters:
            return base, "there is no adapter"
        if batching.in_use and follows_plan(self):
            return self._planned_path()
        if self.merged and not self.running_adapters:
            return base, "merged: the adapter is in the weight"
        if not self.running_adapters:
            return base, (
                "no adapter runs: disabled, not active, of scale 0, or activated by tokens"
            )
        return self._lora_path(tokens)

    def _lora_path(self, tokens: int) -> tuple[str, str]:
        """That of a forward where adapters run."""
        path, reason = self._product_path(tokens)
        if self._lora_variant is not None:
            reason += f"; {self._lora_variant.explain(self, tokens)}"
        return path, reason

    def _product_path(self, tokens: int) -> tuple[str, str]:
        """The same for low-rank products."""
        return self.PATH

    @property
    def running_adapters(self) -> tuple[str, ...]:
        """The adapters that a forward adds now."""
        return self._running

    def _part(self, part: str, name: str) -> Any:
        key = part_name(part, name)
        try:
            return self._parameters[key]
        except KeyError:
            # Computed from others (pruning, parametrization), or of a replica (nn.DataParallel).
            found = self.__dict__.get(key)
            if found is None and "parametrizations" in self._modules:
                return getattr(self, key, None)
            return found

    def _matrix(self, part: str, name: str, blocks: int) -> Any:
        found = self._part(part, name)
        if is_transposed(self, name):
            return found.t()
        return block_diagonal(found, blocks) if blocks > 1 else found

    def low_rank(self, prefix: str = "") -> list[LowRank]:
        """The adapters that run now, stacked where they share a dropout probability and their
        scalings are numbers."""
        if self._scaling_tensors:
            return [self._alone(name, prefix) for name in self._running]
        if len(self._running) == 1:  # nearly always
            dropout_p = self.adapters[self._running[0]].lora_dropout if self.training else 0.0
            return [self._stack(self._running, dropout_p, prefix)]
        if not self._running:
            if self.merged_adapters:
                self._check_merged()
            return []
        groups: dict[float, list[str]] = {}
        for name in self._running:
            dropout_p = self.adapters[name].lora_dropout if self.training else 0.0
            groups.setdefault(dropout_p, []).append(name)
        return [self._stack(names, dropout_p, prefix) for dropout_p, names in groups.items()]

    def _alone(self, name: str, prefix: str) -> LowRank:
        """One adapter, with the tensor that is its scaling, if it has one: the number is not read,
        on which compiled code would depend."""
        dropout_p = self.adapters[name].lora_dropout if self.training else 0.0
        if name not in self._scaling_tensors:
            return self._stack([name], dropout_p, prefix)
        return LowRank(
            self._matrix(f"{prefix}lora_A", name, 1),
            self._matrix(f"{prefix}lora_B", name, 1),
            self._part(f"{prefix}lora_bias", name),
            self._scaling_tensors[name],  # type: ignore[arg-type]
            dropout_p,
        )

    def _settings(self, name: str, prefix: str) -> AdapterSettings:
        """Those of an adapter's product of a prefix."""
        return self.adapters[name]

    def _scale_of(self, name: str, prefix: str) -> float:
        """What multiplies an adapter's product of a prefix now."""
        return self._scaling[name]

    def _stack(
        self,
        names: Sequence[str],
        dropout_p: float = 0.0,
        prefix: str = "",
        factors: Mapping[str, Tensor] | None = None,
    ) -> LowRank:
        """Adapters as one of the sum of their ranks: their dropout, if any, is then the same.
        `factors` [rows of lora_B] multiply an adapter's output features."""
        a, b, c = prefix + "lora_A", prefix + "lora_B", prefix + "lora_bias"
        adapters = [
            LowRank(
                self._matrix(a, name, self.adapters[name].blocks_of_lora_A),
                self._matrix(b, name, self.adapters[name].blocks_of_lora_B),
                self._part(c, name),
                self._scale_of(name, prefix),
                dropout_p,
            )
            for name in names
        ]
        if len(adapters) == 1 and not factors:
            return adapters[0]
        alike = self._alike([one.lora_A for one in adapters])
        return stacked(
            [one._replace(lora_A=A) for one, A in zip(adapters, alike, strict=True)],
            [factors[name] for name in names] if factors else None,
        )

    def _alike(self, lora_A: list[Tensor]) -> list[Tensor]:
        """The same, in shapes that differ in the rank only."""
        return lora_A

    # Under a plan of `lora_ext.batch`; see `lora_ext.nn.planned`

    def _planned_path(self) -> tuple[str, str]:
        return "composed", "the base once, then each adapter's update on its own rows"

    def _update_of(self, x: Tensor, name: str) -> Tensor:
        """What one adapter adds to the base's result of x, in its own dtype."""
        raise NotImplementedError

    # Variants

    def _variant_of(self, settings: AdapterSettings) -> AnyVariant | None:
        """What makes an adapter with these settings more than a low-rank product, if anything."""
        flag = variant_of(settings)
        return next((one for one in self.VARIANTS if one.FLAG == flag), None)

    def _variant_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        """Of the parts that the variant adds to those of the low-rank product."""
        variant = self._variant_of(settings)
        return {} if variant is None else variant.part_shapes(self, settings)

    def _initialise_variant(self, adapter_name: str) -> None:
        variant = self._variant_of(self.adapters[adapter_name])
        if variant is not None:
            variant.initialise(self, adapter_name)

    def _merge_factors(
        self, names: Sequence[str]
    ) -> tuple[dict[str, Tensor] | None, Tensor | None]:
        """What multiplies the output features of each adapter, and of the base's weight, when they
        are merged one after another; None without a variant among them."""
        variant = self._first_variant(names)
        return (None, None) if variant is None else variant.merge_factors(self, names)

    def _first_variant(self, names: Iterable[str]) -> AnyVariant | None:
        flags = dict.fromkeys(filter(None, (variant_of(self.adapters[name]) for name in names)))
        if len(flags) > 1:
            raise ValueError(
                f"{type(self).__name__}: adapters of several variants ({', '.join(flags)}) cannot "
                "run or be merged together; make those of one variant active"
            )
        return next((one for one in self.VARIANTS if one.FLAG in flags), None)
