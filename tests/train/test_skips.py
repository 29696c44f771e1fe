"""Steps whose gradient is not finite, in the loop: skipped, counted, off the clock of the rate, and the same after a resume."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from franca.checkpoint import sharded
from franca.checkpoint.store import Store
from franca.core.errors import ConfigError
from franca.parallel.world import World
from franca.train import loop, optim
from franca.train.config import read_config, resolve
from franca.train.faults import Faults

HERE = World(0, 1, 0, torch.device("cpu"))
CONSTANT = {"lr": 1e-2, "warmup": "5 steps", "decay": {"kind": "constant"}}


def train(path: Path, *words: str) -> int:
    return loop.start(read_config(path, list(words)), HERE, Faults())


def tensors_at(path: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors of a run's checkpoint."""
    checkpoint = next(c for c in Store(Path(read_config(path, []).run) / "checkpoints").committed() if c.step == step)
    stored = sharded.Reader(checkpoint.path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in stored.items()}
    sharded.load(checkpoint, tensors, num_ranks=1)
    return tensors


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put an infinity into one number of the gradient of some steps."""

    def plant(*steps: int) -> None:
        real_step, real_clip, current = loop.step, optim.clip, [0]

        def step(run: loop.Run, *arguments: Any) -> Any:
            current[0] = run.step
            return real_step(run, *arguments)

        def clip(model: torch.nn.Module, *arguments: Any) -> Any:
            if current[0] in steps:
                next(model.parameters()).grad[3, 1] = math.inf
            return real_clip(model, *arguments)

        monkeypatch.setattr(loop, "step", step)
        monkeypatch.setattr(optim, "clip", clip)

    return plant


@pytest.mark.parametrize(("precision", "rates"), [("fp32", [1, 2, 3, 4, 4, 5, 5]), ("fp16", [1, 2, 3, 3, 4, 5, 5])])
def test_a_skipped_step_is_counted_and_is_not_on_the_clock_of_the_rate(
    run_file, records, poison, precision: str, rates: list[int]
) -> None:
    """fp16 looks at every step at once, other precisions one step late."""
    poison(2)
    train_section = {"length": "7 steps", "precision": precision}
    path = run_file(train=train_section, optim=CONSTANT | {"max_skipped": 1}, checkpoint={"every": "1 steps"})
    assert train(path) == 0
    found = records(Path(read_config(path, []).run))
    assert [record["lr"] for record in found] == pytest.approx([rate / 5 * 1e-2 for rate in rates])
    assert [record["skipped"] for record in found] == [0, 0, 1, 1, 1, 1, 1]
    assert [record["samples"] for record in found] == [8 * step for step in range(1, 8)], "the data go on"
    before, after = tensors_at(path, 2), tensors_at(path, 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items() if not name.startswith("loss_scale."))
    assert all(tensor.isfinite().all() for tensor in tensors_at(path, 7).values())


def test_a_resume_knows_what_was_skipped(run_file, records, poison) -> None:
    poison(1, 4)
    sections = {"optim": CONSTANT | {"max_skipped": 1, "kind": "muon", "ema": 0.9, "moments": "bf16"}}
    whole = run_file("whole", train={"length": "9 steps"}, **sections)
    assert train(whole) == 0
    for stop in (2, 5):
        stopped = run_file(f"stopped{stop}", train={"length": "9 steps"}, **sections)
        assert train(stopped, f"train.length={stop} steps") == 0
        assert train(stopped) == 0
        assert records(Path(read_config(stopped, []).run)) == records(Path(read_config(whole, []).run))
        expected = tensors_at(whole, 9)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_at(stopped, 9).items())


def test_more_skips_in_a_row_than_forgiven_end_the_run(run_file, records, poison) -> None:
    poison(2, 4, 5)
    path = run_file(optim=CONSTANT | {"max_skipped": 1})
    with pytest.raises(FloatingPointError, match="at step 6"):
        train(path)
    assert records(Path(read_config(path, []).run))[-1]["skipped"] == 3
    path = run_file("strict", optim=CONSTANT)
    with pytest.raises(FloatingPointError, match="at step 3"):
        train(path)


def test_fp16_learns_and_a_resume_goes_on_with_its_scale(run_file, records) -> None:
    """The first scale is far too large for fp16: real overflows bring it down, until the end of the window doubles it."""
    scale = {"initial": 2.0**26, "window": 6, "hysteresis": 2, "min": 1.0}
    section = {"length": "30 steps", "precision": "fp16", "loss_scale": scale}
    whole, stopped = (run_file(name, train=section, optim=CONSTANT) for name in ("whole", "stopped"))
    assert train(whole) == 0
    assert train(stopped, "train.length=3 steps") == 0
    assert train(stopped, "train.length=17 steps") == 0
    assert train(stopped) == 0
    found = records(Path(read_config(whole, []).run))
    assert records(Path(read_config(stopped, []).run)) == found
    expected = tensors_at(whole, 30)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_at(stopped, 30).items())
    assert [record["loss_scale"] for record in found[:4]] == [2.0**26, 2.0**26, 2.0**25, 2.0**24], "one is forgiven"
    grown = [a["loss_scale"] < b["loss_scale"] for a, b in itertools.pairwise(found)]
    assert any(grown)
    assert not any(grown[:6])
    skipped = found[-1]["skipped"]
    assert 4 < skipped < 20
    assert [record["lr"] for record in found[:4]] == pytest.approx([0.2e-2] * 4), "no real step, no progress of the rate"
    exact = run_file("exact", train={"length": f"{30 - skipped} steps", "precision": "fp32"}, optim=CONSTANT)
    assert train(exact) == 0
    assert found[-1]["loss"] < 0.9 * found[0]["loss"]
    assert found[-1]["loss"] == pytest.approx(records(Path(read_config(exact, []).run))[-1]["loss"], rel=0.1)


def test_fp16_ends_when_its_smallest_scale_overflows(run_file, poison) -> None:
    poison(*range(2, 9))
    scale = {"initial": 4.0, "hysteresis": 1, "min": 2.0}
    path = run_file(train={"length": "9 steps", "precision": "fp16", "loss_scale": scale}, optim=CONSTANT)
    with pytest.raises(FloatingPointError, match="at step 4"):  # 4, then 2
        train(path)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.loss_scale={initial: 4.0}", "train.loss_scale: has no effect on train.precision fp32"),
        ("optim.bf16_params=kahan", "optim.bf16_params: parameters in bf16 are for train.precision bf16, not fp32"),
        ("optim.groups=[{match: embeding.*}]", "optim.groups.0..match: 'embeding.*' matches no parameter"),
    ],
)
def test_options_without_effect_are_refused(run_file, word: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(read_config(run_file(), [word]), 1)


def test_a_kind_of_optimizer_in_the_command_keeps_the_files_other_settings(run_file) -> None:
    settings = read_config(run_file(optim={"lr": 0.125}), ["optim.kind=muon"]).optim
    assert (settings.kind, settings.lr) == ("muon", 0.125)
