"""The trunk: what its losses, its masks, its counts and its initial weights promise."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from franca.models.base import IGNORE, Batch, count_parameters
from franca.models.decoder import Decoder
from franca.models.layers import RopeScaling
from franca.models.llama import LlamaConfig
from franca.parallel.apply import init_weights, parallelize
from franca.parallel.mesh import ALONE, ParallelConfig

SMALL = LlamaConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48, max_seq_len=128, init_std=0.2)
LLAMA_3_2_1B = LlamaConfig(
    vocab_size=128256, dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, mlp_dim=8192, max_seq_len=8, tied=True
)
LLAMA_3_1_8B = LlamaConfig(
    vocab_size=128256, dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, mlp_dim=14336, max_seq_len=8
)


def initialised(config: LlamaConfig, seed: int = 0) -> Decoder:
    model = config.build()
    init_weights(model, torch.Generator().manual_seed(seed))
    return model


def on_meta(config: LlamaConfig) -> Decoder:
    with torch.device("meta"):
        return config.build()


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> Decoder:
    return initialised(SMALL)


# --- losses


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_is_the_sum_of_minus_log_softmax_over_valid_targets(tied: bool) -> None:
    model = initialised(dataclasses.replace(SMALL, tied=tied))
    inputs, targets = tokens(3, 20), tokens(3, 20, seed=1)
    targets[0, 5:9] = IGNORE
    losses = model.losses(Batch(inputs, targets))
    log_p = model(inputs).detach().double().log_softmax(dim=-1)
    expected = -sum(float(log_p[b, t, targets[b, t]]) for b in range(3) for t in range(20) if targets[b, t] != IGNORE)
    assert list(losses) == ["nll"]
    assert float(losses["nll"].detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_equal_those_through_the_logits(tied: bool, packed: bool) -> None:
    model = initialised(dataclasses.replace(SMALL, tied=tied, qk_norm=True))
    inputs, targets = tokens(2, 70), tokens(2, 70, seed=1)
    document, position = spans(2, [30, 40]) if packed else (None, None)
    model.losses(Batch(inputs, targets, document, position))["nll"].backward()
    given = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.double()
    model.compute_dtype = torch.float64
    logits = model(inputs, document, position)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        difference = (given[name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, f"{name}: relative error {difference:.2e}"


# --- what a position may see


def spans(rows: int, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Document numbers and positions within documents, (B, T), of rows packed from documents of these lengths."""
    document = torch.cat([torch.full((length,), number) for number, length in enumerate(lengths)])
    position = torch.cat([torch.arange(length) for length in lengths])
    return document.expand(rows, -1).contiguous(), position.expand(rows, -1).contiguous()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("place", [0, 17, 39])
def test_a_later_token_changes_no_earlier_logit(model: Decoder, grad: bool, place: int) -> None:
    before = tokens(2, 40)
    after = before.clone()
    after[:, place] = (after[:, place] + 1) % 61
    with torch.set_grad_enabled(grad):
        first, second = model(before), model(after)
    assert torch.equal(first[:, :place], second[:, :place])
    assert (first[:, place:] != second[:, place:]).flatten(2).any(dim=2).all()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_a_document_changes_no_bit_of_the_others_in_its_row(model: Decoder, grad: bool, changed: int) -> None:
    document, position = spans(1, [15, 70, 20])
    before = tokens(1, 105)
    here = document == changed
    after = torch.where(here, (before + 1) % 61, before)
    with torch.set_grad_enabled(grad):
        first, second = model(before, document, position), model(after, document, position)
    assert torch.equal(first[~here], second[~here])
    assert (first[here] != second[here]).any(dim=1).all()


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_packed_documents_equal_separate_ones(model: Decoder, grad: bool) -> None:
    lengths = [1, 15, 70, 20]
    document, position = spans(1, lengths)
    row = tokens(1, sum(lengths))
    with torch.set_grad_enabled(grad):
        packed = model(row, document, position)[0]
        apart = torch.cat([model(part[None])[0] for part in row[0].split(lengths)])
    torch.testing.assert_close(packed, apart, rtol=0, atol=1e-5)


def test_without_document_numbers_documents_do_see_each_other(model: Decoder) -> None:
    document, position = spans(1, [10, 10])
    row = tokens(1, 20)
    assert not torch.allclose(model(row)[:, 10:], model(row, document, position)[:, 10:], atol=1e-2)


@pytest.mark.parametrize("name", ["document_BT", "position_BT"])
def test_documents_and_positions_are_refused_with_a_cache(model: Decoder, name: str) -> None:
    cache = model.new_cache(1, 8)
    with pytest.raises(ValueError, match="given with a cache, which counts positions itself"):
        model(tokens(1, 4), cache=cache, **{name: torch.zeros(1, 4, dtype=torch.int64)})
    assert cache.lengths.tolist() == [0]


# --- counts


def counted_flops(model: Decoder, length: int) -> float:
    """Per token, of forward and backward, with PyTorch's own counter; nothing is computed on the meta device."""
    inputs = torch.zeros(2, length, dtype=torch.int64, device="meta")
    # The plain products: fused kernels are counted with what they recompute in the backward pass.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.losses(Batch(inputs, inputs))["nll"].backward()
    return counter.get_total_flops() / inputs.numel()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_kv_heads": None},
        {"num_kv_heads": 1, "tied": True},
        {"head_dim": 24},
        {"qk_norm": True},
        {"mlp_dim": None},
        {"num_layers": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [16, 128])
def test_flops_per_token_equals_the_counter_of_pytorch(options: dict[str, Any], length: int) -> None:
    config = dataclasses.replace(SMALL, **options)
    model = on_meta(config)
    # Two products (scores, values), 2 operations each, three times for the backward pass. A causal position sees
    # (length + 1) / 2 others on average, which is what we count; PyTorch's counter takes the whole square.
    per_seen = 3 * 2 * 2 * config.num_heads * config.width_of_head * config.num_layers
    future = length - (length + 1) / 2
    assert counted_flops(model, length) == model.flops_per_token(length) + per_seen * future


@pytest.mark.parametrize(
    ("config", "known"),
    [(LLAMA_3_2_1B, 1_235_814_400), (LLAMA_3_1_8B, 8_030_261_248)],
    ids=["Llama 3.2 1B", "Llama 3.1 8B"],
)
def test_parameter_counts_equal_the_published_ones(config: LlamaConfig, known: int) -> None:
    assert count_parameters(on_meta(config))["total"] == known


@pytest.mark.parametrize("tied", [False, True])
def test_parts_add_up_to_the_total(tied: bool) -> None:
    counts = count_parameters(on_meta(dataclasses.replace(SMALL, tied=tied)))
    parts = {name: count for name, count in counts.items() if name not in ("total", "non_embedding")}
    tables = 61 * 32 * (1 if tied else 2)
    assert sum(parts.values()) == counts["total"]
    assert counts["total"] - counts["non_embedding"] == tables
    assert set(parts) == {"embedding", "attention_norm", "attention", "mlp_norm", "mlp", "norm"} | (set() if tied else {"head"})


def test_every_parameter_is_in_one_group_and_only_matrices_decay(model: Decoder) -> None:
    groups = model.param_groups()
    shapes = {name: p.ndim for name, p in model.named_parameters()}
    assert sorted(groups["decay"] + groups["no_decay"]) == sorted(shapes)
    assert all(shapes[name] == 2 for name in groups["decay"])
    assert all(shapes[name] == 1 for name in groups["no_decay"])


# --- initial weights


def test_initial_deviations_are_those_of_the_config() -> None:
    config = LlamaConfig(vocab_size=1000, dim=256, num_layers=8, num_heads=4, mlp_dim=512, init_std=0.02)
    model = initialised(config)
    residual = 0.02 / math.sqrt(2 * 8)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            assert torch.all(parameter == 1), name
            continue
        expected = residual if name.endswith(("attention.output.weight", "mlp.down.weight")) else 0.02
        # At least 65,536 draws: the sample deviation is within 0.28 % of the true one in two of three cases.
        assert parameter.detach().std().item() == pytest.approx(expected, rel=0.015), name
        assert abs(parameter.detach().mean().item()) < expected * 0.02, name


def test_an_untrained_model_is_undecided() -> None:
    model = initialised(dataclasses.replace(SMALL, init_std=0.02))
    loss = model.losses(Batch(tokens(4, 64), tokens(4, 64, seed=1)))["nll"] / 256
    assert float(loss.detach()) == pytest.approx(math.log(61), abs=0.02)


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (initialised(SMALL, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(not torch.equal(first[name], other[name]) for name in first if first[name].ndim == 2)


def test_no_two_matrices_start_alike(model: Decoder) -> None:
    firsts = [tuple(p.flatten()[:4].tolist()) for p in model.parameters() if p.ndim == 2]
    assert len(set(firsts)) == len(firsts)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_laid_on_a_device_starts_as_a_plain_one(tied: bool) -> None:
    config = dataclasses.replace(SMALL, tied=tied)
    plain, laid = initialised(config, seed=5), on_meta(config)
    parallelize(laid, ALONE, ParallelConfig(), "fp32", torch.device("cpu"), seed=5)
    for (name, parameter), other in zip(plain.named_parameters(), laid.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), laid.buffers(), strict=True))


def test_initialisation_leaves_nothing_unset() -> None:
    model = on_meta(dataclasses.replace(SMALL, qk_norm=True, rope_scaling=RopeScaling(original_max_position_embeddings=16)))
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan)
    init_weights(model, torch.Generator().manual_seed(0))
    assert all(torch.isfinite(tensor).all() for tensor in [*model.parameters(), *model.buffers()])


# --- precision


def test_bf16_products_leave_parameters_and_gradients_in_fp32() -> None:
    model = initialised(SMALL)
    exact = model.losses(Batch(tokens(2, 64), tokens(2, 64, seed=1)))["nll"]
    model.compute_dtype = torch.bfloat16
    logits = model(tokens(2, 64))
    rough = model.losses(Batch(tokens(2, 64), tokens(2, 64, seed=1)))["nll"]
    rough.backward()
    assert logits.dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    assert float(rough.detach()) == pytest.approx(float(exact.detach()), rel=0.02)
    assert float(rough.detach()) != float(exact.detach())  # bf16 was in fact used


def test_bf16_gradients_point_where_the_exact_ones_do() -> None:
    model = initialised(SMALL)
    batch = Batch(tokens(2, 64), tokens(2, 64, seed=1))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        model.compute_dtype = dtype
        model.losses(batch)["nll"].backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, exact in gradients[0].items():
        cosine = torch.nn.functional.cosine_similarity(exact.flatten(), gradients[1][name].flatten(), dim=0)
        assert cosine > 0.99, f"{name}: {cosine:.4f}"
