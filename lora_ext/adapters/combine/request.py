"""What add_weighted_adapter is asked for: names, checks, the new adapter's rank."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_ext.adapters.combine.mixing import MAJORITY_SIGN_METHODS, MIXING
from lora_ext.adapters.config_checks import MAX_RANK
from lora_ext.arguments import as_number, refuse, short

SVD = ("svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
COMBINATION_TYPES = ("cat", *MIXING, *SVD)
SVD_DRIVERS = (None, "gesvd", "gesvdj", "gesvda")
_SVD_RANK = f"None or an integer from 1 to {MAX_RANK}"


@dataclass(frozen=True)
class Combination:
    """A checked request; `rank` is that of the new adapter. Made by `plan_combination`."""

    adapters: tuple[str, ...]
    weights: tuple[float, ...]
    combination_type: str
    rank: int
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: str = "total"


def plan_combination(
    ranks: Mapping[str, int],
    adapters: Sequence[str],
    weights: Sequence[float],
    combination_type: str = "svd",
    *,
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
) -> Combination:
    """Checks what add_weighted_adapter is asked for, and finds the new adapter's rank.

    One adapter alone is always combined by "linear", as in PEFT.

    Args:
        ranks: rank of each adapter that there is, the largest one where layers differ.
        adapters: names of those to combine; a name may come twice.
        weights: their factors, any sign.
        combination_type: one of COMBINATION_TYPES. "cat" is the exact weighted sum, its rank the
            sum of ranks; "svd" the best approximation of it at svd_rank; "linear" sums factors, not
            products, of adapters of one rank. The others are `mix`, on the factors (of adapters of
            one rank) or, with "_svd", on the products.
        svd_rank: rank for the types with "svd", default the largest of the adapters'.
        svd_clamp: with "svd", limits both factors to the quantile svd_clamp of all their elements.
        svd_driver: of torch.linalg.svd on CUDA.
        density: share of elements kept, needed for all but "cat", "linear" and "svd".
        majority_sign_method: "total" or "frequency", for the types with "ties".

    Raises:
        ValueError: an argument out of range, by name.
    """
    where = "add_weighted_adapter"
    adapters = tuple(adapters)
    if not isinstance(weights, Iterable) or isinstance(weights, str | bytes):
        refuse(where, "weights", weights, "a list of numbers, one for each adapter")
    weights = tuple(as_number(weight, where, "weights", "numbers") for weight in weights)
    _one_of("combination_type", combination_type, COMBINATION_TYPES)
    _one_of("majority_sign_method", majority_sign_method, MAJORITY_SIGN_METHODS)
    _one_of("svd_driver", svd_driver, SVD_DRIVERS)
    if not adapters:
        raise wrong_argument("adapters", "no names", "at least one")
    for name in adapters:
        _one_of("adapters", name, tuple(ranks))
    if len(weights) != len(adapters):
        raise wrong_argument(
            "weights", f"{len(weights)} for {len(adapters)} adapters", "one for each"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise wrong_argument("weights", weights, "finite numbers")
    if svd_rank is not None:
        whole = isinstance(svd_rank, numbers.Integral) and not isinstance(svd_rank, bool)
        if not whole or not 1 <= svd_rank <= MAX_RANK:
            raise wrong_argument("svd_rank", svd_rank, _SVD_RANK)
        svd_rank = int(svd_rank)
    if svd_clamp is not None:
        svd_clamp = as_number(svd_clamp, where, "svd_clamp")
    if density is not None:
        density = as_number(density, where, "density")
    if svd_clamp is not None and not 0.5 < svd_clamp <= 1.0:
        raise wrong_argument("svd_clamp", svd_clamp, "None or a quantile above 0.5, up to 1")
    if density is not None or len(adapters) > 1:
        _check_density(combination_type, density)
    if len(adapters) == 1:
        combination_type = "linear"
    return Combination(
        adapters,
        weights,
        combination_type,
        _new_rank([ranks[name] for name in adapters], combination_type, svd_rank),
        svd_clamp,
        svd_driver,
        density,
        majority_sign_method,
    )


def wrong_argument(argument: str, got: object, expected: str) -> ValueError:
    got = short(got) if isinstance(got, int) else got  # of any length
    return ValueError(f"add_weighted_adapter: {argument}: got {got}, expected {expected}")


def _one_of(argument: str, got: str | None, expected: Iterable[str | None]) -> None:
    expected = tuple(expected)
    if isinstance(got, str | None) and got in expected:
        return
    names = [name for name in expected if name is not None]
    near = difflib.get_close_matches(str(got), names)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise wrong_argument(argument, repr(got), f"one of {expected}{hint}")


def _check_density(combination_type: str, density: float | None) -> None:
    if density is None and combination_type in ("cat", "linear", "svd"):
        return
    # DARE divides by it.
    random = combination_type.startswith("dare")
    if density is None or not (0.0 < density or (density == 0.0 and not random)) or density > 1.0:
        expected = "a share above 0, up to 1" if random else "a share from 0 to 1"
        raise wrong_argument(
            "density", density, f"{expected}, for combination_type={combination_type!r}"
        )


def _new_rank(ranks: list[int], combination_type: str, svd_rank: int | None) -> int:
    if combination_type == "cat":
        return sum(ranks)
    if combination_type in SVD:
        return svd_rank or max(ranks)
    if len(set(ranks)) != 1:
        raise wrong_argument(
            "adapters",
            f"ranks {ranks}",
            f"equal ranks for combination_type={combination_type!r}; 'cat' and the types with "
            "'svd' take any",
        )
    return ranks[0]
