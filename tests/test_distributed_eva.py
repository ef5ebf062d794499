"""EVA where several processes have a part of the data each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from calibration_models import Net, points
from processes import assert_passed, run_checks

import lora_ext
from lora_ext import EvaConfig, LoraConfig

FIELDS: dict[str, Any] = {"r": 2, "target_modules": ["first", "second"]}
CONFIG = LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(tau=0.9), **FIELDS)


def components(data: list[torch.Tensor], gather: bool) -> dict[str, torch.Tensor]:
    return lora_ext.get_eva_state_dict(
        Net(), data, CONFIG, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
        gather_distributed_inputs=gather, show_progress_bar=False,
    )  # fmt: skip


def check_each_process_gets_the_components_of_all_data() -> None:
    rank, whole = dist.get_rank(), points()
    cut = 23  # parts of different sizes
    mine = [batch[:cut] if rank == 0 else batch[cut:] for batch in whole]
    found = components(mine, gather=True)
    for name, tensor in components(whole, gather=False).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
        other = [torch.empty_like(tensor) for _ in range(2)]
        dist.all_gather(other, found[name])
        assert torch.equal(*other)


def check_without_gathering_each_has_its_own() -> None:
    mine = points(dist.get_rank())
    found = components(mine, gather=False)
    other = [torch.empty_like(found["first"]) for _ in range(2)]
    dist.all_gather(other, found["first"])
    assert not torch.equal(*other)


def test_each_process_gets_the_components_of_all_data() -> None:
    assert_passed(__file__, "check_each_process_gets_the_components_of_all_data")


def test_without_gathering_each_has_its_own() -> None:
    assert_passed(__file__, "check_without_gathering_each_has_its_own")


if __name__ == "__main__":
    run_checks(globals())
