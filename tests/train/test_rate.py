"""The learning rate against Megatron-LM's and Lingua's rules, and run lengths and batch plans as a run takes them."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from franca.checkpoint.store import Store
from franca.cluster import plan
from franca.core.duration import Clock, Duration
from franca.core.errors import ConfigError
from franca.core.schedule import (
    BatchRamp,
    ConstantDecay,
    Cooldown,
    CosineDecay,
    InverseSqrtDecay,
    LinearDecay,
    Schedule,
    Stage,
    Timeline,
    WSDDecay,
    batch_stages,
)
from franca.data.loader import Loader
from franca.models.llama import LlamaConfig
from franca.parallel.world import World
from franca.train import loop
from franca.train.config import read_config, resolve
from franca.train.faults import Faults
from franca.train.optim import OptimConfig, lr_at, problems

HERE = World(0, 1, 0, torch.device("cpu"))
D = Duration.parse
TR1 = Timeline(batch_stages(1024, BatchRamp(start=16, increment=16, over=D("5M samples"))), 2048, 10**9)
TR1_OPTIM = OptimConfig(lr=1e-4, warmup=D("216_320 samples"), decay=CosineDecay(end=D("126_953_125 samples"), final_ratio=0.1))


def megatron(samples):
    """`get_lr` of Megatron-LM's scheduler with tr1-13B's numbers, after `samples` samples."""
    warmup, decay, high, low = 216_320, 126_953_125, 1e-4, 1e-5
    if samples <= warmup:
        return high * samples / warmup
    if samples > decay:
        return low
    return low + (high - low) * 0.5 * (math.cos(math.pi * (samples - warmup) / (decay - warmup)) + 1.0)


@pytest.mark.parametrize(
    "step", [0, 1, 4960, 4961, 8639, 8640, 8641, 23_456, 29_020, 100_000, 142_500, 142_600, 168_000, 311_540]
)
def test_the_rates_of_tr1_are_megatrons(step):
    """Megatron takes a step with the rate of the samples before it (so the first with 0); we with those that it ends at.

    So ours is the rate that Megatron prints behind the step, and takes the next one with.
    """
    mine = lr_at(TR1_OPTIM, TR1, D("300M samples"), step)
    assert mine == pytest.approx(megatron(TR1.samples_before(step + 1)), rel=1e-12, abs=0)


def test_the_clock_of_the_rate_stands_still_in_skipped_steps():
    """A loop like Megatron's: consumed samples go on in every step, the scheduler in those that changed the weights."""
    ramp = Timeline(batch_stages(64, BatchRamp(start=8, increment=8, over=Duration(4000, "samples"))), 16, 5000)
    optim = OptimConfig(lr=1e-4, warmup=D("700 samples"), decay=CosineDecay(end=D("9000 samples"), final_ratio=0.1))
    skipped = (0, 1, 7, 50, 51, 52, 130, 299)
    consumed = learnt = 0
    for step in range(300):
        batch = ramp.batch_samples(step)
        after = learnt + batch  # where the scheduler would stand if this step succeeds
        progress = min(1.0, max(0.0, (after - 700) / 8300))
        cosine = 1e-5 + 9e-5 * 0.5 * (1 + math.cos(math.pi * progress))
        expected = 1e-4 * after / 700 if after < 700 else cosine
        assert lr_at(optim, ramp, D("20000 samples"), step, skipped) == pytest.approx(expected, rel=1e-12), step
        consumed, learnt = consumed + batch, learnt + batch * (step not in skipped)
        assert ramp.clock(step + 1).samples == consumed
    steps = replace(optim, warmup=D("100 steps"), decay=ConstantDecay(kind="constant"))
    assert lr_at(steps, ramp, D("400 steps"), 60, skipped) == pytest.approx(1e-4 * (61 - 6) / 100, rel=1e-12)


PLAIN = Timeline((Stage(0, 0, 10),), 8, 1000, flops_per_token=1e6, num_params=400)


def shares(decay, warmup, positions, end=1000, cooldown=None):
    schedule = Schedule(PLAIN, Duration(end, "steps"), Duration(warmup, "steps"), decay, cooldown)
    return [schedule.at(Clock(position).read) for position in positions]


def lingua_cosine(step, warmup, n, m, theta, cycle_length):
    if step < warmup:
        return step / warmup
    sign = (-1) ** (step // (n * cycle_length))
    s = (step - warmup) / (n - warmup)
    return m + 0.5 * (1 - m) * (sign * math.cos(math.pi * s**theta / cycle_length) + 1)


def lingua_wsd(step, warmup, n, m, fraction, cycle_length):
    size = int(n * cycle_length)
    end = size * (step // size + 1)
    length = int(end * fraction)
    if step < warmup:
        return step / warmup
    progress = max(0.0, (step - (end - length)) / length)
    return 1 / (progress / m + (1 - progress))


LINGUA = {
    "constant": (ConstantDecay(kind="constant"), 0, lambda t: 1.0),
    "linear": (LinearDecay(kind="linear", final_ratio=0.2), 100, lambda t: t / 100 if t < 100 else 1 - 0.8 * (t - 100) / 900),
    "inv_sqrt": (
        InverseSqrtDecay(kind="inverse_sqrt", exponent=0.7, final_ratio=0.3),
        100,
        lambda t: t / 100 if t < 100 else max(100**0.7 / t**0.7, 0.3),
    ),
    "cosine": (CosineDecay(final_ratio=1e-6), 100, lambda t: lingua_cosine(t, 100, 1000, 1e-6, 1.0, 1.0)),
    "cosine_theta": (CosineDecay(final_ratio=0.1, power=1.7), 100, lambda t: lingua_cosine(t, 100, 1000, 0.1, 1.7, 1.0)),
    "cosine_cycles": (CosineDecay(final_ratio=0.1, cycles=4), 0, lambda t: lingua_cosine(t, 0, 1000, 0.1, 1.0, 0.25)),
    "wsd": (
        WSDDecay(kind="wsd", shape="harmonic", share=0.1, final_ratio=0.01),
        100,
        lambda t: lingua_wsd(t, 100, 1000, 0.01, 0.1, 1.0),
    ),
    "wsd_cycles": (
        WSDDecay(kind="wsd", shape="harmonic", share=0.1, final_ratio=0.01, cycles=2),
        100,
        lambda t: lingua_wsd(t, 100, 1000, 0.01, 0.1, 0.5),
    ),
}


@pytest.mark.parametrize("name", LINGUA)
def test_the_schedules_of_lingua(name):
    """At every position but those that end a cycle: there Lingua begins the next one, and we have the final rate.

    Lingua takes a step with the rate of the steps before it, we with those it ends at: the same function, one step on.
    """
    decay, warmup, theirs = LINGUA[name]
    positions = [t for t in range(1000) if not ("cycles" in name and t and t % 250 == 0)]
    assert shares(decay, warmup, positions) == pytest.approx([theirs(t) for t in positions], rel=1e-9, abs=1e-15)
    if name not in ("constant", "inv_sqrt"):
        assert shares(decay, warmup, [1000, 1001, 10**6]) == pytest.approx([decay.final_ratio] * 3)


def test_cycles_with_a_warmup_end_at_the_final_rate_and_begin_again_at_the_peak():
    """Lingua's jump in mid-cycle then, since sign and angle count from different steps."""
    found = shares(CosineDecay(final_ratio=0.1, cycles=3), 100, range(100, 1001))
    jumps = [t for t, (before, after) in enumerate(itertools.pairwise(found), 100) if after > before]
    assert jumps == [400, 700]
    assert [found[t - 100] for t in (400, 700, 1000)] == pytest.approx([0.1] * 3)
    assert min(found[t - 99] for t in jumps) > 0.9999


@pytest.mark.parametrize(
    ("shape", "middle"),
    [("linear", 0.6), ("sqrt", 0.2 + 0.8 * math.sqrt(0.5)), ("1-sqrt", 1 - 0.8 * math.sqrt(0.5)), ("harmonic", 1 / 3)],
)
def test_the_shapes_of_a_descent(shape, middle):
    wsd = WSDDecay(kind="wsd", shape=shape, length=D("200 steps"), final_ratio=0.2)
    assert shares(wsd, 100, [99, 100, 800, 900, 1000, 1001]) == pytest.approx([0.99, 1.0, 1.0, middle, 0.2, 0.2])
    cooldown = Cooldown(start=D("800 steps"), length=D("200 steps"), shape=shape, final_ratio=0.2)
    found = shares(ConstantDecay(kind="constant"), 100, range(1200), end=1200, cooldown=cooldown)
    assert found == pytest.approx(shares(wsd, 100, range(1200)))


@pytest.mark.parametrize("shape", ["linear", "sqrt", "1-sqrt", "harmonic"])
@pytest.mark.parametrize("name", LINGUA)
def test_a_cooldown_begins_where_any_schedule_stands(name, shape):
    decay, warmup, _ = LINGUA[name]
    cooldown = Cooldown(start=D("600 steps"), length=D("1600 tokens"), shape=shape, final_ratio=0.001)  # of 80 tokens each
    schedule = Schedule(PLAIN, D("1000 steps"), Duration(warmup, "steps"), decay, cooldown)
    found = [schedule.at(PLAIN.clock(step).read) for step in range(1001)]
    assert found[:601] == shares(decay, warmup, range(601))
    assert found[620:] == pytest.approx([0.001] * 381)
    falling = found[600:621]
    assert all(before > after for before, after in itertools.pairwise(falling))
    p, high = 0.25, found[600]
    remaining = {"linear": 0.75, "sqrt": math.sqrt(0.75), "1-sqrt": 0.5}.get(shape)
    expected = 1 / (p / 0.001 + (1 - p) / high) if remaining is None else 0.001 + (high - 0.001) * remaining
    assert found[605] == pytest.approx(expected)


def test_a_schedule_is_the_same_in_every_unit():
    def rates(warmup, end, length, start, descent):
        cooldown = Cooldown(start=D(start), length=D(descent))
        optim = OptimConfig(warmup=D(warmup), decay=LinearDecay(kind="linear", end=D(end)), cooldown=cooldown)
        assert problems(optim, PLAIN, D(length)) == []
        return [lr_at(optim, PLAIN, D(length), step) for step in range(200)]

    expected = rates("20 steps", "180 steps", "200 steps", "100 steps", "50 steps")
    for words in (
        ("200 samples", "1800 samples", "2000 samples", "1000 samples", "500 samples"),
        ("1600 tokens", "14.4k tokens", "16k tokens", "8k tokens", "4k tokens"),
        ("0.2 epochs", "1.8 epochs", "2 epochs", "1 epochs", "0.5 epochs"),
        ("1.6 GFLOPs", "14.4 GFLOPs", "16e9 FLOPs", "8 GFLOPs", "4 GFLOPs"),
        ("0.2 chinchilla", "1.8 chinchilla", "2 chinchilla", "1 chinchilla", "0.5 chinchilla"),
        ("20 steps", "1.8 chinchilla", "2 epochs", "8k tokens", "4 GFLOPs"),
    ):
        assert rates(*words) == pytest.approx(expected, rel=1e-12, abs=1e-18), words


def test_units_may_differ_during_a_ramp():
    """Warm-up in steps, decay in tokens: each is straight in its own unit."""
    timeline = Timeline(batch_stages(40, BatchRamp(start=10, increment=10, over=D("3000 samples"))), 8, 1000)
    optim = OptimConfig(lr=1.0, warmup=D("50 steps"), decay=LinearDecay(kind="linear", end=D("64k tokens"), final_ratio=0.0))
    first = timeline.samples_before(50) * 8
    for step in range(250):
        tokens = timeline.samples_before(step + 1) * 8
        expected = (step + 1) / 50 if step < 49 else max(0.0, 1 - (tokens - first) / (64_000 - first))
        assert lr_at(optim, timeline, D("300 steps"), step) == pytest.approx(expected, abs=1e-12), step


@pytest.mark.parametrize("length", ["1000 steps", "9999 samples", "80007 tokens", "10 epochs", "9.995 epochs"])
@pytest.mark.parametrize("warmup", ["7 steps", "70 samples"])
def test_the_last_step_has_the_final_rate_and_none_before_it(length, warmup):
    optim = OptimConfig(lr=1.0, warmup=D(warmup))
    last = PLAIN.steps(D(length)) - 1
    assert lr_at(optim, PLAIN, D(length), last) == pytest.approx(0.1, rel=1e-12)
    assert lr_at(optim, PLAIN, D(length), last - 1) > 0.1


WSD = {"kind": "wsd"}


@pytest.mark.parametrize(
    ("optim", "line"),
    [
        ({"warmup": "60 steps", "decay": {"kind": "cosine", "end": "400 samples"}}, "optim.warmup: '60 steps' is not shorter"),
        ({"decay": {"kind": "linear", "cycles": 2}}, "optim.decay.cycles: unknown key"),
        ({"decay": {"kind": "constant", "final_ratio": 0.1}}, "optim.decay.final_ratio: unknown key"),
        ({"decay": {"kind": "cosin"}}, "did you mean 'cosine'?"),
        ({"warmup": "0 steps", "decay": {"kind": "inverse_sqrt"}}, "optim.decay.kind: inverse_sqrt is measured by the warm-up"),
        ({"decay": WSD}, "optim.decay.length: the descent of wsd needs a length, or a share"),
        ({"decay": WSD | {"share": 0.1, "length": "5 steps"}}, "give one of them"),
        ({"decay": WSD | {"cycles": 2, "length": "5 steps"}}, "optim.decay.cycles: go with a share"),
        ({"decay": WSD | {"length": "36 steps"}}, "the descent begins before the warm-up"),
        ({"decay": WSD | {"share": 0.9}}, "the descent begins before the warm-up"),
        ({"warmup": "0 steps", "decay": WSD | {"share": 0.3, "cycles": 4}}, "or the cycle before it) is over"),
        ({"decay": WSD | {"share": 0.3, "shape": "harmonic", "final_ratio": 0.0}}, "optim.decay.shape: harmonic never reaches"),
        ({"cooldown": {"start": "20 steps", "length": "5 steps", "shape": "harmonic"}}, "optim.cooldown.shape: harmonic never"),
        (
            {"cooldown": {"start": "320 samples", "length": "5 steps"}},
            "optim.cooldown.start: '320 samples' is not before the end",
        ),
        ({"cooldown": {"start": "39 steps", "length": "5 steps", "final_ratio": 0.2}}, "is at 0.2 of its peak or below"),
        ({"cooldown": {"start": "20 min", "length": "5 steps"}}, "wall time"),
        ({"cooldown": {"start": "20 steps", "length": "0 steps"}}, "optim.cooldown.length: '0 steps' is not above 0"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(run_file, optim, line):
    with pytest.raises(ConfigError) as caught:
        resolve(read_config(run_file(optim={"warmup": "5 steps"} | optim), []), 1)
    assert line in str(caught.value)


def test_the_length_of_linguas_chinchilla_sweep():
    """26.205e18 FLOPs of a model of 1536 x 16 with 48 heads, on 8 devices with 32 rows of 2048 tokens each.

    By hand: attention 4 x 1536^2 and MLP 3 x 1536 x 4096 are 28.31M weights a layer, 452.98M in 16; the head has 50,257 x 1536,
    77.19M. Six times that is 3.181 GFLOPs; attention adds 3 x 16 x 4 x 1536 x 1024.5 = 0.302: 3.483 GFLOPs a token. So
    7.523B tokens: 14,349 steps of 524,288 tokens, and 12.4 for each of 607.4M parameters (both embeddings counted).
    """
    model = LlamaConfig(vocab_size=50_257, dim=1536, num_layers=16, num_heads=48, mlp_dim=4096, max_seq_len=2048)
    with torch.device("meta"):
        built = model.build()
    params = sum(p.numel() for p in built.parameters())
    assert params == 16 * (28_311_552 + 2 * 1536) + 2 * 77_194_752 + 1536
    timeline = Timeline((Stage(0, 0, 256),), 2048, 10**9, built.flops_per_token(2048), params)
    assert timeline.steps(D("26.205e18 FLOPs")) == 14_349
    assert timeline.clock(14_349).chinchilla == pytest.approx(12.39 / 20, rel=1e-3)
    assert timeline.steps(D("1 chinchilla")) == 20 * params // 524_288


def test_a_run_may_be_as_long_as_flops_or_parameters_say(run_file, capsys):
    for length in ("7 GFLOPs", "0.02 chinchilla"):
        resolved = resolve(read_config(run_file(train={"length": length}), []), 1)
        with torch.device("meta"):
            model = resolved.config.model.build()
        params = sum(p.numel() for p in model.parameters())
        tokens = 7e9 / model.flops_per_token(32) if "FLOPs" in length else 0.02 * 20 * params
        assert resolved.total_steps == int(tokens / 256) > 10
    assert plan.main(run_file(train={"length": "0.02 chinchilla"}), [], num_ranks=1, as_json=False) == 0
    assert "0.398 for each parameter" in capsys.readouterr().out


def plan_of(run_file, capsys, *words, **train):
    sources = [{"path": read_config(run_file(), []).data.sources[0].path, "at_end": "repeat"}]
    path = run_file(train=train, data={"sources": sources})
    plan.main(path, list(words), num_ranks=1, as_json=True)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("length", "steps"), [("300M samples", 311_541), ("145M samples", 160_174), ("150M samples", 165_057)])
def test_the_plan_of_tr1_has_megatrons_numbers(run_file, capsys, length, steps):
    ramp = {"start": 16, "increment": 16, "over": "5M samples"}
    result = plan_of(run_file, capsys, length=length, batch_samples=1024, batch_ramp=ramp)
    assert result["problems"] == []
    assert result["steps"] == steps
    stages = {stage["batch"]: (stage["iteration"], stage["samples"]) for stage in result["batch_ramp"]}
    golden = {32: (4961, 79_376), 48: (7441, 158_736), 64: (9095, 238_128), 80: (10_335, 317_488)}
    golden |= {512: (19_978, 2_460_368), 1008: (23_377, 4_920_896), 1024: (23_456, 5_000_528)}
    assert {batch: stages[batch] for batch in golden} == golden
    consumed = result["samples"] - (steps - 168_000) * 1024
    assert consumed == 153_013_584


STAGES = "train.batch_stages=[[0 samples, 8], [100 samples, 16], [6400 tokens, 24], [40 steps, 32]]"


def test_a_list_of_stages_is_planned_and_checked(run_file, capsys):
    result = plan_of(run_file, capsys, STAGES, length="50 steps", batch_samples=32)
    assert [tuple(stage.values()) for stage in result["batch_ramp"]] == [(0, 0, 8), (13, 104, 16), (19, 200, 24), (40, 704, 32)]
    assert (result["steps"], result["samples"]) == (50, 1024)
    for words, line in (
        (["train.batch_samples=16"], "train.batch_stages: ends with 32 samples, but batch_samples is 16; make them equal"),
        (["train.batch_ramp={start: 8, increment: 8, over: 10 samples}"], "train.batch_stages: is given beside batch_ramp"),
        (["train.batch_stages=[[1 samples, 32]]"], "train.batch_stages begins at '1 samples'"),
    ):
        found = plan_of(run_file, capsys, STAGES, *words, length="50 steps", batch_samples=32)["problems"]
        assert len(found) == 1, found
        assert line in found[0]


def train(path, *words):
    return loop.start(read_config(path, list(words)), HERE, Faults())


@pytest.fixture
def ledger(monkeypatch):
    """The samples that steps took, in the order of the steps."""
    taken, batch = [], Loader.batch

    def note(self, step, rank, size):
        first = self.timeline.samples_before(step)
        taken.append((step, first, min(first + self.timeline.batch_samples(step), self.stop)))
        return batch(self, step, rank, size)

    monkeypatch.setattr(Loader, "batch", note)
    return lambda: [span for span in taken if span[2] > span[1]]


def spans(*stages):
    """What `(steps, batch)` after each other take."""
    sizes = [batch for steps, batch in stages for _ in range(steps)]
    ends = list(itertools.accumulate(sizes))
    return [(step, end - size, end) for step, (size, end) in enumerate(zip(sizes, ends, strict=True))]


def test_a_batch_changed_at_a_resume_loses_and_repeats_no_sample(run_file, ledger, records):
    path = run_file(train={"length": "4 steps"}, optim={"warmup": "1 steps"})
    assert train(path) == 0
    assert train(path, "train.length=7 steps", "train.batch_samples=12") == 0
    ramp = "train.batch_ramp={start: 4, increment: 4, over: 120 samples}"  # of which 68 are gone: two of four stages
    assert train(path, "train.length=12 steps", "train.batch_samples=16", ramp) == 0
    assert train(path, "train.length=14 steps", "train.batch_samples=16", ramp) == 0  # nothing new: no seam
    assert ledger() == spans((4, 8), (3, 12), (2, 8), (3, 12), (2, 16))
    last = Store(Path(read_config(path, []).run) / "checkpoints").committed()[-1]
    assert last.meta["batch_stages"] == [[0, 0, 8], [4, 32, 12], [7, 68, 8], [9, 84, 12], [12, 120, 16]]
    assert [record["samples"] for record in records(Path(read_config(path, []).run))] == [end for _, _, end in ledger()]
    planned = plan.plan(read_config(path, ["train.length=300 samples"]), 1)
    assert planned["steps"] == 14 + (300 - 152) // 8
    assert [stage["batch"] for stage in planned["batch_ramp"]] == [8, 12, 8, 12, 16, 8]


def test_a_run_resumed_before_its_batch_changed_changes_it_there(run_file, ledger):
    path = run_file(train={"length": "4 steps"}, optim={"warmup": "1 steps"}, checkpoint={"every": "2 steps"})
    assert train(path) == 0
    newest = Store(Path(read_config(path, []).run) / "checkpoints").committed()[-1]
    file = next(newest.path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-1])
    assert train(path, "train.length=5 steps", "train.batch_samples=12") == 0
    assert ledger() == spans((4, 8)) + spans((2, 8), (3, 12))[2:]


def test_an_epoch_that_ended_within_a_batch_goes_on_with_its_next_row(run_file, ledger):
    path = run_file(train={"length": "0.01 epochs", "batch_samples": 24}, optim={"warmup": "1 steps"})
    rows = resolve(read_config(path, []), 1).stop_samples
    assert rows % 24
    assert train(path) == 0
    assert train(path) == 0  # finished: nothing more
    assert train(path, "train.length=0.02 epochs") == 0
    taken = ledger()
    assert [first for _, first, _ in taken] == [0, *(last for _, _, last in taken[:-1])]
    assert taken[-1][2] == resolve(read_config(path, ["train.length=0.02 epochs"]), 1).stop_samples > 1.9 * rows


def test_a_ramp_is_the_same_after_a_resume(run_file, ledger):
    ramp = {"start": 4, "increment": 2, "over": "60 samples"}
    path = run_file(train={"length": "12 steps", "batch_samples": 12, "batch_ramp": ramp}, optim={"warmup": "1 steps"})
    for length in (5, 12):
        assert train(path, f"train.length={length} steps") == 0
    timeline = Timeline(batch_stages(12, BatchRamp(start=4, increment=2, over=D("60 samples"))), 32, 1000)
    assert ledger() == [(step, timeline.samples_before(step), timeline.samples_before(step + 1)) for step in range(12)]


def test_a_cooldown_begins_at_a_resume(run_file, records):
    path = run_file(train={"length": "10 steps"}, optim={"warmup": "2 steps"})
    assert train(path, "train.length=6 steps", "optim.decay.end=100 steps", "optim.decay.kind=cosine") == 0
    words = [
        "optim.decay.end=100 steps",
        "optim.decay.kind=cosine",
        "optim.cooldown={start: 6 steps, length: 4 steps, shape: linear}",
    ]
    assert train(path, *words) == 0
    rates = [record["lr"] for record in records(Path(read_config(path, []).run))]
    assert rates[6:] == pytest.approx([rates[5] * share for share in (0.75, 0.5, 0.25, 0.0)])
