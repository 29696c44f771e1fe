"""A shuffle in bounded memory is the sort that it claims to be, whatever happens to it on the way."""

import csv
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import yaml
from backports import zstd
from pyarrow import parquet

from franca.core.config import check, to_dict
from franca.core.errors import ConfigError
from franca.data import shuffle as module
from franca.data.shuffle import ShuffleConfig, main, row_keys, shuffle

MB = 1_000_000
SEED = 7
WORDS = Path(json.__file__).read_text(encoding="utf-8").split()
FORK = multiprocessing.get_context("fork")


def make_lines(source, count, length=100):
    """JSON lines as others might have written them: spaces, escapes and all."""
    rng = random.Random(f"{SEED}/{source}")
    lines = []
    for row in range(count):
        begin = rng.randrange(len(WORDS))
        text = " ".join(WORDS[begin : begin + rng.randrange(length)]) + rng.choice(["", "語 🎈", "\u2028\x85", "\r\n\t"])
        record = {"id": f"{source}-{row}", "text": text}
        lines.append(
            json.dumps(record, ensure_ascii=rng.random() < 0.5, indent=None).replace('": ', rng.choice(['": ', '" :']))
        )
    return [line.encode() for line in lines]


@pytest.fixture
def corpus(tmp_path):
    """Four files below `in`, two of them packed; returns their lines by name."""
    lines = {name: make_lines(name, count) for name, count in FILES.items()}
    (tmp_path / "in" / "sub").mkdir(parents=True)
    pack = {".gz": gzip.compress, ".zst": zstd.compress}
    for name, rows in lines.items():
        path = tmp_path / "in" / name
        path.write_bytes(pack.get(path.suffix, bytes)(b"\n".join(rows) + b"\n"))
    return lines


FILES = {"a.jsonl": 3000, "b.jsonl.gz": 1500, "sub/a.jsonl": 2000, "sub/c.jsonl.zst": 500}


@pytest.fixture
def make(tmp_path):
    """`make(output="out", **changes)`: the settings of a shuffle of the files below tmp_path/in."""

    def settings(output="out", **changes):
        values = {
            "name": "mine",
            "paths": (str(tmp_path / "in/**/*"),),
            "num_chunks": 3,
            "validation_share": 0.02,
            "seed": SEED,
        }
        values |= {"final_dir": str(tmp_path / output), "tmp_dir": str(tmp_path / f"tmp-{output}"), "memory": 100 * MB}
        return ShuffleConfig(**(values | changes))

    return settings


def read_back(folder):
    """The output files of a shuffle by name, and nothing else that may be there."""
    names = sorted(path.name for path in folder.iterdir())
    assert names.pop() == "shuffle.json"
    return {name: (folder / name).read_bytes() for name in names}


def naive(corpus, num_chunks, share, seed=SEED, change=lambda key: key):
    """The same by sorting a list: an independent statement of what the result is."""

    def mix(value):
        for factor, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
            value = (value ^ (value >> shift)) * factor % 2**64
        return value ^ (value >> 31)

    rows = []
    for name, lines in sorted(corpus.items(), key=lambda item: item[0].split("/")):
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()
        low, high = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        rows += [(change(mix(mix((low + row) % 2**64) ^ high)), line) for row, line in enumerate(lines)]
    rows.sort(key=lambda row: row[0])  # stable
    threshold = int(share * 2**64)
    edges = [0] * (threshold > 0) + [threshold + (2**64 - threshold) * chunk // num_chunks for chunk in range(num_chunks + 1)]
    names = ["val"] * (threshold > 0) + [f"chunk.{chunk:02d}" for chunk in range(num_chunks)]
    return {
        f"mine.{name}.jsonl": b"".join(line + b"\n" for key, line in rows if low <= key < high)
        for name, (low, high) in zip(names, itertools.pairwise(edges), strict=True)
    }


@pytest.mark.parametrize(
    ("memory", "workers"), [(100 * MB, 1), (4 * MB, 1), (1 * MB, 1), (3 * MB, 3)], ids=lambda value: str(value)
)
def test_the_result_is_a_sort_whatever_the_memory_and_the_workers(tmp_path, make, corpus, memory, workers):
    settings = make(memory=memory, workers=workers)
    assert shuffle(settings) == tmp_path / "out"
    assert read_back(tmp_path / "out") == naive(corpus, 3, 0.02)
    assert list(Path(settings.tmp_dir).iterdir()) == []
    manifest = json.loads((tmp_path / "out" / "shuffle.json").read_text())
    assert (manifest["rows"], manifest["skipped"], manifest["settings"]) == (7000, 0, to_dict(settings))
    assert {name: facts["rows"] for name, facts in manifest["files"].items()} == FILES
    for name, content in read_back(tmp_path / "out").items():
        facts = {"rows": content.count(b"\n"), "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert manifest["chunks"][name] == facts
    assert check(ShuffleConfig, manifest["settings"], "manifest") == settings


def test_small_memory_really_made_many_batches_and_buckets(tmp_path, make, corpus, monkeypatch):
    counts = Counter()
    for name in ("_spill", "_sorted_rows"):

        def count(*arguments, name=name, function=getattr(module, name)):
            counts[name] += 1
            return function(*arguments)

        monkeypatch.setattr(module, name, count)
    shuffle(make(output="large"))
    assert counts == {"_spill": 4, "_sorted_rows": 4}
    shuffle(make(output="small", memory=MB))
    assert counts["_spill"] > 10
    assert counts["_sorted_rows"] > 8


def test_rows_with_the_same_key_and_on_the_very_edges_of_ranges(tmp_path, make, corpus, monkeypatch):
    """32 keys for all rows, the first and the last of 16 ranges."""
    last = 2**60 - 1

    def coarse(keys):
        return keys & ~np.uint64(last) | np.where(keys & np.uint64(1), np.uint64(last), np.uint64(0))

    monkeypatch.setattr(module, "row_keys", lambda *arguments: coarse(row_keys(*arguments)))
    shuffle(make(memory=MB, validation_share=0.25))
    assert read_back(tmp_path / "out") == naive(corpus, 3, 0.25, change=lambda key: key & ~last | last * (key & 1))


def test_nothing_is_lost_or_repeated_and_another_seed_is_another_order(tmp_path, make, corpus):
    everything = Counter(line for lines in corpus.values() for line in lines)
    orders = []
    for seed in (1, 2):
        shuffle(make(output=f"out{seed}", seed=seed, validation_share=0.0))
        files = read_back(tmp_path / f"out{seed}")
        assert list(files) == [f"mine.chunk.{chunk:02d}.jsonl" for chunk in range(3)]
        orders.append(b"".join(files.values()).removesuffix(b"\n").split(b"\n"))
        assert Counter(orders[-1]) == everything
    assert orders[0] != orders[1]


def test_positions_are_uniform(tmp_path, make, corpus):
    """The bounds are of chi-square at one in ten thousand, for a fixed seed."""
    shuffle(make(num_chunks=20, validation_share=0.05))
    files = read_back(tmp_path / "out")
    rows = [[json.loads(line)["id"] for line in content.splitlines()] for content in files.values()]
    sizes = np.array([len(part) for part in rows])
    expected = 7000 * np.array([0.95 / 20] * 20 + [0.05])  # the validation file comes last
    assert ((sizes - expected) ** 2 / expected).sum() < 52.4  # 20 degrees of freedom
    order = list(itertools.chain.from_iterable([rows[-1], *rows[:-1]]))
    position = {row: place for place, row in enumerate(order)}
    for name, count in FILES.items():
        places = np.array([position[f"{name}-{row}"] for row in range(count)])
        cells = np.histogram(places, bins=16, range=(0, 7000))[0]
        assert ((cells - count / 16) ** 2 / (count / 16)).sum() < 44.3, name  # 15 degrees of freedom
        quarters = np.histogram2d(np.arange(count), places, bins=4, range=((0, count), (0, 7000)))[0]
        assert ((quarters - count / 16) ** 2 / (count / 16)).sum() < 44.3, name  # early rows are not early
    assert len(set(np.concatenate([row_keys(SEED, name, np.arange(1000, dtype=np.uint64)) for name in FILES]).tolist())) == 4000


def kill_at(moment, settings):
    """Shuffle in a child that dies by SIGKILL: before its n-th operation on the disk, or after so many seconds."""

    def act():
        left = moment

        def hook(event, arguments):
            nonlocal left
            if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        if isinstance(moment, int):
            sys.addaudithook(hook)
        shuffle(settings)
        os._exit(0)

    child = FORK.Process(target=act)
    child.start()
    child.join(moment if isinstance(moment, float) else None)
    child.kill()
    child.join()
    return child.exitcode


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, make, corpus, workers):
    rng, expected, codes = random.Random(f"{SEED}/{workers}"), naive(corpus, 3, 0.02), Counter()
    begin = time.monotonic()
    assert kill_at(1_000_000, make(memory=2 * MB, workers=workers)) == 0
    whole_s = time.monotonic() - begin
    moments = [rng.randrange(10, 250 if workers == 1 else 40) for _ in range(7 if workers == 1 else 1)]
    moments += [rng.uniform(0.1, 0.8) * whole_s for _ in range(5 if workers == 1 else 2)]
    for number, moment in enumerate(moments):
        settings = make(output=f"out{number}", memory=2 * MB, workers=workers)
        codes[kill_at(moment, settings)] += 1
        if rng.random() < 0.5:
            codes[kill_at(rng.randrange(10, 40), settings)] += 1
        shuffle(make(output=f"out{number}", memory=rng.choice([1, 3, 9]) * MB))  # with other memory than it began
        what = f"seed {SEED}, killed at {moment}"
        assert read_back(tmp_path / f"out{number}") == expected, what
        assert list((tmp_path / f"tmp-out{number}").iterdir()) == [], what
    assert set(codes) <= {0, -signal.SIGKILL}, f"seed {SEED}: {codes}"
    assert codes[-signal.SIGKILL] >= len(moments) // 3, f"seed {SEED}: {codes}"


def test_before_every_operation_on_the_disk(tmp_path, make):
    """The whole row of deaths, one operation later each time, on a small corpus."""
    (tmp_path / "in").mkdir()
    lines = {"a.jsonl": make_lines("a", 40)}
    (tmp_path / "in" / "a.jsonl").write_bytes(b"\n".join(lines["a.jsonl"]))
    settings = make(num_chunks=1, validation_share=0.2)
    expected, moment = naive(lines, 1, 0.2), 0
    while True:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "tmp-out", ignore_errors=True)
        code = kill_at(moment, settings)
        assert code in (0, -signal.SIGKILL), f"before operation {moment}"
        shuffle(settings)
        assert read_back(tmp_path / "out") == expected, f"killed before operation {moment}"
        assert list((tmp_path / "tmp-out").iterdir()) == [], f"killed before operation {moment}"
        if code == 0:
            break
        moment += 1
    assert moment > 40


def test_what_is_finished_is_not_made_again(tmp_path, make, corpus, monkeypatch):
    settings = make(clear_tmp=False)
    shuffle(settings)
    kept = {path.suffix for path in (tmp_path / "tmp-out" / "mine.shuffle").iterdir()}
    assert kept == {".spill", ".chunk", ".json", ""}
    for name in ("_scatter", "_gather"):
        monkeypatch.setattr(module, name, None)
    shuffle(settings)
    (tmp_path / "out" / "shuffle.json").unlink()
    shuffle(settings)
    assert read_back(tmp_path / "out") == naive(corpus, 3, 0.02)
    monkeypatch.undo()
    (tmp_path / "out" / "shuffle.json").unlink()
    (tmp_path / "out" / "mine.chunk.01.jsonl").unlink()
    shuffle(make(clear_tmp=False))
    assert read_back(tmp_path / "out") == naive(corpus, 3, 0.02)
    shuffle(make())  # only clears
    assert list((tmp_path / "tmp-out").iterdir()) == []
    shuffle(make())
    assert list((tmp_path / "tmp-out").iterdir()) == []


@pytest.mark.parametrize("change", [{"seed": 8}, {"num_chunks": 4}, {"validation_share": 0.1}, "files"], ids=str)
@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_over_the_same_folders_is_refused(tmp_path, make, corpus, change, finished):
    shuffle(make(clear_tmp=False))
    if not finished:
        (tmp_path / "out" / "shuffle.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*out/**/*") if path.name[0] != "."}
    if change == "files":
        (tmp_path / "in" / "d.jsonl").write_bytes(b"{}\n")
    key, place = ("files.d.jsonl", "out") if change == "files" else (next(iter(change)), "out")
    with pytest.raises(ConfigError, match=rf"(?s){place}.*holds another shuffle \(1 difference.*{key}: was .* is "):
        shuffle(make(clear_tmp=False, **({} if change == "files" else change)))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_chunks_of_another_shuffle_are_not_mixed_with_these(tmp_path, make, corpus):
    shuffle(make())
    (tmp_path / "out" / "shuffle.json").unlink()
    with pytest.raises(ConfigError, match=r"mine\.chunk\.00\.jsonl: is of another shuffle"):
        shuffle(make(num_chunks=2))


def test_two_at_once_are_refused(tmp_path, make, corpus):
    work = module.Work(make(), {}, tmp_path / "tmp-out" / "mine.shuffle", tmp_path / "out")
    with module._locked(work), pytest.raises(ConfigError, match="another process is shuffling here"):
        shuffle(make())


BAD = {"not json": "is not JSON", "[1]": "is no object", '{"a": 1} {"b": 2}': "is not JSON", '{"a": "\udc80"}': "is not JSON"}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_or_skipped_and_counted(tmp_path, make, corpus, line):
    bad = line.encode(errors="surrogateescape")
    corpus["a.jsonl"][1234] = bad
    (tmp_path / "in" / "a.jsonl").write_bytes(b"\n".join(corpus["a.jsonl"]))
    message = rf"in/a\.jsonl:1235: {BAD[line]}.*set on_bad_document: skip"
    for memory in (100 * MB, MB):
        with pytest.raises(ConfigError, match=message):
            shuffle(make(memory=memory))
    shuffle(make(on_bad_document="skip"))
    manifest = json.loads((tmp_path / "out" / "shuffle.json").read_text())
    assert (manifest["rows"], manifest["skipped"]) == (6999, 1)
    assert "a.jsonl:1235" in manifest["first_skipped"][0]
    expected = {name: content.replace(bad + b"\n", b"") for name, content in naive(corpus, 3, 0.02).items()}
    assert read_back(tmp_path / "out") == expected  # the others keep their numbers


def test_what_was_skipped_is_an_error_again_when_it_should_be(tmp_path, make, corpus):
    (tmp_path / "in" / "a.jsonl").write_bytes(b"x\n" + b"\n".join(corpus["a.jsonl"]))
    shuffle(make(on_bad_document="skip", clear_tmp=False))
    (tmp_path / "out" / "shuffle.json").unlink()
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: is not JSON .*An earlier attempt skipped it"):
        shuffle(make())


def test_a_truncated_archive_ends_at_the_same_line_whatever_the_memory(tmp_path, make, corpus):
    for name in ("b.jsonl.gz", "sub/c.jsonl.zst"):
        path = tmp_path / "in" / name
        path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match=r"(b\.jsonl\.gz|c\.jsonl\.zst): cannot be read past line \d+ .*truncated"):
        shuffle(make())
    results = []
    for number, memory in enumerate((100 * MB, MB)):
        shuffle(make(output=f"out{number}", memory=memory, on_bad_document="skip"))
        results.append(read_back(tmp_path / f"out{number}"))
        assert json.loads((tmp_path / f"out{number}" / "shuffle.json").read_text())["skipped"] == 2
    assert results[0] == results[1]
    whole = set(itertools.chain.from_iterable(corpus.values()))
    assert all(line in whole for content in results[0].values() for line in content.split(b"\n") if line)


def test_newlines_of_windows_blank_lines_and_a_missing_last_newline(tmp_path, make):
    (tmp_path / "in").mkdir()
    content = b'{"a": 1}\r\n\n  \r\n\r\n{"b": 2 }\r \n{"c": "\\r"}'
    (tmp_path / "in" / "a.jsonl").write_bytes(content)
    shuffle(make(num_chunks=1, validation_share=0.0))
    lines = read_back(tmp_path / "out")["mine.chunk.00.jsonl"].splitlines(keepends=True)
    assert sorted(line for line in lines) == sorted([b'{"a": 1}\n', b'{"b": 2 }\r', b" \n", b'{"c": "\\r"}\n'])


def test_plain_text_becomes_json_lines(tmp_path, make):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("one\n\ntwo 語\n", encoding="utf-8")
    (tmp_path / "in" / "b.txt.gz").write_bytes(gzip.compress(b"three\n\nfour"))
    for documents, texts in (("file", 2), ("paragraph", 4)):
        shuffle(make(output=documents, documents=documents, num_chunks=1, validation_share=0.0))
        (content,) = read_back(tmp_path / documents).values()
        found = [json.loads(line) for line in content.splitlines()]
        assert len(found) == texts
        assert all(list(record) == ["text"] for record in found)
        assert sorted("".join(record["text"] for record in found)) == sorted("one\n\ntwo 語\nthree\n\nfour")
    (tmp_path / "in" / "a.txt").write_text("x" * 100_000)
    with pytest.raises(ConfigError, match="too much plain text"):
        shuffle(make(memory=MB))


def test_a_line_that_does_not_fit_is_named_and_one_that_just_fits_is_not(tmp_path, make, corpus):
    fits, too_long = (json.dumps({"text": "x" * size}).encode() for size in (480_000, 600_000))
    corpus["d.jsonl"] = [*make_lines("d", 5), fits, *make_lines("e", 5), fits[:-2] + b'y"}', b"{}"]
    (tmp_path / "in" / "d.jsonl").write_bytes(b"\n".join(corpus["d.jsonl"]))
    shuffle(make(memory=MB))
    assert read_back(tmp_path / "out") == naive(corpus, 3, 0.02)
    corpus["d.jsonl"][5] = too_long
    (tmp_path / "in" / "d.jsonl").write_bytes(b"\n".join(corpus["d.jsonl"]))
    with pytest.raises(ConfigError, match=r"d\.jsonl:6: a line of more than 500,000 bytes does not fit.*more memory"):
        shuffle(make(output="other", memory=MB))
    shuffle(make(output="other", memory=2 * MB))
    assert read_back(tmp_path / "other") == naive(corpus, 3, 0.02)


def test_what_cannot_be_begun_is_said_at_once(tmp_path, make, corpus):
    with pytest.raises(ConfigError, match=r"paths: .*none.* matches no file"):
        shuffle(make(paths=("none/*.jsonl",)))
    (tmp_path / "file").write_text("")
    for key in ("final_dir", "tmp_dir"):
        with pytest.raises(ConfigError, match=r"file/below.* cannot be written \(Not a directory\)"):
            shuffle(make(**{key: str(tmp_path / "file" / "below")}))
    with pytest.raises(ConfigError, match=r"memory: is 1,500,000 bytes; each of 2 worker"):
        shuffle(make(memory=1_500_000, workers=2))
    with pytest.raises(ConfigError, match="Keep inputs and outputs apart"):
        shuffle(make(final_dir=str(tmp_path / "in")))
    with pytest.raises(ConfigError, match=r"none of 7,000 documents would be in it.*fewer chunks"):
        shuffle(make(num_chunks=7000))
    (tmp_path / "in" / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"empty\.jsonl: is an empty file.*skip"):
        shuffle(make(output="other"))


def full_disk(settings, report):
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    try:
        shuffle(settings)
    except ConfigError as error:
        report.write_text(str(error))


def test_a_full_disk_is_said_and_what_is_finished_is_kept(tmp_path, make, corpus):
    child = FORK.Process(target=full_disk, args=(make(), tmp_path / "report"))
    child.start()
    child.join()
    assert "cannot be read or written (File too large). What is finished is kept" in (tmp_path / "report").read_text()
    assert not list((tmp_path / "tmp-out").rglob("*.partial"))
    shuffle(make())
    assert read_back(tmp_path / "out") == naive(corpus, 3, 0.02)


def test_a_copy_that_reads_back_differently_is_not_taken(tmp_path, make, corpus, monkeypatch):
    fadvise = os.posix_fadvise

    def spoil(descriptor, *arguments):
        os.pwrite(descriptor, b"?", 100)
        fadvise(descriptor, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "posix_fadvise", spoil)
        with pytest.raises(ConfigError, match=r"mine\.\w+.*\.jsonl: reads back other bytes than were written"):
            shuffle(make())
    assert list((tmp_path / "out").iterdir()) == []
    shuffle(make())
    assert read_back(tmp_path / "out") == naive(corpus, 3, 0.02)


def test_a_truncated_spill_and_a_file_that_changes_are_noticed(tmp_path, make, corpus, monkeypatch):
    ship = module._ship
    monkeypatch.setattr(module, "_ship", None)
    with pytest.raises(TypeError):
        shuffle(make())
    monkeypatch.setattr(module, "_ship", ship)
    for spill in (tmp_path / "tmp-out").rglob("*.spill"):
        os.truncate(spill, spill.stat().st_size - 5)
    for chunk in (tmp_path / "tmp-out").rglob("*.chunk"):
        chunk.unlink()
    with pytest.raises(ConfigError, match=r"spill: is truncated"):
        shuffle(make())
    read = module._read_lines

    def touch(path, *arguments):
        yield from read(path, *arguments)
        os.utime(path)

    monkeypatch.setattr(module, "_read_lines", touch)
    with pytest.raises(ConfigError, match=r"was changed while it was read"):
        shuffle(make(output="other"))


@pytest.mark.parametrize(("text", "size"), [("4 GB", 4 * 10**9), ("1.5MB", 1_500_000), ("2 GiB", 2**31), (7, 7), ("12 B", 12)])
def test_sizes_are_read(text, size):
    assert module.parse_bytes(text) == size


def test_the_command_reads_its_file_and_words(tmp_path, corpus, capsys):
    values = {"name": "mine", "paths": [f"{tmp_path}/in/**/*"], "final_dir": f"{tmp_path}/out", "tmp_dir": f"{tmp_path}/tmp"}
    (tmp_path / "shuffle.yaml").write_text(yaml.safe_dump(values | {"memory": "4 MB", "seed": SEED}))
    main(tmp_path / "shuffle.yaml", ["num_chunks=3", "validation_share=0.02"])
    assert read_back(tmp_path / "out") == naive(corpus, 3, 0.02)
    assert "7,000 documents" in capsys.readouterr().out
    for word in ("memory=4", "memory=lots", "memory=true"):
        with pytest.raises(ConfigError, match="memory"):
            main(tmp_path / "shuffle.yaml", [word])


def test_tables_become_json_lines_of_their_text_whatever_the_memory(tmp_path, make):
    texts = [f"{n} " + " ".join(WORDS[n : n + 30]) for n in range(4000)]
    (tmp_path / "in").mkdir()
    parquet.write_table(pyarrow.table({"text": texts[:2500], "id": range(2500)}), tmp_path / "in" / "a.parquet")
    with (tmp_path / "in" / "b.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", "text"], *enumerate(texts[2500:])])
    outputs = [shuffle(make(f"out{n}", memory=memory)) for n, memory in enumerate((2 * MB, 100 * MB))]
    chunks = [{path.name: path.read_bytes() for path in output.glob("*.jsonl")} for output in outputs]
    assert chunks[0] == chunks[1]
    lines = [json.loads(line) for content in chunks[0].values() for line in content.splitlines()]
    assert sorted(line["text"] for line in lines) == sorted(texts)
    assert {tuple(line) for line in lines} == {("text",)}
