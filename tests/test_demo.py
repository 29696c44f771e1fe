"""The whole way, as a newcomer walks it, with a few steps of training."""

import re
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from franca.checkpoint.store import Store
from franca.core.run import current_metrics, read_records


def test_the_demonstration_walks_the_whole_way(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    command = [sys.executable, "-m", "franca", "demo", str(folder), "--steps", "6"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    run = folder / "run"
    exits = [event["code"] for event in read_records(run / "events.jsonl") if event["event"] == "exit"]
    assert exits == [75, 0], "stopped by a signal, then resumed and done"
    assert [record["step"] for record in current_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert Store(run / "checkpoints").committed()[-1].step == 6
    bits = dict(re.findall(r"^  (\S+).* (\d+\.\d+) bits per byte$", result.stdout, re.MULTILINE))
    assert set(bits) == {"franca", "gzip", "xz"}
    assert 1 < float(bits["xz"]) < float(bits["gzip"]) < float(bits["franca"]) < 8
    model = AutoModelForCausalLM.from_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    assert model.generate(**tokenizer("def f(", return_tensors="pt"), max_new_tokens=2, do_sample=False).shape[0] == 1
    for verb in ("prepare", "plan", "train", "status", "sample", "export"):
        assert f"\n  franca {verb} " in result.stdout.split("The commands were:")[1]
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 78
    assert "exists already" in again.stderr
