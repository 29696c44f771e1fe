"""The toy architecture of `experiments/`: one file beside the library, taken all the way from text to transformers."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from franca.__main__ import main
from franca.checkpoint.convert import open_model
from franca.checkpoint.store import Store
from franca.core.config import check, config
from franca.core.errors import ConfigError
from franca.models.base import Context, ModelConfig
from franca.models.hybrid import HybridConfig
from franca.parallel.apply import init_weights

ROOT = Path(__file__).parents[1]
MODULE = "experiments.moving_average"
sys.path.append(str(ROOT))  # `experiments` stands beside `franca` and is not installed
toy = importlib.import_module(MODULE)

SHARED = {"vocab_size": 61, "dim": 24, "num_layers": 3, "max_seq_len": 96, "init_std": 0.2}
TOY = {"kind": "moving_average", "longest": 30.0}
SHAPES: dict[str, dict[str, Any]] = {
    "alone": TOY,
    "hybrid": {"kind": "hybrid", "blocks": [TOY, {"kind": "llama", "num_heads": 4, "mlp_dim": 32}]},
}
CPU = torch.device("cpu")
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@config
class Section:
    model: ModelConfig


def read(shape: dict[str, Any]) -> Any:
    return check(Section, {"model": {**shape, **SHARED}}, "here").model


def build(shape: dict[str, Any]) -> Any:
    model = read(shape).build()
    init_weights(model, torch.Generator().manual_seed(0))
    return model


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(2))


def same(given: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


# --- what a block promises


def test_the_block_is_its_equations_one_position_after_the_other() -> None:
    block = build(TOY).double().layers[0]
    w = {name: p.detach() for name, p in block.named_parameters()}
    x_TD = torch.randn(40, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a, h, expected = 1 / (1 + (-w["average.decay"]).exp()), torch.zeros(48, dtype=torch.float64), []
    for x in x_TD:
        u = x / (x.square().mean() + 1e-5).sqrt()
        h = a * h + (1 - a) * (w["value.weight"] @ u)
        g = w["gate.weight"] @ u
        expected.append(x + w["output.weight"] @ (h * g / (1 + (-g).exp())))
    context = Context(None, None, {}, None, 40)
    torch.testing.assert_close(block(x_TD[None], context, None)[0].detach(), torch.stack(expected), rtol=1e-6, atol=1e-6)


def test_memories_begin_between_the_shortest_and_the_longest() -> None:
    memory = 1 / (1 - torch.sigmoid(build(TOY).layers[2].average.decay.detach().double()))
    torch.testing.assert_close(memory, torch.logspace(math.log10(2), math.log10(30), 48).double(), rtol=1e-4, atol=0)


@each_shape
def test_a_row_in_any_parts_is_the_whole_row(shape: dict[str, Any]) -> None:
    model, tokens = build(shape), ids(2, 60)
    whole = model(tokens).detach()
    assert whole.std() > 0.3
    with torch.no_grad():
        for sizes in ([60], [1] * 60, [59, 1], [1, 59], [3, 2, 1, 30, 24]):
            cache = model.new_cache(2, 60)
            same(torch.cat([model(part, cache=cache) for part in tokens.split(sizes, dim=1)], dim=1), whole)


@each_shape
def test_packed_documents_are_separate_documents(shape: dict[str, Any]) -> None:
    model, lengths, row = build(shape), [1, 15, 2, 40], ids(1, 58)
    document = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    position = torch.cat([torch.arange(length) for length in lengths])[None]
    apart = torch.cat([model(part) for part in row.split(lengths, dim=1)], dim=1)
    same(model(row, document, position), apart)
    assert (model(row) - apart).abs().max() > 1e-2  # told of no documents, they see each other


@each_shape
def test_a_changed_token_changes_nothing_before_it(shape: dict[str, Any]) -> None:
    model, before = build(shape), ids(2, 50)
    after = before.clone()
    after[:, 33] = (after[:, 33] + 1) % 61
    first, second = model(before), model(after)
    assert torch.equal(first[:, :33], second[:, :33])
    assert (first[:, 33:] != second[:, 33:]).flatten(2).any(dim=2)[:, :5].all()


def test_it_takes_its_turn_in_a_hybrid() -> None:
    shape = read(SHAPES["hybrid"])
    assert isinstance(shape, HybridConfig)
    assert [type(layer) is toy.Block for layer in shape.build().layers] == [True, False, True]


def test_work_is_counted_by_weights_and_features() -> None:
    weights = 3 * (3 * 24 * 48) + 61 * 24
    assert build(TOY).flops_per_token(50) == 6 * weights + 3 * 3 * (2 * 48)


@pytest.mark.parametrize(("wrong", "part"), [({"shortest": 40.0}, "40, longest: 30"), ({"shortest": 1.0}, "than 1 position")])
def test_memories_that_make_no_sense_are_one_problem(wrong: dict[str, Any], part: str) -> None:
    [problem] = read(TOY | wrong).problems()
    assert problem.startswith("model.shortest: ")
    assert part in problem


def test_an_unknown_option_is_answered_with_what_was_meant() -> None:
    with pytest.raises(ConfigError, match=r"model\.longst: unknown key \(did you mean 'longest'\?\)"):
        check(Section, {"model": {"kind": "moving_average", "longst": 9.0}}, "here")


def test_the_library_does_not_know_its_experiments() -> None:
    files = [*(ROOT / "franca").rglob("*.py")]
    assert files
    assert [path.name for path in files if re.search(r"experiments|moving_average", path.read_text())] == []


# --- the whole way

PROMPT = "7 and"
ELSEWHERE = f"""
import json, sys
sys.modules["franca"] = None  # as where it is not installed
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
tokens = tokenizer(text, return_tensors="pt")["input_ids"]
answer = model.generate(**tokenizer("{PROMPT}", return_tensors="pt"), max_new_tokens=12, do_sample=False)[0]
answer = tokenizer.decode(answer, skip_special_tokens=True)
print(json.dumps({{"tokens": tokens.tolist(), "logits": model(tokens).logits.tolist(), "answer": answer}}))
"""


@pytest.fixture
def franca(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command line in this process, which must end well; returns its standard output."""

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["franca", *map(str, words)])
        code: int | str | None = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        assert not code, (words, out, err)
        return out

    return run


def write_files(folder: Path, shape: dict[str, Any]) -> tuple[Path, Path]:
    """A corpus of two hundred short documents, and the two files that say what to do with it."""
    lines = [json.dumps({"text": f"{n} and {n + 1} are {2 * n + 1}; " * 3}) for n in range(200)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    data = {
        "output": str(folder / "data"),
        "sources": {"sums": {"paths": [str(folder / "texts.jsonl")]}},
        "tokenizer": {"vocab_size": 300},
        "validation_share": 0.1,
    }
    run = {
        "run": str(folder / "run"),
        "imports": [MODULE],
        "model": {**shape, "dim": 32, "num_layers": 2, "max_seq_len": 64},
        "data": {"sources": [{"path": str(folder / "data"), "max_epochs": 20}], "seq_len": 32, "attention": "document"},
        "train": {"length": "12 steps", "batch_samples": 8, "precision": "fp32", "log_every": "1 steps"},
        "optim": {"lr": 1e-2, "warmup": "2 steps", "decay": {"kind": "constant"}},
        "checkpoint": {"every": "6 steps", "keep": None},
    }
    for name, values in (("data.yaml", data), ("run.yaml", run)):
        (folder / name).write_text(yaml.safe_dump(values))
    return folder / "data.yaml", folder / "run.yaml"


@each_shape
def test_the_whole_way(shape: dict[str, Any], franca, records, tmp_path: Path) -> None:
    data, run_file = write_files(tmp_path, shape)
    run, again, exported = tmp_path / "run", tmp_path / "again", tmp_path / "hf"
    franca("prepare", data)
    assert "none found" in franca("plan", run_file)
    franca("train", run_file)
    assert [checkpoint.step for checkpoint in Store(run / "checkpoints").committed()] == [6, 12]
    franca("train", run, "train.length=18 steps")  # goes on
    franca("train", run_file, "train.length=18 steps", f"run={again}")  # without a stop
    assert records(run) == records(again)
    losses = [record["loss"] for record in records(run)]
    assert len(losses) == 18
    assert losses[-1] < 0.9 * losses[0], losses

    model, tokenizer, _ = open_model(run, CPU, "fp32")
    without_stop = open_model(again, CPU, "fp32")[0].state_dict()
    assert all(torch.equal(tensor, without_stop[name]) for name, tensor in model.state_dict().items())

    said = franca("sample", run, "--imports", MODULE, "-p", PROMPT, "temperature=0", "max_new_tokens=12")
    assert said.startswith(PROMPT)
    franca("export", run, exported, "--imports", MODULE)
    text = "7 and 8 are 15; 9 and 10 are"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    command = [sys.executable, "-c", ELSEWHERE, str(exported), text]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    theirs = json.loads(result.stdout)
    tokens = torch.from_numpy(tokenizer.encode([text])[0]).long()[None]
    assert theirs["tokens"] == tokens.tolist()
    with torch.no_grad():
        same(torch.tensor(theirs["logits"]), model(tokens))
    assert theirs["answer"].strip() == said.strip().removesuffix("---").strip()
