"""The sinks: what they write, and that none of them can stop a run."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from franca.core.run import RunFolder, read_records
from franca.observe.metrics import Metrics, MetricsConfig
from franca.parallel.world import World
from franca.train import loop
from franca.train.config import read_config
from franca.train.faults import Faults

RECORD = {
    "step": 3,
    "samples": 24,
    "tokens": 768,
    "loss": 2.5,
    "lr": 1e-3,
    "grad_norm": 0.5,
    "tokens_per_s": 10.0,
    "step_s": 1.0,
}


def test_tensorboard_reads_back_what_the_records_say(run_file, records) -> None:
    path = run_file(
        train={"length": "5 steps"},
        metrics={"sinks": ["jsonl", "tensorboard"]},
        validation={"at_end": True},
        optim={"warmup": "1 steps"},
    )
    settings = read_config(path, [])
    loop.start(settings, World(0, 1, 0, torch.device("cpu")), Faults())
    events = EventAccumulator(str(Path(settings.run) / "tensorboard")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("train/loss")]
    expected = [(record["step"], torch.tensor(record["loss"]).item()) for record in records(Path(settings.run))]
    assert written == expected
    assert len(events.Scalars("validation/stdlib/bits_per_byte")) == 1


def test_sinks_change_no_number(run_file, records) -> None:
    found = []
    for sinks in (["jsonl"], ["console", "jsonl", "tensorboard"]):
        path = run_file(f"with{len(sinks)}", train={"length": "5 steps"}, metrics={"sinks": sinks}, optim={"warmup": "1 steps"})
        settings = read_config(path, [])
        loop.start(settings, World(0, 1, 0, torch.device("cpu")), Faults())
        found.append(records(Path(settings.run)))
    assert found[0] == found[1]


def test_a_sink_that_fails_says_so_once(tmp_path: Path, capsys) -> None:
    folder = RunFolder(tmp_path)
    folder.metrics.mkdir()  # a folder where the file should be: every write fails
    with Metrics(MetricsConfig(), folder, attempt=1, total_steps=5) as metrics:
        metrics.train(RECORD)
        metrics.train(RECORD)
        metrics.progress(RECORD, eta_s=61.0)
    err = capsys.readouterr().err
    assert err.count("metrics.jsonl cannot be written") == 1
    assert "step 3/5  loss 2.5000" in err
    assert "1:01 left" in folder.log.read_text()


def test_other_ranks_are_silent(tmp_path: Path, capsys) -> None:
    with Metrics(MetricsConfig(), RunFolder(tmp_path), attempt=1, total_steps=5, speaking=False) as metrics:
        metrics.train(RECORD)
        metrics.progress(RECORD, eta_s=1.0)
        metrics.say("hello")
        metrics.roll_back(0)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_a_rollback_is_marked_once_and_only_when_needed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with Metrics(MetricsConfig(sinks=("jsonl",)), folder, attempt=2, total_steps=5) as metrics:
        metrics.train(RECORD)
        metrics.roll_back(3)
        metrics.roll_back(2)
        metrics.roll_back(2)
    assert [record["kind"] for record in read_records(folder.metrics)] == ["train", "rollback"]
