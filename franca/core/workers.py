"""Worker processes that end when the process that they work for ends, however it ends."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a worker: from now on, die with the parent. Nobody waits for this work then, and a new attempt may be doing it."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
