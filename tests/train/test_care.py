"""Care for large runs: garbage is collected by all ranks at one step, timeouts are tight after the first, and no sooner."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
import yaml

from franca.checkpoint.convert import ONE
from franca.core.run import read_records
from franca.parallel import world
from franca.parallel.mesh import ParallelConfig
from franca.parallel.world import World
from franca.train import loop
from franca.train.care import COLLECT_EVERY_STEPS, Care
from franca.train.config import read_config
from franca.train.faults import Faults

PARALLEL = ParallelConfig(first_timeout_s=900, timeout_s=60)


class Node:
    """Garbage that only a collection finds."""

    def __init__(self) -> None:
        self.me = self


def garbage() -> weakref.ref:
    return weakref.ref(Node())


def test_garbage_is_collected_on_the_cadence_alone() -> None:
    assert gc.isenabled()
    with Care(World(0, 1, 0, torch.device("cpu")), PARALLEL) as care:
        care.step()
        assert gc.isenabled(), "the first step makes what lasts"
        first = garbage()
        care.step()
        assert first() is None
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 1000, "what has been made by now is not looked at again"
        later = garbage()
        for _ in range(COLLECT_EVERY_STEPS - 3):
            care.step()
            _ = [[] for _ in range(1000)]  # enough for a collection of Python's own
        assert later() is not None
        care.step()
        assert later() is None
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def fail_in_the_third_step() -> None:
    with Care(World(0, 1, 0, torch.device("cpu")), PARALLEL) as care:
        care.step()
        care.step()
        raise FloatingPointError


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_left_as_it_was_found_also_by_an_error(enabled: bool) -> None:
    try:
        if not enabled:
            gc.disable()
        with pytest.raises(FloatingPointError):
            fail_in_the_third_step()
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("here", "expected"),
    [
        (World(0, 2, 0, torch.device("cuda", 0)), [(0, "cuda", 900), (2, "cuda", 60)]),
        (World(0, 1, 0, torch.device("cuda", 0)), []),
        (World(0, 2, 0, torch.device("cpu")), []),
    ],
    ids=["GPUs", "one GPU", "CPUs"],
)
def test_timeouts_are_loose_to_the_end_of_step_1_and_tight_after(monkeypatch, here: World, expected: list) -> None:
    """Of GPUs alone: on a CPU one group does both, and a save may keep it waiting."""
    seen = []
    care = Care(here, PARALLEL)
    monkeypatch.setattr(world, "set_timeout", lambda device, timeout_s: seen.append((care.steps, device, timeout_s)))
    with care:
        for _ in range(4):
            care.step()
    assert seen == expected


@pytest.mark.parametrize("wanted", [True, False])
def test_a_run_is_cared_for_and_says_whether_it_is_deterministic(run_file, monkeypatch, wanted: bool) -> None:
    seen, step = [], loop.step

    def watched(*given):
        seen.append((torch.are_deterministic_algorithms_enabled(), gc.isenabled()))
        return step(*given)

    monkeypatch.setattr(loop, "step", watched)
    path = run_file(train={"length": "3 steps", "deterministic": wanted}, optim={"warmup": "1 steps"})
    folder = Path(yaml.safe_load(path.read_text())["run"])
    try:
        assert loop.start(read_config(path, []), ONE, Faults()) == 0
    finally:
        world.set_deterministic(False, torch.device("cpu"))
    assert seen == [(wanted, True), (wanted, False), (wanted, False)]
    assert next(read_records(folder / "events.jsonl"))["deterministic"] == wanted
    header = (folder / "train.log").read_text().splitlines()[0]
    assert header.startswith("attempt 1, 1 rank(s) on cpu: deterministic algorithms are " + ("on" if wanted else "off"))


def test_a_run_of_no_steps_has_a_held_out_loss(run_file, records) -> None:
    path = run_file(train={"length": "0 steps"}, validation={"at_end": True, "micro_samples": 64})
    folder = Path(yaml.safe_load(path.read_text())["run"])
    assert loop.start(read_config(path, []), ONE, Faults()) == 0
    assert [record["step"] for record in records(folder, "metrics.validation.jsonl")] == [0]
    assert records(folder) == []
