"""Initialisations of adapters, in the spirit of torch.nn.init: they write into given tensors.

An adapter `lora_A` [r, K], `lora_B` [N, r] belongs to a weight [N, K]; a convolution's K is
in_channels times the kernel's size. Names and, with the same seed, values are PEFT's: random
numbers are drawn on the CPU in torch's default dtype, in the order in which PEFT draws them, so an
adapter does not depend on the device it lives on either.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Any

import torch
from torch import Tensor, nn

from lora_ext.arguments import describe
from lora_ext.nn.calibrated import FROM_DATA, corda_factors, lora_ga_factors

KINDS = (
    *("gaussian", "orthogonal", "pissa", "pissa_niter_<iterations>", "olora", "mica", "loftq"),
    *FROM_DATA,
)

# Kinds that leave `weight - scaling * B A` in the weight's place, or, of "loftq", quantized values;
# "pissa_niter_<iterations>" is one of them too (see `mutates_weight`).
MUTATING = frozenset({"pissa", "olora", "loftq", "corda", "lora_ga"})

_PISSA_NITER = re.compile(r"pissa_niter_([0-9]+)")
# A count beyond this is a mistake, or a trap in a file: 16 is what the paper calls enough.
MAX_PISSA_ITERATIONS = 1000


def check_init(kind: bool | str) -> bool | str:
    """`kind` in its canonical form (lower case), if it is an initialisation that is built. What a
    config, a layer and a file may say: the one place that knows.

    Raises:
        ValueError: it is not one.
        TypeError: it is neither a name nor a bool.
    """
    if isinstance(kind, bool):
        return kind
    expected = f"expected True, False or one of {KINDS}"
    if not isinstance(kind, str):
        raise TypeError(f"init_lora_weights: got {describe(kind)}, {expected}")
    name = kind.lower()
    iterations = _PISSA_NITER.fullmatch(name)
    if iterations is not None and int(iterations[1][:9]) > MAX_PISSA_ITERATIONS:
        raise ValueError(
            f"init_lora_weights: got {kind[:30]!r}, expected at most {MAX_PISSA_ITERATIONS} "
            "iterations"
        )
    if name in FROM_DATA and kind != name:  # PEFT, which reads the file, has these in lower case
        raise ValueError(f"init_lora_weights: got {kind!r}, {expected}; did you mean {name!r}?")
    if name in ("gaussian", "orthogonal", "mica", "eva") or mutates_weight(name):
        return name
    kind = kind[:100]
    near = difflib.get_close_matches(kind.lower(), KINDS)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"init_lora_weights: got {kind!r}, {expected}{hint}")


def mutates_weight(kind: bool | str) -> bool:
    """Whether this initialisation changes the base weight."""
    return isinstance(kind, str) and (
        kind.lower() in MUTATING or _PISSA_NITER.fullmatch(kind.lower()) is not None
    )


def is_mica(kind: bool | str) -> bool:
    """Whether this initialisation is MiCA, of which lora_B is not trained."""
    return isinstance(kind, str) and kind.lower() == "mica"


def is_loftq(kind: object) -> bool:
    """Whether this initialisation is LoftQ, which leaves quantized values in the weight."""
    return isinstance(kind, str) and kind.lower() == "loftq"


def reads_weight(kind: bool | str) -> bool:
    """Whether this initialisation depends on the base weight."""
    return mutates_weight(kind) or is_mica(kind)


@torch.no_grad()
def initialise(
    kind: bool | str,
    lora_A: Tensor,
    lora_B: Tensor,
    weight: Tensor | None = None,
    scaling: float = 1.0,
    *,
    lora_bias: Tensor | None = None,
    loftq_bits: int = 4,
    loftq_iter: int = 1,
    data: Any = None,
    **lora_ga: Any,
) -> None:
    """Writes the initial values of the adapter of a linear or convolutional layer, in place.

    True: lora_A Kaiming-uniform as in nn.Linear, lora_B zero. "gaussian": lora_A normal with
    deviation 1/r, lora_B zero. False: all as in nn.Linear, so that the adapter is not zero.
    "orthogonal": rows of an orthogonal matrix shared out to lora_A and lora_B, so that B A = 0
    (https://datta0.github.io/posts/rethink-lora-init). "pissa": the r leading singular triplets of
    the weight (arXiv:2404.02948); "pissa_niter_<n>": by a randomised SVD with n subspace
    iterations. "olora": the first r columns and rows of its QR factors (arXiv:2406.01775). "mica":
    lora_A zero, lora_B the r left singular vectors of the weight with the smallest singular values,
    which is to stay as it is (arXiv:2604.01694).

    "loftq" leaves values of `loftq_bits` in the weight, and what quantizing lost of it, as far as
    the rank goes, in the adapter, in `loftq_iter` turns (see `lora_ext.quant.loftq`).

    "corda" (arXiv:2406.05223) and "lora_ga" (arXiv:2407.05000) start from what a calibration left,
    `data` (see `lora_ext.nn.calibrated`); "lora_ga" without it is True, as in PEFT, for files do
    not have it. "eva" is True until `initialize_lora_eva_weights` fills lora_A (arXiv:2410.07170).

    "pissa", "olora", "corda" and "lora_ga" leave `weight - scaling * lora_B @ lora_A` in the
    weight, computed from the stored lora_A and lora_B in float32 (float64 for float64) and rounded
    once: the layer's output stays what it was, within that rounding. If anything is wrong, nothing
    is changed. A meta adapter is left alone by the other kinds.

    Args:
        kind: PEFT's init_lora_weights, see `check_init`.
        lora_A: [r, K], or a convolution's [r, in, *kernel] for the kinds that ignore the weight.
        lora_B: [N, r], or a convolution's [N, r / groups, *ones] likewise.
        weight: [N, K], any dtype that `lora_linear` takes; a transposed view where it is stored as
            [K, N]. Needed only where `reads_weight(kind)`.
        scaling: of the adapter.
        lora_bias: [N], set to zero (except by False).
        loftq_bits, loftq_iter: of "loftq".
        data: of "corda" and "lora_ga".
        lora_ga: of "lora_ga": direction, scale, stable_gamma and rows, see `lora_ga_factors`.

    Raises:
        ValueError: kind is unknown; an odd r for "orthogonal"; where the weight is read: r
            above min(N, K), shapes that do not fit, a meta weight, NaN or Inf; where it is changed
            a meta adapter, or a scaling that is not above 0.
        TypeError: lora_A and lora_B have a dtype that the weight's cannot be merged with.
    """
    kind = check_init(kind)
    if kind == "lora_ga" and data is None:
        kind = True
    if mutates_weight(kind):
        _check_mutation(kind, lora_A, lora_B, weight, scaling)
    elif lora_A.is_meta:
        return
    if kind == "orthogonal":
        _check_orthogonal(lora_A, lora_B)
    elif kind == "mica":
        _check_mutation("MiCA", lora_A, lora_B, weight, 1.0)
    # PEFT constructs two nn.Linear first, which draw.
    plain_A, plain_B = _linear_like(lora_A), _linear_like(lora_B)
    plain_bias = None if lora_bias is None else _linear_bias_like(lora_bias, lora_B)
    if kind is False:
        lora_A.copy_(plain_A)
        lora_B.copy_(plain_B)
    elif kind == "orthogonal":
        _orthogonal(lora_A, lora_B)
    elif kind == "mica" and weight is not None:
        _minor(lora_A, lora_B, weight)
    elif kind == "loftq" and weight is not None:
        from lora_ext.quant.loftq import quantized_and_adapter  # only now: few need it

        Q, A, B = quantized_and_adapter(weight, len(lora_A), scaling, loftq_bits, loftq_iter)
        weight.copy_(Q)
        lora_A.copy_(A)
        lora_B.copy_(B)
    elif isinstance(kind, str) and weight is not None and mutates_weight(kind):
        values = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if kind == "corda":
            factors = corda_factors(data, values, len(lora_A), scaling)
        elif kind == "lora_ga":
            data = data.to(values)
            factors = lora_ga_factors(data, values, len(lora_A), scaling, **lora_ga)
        else:
            factors = _factors(kind, values, len(lora_A), scaling)
        _take_from_weight(*factors, lora_A, lora_B, weight, scaling)
    elif kind == "eva":
        lora_A.copy_(plain_A)
        lora_B.zero_()
    else:
        if kind == "gaussian":
            lora_A.copy_(_empty_like(lora_A).normal_(std=1 / len(lora_A)))
        else:
            lora_A.copy_(_linear_like(lora_A))
        lora_B.zero_()
    if lora_bias is not None and plain_bias is not None:
        lora_bias.copy_(plain_bias if kind is False else torch.zeros_like(plain_bias))


@torch.no_grad()
def initialise_embedding(
    kind: bool | str, lora_A: Tensor, lora_B: Tensor, weight: Tensor | None = None
) -> None:
    """Writes the initial values of an embedding's adapter, in place: lora_A zero, lora_B normal
    with deviation 1; with kind False both normal.

    As in PEFT all other kinds but "mica" mean the first, and none changes the weight: a PEFT
    checkpoint trained after "pissa" counts on an embedding that was left alone. "mica" is as for a
    linear layer with the weight's transpose.

    Args:
        kind: PEFT's init_lora_weights, see `check_init`.
        lora_A: [r, num_embeddings].
        lora_B: [embedding_dim, r].
        weight: [num_embeddings, embedding_dim]; needed only for "mica".

    Raises:
        ValueError: kind is unknown; for "mica" as `initialise`.
    """
    kind = check_init(kind)
    if kind == "loftq":
        raise ValueError(
            "init_lora_weights: got 'loftq' for an embedding, expected another kind; leave it out "
            "with exclude_modules"
        )
    if lora_A.is_meta:
        return
    if kind == "mica":
        _check_mutation("MiCA", lora_A, lora_B, None if weight is None else weight.t(), 1.0)
    plain_A, plain_B = _empty_like(lora_A).normal_(), _empty_like(lora_B).normal_()
    if kind is False:
        lora_A.copy_(plain_A)
        lora_B.copy_(plain_B)
    elif kind == "mica" and weight is not None:
        _minor(lora_A, lora_B, weight.t())
    else:
        lora_A.zero_()
        lora_B.copy_(_empty_like(lora_B).normal_())


def _empty_like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, device="cpu")


def _linear_like(tensor: Tensor) -> Tensor:
    """What nn.Linear and nn.Conv draw for a weight of this shape."""
    return nn.init.kaiming_uniform_(_empty_like(tensor), a=math.sqrt(5))


def _linear_bias_like(lora_bias: Tensor, lora_B: Tensor) -> Tensor:
    bound = 1 / math.sqrt(lora_B[0].numel())
    return _empty_like(lora_bias).uniform_(-bound, bound)


def _check_orthogonal(lora_A: Tensor, lora_B: Tensor) -> None:
    if lora_A.dim() != 2 or lora_B.dim() != 2 or lora_A.size(0) != lora_B.size(1):
        raise ValueError(
            f"orthogonal: lora_A, lora_B: got shapes {tuple(lora_A.shape)} and "
            f"{tuple(lora_B.shape)}, expected [r, K] and [N, r]"
        )
    if lora_A.size(0) % 2:
        raise ValueError(
            f"orthogonal: r: got {lora_A.size(0)}, expected an even rank; choose another r or "
            "init_lora_weights"
        )


def _orthogonal(lora_A: Tensor, lora_B: Tensor) -> None:
    r = lora_A.size(0)
    rows, _ = torch.linalg.qr(torch.randn(r, r, device="cpu"))
    for_A = torch.randn(lora_A.size(1), r // 2, device="cpu")
    for_B = torch.randn(r // 2, lora_B.size(0), device="cpu")
    lora_A.copy_((for_A @ rows[0::2]).t() / 10)
    lora_B.copy_(for_B.t() @ rows[1::2] / 10)


def _check_mutation(
    kind: bool | str, lora_A: Tensor, lora_B: Tensor, weight: Tensor | None, scaling: float
) -> None:
    if weight is None or weight.is_meta or lora_A.is_meta or lora_B.is_meta:
        what = "None" if weight is None else "meta tensors"
        raise ValueError(
            f"{kind}: weight: got {what}, expected values; load the weights before adding the "
            "adapter"
        )
    shapes = tuple(lora_A.shape), tuple(lora_B.shape), tuple(weight.shape)
    fits = len(shapes[0]) == len(shapes[1]) == len(shapes[2]) == 2
    if not fits or shapes != (
        (shapes[0][0], shapes[2][1]),
        (shapes[2][0], shapes[0][0]),
        shapes[2],
    ):
        raise ValueError(
            f"{kind}: lora_A, lora_B, weight: got shapes {shapes[0]}, {shapes[1]} and "
            f"{shapes[2]}, expected [r, K], [N, r] and [N, K]"
        )
    if lora_A.size(0) > min(weight.shape):
        raise ValueError(
            f"{kind}: r: got {lora_A.size(0)} for a weight of shape {shapes[2]}, expected at most "
            f"{min(weight.shape)}; give this layer a smaller rank with rank_pattern: {kind} "
            "requires `r` <= min(in_features, out_features)"
        )
    if not (math.isfinite(scaling) and scaling > 0):
        raise ValueError(f"{kind}: scaling: got {scaling}, expected a finite number above 0")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{kind}: weight: holds NaN or Inf, expected finite values")


def _minor(lora_A: Tensor, lora_B: Tensor, weight: Tensor) -> None:
    values = weight.to(torch.promote_types(weight.dtype, torch.float32))
    U, _, _ = torch.linalg.svd(values, full_matrices=False)
    lora_A.zero_()
    lora_B.copy_(U[:, -lora_A.size(0) :])


def _take_from_weight(
    factor_A: Tensor,
    factor_B: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    weight: Tensor,
    scaling: float,
) -> None:
    # The residual of what the adapter will hold, so that rounding it costs nothing.
    stored_A, stored_B = factor_A.to(lora_A.dtype), factor_B.to(lora_B.dtype)
    torch.ops.lora_ext.merge_(weight, stored_A, stored_B, -scaling)
    lora_A.copy_(stored_A)
    lora_B.copy_(stored_B)


def _factors(kind: str, weight: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The adapter [r, K], [N, r] that takes the weight's principal part over."""
    if kind == "olora":
        Q, R = torch.linalg.qr(weight)
        return R[:r], Q[:, :r]
    iterations = _PISSA_NITER.fullmatch(kind)
    if iterations is None:
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(weight, r, niter=int(iterations[1]))
        Vh = V.t()
    root = (S[:r] / scaling).sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root
