"""The calibration pass: its statistics against formulas, and a pass that is killed and goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from calibration_models import Net, loss, points, same_state, state_of
from torch import Tensor, nn

import lora_ext
from lora_ext import CordaConfig, EvaConfig, LoraConfig, LoraGAConfig
from lora_ext.calibration.running import Pass, forward_fn_dict, to_device
from lora_ext.calibration.statistics import Covariance

ROOT = Path(lora_ext.__file__).parent.parent
FIELDS = {"r": 2, "target_modules": ["first", "second"]}
CONFIGS = {
    "eva": LoraConfig(init_lora_weights="eva", eva_config=EvaConfig(tau=0.9999), **FIELDS),
    "corda": LoraConfig(init_lora_weights="corda", corda_config=CordaConfig(), **FIELDS),
    "lora_ga": LoraConfig(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(), **FIELDS),
}
METHODS = list(CONFIGS)
LEFT = {"corda": "eigens", "lora_ga": "_peft_loraga_grad"}
each_method = pytest.mark.parametrize("method", METHODS)


def calibrate(method: str, model: nn.Module, data: Any, **options: Any) -> dict[str, list[Tensor]]:
    """What a method makes of data, as tensors."""
    options = {"show_progress_bar": False, "checkpoint_every": 1} | options
    config = CONFIGS[method]
    if method == "eva":
        functions = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
        found = lora_ext.get_eva_state_dict(model, data, config, **functions, **options)
        return {name: [tensor] for name, tensor in found.items()}
    if method == "corda":
        lora_ext.preprocess_corda(model, config, dataloader=data, **options)
    else:
        lora_ext.preprocess_loraga(model, config, dataloader=data, forward_fn=loss, **options)
    found = {n: vars(m)[LEFT[method]] for n, m in model.named_modules() if LEFT[method] in vars(m)}
    if method == "corda":
        return {name: [one.U_WC, one.S_WC, one.V_WC] for name, one in found.items()}
    return {name: [one] for name, one in found.items()}


class Killed(Exception):
    pass


class Loader:
    """A loader that ends badly at one of its batches, counted over all passes."""

    def __init__(self, data: list[Tensor], at: int | None = None) -> None:
        self.data, self.at, self.given = data, at, 0

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.data:
            if self.given == self.at:
                raise Killed
            self.given += 1
            yield batch


@each_method
@pytest.mark.parametrize("at", [2, 4])
def test_a_pass_that_ended_goes_on_and_ends_the_same(method: str, at: int, tmp_path: Path) -> None:
    data, place = points(), tmp_path / "pass.safetensors"
    whole = calibrate(method, Net(), data)
    net = Net()
    before = state_of(net)
    with pytest.raises(Killed):
        # EVA looks at the first batch once more, to see which inputs are the same.
        calibrate(method, net, Loader(data, at + (method == "eva")), checkpoint_file=place)
    assert place.exists() and same_state(before, state_of(net))
    again = Loader(data)
    ran: list[int] = []
    net.first.register_forward_hook(lambda *_: ran.append(1))
    parts = calibrate(method, net, again, checkpoint_file=place)
    assert whole.keys() == parts.keys()
    for name, tensors in whole.items():
        assert all(map(torch.equal, tensors, parts[name])), name
    assert not place.exists() and [p.name for p in tmp_path.iterdir()] == []
    if method != "eva":
        assert len(ran) == len(data) - at  # what was done is not done again


def test_a_killed_process_leaves_a_checkpoint(tmp_path: Path) -> None:
    """SIGKILL, in the middle of the fourth batch."""
    place = tmp_path / "pass.safetensors"
    script = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_calibration import calibrate, points, Net

def batches():
    for number, batch in enumerate(points()):
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

calibrate("corda", Net(), batches(), checkpoint_file={str(place)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=dict(os.environ))
    assert done.returncode == -9, done.stderr.decode()
    parts = calibrate("corda", Net(), points(), checkpoint_file=place)
    for name, tensors in calibrate("corda", Net(), points()).items():
        assert all(map(torch.equal, tensors, parts[name]))


@each_method
def test_checkpoints_of_another_pass_are_refused(method: str, tmp_path: Path) -> None:
    place = tmp_path / "pass"
    with pytest.raises(Killed):
        calibrate(method, Net(), Loader(points(), 3), checkpoint_file=place)
    other = "corda" if method != "corda" else "lora_ga"
    with pytest.raises(ValueError, match="is of another calibration"):
        calibrate(other, Net(), points(), checkpoint_file=place)
    if method != "eva":
        with pytest.raises(ValueError, match=r"has 3 batches, and the data loader fewer"):
            calibrate(method, Net(), points(batches=2), checkpoint_file=place)
    place.write_bytes(place.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot be read"):
        calibrate(method, Net(), points(), checkpoint_file=place)


@each_method
def test_a_bar_shows_and_hooks_are_gone(method: str, capfd: pytest.CaptureFixture[str]) -> None:
    net = Net()
    before = state_of(net)
    calibrate(method, net, points(), show_progress_bar=True)
    for module in net.modules():
        for name in LEFT.values():
            vars(module).pop(name, None)
    assert same_state(before, state_of(net))
    assert capfd.readouterr().out == ""


def test_batches_of_any_kind_run_and_move() -> None:
    net, x = Net(), points()[0]
    for batch in (x, [x], (x,)):
        assert torch.equal(forward_fn_dict(net, to_device(batch, torch.device("cpu"))), net(x))
    assert torch.equal(forward_fn_dict(net, to_device({"x": x}, torch.device("cpu"))), net(x))
    moved = to_device({"a": [x, {"b": (x, 1)}]}, torch.device("meta"))
    assert moved["a"][0].is_meta and moved["a"][1]["b"][0].is_meta and moved["a"][1]["b"][1] == 1


def test_passes_are_counted_and_nothing_is_empty() -> None:
    run = Pass("here", {})
    assert list(run.over([1, 2])) == [1, 2] and (run.passes, run.batches) == (1, 0)
    with pytest.raises(ValueError, match="here: dataloader: got one without batches"):
        list(Pass("here", {}).over([]))
    with pytest.raises(ValueError, match="never reached"):
        Pass("here", {"layer": Covariance()}).finish()


@each_method
def test_layers_that_are_compiled_keep_their_names(method: str) -> None:
    net = Net()
    net.first = torch.compile(net.first, backend="eager")  # type: ignore[assignment]
    found = calibrate(method, net, points())
    plain = calibrate(method, Net(), points())
    # The statistics are left at the layer itself, which is a level below.
    names = {name.removesuffix("._orig_mod"): tensors for name, tensors in found.items()}
    assert names.keys() == plain.keys()
    for name, tensors in plain.items():
        for one, other in zip(tensors, names[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_layers_that_are_called_by_keyword_are_seen() -> None:
    class ByName(Net):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.second(input=torch.relu(self.first(input=x)))
            return y

    found = calibrate("corda", ByName(), points())
    for name, tensors in calibrate("corda", Net(), points()).items():
        assert all(map(torch.equal, tensors, found[name]))


@pytest.mark.parametrize("method", ["corda", "lora_ga"])
def test_batches_in_the_place_of_the_function(method: str) -> None:
    run = {"corda": lora_ext.preprocess_corda, "lora_ga": lora_ext.preprocess_loraga}[method]
    with pytest.raises(TypeError, match=r"got a list.*batches are dataloader="):
        run(Net(), CONFIGS[method], points(0, 4))


def test_a_function_whose_output_has_the_loss() -> None:
    config, found = CONFIGS["lora_ga"], []
    for forward in (loss, lambda model, x: {"loss": loss(model, x)}):
        model = Net()
        lora_ext.preprocess_loraga(model, config, dataloader=points(0, 2), forward_fn=forward)
        found.append(getattr(model.first, LEFT["lora_ga"]))
    with pytest.raises(TypeError, match="expected a loss, one number"):
        lora_ext.preprocess_loraga(Net(), config, dataloader=points(0, 2), forward_fn=lambda *_: 3)
    assert torch.equal(found[0], found[1])
