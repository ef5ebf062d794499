"""LoRA on multi-head attention."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, ClassVar, Self, Unpack

import torch
from torch import Tensor, nn

from lora_ext import batching
from lora_ext.arguments import check_kinds, check_place, check_sizes, names_of, suggests_names
from lora_ext.nn.adapter import DEFAULT, AdapterOptions, AdapterSettings, LowRank
from lora_ext.nn.linear import adapted_linear, adapted_linears
from lora_ext.nn.lora_layer import LoraLayer
from lora_ext.nn.planned import (
    follows_plan,
    planned_linear,
    planned_linear_path,
    refuse_plan,
    stacks,
)
from lora_ext.nn.scaled_dot_product import Masks, attend

PROJECTIONS = ("q", "k", "v", "o")


@suggests_names
class MultiheadAttention(LoraLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` whose projections of query, key, value and output have adapters.

    Each projection in `enable_lora` has an adapter of its own, as in LoRA-Torch: `q_lora_A`
    [r, embed_dim] and `q_lora_B` [embed_dim, r], and so for k (with kdim), v (with vdim) and o. Or
    all have, as in PEFT (`enable_lora=None`): `lora_A` [r, embed_dim] and `lora_B`
    [3 * embed_dim, r] for q, k and v together, which then have one lora_A, and `o_lora_A`,
    `o_lora_B`. All other projections are the base's. Nothing is merged for a call.

    Args:
        embed_dim, num_heads: as in `nn.MultiheadAttention`.
        enable_lora: some of "q", "k", "v", "o", as names or in one word ("qv"), or None for PEFT's
            form (kdim and vdim must be embed_dim then).
        r: rank of each adapter; 0 is plain attention, without adapters.
        lora_alpha, lora_dropout, use_rslora, init_lora_weights, autocast_adapter_dtype: see
            `AdapterSettings`. Dropout is that of each projection's input.
        merge_weights: eval() merges and train() unmerges.
        kw: those of `nn.MultiheadAttention`: dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim,
            batch_first, device, dtype.

    Freezing, merging and several adapters are as in `Linear`. In PEFT's form the keys of a
    checkpoint are PEFT's; PEFT has none for adapters of single projections, which are saved as
    `q_lora_A.weight` and so on, or in PEFT's form with `save_pretrained(..., as_plain_lora=True)`.

    Raises:
        ValueError: enable_lora names another projection, or none for r > 0; a setting is out of
            range.
    """

    PREFIXES: ClassVar[tuple[str, ...]] = ("", "q_", "k_", "v_", "o_")
    PARTS: ClassVar[tuple[str, ...]] = tuple(
        prefix + part for prefix in PREFIXES for part in ("lora_A", "lora_B")
    )
    PEFT_NAMES: ClassVar[dict[str, str]] = {
        **{part: f"{part}.weight" for part in PARTS},
        "o_lora_A": "base_layer.out_proj.lora_A.weight",
        "o_lora_B": "base_layer.out_proj.lora_B.weight",
    }
    PATH: ClassVar[tuple[str, str]] = ("lora_linear", "for each projection, fused with its base")
    _STATE: ClassVar[frozenset[str]] = LoraLayer._STATE | {"enable_lora"}

    enable_lora: tuple[str, ...] | None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        enable_lora: Iterable[str] | None = PROJECTIONS,
        r: int = 0,
        lora_alpha: float = 1,
        lora_dropout: float = 0.0,
        merge_weights: bool = False,
        *,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        autocast_adapter_dtype: bool = True,
        **kw: Any,
    ) -> None:
        where = type(self).__name__
        check_sizes(where, embed_dim=embed_dim, num_heads=num_heads)
        check_place(where, **kw)
        if num_heads > 0 and embed_dim % num_heads:
            raise ValueError(
                f"{where}: embed_dim: got {embed_dim} with num_heads {num_heads}, expected a "
                "multiple of it"
            )
        nn.MultiheadAttention.__init__(self, embed_dim, num_heads, **kw)
        self._init_adapters(nn.MultiheadAttention, merge_weights)
        self._init_projections(enable_lora)
        self._with_adapter(
            DEFAULT,
            r,
            lora_alpha,
            lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )

    @classmethod
    def from_multihead_attention(
        cls,
        attention: nn.MultiheadAttention,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        *,
        enable_lora: Iterable[str] | None = None,
        adapter_name: str = DEFAULT,
        **options: Unpack[AdapterOptions],
    ) -> Self:
        """The same layer with adapters, in PEFT's form unless `enable_lora` names projections or
        kdim or vdim is not embed_dim (all four have their own then; PEFT refuses this). Shares its
        parameters with `attention`. With r = 0 there is no adapter yet.

        Raises:
            TypeError: attention is not an nn.MultiheadAttention, or computes something else.
            ValueError: a weight is computed (pruning, parametrization), its forward is replaced on
                the instance, or a setting is out of range.
        """
        self = cls._adopt(attention, nn.MultiheadAttention)
        if enable_lora is None and self.in_proj_weight is None:
            enable_lora = PROJECTIONS
        self._init_projections(enable_lora)
        for name, weight in self._merged_parameters(()).items():
            if not isinstance(weight, nn.Parameter):
                raise ValueError(
                    f"{cls.__name__}: attention: computes its {name} (pruning, parametrization), "
                    "expected a plain parameter; make that permanent first"
                )
        return self._with_adapter(adapter_name, r, lora_alpha, lora_dropout, **options)

    def _init_projections(self, enable_lora: Iterable[str] | None) -> None:
        where = f"{type(self).__name__}: enable_lora"
        if enable_lora is not None:
            if isinstance(enable_lora, str):
                enable_lora = tuple(enable_lora)  # "qv"
            enable_lora = tuple(names_of(enable_lora, type(self).__name__, "enable_lora"))
            if not set(enable_lora) <= set(PROJECTIONS):
                raise ValueError(f"{where}: got {enable_lora}, expected some of {PROJECTIONS}")
        elif self.in_proj_weight is None:
            raise ValueError(
                f"{where}: got None, expected some of {PROJECTIONS}: with kdim or vdim other than "
                "embed_dim, q, k and v cannot have one lora_A"
            )
        self.enable_lora = enable_lora
        # What nn.TransformerEncoderLayer asks before it takes the weights instead of calling this.
        self._qkv_same_embed_dim = False

    def _plain_base(self) -> nn.Module:
        base = super()._plain_base()
        base._qkv_same_embed_dim = self.in_proj_weight is not None  # type: ignore[assignment]
        return base

    # Adapters

    def _targets(self) -> dict[str, tuple[str, slice]]:
        """The weight, by attribute name, and its rows, that the adapters of each prefix change."""
        everything, E = slice(None), self.embed_dim
        if self.enable_lora is None:
            return {"": ("in_proj_weight", everything), "o_": ("out_proj.weight", everything)}
        targets = {f"{p}_": (f"{p}_proj_weight", everything) for p in "qkv"}
        if self.in_proj_weight is not None:
            targets = {
                f"{p}_": ("in_proj_weight", slice(i * E, (i + 1) * E)) for i, p in enumerate("qkv")
            }
        targets["o_"] = ("out_proj.weight", everything)
        return {f"{p}_": targets[f"{p}_"] for p in PROJECTIONS if p in self.enable_lora}

    def part_shapes(self, settings: AdapterSettings) -> dict[str, tuple[int, ...]]:
        where, targets = type(self).__name__, self._targets()
        if not targets:
            raise ValueError(
                f"{where}: enable_lora: got no projection, expected some of {PROJECTIONS} for an "
                "adapter; r=0 makes a plain layer"
            )
        if settings.lora_bias:
            raise ValueError(f"{where}: lora_bias: got True, expected False; it is not supported")
        shapes: dict[str, tuple[int, ...]] = {}
        for prefix, (name, rows) in targets.items():
            out_features, in_features = attrgetter(name)(self)[rows].shape
            shapes[f"{prefix}lora_A"] = (settings.r, in_features)
            shapes[f"{prefix}lora_B"] = (out_features, settings.r)
        return shapes

    def _weight_matrix(self, prefix: str = "") -> Tensor:
        name, rows = self._targets()[prefix]
        weight: Tensor = attrgetter(name)(self)[rows]
        return weight

    def _merged_parameters(self, names: Sequence[str]) -> dict[str, Tensor]:
        weights = [name for name, _ in self._targets().values()] or ["out_proj.weight"]
        return {name: attrgetter(name)(self) for name in weights}

    def trained_biases(self) -> list[nn.Parameter]:
        """That of the output, as in PEFT."""
        bias = self.out_proj.bias
        return [] if bias is None else [bias]

    def _write_merged(self, names: Sequence[str]) -> None:
        for prefix in self._targets():
            stack = self._stack(names, prefix=prefix)
            torch.ops.lora_ext.merge_(
                self._weight_matrix(prefix), stack.lora_A, stack.lora_B, stack.scaling
            )

    @torch.no_grad()
    def plain_parts(self, adapter_name: str) -> dict[str, Tensor] | None:
        """PEFT's form: one adapter of q, k and v together, of rank r for each that has one, and one
        of the output of the same rank; zero where there is none."""
        if self.enable_lora is None:
            return None
        if self.in_proj_weight is None:
            raise ValueError(
                "PEFT has no adapters of an attention with kdim or vdim other than embed_dim"
            )
        own, r, E = self.parts(adapter_name), self.adapters[adapter_name].r, self.embed_dim
        inputs = [projection for projection in "qkv" if projection in self.enable_lora]
        like, rank = next(iter(own.values())), r * max(1, len(inputs))
        parts = {
            "lora_A": like.new_zeros(rank, E),
            "lora_B": like.new_zeros(3 * E, rank),
            "o_lora_A": like.new_zeros(rank, E),
            "o_lora_B": like.new_zeros(E, rank),
        }
        for j, projection in enumerate(inputs):
            ranks, i = slice(j * r, (j + 1) * r), "qkv".index(projection)
            parts["lora_A"][ranks] = own[f"{projection}_lora_A"]
            parts["lora_B"][i * E : (i + 1) * E, ranks] = own[f"{projection}_lora_B"]
        if "o" in self.enable_lora:
            parts["o_lora_A"][:r], parts["o_lora_B"][:, :r] = own["o_lora_A"], own["o_lora_B"]
        return parts

    # Forward

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`: arguments, their shapes, and results.

        Raises:
            ValueError: masks or inputs of the wrong shape.
            TypeError: a mask that is neither bool nor floating.
        """
        planned = batching.in_use and follows_plan(self)
        if not self._running and not planned:
            if self.merged_adapters:
                self._check_merged()
            base = self._plain_base()
            options = (need_weights, attn_mask, average_attn_weights, is_causal)
            return base.forward(query, key, value, key_padding_mask, *options)  # type: ignore[no-any-return]
        batched = self._is_batched(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError(
                f"{type(self).__name__}: is_causal: got True without attn_mask, expected the mask "
                "that it is a hint about"
            )
        if planned and not batched:
            refuse_plan(self, "an input without batch is no batch of requests")
        turn = batched and not self.batch_first
        if planned and turn:  # rows of a plan are counted request by request
            query, key, value = _turned(query, key, value)
        q, k, v = self._project_inputs(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif turn and not planned:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        masks = Masks(attn_mask, key_padding_mask, is_causal)
        masks.check(q.shape[0], self.num_heads, q.shape[1], k.shape[1])
        k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
        dropout_p = self.dropout if self.training else 0.0
        y, weights = attend(q, k, v, self.num_heads, masks, dropout_p, need_weights)
        if turn and not planned:
            y = y.transpose(0, 1)
        out = self.out_proj
        y = self._project("o", y.flatten(-2), out.weight, out.bias)
        if planned and turn:
            y = y.transpose(0, 1)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            y, weights = y.squeeze(0), None if weights is None else weights.squeeze(0)
        return y, weights

    def _is_batched(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        where = type(self).__name__
        try:
            nested = query.is_nested or key.is_nested or value.is_nested
        except AttributeError:
            check_kinds(where, query=query, key=key, value=value)
            raise
        if nested:
            raise TypeError(
                f"{where}: query: got a nested tensor, expected a plain one while an adapter runs; "
                "construct nn.TransformerEncoder with enable_nested_tensor=False"
            )
        shapes = [tuple(x.shape) for x in (query, key, value)]
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                f"{where}: query, key, value: got shapes {shapes}, expected three of two "
                "dimensions, or of three with a batch"
            )
        batch = 0 if self.batch_first else 1
        same_batch = query.dim() == 2 or query.shape[batch] == key.shape[batch]
        if not same_batch or key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"{where}: query, key, value: got shapes {shapes}, expected the same batch, and "
                "key and value of the same length"
            )
        return query.dim() == 3

    def _project_inputs(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, laid out as the inputs are. Where one lora_A serves all three they are one
        product; else those that follow one another and have one input are one operator."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if self.enable_lora is None and query is key and key is value:
            q, k, v = self._project("", query, weight, bias).chunk(3, -1)
            return q, k, v
        if weight is None:
            weights: Sequence[Tensor] = (
                self.q_proj_weight,
                self.k_proj_weight,
                self.v_proj_weight,
            )
        else:
            weights = weight.chunk(3)
        biases: Sequence[Tensor | None] = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        if batching.in_use and follows_plan(self):
            q, k, v = (
                self._project("qkv"[i], x, weights[i], biases[i]) for i, x in enumerate(inputs)
            )
            return q, k, v
        projected: list[Tensor] = []
        while (first := len(projected)) < 3:
            x, end = inputs[first], first + 1
            while end < 3 and inputs[end] is x:
                end += 1
            running = [self._running_on(projection) for projection in "qkv"[first:end]]
            projected += adapted_linears(x, weights[first:end], biases[first:end], running)
        q, k, v = projected
        return q, k, v

    def _lora_explain(self, tokens: int) -> tuple[str, str]:
        path, reason = super()._lora_explain(tokens)
        counts = [len(self._running_on(projection)) for projection in "qkv"]
        if self.enable_lora is not None and max(counts) == 1 < sum(counts):
            reason += "; q, k and v of one input are one lora_linear_multi"
        return path, reason

    def _planned_path(self) -> tuple[str, str]:
        return planned_linear_path(self)

    def _project(self, projection: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """One projection, "" of q, k and v together, with its adapters."""
        if batching.in_use and follows_plan(self):
            own = (
                stacks(self, self._prefix_of(projection)) if self._has_adapters(projection) else ()
            )
            planned = {name: self._own(projection, stack) for name, stack in own}
            return planned_linear(self, x, weight, bias, planned)
        return adapted_linear(x, weight, bias, self._running_on(projection))

    def _prefix_of(self, projection: str) -> str:
        return f"{projection}_" if projection == "o" or self.enable_lora is not None else ""

    def _has_adapters(self, projection: str) -> bool:
        return self.enable_lora is None or projection in self.enable_lora

    def _own(self, projection: str, stack: LowRank) -> LowRank:
        """A projection's rows of lora_B, which in PEFT's form q, k and v have together."""
        if projection in ("", "o") or self.enable_lora is not None:
            return stack
        return stack._replace(lora_B=stack.lora_B.chunk(3)["qkv".index(projection)])

    def _running_on(self, projection: str) -> list[LowRank]:
        if not self._has_adapters(projection):
            return []
        stacks_of = self.low_rank(self._prefix_of(projection))
        return [self._own(projection, stack) for stack in stacks_of]

    def _append(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values [N, S, E] with those that the base appends to every sequence."""
        more = [] if bias is None else [bias.to(x.dtype).expand(x.shape[0], 1, -1)]
        if self.add_zero_attn:
            more.append(x.new_zeros(x.shape[0], 1, x.shape[2]))
        return torch.cat([x, *more], 1) if more else x

    def extra_repr(self) -> str:
        projections = "" if self.enable_lora is None else f", enable_lora={list(self.enable_lora)}"
        return f"{self.embed_dim}, {self.num_heads}{self.adapters_repr()}{projections}"


def _turned(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch and length exchanged; tensors that are one stay one."""
    turned = {id(x): x.transpose(0, 1) for x in (query, key, value)}
    return turned[id(query)], turned[id(key)], turned[id(value)]
