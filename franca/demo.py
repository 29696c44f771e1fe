"""`franca demo`: the whole main job on text that every machine has, as a script of the commands that a user would type.

The text is the standard library of the Python that runs it. Nothing is downloaded. What it refuses to know: how any command
does its work.
"""

import gzip
import json
import lzma
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import yaml

from franca.core.errors import EXIT_RESUMABLE, ConfigError
from franca.core.progress import clock_text
from franca.core.run import RunFolder, current_metrics
from franca.data.sources import CorpusConfig, list_files, read_documents
from franca.data.tokenize import is_held_out

PROMPTS = ("def __init__(self", "import ", "    for line in ")
VALIDATION_SHARE = 0.03
PLACES = """\
  data.yaml, run.yaml    the settings: point them at your own text and run the commands below again
  data/                  tokenizer.json, token shards, manifest.json
  run/                   config.yaml, metrics.jsonl, events.jsonl, train.log, checkpoints/
  hf/                    the model for transformers: AutoModelForCausalLM.from_pretrained(...)"""


def main(folder: Path, steps: int) -> int:
    """Run the demonstration in a new folder. Returns the exit code."""
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; give another folder: franca demo <folder>, or remove it")
    if steps < 4:
        raise ConfigError(f"--steps: is {steps}; it must be at least 4, so that half-way is in the middle")
    begin = time.monotonic()
    folder.mkdir(parents=True)
    data, run = write_settings(folder, steps)
    script = Script(folder)
    script.run("Text to tokens: a tokenizer, shards, and a held-out set chosen by hash", "prepare", str(data))
    script.run("What will it take?", "plan", str(run))
    script.train_and_stop("Training; half-way, the run gets a real SIGTERM, saves and stops", run, steps // 2)
    script.run("The same command again: it resumes where it stopped", "train", str(run))
    script.run("Where does it stand?", "status", str(folder / "run"))
    compare_compression(folder)
    prompts = [word for prompt in PROMPTS for word in ("-p", prompt)]
    settings = ("max_new_tokens=48", "temperature=0.7", "top_p=0.95")
    script.run("Let it speak", "sample", str(folder / "run"), *prompts, *settings)
    script.run("A Hugging Face folder for everyone else", "export", str(folder / "run"), str(folder / "hf"))
    print(f"\n=== Done in {clock_text(time.monotonic() - begin)}. Everything lies in {folder}:\n{PLACES}")
    print("\n  ".join(["\nThe commands were:", *script.shown]))
    return 0


def corpus() -> CorpusConfig:
    """The standard library without its tests and without what was installed later."""
    library = sysconfig.get_path("stdlib")
    left_out = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3")
    exclude = tuple(f"{library}/{depth}{name}/**" for name in left_out for depth in ("", "*/", "*/*/"))
    return CorpusConfig(paths=(f"{library}/**/*.py",), exclude=exclude)


def write_settings(folder: Path, steps: int) -> tuple[Path, Path]:
    """The two files that say everything: what to prepare, what to train."""
    stdlib = corpus()
    prepare = {
        "output": str(folder / "data"),
        "sources": {"stdlib": {"paths": list(stdlib.paths), "exclude": list(stdlib.exclude)}},
        "tokenizer": {"vocab_size": 4096},
        "validation_share": VALIDATION_SHARE,
        "on_bad_document": "skip",  # empty __init__.py files
    }
    decay = {"kind": "cosine", "final_ratio": 0.02}
    train = {
        "run": str(folder / "run"),
        "model": {
            "kind": "llama",
            "dim": 192,
            "num_layers": 4,
            "num_heads": 3,
            "max_seq_len": 256,
            "tied": True,
            "init_std": 0.06,
        },
        "data": {"sources": [{"path": str(folder / "data")}], "seq_len": 256},
        "train": {"length": f"{steps} steps", "batch_samples": 4, "precision": "fp32"},
        "optim": {"lr": 5e-3, "beta2": 0.98, "warmup": f"{max(1, steps // 20)} steps", "decay": decay},
        "checkpoint": {"every": f"{max(2, steps // 4)} steps"},
    }
    data, run = folder / "data.yaml", folder / "run.yaml"
    data.write_text(yaml.safe_dump(prepare, sort_keys=False))
    run.write_text(yaml.safe_dump(train, sort_keys=False))
    return data, run


class Script:
    """Runs commands one after another, shows each before it runs, and remembers them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shown: list[str] = []

    def announce(self, title: str, words: tuple[str, ...]) -> list[str]:
        self.shown.append(shlex.join(["franca", *words]))
        print(f"\n--- {title}\n$ {self.shown[-1]}", flush=True)
        return [sys.executable, "-m", "franca", *words]

    def run(self, title: str, *words: str) -> None:
        code = subprocess.run(self.announce(title, words)).returncode
        if code:
            raise SystemExit(f"the demonstration ended early: exit code {code}; look at {self.folder}")

    def train_and_stop(self, title: str, run: Path, step: int) -> None:
        process = subprocess.Popen(self.announce(title, ("train", str(run))))
        metrics = RunFolder(self.folder / "run").metrics
        while process.poll() is None and not any(record["step"] >= step for record in current_metrics(metrics)):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        if process.wait() != EXIT_RESUMABLE:
            raise SystemExit(f"the run did not stop in good order: exit code {process.returncode}, expected {EXIT_RESUMABLE}")


def compare_compression(folder: Path) -> None:
    """Print the model's bits per byte on the held-out text beside those of gzip and xz on the same bytes."""
    files = list_files("stdlib", corpus())
    texts = [text for file in files for text in read_documents(file, corpus(), on_bad=lambda reason: None)]
    held_out = "".join(text for text in texts if is_held_out(text, VALIDATION_SHARE)).encode()
    manifest = json.loads((folder / "data" / "manifest.json").read_text())
    if len(held_out) != manifest["sources"]["stdlib"]["validation"]["bytes"]:
        raise SystemExit("the standard library changed while the demonstration ran; run it again")
    measured = current_metrics(RunFolder(folder / "run").validation_metrics)[-1]["bits_per_byte"]
    print("\n--- How well does it know text that it never saw? Bits per byte, beside compressors on the same bytes")
    print(f"  {len(held_out):,} bytes held out\n  franca   {measured:.3f} bits per byte")
    packed = {"gzip -9": gzip.compress(held_out, 9), "xz -9e": lzma.compress(held_out, preset=9 | lzma.PRESET_EXTREME)}
    for name, content in packed.items():
        print(f"  {name:8} {8 * len(content) / len(held_out):.3f} bits per byte")
