"""Mistakes in the kernels of lora_linear_grouped for tests/test_kernel_mistakes.py, in the form of
planted_mistakes.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from emulated import COMPLETIONS
from emulated_gates import check_gated
from emulated_grouped import GroupedKernels, check, make_problem

MISTAKES = {
    "grouped: rows as they lie": (
        "tile_sm80.h", "source + `list[row]` * matrix.stride", "row",
    ),
    "grouped: dropout by places instead of rows": (
        "tile_sm80.h", "return `list[row]`;", "row",
    ),
    "grouped: no barrier after the list is made": (
        "grouped_slots.h", "`__syncthreads();`\n  return list;", "",
    ),
    "grouped: the strength of the slot's first row": (
        "grouped_slots.h", "factor[`place`]", "begin",
    ),
    "grouped: all ranks from the first on": (
        "grouped_slots.h", "slot.operand_at(work.begin, `work.first`);", "0",
    ),
    "grouped: splits that write the same part": (
        "grouped_passes_sm80.h",
        "shared,\n      params.parts + `blockIdx.y * params.part` +", "0",
    ),
    "grouped: columns of dy that write the same part": (
        "grouped_passes_sm80.h", "? params.parts + `blockIdx.y * params.part` +", "0",
    ),
    "grouped: lora_A of the first ranks": (
        "grouped_passes_sm80.h", "part_of(slot.A, `work.first * slot.A.value.stride`,", "0",
    ),
    "grouped: lora_B of the first ranks": (
        "grouped_passes_sm80.h", "part_of(slot.B, `work.first`,", "0",
    ),
    "grouped: dB of the first ranks": (
        "grouped_passes_sm80.h", "rank += work.first;", "",
    ),
    "grouped: dA of the first ranks": (
        "grouped_passes_sm80.h", "(`work.first` + row) * K", "0",
    ),
    "grouped: parts of dB without a column for lora_bias": (
        "grouped_passes_sm80.h", "work.part[column * `slot.width` + rank]", "slot.r",
    ),
    "grouped: dB as far apart as what dlora_bias is beside": (
        "grouped_passes_sm80.h", "slot.scaling, column * `slot.r` + rank);", "slot.width",
    ),
    "grouped: dB without the scaling": (
        "grouped_passes_sm80.h", "slot.dB.store(sum, `slot.scaling`,", "1.0f",
    ),
    "grouped: the same columns of dA by all blocks": (
        "grouped_passes_sm80.h", "work.rows, `blockIdx.y`, shared,", "0",
    ),
    "add: no wait for the copies": (
        "grouped_add_sm80.h", "arch::cp_async_wait<Shape::kRing - 2>();", "",
    ),
    "add: no barrier after the wait": (
        "grouped_add_sm80.h", "`__syncthreads();`  // the stage", "",
    ),
    "add: a stage filled while it is read": (
        "grouped_add_sm80.h", "if (`step + Shape::kRing - 1 < steps`) load(",
        "step + Shape::kRing - 1 < steps && (step % 2 || (load(step + Shape::kRing - 2), true))",
    ),
    "add: no barrier before rows are stored": (
        "grouped_add_sm80.h", "__syncwarp();", "",
    ),
    "add: stores below the last row": (
        "grouped_add_sm80.h", "if (`row >= work.rows` || n", "false",
    ),
    "add: stores right of the last column": (
        "grouped_add_sm80.h", "row >= work.rows || `n + chunk * 8 >= params.columns`", "false",
    ),
    "add: the wrong rows of the result": (
        "grouped_add_sm80.h", "params.out + `list[row]` * params.columns", "row",
    ),
    "add: each group of ranks for all": (
        "grouped_add_sm80.h", "if (`group == 0`) sums.clear();", "true",
    ),
    "add: h of the first group of ranks": (
        "grouped_add_sm80.h", "load_a<TileH>(a, h_tile(`group`)", "0",
    ),
    "add: the last ranks left out": (
        "grouped_add_sm80.h", "group * kRank + k >= `slot.r`", "slot.r - 8",
    ),
    "add: what a group of ranks is added to instead of a tile of columns": (
        "grouped_add_sm80.h", "`column_tile` % Shape::kRing * TileOut::kBytes", "0 * column_tile",
    ),
    "add: decisions of the first columns for all": (
        "grouped_add_sm80.h", "mask.apply(sums.value[0], `column_tile % 2` *", "0",
    ),
    "add: decisions of the tile before": (
        "grouped_add_sm80.h", "if (`column_tile % 2 == 0`)", "column_tile % 4 == 0",
    ),
    "add: decisions about places instead of rows": (
        "grouped_add_sm80.h", "{list[own_row], `list[own_row + 8]`}", "own_row + 8",
    ),
    "add: lora_bias without the strength": (
        "grouped_add_sm80.h", "+= `strength` * bias_at", "slot.scaling",
    ),
    "add: lora_bias of other columns": (
        "grouped_add_sm80.h", "bias_at(slot, `column`)", "n",
    ),
    "finish: no wait for the kernel before": (
        "grouped_elementwise.h", "arch::wait_for_previous_kernel();", "",
    ),
    "finish: without dropout's factor": (
        "grouped_elementwise.h", "params.dropped ? `slot.survivor` :", "1.0f",
    ),
    "finish: one part for all": (
        "grouped_elementwise.h", "params.parts[`p * params.part` + operand + column]", "0",
    ),
    "finish: without strength": (
        "grouped_elementwise.h", "? `slot.strength(params.factor, place)` : factor;",
        "slot.scaling",
    ),
    "finish: h of dB without strength": (
        "grouped_elementwise.h", "place) : `factor`;", "1.0f",
    ),
    "finish: no column for lora_bias": (
        "grouped_elementwise.h", "own = `1.0f`;", "0.0f",
    ),
    "finish: a remainder that is left out": (
        "grouped_elementwise.h", "rounded<T>(`left_of(full, near)`);", "0.0f",
    ),
    "finish: lora_bias left out of dfactor": (
        "grouped_elementwise.h", "is_bias ? `sum` :", "0.0f",
    ),
    "finish: dfactor of half of the lanes": (
        "grouped_elementwise.h", "flipped = `kFinishLanes / 2`;", "kFinishLanes / 4",
    ),
    "jobs: a block that begins a job in the one before": (
        "grouped_elementwise.h", "blockIdx.x >= `jobs[middle].first_block`",
        "jobs[middle].first_block + 1",
    ),
    "jobs: elements that are not counted from the job's first": (
        "grouped_elementwise.h", "int64_t{`found.first_block`}", "0",
    ),
    "reduce: the first part for all": (
        "grouped_elementwise.h", "sum += parts[`p * size` + i];", "0",
    ),
    "reduce: lora_bias among dB": (
        "grouped_elementwise.h", "if (`column < r`) {\n      if (is_wanted", "true",
    ),
    "table: h of all slots at the same place": (
        "grouped_table.h", "slot.hidden = `hidden`,", "0 * hidden",
    ),
    "table: operands of all slots at the same place": (
        "grouped_table.h", "slot.operand = `operand`,", "0",
    ),
    "table: float adapters rounded to 16 bits": (
        "grouped_table.h", "if (`in_float`) job.remainder", "false",
    ),
    "table: lora_bias over the last rank": (
        "grouped_table.h", "const_cast<T*>(of) + `columns`", "columns - 1",
    ),
    "table: the first group of ranks alone": (
        "grouped_table.h", "from > 0 && `from >= r`", "true",
    ),
    "table: a tile one row too short": (
        "grouped_table.h", "smaller(64, `part.rows - first`)", "part.rows - first - (first > 0)",
    ),
    "rounds: tiles with rows of several": (
        "grouped_table.h", "if (`call.rounds.empty()`)", "true",
    ),
    "rounds: all added in one launch": (
        "grouped_table.h", "|| `parts[p + 1].round != part.round`", "false",
    ),
    "rounds: added in another order": (
        "grouped_table.h", "return `a.round < b.round`;", "a.round > b.round",
    ),
    "rounds: rows as if each began a slot": (
        "grouped_table.h", "one.round, `begin`, static_cast<int>(one.rows)});",
        "slots[static_cast<size_t>(one.adapter)].begin",
    ),
    "rounds: the tiles of the first for all": (
        "lora_linear_grouped_run.h", "(tiles.list.place) + `begin`;", "0",
    ),
    "run: gradients of slots without rows left as they are": (
        "lora_linear_grouped_run.h", "if (stores && `pieces != 1`)", "pieces > 1",
    ),
    "run: pieces that write the same part": (
        "lora_linear_grouped_run.h", "parts + `piece * job.size`", "0",
    ),
    "run: h kept without dropout's factor": (
        "lora_linear_grouped_run.h", "out.dropped = `true`;", "false",
    ),
    "run: dh without strength": (
        "lora_linear_grouped_run.h", "of_dh.dropped = of_dh.scaled = `true`;", "false",
    ),
}  # fmt: skip


def notice(kernels: GroupedKernels) -> None:
    """Fails of a mistake: slots of several tiles and parts and of none, ranks beyond a group,
    factor, lora_bias, dropout."""
    kernels.gpu(86, 3)
    ids = torch.arange(190) % 7
    ids = torch.where(ids < 3, ids, torch.where(ids == 3, -1, 3))
    for seed, sizes in enumerate([(190, 264, 200), (190, 72, 520), (190, 520, 72)]):
        problem = make_problem(
            seed, sizes=sizes, ids=ids, ranks=[24, 3, 72, 17, 8], dtype=torch.bfloat16
        )
        generator = torch.Generator().manual_seed(seed)
        bias = torch.randn(sizes[2], generator=generator)
        slots = [
            replace(
                slot,
                dropout_p=(0.5, 0.0, 0.1, 0.3, 0.2)[s],
                scaling=(0.5, 2.5)[s % 2],
                lora_A=slot.lora_A.to(of),
                lora_B=slot.lora_B.to(of),
                lora_bias=bias.to(of) if s in (1, 2, 3) else None,
            )
            for s, slot in enumerate(problem.slots)
            for of in [torch.float32 if s % 2 else torch.bfloat16]
        ]
        factor = torch.rand(190, generator=generator) + 0.5 if seed != 1 else None
        problem = replace(problem, slots=slots, factor=factor, keeps_h=seed != 1)
        for i, completion in enumerate(COMPLETIONS):
            kernels.schedule(completion, 2 * seed + i)
            check(kernels, problem)
        # And with further slots of some rows, so that a slot has tiles of several rounds.
        generator = torch.Generator().manual_seed(seed)
        more = torch.where(torch.rand(190, generator=generator) < 0.5, (ids + 2) % 5, -1)
        both = torch.stack([ids, more.where(more != ids, -1)], 1)
        gates = torch.rand(190, 2, generator=generator) + 0.5 if factor is not None else None
        kernels.schedule(COMPLETIONS[seed], seed + 1)
        check_gated(kernels, replace(problem, ids=both, factor=gates))
