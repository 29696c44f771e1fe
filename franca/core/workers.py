"""Worker processes that end when the process that they work for ends, however it ends."""

import fcntl
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from franca.core.errors import ConfigError

KILLED = "a worker was killed, perhaps for want of memory. What is finished is kept: run it again, with fewer workers"
SPAWN = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads


@contextmanager
def pool(
    workers: int, folder: Path, where: Path, start: Callable[..., None] | None = None, *words: Any
) -> Iterator[ProcessPoolExecutor]:
    """Processes that write in `folder`, each begun by `start(*words)`. After an error they end with what they are at.

    Raises ConfigError, which names `where`, when one of them is killed.
    """
    with ProcessPoolExecutor(workers, SPAWN, _join, (folder, start, words)) as processes:
        try:
            yield processes
        except BrokenProcessPool:
            raise ConfigError(f"{where}: {KILLED}") from None
        finally:
            processes.shutdown(cancel_futures=True)


def _join(folder: Path, start: Callable[..., None] | None, words: tuple[Any, ...]) -> None:
    """In a worker: die with the parent, and show by a lock in `folder` that this has not happened yet.

    Nobody waits for this work when the parent is dead, and a new attempt may be doing it.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    with suppress(OSError):  # the file is not made here: the parent may be dead, and its successor have cleared up
        fcntl.flock(os.open(folder / ".workers", os.O_RDWR), fcntl.LOCK_SH)
    if not parent.is_alive():
        os._exit(1)
    if start is not None:
        start(*words)


def wait_for_workers(folder: Path) -> None:
    """Wait until those of a killed attempt are dead, which they are about to be."""
    with open(folder / ".workers", "w") as file, suppress(OSError):  # some network file systems have no locks
        fcntl.flock(file, fcntl.LOCK_EX)
