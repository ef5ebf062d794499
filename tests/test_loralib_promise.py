"""README's sentence on loralib, and where docs/loralib.md says that lora_ext.loralib differs."""

from __future__ import annotations

import copy
import functools
import io
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lora_ext
import lora_ext.loralib as lora
from lora_ext.loralib.merging import fingerprint

MAKERS: dict[str, tuple[Callable[[], Any], Tensor]] = {
    "Linear": (lambda: lora.Linear(6, 8, r=2), torch.randn(4, 6)),
    "Linear fan_in_fan_out": (
        lambda: lora.Linear(6, 8, r=2, fan_in_fan_out=True),
        torch.randn(4, 6),
    ),
    "MergedLinear": (
        lambda: lora.MergedLinear(6, 9, r=2, enable_lora=[True, False, True]),
        torch.randn(4, 6),
    ),
    "Embedding": (lambda: lora.Embedding(9, 5, r=2), torch.tensor([[1, 8], [0, 1]])),
    "Embedding max_norm": (
        lambda: lora.Embedding(9, 5, r=2, max_norm=1.0),
        torch.tensor([[1, 8], [0, 1]]),
    ),
    "Conv1d": (lambda: lora.Conv1d(4, 6, 3, r=2, groups=2), torch.randn(2, 4, 7)),
    "Conv2d": (lambda: lora.Conv2d(4, 6, 3, r=2), torch.randn(2, 4, 7, 7)),
    "Conv3d": (lambda: lora.Conv3d(4, 6, 2, r=2), torch.randn(2, 4, 4, 4, 4)),
    "ConvTranspose2d": (
        lambda: lora.ConvLoRA(nn.ConvTranspose2d, 4, 6, 3, r=2, groups=2),
        torch.randn(2, 4, 5, 5),
    ),
}
each_kind = pytest.mark.parametrize("kind", MAKERS)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def trained(kind: str) -> tuple[Any, Tensor]:
    torch.manual_seed(3)
    layer, x = MAKERS[kind][0](), MAKERS[kind][1]
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    if getattr(layer, "max_norm", None):
        layer(torch.arange(layer.num_embeddings))  # now the lookups change nothing any more
    return layer, x


def weight_of(layer: Any) -> nn.Parameter:
    return getattr(layer, "conv", layer).weight


def close(result: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


class Net(nn.Module):
    """loralib's own examples, in miniature."""

    def __init__(self) -> None:
        super().__init__()
        self.words = lora.Embedding(11, 8, r=2, lora_alpha=4)
        self.qkv = lora.MergedLinear(8, 24, r=2, enable_lora=[True, False, True])
        self.project = lora.Linear(24, 8, r=2, lora_alpha=4, lora_dropout=0.1)
        self.convolve = lora.Conv2d(1, 2, 3, r=2, lora_alpha=4)
        self.head = nn.Linear(2 * 3 * 6, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.project(self.qkv(self.words(tokens)))
        return self.head(self.convolve(hidden.unsqueeze(1)).flatten(1))


def test_a_loralib_script_runs_with_another_import() -> None:
    """README: 'A script for loralib runs with `import lora_ext.loralib as lora`'."""
    torch.manual_seed(0)
    net, tokens = Net(), torch.randint(0, 11, (4, 5))
    frozen = {n: p.clone() for n, p in net.named_parameters() if not p.requires_grad}
    assert frozen.keys() == {
        "words.weight", "qkv.weight", "project.weight", "convolve.conv.weight"
    }  # fmt: skip
    lora.mark_only_lora_as_trainable(net)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        net(tokens).square().mean().backward()
        optimizer.step()
    saved = lora.lora_state_dict(net)
    assert saved.keys() == {
        f"{layer}.lora_{part}" for layer in ("words", "qkv", "project", "convolve") for part in "AB"
    }
    torch.manual_seed(0)
    other = Net()
    other.load_state_dict(saved, strict=False)
    expected = net.eval()(tokens)
    assert net.project.merged and net.convolve.merged
    close(other.eval()(tokens), expected)
    plain = nn.Linear(24, 8)
    plain.load_state_dict(net.project.state_dict(), strict=False)  # merged, so that it is deployed
    hidden = torch.randn(3, 24)
    close(plain(hidden), net.project(hidden))
    net.train()
    assert all(torch.equal(dict(net.named_parameters())[name], frozen[name]) for name in frozen)


@each_kind
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_train_gives_back_the_very_weight(kind: str, dtype: torch.dtype) -> None:
    layer, x = trained(kind)
    layer.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    weight, bits, y = weight_of(layer), weight_of(layer).clone(), layer(x)
    for _ in range(5):
        layer.eval()
        assert layer.merged and not torch.equal(weight_of(layer), bits)
        # The merged weight is rounded once more; a sum of 54 products at most.
        bound = 54 * torch.finfo(dtype).eps * max(1.0, y.abs().max().item())
        assert (layer(x) - y).abs().max().item() <= bound
        layer.train()
        assert weight_of(layer) is weight and torch.equal(weight, bits)
        assert torch.equal(layer(x), y)


@each_kind
def test_what_is_saved_in_one_mode_computes_the_same_in_every_other(kind: str) -> None:
    layer, x = trained(kind)
    expected = layer(x)
    for saved_in in (True, False):
        file = io.BytesIO()
        torch.save(layer.train(saved_in).state_dict(), file)
        for loaded_in in (True, False):
            for assign in (False, True):
                file.seek(0)
                other = MAKERS[kind][0]().train(loaded_in)
                other.load_state_dict(torch.load(file), assign=assign)
                for mode in (loaded_in, not loaded_in, loaded_in):
                    close(other.train(mode)(x), expected)
                if saved_in:
                    assert torch.equal(weight_of(other.train()), weight_of(layer.train()))


@pytest.mark.parametrize("columns", [8, 7])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES.values(), torch.float8_e5m2], ids=str)
def test_a_fingerprint_tells_what_was_changed(dtype: torch.dtype, columns: int) -> None:
    weight = torch.randn(6, columns).to(dtype)
    own = fingerprint(weight)
    assert fingerprint(weight.clone()) == own
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[weight.itemsize]
    for index in ((0, 0), (5, columns - 1), (3, 2)):
        other = weight.clone()
        other.view(bits)[index] ^= 1
        assert fingerprint(other) != own
    for turned in (weight.view(bits).flip(0), weight.view(bits).flip(1)):
        assert fingerprint(turned.view(dtype)) != own
    stored_as_columns = weight.t().contiguous().t()
    assert fingerprint(stored_as_columns.clone()) == fingerprint(stored_as_columns)
    at_an_odd_place = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(6, columns)
    assert fingerprint(at_an_odd_place) == fingerprint(at_an_odd_place)
    assert fingerprint(torch.empty(0, columns, dtype=dtype)) == (0, 0)


@each_kind
def test_an_adapter_that_is_loaded_in_eval_runs(kind: str) -> None:
    layer, x = trained(kind)
    expected, base = layer(x), {"weight": weight_of(layer).clone()}
    torch.manual_seed(3)
    other = MAKERS[kind][0]().eval()
    with torch.no_grad():  # the same base, given while merged with an update of zero
        weight_of(other).data.copy_(base["weight"])
    other.load_state_dict(lora.lora_state_dict(layer), strict=False)
    if "max_norm" not in kind:  # its base was renormalised by lookups
        close(other(x), expected)
    close(other.train()(x), expected)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if "max_norm" not in kind])
def test_what_is_written_while_merged_is_kept(kind: str) -> None:
    layer, x = trained(kind)
    with torch.no_grad():
        weight_of(layer.eval()).data.mul_(2.0)
    changed = layer(x)
    close(layer.train()(x), changed)
    layer.eval().reset_parameters()
    fresh = layer(x)
    close(layer.train()(x), fresh)


def test_an_adapter_that_changes_while_merged_does_not_reach_the_base() -> None:
    layer, _ = trained("Linear")
    bits = layer.weight.clone()
    layer.eval()
    with torch.no_grad():
        layer.lora_B.add_(1.0)
    layer.scaling = 7.0
    assert torch.equal(layer.train().weight, bits)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = lora.Embedding(9, 6, r=2)
        self.head = lora.Linear(6, 9, r=2, bias=False)
        self.plain = nn.Linear(6, 9, bias=False)
        self.tie()
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3)

    def tie(self) -> None:
        self.head.weight = self.plain.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.words(tokens)
        return self.head(hidden) + self.plain(hidden)


def test_a_tied_weight_takes_the_update_of_each_layer_alone() -> None:
    torch.manual_seed(0)
    net, tokens = Tied(), torch.arange(9)
    bits, expected = net.words.weight.clone(), net(tokens)
    for _ in range(3):
        close(net.eval()(tokens), expected)
        assert torch.equal(net.train().words.weight, bits)
        assert net.head.weight is net.words.weight is net.plain.weight


def test_tying_while_merged() -> None:
    torch.manual_seed(0)
    net, tokens = Tied(), torch.arange(9)
    bits, expected = net.words.weight.clone(), net(tokens)
    net.eval().head.weight = net.words.weight
    close(net(tokens), expected)
    net.plain.weight = net.words.weight  # what a plain layer is given, is merged
    net.train()
    assert torch.equal(net.plain.weight, bits) and torch.equal(net.head.weight, bits)
    close(net(tokens), expected)
    net.words.weight.data.zero_()
    assert net.plain.weight.count_nonzero() == 0 == net.head.weight.count_nonzero()


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("saved_in", [True, False], ids=["saved in train", "saved in eval"])
@each_kind
def test_a_layer_made_on_meta_loads(kind: str, saved_in: bool, assign: bool) -> None:
    layer, x = trained(kind)
    expected, state = layer(x), layer.train(saved_in).state_dict()
    for mode in (True, False):
        with torch.device("meta"):
            other = MAKERS[kind][0]().train(mode)
        if not assign:
            other.to_empty(device="cpu")
        other.load_state_dict(state, assign=assign)
        for _ in range(2):
            mode = not mode
            close(other(x), expected)
            close(other.train(mode)(x), expected)


def test_eval_in_inference_mode_leaves_no_inference_tensors() -> None:
    layer, x = trained("Linear")
    expected = layer(x)
    with torch.inference_mode():
        layer.eval()(x)
    x = x.clone().requires_grad_()
    y = layer(x)
    y.sum().backward()
    close(y, expected)
    assert x.grad is not None and torch.equal(layer.train()(x), expected)


@each_kind
def test_copies_and_moves_while_merged(kind: str) -> None:
    layer, x = trained(kind)
    bits, y = weight_of(layer).clone(), layer.eval()(x)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), y)
        assert torch.equal(weight_of(twin.double()), weight_of(layer).double())
        assert torch.equal(weight_of(twin.train()), bits.double())


@pytest.mark.parametrize("merge_weights", [True, False])
def test_a_transformer_s_fast_path_does_not_skip_the_update(merge_weights: bool) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    block.linear1 = lora.Linear(8, 16, r=2, merge_weights=merge_weights)
    nn.init.normal_(block.linear1.lora_B)
    x = torch.randn(2, 3, 8)
    expected = block(x)
    with torch.no_grad():
        close(block.eval()(x), expected)


def test_freezing_while_merged_lasts() -> None:
    layer, _ = trained("Linear")
    layer.weight.requires_grad_(True)
    lora.mark_only_lora_as_trainable(layer.eval())
    assert not layer.train().weight.requires_grad


@each_kind
def test_an_interruption_leaves_one_mode_or_the_other(kind: str) -> None:
    """Ctrl-C at every line of lora_ext.loralib that eval() and train() run."""
    layer, x = trained(kind)
    bits, expected, at = weight_of(layer).clone(), layer(x), 0
    for mode in (False, True):
        for at in range(1, 500):
            layer.train(not mode)
            if not interrupted(functools.partial(layer.train, mode), at):
                break
            close(layer.train(layer.training)(x), expected)
            assert torch.equal(weight_of(layer.train()), bits)
        assert at > 5


def interrupted(call: Callable[[], object], at: int) -> bool:
    """Whether the call was ended before its line number `at` in lora_ext.loralib."""
    lines = 0

    def count(frame: types.FrameType, event: str, _: object) -> Any:
        nonlocal lines
        if "lora_ext/loralib" not in frame.f_code.co_filename:
            return None
        if event == "line":
            lines += 1
            if lines == at:
                raise KeyboardInterrupt
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_a_weight_that_is_computed_stays_unmerged() -> None:
    layer, x = trained("Linear")
    nn.utils.parametrizations.weight_norm(layer)
    expected = layer(x)
    assert not layer.eval().merged
    close(layer(x), expected)


def test_a_convolution_whose_weight_is_computed() -> None:
    layer, x = trained("Conv2d")
    expected = layer(x)
    nn.utils.parametrizations.weight_norm(layer.conv)
    close(layer(x), expected)
    close(layer.eval()(x), expected)
    transposed, x = trained("ConvTranspose2d")
    nn.utils.parametrizations.weight_norm(transposed.conv)
    before = {name: value.clone() for name, value in transposed.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"ConvLoRA: conv: the weight of this .* is computed"):
        transposed(x)
    assert all(torch.equal(transposed.state_dict()[name], before[name]) for name in before)


def test_a_lost_training_does_not_stop_eval() -> None:
    layer, x = trained("Linear")
    bits = layer.weight.clone()
    layer.lora_B.data.fill_(float("nan"))
    assert layer.eval()(x).isnan().all()
    assert torch.equal(layer.train().weight, bits)


def test_given_embeddings_are_kept() -> None:
    table = torch.randn(4, 3)
    assert torch.equal(lora.Embedding(4, 3, r=2, _weight=table.clone()).weight, table)
    assert torch.equal(lora.Embedding.from_pretrained(table).weight, table)


def test_merged_linear_without_slices_is_plain() -> None:
    layer, x = lora.MergedLinear(6, 9, r=2), torch.randn(4, 6)
    assert layer.weight.requires_grad and "lora_A" not in layer.state_dict()
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize(
    "replacement", [lambda x: x * 2.0, nn.AlphaDropout(0.0), nn.Identity(), nn.Dropout(0.0)]
)
def test_a_replaced_dropout_is_called(replacement: Callable[[Tensor], Tensor]) -> None:
    layer, x = trained("Linear")
    layer.lora_dropout = replacement
    update = replacement(x) @ layer.lora_A.T @ layer.lora_B.T * layer.scaling
    close(layer(x), nn.functional.linear(x, layer.weight, layer.bias) + update)


def test_dropout_has_the_mean_and_scale_of_dropout() -> None:
    torch.manual_seed(0)
    layer = lora.Linear(2000, 1, r=1, lora_dropout=0.25, bias=False)
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    nn.init.zeros_(layer.weight)
    y = layer(torch.ones(300, 2000))  # sums of 2000 elements, 4/3 or 0
    deviation = (2000 * 0.75 * 0.25) ** 0.5 / 0.75
    assert abs(y.mean().item() - 2000) < 5 * deviation / 300**0.5
    assert abs(y.std().item() / deviation - 1) < 5 / (2 * 300) ** 0.5
    layer.lora_dropout.eval()
    assert torch.equal(layer(torch.ones(1, 2000)), torch.full((1, 1), 2000.0))


def test_dropout_of_a_convolution_is_not_silent() -> None:
    with pytest.warns(UserWarning, match=r"Conv2d: lora_dropout: got 0\.1, which is not applied"):
        lora.Conv2d(2, 2, 3, r=1, lora_dropout=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lora.Conv2d(4, 4, (3, 3), r=2), r"Conv2d: kernel_size: got \(3, 3\), expected"),
        (
            lambda: lora.MergedLinear(4, 7, r=2, enable_lora=[True, False]),
            "MergedLinear: enable_lora: got 2 slices for 7 out_features",
        ),
        (lambda: lora.MergedLinear(4, 7, enable_lora=[]), "enable_lora: got 0 slices"),
        (lambda: lora.Linear(4, 7, r="2"), "Linear: r: got '2', expected an integer"),
        (lambda: lora.Embedding(4, 7, 2, None), "Embedding: lora_alpha: got None, expected a fin"),
        (lambda: lora.Linear(4, 7, 2, 1, -0.1), r"Linear: lora_dropout: got -0\.1, expected a pro"),
        (
            lambda: lora.ConvLoRA(nn.Conv2d(4, 4, 3), 4, 4, 3, r=2),
            "ConvLoRA: conv_module: got a torch.nn.modules.conv.Conv2d, expected the class",
        ),
    ],
    ids=["kernel", "slices", "no slices", "r", "lora_alpha", "lora_dropout", "conv_module"],
)
def test_wrong_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_a_wrong_bias_changes_nothing() -> None:
    net = Net()
    before = [p.requires_grad for p in net.parameters()]
    for call in (lora.mark_only_lora_as_trainable, lora.lora_state_dict):
        with pytest.raises(NotImplementedError, match=r"bias: got 'some', expected one of"):
            call(net, "some")
    assert [p.requires_grad for p in net.parameters()] == before


def test_lora_ext_s_own_functions_know_them() -> None:
    net = Net()
    lora_ext.mark_only_lora_as_trainable(net, bias="lora_only")
    trains = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trains == lora_ext.lora_state_dict(net, bias="lora_only").keys()
    assert trains == {"qkv.bias", "project.bias"} | lora.lora_state_dict(net).keys()


def test_explain_knows_them() -> None:
    net = Net()
    rows = {row.name: (row.path, row.reason) for row in lora_ext.explain(net)}
    assert rows.keys() == {"words", "qkv", "project", "convolve"}
    fused = lora_ext.explain(lora_ext.nn.Linear(24, 8, r=2, lora_dropout=0.1))[0]
    assert rows["project"] == (fused.path, fused.reason)
    assert rows["words"][0].startswith("cpu fused")
    assert "merged" in lora_ext.explain(net.eval())[0].reason


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear", "Embedding", "Conv2d"])
def test_torch_compile_makes_one_graph(kind: str) -> None:
    layer, x = trained(kind)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    close(compiled(x), layer(x))
