"""A bf16 base with float32 adapters: what a step keeps for backward, here and in plain PyTorch.

    python examples/half_precision.py

Takes some seconds on a CPU and needs no network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import lora_ext

WIDTH, LAYERS, TOKENS = 512, 4, 256


class Plain(nn.Module):
    """LoRA as it is usually written."""

    def __init__(self, base: nn.Linear, r: int, dropout: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(r, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        d = self.dropout(x.float())
        return self.base(x) + (d @ self.lora_A.T @ self.lora_B.T * 2.0).to(x.dtype)


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """What a forward keeps for backward: storages that are not parameters, each once."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(kept.values())


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    linears = [nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(LAYERS)]
    plain = nn.Sequential(*(Plain(linear, r=8, dropout=0.1) for linear in linears))
    ours = nn.Sequential(
        *(
            lora_ext.nn.Linear.from_linear(linear, r=8, lora_alpha=16, lora_dropout=0.1)
            for linear in linears
        )
    )
    lora_ext.mark_only_lora_as_trainable(ours)
    assert ours[0].weight.dtype == torch.bfloat16 and ours[0].lora_A.dtype == torch.float32
    x_bytes = LAYERS * x.numel() * x.element_size()
    for name, model in (("plain PyTorch", plain), ("lora_ext", ours)):
        model(x).float().square().mean().backward()
        kept = kept_bytes(model, x) / x_bytes
        print(f"{name:14} keeps {kept:.2f} times its layers' inputs for backward")
    print(lora_ext.explain(ours, tokens=TOKENS))

    with torch.autocast("cpu", dtype=torch.bfloat16):  # or a float32 base, under autocast
        wide = lora_ext.nn.Linear(WIDTH, WIDTH, r=8)
        print("under autocast:", wide(torch.randn(4, WIDTH)).dtype)


if __name__ == "__main__":
    main()
