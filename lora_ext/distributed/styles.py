"""Styles of torch's tensor parallelism that divide adapters with their layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from lora_ext.nn import Linear, LoraLayer, MergedLinear
from lora_ext.nn.kept_base import KeptBase
from lora_ext.nn.modules_to_save import ModulesToSave
from lora_ext.nn.tensor_parallel import place_layer


class _DividesAdapters(ParallelStyle):
    """A style of torch's that divides layers with adapters too, along one dimension of weight."""

    _DIM: ClassVar[int]
    src_data_rank: int | None

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if isinstance(module, LoraLayer):
            place_layer(module, device_mesh, self._DIM, self.src_data_rank)
        else:
            super()._partition_linear_fn(name, module, device_mesh)  # type: ignore[misc]

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for one in _parts(module):
            _check_kind(type(self).__name__, one)
            super()._apply(one, device_mesh)  # type: ignore[safe-super]
        return module


class ColwiseLora(_DividesAdapters, ColwiseParallel):
    """torch's ColwiseParallel, with its arguments, for `lora_ext.nn.Linear` too: weight [N, K] and
    lora_B [N, r] are divided along N, lora_A is everywhere. A module without adapters is divided as
    torch does it.

    Raises (when applied):
        TypeError: another kind of layer with adapters.
        ValueError: the layer is merged.
    """

    _DIM = 0


class RowwiseLora(_DividesAdapters, RowwiseParallel):
    """torch's RowwiseParallel in the same way: weight [N, K] and lora_A [r, K] are divided along K,
    lora_B is everywhere.

    Raises (when applied):
        TypeError: another kind of layer with adapters.
        ValueError: the layer is merged, or has an adapter with DoRA.
    """

    _DIM = 1


def _parts(module: nn.Module) -> list[nn.Module]:
    """The module itself; of a module to save what is saved, and its copies."""
    if isinstance(module, ModulesToSave):
        return [module.original_module, *module.modules_to_save.values()]
    return [module]


def _check_kind(where: str, module: nn.Module) -> None:
    plain = isinstance(module, Linear) and not isinstance(module, KeptBase | MergedLinear)
    if isinstance(module, LoraLayer) and not plain:
        raise TypeError(
            f"{where}: got a {type(module).__name__}, expected a lora_ext.nn.Linear or a module "
            "without adapters; leave the layer out of the plan, or out of target_modules"
        )


# transformers' names of the styles of a model's `base_model_tp_plan`.
_NAMED: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseLora,
    "rowwise": RowwiseLora,
    "colwise_rep": lambda: ColwiseLora(output_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseLora(output_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseLora(input_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseLora(input_layouts=Replicate()),
}


def lora_plan(plan: Mapping[str, ParallelStyle | str]) -> dict[str, ParallelStyle]:
    """A plan for `torch.distributed.tensor.parallel.parallelize_module` that divides adapters too:
    torch's ColwiseParallel and RowwiseParallel become `ColwiseLora` and `RowwiseLora` with the same
    layouts, and so do transformers' names for them ("colwise", "rowwise", ...). Other styles stay.

    Args:
        plan: names in the base model, of which "*" is any part, and their styles. It is applied to
            the base model: `parallelize_module(model.get_base_model(), mesh, lora_plan(plan))`.

    Raises:
        ValueError: a name of transformers' that is none of a linear layer's.
    """
    return {name: _with_adapters(name, style) for name, style in plan.items()}


def _with_adapters(name: str, style: ParallelStyle | str) -> ParallelStyle:
    if isinstance(style, str):
        if style not in _NAMED:
            raise ValueError(
                f"lora_plan: '{name}': got the style {style!r}, expected one of {list(_NAMED)} or "
                "a ParallelStyle"
            )
        return _NAMED[style]()
    ours = {ColwiseParallel: ColwiseLora, RowwiseParallel: RowwiseLora}.get(type(style))
    if ours is None:
        return style
    assert isinstance(style, ColwiseParallel | RowwiseParallel)
    return ours(
        input_layouts=style.input_layouts[0],
        output_layouts=style.output_layouts[0],
        use_local_output=style.use_local_output,
    )
