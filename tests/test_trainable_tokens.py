"""trainable_token_indices: trained rows of embeddings, against exact arithmetic and PEFT."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from tiny_models import BUILDERS, TEXT, Built
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_ext
from lora_ext import LoraConfig, LoraModel, get_lora_model
from lora_ext.errors import AdapterFileError
from lora_ext.nn.token_rows import TokenRows, reason_to_copy, run
from lora_ext.nn.trainable_tokens import TrainableTokensLayer

N, K = 11, 6
ROWS = [7, 2, 5]
DELTA = "token_adapter.trainable_tokens_delta"


class Shifted(nn.Embedding):
    """As OPT's positions: x are not the rows."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 2)


def scaled() -> nn.Module:
    kind = transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding
    return kind(N, K, padding_idx=0, embed_scale=3.5)


def hooked() -> nn.Module:
    base = nn.Embedding(N, K)
    base.register_forward_hook(lambda module, args, y: 2 * y)
    return base


BASES: dict[str, Callable[[], nn.Module]] = {
    "embedding": lambda: nn.Embedding(N, K),
    "padding among the rows": lambda: nn.Embedding(N, K, padding_idx=2),
    "padding elsewhere": lambda: nn.Embedding(N, K, padding_idx=3),
    "scale_grad_by_freq": lambda: nn.Embedding(N, K, scale_grad_by_freq=True),
    "max_norm": lambda: nn.Embedding(N, K, max_norm=1.5),
    "scaled": scaled,
    "forward of its own": lambda: Shifted(N, K),
    "hooked": hooked,
    "head": lambda: nn.Linear(K, N, bias=False),
    "head with a bias": lambda: nn.Linear(K, N),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("trains", [False, True], ids=["frozen base", "training base"])
@pytest.mark.parametrize("name", BASES)
def test_results_and_gradients_are_those_of_a_weight_with_these_rows(
    name: str, trains: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    base = BASES[name]().double().requires_grad_(trains)
    table = torch.randn(len(ROWS), K, dtype=torch.float64, requires_grad=True)
    x: Tensor = torch.tensor([[7, 2, 7], [0, 5, 8]], dtype=dtype)
    if isinstance(base, nn.Linear):
        x = torch.randn(2, 3, K, dtype=torch.float64, requires_grad=True)
    inputs = [t for t in (table, x, *base.parameters()) if t.requires_grad]
    twin = copy.deepcopy(base)
    whole = twin.weight.index_copy(0, torch.tensor(ROWS), table)
    expected = torch.func.functional_call(twin, {"weight": whole}, (x,))
    y = run(base, TokenRows.of(ROWS, table.device), table, x)
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    dy = torch.randn_like(y)
    of_twin = [t for t in (table, x, *twin.parameters()) if t.requires_grad]
    for got, right in zip(
        torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, of_twin, dy), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-13, atol=1e-13)


class Allocated(TorchDispatchMode):
    """The sizes of all memory that operators allocate, in elements of float32."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.sizes = known.untyped_storage().data_ptr(), [0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self.known:
            self.sizes.append(result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("name", ["embedding", "scaled", "head"])
def test_no_step_allocates_as_much_as_the_weight(name: str) -> None:
    layer = TrainableTokensLayer(BASES[name]().requires_grad_(False))
    layer.add_adapter("default", ROWS)
    layer.set_adapter("default")
    x = torch.randn(3, K, requires_grad=True) if name == "head" else torch.arange(4)
    assert not reason_to_copy(layer.base_layer)
    with Allocated(layer.weight) as allocated:
        layer(x).square().sum().backward()
    assert layer.trainable_tokens_delta["default"].grad.abs().sum() > 0
    assert 0 < max(allocated.sizes) < N * K


# Models


def gemma3() -> Built:
    config = transformers.Gemma3TextConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, **TEXT,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Gemma3ForCausalLM(config).eval()
    tokens = torch.arange(3, 17).view(2, 7)
    return model, {"input_ids": tokens, "labels": tokens}


STACKS = ("encoder", "decoder")
# The embedding's name, and the modules tied to it.
FAMILIES = {
    "gpt2": (BUILDERS["gpt2"], "transformer.wte", ["lm_head"], "c_attn"),
    "t5": (
        BUILDERS["t5"],
        "shared",
        [f"{stack}.embed_tokens" for stack in STACKS] + ["lm_head"],
        "q",
    ),
    "gemma3": (gemma3, "model.embed_tokens", ["lm_head"], "q_proj"),
    "mistral": (BUILDERS["mistral"], "model.embed_tokens", [], "q_proj"),
}
each_family = pytest.mark.parametrize("family", FAMILIES)


def fields_of(family: str, **others: Any) -> dict[str, Any]:
    tokens = sorted(set(FAMILIES[family][0]()[1]["input_ids"].flatten().tolist()))[1:5]
    fields = {"r": 2, "target_modules": [FAMILIES[family][3]], "init_lora_weights": False}
    return fields | {"trainable_token_indices": tokens[::-1]} | others


def table_of(model: Any, family: str, adapter: str = "default") -> nn.Parameter:
    embedding = model.base_model.model.get_submodule(FAMILIES[family][1])
    return embedding.token_adapter.trainable_tokens_delta[adapter]  # type: ignore[no-any-return]


def disturb(*tables: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        noise = 0.3 * torch.randn(tables[0].shape, generator=generator)
        for table in tables:
            table.add_(noise)


def pair(family: str, dtype: torch.dtype, tmp_path: Path, **others: Any) -> tuple[Any, Any, Any]:
    """The same adapter in PEFT's model and ours, by PEFT's file; and inputs."""
    base, inputs = FAMILIES[family][0]()
    base = base.to(dtype)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(**fields_of(family, **others))
    )
    disturb(table_of(theirs, family))
    theirs.save_pretrained(tmp_path)
    ours = LoraModel.from_pretrained(base, tmp_path, is_trainable=True)
    return theirs.eval(), ours.eval(), inputs


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_family
@pytest.mark.filterwarnings("ignore")
def test_as_peft(family: str, dtype: torch.dtype, autocast: bool, tmp_path: Path) -> None:
    theirs, ours, inputs = pair(family, dtype, tmp_path)
    exact = copy.deepcopy(theirs).double()
    results = []
    for model in (exact, theirs, ours):
        with torch.autocast("cpu", enabled=autocast and model is not exact):
            output = model(**inputs)
        output.loss.backward()
        results.append((output.logits.double(), table_of(model, family).grad.double()))
    assert table_of(ours, family).dtype == table_of(theirs, family).dtype == torch.float32
    for right, peft_s, got in zip(*results, strict=True):
        error, allowed = (got - right).norm(), (peft_s - right).norm()
        # Two rounded sums in another order: no further from the truth than a few units of theirs.
        assert error <= 1.5 * allowed + 1e-6 * right.norm()
    names = [name for name, p in ours.named_parameters() if p.requires_grad]
    assert [name for name in names if "token" in name] == [
        f"base_model.model.{FAMILIES[family][1]}.{DELTA}.default"
    ]
    assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


@each_family
@pytest.mark.filterwarnings("ignore")
def test_files_go_both_ways(family: str, tmp_path: Path) -> None:
    theirs, ours, inputs = pair(family, torch.float32, tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    files = [safetensors.torch.load_file(tmp_path / w / "adapter_model.safetensors") for w in
             ("theirs", "ours")]  # fmt: skip
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert f"base_model.model.{FAMILIES[family][1]}.{DELTA}" in files[1]
    base = FAMILIES[family][0]()[0]
    back = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    assert torch.equal(back(**inputs).logits, theirs(**inputs).logits)
    for key, value in peft.get_peft_model_state_dict(theirs).items():
        assert torch.equal(lora_ext.get_peft_model_state_dict(ours)[key], value)
    status = [[(r.name, r.requires_grad, r.devices, r.active_adapters) for r in m.get_layer_status()
               if "token" in r.name] for m in (theirs, ours)]  # fmt: skip
    assert status[0] == status[1]
    rows = {row.name: row for row in lora_ext.explain(ours) if "trained" in row.reason}
    assert len(rows) == 1 + len(FAMILIES[family][2])


def tied_weights(model: LoraModel, family: str) -> list[Any]:
    base = model.get_base_model()
    names = [FAMILIES[family][1], *FAMILIES[family][2]]
    return [base.get_submodule(f"{name}.token_adapter").base_layer.weight for name in names]


@each_family
@pytest.mark.filterwarnings("ignore")
def test_merging(family: str, tmp_path: Path) -> None:
    theirs, ours, inputs = pair(family, torch.float32, tmp_path)
    plain = FAMILIES[family][0]()[0]
    right = ours(**inputs).logits
    near = {"rtol": 1e-4, "atol": 1e-5}
    before = [(p, p.detach().clone()) for p in tied_weights(ours, family)]
    state = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    ours.merge_adapter()
    merged = tied_weights(ours, family)
    assert all(weight is merged[0] is not before[0][0] for weight in merged)
    torch.testing.assert_close(ours(**inputs).logits, right, **near)
    now = ours.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in state.items())
    ours.load_state_dict(now)  # a merged model stays so
    torch.testing.assert_close(ours(**inputs).logits, right, **near)
    ours.unmerge_adapter()
    for weight, (parameter, values) in zip(tied_weights(ours, family), before, strict=True):
        assert weight is parameter and torch.equal(parameter, values)
    assert torch.equal(ours(**inputs).logits, right)
    with ours.disable_adapter():
        torch.testing.assert_close(ours(**inputs).logits, plain(**inputs).logits)
    delta = ours.get_base_model().get_submodule(FAMILIES[family][1]).token_adapter
    assert delta.get_delta_weight("default").count_nonzero(1).count_nonzero() == 4
    unloaded = ours.merge_and_unload()
    torch.testing.assert_close(unloaded(**inputs).logits, right, **near)
    weight = unloaded.get_input_embeddings().weight
    assert torch.equal(weight, theirs.merge_and_unload().get_input_embeddings().weight)
    tied = unloaded.get_output_embeddings().weight is weight
    assert tied == bool(FAMILIES[family][2]) == unloaded.config.tie_word_embeddings


def small(**fields: Any) -> LoraModel:
    torch.manual_seed(0)
    base = nn.ModuleDict({"emb": nn.Embedding(N, K), "lin": nn.Linear(K, K)})
    fields = {"r": 2, "target_modules": ["lin"], "trainable_token_indices": {"emb": ROWS}} | fields
    return get_lora_model(base, LoraConfig(**fields))


def emb(model: LoraModel) -> Any:
    return model.get_base_model()["emb"]  # type: ignore[index]


def test_several_adapters() -> None:
    model = small()
    for name, rows in {"apart": [1, 3], "over": [3, 7]}.items():
        config = LoraConfig(target_modules=["lin"], trainable_token_indices={"emb": rows})
        model.add_adapter(name, config)
    layer = emb(model).token_adapter
    for i, (_, table) in enumerate(layer.trainable_tokens_delta.items()):
        table.data.fill_(i + 1)
    x = torch.arange(N)
    model.set_adapter(["default", "apart"])
    right = layer.base_layer.weight.detach().clone()
    right[ROWS], right[[1, 3]] = 1.0, 2.0
    assert torch.equal(emb(model)(x), right)
    assert torch.equal(emb(model).weight, right)
    trains = {n: t.requires_grad for n, t in layer.trainable_tokens_delta.items()}
    assert trains == {"default": True, "apart": True, "over": False}
    for call in (model.set_adapter, model.merge_adapter):
        with pytest.raises(ValueError, match="both have token 7"):
            call(["default", "over"])
        assert torch.equal(emb(model)(x), right) and not layer.merged
        assert model.active_adapters == ["default", "apart"]
    model.merge_adapter(["default"])
    model.merge_adapter(["apart"])
    assert torch.equal(emb(model)(x), right)
    model.set_adapter("over")
    assert not layer.merged and torch.equal(emb(model)(x)[[3, 7]], torch.full((2, K), 3.0))
    model.rename_adapter("over", "items")
    model.delete_adapter("default")
    assert list(layer.trainable_tokens_delta) == ["apart", "items"] == list(layer.token_indices)
    assert torch.equal(layer.trainable_tokens_original["items"], layer.weight[[3, 7]])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(emb(twin)(x), emb(model)(x))
    with pytest.warns(UserWarning, match=r"no copy of \['emb'\]"):
        model.add_weighted_adapter(["apart", "items"], [1, 1], "both")
    assert "both" not in layer.adapters


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no such module": ({"trainable_token_indices": {"none": [1]}}, ValueError, "'none'} not found"),
    "no embeddings": ({"trainable_token_indices": [1]}, ValueError, "'embed_tokens'} not found"),
    "no such row": ({"trainable_token_indices": {"emb": [N]}}, ValueError, "expected at most 10"),
    "twice": ({"trainable_token_indices": {"emb": [1, 1]}}, ValueError, "each once"),
    "negative": ({"trainable_token_indices": {"emb": [-1]}}, ValueError, "from 0"),
    "none": ({"trainable_token_indices": {"emb": []}}, ValueError, "numbers of tokens"),
    "a number": ({"trainable_token_indices": 1}, TypeError, "trainable_token_indices: got 1"),
    "adapted": ({"target_modules": ["emb"]}, TypeError, "one of target_modules, too"),
    "saved whole": ({"modules_to_save": ["emb"]}, ValueError, "already marked to be trained fully"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_is_refused(what: str) -> None:
    fields, error, text = WRONG[what]
    with pytest.raises(error, match=text):
        small(**fields)
    model = small()
    with pytest.raises((TypeError, ValueError)):  # beside another adapter
        model.add_adapter("two", LoraConfig(**{"target_modules": ["lin"]} | fields))
    assert list(model.peft_config) == ["default"] and list(emb(model).token_adapter.adapters) == [
        "default"
    ]


def test_of_a_convolution_is_refused() -> None:
    base = nn.ModuleDict({"emb": nn.Conv1d(2, 2, 1), "lin": nn.Linear(2, 2)})
    config = LoraConfig(target_modules=["lin"], trainable_token_indices={"emb": [0]})
    with pytest.raises(
        TypeError, match=r"Conv1d, its weight a Parameter, expected an nn\.Embedding"
    ):
        get_lora_model(base, config)
    assert isinstance(base["emb"], nn.Conv1d)


@pytest.mark.filterwarnings("ignore")
def test_through_files(tmp_path: Path) -> None:
    model = small()
    disturb(emb(model).token_adapter.trainable_tokens_delta["default"])
    model.save_pretrained(tmp_path)
    again = LoraModel.from_pretrained(small().unload(), tmp_path)
    x = torch.arange(N)
    assert torch.equal(emb(again)(x), emb(model)(x))
    other = small(trainable_token_indices={"emb": [0, 1, 2]})
    with pytest.raises(ValueError, match="trainable_token_indices: the files' are not those"):
        lora_ext.hotswap_adapter(other, tmp_path, "default")
    wrong = small(trainable_token_indices={"emb": [0, 1]})
    with pytest.raises(ValueError, match="trainable_token_indices: the file says"):
        wrong.load_adapter(tmp_path, "default")


def test_injected_on_meta() -> None:
    model = small()
    disturb(emb(model).token_adapter.trainable_tokens_delta["default"])
    state = lora_ext.get_peft_model_state_dict(model)
    state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
    base = small().unload()
    config = copy.deepcopy(model.peft_config["default"])
    lora_ext.inject_adapter_in_model(config, base, low_cpu_mem_usage=True)
    assert base["emb"].token_adapter.trainable_tokens_delta["default"].is_meta
    lora_ext.set_peft_model_state_dict(base, state, low_cpu_mem_usage=True)
    assert torch.equal(base["emb"](torch.arange(N)), emb(model)(torch.arange(N)))


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_under_vmap(name: str) -> None:
    base = BASES[name]().requires_grad_(False)
    rows, tables = TokenRows.of(ROWS, torch.device("cpu")), torch.randn(4, len(ROWS), K)
    x = torch.randn(3, K) if name == "head" else torch.arange(N)
    together = torch.vmap(lambda table: run(base, rows, table, x))(tables)
    for table, y in zip(tables, together, strict=True):
        torch.testing.assert_close(y, run(base, rows, table, x))


@pytest.mark.filterwarnings("ignore")
def test_files_with_the_embeddings_themselves(tmp_path: Path) -> None:
    theirs, ours, inputs = pair("gpt2", torch.float32, tmp_path / "first")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours.merge_adapter()
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    for who in ("theirs", "ours"):
        base = BUILDERS["gpt2"]()[0]
        again = LoraModel.from_pretrained(base, tmp_path / who)
        torch.testing.assert_close(again(**inputs).logits, theirs(**inputs).logits)
        again.load_adapter(tmp_path / who, "default")  # into what is there
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    plain = BUILDERS["gpt2"]()[0].lm_head.weight
    assert torch.equal(tensors["base_model.model.lm_head.token_adapter.base_layer.weight"], plain)
    tensors[f"base_model.model.lm_head.{DELTA}"] += 1
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AdapterFileError, match="which is the same here"):
        LoraModel.from_pretrained(BUILDERS["gpt2"]()[0], tmp_path / "theirs")


@pytest.mark.parametrize("name", ["embedding", "head"])
def test_compiled_in_one_graph(name: str) -> None:
    layer = TrainableTokensLayer(BASES[name]().requires_grad_(False))
    layer.add_adapter("default", ROWS)
    layer.set_adapter("default")
    disturb(layer.trainable_tokens_delta["default"])
    x = torch.randn(3, K) if name == "head" else torch.arange(N)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("ensure", [False, True])
def test_other_rows_of_what_is_tied(ensure: bool) -> None:
    base, _ = BUILDERS["gpt2"]()
    rows = {"transformer.wte": [1, 2], "lm_head": [3]}
    config = LoraConfig(
        target_modules=["c_attn"], trainable_token_indices=rows, ensure_weight_tying=ensure
    )
    if ensure:
        with pytest.raises(ValueError, match="Cannot ensure weight tying when different"):
            get_lora_model(base, config)
        return
    model = get_lora_model(base, config)
    assert model.get_base_model().lm_head.token_adapter.token_indices == {"default": [3]}
    config = LoraConfig(target_modules=["c_attn"], trainable_token_indices=[1])
    with pytest.raises(ValueError, match="'lm_head' does not have the rows of the embedding"):
        model.add_adapter("two", config)


def test_values_of_other_rows_are_not_loaded_over_an_adapter(tmp_path: Path) -> None:
    def model(rows: list[int]) -> LoraModel:
        net = nn.ModuleDict({"embed_tokens": nn.Embedding(9, 4), "l": nn.Linear(4, 4)})
        config = LoraConfig(target_modules=["l"], trainable_token_indices=rows)
        return get_lora_model(net, config)

    model([5, 7]).save_pretrained(tmp_path)
    model([5, 7]).load_adapter(tmp_path, "default")
    with pytest.raises(AdapterFileError, match=r"the file says \[5, 7\].* has \[7, 5\]"):
        model([7, 5]).load_adapter(tmp_path, "default")


@pytest.mark.filterwarnings("ignore")
def test_an_empty_list_is_no_rows(tmp_path: Path) -> None:
    """PEFT writes a table without rows for it, with which it cannot run itself."""
    base = BUILDERS["gpt2"]()[0]
    fields = {"target_modules": ["c_attn"], "trainable_token_indices": []}
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**fields)).eval()
    nn.init.normal_(theirs.base_model.model.transformer.h[0].attn.c_attn.lora_B.default.weight)
    theirs.save_pretrained(tmp_path)
    read = LoraModel.from_pretrained(base, tmp_path)
    assert not list(read.token_layers())
    values = {k: v for k, v in peft.get_peft_model_state_dict(theirs).items() if v.numel()}
    state = lora_ext.get_peft_model_state_dict(read)
    assert state.keys() == values.keys() and len(state) > 1
    assert all(torch.equal(state[key], values[key]) for key in state)
