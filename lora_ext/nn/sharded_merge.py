"""Merging into weights of which each process holds a part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_ext.nn.sharded import is_sharded, like, whole
from lora_ext.nn.transaction import put_parameter, shallow

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def write_whole(
    draft: Module, written: Mapping[str, Tensor], write: Callable[[Module], None]
) -> None:
    """Has `write` change a copy of a draft that holds whole tensors, and gives the draft's own
    parameters `written`, by name, this process's part of what became of them. All processes write
    the same values, so that all succeed or none; a layer's tensors are in memory whole meanwhile.
    """
    copied = shallow(draft)
    for name, parameter in draft.named_parameters():
        if is_sharded(parameter):
            values = nn.Parameter(whole(parameter.detach()), requires_grad=False)
            put_parameter(copied, name, values)
    vars(copied)["_aside"] = {  # the base's, as they still are
        name: copied.get_parameter(name).detach().clone() for name in vars(draft)["_aside"]
    }
    write(copied)
    for name, target in written.items():
        if is_sharded(target):
            target.copy_(like(copied.get_parameter(name).detach(), target))
