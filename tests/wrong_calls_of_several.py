"""Wrong arguments of the operators of many adapters and of several layers, for test_errors.py."""

from __future__ import annotations

from typing import Any

import torch

Arguments = dict[str, Any]
Case = tuple[Arguments, type[Exception], str]  # what is wrong, what is raised, what it says
T = torch.zeros
STATE = T(2, dtype=torch.int64)

# Right arguments, for M = 5, N = 3, K = 4; each case replaces some of them.
ROWS: Arguments = {"order": torch.tensor([0, 3, 1], dtype=torch.int32), "counts": [2, 1]}
SLOTS: Arguments = {"lora_A": [T(2, 4), T(1, 4)], "lora_B": [T(3, 2), T(3, 1)], "lora_bias": []}
SLOTS |= {**ROWS, "factor": None, "scaling": [1.0, 1.0], "dropout_p": [0.0, 0.0]}
ONE_SLOT: Arguments = {"lora_A": [T(2, 4)], "lora_B": [T(3, 2)], "counts": [4]}
ONE_SLOT |= {"scaling": [1.0], "dropout_p": [0.0]}
GROUPED: Arguments = {"x": T(5, 4), "weight": T(3, 4), "bias": T(3), **SLOTS}
STACKED: Arguments = {"weight_rows": [], "weight_slots": []}
GROUPED |= {"rng_state": None, "rounds": [], **STACKED}
GROUPED_BWD: Arguments = {"dy": T(5, 3), "x": T(5, 4), "h": T(5), "weight": T(3, 4), **SLOTS}
GROUPED_BWD |= {"rng_state": None, "rounds": [], **STACKED, "wanted": [3, 3]}
GROUPED_BWD |= {"mask": [True, True, True, False]}
SLOT_CASES: list[Case] = [
    ({"lora_A": []}, ValueError, "lora_A: got no adapters, expected at least one"),
    *(
        ({name: value}, ValueError, f"{name}: got 1 entries, expected 2, one for each of lora_A")
        for name, value in (
            *(("lora_B", [T(3, 2)]), ("lora_bias", [T(3)]), ("counts", [3]), ("scaling", [1.0])),
            ("dropout_p", [0.0]),
        )
    ),
    ({"lora_A": [T(2, 4), T(1, 5)]}, ValueError, "lora_A: got shape [1, 5], expected [r, 4]"),
    ({"lora_bias": [T(3), T(4)]}, ValueError, "lora_bias: got shape [4], expected [3]"),
    ({"counts": [4, -1]}, ValueError, "counts: got -1, expected numbers of rows"),
    ({"rounds": [0, 2]}, ValueError, "rounds: got 2 numbers, with 1 rows of slot 1 left, expected"),
    ({"rounds": [0, 3, 0, 1]}, ValueError, "rounds: got (0, 3) in slot 0 after round -1, with 2"),
    (
        {"rounds": [0, 2, 0, 1, 1]},
        ValueError,
        "rounds: got 5 numbers, expected pairs (round, rows)",
    ),
    ({"order": T(3)}, ValueError, "order: got float32 of shape [3], expected int32 [3]"),
    ({"counts": [2, 2]}, ValueError, "order: got int32 of shape [3], expected int32 [4]"),
    (
        {"factor": T(2)},
        ValueError,
        "factor: got float32 of shape [2], expected a floating-point [3]",
    ),
    ({"dropout_p": [0.0, 2.0]}, ValueError, "dropout_p: got 2, expected a probability from 0"),
    ({"dropout_p": [0.0, 0.5]}, ValueError, "rng_state: got None with dropout, expected an int64"),
]
GROUPED_CASES: list[Case] = [
    *SLOT_CASES,
    ({"x": T(())}, ValueError, "x: got a 0-d tensor, expected [..., in_features]"),
    ({"x": T(5, 6)}, ValueError, "x: got shape [5, 6], expected [..., 4]"),
    ({"weight": T(4)}, ValueError, "weight: got shape [4], expected [out_features, in_features]"),
    (
        {"weight": T(3, 4).half()},
        TypeError,
        "weight: got dtype float16, expected the input's float32",
    ),
    ({"bias": T(4)}, ValueError, "bias: got shape [4], expected [3]"),
]
GROUPED_BWD_CASES: list[Case] = [
    *SLOT_CASES,
    ({"dy": T(())}, ValueError, "dy: got a 0-d tensor, expected [..., out_features]"),
    ({"weight": None}, ValueError, "weight: got None, expected [out_features, in_features] for"),
    ({"weight": T(2, 4)}, ValueError, "weight: got shape [2, 4], expected [3, 4]"),
    ({"x": None}, ValueError, "x: got None, expected [..., in_features] for the gradient of"),
    ({"x": T(6, 4)}, ValueError, "x: got shape [6, 4], expected dy's [5, 3] with in_features 4"),
    ({"x": T(5, 4).half()}, TypeError, "x: got dtype float16, expected dy's float32"),
    ({"h": T(6)}, ValueError, "h: got float32 of shape [6], expected [5] of what _fwd returned"),
    ({"wanted": [3]}, ValueError, "wanted: got 1 entries, expected 2, one for each of lora_A"),
    (
        {"x": None, "h": None, "mask": [False] * 4, "wanted": [2, 0]},
        ValueError,
        "h: got None without x, expected what _fwd returned for the gradient of lora_B",
    ),
    (
        {"h": None, "factor": T(3), "mask": [False] * 3 + [True]},
        ValueError,
        "h: got None, expected what _fwd returned for the gradient of factor",
    ),
]
ORDER_CASES: list[Case] = [
    ({"order": torch.tensor(rows, dtype=torch.int32)}, error, f"order: got row {message}")
    for rows, error, message in (
        ([0, 5, 1], IndexError, "5, expected 0 to 4, the rows of the input"),
        ([0, -1, 1], IndexError, "-1, expected 0 to 4, the rows of the input"),
        ([0, 3, 3], ValueError, "3 twice, expected one slot for each row"),
    )
]
# A stack of two matrices: four rows with both slots, and one with none.
STACK: Arguments = {"weight": T(2, 3, 4), "weight_rows": [4, 1], "weight_slots": [2, 0]}
STACK_ROWS_CASES: list[Case] = [
    ({"weight_rows": [4]}, ValueError, "weight_rows: got 1 numbers, expected 2, one for each mat"),
    ({"weight_slots": [2]}, ValueError, "weight_slots: got 1 numbers, expected 2, one for each"),
    ({"weight_rows": [6, -1]}, ValueError, "weight_rows: got -1, expected numbers of rows"),
    (
        {"weight_rows": [4, 2]},
        ValueError,
        "weight_rows: got numbers that add up to 6, expected 5, the rows of the input",
    ),
    (
        {"weight_rows": [2, 3]},
        ValueError,
        "counts: got 3 rows in the slots of matrix 0, expected no more than the 2 that",
    ),
    (
        {"weight_slots": [1, 0]},
        ValueError,
        "weight_slots: got numbers that add up to 1, expected 2, the number of slots",
    ),
    (
        {"weight_slots": [2, 1]},
        ValueError,
        "weight_slots: got 1 for matrix 1, expected numbers of slots that add up to 2",
    ),
    ({"weight_slots": [3, -1]}, ValueError, "weight_slots: got 3 for matrix 0, expected numbers"),
    ({"rounds": [0, 2, 0, 1]}, ValueError, "rounds: got 4 numbers with a stack of weights, exp"),
]
STACKED_CALL: Arguments = {**GROUPED, **STACK, "bias": T(2, 3)}
STACK_CASES: list[Case] = [
    *SLOT_CASES[:4],
    *STACK_ROWS_CASES,
    ({"weight": T(3, 4)}, ValueError, "bias: got shape [2, 3], expected [3]"),
    (
        {"weight": T(3, 4), "bias": None},
        ValueError,
        "weight_rows: got 2 numbers, and weight_slots 2, expected none with a weight of two",
    ),
    ({"bias": T(3)}, ValueError, "bias: got shape [3], expected [2, 3], a row for each matrix"),
    ({"bias": T(2, 4)}, ValueError, "bias: got shape [2, 4], expected [2, 3], a row for each"),
    ({"bias": T(2, 3).half()}, TypeError, "bias: got dtype float16, expected float32"),
    ({"x": T(5, 6)}, ValueError, "x: got shape [5, 6], expected [..., 4], in_features being the"),
]
STACKED_BWD: Arguments = {**GROUPED_BWD, **STACK}
STACK_BWD_CASES: list[Case] = [
    *STACK_ROWS_CASES,
    ({"weight": T(3, 4)}, ValueError, "weight: got shape [3, 4], expected [matrices, 3, 4], [out"),
    ({"weight": T(2, 5, 4)}, ValueError, "weight: got shape [2, 5, 4], expected [matrices, 3, 4]"),
    ({"weight": T(3, 3, 4)}, ValueError, "weight_rows: got 2 numbers, expected 3, one for each"),
]
STACK_ORDER_CASES: list[Case] = [
    (
        {"order": torch.tensor([0, 4, 1], dtype=torch.int32)},
        IndexError,
        "order: got row 4, expected 0 to 3, the rows of the input",
    ),
    *(
        (
            {"order": torch.tensor(rows, dtype=torch.int32), **ONE_SLOT, "weight_slots": [1, 0]},
            error,
            f"order: got row {message}",
        )
        for rows, error, message in (
            ([0, 1, 1, 2], ValueError, "1 twice in one slot, expected it once"),
            ([0, 1, 4, 2], IndexError, "4, expected 0 to 3, the rows of the input"),
        )
    ),
]
# Two layers of one x, the second without adapter.
NONE = T(0)
PAIR: Arguments = {"lora_A": [T(2, 4), NONE], "lora_B": [T(3, 2), NONE]}
NUMBERS: Arguments = {"scaling": [1.0, 1.0], "scaling_tensor": [], "dropout_p": [0.0, 0.0]}
MULTI: Arguments = {"x": T(5, 4), "weight": [T(3, 4), T(6, 4)], "bias": [T(3), NONE], **PAIR}
MULTI |= {"lora_bias": [], **NUMBERS, "rng_state": []}
MULTI_BWD: Arguments = {"dy": [T(5, 3), T(5, 6)], "x": T(5, 4), "h": []}
MULTI_BWD |= {"weight": [T(3, 4), T(6, 4)], **PAIR, **NUMBERS, "rng_state": []}
MULTI_BWD |= {"wants_x": True, "wanted": [24, 0]}
LAYER_CASES: list[Case] = [
    *(
        ({name: value}, ValueError, f"{name}: got 1 entries, expected 2, one for each layer")
        for name, value in (
            *(("lora_A", [T(2, 4)]), ("lora_B", [T(3, 2)]), ("scaling", [1.0])),
            *(("scaling_tensor", [T(())]), ("dropout_p", [0.0]), ("rng_state", [STATE])),
        )
    ),
    ({"lora_B": [NONE, NONE]}, ValueError, "layer 0: lora_B: got none, expected both lora_A and"),
    ({"lora_A": [NONE, NONE]}, ValueError, "layer 0: lora_A: got none, expected both lora_A and"),
    ({"weight": [T(3, 4), T(6, 5)]}, ValueError, "layer 1: weight: got shape [6, 5], expected"),
    ({"dropout_p": [2.0, 0.0]}, ValueError, "layer 0: dropout_p: got 2, expected a probability"),
    ({"dropout_p": [0.5, 0.0]}, ValueError, "layer 0: rng_state: got None with dropout_p 0.5, exp"),
]
MULTI_CASES: list[Case] = [
    *LAYER_CASES,
    ({"lora_A": [T(2, 5), NONE]}, ValueError, "layer 0: lora_A: got shape [2, 5], expected [r, 4]"),
    ({"weight": []}, ValueError, "weight: got no layers, expected at least one"),
    ({"bias": [T(3)]}, ValueError, "bias: got 1 entries, expected 2, one for each layer, or none"),
    ({"bias": [T(3), T(3)]}, ValueError, "layer 1: bias: got shape [3], expected [6]"),
    ({"lora_bias": [NONE, T(6)]}, ValueError, "layer 1: lora_bias: got one without lora_A and"),
    ({"x": T(())}, ValueError, "x: got a 0-d tensor, expected [..., in_features]"),
    ({"x": T(5, 6)}, ValueError, "layer 0: x: got shape [5, 6], expected [..., 4]"),
]
MULTI_BWD_CASES: list[Case] = [
    *LAYER_CASES,
    ({"dy": []}, ValueError, "dy: got no layers, expected at least one"),
    ({"dy": [T(()), T(5, 6)]}, ValueError, "layer 0: dy: got a 0-d tensor, expected [..., out_fe"),
    ({"dy": [T(5, 3), T(4, 6)]}, ValueError, "layer 1: dy: got shape [4, 6], expected the rows of"),
    ({"x": None}, ValueError, "layer 0: x: got None, expected [..., in_features] for the gradient"),
    ({"weight": []}, ValueError, "layer 0: weight: got None, expected [out_features, in_features]"),
    ({"h": [T(4, 2), NONE]}, ValueError, "layer 0: h: got shape [4, 2], expected [M, 2] with one"),
    ({"wanted": [0]}, ValueError, "wanted: got 1 entries, expected 2, one for each layer"),
    ({"wanted": [0, 8]}, ValueError, "layer 1: wanted: got 8, expected no gradients of an adapter"),
]
