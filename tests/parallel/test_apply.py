"""Sharded runs: the same weights, losses and gradients as one process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from ranks import Blow

from franca.checkpoint import sharded
from franca.checkpoint.store import Store
from franca.core.errors import ConfigError
from franca.parallel.world import _place


def first_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Store(folder / "checkpoints").committed()[0]
    stored = sharded.Reader(checkpoint.path).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size) for name, entry in stored.items() if name.startswith("model.")}
    sharded.load(checkpoint, tensors, num_ranks=1)
    return tensors


def test_initial_weights_do_not_depend_on_the_number_of_ranks(launch, run_file) -> None:
    """A rate of almost nothing leaves them as they were drawn."""
    weights = []
    for ranks in (1, 2, 3):
        path = run_file(
            f"ranks{ranks}", train={"length": "1 steps", "batch_samples": 6}, optim={"lr": 1e-30, "warmup": "0 steps"}
        )
        run = launch(path, ranks=ranks)
        assert run.wait() == [0] * ranks
        weights.append(first_checkpoint(run.folder))
    for other in weights[1:]:
        assert all(torch.equal(other[name], weights[0][name]) for name in weights[0])


@pytest.mark.parametrize(("precision", "rel"), [("fp32", 2e-6), ("bf16", 1e-2)])
def test_losses_and_gradients_equal_one_process(launch, run_file, records, precision: str, rel: float) -> None:
    """Document attention and micro-batches included; both reshard policies."""
    found = []
    for ranks, reshard in ((1, True), (2, True), (4, False)):
        sections = {
            "train": {"length": "5 steps", "precision": precision, "micro_samples": 2},
            "data": {"attention": "document"},
            "parallel": {"reshard_after_forward": reshard},
            "optim": {"warmup": "1 steps"},
            "validation": {"at_end": True, "micro_samples": 5},
        }
        run = launch(run_file(f"ranks{ranks}", **sections), ranks=ranks)
        assert run.wait() == [0] * ranks
        found.append((records(run.folder), records(run.folder, "metrics.validation.jsonl")))
    (one, held_out), *others = found
    for mine, theirs in others:
        assert [r["loss"] for r in mine] == pytest.approx([r["loss"] for r in one], rel=rel)
        assert [r["grad_norm"] for r in mine] == pytest.approx([r["grad_norm"] for r in one], rel=50 * rel)
        assert [r["loss"] for r in theirs] == pytest.approx([r["loss"] for r in held_out], rel=10 * rel)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_launch_passes_signals_on_and_keeps_exit_codes(run_file, tmp_path: Path, number: int) -> None:
    """The whole way: the command line starts two ranks, its process group gets a signal (as a terminal's Ctrl-C does), and it
    says 75; run again, it says 0.
    """
    path = run_file(train={"length": "900 steps"})
    folder = Path(yaml.safe_load(path.read_text())["run"])
    command = [sys.executable, "-m", "franca", "launch", str(path), "--ranks", "2"]
    with open(tmp_path / "out", "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)
        deadline = time.monotonic() + 60
        while not (folder / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == 75, (tmp_path / "out").read_text()
        step = Store(folder / "checkpoints").committed()[-1].step
        again = subprocess.run([*command, f"train.length={step + 13} steps"], stdout=out, stderr=out, timeout=90)
    assert again.returncode == 0, (tmp_path / "out").read_text()
    assert Store(folder / "checkpoints").committed()[-1].step == step + 13


def test_incomplete_launcher_variables_are_named() -> None:
    assert _place({}) == (0, 1, 0)
    assert _place({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1"}) == (3, 8, 1)
    with pytest.raises(ConfigError, match="LOCAL_RANK=None"):
        _place({"RANK": "3", "WORLD_SIZE": "8"})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_save_right_after_a_validation_is_whole(launch, run_file, records, precision: str) -> None:
    """Validation gathers parameters without a backward pass that would cut them again."""
    sections = {
        "train": {"length": "8 steps", "precision": precision},
        "optim": {"warmup": "1 steps"},
        "validation": {"every": "2 steps", "at_end": True},
        "checkpoint": {"every": "2 steps", "keep": None},
        "parallel": {"reshard_after_forward": False},
    }
    whole = launch(run_file("whole", **sections), ranks=2)
    assert whole.wait() == [0, 0]
    path = run_file("stopped", **sections)
    stopped = launch(path, ranks=2, blow=Blow(signal.SIGTERM, 3, 0.0, (0,)))
    assert stopped.wait() == [75, 75]
    assert launch(path, ranks=2).wait() == [0, 0]
    assert records(stopped.folder) == records(whole.folder)
    assert records(stopped.folder, "metrics.validation.jsonl") == records(whole.folder, "metrics.validation.jsonl")
    for checkpoint in Store(whole.folder / "checkpoints").committed():
        stored = sharded.Reader(checkpoint.path).read_metadata().state_dict_metadata
        assert len(stored) == 4 * sum(name.startswith("model.") for name in stored), "three states for every parameter"


def test_tasks_of_srun_find_their_place() -> None:
    step = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}
    assert _place({**step, "MASTER_ADDR": "n1"}) == (3, 4, 1)
    assert _place({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == (0, 1, 0), "a batch script is no task"
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        _place(step)
