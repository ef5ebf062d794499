"""Layers of one x on the CUDA kernels, emulated on the host: against float64, and bit for bit
against calls of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from emulated import GPUS, EmulatedKernels
from emulated_multi import backward_together, check, forward_together, make_layers

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> EmulatedKernels:
    return EmulatedKernels.shared(tmp_path_factory)


# Tiles of 64 to 256 columns with tails; the third of four has no adapter
WIDTHS = [(264, 8), (72, 24), (136, 0), (328, 16)]


@pytest.mark.parametrize("schedule", [("eager", 0), ("deferred", 1), ("random", 2)], ids=str)
@pytest.mark.parametrize("family", GPUS)
def test_values_and_gradients(
    kernels: EmulatedKernels, family: str, schedule: tuple[str, int]
) -> None:
    kernels.gpu(GPUS[family], 3)
    kernels.schedule(*schedule)
    x, layers = make_layers(165, 200, WIDTHS)
    check(kernels, x, layers)
    assert kernels.path == f"cuda fused {'sm_90a' if family == 'sm90' else 'sm_80'}"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("adapter_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_types_and_weights_that_lie_transposed(
    kernels: EmulatedKernels, dtype: torch.dtype, adapter_dtype: torch.dtype, transposed: bool
) -> None:
    """Of the float adapters one is joined with its remainder, the other is not."""
    kernels.gpu(90, 4)
    kernels.schedule("random", 1)
    adapter = adapter_dtype if adapter_dtype == FP32 else dtype
    x, layers = make_layers(
        130, 136, [(200, 17), (72, 40)], dtype=dtype, adapter_dtype=adapter, transposed=transposed
    )
    check(kernels, x, layers)


def test_clusters_add_sums_of_layers(kernels: EmulatedKernels) -> None:
    """h of all by eight blocks; dh by two, to its place beside that of the other layers."""
    kernels.gpu(90, 16)
    kernels.schedule("random", 1)
    x, layers = make_layers(130, 1000, [(1000, 8), (264, 24), (136, 0)])
    kernels.take_recorded()
    check(kernels, x, layers)
    low_rank = [one for one in kernels.take_recorded() if "low_rank" in one.kernel]
    assert {one.cluster for one in low_rank} >= {2, 8}


def test_ranks_beyond_a_group(kernels: EmulatedKernels) -> None:
    """272 of three layers: groups of 128, 128 and 16."""
    kernels.gpu(90, 2)
    kernels.schedule("random", 3)
    x, layers = make_layers(70, 136, [(72, 100), (136, 64), (72, 90)])
    check(kernels, x, layers)


def test_rows_that_are_not_aligned(kernels: EmulatedKernels) -> None:
    """sm_80's kernels read them element by element, if they are asked to."""
    kernels.gpu(86, 3)
    kernels.schedule("random", 6)
    x, layers = make_layers(65, 131, [(70, 17), (33, 8)], adapter_dtype=FP32)
    check(kernels, x, layers)


def test_dropout_in_forward(kernels: EmulatedKernels) -> None:
    """Masks of each layer's own, one without; one launch of products all the same."""
    kernels.gpu(90, 4)
    kernels.schedule("random", 4)
    x, layers = make_layers(130, 136, [(200, 8), (72, 16)], dropout_p=0.2)
    layers.append(make_layers(130, 136, [(136, 8)], seed=1)[1][0])
    kernels.take_recorded()
    forward_together(kernels, x, layers)
    launched = [one.kernel for one in kernels.take_recorded() if "product" in one.kernel]
    assert len(launched) == 1 and "products_sm90_kernel" in launched[0]
    check(kernels, x, layers, backward=False)
    with pytest.raises(RuntimeError, match="alone: with dropout each layer drops of dx by a mask"):
        backward_together(kernels, x, layers, [None] * 3)


def test_what_is_launched(kernels: EmulatedKernels) -> None:
    """One pass over x for h of all, one product; in backward a pass over each dy, one over x for
    dA, one product."""
    kernels.gpu(90, 132)
    x, layers = make_layers(130, 136, [(200, 8), (72, 16), (136, 8)])

    def passes() -> list[str]:
        names = [one.kernel for one in kernels.take_recorded()]
        return [name[name.rindex("::", 0, name.index("<")) + 2 :].split("<")[0] for name in names]

    kernels.take_recorded()
    found = forward_together(kernels, x, layers)
    pack, low_rank = "lora_linear_pack_kernel", "low_rank_sm90_kernel"
    assert passes() == [pack, low_rank, "lora_linear_finish_kernel", "products_sm90_kernel"]
    backward_together(kernels, x, layers, [one["h"] for one in found])
    # Blocks add all sums of these sizes themselves; the last kernel deals out dA.
    assert passes() == [
        pack, *[low_rank] * 4, "lora_linear_reduce_kernel", "products_sm90_kernel",
    ]  # fmt: skip


@pytest.mark.parametrize("wants_x", [False, True])
def test_some_gradients(kernels: EmulatedKernels, wants_x: bool) -> None:
    """Frozen parts of adapters, and x that needs none."""
    kernels.gpu(90, 3)
    kernels.schedule("random", 5)
    x, layers = make_layers(70, 136, [(72, 8), (136, 16), (72, 24), (200, 8)])
    wants: list[tuple[str, ...]] = [("dB",), ("dA",), (), ("dA", "dB")]
    layers = [replace(layer, wants=of) for layer, of in zip(layers, wants, strict=True)]
    check(kernels, x, layers, wants_x=wants_x)


def test_the_grid_changes_nothing(
    kernels: EmulatedKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters or none; h is given, since its parts follow the number of multiprocessors."""
    kernels.schedule("eager", 0)
    x, layers = make_layers(300, 136, [(264, 8), (72, 24), (136, 0)])
    outcomes, clusters = [], set()
    kernels.take_recorded()
    for processors, off in ((2, ""), (2, "cluster"), (5, ""), (132, "cluster")):
        monkeypatch.setenv("LORA_EXT_CUDA_OFF", off)
        kernels.gpu(90, processors)
        found = forward_together(kernels, x, layers)
        hs = [one.get("h") for one in found]
        dx, _ = backward_together(kernels, x, layers, hs)
        outcomes.append([dx, *(one["y"] for one in found)])
        clusters |= {one.cluster for one in kernels.take_recorded() if "product" in one.kernel}
    assert clusters == {1, 2}
    for other in outcomes[1:]:
        for a, b in zip(outcomes[0], other, strict=True):
            assert torch.equal(a, b)  # type: ignore[arg-type]
