"""The planner's figures, against independent counts."""

import json

import torch

from franca.cluster import plan
from franca.models.llama import LlamaConfig
from franca.train.config import read_config

KEYS = {
    "params.total",
    "params.non_embedding",
    "steps",
    "samples",
    "tokens",
    "flops.per_token",
    "flops.total",
    "checkpoint.full_bytes",
    "checkpoint.weights_bytes",
    "memory.static_bytes_per_device",
    "problems",
}


def test_every_promised_key_and_figure(run_file, capsys) -> None:
    path = run_file(train={"length": "40 steps"})
    assert plan.main(path, [], num_ranks=2, as_json=True) == 0
    result = json.loads(capsys.readouterr().out)
    for key in KEYS:
        value = result
        for part in key.split("."):
            value = value[part]
    model = LlamaConfig(vocab_size=512, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64).build()
    total = sum(p.numel() for p in model.parameters())
    assert result["params"]["total"] == total
    assert result["params"]["non_embedding"] == total - 2 * 512 * 32
    assert (result["steps"], result["samples"], result["tokens"]) == (40, 320, 320 * 32)
    assert result["flops"]["total"] == result["flops"]["per_token"] * 320 * 32
    assert result["checkpoint"] == {"full_bytes": 12 * total, "weights_bytes": 4 * total}
    assert result["memory"]["static_bytes_per_device"] == 16 * total // 2
    assert result["problems"] == []


def test_the_checkpoint_has_the_planned_size(run_file, launch, capsys) -> None:
    path = run_file(train={"length": "1 steps"}, optim={"warmup": "0 steps"})
    plan.main(path, [], num_ranks=1, as_json=True)
    planned = json.loads(capsys.readouterr().out)["checkpoint"]["full_bytes"]
    run = launch(path)
    assert run.wait() == [0]
    written = sum(file.stat().st_size for file in run.folder.glob("checkpoints/*/*.distcp"))
    assert planned < written < planned + 2500 * 63, "each tensor has a small header"


def test_a_ramp_is_listed_stage_by_stage(run_file) -> None:
    path = run_file(train={"length": "2000 samples", "batch_samples": 32})
    settings = read_config(path, ["train.batch_ramp={start: 8, increment: 8, over: 480 samples}"])
    result = plan.plan(settings, num_ranks=1)
    assert [stage["batch"] for stage in result["batch_ramp"]] == [8, 16, 24, 32]
    samples = step = 0
    while samples + (batch := next(s["batch"] for s in result["batch_ramp"][::-1] if s["iteration"] <= step)) <= 2000:
        samples, step = samples + batch, step + 1
    assert (result["steps"], result["samples"]) == (step, samples)


def test_people_can_read_it(run_file, capsys) -> None:
    assert plan.main(run_file(), [], num_ranks=1, as_json=False) == 0
    text = capsys.readouterr().out
    assert "problems         none found" in text
    assert "10,240" in text
    assert torch.get_default_device().type == "cpu"
