"""Text to tokens: `franca prepare` against datatrove's MegatronDocumentTokenizer, one core each, on the same text with the same
tokenizer. The token bytes must be equal.
"""

import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import orjson

from benchmarks.table import Row, say
from franca.data.tokenizer import END_OF_TEXT, Tokenizer

CORPUS_BYTES, VOCAB_SIZE, ROUNDS, COPIES = 70_000_000, 32_768, 2, 48
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt", ".html", ".json", ".c", ".h")


def rows(root: Path) -> list[Row]:
    folder = root / "prepare"
    (folder / "text").mkdir(parents=True)
    corpus, tokenizer = folder / "text" / "00.jsonl", folder / "tokenizer.json"
    texts = _write_corpus(corpus)
    tokenizer.write_text(Tokenizer.train(iter(texts[::4]), VOCAB_SIZE).json)
    speeds: dict[str, list[float]] = {"reference": [], "fast": [], "datatrove": []}
    tokens = bytes_of = None
    for number in range(ROUNDS):
        for name, values in speeds.items():
            output = folder / f"{name}{number}"
            seconds = _run(name, corpus, tokenizer, output)
            shard = next(output.rglob("*.bin"))
            content = shard.read_bytes()
            assert bytes_of in (None, content), f"{name} wrote other tokens than the run before it"
            bytes_of, tokens = content, len(content) // 2
            values.append(tokens / seconds)
            say(f"  {name}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds / 1e6:.2f}M tokens/s, the same bytes")
    text = {name: f"{statistics.median(v) / 1e6:.2f}M (best {max(v) / 1e6:.2f}M) tokens/s" for name, v in speeds.items()}
    ratios = {n: statistics.median(a / b for a, b in zip(speeds[n], speeds["datatrove"], strict=True)) for n in speeds}
    fast, size = statistics.median(speeds["fast"]), f"{corpus.stat().st_size / 1e6:.0f} MB"
    meets = {"reference": ratios["reference"] >= 1.2, "fast": ratios["fast"] >= 8 and fast >= 1e7}
    asked = {"reference": ">= 1.20", "fast": ">= 8.00, >= 10M"}
    result = [
        Row(f"prepare, {size}, {name} tokenizer", text[name], text["datatrove"], ratios[name], asked[name], meets[name])
        for name in asked
    ]
    return [*result, _two(folder, corpus, tokenizer)]


def _two(folder: Path, corpus: Path, tokenizer: Path) -> Row:
    """One process on one core against two processes on two, on the same files."""
    for number in range(1, COPIES):
        os.link(corpus, corpus.with_name(f"{number:02d}.jsonl"))
    ratios, texts = [], []
    for number in range(ROUNDS):
        one, two = (_run(f"workers={n}", corpus.parent, tokenizer, folder / f"{n}-{number}") for n in (1, 2))
        say(f"  {COPIES} files: {one:.1f} s in one process, {two:.1f} s in two")
        ratios.append(one / two)
        texts.append((one, two))
    one, two = min(texts)
    ratio = statistics.median(ratios)
    return Row(
        f"prepare, {COPIES} files, 2 processes", f"{two:.1f} s", f"1 process {one:.1f} s", ratio, ">= 1.80", ratio >= 1.8
    )


def _write_corpus(path: Path) -> list[str]:
    """Mixed real text that every machine with this project has: code and documents of installed packages."""
    texts, size = [], 0
    for root in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        for file in sorted(Path(root).rglob("*")):
            if file.suffix in SUFFIXES and file.is_file() and 200 < file.stat().st_size < 300_000 and size < CORPUS_BYTES:
                text = file.read_text(encoding="utf-8", errors="ignore")
                if "<|" not in text and text.strip():  # datatrove takes a written special token for the real one
                    texts.append(text)
                    size += len(text.encode())
    path.write_bytes(b"".join(orjson.dumps({"text": text}) + b"\n" for text in texts))
    say(f"{len(texts):,} documents, {size / 1e6:.0f} MB; training a tokenizer of {VOCAB_SIZE:,} tokens")
    return texts


def _run(name: str, text: Path, tokenizer: Path, output: Path) -> float:
    """Seconds of one preparation in a process of its own, without its imports; on one core unless several are asked for."""
    threads = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "benchmarks.prepare", name, str(text), str(tokenizer), str(output)]
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, check=True, text=True)
    return float(done.stdout.splitlines()[-1])


def _measure(name: str, text: Path, tokenizer: Path, output: Path) -> float:
    if name != "workers=2":
        os.sched_setaffinity(0, {0})
    if name == "datatrove":
        from datatrove.executor.local import LocalPipelineExecutor
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.tokens import MegatronDocumentTokenizer

        steps = [
            JsonlReader(str(text.parent), glob_pattern=text.name),
            MegatronDocumentTokenizer(str(output), "datatrove", tokenizer_name_or_path=str(tokenizer), eos_token=END_OF_TEXT),
        ]
        begin = time.perf_counter()
        for step in [LocalPipelineExecutor(steps, tasks=1, logging_dir=str(output / "logs"))]:
            step.run()
        return time.perf_counter() - begin
    from franca.core.config import check
    from franca.data.prepare import PrepareConfig, prepare

    if name == "reference":
        sys.modules["fastokens"] = None  # type: ignore[assignment]
    values = {
        "output": str(output),
        "sources": {"text": {"paths": [str(text) if text.is_file() else f"{text}/*.jsonl"]}},
        "tokenizer": {"path": str(tokenizer)},
        "validation_share": 0.0,
        "workers": int(name.partition("=")[2] or 1),
    }
    settings = check(PrepareConfig, json.loads(json.dumps(values)), "benchmark")
    begin = time.perf_counter()
    prepare(settings)
    return time.perf_counter() - begin


if __name__ == "__main__":
    name, *paths = sys.argv[1:]
    print(_measure(name, *map(Path, paths)))
