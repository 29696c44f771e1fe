"""From a `parallel:` section to a mesh: sizes, who reads which rows, and one clear refusal for what cannot be."""

import itertools

import pytest

from franca.core.config import check
from franca.models.gpt2 import GPT2Config
from franca.models.hybrid import HybridConfig
from franca.models.llama import LlamaConfig
from franca.models.minrnn import MinGRUConfig
from franca.parallel.mesh import AXES, Mesh, ParallelConfig, problems, sizes_of

LLAMA = LlamaConfig(vocab_size=512, dim=64, num_heads=8, num_kv_heads=4, num_layers=4)


def every_mesh(size: int) -> list[Mesh]:
    """Where each rank of a mesh of 2 x 2 x ... stands, as `make` numbers them, without processes."""
    sizes = dict(zip(AXES, (2, 2, 2, 2, 2), strict=True))
    assert size == 32
    return [Mesh(sizes, dict(zip(AXES, here, strict=True))) for here in itertools.product(range(2), repeat=5)]


def test_all_takes_the_ranks_that_are_left() -> None:
    assert sizes_of(ParallelConfig(tp=2, pp=2), 32)["dp_shard"] == 8
    assert sizes_of(ParallelConfig(dp_replicate=4, dp_shard=2), 8) == {
        "pp": 1,
        "dp_replicate": 4,
        "dp_shard": 2,
        "cp": 1,
        "tp": 1,
    }


@pytest.mark.parametrize(
    ("parallel", "ranks", "words"),
    [
        (ParallelConfig(dp_shard=3), 4, ["dp_shard 3 takes 3 rank(s)", "there are 4"]),
        (ParallelConfig(tp=2), 3, ["tp 2 takes a multiple of 2 rank(s)", "there are 3"]),
        (ParallelConfig(tp=4, cp=2), 4, ["cp 2 x tp 4 takes a multiple of 8", "there are 4"]),
        (ParallelConfig(pp=2, dp_replicate=2, dp_shard=2), 4, ["pp 2 x dp_replicate 2 x dp_shard 2 takes 8 rank(s)"]),
    ],
)
def test_a_product_that_is_not_the_number_of_ranks_is_refused(parallel, ranks, words) -> None:
    (problem,) = problems(parallel, ranks, LLAMA, 64)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ("model", "parallel", "seq_len", "words"),
    [
        (LLAMA, ParallelConfig(tp=8), 64, ["parallel.tp: 8 does not divide", "num_kv_heads 4"]),
        (LlamaConfig(vocab_size=511, dim=64), ParallelConfig(tp=2), 64, ["vocab_multiple", "511"]),
        (GPT2Config(vocab_size=512, dim=64, num_heads=6, max_seq_len=64), ParallelConfig(tp=4), 64, ["num_heads 6"]),
        (LLAMA, ParallelConfig(tp=2, compile=True), 64, ["parallel.compile", "tp 1"]),
        (LLAMA, ParallelConfig(cp=2), 66, ["data.seq_len: 66", "2 x cp 2", "multiple of 4"]),
        (LLAMA, ParallelConfig(cp=2, tp=2), 68, ["2 x cp 2 x tp 2", "multiple of 8"]),
        (MinGRUConfig(kind="mingru", vocab_size=512), ParallelConfig(tp=2), 64, ["'mingru' cannot be split"]),
        (MinGRUConfig(kind="mingru", vocab_size=512), ParallelConfig(cp=2), 64, ["parallel.cp", "beginning to its end"]),
        (
            check(HybridConfig, {"kind": "hybrid", "vocab_size": 512, "blocks": ["hawk", "llama"]}, "model"),
            ParallelConfig(cp=2),
            64,
            ["'hybrid'"],
        ),
    ],
)
def test_what_a_model_cannot_do_is_refused_by_name(model, parallel, seq_len, words) -> None:
    ranks = parallel.tp * parallel.cp
    (problem,) = problems(parallel, ranks, model, seq_len)
    assert all(word in problem for word in words), problem


def test_a_hybrid_of_attention_can_be_split() -> None:
    blocks = [{"kind": "llama", "window": 16}, "llama"]
    model = check(HybridConfig, {"kind": "hybrid", "vocab_size": 512, "dim": 64, "blocks": blocks}, "model")
    assert problems(ParallelConfig(tp=2, cp=2), 4, model, 64) == []


def test_ranks_are_numbered_with_tp_innermost_and_pp_outermost() -> None:
    """Megatron's order, so that the ranks that talk most are on one machine."""
    ranks = every_mesh(32)
    assert [rank.here["tp"] for rank in ranks[:4]] == [0, 1, 0, 1]
    assert [rank.here["pp"] for rank in ranks[::16]] == [0, 1]
    assert {rank.dp_rank for rank in ranks} == {0, 1, 2, 3}
    assert sum(rank.counts_rows for rank in ranks) == 4
    assert sum(rank.counts_losses for rank in ranks) == 8
    assert all(rank.gradient_parts == 8 for rank in ranks)
