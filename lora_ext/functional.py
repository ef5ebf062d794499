"""The fused operators as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_ext._dropout import draw_rng_state, dropout, dropout_mask
from lora_ext._extension import _C
from lora_ext._layer_lists import call_of_layers, for_each, refuse_layers
from lora_ext._scaling import for_any, is_for_any
from lora_ext.arguments import check_kinds, refuse
from lora_ext.batching import BatchPlan

__all__ = [
    "LowRank",
    "column_scale",
    "dora_linear",
    "draw_rng_state",
    "dropout",
    "dropout_mask",
    "lora_embedding",
    "lora_linear",
    "lora_linear_grouped",
    "lora_linear_multi",
    "lora_update",
    "weight_norm",
]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
) -> Tensor:
    """`x @ weight.T + bias + scaling * (dropout(x) @ lora_A.T @ lora_B.T + lora_bias)`, fused.

    LoRA as in Hu et al., 2021 (arXiv:2106.09685). Differentiable twice in x, weight, bias, lora_A,
    lora_B and lora_bias; only the gradients that are asked for are computed. Keeps for backward x
    (or only `dropout(x) @ lora_A.T`, where weight and lora_A are frozen) and the rng_state.

    Args:
        x: [..., in_features], float64, float32, bfloat16 or float16, any strides.
        weight: [out_features, in_features], dtype of x.
        bias: [out_features] or None, dtype of x.
        lora_A: [r, in_features], dtype of x, or float32 beside bfloat16 and float16.
        lora_B: [out_features, r], dtype of lora_A.
        lora_bias: [out_features] or None, dtype of lora_A; scaled like the low-rank product.
        scaling: a number, or a 0-d tensor that needs no grad (a compiled graph can then be rescaled
            in place).
        dropout_p: probability that an element of x is dropped before lora_A.
        rng_state: from `draw_rng_state`; drawn here if None and dropout_p > 0.

    Returns:
        [..., out_features], dtype of x (of autocast, where it is on).

    Raises:
        ValueError, TypeError: an argument of the wrong shape or range, or dtype.
        RuntimeError: tensors on different devices.
    """
    if not torch.compiler.is_compiling():
        try:
            return _C.lora_linear(
                x, weight, bias, lora_A, lora_B, lora_bias, scaling, dropout_p, rng_state
            )
        except (TypeError, RuntimeError):
            optional = {"bias": bias, "lora_bias": lora_bias, "rng_state": rng_state}
            given = {name: value for name, value in optional.items() if value is not None}
            required = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B}
            check_kinds("lora_linear", **required, **given, scaling=scaling, dropout_p=dropout_p)
            raise
    if dropout_p > 0.0 and rng_state is None:
        rng_state = draw_rng_state(x)
    if is_for_any(scaling):
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        scaling = torch.ones((), dtype=exact, device=x.device) * scaling
    factor, factor_tensor = (1.0, scaling) if isinstance(scaling, Tensor) else (scaling, None)
    return torch.ops.lora_ext.lora_linear(  # type: ignore[no-any-return]
        x, weight, bias, lora_A, lora_B, lora_bias, factor, factor_tensor, dropout_p, rng_state
    )


def lora_linear_multi(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None,
    lora_As: Sequence[Tensor | None],
    lora_Bs: Sequence[Tensor | None],
    lora_biases: Sequence[Tensor | None] | None = None,
    *,
    scalings: float | Tensor | Sequence[float | Tensor] = 1.0,
    dropout_p: float | Sequence[float] = 0.0,
    rng_states: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """`[lora_linear(x, weight, ...) for weight, ... in zip(weights, ...)]`: several layers of one x
    as one operator, such as the projections q, k and v of an attention, or gate and up of an MLP.

    Each is as `lora_linear` makes it, with a mask of its own that is drawn in this order: the same
    seed gives the same masks as separate calls. Layers whose entries in lora_As and lora_Bs are
    None have no adapter: they are `torch.nn.functional.linear`, and draw nothing. On the CPU the
    low-rank parts are made in one pass over x and, in backward, the gradient of x is one sum, made
    in the compute type and rounded once (its error was measured at 0.85 to 1.03 of that of separate
    calls' results added up); so it is on CUDA where the fused kernels run, in backward without
    dropout. Elsewhere it is `lora_linear` for each. A
    layer whose result has no gradient costs nothing in backward, and its parameters get none.
    Differentiable twice, as `lora_linear`; keeps x once.

    Args:
        x: [..., in_features], as for `lora_linear`.
        weights: of each layer [out_features, in_features]; out_features may differ.
        biases: of each [out_features] or None; or None for all.
        lora_As: of each [r, in_features] or None; r may differ.
        lora_Bs: of each [out_features, r] or None.
        lora_biases: of each [out_features] or None; or None for all.
        scalings: of each, as for `lora_linear`; or one for all.
        dropout_p: of each; or one for all.
        rng_states: of each, from `draw_rng_state`, or None: drawn here where it drops elements.

    Returns:
        Of each layer [..., out_features], dtype of x (of autocast, where it is on).

    Raises:
        As `lora_linear`; ValueError also for lists of other lengths than that of weights.
    """
    if not torch.compiler.is_compiling():
        try:
            numbers, p = for_each(scalings, weights), for_each(dropout_p, weights)
            return _C.lora_linear_multi(
                x, weights, biases, lora_As, lora_Bs, lora_biases, numbers, p, rng_states
            )
        except (TypeError, ValueError, RuntimeError):
            given = {"lora_As": lora_As, "lora_Bs": lora_Bs, "biases": biases}
            given |= {"lora_biases": lora_biases, "rng_states": rng_states}
            refuse_layers("lora_linear_multi", x, weights, given, scalings, dropout_p)
            raise
    return torch.ops.lora_ext.lora_linear_multi(  # type: ignore[no-any-return]
        *call_of_layers(
            x, weights, biases, lora_As, lora_Bs, lora_biases, scalings, dropout_p, rng_states
        )
    )


class LowRank(NamedTuple):
    """An adapter as a call of an operator has it, or several stacked along the rank."""

    lora_A: Tensor
    lora_B: Tensor
    lora_bias: Tensor | None = None
    scaling: float = 1.0
    dropout_p: float = 0.0


def lora_linear_grouped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapters: Mapping[str, LowRank],
    plan: BatchPlan,
    *,
    rng_state: Tensor | None = None,
    where: str = "lora_linear_grouped",
) -> Tensor:
    """`x @ weight.T + bias` once for all rows, and to each row `scaling * (dropout(x) @ lora_A.T @
    lora_B.T + lora_bias)` of its own adapter, times its strength; fused on the CPU, and on GPUs as
    docs/many_adapters.md says.

    Rows of no adapter are the base's, bit for bit. Where it is fused no bit of a row, or of a
    gradient of an adapter, depends on which adapters other adapters' rows have. Where all rows have
    one adapter it is `lora_linear`. Differentiable twice, also in the strengths; adapters that have
    no row here get no gradient. Keeps for backward x, and `dropout(x) @ lora_A.T` of each row.

    Args:
        x, weight, bias: as for `lora_linear`.
        adapters: a `LowRank` by name; each has a rank, scaling, dropout and dtype of its own.
            Rows whose adapter is not there are the base's.
        plan: which row has which, from `lora_ext.batch`.
        rng_state: from `draw_rng_state`; drawn here if None and an adapter drops elements, whose
            masks are all of this state.
        where: who calls, for messages.

    Returns:
        [..., out_features], dtype of x (of autocast, where it is on).

    Raises:
        ValueError: x does not have the rows that the plan is for.
        Others as `lora_linear`.
    """
    try:
        plan.note(adapters)
        rows = plan.assign(x.shape[:-1], x.device, adapters, where)
        used = [adapters[name] for name in rows.names]
        if not used:
            return torch.nn.functional.linear(x, weight, bias)
        if rows.alone:
            A, B, lora_bias, scaling, p = used[0]
            return lora_linear(
                x, weight, bias, A, B, lora_bias, scaling=scaling, dropout_p=p, rng_state=rng_state
            )
        As, Bs, biases, scalings, drops = zip(*used, strict=True)
        if rng_state is None and any(drops):
            rng_state = draw_rng_state(x)
        if set(biases) == {None}:
            biases = ()
        else:
            none = weight.new_empty(0)
            biases = tuple(none if one is None else one for one in biases)
        compiling = torch.compiler.is_compiling()
        run = torch.ops.lora_ext.lora_linear_grouped if compiling else _C.lora_linear_grouped
        return run(
            x, weight, bias, As, Bs, biases, rows.order, rows.counts, rows.factor, scalings, drops,
            rng_state, rows.rounds,
        )  # fmt: skip
    except (TypeError, ValueError, RuntimeError, AttributeError):
        _check_grouped(where, x, weight, bias, adapters, plan, rng_state)
        raise


def _check_grouped(
    where: str,
    x: object,
    weight: object,
    bias: object,
    adapters: object,
    plan: object,
    rng_state: object,
) -> None:
    """A TypeError for the first of these arguments that is of another kind, after a call failed."""
    if not isinstance(plan, BatchPlan):
        refuse(where, "plan", plan, "what lora_ext.batch([...]) returns")
    if not isinstance(adapters, Mapping):
        refuse(where, "adapters", adapters, "a dict of names to lora_ext.functional.LowRank")
    optional = {"bias": bias, "rng_state": rng_state}
    check_kinds(where, x=x, weight=weight, **{n: v for n, v in optional.items() if v is not None})
    for name, adapter in adapters.items():
        if not isinstance(adapter, LowRank):
            refuse(where, f"adapters[{name!r}]", adapter, "a LowRank(lora_A, lora_B)")
        parts = adapter._asdict()
        for part in ("lora_bias", "scaling"):  # which may be none, or a tensor
            if parts[part] is None or isinstance(parts[part], Tensor):
                del parts[part]
        check_kinds(f"{where}: adapters[{name!r}]", **parts)


def _row(padding_idx: int, rows: int) -> int:
    """As torch.nn.functional.embedding counts: negative ones from the end."""
    if not -rows <= padding_idx < rows:
        raise ValueError(
            f"lora_embedding: padding_idx: got {padding_idx}, expected {-rows} to {rows - 1}, a "
            "row of the weight, or None"
        )
    return padding_idx % rows


def lora_embedding(
    indices: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> Tensor:
    """`weight[indices] + scaling * lora_A.T[indices] @ lora_B.T`, fused: on the CPU one pass over
    the result and, in backward, one over its gradient. Other devices run a composition of ATen.

    LoRA as in Hu et al., 2021 (arXiv:2106.09685), for a lookup. Differentiable twice in weight,
    lora_A and lora_B; only the gradients that are asked for are computed, in an order that does not
    depend on the number of threads for that of lora_A. Keeps only indices, lora_A and lora_B for
    backward.

    Args:
        indices: [...], int64 or int32, from 0 to num_embeddings - 1.
        weight: [num_embeddings, embedding_dim], float64, float32, bfloat16 or float16.
        lora_A: [r, num_embeddings], dtype of weight, or float32 beside bfloat16 and float16.
        lora_B: [embedding_dim, r], dtype of lora_A.
        scaling: of the product.
        padding_idx: a row of weight and column of lora_A that get no gradient; negative ones count
            from the end.
        scale_grad_by_freq: divide the gradients of weight and lora_A by how often an index occurs.

    Returns:
        [..., embedding_dim], dtype of weight.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype.
        IndexError: an index out of range (on the CPU).
        RuntimeError: tensors on different devices.
    """
    if torch.compiler.is_compiling():
        lora_A, lora_B, scaling = for_any(lora_A, lora_B, scaling)
    try:
        padding = -1
        if padding_idx is not None and weight.dim():  # of a number the operator says what is wrong
            padding = _row(padding_idx, weight.shape[0])
        return torch.ops.lora_ext.lora_embedding(  # type: ignore[no-any-return]
            indices, weight, lora_A, lora_B, scaling, padding, scale_grad_by_freq
        )
    except (AttributeError, TypeError, ValueError, RuntimeError):
        check_kinds("lora_embedding", indices=indices, weight=weight, lora_A=lora_A, lora_B=lora_B)
        flags = {
            "padding_idx": -1 if padding_idx is None else padding_idx,
            "scale_grad_by_freq": scale_grad_by_freq,
        }
        check_kinds("lora_embedding", scaling=scaling, **flags)
        raise


def lora_update(
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    lora_bias: Tensor | None = None,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`scaling * (dropout(x) @ lora_A.T @ lora_B.T + lora_bias)` in plain PyTorch, for what cannot
    join a fused call.

    Args: as for `lora_linear`; dtype is that of the result, and that of x if None.

    Returns: [..., out_features].
    """
    if rng_state is None:
        d = torch.nn.functional.dropout(x.to(lora_A.dtype), dropout_p)
    else:
        d = dropout(x, rng_state, dropout_p).to(lora_A.dtype)
    update = d @ lora_A.t() @ lora_B.t()
    if lora_bias is not None:
        update = update + lora_bias
    return (update * scaling).to(dtype or x.dtype)


def column_scale(z: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`z * scale + bias`, one factor for each column, in one pass; so is its backward.

    Differentiable twice. Keeps z and scale for backward.

    Args:
        z: [..., N], float64, float32, bfloat16 or float16.
        scale, bias: [N], of any of these dtypes; they are computed with in float32 (float64 for
            float64 z).

    Returns:
        [..., N], dtype of z.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype.
        RuntimeError: tensors on different devices.
    """
    try:
        return torch.ops.lora_ext.column_scale(z, scale, bias)  # type: ignore[no-any-return]
    except (TypeError, RuntimeError):
        check_kinds("column_scale", z=z, scale=scale, **({} if bias is None else {"bias": bias}))
        raise


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    scale: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float,
    rng_state: Tensor,
) -> Tensor:
    """`x @ weight.T + (scale - 1) * v + scaling * d @ lora_A.T @ lora_B.T + bias` with
    `d = dropout(x)` and `v = d @ weight.T`: DoRA under dropout, as PEFT defines it, if scale is its
    magnitude over the norm of the weight's rows and multiplies the rows of lora_B too.

    On the CPU v is made of `x @ weight.T` and a product with the dropped elements alone, and so is
    its backward; where that does not pay, by a second dense product (`explain` says which). Keeps x
    and v for backward, and without a gradient of scale only x. Differentiable twice. A weight that
    requires grad is trained too, by a composition that keeps `d` as well.

    Args:
        x: [..., in_features], float64, float32, bfloat16 or float16.
        weight: [out_features, in_features], dtype of x.
        bias: [out_features] or None, dtype of x.
        lora_A: [r, in_features], dtype of x, or float32 beside bfloat16 and float16.
        lora_B: [out_features, r], dtype of lora_A.
        scale: [out_features], of any of these dtypes.
        scaling: of the low-rank product.
        dropout_p: probability that an element of x is dropped.
        rng_state: from `draw_rng_state`.

    Returns:
        [..., out_features], dtype of x (of autocast, where it is on).

    Raises:
        ValueError, TypeError: an argument of the wrong shape or range, or dtype.
        RuntimeError: tensors on different devices.
    """
    if torch.compiler.is_compiling():
        lora_A, lora_B, scaling = for_any(lora_A, lora_B, scaling)
    try:
        return torch.ops.lora_ext.dora_linear(  # type: ignore[no-any-return]
            x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, rng_state
        )
    except (TypeError, RuntimeError):
        check_kinds("dora_linear", x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, scale=scale)
        check_kinds("dora_linear", scaling=scaling, dropout_p=dropout_p, rng_state=rng_state)
        check_kinds("dora_linear", **({} if bias is None else {"bias": bias}))
        raise


def weight_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """The Euclidean norm of each row of `weight + scaling * lora_B @ lora_A`, without that matrix
    ever being in memory. A constant for autograd, as in DoRA (arXiv:2402.09353, section 4.3).

    Args:
        weight: [N, K], float64, float32, bfloat16 or float16; rows or columns adjacent in memory.
        lora_A: [r, K], lora_B: [N, r], dtype of weight, or float32 beside bfloat16 and float16.

    Returns:
        [N], float32 (float64 for float64).

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype.
        NotImplementedError: an argument with a tangent of forward AD, which a constant would lose.
        RuntimeError: tensors on different devices.
    """
    if torch.compiler.is_compiling():
        lora_A, lora_B, scaling = for_any(lora_A, lora_B, scaling)
    try:
        return torch.ops.lora_ext.weight_norm(  # type: ignore[no-any-return]
            weight, lora_A, lora_B, scaling
        )
    except (TypeError, RuntimeError):
        check_kinds("weight_norm", weight=weight, lora_A=lora_A, lora_B=lora_B, scaling=scaling)
        raise
