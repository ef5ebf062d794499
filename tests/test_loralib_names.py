"""A script written for loralib runs with `import lora_ext.nn as lora`."""

from __future__ import annotations

import torch
from torch import nn

import lora_ext.nn as lora


class Net(nn.Module):
    """loralib's own examples, in miniature."""

    def __init__(self) -> None:
        super().__init__()
        self.words = lora.Embedding(11, 8, r=2, lora_alpha=4)
        self.qkv = lora.MergedLinear(8, 24, r=2, enable_lora=[True, False, True])
        self.project = lora.Linear(24, 8, r=2, lora_alpha=4, lora_dropout=0.1, merge_weights=True)
        self.convolve = lora.Conv2d(1, 2, 3, r=2, lora_alpha=4)
        self.head = nn.Linear(2 * 3 * 6, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.project(self.qkv(self.words(tokens)))
        return self.head(self.convolve(hidden.unsqueeze(1)).flatten(1))


def test_train_save_and_load() -> None:
    torch.manual_seed(0)
    net, tokens = Net(), torch.randint(0, 11, (4, 5))
    lora.mark_only_lora_as_trainable(net)
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trains == {
        f"{layer}.lora_{part}" for layer in ("words", "qkv", "project", "convolve") for part in "AB"
    }
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        net(tokens).square().mean().backward()
        optimizer.step()
    saved = lora.lora_state_dict(net)
    assert saved.keys() == trains

    torch.manual_seed(0)
    other = Net()
    other.load_state_dict(saved, strict=False)
    assert net.eval() is net and net.project.merged and not net.qkv.merged
    torch.testing.assert_close(other.eval()(tokens), net(tokens))
    assert not net.train().project.merged
