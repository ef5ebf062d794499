"""LoRA on an embedding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lora_ext import batching
from lora_ext.arguments import check_place, check_sizes, describe, named_x, suggests_names, warn
from lora_ext.functional import lora_embedding, weight_norm
from lora_ext.nn.adapter import DEFAULT, AdapterOptions, AdapterSettings
from lora_ext.nn.adoption import belongs_to_its_class
from lora_ext.nn.init import initialise_embedding
from lora_ext.nn.kept_base import KeptBase
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.planned import follows_plan, planned_updates
from lora_ext.nn.transaction import all_or_nothing
from lora_ext.paths import lora_embedding_path, why_no_lora_embedding


@suggests_names
class Embedding(LoraLayer, nn.Embedding):
    """`nn.Embedding` plus low-rank updates: `y = W[i] + scaling * lora_A[:, i]^T lora_B^T`.

    The terms are loralib's and PEFT's. `weight` [num_embeddings, embedding_dim] is the base's;
    `lora_A` [r, num_embeddings], zero at first, and `lora_B` [embedding_dim, r], standard normal,
    those of the adapter that the constructor makes, "default"; `add_adapter` makes more. The
    constructor freezes nothing (see `mark_only_lora_as_trainable`).

    The lookup in `lora_A` follows the base's options, as in loralib and PEFT: `padding_idx` gets no
    gradient, `scale_grad_by_freq` divides its gradient, `max_norm` renormalises in place the
    columns that are looked up. `sparse` is about the gradient of `weight`: that of `lora_A` is
    always dense. While merged, the merged rows are not renormalised again: outputs are those before
    merging.

    Args:
        num_embeddings, embedding_dim: of the base.
        r: rank; 0 is a plain embedding, without an adapter.
        lora_alpha, use_rslora, init_lora_weights, use_dora, autocast_adapter_dtype: see
            `AdapterSettings`; the magnitudes of DoRA are those of the embedding's dimensions;
            init_lora_weights=False makes lora_A standard normal too, for tests.
        lora_dropout: kept with the settings and not applied, with a warning: token numbers have no
            elements to drop. PEFT does the same.
        merge_weights: eval() merges and train() unmerges, as loralib does.
        base_options: further arguments of nn.Embedding: padding_idx, max_norm, norm_type,
            scale_grad_by_freq, sparse, device, dtype.

    `merge()` and `unmerge()` are as for `lora_ext.nn.Linear`.

    Raises:
        ValueError: lora_bias, or a setting out of range, by name.
    """

    PEFT_NAMES: ClassVar[dict[str, str]] = {
        "lora_A": "lora_embedding_A",
        "lora_B": "lora_embedding_B",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }
    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 0,
        lora_alpha: float = 1,
        merge_weights: bool = False,
        *,
        use_rslora: bool = False,
        lora_dropout: float = 0.0,
        init_lora_weights: bool | str = True,
        use_dora: bool = False,
        autocast_adapter_dtype: bool = True,
        **base_options: Any,
    ) -> None:
        where = type(self).__name__
        check_sizes(where, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        check_place(where, **base_options)
        padding_idx = base_options.get("padding_idx")
        if padding_idx is not None and padding_idx not in range(-num_embeddings, num_embeddings):
            raise ValueError(
                f"{where}: padding_idx: got {describe(padding_idx)}, expected an integer from "
                f"{-num_embeddings} to {num_embeddings - 1}, or None"
            )
        nn.Embedding.__init__(self, num_embeddings, embedding_dim, **base_options)
        self._init_adapters(nn.Embedding, merge_weights)
        self._with_adapter(
            DEFAULT,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            use_dora=use_dora,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @classmethod
    def from_embedding(
        cls,
        embedding: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        adapter_name: str = DEFAULT,
        **options: Unpack[AdapterOptions],
    ) -> Self:
        """The same layer with an adapter; shares `weight` with `embedding`, which may also be one
        of transformers' scaled word embeddings (Gemma, BART): `embed_scale` multiplies the update
        too.

        Keeps training mode, hooks, device, dtype and requires_grad. `options` are further fields
        of `AdapterSettings`. With r = 0 there is no adapter yet.

        Raises:
            TypeError: embedding is not an nn.Embedding, or computes something else.
            ValueError: its weight is computed (pruning, weight_norm), lora_bias, or a setting is
                out of range.
        """
        scaled = is_scaled_word_embedding(embedding)
        kind = type(embedding) if scaled else nn.Embedding
        if isinstance(embedding, nn.Embedding) and not belongs_to_its_class(embedding, kind):
            self: Self = KeptEmbedding._over(embedding, kind)  # type: ignore[assignment]
        else:
            self = cls._adopt(embedding, kind)
        return self._with_adapter(adapter_name, r, lora_alpha, lora_dropout, **options)

    def _plain_base(self) -> nn.Module:
        base: Any = super()._plain_base()
        if self.merged:
            base.max_norm = None  # already applied, to the summands
        return base  # type: ignore[no-any-return]

    @all_or_nothing
    def add_adapter(self, adapter_name: str, **settings: Any) -> None:
        super().add_adapter(adapter_name, **settings)
        if self.adapters[adapter_name].lora_dropout > 0.0:
            warn(
                f"Embedding: lora_dropout: got {self.adapters[adapter_name].lora_dropout}, which "
                "is kept but not applied: token numbers have no elements to drop"
            )

    def _initialise(self, name: str, kind: bool | str) -> None:
        lora_A, lora_B = (self._part(part, name) for part in ("lora_A", "lora_B"))
        initialise_embedding(kind, lora_A, lora_B, self.unmerged_weight())
        self._initialise_variant(name)

    def forward(self, input: Tensor | None = None, *, x: Tensor | None = None) -> Tensor:
        """input [...], int64 or int32 → [..., embedding_dim], dtype of `weight`."""
        if input is None or x is not None:
            input = named_x(type(self).__name__, x, input)
        if batching.in_use and follows_plan(self):
            y = self._look_up(input, self.weight, self.sparse)
            y = planned_updates(self, y, input, input.dim(), self._update)
        elif not self._running:
            if self.merged_adapters:
                self._check_merged()
            y = self._look_up(input, self.weight, self.sparse)
        elif self._lora_variant is not None:
            y = self._lora_variant.forward(self, input, self._running)
        elif self._is_fused():
            y = self._fused_look_up(input, self._running)
        else:
            y = self._look_up(input, self.weight, self.sparse)
            for name in self._running:  # lookups of their own, since max_norm is each one's
                y = y + self._update(input, name)
            y = y.to(self.weight.dtype)
        if self._base_class.forward is nn.Embedding.forward:
            return y
        scale: Any = self.embed_scale
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)

    def _is_fused(self) -> bool:
        """Whether the fused call does what the base's options ask for."""
        return not why_no_lora_embedding(self.weight, self.max_norm, self.sparse)

    def _product_path(self, tokens: int) -> tuple[str, str]:
        return lora_embedding_path(self.weight, self.max_norm, self.sparse)

    def _fused_look_up(self, input: Tensor, names: Sequence[str]) -> Tensor:
        stack = self._stack(names)
        return lora_embedding(
            input,
            self.weight,
            stack.lora_A,
            stack.lora_B,
            scaling=stack.scaling,
            padding_idx=self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
        )

    def _update(self, input: Tensor, name: str) -> Tensor:
        """scaling * lora_A[:, input]^T lora_B^T, in the adapter's dtype."""
        stack = self._stack([name])
        hidden = self._look_up(input, stack.lora_A.t(), sparse=False)
        return hidden @ stack.lora_B.t() * stack.scaling

    def _update_of(self, x: Tensor, name: str) -> Tensor:
        scale: Any = getattr(self, "embed_scale", 1.0)
        return self._update(x, name) * scale  # type: ignore[no-any-return]

    def _look_up(self, input: Tensor, weight: Tensor, sparse: bool) -> Tensor:
        return F.embedding(
            input,
            weight,
            self.padding_idx,
            None if self.merged else self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            sparse,
        )

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        if settings.lora_bias:
            raise ValueError(
                "Embedding: lora_bias: got True, expected False: an embedding has no bias to add "
                "it to, and PEFT has no name for it"
            )
        shapes: dict[str, tuple[int, ...]] = {
            "lora_A": (settings.r, self.num_embeddings),
            "lora_B": (self.embedding_dim, settings.r),
        }
        return shapes | self._variant_shapes(settings)

    def _weight_norm_shape(self) -> tuple[int, ...]:
        return (self.embedding_dim,)

    def _weight_norm(self, adapter_name: str) -> Tensor:
        stack = self._stack([adapter_name])
        weight = self.unmerged_weight().detach().t()
        return weight_norm(weight, stack.lora_A.detach(), stack.lora_B.detach(), stack.scaling)

    def _merged_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        return self._weight_and_bias(names)

    def _write_merged(self, names: Sequence[str]) -> None:
        factors, weight_scale = self._merge_factors(names)
        stack = self._stack(names, factors=factors)
        lora_A = stack.lora_A
        if self.max_norm is not None:  # of every row, as lookups would do it
            everything = torch.arange(self.num_embeddings, device=self.weight.device)
            columns = [self._part("lora_A", name).detach().t().contiguous() for name in names]
            for table in (self.weight, *columns):
                torch.embedding_renorm_(table.detach(), everything, self.max_norm, self.norm_type)
            lora_A = torch.cat(columns, 1).t().to(lora_A.dtype)
        torch.ops.lora_ext.merge_(
            self.weight.t(), lora_A, stack.lora_B, stack.scaling, weight_scale
        )

    in_features = property(attrgetter("num_embeddings"), doc="PEFT's name of num_embeddings.")
    out_features = property(attrgetter("embedding_dim"), doc="PEFT's name of embedding_dim.")

    def extra_repr(self) -> str:
        return super().extra_repr() + self.adapters_repr()


class KeptEmbedding(KeptBase, Embedding):
    """`Embedding` over a base that is its child `base_layer`; see `lora_ext.nn.kept_base`."""

    @property
    def _kind(self) -> type[nn.Module]:
        return self._base_class if is_scaled_word_embedding(self.base_layer) else nn.Embedding

    def _dimensions_of_rows(self, x: Tensor) -> int:
        return x.dim()

    def _updates(self, x: Tensor) -> Iterator[Tensor]:
        for name in self._running:
            yield self._update_of(x, name).to(self.weight.dtype)

    def _write_merged(self, names: Sequence[str]) -> None:
        if self.max_norm is not None:
            raise ValueError(
                f"{type(self).__name__}.merge: max_norm: got {self.max_norm}, expected None: the "
                "base, which is called, would renormalise the merged rows; run it unmerged"
            )
        super()._write_merged(names)


def is_scaled_word_embedding(module: nn.Module) -> bool:
    """Whether module is an embedding of transformers that multiplies what it looks up by its
    `embed_scale`, without importing transformers."""
    kind = type(module)
    return (
        isinstance(module, nn.Embedding)
        and kind.__module__.startswith("transformers.models.")
        and kind.__qualname__.endswith("ScaledWordEmbedding")
        and isinstance(getattr(module, "embed_scale", None), Tensor | float | int)
    )
