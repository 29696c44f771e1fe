"""What `franca status` reads out of a run folder."""

import json
import os

import pytest
import torch

from franca.cluster import status
from franca.core.run import append_record
from franca.parallel.world import World
from franca.train import loop
from franca.train.config import read_config
from franca.train.faults import Faults


def test_a_finished_run(run_file, capsys) -> None:
    path = run_file(train={"length": "12 steps"}, validation={"at_end": True})
    settings = read_config(path, [])
    loop.start(settings, World(0, 1, 0, torch.device("cpu")), Faults())
    capsys.readouterr()
    status.main(loop.Path(settings.run), as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["step"], facts["length"]) == ("done", 12, "12 steps")
    assert facts["checkpoints"] == [10, 12]
    assert (facts["attempts"], facts["world_size"], facts["tokens"]) == (1, 1, 12 * 8 * 32)
    assert facts["validation"]["stdlib"]["step"] == 12
    text = status.render(facts)
    assert "step                 12 of 12 steps" in text
    assert "held out: stdlib" in text


@pytest.mark.parametrize("torn", [b'{"step": 13, "lo', b""])
def test_torn_records_are_no_obstacle(run_file, torn: bytes) -> None:
    path = run_file(train={"length": "6 steps"})
    settings = read_config(path, [])
    loop.start(settings, World(0, 1, 0, torch.device("cpu")), Faults())
    metrics = loop.Path(settings.run) / "metrics.jsonl"
    with open(metrics, "ab") as file:
        file.write(torn)
    assert status.status(loop.Path(settings.run))["step"] == 6
    append_record(metrics, {"kind": "train", "step": 7, "tokens": 1, "loss": 1.0, "tokens_per_s": 1.0, "time": 0.0})
    assert status.status(loop.Path(settings.run))["step"] == 7
    assert os.listdir(settings.run)
