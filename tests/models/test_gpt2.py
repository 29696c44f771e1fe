"""GPT-2: its size, dropout, documents, vocabulary and cache. That transformers computes the same: see `test_hf`."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from franca.core.config import check, config, to_dict
from franca.core.errors import ConfigError
from franca.models import layers
from franca.models.base import IGNORE, Batch, ModelConfig, count_parameters
from franca.models.gpt2 import GPT2Config
from franca.models.layers import LayerNorm, attention
from franca.parallel.apply import init_weights

SMALL = GPT2Config(vocab_size=61, dim=32, num_layers=2, num_heads=4, max_seq_len=48, dropout=0.0)
TR1_13B = GPT2Config(vocab_size=50257, vocab_multiple=256, dim=5120, num_layers=40, num_heads=32, max_seq_len=2048)


@config
class Section:
    model: ModelConfig


def build(shape: GPT2Config, scatter: bool = True) -> Any:
    """Biases and gains too with numbers of their own, unless they are to be as they begin."""
    model = shape.build()
    init_weights(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters() if scatter else ():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def ids(rows: int = 2, length: int = 48) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(2))


# --- shape


def test_tr1_13b_has_the_parameters_that_it_had() -> None:
    with torch.device("meta"):
        model = TR1_13B.build()
    counted = count_parameters(model)
    assert counted["total"] == 12_854_282_240
    assert counted["embedding"] == 50_432 * 5120
    assert counted["positions"] == 2048 * 5120
    assert counted["non_embedding"] == counted["total"] - counted["embedding"]


@pytest.mark.parametrize("options", [{}, {"tied": False}, {"mlp_dim": 40}, {"vocab_multiple": 64}], ids=str)
def test_the_parameters_are_as_many_as_by_hand(options: dict[str, Any]) -> None:
    c = dataclasses.replace(SMALL, **options)
    d, f, v = 32, c.mlp_dim or 128, c.num_rows
    layer = 4 * (d * d + d) + 2 * d * f + f + d + 4 * d
    expected = v * d * (1 if c.tied else 2) + 48 * d + 2 * layer + 2 * d
    assert sum(parameter.numel() for parameter in c.build().parameters()) == expected


def test_a_shape_that_cannot_be_built_is_one_problem_in_words() -> None:
    assert dataclasses.replace(SMALL, num_heads=5).problems() == [
        "model: dim 32 does not divide into 5 heads; change one of them"
    ]
    assert SMALL.problems() == []


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_rate_of_dropout_out_of_range_is_refused(dropout: float) -> None:
    with pytest.raises(ConfigError, match=r"model\.dropout"):
        check(Section, {"model": {"kind": "gpt2", "dropout": dropout}}, "here")


def test_the_defaults_are_those_it_was_trained_with() -> None:
    read = check(Section, {"model": {"kind": "gpt2"}}, "here").model
    assert (read.dropout, read.tied, read.mlp_dim, read.norm_eps) == (0.1, True, None, 1e-5)  # type: ignore[attr-defined]
    assert check(Section, {"model": to_dict(SMALL)}, "here").model == SMALL


def test_weights_begin_narrower_on_the_way_into_the_residual_stream() -> None:
    c = dataclasses.replace(SMALL, dim=256, num_layers=8, init_std=0.1, mlp_dim=512)
    for name, parameter in build(c, scatter=False).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            narrow = name.endswith(("attention.output.weight", "mlp.down.weight"))
            expected = 0.1 / math.sqrt(16) if narrow else 0.1
            assert abs(float(parameter.detach().std()) / expected - 1) < 0.03, name


def test_only_matrices_decay() -> None:
    groups = SMALL.build().param_groups()
    assert all("norm" in name or name.endswith("bias") for name in groups["no_decay"])
    assert {"embedding.weight", "positions.weight"} <= set(groups["decay"])


def test_flops_are_six_for_each_weight_of_a_product_and_attention() -> None:
    products = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 61 * 32
    mixing = 2 * 2 * 2 * 32 * (48 + 1) / 2
    assert SMALL.build().flops_per_token(48) == 6 * products + 3 * mixing


# --- LayerNorm


@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_layer_norm_is_its_formula(eps: float) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(3, 5, 16, generator=generator) * 3 + 2
    norm = LayerNorm(16, eps)
    norm.weight.data, norm.bias.data = torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    exact = x.double()
    centred = exact - exact.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * norm.weight.double() + norm.bias.double()
    assert (norm(x) - expected).abs().max() < 1e-5
    rough = norm(x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough - expected).abs().max() < 0.1


# --- dropout


def test_evaluation_has_no_dropout_and_training_has() -> None:
    model = build(dataclasses.replace(SMALL, dropout=0.3))
    plain = build(SMALL)
    plain.load_state_dict(model.state_dict())
    torch.manual_seed(0)
    model.train()
    noisy = model(ids())
    assert not torch.equal(noisy, model(ids()))
    torch.manual_seed(0)
    assert torch.equal(noisy, model(ids()))
    assert torch.equal(model.eval()(ids()), plain.eval()(ids()))
    assert torch.equal(model(ids()), model(ids()))
    plain.train()
    assert (plain(ids()) - model(ids())).abs().max() < 1e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_attention_drops_probabilities_and_enlarges_the_rest(masked: bool, grad: bool) -> None:
    """With the unit vectors as values, what comes out are the probabilities themselves."""
    torch.manual_seed(0)
    length, rate = 32, 0.25
    q, k = (torch.randn(4, 8, length, length).requires_grad_(grad) for _ in range(2))
    v = torch.eye(length).expand(4, 8, length, length)
    document = (torch.arange(length) // 10).expand(4, length)
    mask = layers.document_mask(document) if masked else None
    exact = attention(q, k, v, mask, causal=not masked)
    dropped = attention(q, k, v, mask, not masked, rate)
    seen = exact > 0
    kept = dropped > 0
    assert not (kept & ~seen).any()
    assert (dropped - exact / (1 - rate))[kept].abs().max() < 1e-5
    share = float(kept.sum() / seen.sum())
    assert abs(share - (1 - rate)) < 0.03, share  # of at least 5,000 probabilities


def test_dropout_is_never_left_out_by_a_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("this way has no dropout")

    monkeypatch.setattr(layers, "_blocked_attention", refuse)
    model = build(dataclasses.replace(SMALL, dropout=0.1)).train()
    model.losses(Batch(ids(), ids()))["nll"].backward()
    with pytest.raises(AssertionError, match="no dropout"):
        model.eval().losses(Batch(ids(), ids()))


def test_every_place_of_dropout_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding, and in every layer the probabilities and both additions."""
    calls: list[str] = []
    dropout, attend = F.dropout, F.scaled_dot_product_attention

    def noted_dropout(x: Tensor, p: float, training: bool) -> Tensor:
        calls.append(f"hidden {p} {training}")
        return dropout(x, p, training)

    def noted_attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, p: float, **more: Any) -> Tensor:
        calls.append(f"attention {p}")
        return attend(q, k, v, mask, p, **more)

    monkeypatch.setattr(F, "dropout", noted_dropout)
    monkeypatch.setattr(F, "scaled_dot_product_attention", noted_attend)
    model = build(dataclasses.replace(SMALL, dropout=0.2))
    model.train()(ids())
    layer = ["attention 0.2", "hidden 0.2 True", "hidden 0.2 True"]
    assert calls == ["hidden 0.2 True", *layer, *layer]


# --- positions, documents, vocabulary, cache


def test_positions_count() -> None:
    model = build(SMALL).eval()
    same = torch.full((1, 4), 7)
    assert (model(same)[0, 0] - model(same, position_BT=torch.tensor([[5, 6, 7, 8]]))[0, 0]).abs().max() > 0.1


@pytest.mark.parametrize("train", [False, True])
def test_packed_documents_are_computed_as_if_alone(train: bool) -> None:
    model = build(SMALL).train(train)
    lengths, tokens = (20, 1, 27), ids(1)
    document = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    together = model(tokens, document, position)
    alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    assert (together - alone).abs().max() < 1e-5


def test_padded_rows_of_the_vocabulary_are_never_predicted() -> None:
    model = build(dataclasses.replace(SMALL, vocab_multiple=64))
    assert model.embedding.weight.shape == (64, 32)
    assert model(ids()).shape == (2, 48, 61)
    targets = ids()
    targets[0, :5] = IGNORE
    loss = model.losses(Batch(ids(), targets))["nll"]
    expected = F.cross_entropy(model(ids()).flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    assert abs(float((loss / expected).detach()) - 1) < 1e-5
    loss.backward()
    assert not model.embedding.weight.grad[61:].any()


@pytest.mark.parametrize("parts", [(1,) * 48, (20, 1, 27), (48,)], ids=["one by one", "parts", "whole"])
def test_a_row_continued_from_a_cache_is_the_whole_row(parts: tuple[int, ...]) -> None:
    model = build(dataclasses.replace(SMALL, dropout=0.1)).eval().requires_grad_(False)
    cache, tokens = model.new_cache(2, 48), ids()
    got = torch.cat([model(part, cache=cache) for part in tokens.split(parts, dim=1)], dim=1)
    assert (got - model(tokens)).abs().max() < 1e-4


def test_rows_of_different_lengths_continue_side_by_side() -> None:
    model = build(SMALL).eval().requires_grad_(False)
    cache, tokens = model.new_cache(2, 48), ids()
    for row, length in ((0, 5), (1, 30)):
        model(tokens[row : row + 1, :length], cache=cache.rows(row, row + 1))
    got = model(torch.stack([tokens[0, 5:9], tokens[1, 30:34]]), cache=cache)
    whole = model(tokens)
    assert (got - torch.stack([whole[0, 5:9], whole[1, 30:34]])).abs().max() < 1e-4
