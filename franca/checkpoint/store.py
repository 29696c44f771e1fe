"""Checkpoint folders: what is committed, what is kept, what is swept away. No torch.

A checkpoint is written under a hidden name and exists from the moment of its rename. Readers see nothing else.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from franca.core.errors import ConfigError
from franca.core.run import sync_folder, write_atomically

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A committed folder. `params.json` says what model it is, `meta.json` where the run stood and what its files are."""

    path: Path

    @property
    def step(self) -> int:
        return int(self.path.name)

    @cached_property
    def meta(self) -> dict[str, Any]:
        values = read_json(self.path / "meta.json")
        if values.get("format") != FORMAT:
            raise ConfigError(f"{self.path}: has checkpoint format {values.get('format')!r}; this franca reads {FORMAT}")
        return values

    @cached_property
    def params(self) -> dict[str, Any]:
        return read_json(self.path / "params.json")

    def damage(self, part: int = 0, parts: int = 1) -> list[str]:
        """What differs from `meta.json`: a missing file, a size, a hash. Checks every `parts`-th file from `part` on."""
        try:
            meta = self.meta
        except ConfigError as error:
            return [str(error)]
        if meta.get("checksum") != _checksum(meta):
            return ["meta.json has changed since it was written"]
        found = []
        for name, facts in sorted(meta["files"].items())[part::parts]:
            file = self.path / name
            if not file.is_file():
                found.append(f"{name} is missing")
            elif file.stat().st_size != facts["bytes"]:
                found.append(f"{name} has {file.stat().st_size} bytes instead of {facts['bytes']}")
            elif sha256(file) != facts["sha256"]:
                found.append(f"{name} has changed since it was written")
        return found


def read_json(path: Path) -> dict[str, Any]:
    """Raises ConfigError when there is no such object."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(meta: dict[str, Any]) -> str:
    """Of everything else that `meta.json` says."""
    rest = {name: value for name, value in meta.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """The checkpoints of one run."""

    root: Path

    def folder(self, step: int) -> Path:
        return self.root / f"{step:010d}"

    def partial(self, step: int) -> Path:
        return self.root / f".{step:010d}.partial"

    def sentinel(self, step: int) -> Path:
        """An empty file that tells programs outside (rsync, evaluation) that a checkpoint is whole."""
        return self.root / f"checkpoint_{step:010d}.done"

    def committed(self) -> list[Checkpoint]:
        """All committed checkpoints, oldest first."""
        steps = [int(meta.parent.name) for meta in self.root.glob("*/meta.json") if meta.parent.name.isdecimal()]
        return [Checkpoint(self.folder(step)) for step in sorted(steps)]

    def begin(self, step: int) -> Path:
        """An empty folder to write a checkpoint to; invisible to readers."""
        partial = self.partial(step)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def commit(self, step: int, meta: dict[str, Any]) -> Checkpoint:
        """Make what was written under `begin(step)` the checkpoint of that step: meta.json, rename, sentinel.

        Checkpoints of later steps go: the run fell back from them because they are damaged, and they would pass for the newest.
        """
        partial, final = self.partial(step), self.folder(step)
        values = {"format": FORMAT, "step": step, **meta}
        write_atomically(partial / "meta.json", json.dumps({**values, "checksum": _checksum(values)}, indent=2))
        if final.exists():  # a damaged one that the run fell back from, and has now reached again
            self._sweep(final)
        partial.rename(final)
        sync_folder(self.root)
        self.sentinel(step).touch()
        for checkpoint in self.committed():
            if checkpoint.step > step:
                self._sweep(checkpoint.path)
        return Checkpoint(final)

    def retain(self, keep: int | None) -> list[int]:
        """Delete all but the newest `keep` checkpoints (None: keep all); returns the deleted steps."""
        doomed = self.committed()[: -max(1, keep)] if keep is not None else []
        for checkpoint in doomed:
            self._sweep(checkpoint.path)
        return [checkpoint.step for checkpoint in doomed]

    def _sweep(self, folder: Path) -> None:
        self.sentinel(int(folder.name)).unlink(missing_ok=True)
        marked = self.root / f".{folder.name}.deleting"
        folder.rename(marked)
        shutil.rmtree(marked, ignore_errors=True)

    def tidy(self) -> None:
        """At the start of an attempt: remove what a killed one left half-written or half-deleted, mend sentinels."""
        self.root.mkdir(parents=True, exist_ok=True)
        for path in (*self.root.glob(".*.partial"), *self.root.glob(".*.deleting")):
            shutil.rmtree(path, ignore_errors=True)
        sentinels = {self.sentinel(checkpoint.step) for checkpoint in self.committed()}
        for path in self.root.glob("checkpoint_*.done"):
            if path not in sentinels and path.stem.removeprefix("checkpoint_").isdecimal():
                path.unlink()
        for path in sentinels:
            path.touch()


def find(path: Path, whole: bool = False) -> Checkpoint:
    """The checkpoint that a user means by its folder, or by its run's: then the newest; `whole`: with every byte looked at.

    Raises ConfigError that says what there is instead.
    """
    if (path / "meta.json").is_file() and (path / "params.json").is_file():
        checkpoint = Checkpoint(path)
    elif committed := Store(path / "checkpoints").committed():
        checkpoint = committed[-1]
    elif (path / "checkpoints").is_dir():
        raise ConfigError(f"{path}: has no committed checkpoint yet")
    elif path.name.startswith(".") or path.name.isdecimal():
        raise ConfigError(f"{path}: is no committed checkpoint (it has no meta.json). Choose another of {path.parent}")
    else:
        raise ConfigError(f"{path}: is neither a run nor a checkpoint folder")
    if whole and (damage := checkpoint.damage()):
        others = [other.path for other in Store(checkpoint.path.parent).committed() if other.path.name != checkpoint.path.name]
        advice = f"Use {others[-1]}." if others else "There is no other one beside it."
        raise ConfigError(f"{checkpoint.path}: is damaged: {'; '.join(damage)}. {advice}")
    return checkpoint
