"""A run that is stopped or killed and started again is the same run: bit for bit on the same ranks, to 1e-4 on others."""

import random
import signal
from pathlib import Path

import pytest
import torch
from ranks import Blow
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from franca.checkpoint import sharded
from franca.checkpoint.store import Checkpoint, Store
from franca.core.run import read_records

SEED = 20261121


def tensors_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole."""
    stored = sharded.Reader(checkpoint.path).read_metadata().state_dict_metadata
    sizes = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in sizes.items()}
    sharded.load(checkpoint, tensors, num_ranks=1)
    return tensors


def last_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return tensors_of(Store(folder / "checkpoints").committed()[-1])


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], what: str) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different, f"{what}: {different}"
    assert any(name.startswith("optimizer.") for name in one)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stop_and_kill_leave_no_trace(launch, run_file, records, ranks: int, precision: str) -> None:
    rng = random.Random(f"{SEED}/{ranks}/{precision}")
    train = {"precision": precision, "micro_samples": 2}
    whole = launch(run_file("whole", train=train), ranks=ranks)
    assert whole.wait() == [0] * ranks

    stop = Blow(
        rng.choice([signal.SIGTERM, signal.SIGUSR2]), rng.randrange(1, 31), rng.uniform(0, 0.005), (rng.randrange(ranks),)
    )
    path = run_file("stopped", train=train)
    stopped = launch(path, ranks=ranks, blow=stop)  # one rank is told, all stop
    assert stopped.wait() == [75] * ranks, f"seed {SEED}, {stop}"
    assert launch(path, ranks=ranks).wait() == [0] * ranks

    kill = Blow(signal.SIGKILL, rng.randrange(12, 31), rng.uniform(0, 0.005), ranks=tuple(range(ranks)))
    path = run_file("killed", train=train)
    killed = launch(path, ranks=ranks, blow=kill)
    codes = killed.wait()
    assert -signal.SIGKILL in codes, f"seed {SEED}, {kill}: {codes}"
    assert not {0, 75} & set(codes), f"seed {SEED}, {kill}: {codes}"
    assert launch(path, ranks=ranks).wait() == [0] * ranks

    expected = last_tensors(whole.folder)
    for run, blow in ((stopped, stop), (killed, kill)):
        what = f"seed {SEED}, {blow} on {ranks} rank(s)"
        assert_same_bits(last_tensors(run.folder), expected, what)
        assert records(run.folder) == records(whole.folder), what
        assert [record["step"] for record in records(run.folder)] == list(range(1, 41))
    resumed = [event["step"] for event in read_records(killed.folder / "events.jsonl") if event["event"] == "resume"]
    assert resumed, "the killed run went on from a commit"
    assert resumed[0] % 10 == 0


def test_the_number_of_ranks_may_change_in_a_run(launch, run_file, records) -> None:
    rng = random.Random(SEED)
    whole = launch(run_file("whole"))
    assert whole.wait() == [0]
    path = run_file("elastic")
    stops = [rng.randrange(3, 9), rng.randrange(13, 19), rng.randrange(23, 29)]
    for ranks, stop in zip([1, 2, 4], stops, strict=True):
        run = launch(path, ranks=ranks, blow=Blow(signal.SIGTERM, stop, 0.0, (0,)))
        assert run.wait() == [75] * ranks, f"seed {SEED}, stops {stops}"
    assert launch(path).wait() == [0]
    for mine, theirs in zip(records(run.folder), records(whole.folder), strict=True):
        assert mine["samples"] == theirs["samples"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4), f"seed {SEED}, stops {stops}, step {mine['step']}"
    plans = {event["plan"] for event in read_records(run.folder / "events.jsonl") if event["event"] == "start"}
    assert len(plans) == 1


def mixed(dataset: Path, *phases: dict) -> dict:
    sources = [{"path": str(dataset), "name": name, "weight": 1.0} for name in ("a", "b")]
    return {"sources": sources, "phases": list(phases)}


def test_weights_may_change_in_a_run_and_ranks_with_them(launch, run_file, records, dataset) -> None:
    phase = {"start": "130 samples", "weights": {"b": 1.0}}
    whole = launch(run_file("whole", data=mixed(dataset, phase)))
    assert whole.wait() == [0]
    begun = launch(run_file("changed", data=mixed(dataset)), blow=Blow(signal.SIGTERM, 9, 0.0, (0,)))
    assert begun.wait() == [75]
    path = run_file("changed", data=mixed(dataset, phase))  # the phase is new, and yet to come
    stopped = launch(path, ranks=2, blow=Blow(signal.SIGTERM, 14, 0.0, (0,)))
    assert stopped.wait() == [75, 75]
    assert launch(path, ranks=2, blow=Blow(signal.SIGTERM, 25, 0.0, (1,))).wait() == [75, 75]  # across the border
    assert launch(path).wait() == [0]
    for mine, theirs in zip(records(begun.folder), records(whole.folder), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4), f"step {mine['step']}"
    changed = launch(run_file("changed", data=mixed(dataset, phase | {"start": "100 samples"})))
    assert changed.wait() == [1]  # that phase would have begun before
    assert "samples would be repeated or lost" in list(read_records(changed.folder / "events.jsonl"))[-1]["reason"]


def test_a_run_ends_where_its_source_does(launch, run_file, records, dataset) -> None:
    sources = [{"path": str(dataset), "max_epochs": 0.01, "at_end": "stop"}]
    run = launch(run_file("short", data={"sources": sources}))
    assert run.wait() == [0]
    last = Store(run.folder / "checkpoints").committed()[-1]
    rows = Store(run.folder / "checkpoints").committed()[-1].meta["samples"]
    assert 8 * (last.step - 1) < rows <= 8 * last.step < 8 * 40
    assert records(run.folder)[-1]["step"] == last.step
