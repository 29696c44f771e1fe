"""Every layer against a naive reference in float64, written from the formula and sharing no code with it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from franca.models.layers import (
    Embedding,
    Linear,
    RMSNorm,
    Rope,
    RopeScaling,
    attention,
    document_mask,
    rotate,
)
from franca.models.llama import MLP, LlamaConfig

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def close(given: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(given.double(), expected.double(), rtol=tolerance, atol=tolerance)


# --- norm, linear, embedding


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm_divides_by_the_root_of_the_mean_square(eps: float) -> None:
    norm = RMSNorm(6, eps)
    gain = normal(6, seed=1)
    norm.weight.data = gain
    x = normal(2, 3, 6) * 0.1  # small, so that eps counts
    expected = torch.empty(2, 3, 6, dtype=torch.float64)
    for row in range(2):
        for place in range(3):
            vector = [float(value) for value in x[row, place]]
            root = math.sqrt(sum(value * value for value in vector) / 6 + eps)
            for i in range(6):
                expected[row, place, i] = vector[i] / root * float(gain[i])
    close(norm(x).detach(), expected, 1e-6)


def test_linear_is_a_product_with_the_transposed_weight() -> None:
    linear = Linear(5, 3, init_std=1.0)
    linear.reset(seeded())
    weight = linear.weight.detach()
    x = normal(4, 5, seed=3)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for row in range(4):
        for out in range(3):
            expected[row, out] = sum(float(x[row, i]) * float(weight[out, i]) for i in range(5))
    close(linear(x).detach(), expected, 1e-6)


def test_a_linear_weight_starts_with_the_given_deviation() -> None:
    linear = Linear(400, 250, init_std=0.3)
    linear.reset(seeded())
    # 100,000 draws: the deviation of the sample deviation is 0.22 %, of the mean 0.3 % of the deviation.
    assert linear.weight.detach().std().item() == pytest.approx(0.3, rel=0.01)
    assert abs(linear.weight.detach().mean().item()) < 0.3 * 0.015


def test_embedding_looks_up_rows() -> None:
    table = Embedding(7, 4, init_std=1.0)
    table.reset(seeded())
    tokens = torch.tensor([[6, 0], [3, 3]])
    looked_up = table(tokens)
    for row in range(2):
        for place in range(2):
            assert torch.equal(looked_up[row, place], table.weight[tokens[row, place]])


@pytest.mark.parametrize("layer", [RMSNorm(8, 1e-5), Linear(8, 4, init_std=0.5)])
def test_products_are_computed_in_the_dtype_of_the_input_and_parameters_keep_theirs(layer: torch.nn.Module) -> None:
    layer.reset(seeded())
    out = layer(normal(3, 8).bfloat16())
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert {p.dtype for p in layer.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}


# --- rotary positions


def reference_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> list[float]:
    """The rule of Llama 3.1, in words: long wavelengths are stretched, short ones kept, those between interpolated."""
    frequencies = []
    for pair in range(width // 2):
        frequency = theta ** (-2.0 * pair / width)
        if scaling is not None:
            turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)  # in the original context
            if turns < scaling.low_freq_factor:
                frequency /= scaling.factor
            elif turns < scaling.high_freq_factor:
                share = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
                frequency = share * frequency + (1 - share) * frequency / scaling.factor
        frequencies.append(frequency)
    return frequencies


def turned(x: Tensor, position: int, frequencies: list[float]) -> Tensor:
    """One head's vector, turned by complex multiplication: pair i is (x_i, x_{i + E/2})."""
    half = len(frequencies)
    result = torch.empty(2 * half, dtype=torch.float64)
    for pair, frequency in enumerate(frequencies):
        angle = position * frequency
        value = complex(float(x[pair]), float(x[pair + half])) * complex(math.cos(angle), math.sin(angle))
        result[pair], result[pair + half] = value.real, value.imag
    return result


@pytest.mark.parametrize("scaling", [None, SCALING], ids=["plain", "llama3"])
@pytest.mark.parametrize("positions", [None, [[0, 1, 2, 0, 1, 2], [90, 5, 5, 0, 17, 99]]], ids=["counted", "given"])
def test_rope_turns_every_pair_by_its_position(scaling: RopeScaling | None, positions: list[list[int]] | None) -> None:
    rope = Rope(8, 100, 500.0, scaling)
    rope.reset()
    frequencies = reference_frequencies(8, 500.0, scaling)
    x_BHTE = normal(2, 3, 6, 8)
    given_positions = torch.tensor(positions) if positions else slice(0, 6)
    out = rotate(x_BHTE, *rope(given_positions, torch.float32))
    for row in range(2):
        for head in range(3):
            for place in range(6):
                position = positions[row][place] if positions else place
                close(out[row, head, place], turned(x_BHTE[row, head, place], position, frequencies), 2e-5)


def test_llama3_scaling_has_all_three_regimes_in_the_test_above() -> None:
    plain, scaled = reference_frequencies(8, 500.0, None), reference_frequencies(8, 500.0, SCALING)
    ratios = [after / before for after, before in zip(scaled, plain, strict=True)]
    assert ratios[0] == 1.0
    assert ratios[-1] == 1 / 8
    assert any(1 / 8 < ratio < 1 for ratio in ratios)


def test_rope_products_depend_on_the_distance_alone() -> None:
    rope = Rope(16, 64, 10000.0, None)
    rope.reset()
    q, k = normal(1, 1, 1, 16, seed=1), normal(1, 1, 1, 16, seed=2)

    def product(at: int, other: int) -> float:
        turned_q = rotate(q, *rope(torch.tensor([[at]]), torch.float32))
        return float((turned_q * rotate(k, *rope(torch.tensor([[other]]), torch.float32))).sum())

    assert product(40, 33) == pytest.approx(product(7, 0), abs=1e-4)
    assert abs(product(40, 33) - product(40, 34)) > 1e-3


# --- attention


def reference_attention(q: Tensor, k: Tensor, v: Tensor, may_see: Tensor) -> Tensor:
    """Softmax attention one query at a time, in float64. `may_see`: (B, T, S)."""
    q, k, v = q.double(), k.double(), v.double()
    rows, heads, length, width = q.shape
    per_group = heads // k.shape[1]
    out = torch.empty_like(q)
    for row in range(rows):
        for head in range(heads):
            keys, values = k[row, head // per_group], v[row, head // per_group]
            for place in range(length):
                seen = may_see[row, place].nonzero().flatten()
                scores = [float(q[row, head, place] @ keys[s]) / math.sqrt(width) for s in seen]
                top = max(scores)
                weights = torch.tensor([math.exp(score - top) for score in scores], dtype=torch.float64)
                out[row, head, place] = (weights / weights.sum()) @ values[seen]
    return out


def causal(rows: int, length: int, seen: int | None = None) -> Tensor:
    """(B, T, S): the last `length` of `seen` positions, each with those up to itself."""
    total = seen or length
    numbers = torch.arange(total - length, total)
    return (torch.arange(total) <= numbers[:, None]).expand(rows, -1, -1)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("length", [1, 7, 70])
def test_causal_attention(kv_heads: int, training: bool, length: int) -> None:
    q = normal(2, 4, length, 6, seed=1).requires_grad_(training)
    k, v = normal(2, kv_heads, length, 6, seed=2), normal(2, kv_heads, length, 6, seed=3)
    out = attention(q, k, v, None, causal=length > 1)
    close(out.detach(), reference_attention(q.detach(), k, v, causal(2, length)), 2e-6)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_attention_within_documents(kv_heads: int, training: bool) -> None:
    document = torch.tensor([[0] * 3 + [1] * 62 + [2] * 5, [0] * 70])
    q = normal(2, 4, 70, 6, seed=1).requires_grad_(training)
    k, v = normal(2, kv_heads, 70, 6, seed=2), normal(2, kv_heads, 70, 6, seed=3)
    out = attention(q, k, v, document_mask(document), causal=False)
    may_see = causal(2, 70) & (document[:, :, None] == document[:, None, :])
    close(out.detach(), reference_attention(q.detach(), k, v, may_see), 2e-6)


def test_attention_of_few_new_positions_to_many_old_ones() -> None:
    q, k, v = normal(2, 4, 3, 6, seed=1), normal(2, 2, 11, 6, seed=2), normal(2, 2, 11, 6, seed=3)
    may_see = causal(2, 3, seen=11)
    out = attention(q, k, v, may_see[:, None], causal=False)
    close(out, reference_attention(q, k, v, may_see), 2e-6)


@pytest.mark.parametrize("length", [70, 1030], ids=["short", "long"])
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
def test_gradients_of_attention(length: int, documents: bool) -> None:
    """Against autograd through the plain formula in float64. 1030: beyond what any special short path may take."""
    leaves = [normal(1, heads, length, 4, seed=heads) for heads in (2, 1, 1)]
    document = (torch.arange(length) // 33)[None]
    may_see = causal(1, length) & (document[:, :, None] == document[:, None, :]) if documents else causal(1, length)
    upstream = normal(1, 2, length, 4, seed=9)

    q, k, v = (leaf.double().requires_grad_() for leaf in leaves)
    scores = (q @ k.transpose(2, 3) / 2.0).masked_fill(~may_see[:, None], -torch.inf)
    expected = torch.autograd.grad(scores.softmax(dim=-1) @ v, (q, k, v), upstream.double())

    mine = [leaf.clone().requires_grad_() for leaf in leaves]
    out = attention(*mine, document_mask(document) if documents else None, causal=not documents)
    for mine_now, wanted in zip(torch.autograd.grad(out, mine, upstream), expected, strict=True):
        close(mine_now, wanted, 2e-5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=1, max_size=3))
def test_document_mask_lets_a_position_see_earlier_ones_of_its_document(rows: list[list[int]]) -> None:
    mask = document_mask(torch.tensor(rows))
    assert mask.shape == (len(rows), 1, 5, 5)
    assert mask.dtype == torch.bool
    for row, documents in enumerate(rows):
        for t in range(5):
            for s in range(5):
                assert bool(mask[row, 0, t, s]) == (s <= t and documents[s] == documents[t])


# --- MLP


def test_mlp_is_swiglu() -> None:
    mlp = MLP(LlamaConfig(vocab_size=10, dim=6, num_heads=2, mlp_dim=9, init_std=0.7))
    for part in mlp.children():
        part.reset(seeded(part.weight.numel()))
    x = normal(2, 6)
    gate, up, down = (part.weight.detach().double() for part in (mlp.gate, mlp.up, mlp.down))
    for row in range(2):
        hidden = []
        for f in range(9):
            opened, carried = float(gate[f] @ x[row].double()), float(up[f] @ x[row].double())
            hidden.append(opened / (1 + math.exp(-opened)) * carried)
        close(mlp(x)[row].detach(), down @ torch.tensor(hidden, dtype=torch.float64), 1e-5)
