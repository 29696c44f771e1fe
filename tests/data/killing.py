"""Real commands killed at random moments, and run again: a helper of tests, and a script for many kills.

    python tests/data/killing.py prepare 30 [SEED]      python tests/data/killing.py shuffle 30 [SEED]

After the last run the bytes must be those of a run that nobody disturbed, no other file may lie there, and what was finished
at a kill must be as it was then: the same inode, the same time of change.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from preparing import TEXTS, contents, is_whole

from franca.data.tokenizer import Tokenizer

STDLIB = Path(os.__file__).parent
DRIVER = """
import sys
from franca.__main__ import main
from franca.data import prepare
prepare.UNIT_BYTES = 150_000
sys.argv = ["franca", *sys.argv[1:]]
main()
"""


def start(*words):
    """A command of franca in a process group of its own; its stderr ends when the last process of it has gone."""
    command = [sys.executable, "-c", DRIVER, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def gone(process, what):
    """What a command said, when all its processes have ended; workers that stay fail the test."""
    try:
        return process.communicate(timeout=20)[1].decode()
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise AssertionError(f"{what}: its workers do not go away") from None


class Prepare:
    """`franca prepare` of some of the standard library, in about ten units."""

    command = ("prepare",)

    def __init__(self, folder):
        self.folder = folder
        (folder / "tokenizer.json").write_text(Tokenizer.train(iter(TEXTS), 300).json, encoding="utf-8")

    def settings(self, output):
        corpus = {"paths": [str(STDLIB / "[a-f]*.py")], "documents": "paragraph"}
        values = {"sources": {"stdlib": corpus}, "shard_tokens": 100_000, "validation_share": 0.05}
        return values | {"tokenizer": {"path": str(self.folder / "tokenizer.json")}, "output": str(output)}

    def finished(self, output):
        """What must not be made again: the records of units."""
        return [*output.glob("units/*.json")]

    def result(self, output):
        assert is_whole(output)
        return contents(output)

    def check(self, output):
        is_whole(output)  # or says that it is not


class Shuffle:
    """`franca prepare shuffle` of a few megabytes in many batches; the work folder is kept, to be looked at."""

    command = ("prepare", "shuffle")

    def __init__(self, folder):
        (folder / "in").mkdir()
        rng = random.Random(1)
        for number in range(4):
            rows = ("x" * rng.randrange(400) for _ in range(5000 * (1 + number % 2)))
            lines = [json.dumps({"id": f"{number}-{row}", "text": text}) + "\n" for row, text in enumerate(rows)]
            (folder / "in" / f"{number}.jsonl").write_text("".join(lines))
        self.folder = folder

    def settings(self, output):
        places = {"final_dir": str(output / "final"), "tmp_dir": str(output / "tmp"), "clear_tmp": False}
        values = {"name": "mine", "paths": [str(self.folder / "in" / "*")], "num_chunks": 4, "validation_share": 0.02}
        return values | {"memory": "3 MB"} | places

    def finished(self, output):
        """Records of inputs and chunks, and the spills and chunks that have one."""
        records = [path for path in output.glob("tmp/*/*.json") if path.name != "plan.json"]
        files = [path.with_suffix(kind) for path in records for kind in (".spill", ".chunk")]
        return [*records, *filter(Path.exists, files)]

    def result(self, output):
        """Chunks, the manifest without its settings, and the names in the work folder, where batches depend on memory."""
        files = {path.name: path.read_bytes() for path in (output / "final").iterdir()}
        manifest = json.loads(files["shuffle.json"])
        del manifest["settings"]
        names = sorted(str(path.relative_to(output)) for path in output.rglob("*"))
        return files | {"shuffle.json": manifest, "names": names}

    def check(self, output):
        if (output / "final" / "shuffle.json").exists():
            assert self.result(output)


def kill_often(job, folder, num_kills, seed):
    """Kill `num_kills` runs of a job, of one worker and of two, the group or the parent alone; returns what was seen.

    Every run goes on where the killed one was. A third of them is killed a second time.
    """
    rng, seen = random.Random(seed), {"killed": 0, "with something finished": 0, "had ended": 0, "twice": 0}

    def run(output, delay, workers):
        """Start it, and kill it so many seconds after it began, if at all; the last is how long a whole run took."""
        path = output.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(job.settings(output)))
        process, group = start(*job.command, path, f"workers={workers}"), rng.random() < 0.5
        what = f"seed {seed}, {output.name}, workers={workers}, {'group' if group else 'parent'} killed after {delay} s"
        while not output.exists():
            assert process.poll() in (None, 0), f"{what}: {gone(process, what)}"
            time.sleep(0.002)
        begun = time.monotonic()
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
            return process, what, 0.0
        said = gone(process, what)
        assert process.returncode == 0, f"{what}: {said}"
        return process, what, time.monotonic() - begun

    whole_s = {workers: run(folder / f"whole{workers}", None, workers)[2] for workers in (1, 2)}
    expected = job.result(folder / "whole1")
    number = 0
    while seen["killed"] < num_kills:
        number += 1
        assert number < 3 * num_kills + 3, f"seed {seed}: most runs end before they are killed: {seen}"
        output, before, left = folder / f"out{number}", {}, list[tuple[subprocess.Popen[bytes], str]]()
        for _ in range(1 + (rng.random() < 1 / 3)):
            workers = rng.choice([1, 2])
            process, what, _ = run(output, rng.uniform(0, 1) * whole_s[workers], workers)
            killed = process.returncode != 0
            stats = {path: path.stat() for path in job.finished(output)}
            before |= {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in stats.items()}
            seen["killed" if killed else "had ended"] += 1
            seen["with something finished"] += killed and bool(stats)
            job.check(output)
            left.append((process, what))
        seen["twice"] += len(left) == 2
        run(output, None, rng.choice([1, 2]))  # at once, whether the workers of the killed have gone or not
        for process, what in left:
            gone(process, what)
        what = "; then ".join(what for _, what in left)
        found = job.result(output)
        assert sorted(found) == sorted(expected), what
        assert found == expected, what
        for path, facts in before.items():
            stat = path.stat()
            assert (stat.st_ino, stat.st_mtime_ns) == facts, f"{what}: {path} was made again"
    return seen


if __name__ == "__main__":
    name, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0
    with tempfile.TemporaryDirectory() as folder:
        job = {"prepare": Prepare, "shuffle": Shuffle}[name](Path(folder))
        print(
            f"seed {seed}: {kill_often(job, Path(folder), count, seed)}: the same bytes, nothing made twice, nothing left over"
        )
