"""The optimizers against plain references: whole and sharded, in fp32 and in bf16, with steps that are skipped."""

import math
import multiprocessing
import os
import random
import socket
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from franca.core.config import check
from franca.core.errors import ConfigError
from franca.models.llama import LlamaConfig
from franca.train import optim
from franca.train.adamw import AdamWConfig
from franca.train.muon import MuonConfig, orthogonalize
from franca.train.optim import GroupRule, OptimConfig, Optimizer
from franca.train.scale import LossScale, LossScaleConfig
from franca.train.update import round_stochastically, value

SEED = random.randrange(2**32)
FINITE, OVERFLOW = torch.tensor(0.0), torch.tensor(1.0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).tanh())


class Pair(nn.Module):
    """Blocks of a column-wise and a row-wise linear layer, and a table that is no matrix of theirs."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.embedding = nn.Embedding(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x @ self.embedding.weight.T

    def param_groups(self) -> dict[str, list[str]]:
        names = [(name, p.ndim > 1) for name, p in self.named_parameters()]
        return {"decay": [n for n, wide in names if wide], "no_decay": [n for n, wide in names if not wide]}


def drawn(seed: int, dtype: torch.dtype = torch.float32) -> Pair:
    torch.manual_seed(seed)
    return Pair().to(dtype)


def gradients(step: int, names: list[str], shapes: list[torch.Size]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(shape, generator=generator) for name, shape in zip(names, shapes, strict=True)}


def give(model: nn.Module, step: int) -> None:
    """Every parameter its part of the gradient of `step`, however it is sharded."""
    named = dict(model.named_parameters())
    for name, grad in gradients(step, list(named), [p.shape for p in named.values()]).items():
        p = named[name]
        whole = grad.to(p.dtype)
        p.grad = distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else whole


def run(model: nn.Module, settings: OptimConfig, steps: int = 4) -> dict[str, Tensor]:
    """Some steps; all weights and states after them, whole."""
    optimizer = Optimizer(model, settings, seed=3)
    for step in range(steps):
        give(model, step)
        optimizer.step(settings.lr, FINITE, step)
    tensors = dict(model.named_parameters()) | optim.state_tensors(model, optimizer)
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for name, t in tensors.items()}


def naive_orthogonal(matrix: Tensor) -> Tensor:
    """Newton and Schulz's iteration in float64, one matrix at a time, as the post of Jordan et al. states it."""
    x = matrix.double() / matrix.double().norm()
    x = x.T if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def naive(model: Pair, settings: OptimConfig, steps: int) -> dict[str, Tensor]:
    """AdamW and Muon in float64, one parameter after the other."""
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    memory = {name: torch.zeros(2, *w.shape, dtype=torch.float64) for name, w in weights.items()}
    for step in range(steps):
        for name, g in gradients(step, list(weights), [w.shape for w in weights.values()]).items():
            g, w, (m, v) = g.double(), weights[name], memory[name]
            if isinstance(settings, MuonConfig) and w.ndim == 2 and "layers" in name:
                m.copy_(settings.momentum * m + g)
                update = naive_orthogonal(settings.momentum * m + g) * 0.2 * math.sqrt(max(w.shape))
            else:
                m.copy_(settings.beta1 * m + (1 - settings.beta1) * g)
                v.copy_(settings.beta2 * v + (1 - settings.beta2) * g * g)
                corrected = m / (1 - settings.beta1 ** (step + 1)), v / (1 - settings.beta2 ** (step + 1))
                update = corrected[0] / (corrected[1].sqrt() + settings.eps)
            decay = settings.weight_decay if w.ndim == 2 else 0.0
            weights[name] = w - settings.lr * (decay * w + update)
    return weights


@pytest.mark.parametrize("settings", [AdamWConfig(lr=1e-2), MuonConfig(lr=1e-2), AdamWConfig(lr=1e-2, beta1=0.0)])
def test_weights_equal_a_naive_loop_in_float64(settings: OptimConfig) -> None:
    expected = naive(drawn(1), settings, 4)
    found = run(drawn(1), settings, 4)
    for name, weight in expected.items():
        torch.testing.assert_close(found[name].double(), weight, rtol=0, atol=1e-6, msg=name)


def test_muon_is_torchs_up_to_its_rounding_to_bf16() -> None:
    """PyTorch's own rule, with Moonlight's scale, multiplies in bf16."""
    theirs, mine = drawn(2), drawn(2)
    start = [p.detach().clone() for p in theirs.layers.parameters()]
    matrices = [p for p in theirs.layers.parameters() if p.ndim == 2]
    reference = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        give(theirs, step)
        reference.step()
    run(mine, MuonConfig(lr=1e-2), 3)
    for one, other, before in zip(mine.layers.parameters(), theirs.layers.parameters(), start, strict=True):
        if one.ndim == 2:
            assert torch.nn.functional.cosine_similarity((one - before).flatten(), (other - before).flatten(), dim=0) > 0.998


@pytest.mark.parametrize("shape", [(1, 5, 7), (2, 7, 5), (0, 4, 6), (3, 6, 6)])
def test_matrices_become_orthogonal(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(5)) * 1e-4
    found = orthogonalize(matrices, torch.float32)
    assert found.shape == matrices.shape
    assert all(0.6 < s < 1.3 for s in torch.linalg.svdvals(found).flatten())
    halves = orthogonalize(matrices, torch.float16)  # small numbers do not vanish in it
    torch.testing.assert_close(halves, found, rtol=0, atol=0.05)


PAIRS = {"up": ColwiseParallel(), "down": RowwiseParallel()}
SETTINGS: dict[str, OptimConfig] = {
    "adamw": AdamWConfig(lr=1e-2, ema=0.9),
    "muon": MuonConfig(lr=1e-2, ema=0.9),
}


def shard_and_compare(num_ranks: int, expected: dict[str, Any]) -> None:
    """In every rank: each way to lay the model on the ranks gives the weights and states of one process."""
    flat = init_device_mesh("cpu", (num_ranks,))

    def fsdp(model: Pair) -> None:
        for layer in model.layers:
            fully_shard(layer, mesh=flat)
        fully_shard(model, mesh=flat)

    def tensor_parallel(model: Pair) -> None:
        for layer in model.layers:
            parallelize_module(layer, flat, PAIRS)

    ways = {"fsdp": fsdp, "tp": tensor_parallel}
    if num_ranks == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))

        def hsdp(model: Pair) -> None:
            for layer in model.layers:
                fully_shard(layer, mesh=square)
            fully_shard(model, mesh=square)

        def both(model: Pair) -> None:
            for layer in model.layers:
                parallelize_module(layer, square["b"], PAIRS)
                fully_shard(layer, mesh=square["a"])
            fully_shard(model, mesh=square["a"])

        ways |= {"hsdp": hsdp, "fsdp x tp": both}
    for way, lay in ways.items():
        for kind, settings in SETTINGS.items():
            model = drawn(7)
            lay(model)
            for name, tensor in run(model, settings).items():
                torch.testing.assert_close(tensor, expected[kind][name], rtol=0, atol=1e-6, msg=f"{way} {kind} {name}")
        model = drawn(7)
        lay(model)
        give(model, 1)
        norm = optim.clip(model, 1.0, torch.tensor(4.0))
        torch.testing.assert_close(norm, expected["norm"], msg=f"{way}: the norm")
        clipped = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
        for name, grad in clipped.items():
            torch.testing.assert_close(grad, expected["clipped"][name], msg=f"{way}: the clipped gradient of {name}")
        rounded = drawn(7, torch.bfloat16)  # replicas must stay replicas, shards draw for themselves
        lay(rounded)
        settings = MuonConfig(lr=1e-3, moments="bf16", bf16_params="stochastic")
        for name, tensor in run(rounded, settings, 1).items():
            if name == "embedding.weight":
                copies = [torch.empty_like(tensor) for _ in range(num_ranks)]
                dist.all_gather(copies, tensor)
                assert all(torch.equal(copies[0], copy) for copy in copies), f"{way}: {name} differs between ranks"


def in_rank(rank: int, num_ranks: int, port: int, expected: dict[str, Any], out: Path) -> None:
    try:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
        dist.init_process_group("gloo", rank=rank, world_size=num_ranks)
        shard_and_compare(num_ranks, expected)
        dist.destroy_process_group()
        out.with_name(f"{out.name}{rank}").write_text("the same")
    except BaseException:
        out.with_name(f"{out.name}{rank}").write_text(traceback.format_exc())


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sharded_updates_equal_those_of_one_process(num_ranks: int, tmp_path: Path) -> None:
    expected: dict[str, Any] = {kind: run(drawn(7), settings) for kind, settings in SETTINGS.items()}
    model = drawn(7)
    give(model, 1)
    for p in model.parameters():
        p.grad /= 4
    expected["norm"] = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    expected["clipped"] = {name: p.grad for name, p in model.named_parameters()}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    arguments = (num_ranks, port, expected, tmp_path / "rank")
    ranks = [fork.Process(target=in_rank, args=(rank, *arguments)) for rank in range(num_ranks)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    for rank in range(num_ranks):
        told = (tmp_path / f"rank{rank}").read_text()
        assert told == "the same", told


KINDS = [
    AdamWConfig(ema=0.9),
    MuonConfig(ema=0.9),
    AdamWConfig(moments="bf16", ema=0.9),
    MuonConfig(moments="bf16", bf16_params="stochastic"),
    AdamWConfig(bf16_params="kahan", ema=0.9),
]


def model_for(settings: OptimConfig) -> Pair:
    return drawn(4, torch.float32 if settings.bf16_params is None else torch.bfloat16)


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(settings: OptimConfig, poison: float) -> None:
    model = model_for(settings)
    optimizer = Optimizer(model, settings)

    def step(number: int, poisoned: bool) -> Tensor:
        give(model, number)
        if poisoned:
            model.layers[1].up.weight.grad[2, 3] = poison
        found_inf = (~optim.clip(model, 1.0).isfinite()).float()
        optimizer.step(1e-2, found_inf, number)
        return found_inf

    def everything() -> dict[str, Tensor]:
        tensors = dict(model.named_parameters()) | optim.state_tensors(model, optimizer)
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    assert step(0, poisoned=False) == 0
    before = everything()
    assert step(1, poisoned=True) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in everything().items())
    assert step(2, poisoned=False) == 0
    after = everything()
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not any(torch.equal(after[name], before[name]) for name in after if name.startswith("layers"))


@pytest.mark.parametrize("settings", KINDS)
def test_a_resume_is_bit_identical(settings: OptimConfig) -> None:
    whole, begun, resumed = model_for(settings), model_for(settings), model_for(settings)
    expected = run(whole, settings, 5)
    run_state = run(begun, settings, 3)
    optimizer = Optimizer(resumed, settings, seed=3)
    with torch.no_grad():
        for name, tensor in (dict(resumed.named_parameters()) | optim.state_tensors(resumed, optimizer)).items():
            tensor.copy_(run_state[name])
    for step in (3, 4):
        give(resumed, step)
        optimizer.step(settings.lr, FINITE, step)
    found = dict(resumed.named_parameters()) | optim.state_tensors(resumed, optimizer)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_stochastic_rounding_has_the_right_mean() -> None:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.cat([torch.randn(60, generator=generator), torch.tensor([0.0, 1.0, -1e-30, 3e38])])
    draws, total = 4000, torch.zeros(64, dtype=torch.float64)
    lower = x.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32)
    upper = (x.view(torch.int32).bitwise_and(-(1 << 16)) + (1 << 16)).view(torch.float32)
    for _ in range(draws):
        rounded = round_stochastically(x, generator).float()
        assert ((rounded == lower) | (rounded == upper)).all(), f"seed {SEED}"
        total += rounded.double()
    gap = (upper.double() - lower.double()).abs()
    share = (x.double() - lower.double()).abs() / gap
    sigma = gap * (share * (1 - share) / draws).sqrt()
    assert ((total / draws - x.double()).abs() <= 5 * sigma + 1e-12 * x.abs().double()).all(), f"seed {SEED}"
    exact = torch.tensor([1.0, -2.5, 0.0, math.inf, -math.inf])
    assert torch.equal(round_stochastically(exact, generator).float(), exact)


def small_steps(settings: OptimConfig, dtype: torch.dtype) -> Tensor:
    """1,000 steps of one gradient at a rate that bf16 cannot see: where the embedding, begun at 1, then is on average."""
    model = drawn(4, dtype)
    with torch.no_grad():
        model.embedding.weight.fill_(1.0)
    optimizer = Optimizer(model, settings, seed=SEED)
    for step in range(1000):
        model.embedding.weight.grad = torch.ones(10, 8, dtype=dtype)
        optimizer.step(1e-4, FINITE, step)
    return model.embedding.weight.float().mean()


def test_small_updates_are_not_lost_in_bf16() -> None:
    """Plain bf16 stays where it began: each update is a hundredth of what separates two numbers there."""
    plain: dict[str, Any] = {"weight_decay": 0.0}
    exact = small_steps(AdamWConfig(**plain), torch.float32)
    assert exact.item() == pytest.approx(0.9, abs=1e-3)
    stalled = nn.Parameter(torch.ones(10, 8, dtype=torch.bfloat16))
    reference = torch.optim.AdamW([stalled], lr=1e-4, weight_decay=0.0)
    for _ in range(1000):
        stalled.grad = torch.ones_like(stalled)
        reference.step()
    assert stalled.float().mean() == 1.0
    kahan = small_steps(AdamWConfig(bf16_params="kahan", **plain), torch.bfloat16)
    assert abs(kahan - exact) <= 2**-9, "half of what separates bf16 numbers near 0.9"
    drawn_up_or_down = small_steps(AdamWConfig(bf16_params="stochastic", **plain), torch.bfloat16)
    # a sum of 1,000 roundings of 80 numbers, each of variance below 1e-4 * 2**-8
    assert drawn_up_or_down.item() == pytest.approx(exact.item(), abs=5 * math.sqrt(1000 * 1e-4 / 256 / 80)), f"seed {SEED}"


def test_parameters_with_a_residue_go_as_those_in_fp32() -> None:
    """The residue keeps the lower half of an fp32, so that nothing is lost: only the kernels differ."""
    start = drawn(4, torch.bfloat16)
    settings = AdamWConfig(lr=1e-3, bf16_params="kahan")
    optimizers = Optimizer(start, settings), Optimizer(drawn(4, torch.bfloat16).float(), AdamWConfig(lr=1e-3))
    for step in range(20):
        for number, parts in enumerate(zip(*(optimizer.parts.values() for optimizer in optimizers), strict=True)):
            grad = torch.randn(parts[0].parameter.shape, generator=torch.Generator().manual_seed(100 * step + number))
            for part in parts:
                part.parameter.grad = grad.bfloat16().to(part.parameter.dtype)
        for optimizer in optimizers:
            optimizer.step(1e-3, FINITE, step)
    for mine, exact in zip(*(optimizer.parts.values() for optimizer in optimizers), strict=True):
        torch.testing.assert_close(value(mine), exact.parameter.detach(), rtol=1e-5, atol=1e-6, msg=mine.name)
        torch.testing.assert_close(mine.parameter, exact.parameter.bfloat16(), rtol=2**-7, atol=0)


def test_moments_in_bf16_keep_their_mean_where_nearest_rounding_stalls() -> None:
    """With beta2 = 0.999 a second moment in bf16 that is rounded to the nearest number never comes down again."""
    model = drawn(4)
    settings = AdamWConfig(moments="bf16", beta2=0.999, weight_decay=0.0)
    optimizer = Optimizer(model, settings, seed=SEED)
    square = optimizer.parts["embedding.weight"].state["exp_avg_sq"]
    assert square.dtype == torch.bfloat16
    square.fill_(1.0)
    for step in range(1000):
        model.embedding.weight.grad = torch.zeros(10, 8)
        optimizer.step(1e-3, FINITE, step)
    assert square.float().mean().item() == pytest.approx(0.999**1000, rel=0.1), f"seed {SEED}"


def test_the_average_is_that_of_all_weights_so_far() -> None:
    model = drawn(6)
    optimizer = Optimizer(model, AdamWConfig(ema=0.75))
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step, found_inf in enumerate([FINITE, OVERFLOW, FINITE]):
        give(model, step)
        optimizer.step(1e-2, found_inf, step)
        for name, p in model.named_parameters():
            expected[name] = expected[name] if found_inf else 0.75 * expected[name] + 0.25 * p.detach()
    for name, average in expected.items():
        torch.testing.assert_close(optim.state_tensors(model, optimizer)[f"optimizer.{name}.ema"], average)


def test_groups_by_rule_and_their_table() -> None:
    model = LlamaConfig(vocab_size=64, dim=16, num_layers=2, num_heads=2, num_kv_heads=2, max_seq_len=8).build()
    rules = (GroupRule(match="embedding.*", lr=0.1, weight_decay=0.0), GroupRule(match="layers.1.*", lr=0.5))
    settings = MuonConfig(groups=rules)
    rows = {(row[0], row[-1]): row for row in optim.table(model, settings)}
    assert rows["embedding.weight", 0.1] == ("embedding.weight", (64, 16), 1, 1024, "adamw", 0.0, 0.1)
    assert rows["head.weight", 1.0] == ("head.weight", (64, 16), 1, 1024, "adamw", 0.1, 1.0)
    assert rows["norm.weight", 1.0] == ("norm.weight", (16,), 1, 16, "adamw", 0.0, 1.0)
    query = "layers.*.attention.query.weight"
    assert rows[query, 0.5] == (query, (16, 16), 1, 256, "muon", 0.1, 0.5)
    assert rows[query, 1.0] == (query, (16, 16), 1, 256, "muon", 0.1, 1.0)
    assert sum(row[3] for row in rows.values()) == sum(p.numel() for p in model.parameters())
    plain = {row[0]: row for row in optim.table(model, AdamWConfig())}
    assert plain[query] == (query, (16, 16), 2, 512, "adamw", 0.1, 1.0)
    assert optim.group_problems(model, settings) == []
    wrong = (GroupRule(match="layers.*"), GroupRule(match="embeding.*"), GroupRule(match="layers.1.*"))
    typo, hidden = optim.group_problems(model, AdamWConfig(groups=wrong))
    assert typo.startswith("optim.groups[1].match: 'embeding.*' matches no parameter")
    assert "embedding.weight" in typo
    assert hidden.startswith("optim.groups[2].match: 'layers.1.*' matches no parameter that no rule above it matches")


def test_a_groups_rate_and_decay_are_applied() -> None:
    slow, usual = drawn(8), drawn(8)
    start = slow.embedding.weight.detach().clone()
    run(slow, AdamWConfig(weight_decay=0.0, groups=(GroupRule(match="embedding.*", lr=0.0, weight_decay=7.0),)))
    run(usual, AdamWConfig(weight_decay=0.0))
    assert torch.equal(slow.embedding.weight, start), "its decay, too, is at the rate"
    assert torch.equal(slow.layers[0].up.weight, usual.layers[0].up.weight)


@pytest.mark.parametrize(("settings", "num_bytes"), [(KINDS[0], 12), (KINDS[2], 8), (AdamWConfig(), 8)])
def test_bytes_of_the_state_are_known_without_it(settings: OptimConfig, num_bytes: int) -> None:
    with torch.device("meta"):
        model = Pair()
    assert optim.state_bytes(model, settings) == num_bytes * sum(p.numel() for p in model.parameters())


def test_the_kind_may_be_left_out_and_brings_its_own_keys() -> None:
    assert check(OptimConfig, {"lr": 0.5}, "x") == AdamWConfig(lr=0.5)
    assert check(OptimConfig, {"kind": "muon", "momentum": 0.5}, "x") == MuonConfig(momentum=0.5)
    with pytest.raises(ConfigError, match="momentum: unknown key"):
        check(OptimConfig, {"momentum": 0.5}, "x")
    with pytest.raises(ConfigError, match=r"'muno' is not one of adamw, muon \(did you mean 'muon'\?\)"):
        check(OptimConfig, {"kind": "muno"}, "x")


def plain_scale(overflows: list[bool], settings: LossScaleConfig) -> list[float]:
    """Megatron-LM's rule, in plain numbers."""
    scale, growth, hysteresis, found = settings.initial, 0, settings.hysteresis, []
    for overflow in overflows:
        if overflow:
            growth, hysteresis = 0, hysteresis - 1
            if hysteresis <= 0:
                scale = max(scale / 2, settings.min)
        else:
            growth += 1
            if growth == settings.window:
                scale, growth, hysteresis = scale * 2, 0, settings.hysteresis
        found.append(scale)
    return found


@pytest.mark.parametrize("hysteresis", [1, 2, 3])
def test_the_loss_scale_goes_as_megatrons(hysteresis: int) -> None:
    rng = random.Random(SEED)
    overflows = [rng.random() < 0.3 for _ in range(100)] + [False] * 20 + [True] * 20
    settings = LossScaleConfig(initial=64.0, window=4, hysteresis=hysteresis, min=0.5)
    scale, found = LossScale(settings, torch.device("cpu")), []
    for number, overflow in enumerate(overflows):
        if number == 50:  # a resume
            kept, scale = scale, LossScale(settings, torch.device("cpu"))
            for name, tensor in scale.state_tensors().items():
                tensor.copy_(kept.state_tensors()[name])
        scale.update(OVERFLOW if overflow else FINITE)
        found.append(scale.scale.item())
    assert found == plain_scale(overflows, settings), f"seed {SEED}"
    assert found[-1] == 0.5
