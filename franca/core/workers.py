"""Worker processes that end when the process that they work for ends, however it ends."""

import fcntl
import multiprocessing
import os
import threading
from contextlib import suppress
from pathlib import Path

KILLED = "a worker was killed, perhaps for want of memory. What is finished is kept: run it again, with fewer workers"


def end_with_parent() -> None:
    """In a worker: from now on, die with the parent. Nobody waits for this work then, and a new attempt may be doing it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def join(folder: Path) -> None:
    """In a worker: die with the parent, and show by a lock in `folder` that this has not happened yet."""
    end_with_parent()
    parent = multiprocessing.parent_process()
    with suppress(OSError):  # the file is not made here: the parent may be dead, and its successor have cleared up
        fcntl.flock(os.open(folder / ".workers", os.O_RDWR), fcntl.LOCK_SH)
    if parent is None or not parent.is_alive():
        os._exit(1)


def wait_for_workers(folder: Path) -> None:
    """Wait until those of a killed attempt are dead, which they are about to be."""
    with open(folder / ".workers", "w") as file, suppress(OSError):  # some network file systems have no locks
        fcntl.flock(file, fcntl.LOCK_EX)
