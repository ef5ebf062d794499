"""Rows with several adapters, for the emulated kernels of lora_linear_grouped."""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from emulated_grouped import GroupedKernels, Problem, Results, check, make_problem


def make_gated(seed: int) -> Problem:
    """Some rows with k of the slots or fewer, all with all, or one row; with gates or without."""
    choice = random.Random(f"gates {seed}")
    generator = torch.Generator().manual_seed(seed)
    slots = choice.randint(2, 6)
    ranks = [choice.choice([1, 2, 3, 8, 16, 17, 40, 64]) for _ in range(slots)]
    if choice.random() < 0.2:
        ranks[choice.randrange(slots)] = choice.choice([0, 72, 130])
    problem = make_problem(seed, ranks=ranks)
    M, k = len(problem.x), choice.randint(2, slots)
    kind = choice.choice(["all", "one row", "some", "some", "some"])
    ids = torch.rand(M, slots, generator=generator).argsort(1)
    if kind == "some":
        left_out = torch.rand(M, k, generator=generator) < choice.choice([0.0, 0.2, 0.7])
        ids = torch.where(left_out, -1, ids[:, :k])
    elif kind == "one row":
        ids[torch.arange(M) != choice.randrange(M)] = -1
    gates = torch.randn(ids.shape, generator=generator)
    factor = gates if choice.random() < 0.7 else None
    return replace(
        problem, ids=ids, factor=factor, apart=choice.choice([1, 1, 3]),
        keeps_h=problem.keeps_h or factor is not None,
    )  # fmt: skip


def one_after_another(kernels: GroupedKernels, problem: Problem) -> Results:
    """y and dx, where slots run in calls of their own, each adding to what the last has left."""
    found = {"y": problem.base_y, "dx": problem.base_dx}
    for s, slot in enumerate(problem.slots):
        factor = None
        if problem.factor is not None:
            chosen = torch.where(problem.ids == s, problem.factor, 0.0)
            factor = chosen.view(len(problem.x), -1).sum(1)
        own = replace(
            problem, slots=[replace(slot, wants=())], ids=torch.where(problem.has(s), 0, -1),
            factor=factor, base_y=found["y"], base_dx=found["dx"], keeps_h=False,
        )  # fmt: skip
        found = {"y": kernels.forward(own)["y"], "dx": kernels.backward(own, None)["dx"]}
    return found


def check_gated(kernels: GroupedKernels, problem: Problem) -> tuple[Results, Results]:
    """And that each row's slots are added in their order, bit for bit."""
    made, gradients = check(kernels, problem)
    want = one_after_another(kernels, problem)
    assert torch.equal(made["y"], want["y"]), "y: slots are added in another order"
    assert torch.equal(gradients["dx"], want["dx"]), "dx: slots are added in another order"
    return made, gradients
