"""Adapters on Megatron's parallel linear layers, divided between two processes, compute what the
undivided layer does in float64. Megatron's own layers run, from the package megatron-core, on the
CPU: they ask for the current CUDA device where they gather, which is the CPU in these processes.
"""

from __future__ import annotations

import functools
import itertools
import os
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import assert_passed, names_of_checks, run_checks, shared_folder
from torch import Tensor, nn

import lora_ext
from lora_ext import LoraConfig, LoraModel
from lora_ext.functional import dropout

# Beside the environment, as those of quantized_libraries: others look for it wherever it is.
FOLDER = Path(os.environ.get("LORA_EXT_MEGATRON", Path(sys.prefix, "megatron")))
S, BATCH, K, N, R, ALPHA = 4, 3, 8, 6, 2, 6

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "column": ("ColumnParallelLinear", {"gather_output": False, "bias": True}),
    "gathered": ("ColumnParallelLinear", {"gather_output": True, "bias": True}),
    "row": ("RowParallelLinear", {"input_is_parallel": True, "bias": True}),
    "scattered": ("RowParallelLinear", {"input_is_parallel": False, "bias": True}),
}
_SEEDS = itertools.count(1)


@functools.cache
def core() -> Any:
    """megatron.core, its groups made, of all processes that there are."""
    sys.path.append(str(FOLDER))
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core
        import megatron.core.parallel_state
        import megatron.core.tensor_parallel
        import megatron.core.transformer.transformer_config

    found: Any = megatron.core
    found.parallel_state.initialize_model_parallel(torch.distributed.get_world_size())
    return found


def settings_of_megatron(**options: Any) -> Any:
    size = torch.distributed.get_world_size()
    return core().transformer.transformer_config.TransformerConfig(
        num_layers=1,
        hidden_size=K,
        num_attention_heads=2,
        use_cpu_initialization=True,
        tensor_model_parallel_size=size,
        **{"params_dtype": torch.float64, **options},
    )


def base(
    kind: str, *, skip_bias_add: bool = False, inputs: int = K, outputs: int = N, **options: Any
) -> Any:
    name, own = KINDS[kind]
    torch.manual_seed(0)  # Megatron makes the whole weight in each process
    layer = getattr(core().tensor_parallel, name)(
        inputs,
        outputs,
        config=settings_of_megatron(**options),
        init_method=nn.init.normal_,
        skip_bias_add=skip_bias_add,
        **own,
    )
    torch.manual_seed(1 + torch.distributed.get_rank())
    nn.init.normal_(layer.bias)
    if is_row(kind):
        torch.distributed.broadcast(layer.bias.detach(), 0)
    return layer


def all_of(tensor: Tensor, dim: int) -> Tensor:
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts, dim)


def part_of(tensor: Tensor, dim: int) -> Tensor:
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return tensor.chunk(size, dim)[rank].contiguous()


def is_row(kind: str) -> bool:
    return KINDS[kind][0] == "RowParallelLinear"


class Net(nn.Module):
    """A column-parallel layer and a row-parallel one, as in a transformer's MLP."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.up = base("column", inputs=K, outputs=N, **options)
        self.down = base("row", inputs=N, outputs=K, **options)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.up(x)
        y, _ = self.down(torch.tanh(h))
        return y


class Plain(nn.Module):
    """The same undivided."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(K, N).double(), nn.Linear(N, K).double()

    def forward(self, x: Tensor) -> Any:
        return self.down(torch.tanh(self.up(x)))


def adapted(module: nn.Module, *, float32: bool = False, **options: Any) -> LoraModel:
    """With adapters that are not zero, of which no process has another's part."""
    names = ["up", "down"] if isinstance(module, Net) else ["0"]
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=names, **options)
    model = lora_ext.get_lora_model(module, config, autocast_adapter_dtype=float32)
    torch.manual_seed(100 * next(_SEEDS) + torch.distributed.get_rank())
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
            if not hasattr(parameter, "tensor_model_parallel"):
                torch.distributed.broadcast(parameter.data, 0)
    return model


def whole_weights(layer: Any, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W, bias, lora_A, lora_B) of the undivided layer, all of them leaves in float64."""
    weight, bias = layer.base_layer.weight, layer.base_layer.bias
    if is_row(kind):
        found = all_of(weight, 1), bias, all_of(layer.lora_A, 1), layer.lora_B
    else:
        found = all_of(weight, 0), all_of(bias, 0), layer.lora_A, all_of(layer.lora_B, 0)
    W, b, A, B = (one.detach().double().clone().requires_grad_() for one in found)
    return W, b, A, B


def one_layer(kind: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    of_base = ("skip_bias_add", "sequence_parallel")
    own = {name: options.pop(name) for name in of_base if name in options}
    model = adapted(nn.Sequential(base(kind, params_dtype=dtype, **own)), **options)
    return model.get_base_model()[0]


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype, terms: int) -> None:
    """Of sums of `terms` products: each rounds by half a unit of the largest, at most."""
    scale = max(1.0, want.abs().max().item())
    tolerance = torch.finfo(dtype).eps * scale * terms
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


def check_step(
    kind: str,
    *,
    dtype: torch.dtype = torch.float64,
    p: float = 0.0,
    in_sequence: bool = False,
    **options: Any,
) -> None:
    """Results and all gradients of one step."""
    row = is_row(kind)
    layer = one_layer(kind, dtype, lora_dropout=p, sequence_parallel=in_sequence, **options)
    W, b, A, B = whole_weights(layer, kind)
    torch.manual_seed(3)
    x = torch.randn(S, BATCH, K, dtype=torch.float64).to(dtype)
    dy = torch.randn(S, BATCH, N, dtype=torch.float64).to(dtype)
    given = x
    if row and kind == "row":
        given = part_of(x, -1)
    elif in_sequence:
        given = part_of(x, 0)
    own_x = given.clone().requires_grad_()

    torch.manual_seed(5)
    y, bias = layer(own_x)
    skipped = bias is not None
    keep = torch.ones_like(x, dtype=torch.float64)
    if p:
        torch.manual_seed(5)
        keep = mask_of(given, p, kind, in_sequence)
    d = (whole_x := x.double().clone().requires_grad_()) * keep
    scaling = ALPHA / (R**0.5 if options.get("use_rslora") else R)
    want = whole_x @ W.T + (0.0 if skipped else b) + scaling * (d @ A.T @ B.T)

    divided = None if kind in ("gathered", "scattered") else (-1 if not row else None)
    if row and in_sequence:
        divided = 0
    own = want if divided is None else part_of(want, divided)
    assert_close(y, own, dtype, K + R)
    own_dy = dy if divided is None else part_of(dy, divided)
    y.backward(own_dy)
    want.backward(dy.double())

    terms = S * BATCH * (N + K)
    dx = whole_x.grad
    assert dx is not None and own_x.grad is not None
    if kind == "row":
        dx = part_of(dx, -1)
    elif in_sequence:
        dx = part_of(dx, 0)
    assert_close(own_x.grad, dx, dtype, terms)
    assert layer.base_layer.weight.grad is None
    assert A.grad is not None and B.grad is not None
    assert_close(layer.lora_A.grad, part_of(A.grad, 1) if row else A.grad, dtype, terms)
    assert_close(layer.lora_B.grad, B.grad if row else part_of(B.grad, 0), dtype, terms)


def mask_of(given: Tensor, p: float, kind: str, in_sequence: bool) -> Tensor:
    """The factors of dropout on the undivided x, of what each process drew."""
    state = lora_ext.functional.draw_rng_state(given)
    alike = not is_row(kind) and not in_sequence
    if not alike:
        state[0] += torch.distributed.get_rank() * 0x9E3779B97F4A7C15 % 2**62
    shape = (S, BATCH, K // 2) if is_row(kind) else tuple(given.shape)
    keep = dropout(torch.ones(shape, dtype=torch.float64), state, p)
    assert 0 < (keep == 0).sum() < keep.numel()
    if alike:
        return keep
    return all_of(keep, -1 if is_row(kind) else 0)


# What both processes run, once for this file


def check_column_parallel() -> None:
    check_step("column")


def check_column_parallel_that_gathers() -> None:
    check_step("gathered")


def check_row_parallel() -> None:
    check_step("row")


def check_row_parallel_of_an_undivided_x() -> None:
    check_step("scattered")


def check_bias_that_the_caller_adds() -> None:
    check_step("column", skip_bias_add=True)
    check_step("row", skip_bias_add=True)


def check_rslora() -> None:
    check_step("column", use_rslora=True)
    check_step("row", use_rslora=True)


def check_float32() -> None:
    check_step("column", dtype=torch.float32)
    check_step("row", dtype=torch.float32)


def check_float32_on_bfloat16() -> None:
    for kind in ("column", "row"):
        check_step(kind, dtype=torch.bfloat16, float32=True)
        assert one_layer(kind, torch.bfloat16, float32=True).lora_A.dtype == torch.float32


def check_dropout() -> None:
    for kind in KINDS:
        check_step(kind, p=0.5)


def check_sequence_parallel() -> None:
    for p in (0.0, 0.5):
        check_step("column", in_sequence=True, p=p)
        check_step("row", in_sequence=True, p=p)


def check_generators_that_differ_are_refused() -> None:
    layer = one_layer("column", lora_dropout=0.5)
    torch.manual_seed(torch.distributed.get_rank())
    with pytest.raises(ValueError, match="drew different dropout states"):
        layer(torch.randn(S, BATCH, K, dtype=torch.float64))


def check_initialised_as_one() -> None:
    """As the undivided layer is in the first process, whatever the others' generators say."""
    for kind in ("column", "row"):
        for init in (True, "gaussian", "orthogonal"):
            torch.manual_seed(7 + torch.distributed.get_rank())
            config = LoraConfig(r=R, target_modules=["0"], init_lora_weights=init)
            model = lora_ext.get_lora_model(nn.Sequential(base(kind)), config)
            layer = model.get_base_model()[0]
            tensors = layer.peft_tensors("default")
            assert {key: tuple(one.shape) for key, one in tensors.items()} == {
                "lora_A.weight": (R, K),
                "lora_B.weight": (N, R),
            }
            for key, one in tensors.items():
                assert bool(one.any()) == (key[5] == "A" or init == "orthogonal")
                first = one.clone()
                torch.distributed.broadcast(first, 0)
                assert torch.equal(first, one)
            if kind == "row":  # no process has another's part
                A = tensors["lora_A.weight"]
                assert not torch.equal(*A.chunk(2, 1))
            before = layer.lora_A.detach().clone()
            own = layer.lora_A
            layer.reset_lora_parameters()
            assert layer.lora_A is own and not torch.equal(own, before)


def check_parameters_are_marked_for_megatron() -> None:
    for kind, part, dim in (("column", "lora_B", 0), ("row", "lora_A", 1)):
        layer = one_layer(kind)
        own = getattr(layer, part)
        assert type(own) is nn.Parameter
        assert (own.tensor_model_parallel, own.partition_dim) == (True, dim)
        other = layer.lora_A if part == "lora_B" else layer.lora_B
        assert not hasattr(other, "tensor_model_parallel")


def check_merging() -> None:
    for kind in ("column", "row"):
        layer = one_layer(kind)
        W, b, A, B = whole_weights(layer, kind)
        before = layer.base_layer.weight
        values = before.detach().clone()
        x = torch.randn(S, BATCH, K, dtype=torch.float64)
        torch.distributed.broadcast(x, 0)
        layer.merge()
        merged = layer.base_layer.weight
        assert merged.tensor_model_parallel and merged.partition_dim == int(kind == "row")
        y, _ = layer(part_of(x, -1) if kind == "row" else x)
        want = x @ (W + ALPHA / R * B @ A).T + b
        assert_close(y, want if kind == "row" else part_of(want, -1), torch.float64, K + R)
        layer.unmerge()
        assert layer.base_layer.weight is before and torch.equal(before, values)


def check_files_are_the_undivided_layers() -> None:
    """One process's worth of tensors, which load into the divided model, and into one of plain
    linear layers."""
    folder = shared_folder("adapter")
    model = adapted(Net())
    x = torch.randn(S, BATCH, K, dtype=torch.float64)
    torch.distributed.broadcast(x, 0)
    want = model(x)
    model.save_pretrained(folder)
    again = LoraModel.from_pretrained(Net(), folder, autocast_adapter_dtype=False)
    assert torch.equal(again(x), want)
    state = lora_ext.get_peft_model_state_dict(model)
    assert {key: tuple(one.shape) for key, one in state.items()} == {
        "base_model.model.up.lora_A.weight": (R, K),
        "base_model.model.up.lora_B.weight": (N, R),
        "base_model.model.down.lora_A.weight": (R, N),
        "base_model.model.down.lora_B.weight": (K, R),
    }
    third = adapted(Net())
    assert not torch.equal(third(x), want)
    lora_ext.set_peft_model_state_dict(third, state)
    assert torch.equal(third(x), want)
    net, own = Plain(), model.get_base_model()
    with torch.no_grad():
        net.up.weight.copy_(all_of(own.up.base_layer.weight, 0))
        net.up.bias.copy_(all_of(own.up.base_layer.bias, 0))
        net.down.weight.copy_(all_of(own.down.base_layer.weight, 1))
        net.down.bias.copy_(own.down.base_layer.bias)
    plain = LoraModel.from_pretrained(net, folder, autocast_adapter_dtype=False)
    torch.testing.assert_close(plain(x), want, rtol=1e-12, atol=1e-12)


def check_several_adapters_and_a_switch() -> None:
    for kind in ("column", "row"):
        layer = one_layer(kind)
        x = torch.randn(S, BATCH, K // (2 if kind == "row" else 1), dtype=torch.float64)
        torch.distributed.broadcast(x, 0)
        alone, _ = layer(x)
        plain, _ = layer.base_layer(x)
        assert not torch.equal(plain, alone)
        layer.add_adapter("more", r=3, lora_alpha=3)
        layer.set_adapter(["default", "more"])
        torch.testing.assert_close(layer(x)[0], alone, rtol=1e-12, atol=1e-12)
        layer.enable_adapters(False)
        assert torch.equal(layer(x)[0], plain)


def check_unloading_gives_the_base_back() -> None:
    model = adapted(Net())
    base_layer = model.get_base_model().up.base_layer
    assert model.unload().up is base_layer


def check_distributed_checkpoint() -> None:
    layer = one_layer("row")
    group = core().parallel_state.get_data_parallel_group()
    state = layer.sharded_state_dict("0.", (), {"dp_cp_group": group})

    def shapes(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return tuple(state[name].global_shape), tuple(state[name].local_shape)

    assert shapes("0.base_layer.weight") == ((N, K), (N, K // 2))
    assert shapes("0.lora_A") == ((R, K), (R, K // 2))
    assert shapes("0.lora_B") == ((N, R), (N, R))


def check_what_is_refused() -> None:
    def refused(match: str, kind: str = "column", **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            adapted(nn.Sequential(base(kind)), **options)

    refused("use_dora: got True", use_dora=True)
    refused("does not support lora_bias", lora_bias=True)
    refused("reads the whole weight", init_lora_weights="pissa")
    refused("reads the whole weight", init_lora_weights="mica")
    model = adapted(nn.Sequential(base("column")))
    x = torch.randn(S, BATCH, K, dtype=torch.float64)
    with pytest.raises(ValueError, match="divided between"), lora_ext.batch(["default"] * S):
        model(x)
    fields: dict[str, Any] = {"megatron_config": {"num_layers": 1}, "megatron_core": "other.core"}
    refused(r"megatron_core: got 'other\.core'", **fields)


def check_a_config_of_megatrons_is_kept() -> None:
    config = LoraConfig(target_modules=["0"], megatron_config=settings_of_megatron())
    assert config.megatron_config is not None
    assert (
        config.megatron_config["hidden_size"] == K and "params_dtype" not in config.megatron_config
    )
    assert "hidden_size" in config.to_json()
    lora_ext.get_lora_model(nn.Sequential(base("column")), config)


def check_explain_says_so() -> None:
    text = str(lora_ext.explain(adapted(nn.Sequential(base("column")))))
    assert "ColumnParallelLinear exchanges with other processes" in text


CHECKS: list[str] = names_of_checks(globals())[1:]  # but check_step, which they call


@pytest.mark.skipif(
    PathFinder.find_spec("megatron", [str(FOLDER), *sys.path]) is None,
    reason=f"megatron-core is in neither {FOLDER} nor the environment: "
    "pip install --no-deps --target FOLDER megatron-core, LORA_EXT_MEGATRON=FOLDER",
)
@pytest.mark.parametrize("check", CHECKS)
def test_on_two_processes(check: str) -> None:
    assert_passed(__file__, check)


if __name__ == "__main__":
    own: dict[str, Callable[[], None]] = {name: globals()[name] for name in CHECKS}
    run_checks(own)
