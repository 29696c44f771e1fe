"""Products in float8: within the format's error of exact ones, and nothing else about the model is different."""

import sys
from typing import Any

import pytest
import torch

from franca.core.errors import ConfigError
from franca.models.base import Batch
from franca.models.gpt2 import GPT2Config
from franca.models.llama import LlamaConfig
from franca.parallel import float8
from franca.parallel.apply import parallelize
from franca.parallel.float8 import Float8Config, Float8Linear
from franca.parallel.mesh import ALONE, ParallelConfig
from franca.train.config import read_config, resolve

SHAPE = LlamaConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=96, max_seq_len=64)
CPU = torch.device("cpu")
RECIPES = pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])


def build(given: Float8Config | None, precision: Any = "fp32", shape: Any = SHAPE) -> Any:
    with torch.device("meta"):
        model = shape.build()
    parallelize(model, ALONE, ParallelConfig(), precision, CPU, seed=1, float8=given)
    return model


def batch(seed: int = 2) -> Batch:
    ids = torch.randint(61, (4, 33), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:])


def off(given: torch.Tensor, exact: torch.Tensor) -> float:
    return float((given.double() - exact).norm() / exact.norm())


@RECIPES
def test_products_and_gradients_are_within_the_formats_error_of_float64(recipe: Any) -> None:
    """e4m3 keeps 3 bits after the first, an error of at most 2^-4 for a number and about half of it on average; e5m2 2 bits."""
    model = build(Float8Config(recipe=recipe, emulate=True))
    linear = model.layers[0].mlp.up
    assert isinstance(linear, Float8Linear)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 16, 32, generator=generator).requires_grad_()
    grad = torch.randn(4, 16, 96, generator=generator)
    y = linear(x)
    y.backward(grad)
    exact_x, weight = x.detach().double(), linear.weight.detach().double()
    assert 0.005 < off(y.detach(), exact_x @ weight.T) < 0.06
    assert 0.005 < off(x.grad, grad.double() @ weight) < 0.09
    assert off(linear.weight.grad, grad.double().flatten(0, 1).T @ exact_x.flatten(0, 1)) < (
        1e-6 if "gw_hp" in recipe else 0.09
    )
    assert not torch.equal(linear.weight.grad, torch.zeros(96, 32))


def test_names_and_initial_weights_are_the_plain_models() -> None:
    plain, model = build(None), build(Float8Config(emulate=True))
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 2 * 7
    assert not isinstance(model.head, Float8Linear)


def test_biases_are_added() -> None:
    shape = GPT2Config(vocab_size=61, dim=32, num_layers=1, num_heads=4, max_seq_len=64)
    model = build(Float8Config(emulate=True), shape=shape)
    linear = model.layers[0].mlp.up
    with torch.no_grad():
        linear.bias.copy_(torch.arange(128))
    torch.testing.assert_close(linear(torch.zeros(2, 32)), torch.arange(128.0).expand(2, 128))


def test_validation_is_exactly_the_plain_models() -> None:
    plain, model = build(None, "bf16"), build(Float8Config(emulate=True), "bf16")
    with torch.no_grad():
        assert not torch.equal(model(batch().tokens_BT), plain(batch().tokens_BT))
        model.eval()
        assert torch.equal(model(batch().tokens_BT), plain.eval()(batch().tokens_BT))


@RECIPES
def test_twenty_steps_learn_as_much_as_plain_ones(recipe: Any) -> None:
    last = {}
    for name, given in (("plain", None), ("float8", Float8Config(recipe=recipe, emulate=True))):
        model = build(given)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(20):
            loss = model.losses(batch())["nll"] / 128
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        last[name] = losses[-1]
        assert losses[-1] < losses[0] - 1.5
    assert last["float8"] == pytest.approx(last["plain"], abs=0.15)


def test_two_ranks_train_as_one(launch, run_file, records) -> None:
    """Scales are of a rank's own rows of activations, so that ranks agree with one process to the format's error only."""
    found = []
    for ranks in (1, 2):
        sections = {
            "train": {"length": "5 steps", "precision": "fp32", "float8": {"emulate": True}},
            "optim": {"warmup": "1 steps"},
            "validation": {"at_end": True},
        }
        run = launch(run_file(f"ranks{ranks}", **sections), ranks=ranks)
        assert run.wait() == [0] * ranks
        found.append([*records(run.folder), *records(run.folder, "metrics.validation.jsonl")])
    assert [r["loss"] for r in found[1]] == pytest.approx([r["loss"] for r in found[0]], rel=2e-3)


def test_a_filter_chooses_by_name_and_widths() -> None:
    model = build(Float8Config(filter=("layers.1.mlp.*", "*.output"), emulate=True))
    names = [name for name, module in model.named_modules() if isinstance(module, Float8Linear)]
    mlp = [f"layers.1.mlp.{part}" for part in ("gate", "up", "down")]
    assert sorted(names) == sorted([*mlp, "layers.0.attention.output", "layers.1.attention.output"])


def test_what_cannot_be_is_refused(run_file, monkeypatch: pytest.MonkeyPatch) -> None:
    path = run_file()
    for words, complaint in (
        (["train.float8.recipe=rowwise"], "train.precision is fp32; use bf16"),
        (
            ["train.float8.emulate=true", "train.float8.filter=[layers.*.mlp.*,head]"],
            "'head' names no product.*attention.query",
        ),
        (["train.float8.recipe=rowwise", "train.precision=bf16", "data.seq_len=24"], "is 24; .* multiple of 16"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            resolve(read_config(path, words), 1)
    with pytest.raises(ConfigError, match=r"cpu has no products in float8 .* set train.float8.emulate"):
        build(Float8Config())
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setattr(float8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'franca\[float8\]'"):
        resolve(read_config(path, ["train.float8.emulate=true"]), 1)


@pytest.mark.parametrize(
    ("name", "capability", "can"),
    [
        ("NVIDIA H100 80GB HBM3", (9, 0), True),
        ("A100-SXM4-80GB", (8, 0), False),
        ("AMD Instinct MI250X", (9, 0), False),
        ("Something New", (8, 9), True),
        ("Something Old", (8, 6), False),
    ],
)
def test_devices_that_can(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], can: bool) -> None:
    """What the table of devices knows counts, else the capability."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert float8._can(torch.device("cuda", 0)) is can
