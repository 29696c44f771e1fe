"""Hybrids: their config, the order of their blocks, one set of rotary tables; and windows and MLPs against plain loops."""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from franca.core.config import check, config, to_dict
from franca.core.errors import ConfigError
from franca.models.base import Batch, Context, ModelConfig
from franca.models.gpt2 import GPT2Config
from franca.models.hawk import HawkConfig
from franca.models.hybrid import HybridConfig
from franca.models.layers import RopeScaling
from franca.models.llama import LlamaConfig
from franca.models.mamba import MambaConfig
from franca.parallel.apply import init_weights

SHARED = {"vocab_size": 61, "dim": 24, "num_layers": 2, "max_seq_len": 96, "init_std": 0.2}
LLAMA = LlamaConfig(num_heads=4, num_kv_heads=2, mlp_dim=32, **SHARED)
HAWK = HawkConfig(kind="hawk", width_multiple=8, mlp_dim=32)
MAMBA = MambaConfig(kind="mamba", head_dim=8, state_dim=6)
WINDOWED = LlamaConfig(num_heads=4, mlp_dim=32, window=5)
HYBRID = HybridConfig(kind="hybrid", blocks=(HAWK, WINDOWED, MAMBA), **{**SHARED, "num_layers": 4, "norm_eps": 1e-4})


@config
class Section:
    model: ModelConfig


def read(**values: Any) -> Any:
    return check(Section, {"model": {"kind": "hybrid", **values}}, "here").model


def build(shape: Any, seed: int = 0) -> Any:
    model = shape.build()
    init_weights(model, torch.Generator().manual_seed(seed))
    return model


def ids(rows: int, length: int, seed: int = 2) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- the config


def test_a_name_is_a_family_as_it_comes_and_a_section_one_with_options() -> None:
    shape = read(
        dim=64, num_layers=6, blocks=["hawk", "hawk", {"kind": "llama", "window": 1024, "rope_scaling": {"factor": 2.0}}]
    )
    assert [block.kind for block in shape.blocks] == ["hawk", "hawk", "llama"]
    assert shape.blocks[0] == HawkConfig(kind="hawk")
    assert shape.blocks[2] == LlamaConfig(window=1024, rope_scaling=RopeScaling(factor=2.0))
    assert shape.problems() == []


@pytest.mark.parametrize("blocks", [["mamba"], ["hawk", {"kind": "llama", "window": 7}, {"kind": "mamba", "a_max": 2.0}]])
def test_a_config_survives_the_way_to_plain_types_and_back(blocks: list[Any]) -> None:
    shape = read(dim=64, blocks=blocks)
    plain = to_dict(shape)
    assert check(Section, {"model": plain}, "here").model == shape
    assert all("dim" not in block for block in plain["blocks"])


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (["hwk"], r"model\.blocks\[0\]\.kind: 'hwk' is not one of .* \(did you mean 'hawk'\?\)"),
        (["hawk", {"window": 4}], r"model\.blocks\[1\]\.kind: is required and was not given; one of gpt2, hawk"),
        (["hawk", {"kind": "llama", "windw": 4}], r"model\.blocks\[1\]\.windw: unknown key \(did you mean 'window'\?\)"),
        ([{"kind": "hawk", "form": "x"}], r"model\.blocks\[0\]\.form: 'x' is not one of 'paper' or 'lingua'"),
        ([{"kind": "hawk", "dim": 8, "tied": True}], r"model\.blocks\[0\]: dim, tied: said once for the whole model; move"),
        (
            [{"kind": "hybrid", "blocks": ["hawk"]}],
            r"model\.blocks\[0\]: a hybrid cannot be part of a hybrid; write its blocks",
        ),
        ([3], r"model\.blocks\[0\]: input should be an object, got 3"),
        ("hawk", r"model\.blocks: input should be a valid array, got 'hawk'"),
    ],
)
def test_blocks_that_are_not_understood_are_refused_in_one_line(blocks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^here: {message}") as caught:
        read(blocks=blocks)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("blocks", "words"),
    [
        ((), ["model.blocks: is empty", "[hawk, hawk, llama]"]),
        ((HAWK, dataclasses.replace(MAMBA, head_dim=7)), ["model.head_dim: 7 does not divide expand * dim = 48"]),
        ((LlamaConfig(num_heads=5), HAWK, LlamaConfig(num_heads=5)), ["dim 24 does not divide into 5 heads"]),
        ((WINDOWED, dataclasses.replace(WINDOWED, rope_theta=1e6)), ["different RoPE tables", "rope_theta"]),
        ((WINDOWED, LlamaConfig(num_heads=2)), ["different RoPE tables", "the same heads"]),
        ((HAWK, GPT2Config(num_heads=4)), ["learned positions", "take another"]),
    ],
    ids=["empty", "mamba", "heads", "theta", "head width", "gpt2"],
)
def test_a_hybrid_that_cannot_be_built_is_one_problem_in_words(blocks: Any, words: list[str]) -> None:
    found = dataclasses.replace(HYBRID, blocks=blocks).problems()
    assert len(found) == 1
    assert all(word in found[0] for word in words), found


# --- the model


def test_the_blocks_are_repeated_over_the_depth_in_the_shape_of_the_whole_model() -> None:
    model = build(HYBRID)
    kinds = [type(layer).__module__.rsplit(".", 1)[1] for layer in model.layers]
    assert kinds == ["hawk", "llama", "mamba", "hawk"]
    assert model.windows == [5]
    assert [layer.norm.eps for layer in (model.layers[0], model.layers[2], model.layers[3])] == [1e-4] * 3
    assert model.layers[2].output.init_std == model.layers[3].output.init_std == 0.2 / math.sqrt(2 * 4)
    assert model.rope.cos.shape == (96, 6)
    assert build(dataclasses.replace(HYBRID, blocks=(HAWK, MAMBA))).rope is None


@pytest.mark.parametrize(
    "alone", [LLAMA, dataclasses.replace(HAWK, **SHARED), dataclasses.replace(MAMBA, **SHARED)], ids=lambda c: c.kind
)
def test_a_hybrid_of_one_family_is_that_family(alone: Any) -> None:
    hybrid = build(HybridConfig(kind="hybrid", blocks=(alone,), **SHARED))
    plain = build(alone)
    assert [name for name, _ in hybrid.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert torch.equal(hybrid(ids(2, 50)), plain(ids(2, 50)))
    assert hybrid.flops_per_token(50) == plain.flops_per_token(50)


def test_a_hybrid_is_its_blocks_one_after_the_other() -> None:
    model, tokens = build(HYBRID), ids(2, 50)
    cos, sin = model.rope(slice(0, 50), torch.float32)
    places = torch.arange(50)
    distance = places[:, None] - places
    masks = {5: ((distance >= 0) & (distance < 5))[None, None]}
    x = model.embedding(tokens)
    for layer in model.layers:
        x = layer(x, Context(cos, sin, masks, None, 50), None)
    torch.testing.assert_close(model(tokens), model.head(model.norm(x)), rtol=0, atol=1e-5)


def test_windows_that_differ_each_have_their_own_mask() -> None:
    wide = dataclasses.replace(WINDOWED, window=9)
    everything = dataclasses.replace(WINDOWED, window=None)
    model = build(dataclasses.replace(HYBRID, blocks=(WINDOWED, HAWK, wide, everything)))
    assert model.windows == [0, 5, 9]
    tokens = ids(2, 40)
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(2, 40)
        parts = torch.cat([model(part, cache=cache) for part in tokens.split([1, 17, 1, 21], dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-5)


# --- windows and MLPs, against loops in float64


def rms(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * gain


def turned(head: Tensor, position: int, theta: float) -> Tensor:
    half = len(head) // 2
    angles = position / theta ** (torch.arange(half).double() / half)
    one, two = head[:half], head[half:]
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()])


@torch.no_grad()
def by_loops(model: Any, tokens: Tensor) -> Tensor:
    """Logits of one document (T,) in float64: every position looks at each that it may see."""
    c, p = model.config, {name: parameter.double() for name, parameter in model.named_parameters()}
    width, x = c.width_of_head, p["embedding.weight"][tokens]
    for number in range(c.num_layers):
        q = {name.removeprefix(f"layers.{number}."): v for name, v in p.items() if name.startswith(f"layers.{number}.")}
        u = rms(x, q["attention_norm.weight"], c.norm_eps)
        queries, keys, values = (u @ q[f"attention.{name}.weight"].t() for name in ("query", "key", "value"))
        mixed = torch.zeros(len(x), c.num_heads * width, dtype=torch.float64)
        for head in range(c.num_heads):
            mine, shared = (slice(n * width, (n + 1) * width) for n in (head, head * c.num_kv_heads // c.num_heads))
            at = [turned(key, t, c.rope_theta) for t, key in enumerate(keys[:, shared])]
            for t in range(len(x)):
                seen = range(max(0, t - (c.window or len(x)) + 1), t + 1)
                query = turned(queries[t, mine], t, c.rope_theta)
                shares = torch.stack([query @ at[s] for s in seen]).div(math.sqrt(width)).softmax(dim=0)
                mixed[t, mine] = shares @ values[seen.start : seen.stop, shared]
        x = x + mixed @ q["attention.output.weight"].t()
        u = rms(x, q["mlp_norm.weight"], c.norm_eps)
        up = u @ q["mlp.up.weight"].t()
        if c.mlp == "swiglu":
            gate = u @ q["mlp.gate.weight"].t()
            up = up * gate / (1 + torch.exp(-gate))
        elif c.mlp == "relu2":
            up = torch.where(up > 0, up * up, 0)
        else:
            up = up * (1 + torch.erf(up / math.sqrt(2))) / 2
        x = x + up @ q["mlp.down.weight"].t()
    return rms(x, p["norm.weight"], c.norm_eps) @ p["head.weight"].t()


@pytest.mark.parametrize("window", [1, 2, 7, 24, 25, 100])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_a_window_sees_that_many_positions_also_in_documents(window: int, grad: bool) -> None:
    model, row = build(dataclasses.replace(LLAMA, window=window)), ids(1, 24)
    lengths = [1, 15, 8]
    borders = [0, 1, 16, 24]
    document = torch.cat([torch.full((length,), n) for n, length in enumerate(lengths)])[None]
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    expected = torch.cat([by_loops(model, row[0, first:last]) for first, last in pairwise(borders)])
    with torch.set_grad_enabled(grad):
        whole, packed = model(row)[0], model(row, document, position)[0]
    torch.testing.assert_close(whole.double(), by_loops(model, row[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(packed.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3, 9])
def test_a_window_in_a_cache_whose_rows_have_different_lengths(window: int) -> None:
    model, tokens, lengths = build(dataclasses.replace(LLAMA, window=window)), ids(3, 22), [2, 10, 5]
    expected = torch.stack([by_loops(model, row) for row in tokens])
    with torch.no_grad():
        cache = model.new_cache(3, 22)
        for row, length in enumerate(lengths):
            given = model.next_logits(tokens[row : row + 1, :length], cache.rows(row, row + 1))
            torch.testing.assert_close(given[0].double(), expected[row, length - 1], rtol=0, atol=1e-5)
        for step in (1, 4, 1, 6):
            part = torch.stack([tokens[row, length : length + step] for row, length in enumerate(lengths)])
            given = model(part, cache=cache).double()
            for row, length in enumerate(lengths):
                torch.testing.assert_close(given[row], expected[row, length : length + step], rtol=0, atol=1e-5)
            lengths = [length + step for length in lengths]


@pytest.mark.parametrize("mlp", ["swiglu", "relu2", "gelu"])
def test_an_mlp_is_the_one_of_its_name(mlp: Any) -> None:
    model, row = build(dataclasses.replace(LLAMA, mlp=mlp)), ids(1, 20)
    torch.testing.assert_close(model(row)[0].double(), by_loops(model, row[0]), rtol=0, atol=1e-5)
    assert ("layers.0.mlp.gate.weight" in model.state_dict()) == (mlp == "swiglu")
    model.losses(Batch(row, ids(1, 20, seed=3)))["nll"].backward()
    assert all(bool(p.grad.isfinite().all()) and p.grad.abs().max() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    "shape", [LlamaConfig(dim=4096, mlp="relu2"), HawkConfig(kind="hawk", dim=4096, mlp="gelu")], ids=lambda c: c.kind
)
def test_an_mlp_without_a_gate_is_four_times_as_wide(shape: Any) -> None:
    assert shape.width_of_mlp == 4 * 4096
    assert dataclasses.replace(shape, mlp="swiglu").width_of_mlp == 11008
    assert dataclasses.replace(shape, mlp_dim=100).width_of_mlp == 100
