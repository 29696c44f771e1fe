"""What users, disks and deaths do to a preparation: a dataset comes out, or one message and no dataset."""

import errno
import inspect
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from preparing import TEXTS, contents, is_whole, write_lines
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

import franca.core.run
import franca.data.indexed
from franca.__main__ import main
from franca.core.config import to_dict
from franca.core.errors import ConfigError
from franca.data import executor, tokenize
from franca.data import prepare as module
from franca.data import shuffle as shuffling
from franca.data.indexed import Dataset, ShardWriter, token_dtype
from franca.data.prepare import TokenizerConfig, prepare
from franca.data.shuffle import ShuffleConfig, shuffle
from franca.data.tokenizer import Tokenizer
from franca.data.verify import verify


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command(settings, *verbs)`: the exit code of the command line, and what it said on stderr."""

    def run(settings, *verbs):
        path = tmp_path / "command.yaml"
        path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(settings)))))
        monkeypatch.setattr(sys, "argv", ["franca", "prepare", *verbs, str(path)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().err

    return run


def assert_one_message(result, pattern):
    """Exit code 78, and one line for a person at the end."""
    code, said = result
    assert code == 78, said
    assert said.count("error: ") == 1, said
    assert "Traceback" not in said
    assert re.match(f"error: {pattern}", said.splitlines()[-1]), said


def texts_of(root, split="train", source="mine"):
    """The text of every document of a split, empty ones and special tokens included."""
    tokenizer, texts = Tokenizer.load(root / "tokenizer.json"), []
    for shard in Dataset(root).shards(split, source):
        pieces = np.split(shard.tokens, np.cumsum(shard.document_lengths)[:-1])
        texts += [tokenizer.decode(piece.tolist()) for piece in pieces]
    return texts


END = "<|endoftext|>"


# Bad documents


def parquet(texts):
    """A Parquet file with a text column of these bytes, whatever they are."""
    import pyarrow
    from pyarrow import parquet as writer

    file = io.BytesIO()
    column = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    writer.write_table(pyarrow.table({"text": column}), file)
    return file.getvalue()


GOOD = b'{"text": "good"}\n'
JSON = "; JSON lines are expected: one whole object on every line"
# name of the file, its content, the message, what is kept of it
BAD = {
    "cut JSON": ("a.jsonl", GOOD + b'{"text": "x"\n' + GOOD, rf"a\.jsonl:2: is not JSON \(.*\){JSON}", ["good", "good"]),
    "two on a line": ("a.jsonl", b'{"text": "x"} {"text": "y"}\n' + GOOD, r"a\.jsonl:1: is not JSON", ["good"]),
    "no field": ("a.jsonl", GOOD + b'{"body": "x"}\n', r"a\.jsonl:2: has no text under 'text' or 'content'", ["good"]),
    "a number": ("a.jsonl", b'{"text": 5, "content": "x"}\n' + GOOD, r"a\.jsonl:1: has no text under", ["good"]),
    "null": ("a.jsonl", b'{"text": null}\n' + GOOD, r"a\.jsonl:1: has no text under", ["good"]),
    "no UTF-8 in JSON": ("a.jsonl", GOOD + b'{"text": "\xff"}\n' + GOOD, r"a\.jsonl:2: is not JSON", ["good", "good"]),
    "half a pair": ("a.jsonl", b'{"text": "\\ud800"}\n' + GOOD, r"a\.jsonl:1: is not JSON", ["good"]),
    "a raw NUL": ("a.jsonl", b'{"text": "a\0b"}\n' + GOOD, r"a\.jsonl:1: is not JSON", ["good"]),
    "deep": ("a.jsonl", b'{"text": ' + b"[" * 5000 + b"\n" + GOOD, r"a\.jsonl:1: is not JSON \(.*depth", ["good"]),
    "no UTF-8 in CSV": ("a.csv", b"text\n\xff\ngood\n", r"a\.csv:2: is not UTF-8 text \(b'\\xff'", ["good"]),
    "no UTF-8 late in CSV": (
        "a.csv",
        b"text\n" + b"good\n" * 4000 + b"\xff\n",
        r"a\.csv:4002: is not UTF-8 text",
        ["good"],
    ),
    "a short row": ("a.csv", b"id,text\n1,good\n2\n3,good\n", r"a\.csv:3: has no text in column 'text'", ["good", "good"]),
    "an open quote": ("a.csv", b'text\ngood\n"open\nand so on', r"a\.csv: cannot be read past line 2 \(.*end of", ["good"]),
    "no column": ("a.csv", b"a,b\n1,2\n", r"a\.csv: has no column 'text' or 'content', only a, b", []),
    "no UTF-8 in text": ("a.txt", b"good \xff", r"a\.txt: is not UTF-8 text \(b'\\xff': invalid start byte\)", []),
    "a cut character": ("a.txt", "語".encode()[:2], r"a\.txt: is not UTF-8 text \(b'\\xe8': unexpected end of data\)", []),
    "no UTF-8 in Parquet": ("a.parquet", parquet([b"good", b"\xff"]), r"a\.parquet: cannot be read past row 0 \(", []),
    "an empty file": ("a.jsonl", b"", r"a\.jsonl: is an empty file", []),
    "an empty text": ("a.txt", b"", r"a\.txt: is an empty file", []),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_document_is_one_message_or_is_counted(tmp_path, make, command, name):
    file, content, message, kept = BAD[name]
    (tmp_path / file).write_bytes(content)
    write_lines(tmp_path / "z.jsonl", ["the last"])
    settings = {"validation_share": 0.0}
    result = command(make("[az].*", **settings))
    assert_one_message(result, rf".*/{message}.*\. Mend it, or set on_bad_document: skip to leave such documents out and count")
    assert not is_whole(tmp_path / "out")
    code, said = command(make("[az].*", on_bad_document="skip", **settings))
    assert (code, "Traceback" in said) == (0, False)
    entry = Dataset(tmp_path / "out").manifest["sources"]["mine"]
    assert entry["skipped"] == 1
    assert re.search(message, entry["first_skipped"][0])
    texts = texts_of(tmp_path / "out")
    if "late" in name:
        assert 1000 < len(texts) <= 4001  # the decoder works on blocks: up to one of them is lost before the place
        texts = [*dict.fromkeys(texts)]
    assert texts == [f"{text}{END}" for text in [*kept, "the last"]]
    assert verify(tmp_path / "out")["problems"] == []


def test_where_all_is_bad_there_is_no_dataset(tmp_path, make, command):
    for name in ("a.jsonl", "b.txt", "c.csv"):
        (tmp_path / name).touch()
    for tokenizer, message in (
        ({}, "no training tokens"),
        ({"tokenizer": TokenizerConfig(vocab_size=300)}, "no training text"),
    ):
        assert_one_message(command(make("?.*", on_bad_document="skip", **tokenizer)), rf".*: (there is )?{message}")
        assert not is_whole(tmp_path / "out")


def test_zero_bytes_are_text(tmp_path, make):
    texts = ["\0", "a\0b", "\0\0\0end", "x\0"]
    write_lines(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.csv").write_bytes(b"text\n" + b"".join(f'"{text}"\n'.encode() for text in texts))
    (tmp_path / "c.txt").write_bytes("\n".join(texts).encode())
    (tmp_path / "d.parquet").write_bytes(parquet([text.encode() for text in texts]))
    root = prepare(make("?.*", validation_share=0.0))
    assert texts_of(root) == [f"{text}{END}" for text in [*texts, *texts, "\n".join(texts), *texts]]


def test_an_empty_document_is_counted_and_has_no_token_of_its_own(tmp_path, make):
    backend = Backend.from_str(Tokenizer.train(iter(TEXTS), 300).json)
    backend.add_special_tokens([AddedToken("<s>")])
    backend.save(str(tmp_path / "tokenizer.json"))
    write_lines(tmp_path / "a.jsonl", ["", "one", "", "", "two", ""])
    settings = {"tokenizer": TokenizerConfig(path=str(tmp_path / "tokenizer.json")), "validation_share": 0.0}
    root = prepare(make("a.jsonl", add_bos=True, **settings))
    assert texts_of(root) == ["", f"<s>one{END}", "", "", f"<s>two{END}", ""]
    assert Dataset(root).manifest["sources"]["mine"]["train"]["documents"] == 6
    assert verify(root)["problems"] == []


MEASURED = """
import re, sys
from pathlib import Path
from franca.__main__ import main
try:
    main()
finally:
    print("high", re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_a_long_line_takes_memory_in_proportion(tmp_path, make):
    """Of 200 MB it was 1.4 GB with ASCII, 2.2 GB with wide characters: 7 and 11 times the line."""
    size = 20_000_000
    highest = []
    for number, text in enumerate(["short", ("🎈 of words " * (size // 14))]):
        write_lines(tmp_path / f"{number}.jsonl", ["before", text, "after"])
        settings = json.loads(json.dumps(to_dict(make(f"{number}.jsonl", output=f"out{number}", validation_share=0.0))))
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(settings))
        words = [sys.executable, "-c", MEASURED, "prepare", str(tmp_path / "data.yaml")]
        result = subprocess.run(words, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        highest.append(int(result.stdout.split()[-1]) * 1024)
        assert Dataset(tmp_path / f"out{number}").manifest["sources"]["mine"]["train"]["documents"] == 3
    assert highest[1] - highest[0] < 25 * size, highest


# Ids


def words_of(count, path):
    """A tokenizer of words w0, w1, ... and, as the last of `count` ids, the end of a text."""
    vocabulary = {f"w{number}": number for number in range(count - 1)} | {END: count - 1}
    backend = Backend(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(END)])
    backend.save(str(path))
    return TokenizerConfig(path=str(path))


@pytest.mark.parametrize(("count", "dtype"), [(65_536, np.uint16), (65_537, np.int32)])
def test_the_border_of_two_bytes_is_where_it_should_be(tmp_path, make, count, dtype):
    write_lines(tmp_path / "a.jsonl", [f"w0 w{count - 2} w32768", "w1"])
    root = prepare(make("a.jsonl", tokenizer=words_of(count, tmp_path / "t.json"), validation_share=0.0))
    (shard,) = Dataset(root).shards("train", "mine")
    assert shard.dtype == dtype
    assert shard.bin_path.stat().st_size == 6 * np.dtype(dtype).itemsize
    assert shard.tokens.tolist() == [0, count - 2, 32768, count - 1, 1, count - 1]
    assert Dataset(root).manifest["tokenizer"]["vocab_size"] == count
    assert verify(root)["problems"] == []


@pytest.mark.parametrize(("token", "problem"), [(300, r"holds id 300, but the tokenizer has 300 ids"), (-1, "negative ids")])
def test_an_id_that_the_tokenizer_does_not_have_is_found(tmp_path, make, token, problem):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    root = prepare(make("a.jsonl"))
    (shard,) = Dataset(root).shards("train", "mine")
    tokens, lengths = shard.tokens.astype(np.int32), np.array(shard.document_lengths)
    tokens[5] = token
    writer = ShardWriter(shard.prefix, np.dtype(np.int32))
    writer.add(tokens, lengths)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["sources"]["mine"]["train"]["shards"][0]["sha256"] = writer.commit()
    (root / "manifest.json").write_text(json.dumps(manifest))
    (found,) = verify(root)["problems"]
    assert re.search(problem, found)


def test_what_four_bytes_do_not_hold_is_refused(tmp_path):
    assert token_dtype(2**31) == np.int32
    with pytest.raises(ConfigError, match="its highest id is 2,147,483,648, but ids must be below 2,147,483,648"):
        token_dtype(2**31 + 1)
    writer = ShardWriter(tmp_path / "x", np.dtype(np.uint16))
    with pytest.raises(ConfigError, match="a document of 2,147,483,648 tokens is longer than an index can say"):
        writer.add(np.zeros(3, np.uint16), np.array([3, 2**31]))
    writer.file.close()


# Odd files and folders


def test_what_is_no_file_is_named(tmp_path, make, command):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "a.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert is_whole(prepare(make("*.jsonl")))  # a link to a file is read, a folder is no file
    (tmp_path / "nothing.jsonl").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe.ndjson")
    places = {"final_dir": str(tmp_path / "final"), "tmp_dir": str(tmp_path / "tmp"), "memory": 10**6, "name": "x"}
    for pattern, what in (
        ("*.jsonl", "a link to nothing"),
        ("nothing.jsonl", "a link to nothing"),
        ("pipe*", "no regular file"),
    ):
        message = rf".*(nothing|pipe)\.\w+ is {what} \(1 such of \d\)\. Mend or remove it"
        assert_one_message(command(make(pattern)), rf"sources\.mine\.paths: {message}")
        assert_one_message(command(ShuffleConfig(paths=(str(tmp_path / pattern),), **places), "shuffle"), rf"paths: {message}")
    assert_one_message(command(make("folder.jsonl")), r"sources\.mine\.paths: '.*folder\.jsonl' matches no file")
    exclude = (str(tmp_path / "nothing*"), str(tmp_path / "pipe*"))
    assert is_whole(prepare(make("*.*json*", corpus={"exclude": (*exclude, str(tmp_path / "*.yaml"))})))


def vanish_after(function, path, kept):
    """The function; a file that moves away as soon as it is called, or, of a generator, when it ends."""

    def called(*arguments):
        result = function(*arguments)
        if kept.exists():
            return result
        if inspect.isgenerator(result):
            result = iter([*result])
        path.rename(kept)
        return result

    return called


@pytest.mark.parametrize("skip", ["error", "skip"])
@pytest.mark.parametrize("place", ["list_files", "_units", "read_documents", "_batches", "_add"])
@pytest.mark.parametrize("trained", [False, True], ids=["given", "trained"])
def test_a_file_that_vanishes_is_a_message_and_may_come_back(tmp_path, make, command, monkeypatch, place, skip, trained):
    monkeypatch.setattr(module, "UNIT_BYTES", 1)
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", TEXTS[number * 50 :][:50])
    changes = {"on_bad_document": skip} | ({"tokenizer": TokenizerConfig(vocab_size=300)} if trained else {})
    path, kept, whole = tmp_path / "1.jsonl", tmp_path / "kept", contents(prepare(make("*.jsonl", output="whole", **changes)))
    with monkeypatch.context() as patch:
        home = module if place in ("list_files", "_units") else tokenize
        patch.setattr(home, place, vanish_after(getattr(home, place), path, kept))
        assert_one_message(command(make("*.jsonl", **changes)), r".*/1\.jsonl: cannot be read or written \(No such file or dir")
    assert not is_whole(tmp_path / "out")
    kept.rename(path)
    assert contents(prepare(make("*.jsonl", **changes))) == whole


@pytest.mark.parametrize("place", ["_list_files", "_plan", "_open_lines", "_spill"])
def test_a_file_that_vanishes_from_a_shuffle_is_a_message(tmp_path, command, monkeypatch, place):
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", TEXTS[number * 50 :][:50])
    places = {"final_dir": str(tmp_path / "final"), "tmp_dir": str(tmp_path / "tmp"), "paths": (str(tmp_path / "?.jsonl"),)}
    settings = ShuffleConfig(name="x", memory=10**6, num_chunks=2, validation_share=0.0, **places)
    path, kept = tmp_path / "1.jsonl", tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(shuffling, place, vanish_after(getattr(shuffling, place), path, kept))
        assert_one_message(
            command(settings, "shuffle"), r".*/1\.jsonl: cannot be read or written \(No such file or directory\)"
        )
    assert not (tmp_path / "final" / "shuffle.json").exists()
    kept.rename(path)
    shuffle(settings)
    rows = [
        json.loads(line)["text"] for path in (tmp_path / "final").glob("*.jsonl") for line in path.read_bytes().splitlines()
    ]
    assert sorted(rows) == sorted(TEXTS[:150])


FOREIGN = {
    "a course": ["units/lesson1.txt", "notes.txt"],
    "a dataset of others": ["manifest.json", "train/x/a.bin", "units/a.json"],
    "an empty folder": ["units/", "train/mine.txt"],
    "hidden files": ["units/.keep"],
    "no folder": ["units"],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_folder_is_left_alone(tmp_path, make, command, name):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    for file in FOREIGN[name]:
        path = tmp_path / "out" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir() if file.endswith("/") else path.write_text("precious")
    before = {path: path.is_dir() or path.read_text() for path in (tmp_path / "out").rglob("*")}
    assert_one_message(command(make("a.jsonl")), r".*/out: exists and is no dataset of franca\. Remove it, or choose another")
    assert {path: path.is_dir() or path.read_text() for path in (tmp_path / "out").rglob("*")} == before


@pytest.mark.parametrize("name", ["empty", "killed at once", "copied", "without its manifest"])
def test_a_folder_that_is_new_or_ours_is_taken(tmp_path, make, name):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    whole, out = prepare(make("a.jsonl", output="whole")), tmp_path / "out"
    if name in ("empty", "killed at once"):
        (out if name == "empty" else out / "units").mkdir(parents=True)
    else:
        shutil.copytree(whole, out)
        (out / "train" / "left.bin").touch()
        if name == "without its manifest":
            (out / "manifest.json").unlink()
    assert contents(prepare(make("a.jsonl"))) == contents(whole)


def test_a_folder_for_downloads_without_a_download_is_refused(tmp_path, make, command):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    message = r"download_dir: was given, but no source is of the hub \(hub: owner/name\)\. Leave it out"
    assert_one_message(command(make("a.jsonl", download_dir=str(tmp_path / "down"))), message)
    assert not (tmp_path / "out").exists()


# Workers that are killed


def killed_in_worker(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_a_message(tmp_path, make, command, monkeypatch):
    monkeypatch.setattr(module, "UNIT_BYTES", 1)
    for number in range(2):
        write_lines(tmp_path / f"{number}.jsonl", TEXTS[number * 100 :][:100])
    message = "a worker was killed, perhaps for want of memory. What is finished is kept: run it again, with fewer workers"
    places = {"final_dir": str(tmp_path / "final"), "tmp_dir": str(tmp_path / "tmp"), "paths": (str(tmp_path / "?.jsonl"),)}
    shuffled = ShuffleConfig(name="x", memory=10**7, num_chunks=1, validation_share=0.0, workers=2, **places)
    with monkeypatch.context() as patch:
        patch.setattr(executor, "_in_worker", killed_in_worker)
        patch.setattr(shuffling, "_do", killed_in_worker)
        assert_one_message(command(make("*.jsonl", workers=2)), rf".*/out: {message}")
        assert_one_message(command(shuffled, "shuffle"), rf".*/tmp/x\.shuffle: {message}")
    assert not is_whole(tmp_path / "out")
    assert contents(prepare(make("*.jsonl"))) == contents(prepare(make("*.jsonl", output="fresh")))
    assert (shuffle(replace(shuffled, workers=1)) / "shuffle.json").exists()


# Disks


class Disk:
    """A disk of `limit` bytes, by an `open` for the modules that write: it is full when the files below `root` fill it."""

    def __init__(self, root, monkeypatch):
        self.root, self.limit, self.highest = root, 10**12, 0
        for home in (franca.core.run, franca.data.indexed, shuffling):
            monkeypatch.setattr(home, "open", self.open, raising=False)

    def open(self, path, mode="r", *rest, **more):
        if "w" not in mode or self.root not in Path(path).parents:
            return open(path, mode, *rest, **more)
        return io.BufferedWriter(File(path, "w", disk=self))

    def take(self, num_bytes):
        """Room for so many bytes, or as many as there is room for."""
        used = sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())
        if num_bytes and used >= self.limit:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(num_bytes, self.limit - used)
        self.highest = max(self.highest, used + taken)
        return taken


class File(io.FileIO):
    def __init__(self, *arguments, disk):
        super().__init__(*arguments)
        self.disk = disk

    def write(self, content):
        view = memoryview(content).cast("B")
        return super().write(view[: self.disk.take(len(view))])


@pytest.fixture
def disk(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return Disk(tmp_path / "disk", monkeypatch)


FULL = (
    r".*/disk/.*: cannot be read or written \(No space left on device\)\. What is finished is kept: make room there, or mend it"
)


def fill(disk, run, whole, result, is_finished):
    """Run it on a full disk, and again after a little more room has been made, until it is through.

    With as much room as a run needs that nothing disturbs, all that earlier runs left behind must not be in the way.
    """
    shutil.rmtree(disk.root)
    need, failures, steps = disk.highest, 0, 24
    for step in range(1, steps + 1):
        disk.limit, disk.highest = need * step // steps, 0
        code, said = run()
        if code == 0:
            assert result() == whole
            break
        assert_one_message((code, said), FULL)
        assert not is_finished(), f"with {step}/{steps} of the room"
        assert not [path for path in disk.root.rglob("*") if "partial" in path.name], f"with {step}/{steps} of the room"
        failures += 1
    else:
        pytest.fail(f"it needs more room after failures than without: {said}")
    assert failures > steps // 2
    for step in range(1, steps, 4):  # every time anew, and then all the room at once
        shutil.rmtree(disk.root)
        disk.limit = need * step // steps
        assert_one_message(run(), FULL)
        disk.limit = 10**12
        assert run()[0] == 0
        assert result() == whole


@pytest.mark.parametrize("trained", [False, True], ids=["given", "trained"])
def test_on_a_full_disk_a_preparation_waits_for_room(tmp_path, make, command, monkeypatch, disk, trained):
    monkeypatch.setattr(module, "UNIT_BYTES", 1)
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 2000)
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", TEXTS[number * 60 :][:60] * (1 + 5 * number))
    changes = {"tokenizer": TokenizerConfig(vocab_size=280)} if trained else {}
    settings = make("?.jsonl", output="disk/out", shard_tokens=3000, **changes)
    assert command(settings)[0] == 0
    whole = contents(tmp_path / "disk" / "out")
    out = tmp_path / "disk" / "out"
    fill(disk, lambda: command(settings), whole, lambda: contents(out), lambda: is_whole(out))


def test_on_a_full_disk_a_shuffle_waits_for_room(tmp_path, command, disk):
    for number in range(3):
        write_lines(tmp_path / f"{number}.jsonl", TEXTS[number * 60 :][:60] * 40)
    places = {"final_dir": f"{disk.root}/final", "tmp_dir": f"{disk.root}/tmp", "paths": (str(tmp_path / "?.jsonl"),)}
    settings = ShuffleConfig(name="x", memory=10**6, num_chunks=3, validation_share=0.02, **places)

    def files():
        assert list((disk.root / "tmp").iterdir()) == []
        return {path.name: path.read_bytes() for path in (disk.root / "final").iterdir()}

    assert command(settings, "shuffle")[0] == 0
    finished = disk.root / "final" / "shuffle.json"
    fill(disk, lambda: command(settings, "shuffle"), files(), files, finished.exists)
