"""The run folder: atomic files, records that survive a crash, the code that ran."""

import os
import subprocess
import sys
import threading
from itertools import pairwise

import numpy as np
import orjson
import pytest

from franca.core.errors import ConfigError
from franca.core.run import RunFolder, append_record, current_metrics, lock, new_file, read_records, write_atomically


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("content", ["text ✓", "text ✓".encode()])
def test_a_file_is_replaced_by_text_or_bytes(tmp_path, content):
    path = tmp_path / "file"
    path.write_text("old")
    write_atomically(path, content)
    assert path.read_text(encoding="utf-8") == "text ✓"
    assert names(tmp_path) == ["file"]


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, "half of the new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_a_new_file_is_named_by_a_full_disk_and_other_files_by_their_own_errors(tmp_path):
    with pytest.raises(OSError, match=r"No space left.*file'") as full, new_file(tmp_path / "file"):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match=r"none'") as other, new_file(tmp_path / "file"):
        (tmp_path / "none").read_bytes()
    assert (full.value.filename, other.value.filename) == (str(tmp_path / "file"), str(tmp_path / "none"))
    assert names(tmp_path) == []


def test_a_lock_keeps_others_out_until_it_is_given_back(tmp_path):
    def hold(seconds):
        with lock(tmp_path / "lock", "refused"):
            held.set()
            released.wait(seconds)

    held, released = threading.Event(), threading.Event()
    thread = threading.Thread(target=hold, args=(60,))
    thread.start()
    held.wait()
    with pytest.raises(ConfigError, match="refused"), lock(tmp_path / "lock", "refused"):
        pass
    threading.Timer(0.3, released.set).start()
    with lock(tmp_path / "lock", "refused", wait_s=60):
        assert released.is_set()
    thread.join()


def test_the_old_file_is_seen_until_the_new_one_is_whole_on_disk(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    seen = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append(path.read_text()))
    write_atomically(path, "new")
    assert seen == ["old", "new"]  # the content is synced before the rename, the folder after it


@pytest.mark.parametrize(("mask", "mode"), [(0o027, 0o640), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_says(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", "x")
        append_record(tmp_path / "records", {})
    finally:
        os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "records")] == [mode, mode]


def test_records_come_back_in_order(tmp_path):
    path = tmp_path / "records.jsonl"
    append_record(path, {"step": 1, "loss": 2.5, "name": "é"})
    append_record(path, {"step": np.int64(2), "values": np.array([1.0, 2.0])})
    assert list(read_records(path)) == [{"step": 1, "loss": 2.5, "name": "é"}, {"step": 2, "values": [1.0, 2.0]}]
    assert path.read_bytes().count(b"\n") == 2


def test_a_missing_or_empty_file_has_no_records(tmp_path):
    assert list(read_records(tmp_path / "none")) == []
    (tmp_path / "empty").touch()
    assert list(read_records(tmp_path / "empty")) == []


@pytest.mark.parametrize("torn", [b'{"st', b"x", b'{"long": "' + b"y" * 200_000, b'{"step": 9}'])
@pytest.mark.parametrize("whole", [0, 1, 3])
def test_a_torn_last_line_is_left_out_and_cut_off_by_the_next_record(tmp_path, torn, whole):
    path = tmp_path / "records.jsonl"
    kept = [{"step": step} for step in range(whole)]
    for record in kept:
        append_record(path, record)
    with path.open("ab") as file:
        file.write(torn)
    assert list(read_records(path)) == kept
    append_record(path, {"step": 100})
    assert path.read_bytes() == b"".join(orjson.dumps(record) + b"\n" for record in [*kept, {"step": 100}])


def test_a_long_whole_line_before_the_torn_one_is_kept(tmp_path):
    path = tmp_path / "records.jsonl"
    long = {"text": "y" * 150_000}
    append_record(path, long)
    with path.open("ab") as file:
        file.write(b'{"torn": ' + b"z" * 70_000)
    append_record(path, {"step": 2})
    assert list(read_records(path)) == [long, {"step": 2}]


def test_a_whole_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"step": 1}\nnot json\n')
    with pytest.raises(ValueError, match=r"records\.jsonl:2: is not a JSON record"):
        list(read_records(path))


def test_records_of_many_writers_do_not_mix(tmp_path):
    path = tmp_path / "records.jsonl"

    def write(writer):
        for number in range(50):
            append_record(path, {"writer": writer, "number": number, "fill": "x" * 300})

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = list(read_records(path))
    assert len(records) == 200
    for writer in range(4):
        assert [record["number"] for record in records if record["writer"] == writer] == list(range(50))


def test_metrics_leave_out_what_a_rollback_superseded(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def add(attempt, steps):
        for step in steps:
            append_record(path, {"step": step, "attempt": attempt})

    add(1, range(1, 8))
    append_record(path, {"kind": "rollback", "to_step": 4, "attempt": 2})
    add(2, range(5, 7))
    append_record(path, {"kind": "rollback", "to_step": 2, "attempt": 3})
    add(3, range(3, 10))
    kept = [(record["step"], record["attempt"]) for record in current_metrics(path)]
    assert kept == [(1, 1), (2, 1), *((step, 3) for step in range(3, 10))]
    assert all(before < after for (before, _), (after, _) in pairwise(kept))


def test_a_rollback_to_the_last_step_supersedes_nothing_and_one_to_zero_everything(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_record(path, {"step": 1})
    append_record(path, {"kind": "rollback", "to_step": 1})
    assert current_metrics(path) == [{"step": 1}]
    append_record(path, {"kind": "rollback", "to_step": 0})
    assert current_metrics(path) == []
    assert current_metrics(tmp_path / "none") == []


def test_attempts_are_counted_by_the_events(tmp_path):
    run = RunFolder(tmp_path)
    assert run.next_attempt() == 1
    run.event("start", 1, step=0)
    run.event("start", 3)
    run.event("save", 2)
    assert run.next_attempt() == 4
    first = next(read_records(run.events))
    assert {"event": "start", "attempt": 1, "step": 0}.items() <= first.items()


def test_only_one_attempt_at_a_time_is_at_work_in_a_run_folder(tmp_path):
    run = RunFolder(tmp_path / "deep" / "run")
    with run.lock():
        assert run.checkpoints.is_dir()
        with pytest.raises(ConfigError, match="run: another process is training here"), run.lock():
            pass
    with run.lock():  # free again for the next
        pass


def make_package(folder):
    package = folder / "package"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "code.py").write_text("one = 1\n")
    (package / "page.j2").write_text("{{ one }}\n")
    (package / "weights.bin").write_bytes(b"not code")
    return package


def git(folder, *words):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def relative_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_code_is_copied_once(tmp_path):
    package, run = make_package(tmp_path), RunFolder(tmp_path / "run")
    fingerprint = run.snapshot_code(package)
    copy = run.code / fingerprint
    assert relative_files(copy) == ["package/__init__.py", "package/inner/code.py", "package/page.j2"]
    assert (copy / "package/inner/code.py").read_text() == "one = 1\n"
    (copy / "marker").touch()  # gone if the folder were written again
    assert run.snapshot_code(package) == fingerprint
    assert names(run.code) == [fingerprint]
    assert (copy / "marker").exists()


def test_a_module_of_ones_own_is_copied_too(tmp_path):
    package, run = make_package(tmp_path), RunFolder(tmp_path / "run")
    (tmp_path / "mine.py").write_text("idea = 1\n")
    first = run.snapshot_code(package, [tmp_path / "mine.py"])
    assert (run.code / first / "mine.py").read_text() == "idea = 1\n"
    (tmp_path / "mine.py").write_text("idea = 2\n")
    assert run.snapshot_code(package, [tmp_path / "mine.py"]) != first


def test_other_code_is_copied_beside_it(tmp_path):
    package, run = make_package(tmp_path), RunFolder(tmp_path / "run")
    first = run.snapshot_code(package)
    (package / "inner" / "code.py").write_text("one = 2\n")
    second = run.snapshot_code(package)
    (package / "inner" / "code.py").rename(package / "inner" / "renamed.py")
    third = run.snapshot_code(package)
    assert names(run.code) == sorted({first, second, third})
    assert len({first, second, third}) == 3
    assert (run.code / first / "package/inner/code.py").read_text() == "one = 1\n"


def test_a_snapshot_that_was_cut_short_is_made_anew(tmp_path):
    package = make_package(tmp_path)
    fingerprint = RunFolder(tmp_path / "other").snapshot_code(package)
    run = RunFolder(tmp_path / "run")
    (run.code / f".{fingerprint}.partial" / "package").mkdir(parents=True)
    (run.code / f".{fingerprint}.partial" / "package" / "stale.py").touch()
    assert run.snapshot_code(package) == fingerprint
    assert names(run.code) == [fingerprint]
    assert "package/stale.py" not in relative_files(run.code / fingerprint)


def test_a_checkout_adds_its_commit_and_its_uncommitted_changes(tmp_path):
    package, run = make_package(tmp_path), RunFolder(tmp_path / "run")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-q", "-m", "first")
    clean = run.code / run.snapshot_code(package)
    assert (clean / "git_commit.txt").read_text().strip() == git(tmp_path, "rev-parse", "HEAD")
    assert not (clean / "git.diff").exists()
    (package / "inner" / "code.py").write_text("one = 2\n")
    (tmp_path / "outside.txt").write_text("not the package's")
    changed = run.code / run.snapshot_code(package)
    diff = (changed / "git.diff").read_text()
    assert "-one = 1\n+one = 2\n" in diff
    assert "outside" not in diff


def test_a_package_that_only_lies_inside_a_foreign_checkout_takes_nothing_from_it(tmp_path):
    package, run = make_package(tmp_path), RunFolder(tmp_path / "run")
    git(tmp_path, "init", "-q")
    (tmp_path / "other").touch()
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-q", "-m", "first")
    copy = run.code / run.snapshot_code(package)
    assert not (copy / "git_commit.txt").exists()


def test_the_environment_record_holds_the_given_facts_and_versions_only(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "a secret value")
    run = RunFolder(tmp_path)
    run.write_environment({"host": "n1", "python": sys.version})
    record = orjson.loads(run.environment.read_bytes())
    assert set(record) == {"host", "python", "packages"}
    assert record["packages"]["numpy"] == np.__version__
    assert b"secret" not in run.environment.read_bytes()
