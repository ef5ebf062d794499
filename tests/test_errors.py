"""Wrong arguments are refused by name, with what was got and expected, and nothing is changed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from wrong_calls_of_several import (
    GROUPED,
    GROUPED_BWD,
    GROUPED_BWD_CASES,
    GROUPED_CASES,
    MULTI,
    MULTI_BWD,
    MULTI_BWD_CASES,
    MULTI_CASES,
    ORDER_CASES,
    STACK_BWD_CASES,
    STACK_CASES,
    STACK_ORDER_CASES,
    STACKED_BWD,
    STACKED_CALL,
    STATE,
    Arguments,
    Case,
    T,
)

import lora_ext
from lora_ext import lora_state_dict, mark_only_lora_as_trainable, replace_linear
from lora_ext.errors import AlreadyMergedError, NotMergedError
from lora_ext.functional import column_scale, dora_linear, dropout, weight_norm
from lora_ext.nn import Linear

OPS, NAN, INF = torch.ops.lora_ext, float("nan"), float("inf")


def lora_linear(scaling: float, scaling_tensor: Tensor | None, **arguments: Any) -> Tensor:
    scale = scaling if scaling_tensor is None else scaling_tensor
    return lora_ext.lora_linear(**arguments, scaling=scale)


# Right arguments, for M = 5, N = 3, K = 4, r = 2; each case replaces some of them.
AB: Arguments = {"lora_A": T(2, 4), "lora_B": T(3, 2)}
SCALE: Arguments = {"scaling": 1.0, "scaling_tensor": None, "dropout_p": 0.0, "rng_state": None}
FWD: Arguments = {"x": T(5, 4), "weight": T(3, 4), "bias": T(3), "lora_bias": T(3), **AB, **SCALE}
BWD: Arguments = {"dy": T(5, 3), "x": T(5, 4), "h": T(5, 2), "weight": T(3, 4), **AB, **SCALE}
BWD["mask"] = [True] * 6
MERGE: Arguments = {"weight": T(3, 4), "scaling": 1.0, **AB}
SCALES: Arguments = {"z": T(5, 3), "scale": T(3), "bias": T(3)}
SCALES_BWD: Arguments = {"dy": T(5, 3), "z": T(5, 3), "scale": T(3), "mask": [True] * 3}
DROPOUT: Arguments = {"x": T(5, 4), "rng_state": STATE, "dropout_p": 0.5}
DORA: Arguments = {"x": T(5, 4), "weight": T(3, 4), "bias": T(3), **AB, "scale": T(3)}
DORA |= {"scaling": 1.0, "dropout_p": 0.5, "rng_state": STATE}
DORA_BWD: Arguments = {"dy": T(5, 3), "x": T(5, 4), "v": T(5, 3), "weight": T(3, 4), **AB}
DORA_BWD |= {"scale": T(3), "scaling": 1.0, "dropout_p": 0.5, "rng_state": STATE}
DORA_BWD["mask"] = [True] * 5
MASK: Arguments = {"rng_state": STATE, "rows": 2, "columns": 3, "dropout_p": 0.5}

META = "got device meta, expected cpu, where the input is; it has no values yet"
INT: Arguments = {"x": T(5, 4).int(), "dy": T(5, 3).int(), "weight": T(3, 4).int()}
BASES = "got dtype int32, expected float64, float32, bfloat16 or float16"
INT64 = "expected an int64 tensor [2] from draw_rng_state(x)"
DROP: Arguments = {"dropout_p": 0.5}
ADAPTER_CASES: list[Case] = [
    ({"lora_A": T(2, 4, device="meta")}, RuntimeError, f"lora_A: {META}"),
    ({"lora_B": T(3, 2, device="meta")}, RuntimeError, f"lora_B: {META}"),
    ({"lora_A": T(4)}, ValueError, "lora_A: got shape [4], expected [r, 4]"),
    ({"lora_B": T(3)}, ValueError, "lora_B: got shape [3], expected [3, 2]"),
    ({"lora_B": T(3, 5)}, ValueError, "lora_B: got shape [3, 5], expected [3, 2]"),
    ({"lora_B": T(6, 2)}, ValueError, "lora_B: got shape [6, 2], expected [3, 2]"),
    (
        {"lora_A": T(2, 4).double()},
        TypeError,
        "lora_A: got dtype float64 on a float32 base, expected",
    ),
    ({"lora_B": T(3, 2).half()}, TypeError, "lora_B: got dtype float16, expected lora_A's float32"),
]
WRONG_K: Case = ({"lora_A": T(2, 5)}, ValueError, "lora_A: got shape [2, 5], expected [r, 4]")
P_CASES: list[Case] = [
    ({"dropout_p": p}, ValueError, f"dropout_p: got {p}, expected a probability from 0 to 1")
    for p in (-0.5, 1.5, NAN)
]
COMMON_CASES: list[Case] = [
    *(ADAPTER_CASES + P_CASES),
    ({"scaling_tensor": T(1)}, ValueError, "scaling: got a float32 tensor of shape [1], expected"),
    ({"scaling_tensor": T(()).int()}, ValueError, "scaling: got a int32 tensor of shape [], exp"),
    ({"scaling_tensor": T(()).requires_grad_()}, ValueError, "scaling: got a tensor that requires"),
    ({"scaling_tensor": T((), device="meta")}, RuntimeError, f"scaling: {META}"),
    (DROP | {"rng_state": STATE.to("meta")}, RuntimeError, f"rng_state: {META}"),
    (DROP | {"rng_state": STATE.int()}, ValueError, f"rng_state: got int32 of shape [2], {INT64}"),
    (DROP | {"rng_state": T(3).long()}, ValueError, f"rng_state: got int64 of shape [3], {INT64}"),
    ({"weight": T(3, 4, device="meta")}, RuntimeError, f"weight: {META}"),
    ({"weight": T(3, 5)}, ValueError, "weight: got shape [3, 5], expected [out_features, 4]"),
    ({"weight": T(12)}, ValueError, "weight: got shape [12], expected [out_features, 4]"),
    (
        {"weight": T(3, 4).half()},
        TypeError,
        "weight: got dtype float16, expected the input's float32",
    ),
]
FWD_CASES: list[Case] = [
    *COMMON_CASES,
    WRONG_K,
    ({"x": T(())}, ValueError, "x: got a 0-d tensor, expected [..., in_features]"),
    (INT, TypeError, f"x: {BASES}"),
]
for vector in ("bias", "lora_bias"):
    FWD_CASES += [
        ({vector: T(3, device="meta")}, RuntimeError, f"{vector}: {META}"),
        ({vector: T(4)}, ValueError, f"{vector}: got shape [4], expected [3]"),
        ({vector: T(3, 1)}, ValueError, f"{vector}: got shape [3, 1], expected [3]"),
        ({vector: T(3).half()}, TypeError, f"{vector}: got dtype float16, expected float32"),
    ]
NO_STATE: Case = (DROP, ValueError, "rng_state: got None with dropout_p 0.5, expected an int64")
ONLY_B = [False, False, False, False, True, False]
BWD_CASES: list[Case] = [
    *COMMON_CASES,
    NO_STATE,
    ({"dy": T(())}, ValueError, "dy: got a 0-d tensor, expected [..., out_features]"),
    (INT, TypeError, f"dy: {BASES}"),
    ({"weight": None}, ValueError, "weight: got None, expected [out_features, in_features]"),
    ({"weight": T(7, 4)}, ValueError, "weight: got shape [7, 4], expected [3, 4]"),
    ({"x": None}, ValueError, "x: got None, expected [..., in_features]"),
    ({"x": None, "h": None, "mask": ONLY_B}, ValueError, "h: got None without x, expected [M, r]"),
    ({"x": T(6, 4)}, ValueError, "x: got shape [6, 4], expected dy's [5, 3] with in_features 4"),
    ({"x": T(5, 4).half()}, TypeError, "x: got dtype float16, expected dy's float32"),
    ({"x": T(5, 4, device="meta")}, RuntimeError, f"x: {META}"),
    ({"h": T(4, 2)}, ValueError, "h: got shape [4, 2], expected [M, 2]"),
    ({"h": T(5, 2).half()}, TypeError, "h: got dtype float16, expected float32, in which"),
    ({"h": T(5, 2, device="meta")}, RuntimeError, f"h: {META}"),
]
MERGE_CASES: list[Case] = [
    *ADAPTER_CASES,
    WRONG_K,
    ({"weight": T(12)}, ValueError, "weight: got shape [12], expected [out_features, in_features]"),
    (INT, TypeError, f"weight: {BASES}"),
]
BAD_SUM = "the merged weight would hold NaN or Inf (in the weight, lora_A, lora_B or by overflow of"
MERGE_CPU_CASES: list[Case] = [
    ({"weight": T(6, 8)[::2, ::2]}, ValueError, "weight: got strides [16, 2], expected rows or"),
    ({"weight": T(1, 4).expand(3, 4)}, ValueError, "weight: got strides [0, 1], expected"),
    ({"lora_A": T(2, 4) + INF}, ValueError, f"{BAD_SUM} float32), expected finite values"),
    ({"scaling": NAN}, ValueError, f"{BAD_SUM} float32), expected finite values"),
]
WEIGHT_SCALE_CASES: list[Case] = [
    ({"weight_scale": T(4)}, ValueError, "weight_scale: got shape [4], expected [3], one entry"),
    ({"weight_scale": T(3).int()}, TypeError, "weight_scale: got dtype int32, expected a floating"),
    ({"weight_scale": T(3, device="meta")}, RuntimeError, f"weight_scale: {META}"),
    ({"weight_scale": T(3) + INF}, ValueError, f"{BAD_SUM} float32), expected finite values"),
]
FACTOR_CASES: list[Case] = [
    ({"scale": T(4)}, ValueError, "scale: got shape [4], expected [3], one entry"),
    ({"scale": T(3, 1)}, ValueError, "scale: got shape [3, 1], expected [3]"),
    ({"scale": T(3).int()}, TypeError, "scale: got dtype int32, expected a floating-point one"),
    ({"scale": T(3, device="meta")}, RuntimeError, f"scale: {META}"),
]
SCALES_CASES: list[Case] = [
    *FACTOR_CASES,
    ({"z": T(5, 3).int()}, TypeError, f"z: {BASES}"),
    ({"z": T(())}, ValueError, "z: got a 0-d tensor, expected [..., columns]"),
    ({"bias": T(4)}, ValueError, "bias: got shape [4], expected [3], one entry"),
    ({"bias": T(3).int()}, TypeError, "bias: got dtype int32, expected a floating-point one"),
    ({"bias": T(3, device="meta")}, RuntimeError, f"bias: {META}"),
]
SCALES_BWD_CASES: list[Case] = [
    *FACTOR_CASES,
    ({"dy": T(5, 3).int()}, TypeError, f"dy: {BASES}"),
    ({"z": None}, ValueError, "z: got None, expected [..., columns] for the gradient of scale"),
    ({"z": T(6, 3)}, ValueError, "z: got shape [6, 3], expected dy's [5, 3]"),
    ({"z": T(5, 3).half()}, TypeError, "z: got dtype float16, expected dy's float32"),
    ({"z": T(5, 3, device="meta")}, RuntimeError, f"z: {META}"),
]
STATE_CASES: list[Case] = [
    ({"dropout_p": p, "rng_state": state}, error, message)
    for p in (0.0, 0.5)
    for state, error, message in (
        (STATE.int(), ValueError, f"rng_state: got int32 of shape [2], {INT64}"),
        (STATE.to("meta"), RuntimeError, f"rng_state: {META}"),
    )
]
DORA_CASES: list[Case] = [
    case
    for case in (*FWD_CASES, *FACTOR_CASES, *STATE_CASES)
    if not case[0].keys() & {"scaling_tensor", "lora_bias"}
]
DORA_BWD_CASES: list[Case] = [
    case
    for case in (*BWD_CASES, *FACTOR_CASES, *STATE_CASES)
    if not case[0].keys() & {"scaling_tensor", "h"} and case is not NO_STATE
]
DORA_BWD_CASES += [
    ({"v": None}, ValueError, "v: got None, expected [..., out_features] for the gradient of"),
    ({"v": T(6, 3)}, ValueError, "v: got shape [6, 3], expected dy's [5, 3]"),
    ({"v": T(5, 3).half()}, TypeError, "v: got dtype float16, expected dy's float32"),
    ({"v": T(5, 3, device="meta")}, RuntimeError, f"v: {META}"),
]
DROPOUT_CASES: list[Case] = [
    *P_CASES,
    ({"x": T(5, 4).int()}, TypeError, f"x: {BASES}"),
    ({"x": T(())}, ValueError, "x: got a 0-d tensor, expected [..., columns]"),
    ({"rng_state": STATE.int()}, ValueError, f"rng_state: got int32 of shape [2], {INT64}"),
    ({"rng_state": STATE.to("meta")}, RuntimeError, f"rng_state: {META}"),
]
MASK_CASES: list[Case] = [
    *P_CASES,
    ({"rng_state": STATE.int()}, ValueError, f"rng_state: got int32 of shape [2], {INT64}"),
    ({"rng_state": T(3).long()}, ValueError, f"rng_state: got int64 of shape [3], {INT64}"),
    ({"rows": -1}, ValueError, "rows, columns: got -1, 3, expected sizes of at least 0"),
    ({"columns": -1}, ValueError, "rows, columns: got 2, -1, expected sizes of at least 0"),
]
# V = 4, D = 3, r = 2 and two tokens.
LOOKUP: Arguments = {"indices": T(2).long(), "weight": T(4, 3), **AB}
LOOKUP_BWD: Arguments = {"dy": T(2, 3), "indices": T(2).long(), **AB, "scaling": 1.0}
LOOKUP_BWD |= {"padding_idx": -1, "scale_grad_by_freq": False, "mask": [True, True]}
INDEX_CASES: list[Case] = [
    ({"indices": T(2)}, TypeError, "indices: got dtype float32, expected int64 or int32"),
    ({"indices": T(2, device="meta").long()}, RuntimeError, f"indices: {META}"),
]
LOOKUP_CASES: list[Case] = [
    *(ADAPTER_CASES + INDEX_CASES),
    WRONG_K,
    ({"weight": T(12)}, ValueError, "weight: got shape [12], expected [num_embeddings, embedding"),
    (INT, TypeError, f"weight: {BASES}"),
]
LOOKUP_BWD_CASES: list[Case] = [
    *(ADAPTER_CASES[:2] + ADAPTER_CASES[3:] + INDEX_CASES),
    ({"dy": T(2, 3, 1)}, ValueError, "dy: got shape [2, 3, 1], expected that of indices, [2], and"),
    ({"dy": T(5, 3)}, ValueError, "dy: got shape [5, 3], expected that of indices, [2], and"),
    ({"dy": T(2, 3).int()}, TypeError, f"dy: {BASES}"),
]
RANGE_CASES: list[Case] = [
    ({"indices": T(2).long() + i}, IndexError, f"indices: index out of range: got {i}, expected 0")
    for i in (-1, 4)
]
# Two slots, of rows 0 and 3, and of row 1.

OPERATORS = {
    "lora_embedding": (lora_ext.lora_embedding, "lora_embedding", LOOKUP, LOOKUP_CASES),
    "embedding bwd": (OPS.lora_embedding_bwd, "lora_embedding_bwd", LOOKUP_BWD, LOOKUP_BWD_CASES),
    "lora_embedding, on cpu": (lora_ext.lora_embedding, "lora_embedding", LOOKUP, RANGE_CASES),
    "embedding bwd, on cpu": (
        OPS.lora_embedding_bwd,
        "lora_embedding_bwd",
        LOOKUP_BWD,
        RANGE_CASES,
    ),
    "lora_ext.lora_linear": (lora_linear, "lora_linear", FWD, FWD_CASES),
    "fwd": (OPS.lora_linear_fwd, "lora_linear", FWD, [*FWD_CASES, NO_STATE]),
    "bwd": (OPS.lora_linear_bwd, "lora_linear_bwd", BWD, BWD_CASES),
    "grouped": (OPS.lora_linear_grouped, "lora_linear_grouped", GROUPED, GROUPED_CASES),
    "grouped, on cpu": (OPS.lora_linear_grouped, "lora_linear_grouped", GROUPED, ORDER_CASES),
    "grouped bwd": (
        OPS.lora_linear_grouped_bwd,
        "lora_linear_grouped_bwd",
        GROUPED_BWD,
        GROUPED_BWD_CASES,
    ),
    "stack": (OPS.lora_linear_grouped, "lora_linear_grouped", STACKED_CALL, STACK_CASES),
    "stack, on cpu": (
        OPS.lora_linear_grouped,
        "lora_linear_grouped",
        STACKED_CALL,
        STACK_ORDER_CASES,
    ),
    "stack bwd": (
        OPS.lora_linear_grouped_bwd,
        "lora_linear_grouped_bwd",
        STACKED_BWD,
        STACK_BWD_CASES,
    ),
    "multi": (OPS.lora_linear_multi, "lora_linear_multi", MULTI, MULTI_CASES),
    "multi bwd": (OPS.lora_linear_multi_bwd, "lora_linear_multi_bwd", MULTI_BWD, MULTI_BWD_CASES),
    "merge_": (OPS.merge_, "merge_", MERGE, MERGE_CASES),
    "merge_, on cpu": (OPS.merge_, "merge_", MERGE, MERGE_CPU_CASES),
    "merge_, scaled, on cpu": (
        OPS.merge_,
        "merge_",
        {**MERGE, "weight_scale": T(3)},
        WEIGHT_SCALE_CASES,
    ),
    "weight_norm": (weight_norm, "weight_norm", MERGE, MERGE_CASES),
    "weight_norm, on cpu": (weight_norm, "weight_norm", MERGE, MERGE_CPU_CASES[:2]),
    "column_scale": (column_scale, "column_scale", SCALES, SCALES_CASES),
    "column_scale_bwd": (OPS.column_scale_bwd, "column_scale_bwd", SCALES_BWD, SCALES_BWD_CASES),
    "dora_linear": (dora_linear, "dora_linear", DORA, DORA_CASES),
    "dora bwd": (OPS.dora_linear_bwd, "dora_linear_bwd", DORA_BWD, DORA_BWD_CASES),
    "dropout": (dropout, "dropout", DROPOUT, DROPOUT_CASES),
    "dropout_mask, on cpu": (lora_ext.dropout_mask, "dropout_mask", MASK, MASK_CASES),
}


def on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [on_meta(one) for one in value]
    if not isinstance(value, Tensor):
        return value
    return value.to("meta").detach().requires_grad_(value.requires_grad)


@pytest.mark.parametrize(
    ("operator", "case", "device"),
    [
        pytest.param(operator, case, device, id=f"{operator} {device} {case[2]}")
        for operator, (_, _, _, wrong) in OPERATORS.items()
        for case in wrong
        for device in ("cpu", "meta")
        if device == "cpu" or (META not in case[2] and "on cpu" not in operator)
    ],
)
def test_operator_refuses(operator: str, case: Case, device: str) -> None:
    call, name, right, _ = OPERATORS[operator]
    changes, error, message = case
    arguments = {key: changes.get(key, right[key]) for key in right}
    if device == "meta":
        arguments = {k: on_meta(v) for k, v in arguments.items()}
    tensors = [t for t in arguments.values() if isinstance(t, Tensor) and not t.is_meta]
    before = [t.detach().clone() for t in tensors]
    with pytest.raises(error) as raised:
        call(**arguments)
    assert f"{name}: {message}" in str(raised.value) and type(raised.value) is error
    assert all(torch.equal(now, then) for now, then in zip(tensors, before, strict=True))


def layer_of(**options: Any) -> Linear:
    return Linear(4, 3, **{"r": 2, "init_lora_weights": False, **options})


def merged() -> Linear:
    layer = layer_of()
    layer.merge()
    return layer


def one_layer(pruned: str | None = None) -> nn.Sequential:
    layer = nn.Linear(4, 3)
    return nn.Sequential(prune.l1_unstructured(layer, pruned, 0.5) if pruned else layer)


def swap(targets: Any) -> Callable[[nn.Module], Any]:
    return lambda model: replace_linear(model, targets)


BAD_OPTIONS: list[tuple[Arguments, str]] = [
    ({"r": -1}, "r: got -1, expected an integer of at least 1"),
    ({"r": 2.0}, "r: got 2.0, expected an integer of at least 1"),
    ({"lora_alpha": INF}, "lora_alpha: got inf, expected a finite number"),
    ({"lora_dropout": -0.5}, "lora_dropout: got -0.5, expected a probability"),
    ({"lora_dropout": 1.5}, "lora_dropout: got 1.5, expected a probability"),
    ({"lora_dropout": NAN}, "lora_dropout: got nan, expected a probability"),
    ({"use_dora": True, "lora_bias": True}, "lora_bias: got True with use_dora=True, expected"),
    ({"init_lora_weights": "pizza"}, "init_lora_weights: got 'pizza', expected True, False or"),
]
TARGETS = "replace_linear: target_modules:"
BIASES = "bias: got 'lora', expected one of ('none', 'all', 'lora_only')"
ModuleCase = tuple[nn.Module, Callable[[Any], Any], type[Exception], str]
MODULE_CASES: list[ModuleCase] = [
    (one_layer(), lambda m, o=o: Linear.from_linear(m[0], **o), ValueError, f"adapter: {message}")
    for o, message in BAD_OPTIONS
]
MODULE_CASES += [
    (layer_of(), Linear.from_linear, TypeError, "Linear: base: got Linear, expected a torch.nn"),
    (
        one_layer("weight"),
        lambda m: Linear.from_linear(m[0]),
        ValueError,
        "Linear: base: computes its",
    ),
    (
        one_layer("bias"),
        lambda m: Linear.from_linear(m[0]),
        ValueError,
        "Linear: base: computes its",
    ),
    (
        layer_of(r=0),
        Linear.merge,
        ValueError,
        "Linear.merge: there is no active adapter, expected",
    ),
    (merged(), Linear.merge, AlreadyMergedError, "Linear.merge: already merged; call unmerge()"),
    (layer_of(), Linear.unmerge, NotMergedError, "Linear.unmerge: not merged; call merge() first"),
    (layer_of(bias=False, lora_bias=True), Linear.merge, ValueError, "merge: lora_bias cannot be"),
    (nn.ReLU(), lambda _: swap(["0"])({}), TypeError, "replace_linear: model: got dict, expected"),
    (nn.Linear(4, 3), swap(".*"), ValueError, f"{TARGETS} names the model itself"),
    (nn.Linear(4, 3), swap("all-linear"), ValueError, f"{TARGETS} names the model itself"),
    (one_layer(), swap(["1"]), ValueError, f"{TARGETS} ['1'] matches no module"),
    (one_layer(), swap([]), ValueError, f"{TARGETS} [] matches no module"),
    (
        nn.Sequential(nn.ReLU()),
        swap(["0"]),
        ValueError,
        f"{TARGETS} '0' is a torch.nn.modules.activation.ReLU, expected exa",
    ),
    (one_layer("weight"), swap(["0"]), ValueError, f"{TARGETS} '0' computes its weight"),
    (layer_of(), lambda m: lora_state_dict(m, "lora"), ValueError, f"lora_state_dict: {BIASES}"),
    (layer_of(), lambda m: mark_only_lora_as_trainable(m, "lora"), ValueError, f"able: {BIASES}"),
]


@pytest.mark.parametrize("case", MODULE_CASES, ids=[case[3] for case in MODULE_CASES])
def test_module_refuses(case: ModuleCase) -> None:
    module, call, error, message = case
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    structure, modules = repr(module), list(module.modules())
    with pytest.raises(error) as raised:
        call(module)
    assert message in str(raised.value)
    assert repr(module) == structure
    assert all(now is then for now, then in zip(module.modules(), modules, strict=True))
    assert all(torch.equal(now, before[name]) for name, now in module.state_dict().items())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_a_lazy_layer_has_to_be_called_first() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(TypeError, match=r"UninitializedParameter.*call the model once first"):
        lora_ext.get_lora_model(model, lora_ext.LoraConfig(target_modules=["0"]))


def test_unknown_cpu_capability_is_refused_at_import() -> None:
    environment = os.environ | {"LORA_EXT_CPU_CAPABILITY": "avx1024"}
    command = [sys.executable, "-c", "import lora_ext"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    message = "LORA_EXT_CPU_CAPABILITY: got 'avx1024', expected 'default', 'avx2', 'avx512', "
    assert result.returncode != 0 and message in result.stderr
