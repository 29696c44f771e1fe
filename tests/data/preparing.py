"""What tests of the preparation share: texts, the whole content of a folder, and preparations that die."""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

from franca.core.errors import ConfigError
from franca.data import prepare as module
from franca.data.indexed import Dataset
from franca.data.tokenizer import END_OF_TEXT

WORDS = Path(json.__file__).read_text(encoding="utf-8").split()
ODD = ["語 ünï\r\n\tcode 🎈", f"a literal {END_OF_TEXT} in the middle", "\ufeffmark", "x", "e\u0301"]
TEXTS = [*ODD, *(f"{number}: " + " ".join(WORDS[number * 3 : number * 3 + 12]) for number in range(195))]

# Forks of a server that never used a tokenizer: a fork of this process would wait for threads that it does not have.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["franca.data.prepare"])


def write_lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def contents(root):
    """Every file and folder under a dataset; of its JSON, what does not depend on where and when it was made."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        found[name] = path.read_bytes() if path.is_file() else None
        if name == "manifest.json":
            found[name] = json.loads(found[name])
            for key in ("output", "workers"):
                del found[name]["settings"][key]
        elif path.suffix == ".json" and path.parent.name == "units":
            found[name] = json.loads(found[name])
            for file in found[name]["files"]:
                del file["stat"]
    return found


def is_whole(root):
    """Whether a folder is a dataset; one that says so and is none fails the test."""
    if not (root / "manifest.json").exists():
        return False
    manifest = Dataset(root).manifest
    assert hashlib.sha256((root / "tokenizer.json").read_bytes()).hexdigest() == manifest["tokenizer"]["sha256"]
    for name, entry in manifest["sources"].items():
        for split in ("train", "validation"):
            for shard, facts in zip(Dataset(root).shards(split, name), entry[split]["shards"], strict=True):
                lengths = shard.idx_path.read_bytes()[34 : 34 + 4 * shard.num_documents]
                assert hashlib.sha256(shard.bin_path.read_bytes() + lengths).hexdigest() == facts["sha256"]
    return True


def _die(moment, settings, unit_bytes):
    left = moment

    def hook(event, arguments):
        nonlocal left
        if (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)) or event in DISK:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    module.UNIT_BYTES = unit_bytes
    os.fsync = lambda file: None  # a kill loses nothing that was written
    sys.addaudithook(hook)
    try:
        module.prepare(settings)
    except ConfigError:
        os._exit(78)
    os._exit(0)


DISK = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def die(moment, settings, unit_bytes):
    """Prepare in a child that dies by SIGKILL before its n-th change of the disk; returns its exit code."""
    child = SERVER.Process(target=_die, args=(moment, settings, unit_bytes))
    child.start()
    child.join()
    return child.exitcode
