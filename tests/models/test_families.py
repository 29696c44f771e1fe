"""What every family promises: the same numbers whole, in parts and packed, counts, compilation, bf16, and that it learns."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from franca.models.base import IGNORE, Batch, Context, count_parameters
from franca.models.gpt2 import GPT2Config
from franca.models.hawk import HawkConfig
from franca.models.hybrid import HybridConfig
from franca.models.llama import LlamaConfig
from franca.models.mamba import MambaConfig
from franca.models.minrnn import MinGRUConfig, MinLSTMConfig
from franca.parallel.apply import init_weights

SHARED = {"vocab_size": 61, "dim": 24, "num_layers": 2, "max_seq_len": 128, "init_std": 0.2}
LLAMA = LlamaConfig(num_heads=4, num_kv_heads=2, mlp_dim=32, **SHARED)
MINGRU = MinGRUConfig(kind="mingru", width_multiple=8, **SHARED)
MINLSTM = MinLSTMConfig(kind="minlstm", width_multiple=8, **SHARED)
HAWK = HawkConfig(kind="hawk", width_multiple=8, mlp_dim=32, **SHARED)
MAMBA = MambaConfig(kind="mamba", head_dim=8, state_dim=6, num_groups=2, **SHARED)
HYBRID = HybridConfig(
    kind="hybrid", blocks=(HAWK, dataclasses.replace(LLAMA, window=7), MAMBA, MINGRU), **{**SHARED, "num_layers": 5}
)
RECURRENT: dict[str, Any] = {
    "mingru": MINGRU,
    "mingru lingua": dataclasses.replace(MINGRU, gate="lingua"),
    "minlstm": MINLSTM,
    "hawk": HAWK,
    "hawk lingua": dataclasses.replace(HAWK, form="lingua"),
    "mamba": MAMBA,
}
FAMILIES: dict[str, Any] = RECURRENT | {
    "llama": LLAMA,
    "llama window": dataclasses.replace(LLAMA, window=7),
    "gpt2": GPT2Config(num_heads=4, dropout=0.0, **SHARED),
    "hybrid": HYBRID,
}
every_family = pytest.mark.parametrize("shape", FAMILIES.values(), ids=FAMILIES)
CPU = torch.device("cpu")


def build(shape: Any, seed: int = 0) -> Any:
    model = shape.build()
    init_weights(model, torch.Generator().manual_seed(seed))
    return model


def on_meta(shape: Any) -> Any:
    with torch.device("meta"):
        return shape.build()


def ids(rows: int, length: int, seed: int = 2) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


def packed(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Document numbers and positions of one row, (1, T)."""
    numbers = [torch.full((length,), number) for number, length in enumerate(lengths)]
    return torch.cat(numbers)[None], torch.cat([torch.arange(length) for length in lengths])[None]


def same(given: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(given, expected, rtol=0, atol=tolerance)


# --- the same, however it is fed


@every_family
def test_a_row_in_any_parts_is_the_whole_row(shape: Any) -> None:
    model, tokens = build(shape), ids(2, 90)
    whole = model(tokens).detach()  # as in training
    assert whole.std() > 0.3
    with torch.no_grad():
        same(model(tokens), whole)
        for sizes in ([1] * 90, [45, 45], [89, 1], [1, 89], [3, 2, 1, 30, 1, 53]):
            cache = model.new_cache(2, 90)
            same(torch.cat([model(part, cache=cache) for part in tokens.split(sizes, dim=1)], dim=1), whole)
            assert cache.lengths.tolist() == [90, 90]


@every_family
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_packed_documents_are_separate_documents(shape: Any, grad: bool) -> None:
    model, lengths = build(shape), [1, 15, 2, 40, 20]
    document, position = packed(lengths)
    row = ids(1, sum(lengths))
    with torch.set_grad_enabled(grad):
        apart = torch.cat([model(part) for part in row.split(lengths, dim=1)], dim=1)
        same(model(row, document, position), apart)
        assert (model(row) - apart).abs().max() > 1e-2  # told of no documents, they see each other


@every_family
def test_gradients_of_packed_documents_are_those_of_separate_ones(shape: Any) -> None:
    model, lengths = build(shape), [5, 1, 30]
    document, position = packed(lengths)
    row, targets = ids(1, 36), ids(1, 36, seed=3)
    model.losses(Batch(row, targets, document, position))["nll"].backward()
    given = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for part in zip(row.split(lengths, dim=1), targets.split(lengths, dim=1), strict=True):
        model.losses(Batch(*part))["nll"].backward()
    for name, parameter in model.named_parameters():
        assert (given[name] - parameter.grad).norm() <= 1e-5 * (1 + parameter.grad.norm()), name


@every_family
@pytest.mark.parametrize("place", [0, 33, 69])
def test_a_changed_token_changes_nothing_before_it(shape: Any, place: int) -> None:
    model, before = build(shape), ids(2, 70)
    after = before.clone()
    after[:, place] = (after[:, place] + 1) % 61
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            first, second = model(before), model(after)
        assert torch.equal(first[:, :place], second[:, :place])
        assert (first[:, place:] != second[:, place:]).flatten(2).any(dim=2)[:, :5].all()


# --- caches


@every_family
def test_rows_of_different_lengths_decode_as_each_alone(shape: Any) -> None:
    model, tokens, lengths = build(shape), ids(3, 60), [3, 25, 11]
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(3, 60)
        for row, length in enumerate(lengths):
            model(tokens[row : row + 1, :length], cache=cache.rows(row, row + 1))
        for step in (1, 1, 7, 1, 2):
            part = torch.stack([tokens[row, length : length + step] for row, length in enumerate(lengths)])
            lengths = [length + step for length in lengths]
            given = model.next_logits(part, cache)
            same(given, torch.stack([whole[row, length - 1] for row, length in enumerate(lengths)]))
    assert cache.lengths.tolist() == lengths


@every_family
def test_a_copied_row_goes_on_as_its_source_and_a_cleared_one_begins_again(shape: Any) -> None:
    model, tokens = build(shape), ids(3, 40)
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(3, 40)
        model(tokens[:, :20], cache=cache)
        cache.copy(1, 0)
        cache.clear(2)
        assert cache.lengths.tolist() == [20, 20, 0]
        assert all(not tensor[2].any() for state in cache.states for tensor in state.values())
        given = model.next_logits(torch.stack([tokens[1, 20:30], tokens[1, 20:30], tokens[2, :10]]), cache)
        same(given, torch.stack([whole[1, 29], whole[1, 29], whole[2, 9]]))


@every_family
def test_a_cache_says_what_it_holds_in_named_tensors_with_rows_first(shape: Any) -> None:
    model = build(shape)
    model.compute_dtype = torch.bfloat16
    cache = model.new_cache(3, 17)
    for state in cache.states:
        assert {tensor.shape[0] for tensor in state.values()} == {3}
        assert all(not tensor.any() for tensor in state.values())
        kinds = {name: tensor.dtype for name, tensor in state.items()}
        assert kinds in (
            {"keys": torch.bfloat16, "values": torch.bfloat16},
            {"hidden": torch.float32, "conv": torch.bfloat16},
        )


# --- precision


@every_family
@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16], ids=["fp32 weights", "bf16 weights"])
def test_bf16_logits_are_near_the_exact_ones(shape: Any, held: torch.dtype) -> None:
    model, tokens = build(shape), ids(4, 80)
    exact = model(tokens).detach()
    for name, parameter in model.named_parameters():  # as `open_model` holds them: decays and steps of time stay exact
        if name.endswith((".weight", ".bias")):
            parameter.data = parameter.data.to(held)
    model.compute_dtype = torch.bfloat16
    cache = model.new_cache(4, 80)
    with torch.no_grad():
        parts = torch.cat([model(part, cache=cache) for part in tokens.split([50, 29, 1], dim=1)], dim=1)
    for rough in (model(tokens).detach(), parts):
        assert rough.dtype == torch.bfloat16
        assert (rough - exact).square().mean().sqrt() < 0.03 * exact.std()
        assert (rough - exact).abs().max() < 0.25 * exact.std()
    assert all(state["hidden"].dtype == torch.float32 for state in cache.states if "hidden" in state)


@pytest.mark.parametrize("shape", RECURRENT.values(), ids=RECURRENT)
def test_bf16_training_leaves_parameters_in_fp32_with_gradients_that_point_the_same_way(shape: Any) -> None:
    model, batch, found = build(shape), Batch(ids(2, 64), ids(2, 64, seed=3)), []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        model.compute_dtype = dtype
        model.losses(batch)["nll"].backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, exact in found[0].items():
        assert found[1][name].dtype == torch.float32
        assert F.cosine_similarity(exact.flatten(), found[1][name].flatten(), dim=0) > 0.98, name


# --- compiled


@pytest.mark.parametrize("shape", [MINGRU, MINLSTM, HAWK, MAMBA], ids=lambda shape: shape.kind)
def test_a_compiled_block_gives_the_same_values_and_gradients(shape: Any) -> None:
    model = build(shape)
    batch = Batch(ids(1, 40), ids(1, 40, seed=3), *packed([9, 31]))
    found = []
    for compiled in (False, True):
        if compiled:
            model.layers[0].compile(backend="aot_eager", fullgraph=True)  # Inductor would take minutes
        model.zero_grad()
        loss = model.losses(batch)["nll"]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for expected, given in zip(*found, strict=True):
        assert (given - expected).norm() <= 1e-5 * expected.norm()


# --- losses


@pytest.mark.parametrize("shape", [LLAMA, MINGRU, HAWK, MAMBA, HYBRID], ids=lambda shape: shape.kind)
@pytest.mark.parametrize("together", [False, True], ids=["one document", "packed"])
def test_heads_for_future_tokens_have_the_loss_of_shifted_targets(shape: Any, together: bool) -> None:
    model = build(dataclasses.replace(shape, future_tokens=3))
    lengths = [12, 1, 2, 25] if together else [40]
    document, position = packed(lengths) if together else (None, None)
    row, targets = ids(1, 40), ids(1, 40, seed=3)
    targets[0, 5:8] = IGNORE
    losses = model.losses(Batch(row, targets, document, position))
    assert list(losses) == ["nll", "nll_2", "nll_3"]
    plain = build(shape)
    plain.load_state_dict({name: p for name, p in model.state_dict().items() if "future" not in name})
    borders = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    for ahead, head in enumerate([model.head, *model.future_heads]):
        plain.head.weight = head.weight
        log_p, expected = plain(row, document, position)[0].detach().double().log_softmax(dim=-1), 0.0
        for t in range(40):
            end = next(border for border in borders if t < border)
            if t + ahead < end and targets[0, t + ahead] != IGNORE:
                expected -= float(log_p[t, targets[0, t + ahead]])
        assert float(losses[["nll", "nll_2", "nll_3"][ahead]].detach()) == pytest.approx(expected, rel=1e-5)
    sum(losses.values()).backward()
    assert all(head.weight.grad.abs().max() > 0 for head in [model.head, *model.future_heads])
    plain.head.weight = model.head.weight
    assert torch.equal(model(row), plain(row))  # the first head is the one that decodes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [LLAMA, MINLSTM, HYBRID], ids=lambda shape: shape.kind)
def test_rows_that_fill_up_the_vocabulary_change_nothing_and_are_never_predicted(shape: Any, tied: bool) -> None:
    plain = build(dataclasses.replace(shape, future_tokens=2, tied=tied))
    full = build(dataclasses.replace(shape, future_tokens=2, tied=tied, vocab_multiple=32), seed=1)
    tables = ("embedding.weight", "head.weight", "future_heads.0.weight")
    for (name, theirs), ours in zip(plain.named_parameters(), full.parameters(), strict=True):
        if name in tables:
            assert ours.shape == (64, shape.dim)
            ours.data[61:] = 1e3  # would win, if they were seen
        ours.data[: len(theirs)] = theirs.data
    batch = Batch(ids(2, 40), ids(2, 40, seed=3))
    losses, expected = full.losses(batch), plain.losses(batch)
    for name, loss in expected.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-6, atol=0)
    sum(losses.values()).backward()
    sum(expected.values()).backward()
    for (name, theirs), ours in zip(plain.named_parameters(), full.parameters(), strict=True):
        torch.testing.assert_close(ours.grad[: len(theirs)], theirs.grad, rtol=1e-4, atol=1e-5)
        assert name not in tables or not ours.grad[61:].any()
    assert full(batch.tokens_BT).shape == (2, 40, 61)
    same(full(batch.tokens_BT), plain(batch.tokens_BT))
    with torch.no_grad():
        assert full.next_logits(batch.tokens_BT, full.new_cache(2, 40)).shape == (2, 61)


# --- learning, initial weights


@every_family
def test_a_family_learns_a_repeated_text(shape: Any) -> None:
    model = build(dataclasses.replace(shape, init_std=0.1))
    text = ids(1, 13).repeat(1, 5)
    batch, found = Batch(text[:, :-1], text[:, 1:]), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(30):
        loss = sum(model.losses(batch).values()) / batch.tokens_BT.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found[0] == pytest.approx(math.log(61), abs=1)
    assert found[-1] < 0.2 * found[0], found


@every_family
def test_initial_weights_are_those_of_the_seed_wherever_and_whenever_a_model_is_built(shape: Any) -> None:
    torch.manual_seed(1)
    plain = build(shape, seed=5)
    torch.manual_seed(2)
    late = on_meta(shape)  # everything is built before anything is drawn
    others = [FAMILIES[name].build() for name in ("hawk", "mamba")]
    late.to_empty(device="cpu")
    for tensor in [*late.parameters(), *late.buffers()]:
        tensor.data.fill_(math.nan)
    init_weights(late, torch.Generator().manual_seed(5))
    assert len(others) == 2
    for (name, one), two in zip(plain.state_dict().items(), late.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert all(torch.equal(one, two) for one, two in zip(plain.buffers(), late.buffers(), strict=True))
    other = build(shape, seed=6).state_dict()
    drawn = {name for name, value in plain.state_dict().items() if not torch.equal(value, other[name])}
    assert {name for name, p in plain.named_parameters() if p.ndim == 2} <= drawn


@every_family
def test_projections_into_the_residual_stream_begin_smaller(shape: Any) -> None:
    wide = {"dim": 64} | ({"width_multiple": 64} if hasattr(shape, "width_multiple") else {})
    shape = dataclasses.replace(shape, **wide)
    for name, parameter in build(shape).named_parameters():
        if parameter.ndim == 2 and not name.endswith("conv.weight"):
            residual = name.startswith("layers") and name.endswith(("output.weight", "down.weight"))
            expected = 0.2 / math.sqrt(2 * shape.num_layers) if residual else 0.2
            assert parameter.detach().std().item() == pytest.approx(expected, rel=0.08), name


# --- counts

WINDOWLESS = dataclasses.replace(HYBRID, blocks=(HAWK, LLAMA, MAMBA, MINGRU))


def beyond_products(block: Any, length: int) -> float:
    """Per token, forward and backward: what PyTorch's counter has of a block beyond our count of it.

    It sees products of matrices alone: none of the convolution's (6 for each weight), nor a scan's sums (3 times the block's
    `mixing_flops`). It sees Mamba's as the training runs them, which pays for fewer steps with products inside of chunks; ours
    is the recurrence. It takes attention's whole square, where half is seen.
    """
    if hasattr(block, "attention"):
        return 3 * 2 * 2 * block.attention.num_heads * block.attention.head_dim * (length - (length + 1) / 2)
    convolution = 6 * block.conv.weight.numel()
    if not hasattr(block, "head_shape"):
        return -convolution - 3 * block.mixing_flops(length)
    (heads, width), (groups, size) = block.head_shape, block.group_shape
    chunk = math.ceil(length / math.ceil(length / 64))
    return 3 * 2 * chunk * (groups * size + heads * width) - convolution


@pytest.mark.parametrize("shape", [*RECURRENT.values(), WINDOWLESS], ids=[*RECURRENT, "hybrid"])
@pytest.mark.parametrize(
    ("length", "options"), [(16, {}), (128, {}), (100, {"tied": True, "vocab_multiple": 64, "future_tokens": 3})]
)
def test_flops_per_token_differ_from_pytorchs_count_by_what_it_cannot_see(shape: Any, length: int, options: Any) -> None:
    model = on_meta(dataclasses.replace(shape, num_layers=len(getattr(shape, "blocks", "1")), **options))
    inputs = torch.zeros(2, length, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        sum(model.losses(Batch(inputs, inputs)).values()).backward()
    counted = counter.get_total_flops() / inputs.numel()
    assert counted == model.flops_per_token(length) + sum(beyond_products(block, length) for block in model.layers)


def test_a_recurrence_costs_the_same_however_long_the_context_is() -> None:
    assert HAWK.block(0).mixing_flops(100) == HAWK.block(0).mixing_flops(10**6) == 2 * 32
    assert MAMBA.block(0).mixing_flops(100) == 2 * 2 * 6 * 8 * 6
    assert on_meta(MINGRU).flops_per_token(100) == on_meta(MINGRU).flops_per_token(10**6)


@every_family
def test_only_matrices_decay(shape: Any) -> None:
    model = on_meta(shape)
    groups, shapes = model.param_groups(), {name: p.ndim for name, p in model.named_parameters()}
    assert sorted(groups["decay"] + groups["no_decay"]) == sorted(shapes)
    assert {shapes[name] for name in groups["decay"]} == {2}
    assert {shapes[name] for name in groups["no_decay"]} == {1}


# Runs of Meta Lingua and of the Stanford fork: the shape, with all parameters in billions as their authors' code gives them.
LINGUA = {"vocab_size": 128_256, "max_seq_len": 8}
ONE_B = {**LINGUA, "dim": 2048, "num_layers": 25, "num_heads": 16, "mlp_dim": 5632}
SEVEN_B = {**LINGUA, "dim": 4096, "num_layers": 32, "num_heads": 32, "mlp_dim": 11008}
SMALL_VOCAB = {"vocab_size": 32_000, "max_seq_len": 8}
KNOWN: dict[str, tuple[Any, str, str | None]] = {  # shape, total, without embeddings
    "llama_1B": (LlamaConfig(**ONE_B), "1.81", "1.285"),
    "llama_7B": (LlamaConfig(rope_theta=1e5, **SEVEN_B), "7.53", "6.48"),
    "mamba_1b": (
        MambaConfig(kind="mamba", dim=2048, num_layers=50, head_dim=128, dt_bias=False, a_min=0.01, a_max=2.0, **LINGUA),
        "1.81",
        None,
    ),
    "mamba_7b": (MambaConfig(kind="mamba", dim=4096, num_layers=64, head_dim=128, dt_bias=False, **LINGUA), "7.58", None),
    "minGRU_1b": (MinGRUConfig(kind="mingru", gate="lingua", dim=2048, num_layers=50, **SMALL_VOCAB), "1.81", None),
    "minLSTM_1b": (MinLSTMConfig(kind="minlstm", gate="lingua", dim=1920, num_layers=50, **SMALL_VOCAB), "1.97", None),
    "hawk_1b": (HawkConfig(kind="hawk", form="lingua", dim=2048, num_layers=25, mlp_dim=5632, **SMALL_VOCAB), "1.83", None),
    "hawk_7b": (
        HawkConfig(kind="hawk", form="lingua", dim=4096, num_layers=32, width=4 / 3 * 0.65, mlp_dim=11008, **LINGUA),
        "7.61",
        None,
    ),
    "debug": (LlamaConfig(vocab_size=258, dim=1024, num_layers=8, num_heads=8, mlp_dim=2816, max_seq_len=8), "0.10", None),
    "llama_280M_8H200": (LlamaConfig(dim=1024, num_layers=18, num_heads=16, mlp_dim=2816, **LINGUA), "0.49", "0.23"),
    "chinchilla": (
        LlamaConfig(vocab_size=50_257, dim=1536, num_layers=16, num_heads=48, mlp_dim=4096, max_seq_len=8),
        "0.61",
        None,
    ),
    "llama_1B CPT": (
        LlamaConfig(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, mlp_dim=8192, tied=True, **LINGUA),
        "1.24",
        None,
    ),
}


@pytest.mark.parametrize(("shape", "total", "inner"), KNOWN.values(), ids=KNOWN)
def test_parameter_counts_are_those_of_linguas_runs(shape: Any, total: str, inner: str | None) -> None:
    assert shape.problems() == []
    counts = count_parameters(on_meta(shape))
    assert f"{counts['total'] / 1e9:.{len(total) - 2}f}" == total
    if inner is not None:
        assert f"{counts['non_embedding'] / 1e9:.{len(inner) - 2}f}" == inner
    if shape.kind in ("mingru", "minlstm", "hawk"):
        width = {"minGRU_1b": 4096, "minLSTM_1b": 3840, "hawk_1b": 2816, "hawk_7b": 3584}
        assert shape.recurrent_dim == width[next(name for name, known in KNOWN.items() if known[0] is shape)]


def test_a_block_without_a_state_is_given_whole_rows() -> None:
    """Each call begins anew: nothing of one batch is seen in the next."""
    for shape in RECURRENT.values():
        block, x = build(shape).layers[0], torch.randn(2, 30, 24, generator=torch.Generator().manual_seed(0))
        context = Context(None, None, {}, None, 30)
        first = block(x, context, None)
        block(-x, context, None)
        assert torch.equal(block(x, context, None), first)
