"""Does one thing to a store again and again, each time on a fresh copy and killed one file-system operation later.

    python die_at.py TEMPLATE OUTPUT commit|replace|retain

Makes OUTPUT/000 (killed before the first operation), OUTPUT/001, ... up to the first copy on which the work was finished.
"""

import os
import shutil
import sys
from pathlib import Path

from franca.checkpoint.store import Store, sha256

# What changes the disk, as Python itself reports it, just before it happens. Plain reads are among the opens; a death
# before a read is one case more.
CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.utime", "os.truncate", "os.link", "os.symlink"}
KILLED = 9


def act(action: str, root: Path) -> None:
    store = Store(root)
    if action == "retain":
        store.retain(1)
        return
    step = 2 if action == "replace" else 3
    folder = store.begin(step)
    (folder / "weights").write_bytes(b"new" * 100)
    (folder / "more").write_bytes(b"too")
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in folder.iterdir()}
    store.commit(step, {"files": files})


def die_after(count: int, action: str, root: Path) -> bool:
    """In a child process; whether it was killed before it had finished."""
    child = os.fork()
    if child == 0:
        left = count

        def hook(event: str, arguments: object) -> None:
            nonlocal left
            if event in CHANGES:
                if left == 0:
                    os._exit(KILLED)
                left -= 1

        sys.addaudithook(hook)
        act(action, root)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (0, KILLED):
        raise SystemExit(f"{action} failed after {count} operations: exit code {code}")
    return code == KILLED


def main(template: Path, output: Path, action: str) -> None:
    count = 0
    while True:
        root = output / f"{count:03d}"
        shutil.copytree(template, root)
        if not die_after(count, action, root):
            return
        count += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
