"""Preparation in units: what is done stays done, what changed is redone, and after any death the bytes are the same."""

import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from preparing import TEXTS, contents, die, is_whole, write_lines
from pyarrow import parquet

from franca.core.config import load, to_dict
from franca.core.errors import ConfigError
from franca.data import prepare as module
from franca.data import sources, tokenize
from franca.data.filters import LengthConfig, RegexConfig
from franca.data.indexed import Dataset, ShardWriter
from franca.data.prepare import PrepareConfig, TokenizerConfig, main, prepare
from franca.data.sources import CorpusConfig
from franca.data.tokenize import Policy, Unit, is_held_out
from franca.data.tokenizer import Tokenizer

SEED = 11
UNIT_BYTES = 2500  # two or three of the small files
STDLIB = Path(os.__file__).parent


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Which takes most of the time of small preparations, and matters to none of these tests: the power stays on."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


def names_of(root, name):
    """The names of a source's units, in order."""
    shards = Dataset(root).manifest["sources"][name]["train"]["shards"]
    return list(dict.fromkeys(shard["name"].split("-")[0] for shard in shards))


def times(root, source="*"):
    """The inode and the time of change of every shard file."""
    files = [path for split in ("train", "validation") for path in root.glob(f"{split}/{source}/*")]
    return {str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


@pytest.fixture
def two(tmp_path, make, monkeypatch):
    """`two(output="out", **changes)`: settings for two sources of many small files, several to a unit."""
    monkeypatch.setattr(module, "UNIT_BYTES", UNIT_BYTES)
    for source in ("a", "b"):
        (tmp_path / source).mkdir()
        for number in range(10):
            write_lines(tmp_path / source / f"{number}.jsonl", [f"{source} {text}" for text in TEXTS[number * 10 :][:10]])
    corpora = {name: CorpusConfig(paths=(str(tmp_path / name / "*.jsonl"),)) for name in ("a", "b")}

    def settings(output="out", **changes):
        return make(output=output, **({"sources": corpora, "shard_tokens": 300} | changes))

    return settings


def test_small_files_are_prepared_together_and_large_ones_alone(tmp_path, two):
    write_lines(tmp_path / "b" / "5.jsonl", TEXTS)
    root = prepare(two())
    records = [json.loads(path.read_text()) for path in (root / "units").glob("*.json")]
    for source in ("a", "b"):
        groups = sorted([file["path"] for file in record["files"]] for record in records if record["source"] == source)
        assert [path for group in groups for path in group] == [str(tmp_path / source / f"{n}.jsonl") for n in range(10)]
        for group in groups:
            assert len(group) == 1 or sum(os.path.getsize(path) for path in group) <= UNIT_BYTES
        for group, following in itertools.pairwise(groups):
            assert sum(os.path.getsize(path) for path in [*group, following[0]]) > UNIT_BYTES
        assert 4 <= len(groups) <= 9
        assert ([str(tmp_path / source / "5.jsonl")] in groups) == (source == "b")
        assert len(names_of(root, source)) == len(groups)


def test_units_have_the_documents_of_the_whole_in_order(two, monkeypatch):
    units = prepare(two())
    monkeypatch.setattr(module, "UNIT_BYTES", 10**9)
    whole = prepare(two("whole", shard_tokens=10**9))
    for split in ("train", "validation"):
        for source in ("a", "b"):
            (one,) = Dataset(whole).shards(split, source)
            parts = Dataset(units).shards(split, source)
            assert np.concatenate([part.tokens for part in parts]).tolist() == one.tokens.tolist()
            assert sum(part.num_documents for part in parts) == one.num_documents
            counts = [Dataset(root).manifest["sources"][source][split] for root in (units, whole)]
            assert [{**count, "shards": None} for count in counts] == [{**counts[1], "shards": None}] * 2


def test_units_that_are_there_are_not_done_again(two, monkeypatch):
    root = prepare(two())
    before, whole = times(root), contents(root)
    assert len(before) > 40
    monkeypatch.setattr(tokenize, "run", None)
    prepare(two())
    assert (times(root), contents(root)) == (before, whole)
    (root / "manifest.json").unlink()
    prepare(two())
    assert (times(root), contents(root)) == (before, whole)


def test_another_time_of_change_redoes_nothing(tmp_path, two, monkeypatch):
    for changes in ({}, {"tokenizer": TokenizerConfig(vocab_size=300)}):
        root = prepare(two(**changes))
        before = times(root)
        for path in tmp_path.glob("[ab]/*"):
            os.utime(path, (1, 1))
        with monkeypatch.context() as patch:
            patch.setattr(tokenize, "run", None)
            prepare(two(**changes))
        assert times(root) == before
        assert contents(root) == contents(prepare(two("fresh", **changes)))


def replace_one(folder):
    path = folder / "4.jsonl"
    path.write_text(path.read_text().replace("4", "5"))


def lengthen_one(folder):
    write_lines(folder / "4.jsonl", TEXTS[:30])


CHANGES = {
    "one replaced by as many bytes": (replace_one, 1),
    "one longer": (lengthen_one, None),
    "the last removed": (lambda folder: (folder / "9.jsonl").unlink(), None),
    "the first removed": (lambda folder: (folder / "0.jsonl").unlink(), None),
    "one added at the end": (lambda folder: write_lines(folder / "99.jsonl", TEXTS[100:150]), None),
    "one added in between": (lambda folder: write_lines(folder / "33.jsonl", TEXTS[100:150]), None),
    "all but one removed": (lambda folder: [path.unlink() for path in folder.glob("[1-9].jsonl")], 1),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_changed_is_redone_and_nothing_else(tmp_path, two, monkeypatch, case):
    change, count = CHANGES[case]
    root = prepare(two())
    before, other = times(root), times(root, "b")
    change(tmp_path / "a")
    done, run = [], tokenize.run
    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "run", lambda root, unit, *rest: (done.append(unit), run(root, unit, *rest))[1])
        prepare(two())
    assert is_whole(root)
    fresh = prepare(two("fresh"))
    assert contents(root) == contents(fresh)
    assert times(root, "b") == other
    assert {unit.source for unit in done} <= {"a"}
    assert count is None or len(done) == count
    redone, after = {unit.id(policy_of(root)) for unit in done}, times(root)
    kept = {name for name, when in after.items() if before.get(name) == when}
    assert kept == {name for name in after if Path(name).name.split("-")[0] not in redone}


def policy_of(root):
    manifest = Dataset(root).manifest
    s = manifest["settings"]
    facts = (s["add_bos"], s["add_eos"], s["validation_share"], s["shard_tokens"], s["on_bad_document"] == "skip")
    return Policy(manifest["tokenizer"]["sha256"], *facts)


def test_a_source_may_come_and_go(two):
    settings = two()
    one = settings.sources["a"]
    alone = prepare(two("alone", sources={"a": one}))
    root = prepare(settings)
    before = times(root, "a")
    prepare(two(sources={"a": one}))
    assert contents(root) == contents(alone)
    prepare(settings)
    assert contents(root) == contents(prepare(two("fresh")))
    assert times(root, "a") == before


def test_a_lost_shard_is_made_again(two):
    root = prepare(two())
    whole = contents(root)
    for kind in ("idx", "bin"):
        lost = next((root / "train" / "a").glob(f"*.{kind}"))
        lost.unlink()
        prepare(two())
        assert contents(root) == whole, kind


def test_any_number_of_workers_gives_the_same_bytes(two, capfd):
    for changes in ({}, {"tokenizer": TokenizerConfig(vocab_size=300), "add_eos": False}):
        one, several = prepare(two("one", workers=1, **changes)), prepare(two("several", workers=2, **changes))
        assert contents(one) == contents(several)
        assert is_whole(several)
    assert "Traceback" not in capfd.readouterr().err


def test_a_bad_document_in_a_worker_is_a_message(tmp_path, two):
    for number in (3, 7):
        (tmp_path / "a" / f"{number}.jsonl").write_text("not json\n")
    with pytest.raises(ConfigError, match=r"a/[37]\.jsonl:1: is not JSON .*set on_bad_document: skip"):
        prepare(two(workers=2))
    assert not is_whole(tmp_path / "out")
    one, several = prepare(two("one", on_bad_document="skip")), prepare(two(workers=2, on_bad_document="skip"))
    assert contents(one) == contents(several)
    assert Dataset(one).manifest["sources"]["a"]["skipped"] == 2


# What dies


def test_killed_before_any_change_of_the_disk_it_goes_on_to_the_same_bytes(tmp_path, make, monkeypatch):
    monkeypatch.setattr(module, "UNIT_BYTES", 1)
    for number in range(2):
        write_lines(tmp_path / f"{number}.jsonl", TEXTS[number * 8 :][:8])
    rng, moment, codes = random.Random(SEED), 0, set[int]()
    whole = contents(prepare(make("*.jsonl", output="whole")))
    while 0 not in codes:
        settings = make("*.jsonl", output=f"out{moment}")
        codes.add(die(moment, settings, 1))
        is_whole(tmp_path / f"out{moment}")
        assert contents(prepare(settings)) == whole, f"seed {SEED}, killed before change {moment}"
        moment += rng.randrange(1, 6)
    assert codes == {0, -signal.SIGKILL}
    assert moment > 30


@pytest.mark.parametrize("change", ["file", "settings", "tokenizer"])
def test_killed_before_any_change_of_the_disk_it_is_no_dataset_of_two_minds(tmp_path, make, monkeypatch, change):
    """The same on the way from one state of the sources to another."""
    monkeypatch.setattr(module, "UNIT_BYTES", 1)
    rng, codes = random.Random(f"{SEED}/{change}"), set[int]()
    changes = {"file": {}, "settings": {"add_eos": False}, "tokenizer": {"tokenizer": TokenizerConfig(vocab_size=290)}}[change]

    def state(after):
        write_lines(tmp_path / "0.jsonl", TEXTS[:8])
        write_lines(tmp_path / "1.jsonl", TEXTS[20 if after else 8 :][:8])
        os.utime(tmp_path / "0.jsonl", (1, 1))
        os.utime(tmp_path / "1.jsonl", (1 + after, 1))

    state(change == "file")
    fresh = contents(prepare(make("*.jsonl", output="fresh", **changes)))
    state(False)
    before = contents(prepare(make("*.jsonl", output="before")))
    state(change == "file")
    moment = rng.randrange(3)
    while 0 not in codes:
        output = f"out{moment}"
        shutil.copytree(tmp_path / "before", tmp_path / output)
        codes.add(die(moment, make("*.jsonl", output=output, **changes), 1))
        what = f"seed {SEED}, killed before change {moment}"
        is_whole(tmp_path / output)
        if rng.random() < 0.5:  # the user takes it back
            state(False)
            assert contents(prepare(make("*.jsonl", output=output))) == before, what
            assert is_whole(tmp_path / output), what
            state(change == "file")
        assert contents(prepare(make("*.jsonl", output=output, **changes))) == fresh, what
        moment += rng.randrange(1, 12)
    assert codes == {0, -signal.SIGKILL}


DRIVER = """
import sys
from franca.__main__ import main
from franca.data import prepare
prepare.UNIT_BYTES = 150_000
sys.argv = ["franca", "prepare", *sys.argv[1:]]
main()
"""


def start(path, *words):
    """The command in a process group of its own; its stderr ends when the last process of it has gone."""
    command = [sys.executable, "-c", DRIVER, str(path), *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, make, monkeypatch, workers):
    monkeypatch.setattr(module, "UNIT_BYTES", 150_000)
    rng, killed = random.Random(f"{SEED}/{workers}"), 0
    corpus = {"paths": [str(STDLIB / "[a-f]*.py")], "documents": "paragraph"}
    base = {"sources": {"stdlib": corpus}, "shard_tokens": 100_000, "validation_share": 0.05, "workers": workers}
    base |= {"tokenizer": to_dict(make("none").tokenizer)}

    def file_of(output):
        path = tmp_path / f"{output}.yaml"
        path.write_text(yaml.safe_dump({"output": str(tmp_path / output), **base}))
        return path

    begin = time.monotonic()
    whole = start(file_of("whole"), "workers=1")
    assert whole.communicate()[0] is None
    whole_s, expected = time.monotonic() - begin, contents(tmp_path / "whole")
    assert whole.returncode == 0
    for number in range(4):
        path, group, delay = file_of(f"out{number}"), rng.random() < 0.3, rng.uniform(0.35, 1.0) * whole_s
        what = f"seed {SEED}/{workers}, number {number}, {'group' if group else 'parent'} killed after {delay:.2f} s"
        process = start(path)
        try:
            process.wait(delay)
        except subprocess.TimeoutExpired:
            (os.killpg if group else os.kill)(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        is_whole(tmp_path / f"out{number}")
        prepare(load(PrepareConfig, path, ["workers=1"]))  # at once, whether the workers of the first have gone or not
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            pytest.fail(f"{what}: its workers do not go away")
        assert contents(tmp_path / f"out{number}") == expected, what
    assert killed >= 2, f"seed {SEED}/{workers}"


def test_a_worker_without_work_goes_away_when_its_master_was_killed(tmp_path, make):
    write_lines(tmp_path / "small.jsonl", TEXTS)
    write_lines(tmp_path / "large.jsonl", [" ".join(TEXTS)] * 400)
    settings = to_dict(make("*.jsonl", workers=2))
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(settings))))
    process = start(path)
    while not list((tmp_path / "out" / "units").glob("*.json")):
        assert process.poll() is None
    os.kill(process.pid, signal.SIGKILL)
    try:
        process.communicate(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail("it waits for work for ever")
    prepare(make("*.jsonl"))
    assert is_whole(tmp_path / "out")


# Parts of a large Parquet file


def write_parquet(path, texts, group=20):
    parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=group, compression="none", use_dictionary=False)


def test_a_large_parquet_file_is_many_units_and_gives_the_same_documents(tmp_path, make, monkeypatch):
    write_parquet(tmp_path / "a.parquet", TEXTS)
    whole = prepare(make("a.parquet", output="whole"))
    monkeypatch.setattr(module, "UNIT_BYTES", 3000)
    parts = prepare(make("a.parquet", output="parts"))
    records = [json.loads(path.read_text()) for path in (parts / "units").glob("*.json")]
    assert len(records) > 3
    for split in ("train", "validation"):
        tokens = [np.concatenate([s.tokens for s in Dataset(root).shards(split, "mine")]).tolist() for root in (whole, parts)]
        assert tokens[0] == tokens[1]
    assert {tuple(record["files"][0]["stat"]) for record in records} == {tuple(records[0]["files"][0]["stat"])}
    assert len({record["files"][0]["sha256"] for record in records}) == len(records)


def test_only_the_row_groups_that_changed_are_done_again(tmp_path, make, monkeypatch):
    monkeypatch.setattr(module, "UNIT_BYTES", 3000)
    write_parquet(tmp_path / "a.parquet", TEXTS)
    before = times(prepare(make("a.parquet")))
    changed = [*TEXTS[:100], TEXTS[100].swapcase(), *TEXTS[101:]]
    write_parquet(tmp_path / "a.parquet", changed)
    after = times(prepare(make("a.parquet")))
    fresh = contents(prepare(make("a.parquet", output="fresh")))
    assert contents(tmp_path / "out") == fresh
    assert before.keys() == after.keys()
    redone = {name.rsplit("-", 1)[0].rsplit("/", 1)[1] for name in after if before[name] != after[name]}
    assert len(redone) == 1


# What changes, fails, or is odd


@pytest.fixture
def one_unit(tmp_path, tokenizer_path):
    """A folder with a tokenizer in it, a unit of one file, and its policy."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "tokenizer.json").write_text(tokenizer_path.read_text(encoding="utf-8"), encoding="utf-8")
    path = tmp_path / "a.jsonl"
    write_lines(path, TEXTS)
    unit = Unit("mine", CorpusConfig(paths=(str(path),)), (path,), path.stat().st_size)
    return root, unit, Policy(Tokenizer.load(tokenizer_path).fingerprint, False, True, 0.1, 10**9, False)


def test_the_ticks_count_the_tokens(one_unit, monkeypatch):
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 1000)
    ticks = []
    record = tokenize.run(*one_unit, ticks.append)
    assert len(ticks) > 5
    assert sum(ticks) == record["train"]["tokens"] + record["validation"]["tokens"]
    assert tokenize.committed(*one_unit) == record


def grow(path):
    with path.open("a") as file:
        file.write('{"text": "more"}\n')


@pytest.mark.parametrize("change", [grow, os.utime, lambda path: os.truncate(path, 5)], ids=["grow", "touch", "cut"])
def test_a_file_that_changes_while_it_is_read_is_refused(one_unit, change):
    root, unit, policy = one_unit
    with pytest.raises(ConfigError, match=r"a\.jsonl: has changed while it was read"):
        tokenize.run(root, unit, policy, lambda tokens: change(unit.files[0]))
    assert tokenize.committed(*one_unit) is None
    assert not (root / "train").exists()


def test_after_a_change_while_it_was_read_the_next_run_makes_the_dataset(tmp_path, two, monkeypatch):
    read = tokenize.read_documents

    def growing(path, *rest):
        yield from read(path, *rest)
        if path == tmp_path / "a" / "3.jsonl":
            grow(path)

    with monkeypatch.context() as patch:
        patch.setattr(tokenize, "read_documents", growing)
        with pytest.raises(ConfigError, match=r"a/3\.jsonl: has changed while it was read"):
            prepare(two())
    assert not is_whole(tmp_path / "out")
    assert contents(prepare(two())) == contents(prepare(two("fresh")))


def full_disk(limit):
    """An `open` for files that a disk with `limit` bytes left for each of them would give."""

    class Full(io.BufferedWriter):
        def write(self, content):
            if self.tell() + memoryview(content).nbytes > limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    return lambda path, mode, buffering=-1: Full(io.FileIO(path, "w")) if "w" in mode else open(path, mode)


@pytest.mark.parametrize("where", ["tokens", "index"])
def test_on_a_full_disk_there_is_no_dataset_until_there_is_space(tmp_path, two, monkeypatch, where):
    import franca.core.run
    import franca.data.indexed

    place = franca.data.indexed if where == "tokens" else franca.core.run
    with monkeypatch.context() as patch:
        patch.setattr(place, "open", full_disk(150), raising=False)
        with pytest.raises(ConfigError, match=r"out.*: cannot be read or written \(No space left on device\).*make room"):
            prepare(two(tokenizer=TokenizerConfig(vocab_size=300)) if where == "index" else two())
    assert not is_whole(tmp_path / "out")
    assert contents(prepare(two())) == contents(prepare(two("fresh")))


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
sys.argv = ["franca", "prepare", *sys.argv[1:]]
from franca.__main__ import main
main()
"""


def test_a_file_that_cannot_grow_is_an_error_and_later_it_can(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", [f"{n} {text}" for n in range(30) for text in TEXTS])
    settings = make("a.jsonl")
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(settings)))))
    result = subprocess.run([sys.executable, "-W", "error", "-c", LIMITED, str(path)], capture_output=True, text=True)
    assert result.returncode == 78
    assert "File too large" in result.stderr
    assert "ResourceWarning" not in result.stderr
    assert not is_whole(tmp_path / "out")
    assert contents(prepare(settings)) == contents(prepare(make("a.jsonl", output="fresh")))


@pytest.mark.parametrize("bad", ["error", "skip"])
def test_a_file_that_may_not_be_read_is_a_message(tmp_path, two, monkeypatch, bad):
    def refusing(path, *rest, **more):
        if Path(path) == tmp_path / "a" / "3.jsonl":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open(path, *rest, **more)

    with monkeypatch.context() as patch:
        for place in (sources, tokenize):
            patch.setattr(place, "open", refusing, raising=False)  # as chmod 000 does to all but root
        if bad == "error":
            with pytest.raises(ConfigError, match=r"a/3\.jsonl.*(cannot be read|Permission denied)"):
                prepare(two())
            assert not is_whole(tmp_path / "out")
        else:
            skipped = Dataset(prepare(two(on_bad_document="skip"))).manifest["sources"]["a"]
            assert skipped["skipped"] == 1
            assert "a/3.jsonl: cannot be read" in skipped["first_skipped"][0]
    fresh = prepare(two("fresh", on_bad_document=bad))
    assert contents(prepare(two(on_bad_document=bad))) == contents(fresh)  # the file is readable now


def test_one_line_of_twenty_megabytes_is_one_document(tmp_path, make, tokenizer_path):
    text = " 語" * 5_000_000
    write_lines(tmp_path / "a.jsonl", ["before", text, "after"])
    root = prepare(make("a.jsonl", validation_share=0.0, shard_tokens=1000))
    one, two = Dataset(root).shards("train", "mine")
    tokenizer = Tokenizer.load(tokenizer_path)
    (word,) = tokenizer.encode([" 語"])
    before, after = tokenizer.encode(["before", "after"], eos=True)
    assert one.boundaries(0, one.num_tokens) == [0, len(before)]
    assert one.tokens.tolist() == [*before, *word.tolist() * 5_000_000, tokenizer.eos]
    assert two.tokens.tolist() == after.tolist()


END = "<|endoftext|>"


def test_documents_of_no_length_and_of_zero_bytes(tmp_path, make, tokenizer_path):
    texts = ["", "\0", "a\0b\0", "", "\0" * 50, "x", ""]
    write_lines(tmp_path / "a.jsonl", texts)
    (tmp_path / "b.txt").write_bytes(b"line\0one\n\0\n")
    root = prepare(make("*.*l", "*.txt", validation_share=0.0))
    (shard,) = Dataset(root).shards("train", "mine")
    tokenizer = Tokenizer.load(tokenizer_path)
    expected = [tokenizer.decode([*ids, tokenizer.eos]) for ids in tokenizer.encode([*filter(None, texts), "line\0one\n\0\n"])]
    assert tokenizer.decode(shard.tokens.tolist()) == "".join(expected)
    assert "\0" * 50 + END in "".join(expected)
    facts = Dataset(root).manifest["sources"]["mine"]["train"]
    assert (shard.num_documents, facts["documents"], facts["lengths"][0]) == (8, 8, 3)


def test_a_source_without_documents_is_named(tmp_path, two):
    for path in (tmp_path / "b").iterdir():
        path.write_text("\n\n")
    for workers in (1, 2):
        with pytest.raises(ConfigError, match=r"sources\.b: no training tokens came out of 10 file\(s\), 0 document"):
            prepare(two(workers=workers))
        assert not is_whole(tmp_path / "out")
    write_lines(tmp_path / "b" / "0.jsonl", TEXTS)
    assert contents(prepare(two())) == contents(prepare(two("fresh")))


def test_a_split_of_one_unit_may_be_empty(tmp_path, two):
    held_out = [text for text in TEXTS if is_held_out(text, 0.2)]
    write_lines(tmp_path / "a" / "0.jsonl", held_out)
    write_lines(tmp_path / "a" / "1.jsonl", [text for text in TEXTS if text not in held_out])
    root = prepare(two())
    assert is_whole(root)
    records = [json.loads(path.read_text()) for path in (root / "units").glob("*.json")]
    counts = [[record[split]["documents"] for split in ("train", "validation")] for record in records]
    assert [0, len(held_out)] in counts
    assert [len(TEXTS) - len(held_out), 0] in counts


@settings(derandomize=True, deadline=None, max_examples=30)
@given(lengths=st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=6), shard_tokens=st.integers(1, 25))
def test_shards_are_cut_where_a_naive_loop_cuts_them(tmp_path_factory, lengths, shard_tokens):
    folder = tmp_path_factory.mktemp("split")
    split = tokenize._Split(folder, "x", 300, shard_tokens)
    for batch in lengths:
        split.add(np.arange(sum(batch)), np.array(batch, np.int64), 0)
    split.close()
    expected, current = [], []
    for length in (length for batch in lengths for length in batch):
        current.append(length)
        if sum(current) >= shard_tokens:
            expected.append(current)
            current = []
    expected += [current] if current else []
    shards = [tokenize_lengths(folder / entry["name"]) for entry in split.facts["shards"]]
    assert shards == expected
    assert [entry["name"] for entry in split.facts["shards"]] == [f"x-{number:03d}" for number in range(len(expected))]
    assert [entry["tokens"] for entry in split.facts["shards"]] == [sum(group) for group in expected]


def tokenize_lengths(prefix):
    content = Path(f"{prefix}.idx").read_bytes()
    count = int.from_bytes(content[18:26], "little")
    return np.frombuffer(content, np.int32, count, 34).tolist()


def test_what_looks_like_garbage_is_said(tmp_path, make, monkeypatch, capsys):
    monkeypatch.setattr(tokenize, "EXAMINED", 1)
    lines = ["one line and\n" * 20, "x" * 500, *TEXTS[:20]]
    write_lines(tmp_path / "a.jsonl", lines)
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(make("a.jsonl", validation_share=0.0))))))
    main(path, [])
    facts = Dataset(tmp_path / "out").manifest["sources"]["mine"]["train"]
    total = sum(len([line for line in text.splitlines() if line.strip()]) for text in lines)
    wanted = {"examined": 22, "lines": total, "repeated_lines": 19, "one_character": 1}
    assert {key: facts[key] for key in wanted} == wanted
    printed = capsys.readouterr().out
    assert f"warning: {19 / total:.0%} of the lines of 22 documents repeat an earlier line of their document" in printed
    assert "warning: 1 of 22 documents are mostly one character" in printed
    write_lines(tmp_path / "a.jsonl", TEXTS[:20])
    main(path, [])
    assert "warning" not in capsys.readouterr().out


# The fast tokenizer


def fake(monkeypatch, spoil):
    """A fastokens that has the ids of the reference but for what `spoil(text, ids)` does to them; counts its texts."""
    seen = []

    class Fast:
        def __init__(self, text):
            self.reference = Tokenizer.parse(text, "fake")

        from_json_str = classmethod(lambda cls, text: cls(text))

        def encode_batch_flat(self, texts, split_special_tokens=False):
            assert split_special_tokens
            seen.extend(texts)
            rows = [spoil(text, ids.tolist()) for text, ids in zip(texts, self.reference.encode(texts), strict=True)]
            ends = np.cumsum([0, *map(len, rows)])
            return np.array([i for row in rows for i in row], np.uint32).tobytes(), ends.astype(np.uint64).tobytes()

    monkeypatch.setitem(sys.modules, "fastokens", types.SimpleNamespace(Tokenizer=Fast))
    return seen


def test_a_fast_tokenizer_makes_the_bytes_of_the_reference(two, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fastokens", None)
        slow = contents(prepare(two("slow")))
    with monkeypatch.context() as patch:
        seen = fake(patch, lambda text, ids: ids)
        assert contents(prepare(two("fake"))) == slow
        assert seen
    assert "warning" not in capsys.readouterr().err
    assert contents(prepare(two("fast"))) == slow


def test_a_wrong_fast_tokenizer_is_not_used(two, monkeypatch, capsys):
    last = "b " + TEXTS[99]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "fastokens", None)
        slow = contents(prepare(two("slow")))
    with monkeypatch.context() as patch:
        fake(patch, lambda text, ids: [*ids[:-1], ids[-1] ^ 1] if text == last else ids)
        assert contents(prepare(two("fake"))) == slow
    assert "warning: fastokens is not used for this tokenizer (it gives other ids)" in capsys.readouterr().err


def test_the_shards_of_a_unit_appear_only_when_all_are_there(one_unit, monkeypatch):
    root, unit, policy = one_unit
    seen = []
    commit = ShardWriter.commit
    monkeypatch.setattr(ShardWriter, "commit", lambda writer: (seen.append(list(root.glob("train/**/*"))), commit(writer))[1])
    tokenize.run(root, unit, Policy(*[*list(vars(policy).values())[:4], 500, False]), lambda tokens: None)
    assert len(seen) > 5
    assert not any(seen)


# Filters and copies


def documents_of(root, split="train"):
    tokenizer = Tokenizer.load(root / "tokenizer.json")
    shards = Dataset(root).shards(split, "mine")
    ends = [np.split(shard.tokens, np.cumsum(shard.document_lengths)[:-1]) for shard in shards]
    return [tokenizer.decode(ids[:-1].tolist()) for documents in ends for ids in documents]


FILTERED = [f"{n}: {'word ' * (n % 40)}" for n in range(120)]
LENGTHS = [LengthConfig(min_characters=30, max_tokens=90), RegexConfig(pattern="^1[0-9]:")]


def test_filters_drop_what_they_say_and_every_reason_is_counted(tmp_path, make, capfd):
    write_lines(tmp_path / "a.jsonl", FILTERED)
    root = prepare(make("a.jsonl", corpus={"filters": tuple(LENGTHS)}, validation_share=0.0))
    ids = Tokenizer.load(root / "tokenizer.json").encode(FILTERED)
    long = [len(text) >= 30 for text in FILTERED]
    tens = [text[:2].isdigit() and text[0] == "1" and text[2] == ":" for text in FILTERED]
    many = [len(each) + 1 > 90 for each in ids]  # EOS counts
    kept = [t for t, a, b, c in zip(FILTERED, long, tens, many, strict=True) if a and not b and not c]
    assert documents_of(root) == kept
    dropped = Dataset(root).manifest["sources"]["mine"]["dropped"]
    assert dropped == {
        "length: fewer than 30 characters": long.count(False),
        "regex: matches ^1[0-9]:": sum(a and b for a, b in zip(long, tens, strict=True)),
        "length: more than 90 tokens": sum(a and not b and c for a, b, c in zip(long, tens, many, strict=True)),
    }
    assert all(dropped.values())
    main_path = tmp_path / "data.yaml"
    main_path.write_text(yaml.safe_dump(json.loads(json.dumps(to_dict(make("a.jsonl", corpus={"filters": tuple(LENGTHS)}))))))
    main(main_path, [])
    assert f"mine: {long.count(False)} document(s) left out by length: fewer than 30 characters" in capfd.readouterr().out


@pytest.mark.parametrize("workers", [1, 2])
def test_copies_in_any_file_are_left_out_but_for_the_first(tmp_path, make, monkeypatch, workers):
    monkeypatch.setattr(module, "UNIT_BYTES", 1500)
    rng = random.Random(SEED)
    texts = [rng.choice(TEXTS[:60]) for _ in range(200)]
    for number in range(8):
        write_lines(tmp_path / f"{number}.jsonl", texts[number * 25 :][:25])
    settings = {"corpus": {"deduplicate": "exact", "filters": (RegexConfig(pattern="^x$"),)}, "validation_share": 0.0}
    root = prepare(make("*.jsonl", workers=workers, **settings))
    assert len(list((root / "units").glob("*.json"))) > 3
    kept = [text for text in dict.fromkeys(texts) if text != "x"]
    assert documents_of(root) == kept
    dropped = Dataset(root).manifest["sources"]["mine"]["dropped"]
    assert dropped["deduplicate: exact"] == len(texts) - texts.count("x") - len(kept)
    before = times(root)
    prepare(make("*.jsonl", workers=workers, **settings))
    assert times(root) == before
    write_lines(tmp_path / "0.jsonl", ["something new", *texts[1:25]])  # the first copy of texts[0] is elsewhere now
    again = contents(prepare(make("*.jsonl", workers=workers, **settings)))
    assert documents_of(root) == [text for text in dict.fromkeys(["something new", *texts[1:]]) if text != "x"]
    assert again == contents(prepare(make("*.jsonl", output="fresh", **settings)))


def test_a_tokenizer_is_trained_on_what_the_filters_leave(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", [*TEXTS, *["ZZZZZZZZ " * 50] * 50])
    without = {"filters": (RegexConfig(pattern="ZZZZ"),)}
    root = prepare(make("a.jsonl", corpus=without, tokenizer=TokenizerConfig(vocab_size=300)))
    assert "ZZ" not in (root / "tokenizer.json").read_text()
