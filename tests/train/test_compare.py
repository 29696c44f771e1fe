"""Two runs compared: equal ones are equal to the bit, deterministic ones and those from one seed checkpoint among them; of
others the first step, and the first tensor in the model's order, are named.
"""

import json
import shutil
import signal
import sys
from pathlib import Path

import orjson
import pytest
import torch
import yaml
from ranks import Blow
from test_resume import tensors_of

from franca.__main__ import main
from franca.checkpoint import sharded
from franca.checkpoint.convert import ONE
from franca.checkpoint.store import Store
from franca.cluster.plan import plan
from franca.core.errors import ConfigError
from franca.core.run import read_records
from franca.train import loop
from franca.train.compare import compare
from franca.train.config import read_config
from franca.train.faults import Faults


def record(step: int, **values: float | None) -> dict:
    known = {"samples": 8 * step, "loss": 5.0 / step, "nll": 5.0 / step, "lr": 1e-3, "grad_norm": 1.5, "step_s": step / 7}
    return {"kind": "train", "step": step, **known, "time": id(values), **values}


def folder_with(path: Path, *records: dict) -> Path:
    path.mkdir()
    (path / "metrics.jsonl").write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in records))
    return path


def test_superseded_records_and_clocks_do_not_count(tmp_path: Path) -> None:
    one = folder_with(tmp_path / "one", *(record(step) for step in (1, 2, 3, 4)))
    killed = [record(1), record(2), record(3, loss=9.0), {"kind": "rollback", "to_step": 2, "attempt": 2}, record(3), record(4)]
    other = folder_with(tmp_path / "other", *killed, record(5))
    found = compare(one, other)
    assert found["equal"]
    assert found["largest"] is None
    assert found["steps"] == {"common": 4, "first": 1, "last": 4, "only_in_one": 1}


def test_the_largest_and_the_first_difference_are_those_of_a_naive_search(tmp_path: Path) -> None:
    changed = {2: {"grad_norm": 1.5 * (1 + 1e-12)}, 3: {"nll": 1.7, "lr": 1.1e-3}, 4: {"loss": 1.3}}
    one = folder_with(tmp_path / "one", *(record(step) for step in (1, 2, 3, 4, 5)))
    other = folder_with(tmp_path / "other", *(record(step, **changed.get(step, {})) for step in (1, 2, 3, 4, 5)))
    found = compare(one, other)
    assert not found["equal"]
    assert found["first"] == {
        "step": 2,
        "name": "grad_norm",
        "values": [1.5, 1.5 * (1 + 1e-12)],
        "relative": pytest.approx(1e-12),
    }
    assert (found["largest"]["step"], found["largest"]["name"]) == (3, "lr")
    assert found["largest"]["relative"] == pytest.approx(1e-4 / 1.1e-3)
    assert [compare(one, other, rtol)["first"]["step"] for rtol in (1e-13, 1e-11, 0.03)] == [2, 3, 3]
    assert compare(one, other, 0.05)["first"]["name"] == "lr"
    assert compare(one, other, 0.1)["equal"]


@pytest.mark.parametrize("value", [None, "missing"])
def test_what_one_run_has_not_or_is_not_finite_is_a_difference_at_any_tolerance(tmp_path: Path, value: str | None) -> None:
    one = folder_with(tmp_path / "one", record(1, z_loss=0.1))
    other = folder_with(tmp_path / "other", record(1, z_loss=None) if value is None else record(1))
    assert compare(one, other, 0.9)["first"] == {"step": 1, "name": "z_loss", "values": [0.1, None], "relative": float("inf")}
    assert compare(other, other)["equal"]


def test_runs_that_cannot_be_compared_are_told_why(tmp_path: Path) -> None:
    one = folder_with(tmp_path / "one", record(1), record(2))
    with pytest.raises(ConfigError, match=r"nowhere: has no record of a step \(metrics.jsonl\). Give the folders of two runs"):
        compare(one, tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"no step in common to compare: .*one steps 1 to 2 and .*late steps 7 to 7"):
        compare(one, folder_with(tmp_path / "late", record(7)))


@pytest.fixture
def trained(run_file) -> Path:
    path = run_file("first", train={"length": "4 steps"}, checkpoint={"every": "2 steps"}, optim={"warmup": "1 steps"})
    assert loop.start(read_config(path, []), ONE, Faults()) == 0
    return Path(yaml.safe_load(path.read_text())["run"])


def rewrite(run: Path, step: int, **changes: float) -> list[str]:
    """Add to one number of some tensors of a checkpoint, `parameter<n>` or `moment<n>` of the model's n-th parameter."""
    store = Store(run / "checkpoints")
    checkpoint = next(c for c in store.committed() if c.step == step)
    tensors = tensors_of(checkpoint)
    names = [name for name in tensors if name.startswith("model.")]
    for key, change in changes.items():
        kind, place = key[:-1], int(key[-1])
        name = names[place] if kind == "parameter" else f"optimizer.{names[place].removeprefix('model.')}.exp_avg"
        tensors[name].view(-1)[-1] += change
    beside = {name: (checkpoint.path / name).read_bytes() for name in ("params.json", "tokenizer.json")}
    backwards = dict(reversed(tensors.items()))  # the order of the index is not the model's
    sharded.save(store, step, backwards, {}, lambda to: [(to / n).write_bytes(b) for n, b in beside.items()], ONE)
    return names


def test_the_first_tensor_in_the_models_order_is_named(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    copy = shutil.copytree(trained, tmp_path / "copy")
    assert compare(trained, copy)["tensor"] is None
    names = rewrite(copy, 4, moment0=1.0, parameter5=2.0, parameter2=0.5)
    found = compare(trained, copy)
    assert found["first"] is None
    assert not found["equal"]
    assert found["checkpoints"] == [2, 4]
    tensor = found["tensor"]
    assert (tensor["step"], tensor["name"], tensor["different"]) == (4, names[2], 1)
    assert tensor["largest"] == pytest.approx(0.5, rel=1e-6)
    monkeypatch.setattr("franca.train.compare._PORTION_BYTES", 20_000)  # of any size of portions
    assert compare(trained, copy)["tensor"] == tensor
    assert compare(trained, copy, 10.0)["equal"]

    monkeypatch.setattr(sys, "argv", ["franca", "verify", "losses", str(trained), str(copy), "--json"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert json.loads(capsys.readouterr().out)["tensor"] == tensor
    monkeypatch.setattr(sys, "argv", ["franca", "verify", "losses", str(trained), str(copy), "--rtol", "10"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == f"{trained} and {copy}: equal"
    another = shutil.copytree(trained, tmp_path / "another")
    rewrite(another, 4, moment6=1.0, moment3=1.0)
    assert compare(trained, another)["tensor"]["name"] == f"optimizer.{names[3].removeprefix('model.')}.exp_avg"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["losses", "a"], "which two runs"),
        (["losses", "a", "b", "c"], "which two runs"),
        (["data", "more"], "a dataset is verified by itself"),
        (["data", "--rtol", "1e-3"], "a dataset is verified by itself"),
    ],
)
def test_the_verb_says_what_it_takes(monkeypatch, capsys, words: list[str], message: str) -> None:
    monkeypatch.setattr(sys, "argv", ["franca", "verify", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 78
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("ranks", [1, 2])
def test_deterministic_runs_are_equal_to_the_bit_stopped_or_not(launch, run_file, ranks: int) -> None:
    sections = {"train": {"length": "6 steps", "deterministic": True, "micro_samples": 2}, "checkpoint": {"every": "3 steps"}}
    runs = [launch(run_file(name, **sections), ranks=ranks) for name in ("one", "two")]  # beside each other: in any timing
    stopped = launch(run_file("stopped", **sections), ranks=ranks, blow=Blow(signal.SIGTERM, 2, 0.0, (ranks - 1,)))
    assert [run.wait() for run in (*runs, stopped)] == [[0] * ranks, [0] * ranks, [75] * ranks]
    assert launch(run_file("stopped", **sections), ranks=ranks).wait() == [0] * ranks
    for other in (runs[1], stopped):
        found = compare(runs[0].folder, other.folder)
        assert found["equal"], found
        assert found["steps"] == {"common": 6, "first": 1, "last": 6, "only_in_one": 0}
        assert found["checkpoints"] == [3, 6]
    starts = [event["deterministic"] for event in read_records(stopped.folder / "events.jsonl") if event["event"] == "start"]
    assert starts == [True, True]


def test_a_run_of_no_steps_is_a_seed_for_every_mesh(launch, run_file) -> None:
    """Its weights are those of the seed on any number of ranks, and a run that starts from them is the run of that seed."""
    no_steps = {"train": {"length": "0 steps"}}
    assert plan(read_config(run_file("planned", **no_steps), []), 2)["problems"] == []
    seeds = [launch(run_file(f"seed{ranks}", **no_steps), ranks=ranks) for ranks in (1, 2)]
    assert [seed.wait() for seed in seeds] == [[0], [0, 0]]
    one, two = (Store(seed.folder / "checkpoints").committed() for seed in seeds)
    assert [c.step for c in (*one, *two)] == [0, 0]
    weights, others = tensors_of(one[0]), tensors_of(two[0])
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)

    short = {"train": {"length": "3 steps"}, "optim": {"warmup": "1 steps"}}
    for ranks, seed in ((1, seeds[1]), (2, seeds[0])):
        direct = launch(run_file(f"direct{ranks}", **short), ranks=ranks)
        begun = launch(run_file(f"begun{ranks}", seed=5, init_from=str(seed.folder), **short), ranks=ranks)
        assert [direct.wait(), begun.wait()] == [[0] * ranks] * 2
        assert compare(direct.folder, begun.folder)["equal"]
    assert launch(run_file("seed2", **short), ranks=2).wait() == [0, 0], "the seed's own folder can go on, too"
    assert compare(direct.folder, seeds[1].folder)["equal"]
