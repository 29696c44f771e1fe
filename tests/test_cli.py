"""The command line as a user meets it: quick to start, and one clear message with exit code 78 for wrong input."""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from franca.__main__ import main

WITHOUT_TORCH = """
import sys
from franca.__main__ import main
sys.argv = ["franca", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
assert "torch" not in sys.modules, "torch was imported"
"""


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["launch", "--help"], ["train", "--help"], ["status", "RUN"]])
def test_a_login_node_needs_no_torch(words: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("train: {length: 10 steps}")
    words = [str(run) if word == "RUN" else word for word in words]
    result = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.fixture
def franca(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, standard output, standard error)."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["franca", *map(str, words)])
        code: int | str | None = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        out, err = capfd.readouterr()
        return int(code or 0), out, err

    return run


def refused(result: tuple[int, str, str], *parts: str) -> None:
    code, out, err = result
    assert code == 78, (code, out, err)
    assert "Traceback" not in err
    message = err + out
    for part in parts:
        assert part in message, message


def test_every_verb_shows_an_example(franca) -> None:
    for verb in ("demo", "prepare", "plan", "train", "launch", "status", "sample", "export", "import"):
        code, out, _ = franca(verb, "--help")
        assert code == 0
        assert f"Example: franca {verb}" in out


def test_wrong_settings_are_told_all_at_once(franca, run_file) -> None:
    path = run_file(optim={"lrr": 1.0, "beta1": "high"}, train={"batch_samples": 2.5})
    refused(franca("train", path), "3 problems", "optim.lrr", "did you mean 'lr'", "optim.beta1", "train.batch_samples", "2.5")
    refused(franca("plan", path), "3 problems", "optim.lrr")


def test_wrong_kind_and_wrong_word(franca, run_file) -> None:
    refused(franca("train", run_file(model={"kind": "lama"})), "model.kind", "lama", "llama")
    refused(franca("train", run_file(), "optim.lr"), "optim.lr", "section.key=value")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train.length=100 minutes of fun"], ["train.length", "2000 steps"]),
        (["train.length=20 min"], ["train.length", "wall time"]),
        (["train.length=9 epochs"], ["max_epochs", "tokens are missing"]),
        (["data.seq_len=65"], ["data.seq_len", "max_seq_len 64"]),
        (["model.num_heads=5"], ["model", "5 heads"]),
        (["model.vocab_size=100"], ["model.vocab_size", "512"]),
        (["optim.warmup=50 steps"], ["optim.warmup", "shorten"]),
        (["data.sources=[]"], ["data.sources: the sources [] hold no tokens"]),
        (["parallel.dp_shard=3"], ["dp_shard 3 takes 3 rank(s)", "there are 1"]),
    ],
)
def test_a_run_that_cannot_finish_does_not_start(franca, run_file, words: list[str], parts: list[str]) -> None:
    path = run_file()
    refused(franca("train", path, *words), *parts)
    refused(franca("plan", path, *words), *parts)
    assert not Path(yaml.safe_load(path.read_text())["run"]).exists()


def test_a_mesh_that_is_not_the_number_of_ranks(franca, run_file) -> None:
    refused(franca("plan", run_file(), "--ranks", "3", "parallel.tp=2"), "tp 2 takes a multiple of 2", "there are 3")
    code, _, err = franca("launch", run_file(), "--ranks", "3", "parallel.tp=2")
    assert code == 78
    assert err.count("error:") == 1, "reported once, not by every rank"


@pytest.mark.parametrize("words", [["sample", "run"], ["export", "run", "hf"]])
def test_an_unknown_precision_is_wrong_usage(franca, words: list[str]) -> None:
    code, out, err = franca(*words, "--precision", "fp16")
    assert (code, out) == (2, "")
    assert all(part in err for part in ("--precision", "'fp16'", "fp32", "bf16"))


def test_missing_files(franca, run_file, tmp_path: Path) -> None:
    refused(franca("train", tmp_path / "no.yaml"), "no.yaml", "cannot be read")
    refused(franca("status", tmp_path), "no run folder")
    refused(franca("sample", tmp_path, "-p", "x"), str(tmp_path), "neither a run nor a checkpoint")
    refused(franca("export", tmp_path, tmp_path / "hf"), str(tmp_path))
    refused(
        franca("train", run_file(data={"sources": [{"path": str(tmp_path / "none")}]})), "no such dataset", "franca prepare"
    )


def corrupted(dataset: Path, tmp_path: Path, damage: Callable[[Path], None]) -> dict[str, object]:
    copy = tmp_path / "damaged"
    shutil.copytree(dataset, copy)
    damage(copy / "train" / "stdlib")
    return {"sources": [{"path": str(copy)}], "seq_len": 32}


def truncate_bin(folder: Path) -> None:
    path = next(folder.glob("*-000.bin"))
    path.write_bytes(path.read_bytes()[:-100])


def spoil_magic(folder: Path) -> None:
    path = next(folder.glob("*-000.idx"))
    path.write_bytes(b"NONSENSE!" + path.read_bytes()[9:])


@pytest.mark.parametrize(("damage", "parts"), [(truncate_bin, ["-000.bin", "truncated"]), (spoil_magic, ["-000.idx", "magic"])])
def test_damaged_data(franca, run_file, dataset: Path, tmp_path: Path, damage, parts: list[str]) -> None:
    refused(franca("train", run_file(data=corrupted(dataset, tmp_path, damage))), *parts)


def prepare_file(tmp_path: Path, text: bytes, name: str = "docs.jsonl", **settings: object) -> Path:
    (tmp_path / name).write_bytes(text)
    corpus = {"paths": [str(tmp_path / name)]}
    values = {"output": str(tmp_path / "out"), "sources": {"mine": corpus}, "tokenizer": {"vocab_size": 300}, **settings}
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


LINES = b"".join(json.dumps({"text": f"document number {n}"}).encode() + b"\n" for n in range(50))


def test_bad_documents_are_refused_with_their_line_or_counted(franca, tmp_path: Path) -> None:
    path = prepare_file(tmp_path, LINES + b"{not json\n" + LINES)
    refused(franca("prepare", path), "docs.jsonl:51", "not JSON", "on_bad_document: skip")
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert franca("prepare", path, "on_bad_document=skip")[0] == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["sources"]["mine"]["skipped"] == 1
    assert "docs.jsonl:51" in manifest["sources"]["mine"]["first_skipped"][0]


def test_unreadable_documents(franca, tmp_path: Path) -> None:
    refused(franca("prepare", prepare_file(tmp_path, b"")), "docs.jsonl", "empty file")
    refused(
        franca("prepare", prepare_file(tmp_path, gzip.compress(LINES)[:-20], "docs.jsonl.gz")), "docs.jsonl.gz", "truncated"
    )
    refused(franca("prepare", prepare_file(tmp_path, b'{"body": "x"}\n')), "docs.jsonl:1", "'text' or 'content'")
    refused(franca("prepare", prepare_file(tmp_path, b"\xff\xfe", "docs.txt")), "docs.txt", "UTF-8")


def test_a_checkpoint_of_another_shape_or_plan(franca, run_file, launch) -> None:
    path = run_file(train={"length": "4 steps"}, optim={"warmup": "1 steps"})
    assert launch(path).wait() == [0]
    refused(franca("train", path, "model.dim=64"), "another model", "model.layers.0.attention.query.weight")
    refused(franca("train", path, "data.seed=1"), "data plan", "data.seed: 0 -> 1")
