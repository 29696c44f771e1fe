"""Copies found: against a dict, against all pairs, whatever the cut and the workers; searches that are killed and go on."""

import itertools
import multiprocessing
import os
import random
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup.minhash import MinhashDedupSignature
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WhitespaceTokenizer

from franca.core.errors import ConfigError
from franca.data import deduplicate as module
from franca.data.deduplicate import Task, duplicates

SPAWN = multiprocessing.get_context("spawn")
DISK = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}
VOCABULARY = ["".join(letters) for letters in itertools.product("bdfgklmn", "aeiou", "rstvz", "aeiou")]


def cut(texts, *ends):
    """Units of documents: texts up to each end, and the rest."""
    bounds = [0, *ends, len(texts)]
    return [partial(iter, texts[first:last]) for first, last in itertools.pairwise(bounds)]


def dropped(kind, units, folder, workers=1):
    """The positions that are dropped, counted through all units."""
    lengths = [sum(1 for _ in unit()) for unit in units]
    found = duplicates(kind, units, folder, workers)
    assert all(part.dtype == np.int64 for part in found)
    starts = np.cumsum([0, *lengths])
    return [int(start + position) for start, part in zip(starts, found, strict=False) for position in part]


def first_of_equals(texts):
    seen = set()
    return [number for number, text in enumerate(texts) if text in seen or seen.add(text)]


def pages(seed):
    """Unrelated texts, copies with a few of 300 words changed, copies of those, a book, and texts of few words; shuffled."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(VOCABULARY, k=300 if number < 40 else 50)) for number in range(200)]
    for number in range(60):
        words = texts[number if number < 40 else 200 + number - 40].split()
        for _ in range(rng.choice([0, 1, 2, 3, 40])):
            words[rng.randrange(len(words))] = "changed"
        texts.append(" ".join(words).replace(" ", rng.choice([" ", "\n"])).capitalize() + rng.choice(["", "!"]))
    short = ["", "", " ", "!", "?", "yes", "Yes", "yes", "chapter 1", "chapter 2", "one two three four", "one two three four."]
    texts += [*short, "one two three four five", "one two three four five", "🎈" * 600]
    rng.shuffle(texts)
    return texts


def similarities(texts):
    """The Jaccard similarity of the 5-grams of words of every pair, one by one."""
    grams = [set(ngrams(simplify_text(text).split(), 5)) for text in texts]
    numbers = [number for number, mine in enumerate(grams) if mine]
    return {(a, b): len(grams[a] & grams[b]) / len(grams[a] | grams[b]) for a, b in itertools.combinations(numbers, 2)}


def clusters(texts, pairs):
    """Connected groups as sets of numbers."""
    group = {number: {number} for number in range(len(texts))}
    for a, b in pairs:
        joined = group[a] | group[b]
        for member in joined:
            group[member] = joined
    return {frozenset(members) for members in group.values()}


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: None)


def test_exact_is_what_a_dict_finds(tmp_path, capfd):
    rng = random.Random(1)
    texts = ["".join(rng.choices("aÄ語 \n", k=rng.randint(0, 5))) for _ in range(2000)]
    wanted = first_of_equals(texts)
    assert 500 < len(wanted) < 1900
    for number, ends in enumerate([(), (700, 700, 1500), tuple(range(200, 2000, 200))]):
        assert dropped("exact", cut(texts, *ends), tmp_path / str(number)) == wanted
    assert dropped("exact", cut(texts, 500), tmp_path / "workers", workers=2) == wanted
    assert capfd.readouterr() == ("", "")


def test_minhash_finds_what_all_pairs_find_whatever_the_cut_and_the_workers(tmp_path, capfd):
    texts = pages(2)
    likeness = similarities(texts)
    equal = [(a, b) for a, b in itertools.combinations(range(len(texts)), 2) if texts[a] == texts[b]]
    near = [pair for pair, value in likeness.items() if value >= 0.85]  # found with p > 0.98 each; these all are
    perhaps = [pair for pair, value in likeness.items() if 0.4 < value < 0.85]
    assert (len(near) > 40, len(equal) > 3) == (True, True)
    found = dropped("minhash", cut(texts), tmp_path / "whole")
    surely, at_most = clusters(texts, near + equal), clusters(texts, near + equal + perhaps)
    assert {number for group in surely for number in group if number != min(group)} <= set(found)
    assert set(found) <= {number for group in at_most for number in group if number != min(group)}
    for group in at_most:
        assert not group <= set(found)
    assert dropped("minhash", cut(texts, 10, 10, 130), tmp_path / "cut") == found
    assert dropped("minhash", cut(texts, 100), tmp_path / "workers", workers=2) == found
    assert capfd.readouterr() == ("", "")


def test_texts_of_few_words_are_copies_only_when_they_are_equal(tmp_path):
    texts = ["", "yes", "!", "Yes", "yes", "", " ", "chapter 1", "chapter 2", "one two three four", "one two three four five"]
    assert dropped("minhash", cut(texts), tmp_path) == first_of_equals(texts) == [4, 5]


def test_signatures_are_datatroves_and_windows_do_not_change_them(tmp_path, monkeypatch):
    rng = random.Random(3)
    texts = [" ".join(rng.choices([*VOCABULARY, "It's", "3,5", "(a)", "Ä\n\n", "🎈"], k=count)) for count in (5, 30, 3000)]
    task = Task("minhash", tmp_path, "signatures", 0, 1, None)
    mine = module._minhash_step(task, str(tmp_path / "mine"))
    reference = MinhashDedupSignature(str(tmp_path / "reference"), mine.config, WhitespaceTokenizer())
    for window, count in ((module.WINDOW, module.SHINGLES), (200, 64)):
        monkeypatch.setattr(module, "WINDOW", window)
        monkeypatch.setattr(module, "SHINGLES", count)
        for text in texts:
            shingles = reference.get_shingles(text)
            assert np.array_equal(mine.get_shingles(text), shingles)
            assert mine.get_signature(shingles) == reference.get_signature(shingles)
        for step in (mine, reference):
            step.run((Document(text=text, id="") for text in texts), 0, 1)
    files = sorted(path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*.sig"))
    assert len(files) == 14
    for file in files:
        assert (tmp_path / "mine" / file).read_bytes() == (tmp_path / "reference" / file).read_bytes()
    unbroken = "語" * 1000
    assert [len(part) for part in module._windows(unbroken)] == [200] * 5
    assert "".join(module._windows(texts[2])) == texts[2]


def read(texts, log, gate=None):
    """A unit that notes when it is read, and fails as long as its gate is not there."""
    with open(log, "a") as file:
        file.write("read\n")
    yield from texts
    if gate is not None and not gate.exists():
        raise ConfigError("a bad document")


@pytest.mark.parametrize("kind", ["exact", "minhash"])
def test_what_was_done_is_not_done_again(kind, tmp_path):
    texts = pages(4)[:90]
    logs = [tmp_path / "first", tmp_path / "second"]
    units = [partial(read, texts[:50], logs[0]), partial(read, texts[50:], logs[1], tmp_path / "gate")]
    with pytest.raises(ConfigError, match="a bad document"):
        duplicates(kind, units, tmp_path / "found", 1)
    (tmp_path / "gate").touch()
    found = [part.tolist() for part in duplicates(kind, units, tmp_path / "found", 1)]
    assert [log.read_text() for log in logs] == ["read\n", "read\nread\n"]
    assert found == [part.tolist() for part in duplicates(kind, units, tmp_path / "found", 1)]
    assert [log.read_text() for log in logs] == ["read\n", "read\nread\n"]
    assert [path.name for path in (tmp_path / "found").iterdir()] == [f"{kind}.npz"]
    assert found == [part.tolist() for part in duplicates(kind, cut(texts, 50), tmp_path / "again", 1)]


def _killed(kind, texts, folder, moment):
    """Search in a fork that dies by SIGKILL before its n-th change of the disk; returns how many it made."""
    counter = multiprocessing.get_context("fork").Value("q", 0)
    if not (child := os.fork()):

        def hook(event, arguments):
            if (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)) or event in DISK:
                if counter.value == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                counter.value += 1

        sys.addaudithook(hook)
        duplicates(kind, cut(texts, 20, 60), folder, 1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or moment < 0
    return counter.value


def _break(texts, folder, results):
    """Kill searches at random moments, twice each, and finish them; in a process of its own, which has no threads."""
    os.fsync = lambda file: None  # a kill loses nothing that was written
    rng = random.Random(5)
    for kind in ("exact", "minhash"):
        wanted = dropped(kind, cut(texts, 20, 60), folder / f"{kind}-whole")
        total = _killed(kind, texts, folder / f"{kind}-count", -1)
        for number in range(6):
            place, moments = folder / f"{kind}-{number}", [rng.randrange(total), rng.randrange(total // 4)]
            for moment in moments:
                if not (place / f"{kind}.npz").exists():
                    _killed(kind, texts, place, moment)
            results.put((kind, moments, dropped(kind, cut(texts, 20, 60), place) == wanted))
    results.put(None)


def test_a_search_that_was_killed_goes_on_and_finds_the_same(tmp_path):
    results = SPAWN.SimpleQueue()
    child = SPAWN.Process(target=_break, args=(pages(6)[:80], tmp_path, results))
    child.start()
    child.join()
    assert child.exitcode == 0
    found = list(iter(results.get, None))
    assert len(found) == 12
    assert [case for case in found if not case[2]] == []


def test_nothing_to_search(tmp_path):
    for kind in ("exact", "minhash"):
        assert duplicates(kind, [], tmp_path / "none", 1) == []
        assert [part.tolist() for part in duplicates(kind, cut([], 0), tmp_path / "empty", 1)] == [[], []]


def test_a_missing_package_is_named_with_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.pipeline.dedup", None)
    with pytest.raises(ConfigError, match=r"pip install 'franca\[data\]'"):
        duplicates("minhash", cut(["a"]), tmp_path, 1)
    assert [part.tolist() for part in duplicates("exact", cut(["a", "a"]), tmp_path, 1)] == [[1]]  # needs none


def test_too_many_open_files_are_refused_and_a_low_limit_is_raised(tmp_path, monkeypatch):
    limits, raised = [64, 1000], []
    monkeypatch.setattr(module.resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(module.resource, "setrlimit", lambda kind, pair: raised.append(pair))
    module._require("exact", 10)
    assert raised == [(220, 1000)]
    with pytest.raises(ConfigError, match=r"500 groups of files need 1,200 open files, 1,000 are allowed\. Raise the limit"):
        module._require("exact", 500)


def test_the_answer_is_for_its_units_alone(tmp_path):
    duplicates("exact", cut(["a", "b"]), Path(tmp_path), 1)
    with pytest.raises(AssertionError, match="belongs to other units"):
        duplicates("exact", cut(["a", "b"], 1), tmp_path, 1)
