"""The run folder: every path in it, atomic writes, append-only records, the code snapshot, the environment record.

What it refuses to know: what the records mean. Files get the user's umask; a reader never sees half a file.
"""

import fcntl
import hashlib
import mmap
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import orjson

from franca.core.errors import ConfigError


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that gets its name when all of it is on the disk: a crash or a full disk leaves what was there before."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb", 1 << 18) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        if error.strerror and str(error.filename) in ("None", str(partial)):
            error.filename = str(path)  # which a failed write does not name
        raise
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Make `content` the whole of a file, or leave it as it was."""
    with new_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def lock(path: Path, refusal: str, wait_s: float = 0.0) -> Iterator[None]:
    """Keep other processes out for as long as this lasts: for them it is a ConfigError, when it lasts `wait_s` longer."""
    deadline = time.monotonic() + wait_s
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise ConfigError(refusal) from None
                time.sleep(0.1)
            except OSError:
                break  # some network file systems have no locks
        yield


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line. A torn last line, left by a crash, is cut off first: it never was a record."""
    line = orjson.dumps(dict(record), option=orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if size := file.seek(0, os.SEEK_END):
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as lines:
                whole = lines.rfind(b"\n") + 1
            if whole < size:
                file.truncate(whole)
        file.write(line)


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole JSON line of a record file, in order; a missing file has none, a torn last line is left out."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            try:
                yield orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise ConfigError(f"{path}:{number}: is not a JSON record ({error}). Remove or mend that line.") from None


def current_metrics(path: Path) -> list[dict[str, Any]]:
    """The metric records that count: those that a later rollback superseded are left out, every step appears once."""
    kept: list[dict[str, Any]] = []
    for record in read_records(path):
        if record.get("kind") == "rollback":
            kept = [earlier for earlier in kept if earlier["step"] <= record["to_step"]]
        else:
            kept.append(record)
    return kept


class RunFolder:
    """Every path in a run folder, and its log of logs (`events.jsonl`)."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.base_config = self.root / "base_config.yaml"
        self.config = self.root / "config.yaml"
        self.code = self.root / "code"
        self.environment = self.root / "environment.json"
        self.log = self.root / "train.log"
        self.metrics = self.root / "metrics.jsonl"
        self.validation_metrics = self.root / "metrics.validation.jsonl"
        self.events = self.root / "events.jsonl"
        self.tensorboard = self.root / "tensorboard"
        self.checkpoints = self.root / "checkpoints"
        self.logs = self.root / "logs"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder, and keep others out of it for as long as this attempt lives: for them it is a ConfigError."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run: {self.root} cannot be made ({error.strerror})") from None
        advice = "Wait for it, or use run=..."
        with lock(self.root / ".lock", f"{self.root}: another process is training here. {advice}"):
            yield

    def event(self, kind: str, attempt: int, **facts: Any) -> None:
        """Add a line to the log of logs. Times are seconds since the epoch (UTC)."""
        append_record(self.events, {"time": time.time(), "event": kind, "attempt": attempt, **facts})

    def next_attempt(self) -> int:
        """The number of the attempt that starts now: 1 for the first."""
        return 1 + max((record["attempt"] for record in read_records(self.events)), default=0)

    def snapshot_code(self, package: Path, modules: Iterable[Path] = ()) -> str:
        """Copy the package's source and other modules into `code/<fingerprint>/` once, with git's commit and uncommitted diff.

        Returns the fingerprint of the sources, so that an attempt can name the code that it ran.
        """
        files = sorted(file for file in package.rglob("*") if file.suffix in (".py", ".j2") and file.is_file())
        digest = hashlib.sha256()
        copies = {f"{package.name}/{file.relative_to(package)}": file for file in files} | {m.name: m for m in modules}
        for name, file in copies.items():
            digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
        fingerprint = digest.hexdigest()[:12]
        target = self.code / fingerprint
        if target.exists():
            return fingerprint
        partial = self.code / f".{fingerprint}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        for name, file in copies.items():
            copy = partial / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(file.read_bytes())
        tracked = _git(package, "ls-files", "__init__.py")  # nothing for a package that only lies inside a foreign checkout
        for name, words in (("git_commit.txt", ["rev-parse", "HEAD"]), ("git.diff", ["diff", "HEAD", "--", "."])):
            if tracked and (output := _git(package, *words)):
                (partial / name).write_text(output)
        os.rename(partial, target)
        return fingerprint

    def write_environment(self, facts: Mapping[str, Any]) -> None:
        """Record where this attempt runs. `facts` comes from an allow-list: the whole environment is never written."""
        versions = {}
        for name in ("torch", "numpy", "tokenizers", "safetensors", "transformers", "pydantic", "omegaconf"):
            with suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        record = orjson.dumps({**facts, "packages": versions}, option=orjson.OPT_INDENT_2)
        write_atomically(self.environment, record)


def _git(folder: Path, *words: str) -> str:
    """What git prints, or nothing where there is no git."""
    try:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
