"""Text to a dataset folder and back, whole or not at all."""

import fcntl
import gzip
import hashlib
import itertools
import json
from collections import Counter

import numpy as np
import pytest
from backports import zstd
from preparing import TEXTS, contents, is_whole, write_lines

from franca.core.config import check, to_dict
from franca.core.errors import ConfigError
from franca.data import prepare as module
from franca.data import tokenize
from franca.data.indexed import Dataset, Shard
from franca.data.prepare import PrepareConfig, TokenizerConfig, is_held_out, main, prepare
from franca.data.sources import CorpusConfig
from franca.data.tokenizer import Tokenizer


def read_back(root, split, source="mine"):
    """The documents of a split, decoded, each without its EOS."""
    tokenizer = Tokenizer.load(root / "tokenizer.json")
    texts = []
    for shard in Dataset(root).shards(split, source):
        begins = [*shard.boundaries(0, shard.num_tokens), shard.num_tokens]
        for begin, end in itertools.pairwise(begins):
            *ids, last = shard.read(begin, end - begin).tolist()
            assert last == tokenizer.eos
            assert tokenizer.eos not in ids
            texts.append(tokenizer.decode(ids))
    return texts


def test_documents_come_back_byte_for_byte_in_order(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    root = prepare(make("*.jsonl"))
    held_out = [text for text in TEXTS if is_held_out(text, 0.2)]
    assert 20 < len(held_out) < 60
    assert read_back(root, "validation") == held_out
    assert read_back(root, "train") == [text for text in TEXTS if not is_held_out(text, 0.2)]


@pytest.mark.parametrize("shard_tokens", [1, 100, 10**9])
def test_small_shards_hold_the_same_documents(tmp_path, make, shard_tokens):
    texts = TEXTS[:40]
    write_lines(tmp_path / "a.jsonl", texts)
    root = prepare(make("*.jsonl", shard_tokens=shard_tokens))
    entry = Dataset(root).manifest["sources"]["mine"]
    assert read_back(root, "train") == [text for text in texts if not is_held_out(text, 0.2)]
    for split in ("train", "validation"):
        shards = Dataset(root).shards(split, "mine")
        names = [shard["name"] for shard in entry[split]["shards"]]
        assert names == [shard.prefix.name for shard in shards]
        assert sorted(names) == names == sorted(path.stem for path in (root / split / "mine").glob("*.idx"))
        assert [shard["tokens"] for shard in entry[split]["shards"]] == [shard.num_tokens for shard in shards]
        assert all(shard.num_tokens >= shard_tokens for shard in shards[:-1])
        assert all(shard.boundaries(0, shard.num_tokens)[-1] < shard_tokens for shard in shards)  # ends with its last document
    assert (len(entry["train"]["shards"]) == 1) == (shard_tokens == 10**9)


def shard_hash(prefix):
    shard = Shard(prefix)
    begins = [*shard.boundaries(0, shard.num_tokens), shard.num_tokens]
    return hashlib.sha256(shard.bin_path.read_bytes() + np.diff(begins).astype(np.int32).tobytes()).hexdigest()


def test_the_manifest_counts_what_is_there(tmp_path, make, tokenizer_path):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    root = prepare(make("*.jsonl"))
    manifest = Dataset(root).manifest
    tokenizer = Tokenizer.load(tokenizer_path)
    (record,) = (root / "units").glob("*.json")
    for split, chosen in (("train", False), ("validation", True)):
        texts = [text for text in TEXTS if is_held_out(text, 0.2) == chosen]
        sizes = [len(ids) for ids in tokenizer.encode(texts, eos=True)]
        powers = [sum(2**n // 2 <= size < 2**n for size in sizes) for n in range(max(sizes).bit_length() + 1)]
        found = manifest["sources"]["mine"][split]
        name = f"{record.stem}-000"
        assert found["shards"] == [{"name": name, "tokens": sum(sizes), "sha256": shard_hash(root / split / "mine" / name)}]
        expected = {
            "documents": len(texts),
            "tokens": sum(sizes),
            "bytes": sum(len(text.encode()) for text in texts),
            "lengths": powers,
        }
        assert {key: found[key] for key in expected} == expected
    assert (manifest["sources"]["mine"]["skipped"], manifest["sources"]["mine"]["first_skipped"]) == (0, [])
    facts = {"sha256": tokenizer.fingerprint, "vocab_size": 300, "bos": None, "eos": tokenizer.eos}
    assert manifest["tokenizer"] == facts
    assert Dataset(root).shards("train", "mine")[0].dtype == np.uint16
    assert (root / "tokenizer.json").read_text(encoding="utf-8") == tokenizer.json


def test_plain_gzip_and_zstandard_files_give_the_same_shards(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    data = (tmp_path / "a.jsonl").read_bytes()
    compress = zstd.compress
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.jsonl.zst").write_bytes(compress(data[:999]) + compress(data[999:]))
    roots = [prepare(make(name, output=f"out-{name}")) for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst")]
    for kind in ("bin", "idx"):
        found = {next((root / "train" / "mine").glob(f"*-000.{kind}")).read_bytes() for root in roots}
        assert len(found) == 1


def test_batches_of_the_tokenizer_leave_no_trace(tmp_path, make, monkeypatch):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    whole = prepare(make("*.jsonl", output="whole"))
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 100)
    assert contents(prepare(make("*.jsonl", output="parts"))) == contents(whole)


def test_the_held_out_set_depends_on_no_order_and_no_other_file(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    write_lines(tmp_path / "b.jsonl", TEXTS[::-1])
    write_lines(tmp_path / "c.jsonl", ["another", *TEXTS[:100]])
    write_lines(tmp_path / "d.jsonl", TEXTS[100:])
    one, backwards = prepare(make("a.jsonl", output="one")), prepare(make("b.jsonl", output="backwards"))
    both = prepare(make("c.jsonl", "d.jsonl", output="both"))
    held_out = Counter(read_back(one, "validation"))
    assert held_out == Counter(read_back(backwards, "validation"))
    assert Counter(read_back(both, "validation")) - Counter(["another"]) == held_out


def test_a_larger_share_holds_out_more_of_the_same():
    shares = [{text for text in TEXTS if is_held_out(text, share)} for share in (0.0, 0.1, 0.5, 1.0)]
    assert [len(shares[0]), len(shares[3])] == [0, len(TEXTS)]
    assert shares[0] < shares[1] < shares[2] < shares[3]
    assert is_held_out("x", 0.1) == is_held_out("x", 0.1)


def test_no_share_holds_nothing_out(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    root = prepare(make("*.jsonl", validation_share=0.0))
    assert read_back(root, "train") == TEXTS
    assert Dataset(root).shards("validation", "mine") == []


def test_eos_can_be_left_out_and_empty_documents_are_counted_but_hold_no_tokens(tmp_path, make, tokenizer_path):
    write_lines(tmp_path / "a.jsonl", ["one", "", "two"])
    root = prepare(make("*.jsonl", validation_share=0.0, add_eos=False))
    (shard,) = Dataset(root).shards("train", "mine")
    expected = np.concatenate(Tokenizer.load(tokenizer_path).encode(["one", "two"]))
    assert shard.read(0, shard.num_tokens).tolist() == expected.tolist()
    assert (shard.num_documents, Dataset(root).manifest["sources"]["mine"]["train"]["documents"]) == (3, 3)
    assert Dataset(root).manifest["tokenizer"]["eos"] is None


def test_corpora_lie_side_by_side(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", TEXTS[:50])
    (tmp_path / "b.txt").write_text("\n\n".join(TEXTS[50:90]), encoding="utf-8")
    lines, text = (CorpusConfig(paths=(str(tmp_path / name),), documents="paragraph") for name in ("a.jsonl", "b.txt"))
    root = prepare(make(sources={"lines": lines, "text": text}, validation_share=0.0))
    assert read_back(root, "train", "lines") == TEXTS[:50]
    assert "".join(read_back(root, "train", "text")) == "\n\n".join(TEXTS[50:90])


def test_a_bad_document_stops_the_preparation_and_leaves_no_dataset(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("not json\n")
    message = rf"a\.jsonl:{len(TEXTS) + 1}: is not JSON .*set on_bad_document: skip"
    with pytest.raises(ConfigError, match=message):
        prepare(make("*.jsonl", shard_tokens=100))
    assert not is_whole(tmp_path / "out")
    for tokenizer in (TokenizerConfig(vocab_size=300), TokenizerConfig(path="none.json")):
        with pytest.raises(ConfigError, match=r"is not JSON|cannot be read"):
            prepare(make("*.jsonl", tokenizer=tokenizer))
        assert not is_whole(tmp_path / "out")


def test_after_a_failure_the_next_attempt_leaves_nothing_of_it(tmp_path, make, monkeypatch):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    whole = prepare(make("*.jsonl", output="whole"))
    monkeypatch.setattr(tokenize, "BATCH_CHARACTERS", 500)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("not json\n")
    with pytest.raises(ConfigError):
        prepare(make("*.jsonl", shard_tokens=1000))
    assert not list((tmp_path / "out" / "units").glob("*.partial"))
    write_lines(tmp_path / "a.jsonl", TEXTS)
    assert contents(prepare(make("*.jsonl"))) == contents(whole)


def spoil(tmp_path):
    """One good file and three bad ones with five bad documents."""
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").write_text('not json\n{"text": "good"}\n[]\n{"no": "text"}\n')
    (tmp_path / "c.jsonl").touch()
    packed = gzip.compress("".join(json.dumps({"text": str(pow(3, 2000 + n))}) + "\n" for n in range(50)).encode())
    (tmp_path / "d.jsonl.gz").write_bytes(packed[:-5000])


def test_skipped_documents_are_counted_with_their_reasons(tmp_path, make):
    spoil(tmp_path)
    root = prepare(make("*.jsonl*", on_bad_document="skip"))
    entry = Dataset(root).manifest["sources"]["mine"]
    assert entry["skipped"] == len(entry["first_skipped"]) == 5
    places = ["b.jsonl:1: is not JSON", "b.jsonl:3: has no text", "b.jsonl:4: has no text", "c.jsonl: is an empty file"]
    for reason, place in zip(entry["first_skipped"], [*places, "d.jsonl.gz: cannot be read past line"], strict=True):
        assert reason.startswith(str(tmp_path / place))
    found = read_back(root, "train") + read_back(root, "validation")
    assert {*TEXTS, "good"} <= set(found)


@pytest.mark.parametrize(
    ("name", "message"), [("b.jsonl", "b.jsonl:1"), ("c.jsonl", "empty file"), ("d.jsonl.gz", "cannot be read")]
)
def test_each_kind_of_bad_file_is_refused_without_skip(tmp_path, make, name, message):
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=message):
        prepare(make(name))
    assert not is_whole(tmp_path / "out")


def times(root):
    """The inode and the time of change of every file below `root` that no run should touch without a reason."""
    files = [path for pattern in ("train/**/*", "validation/**/*", "units/*.json") for path in root.glob(pattern)]
    return {str(path.relative_to(root)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files if path.is_file()}


@pytest.mark.parametrize("tokenizer", [None, TokenizerConfig(vocab_size=300)], ids=["given", "trained"])
def test_a_second_run_finds_it_prepared(tmp_path, make, capsys, tokenizer):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    settings = make("*.jsonl", **({"tokenizer": tokenizer} if tokenizer else {}))
    root = prepare(settings)
    before, content = times(root), {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert prepare(settings) == root
    assert "is already prepared from the same files and settings" in capsys.readouterr().err
    assert times(root) == before
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == content


@pytest.mark.parametrize(
    "change",
    [
        {"validation_share": 0.3},
        {"add_eos": False},
        {"shard_tokens": 400},
        {"corpus": {"field": "text"}},
        {"on_bad_document": "skip"},
        {"tokenizer": TokenizerConfig(vocab_size=320)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_with_the_same_output_make_it_anew(tmp_path, make, change):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    before = contents(prepare(make("*.jsonl")))
    fresh = prepare(make("*.jsonl", output="fresh", **change))
    root = prepare(make("*.jsonl", **change))
    assert contents(root) == contents(fresh) != before
    assert is_whole(root)


def test_a_foreign_folder_or_file_at_the_output_is_refused(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "manifest.json").write_text("{}")
    (tmp_path / "file").touch()
    for output in ("full", "file"):
        with pytest.raises(ConfigError, match=f"{output}: exists and is no dataset of franca"):
            prepare(make("*.jsonl", output=output))
    assert {path.name for path in tmp_path.rglob("*")} == {"a.jsonl", "full", "manifest.json", "file"}


def test_two_preparations_of_one_output_at_a_time_are_refused(tmp_path, make, monkeypatch):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    root = prepare(make("*.jsonl"))
    before = contents(root)
    monkeypatch.setattr(module, "KILLED_S", 0.2)
    with open(root / "units" / ".lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="out: another process is preparing it"):
            prepare(make("*.jsonl", add_eos=False))
        assert contents(root) == before
    prepare(make("*.jsonl", add_eos=False))


def test_a_tokenizer_is_trained_on_the_training_documents_only(tmp_path, make):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    root = prepare(make("*.jsonl", tokenizer=TokenizerConfig(vocab_size=320)))
    expected = Tokenizer.train(iter([text for text in TEXTS if not is_held_out(text, 0.2)]), 320)
    assert (root / "tokenizer.json").read_text(encoding="utf-8") == expected.json
    assert read_back(root, "train") == [text for text in TEXTS if not is_held_out(text, 0.2)]


def test_a_tokenizer_learns_from_the_beginning_of_a_document_longer_than_its_limit(tmp_path, make):
    book = " ".join(TEXTS)
    (tmp_path / "a.txt").write_text(book, encoding="utf-8")
    wanted = TokenizerConfig(vocab_size=300, train_bytes=2000)
    root = prepare(make("a.txt", tokenizer=wanted, validation_share=0.0))
    beginning = book.encode()[:2000].decode(errors="ignore")
    assert (root / "tokenizer.json").read_text(encoding="utf-8") == Tokenizer.train(iter([beginning]), 300).json
    assert Dataset(root).manifest["tokenizer"]["vocab_size"] == 300


def test_where_everything_is_held_out_there_is_nothing_to_learn_or_train_on(tmp_path, make):
    held_out = [text for text in TEXTS if is_held_out(text, 0.2)]
    write_lines(tmp_path / "a.jsonl", held_out)
    with pytest.raises(ConfigError, match="no training text to learn it from"):
        prepare(make("*.jsonl", tokenizer=TokenizerConfig(vocab_size=300)))
    with pytest.raises(
        ConfigError, match=rf"no training tokens came out of 1 file\(s\), {len(held_out)} document\(s\) were held"
    ):
        prepare(make("*.jsonl"))
    assert not is_whole(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": {}}, r"sources: dictionary should have at least 1 item"),
        ({"sources": {"../up": CorpusConfig(paths=("a",))}}, r"sources.*: string should match pattern .* got '\.\./up'"),
        ({"sources": {".hidden": CorpusConfig(paths=("a",))}}, r"sources.*: string should match pattern .* got '\.hidden'"),
        ({"validation_share": 1.0}, r"validation_share: input should be less than 1, got 1\.0"),
        ({"validation_share": -0.1}, r"validation_share: input should be greater than or equal to 0, got -0\.1"),
        ({"shard_tokens": 0}, "shard_tokens: input should be greater than or equal to 1, got 0"),
        (
            {"tokenizer": TokenizerConfig(vocab_size=256)},
            r"tokenizer\.vocab_size: input should be greater than or equal to 257, got 256",
        ),
        (
            {"tokenizer": TokenizerConfig(train_bytes=0)},
            r"tokenizer\.train_bytes: input should be greater than or equal to 1, got 0",
        ),
        ({"add_bos": True}, "this tokenizer has no BOS token; set add_bos: false"),
    ],
)
def test_settings_that_make_no_dataset_are_refused(tmp_path, make, change, message):
    write_lines(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ConfigError, match=message):
        prepare(check(PrepareConfig, to_dict(make("a.jsonl", **change)), "data.yaml"))
    assert not is_whole(tmp_path / "out")


def test_a_pattern_without_a_file_is_refused(tmp_path, make):
    with pytest.raises(ConfigError, match=r"sources\.mine\.paths: '.*none\*' matches no file"):
        prepare(make("none*"))


def test_the_command_reports_what_it_made(tmp_path, make, capsys):
    spoil(tmp_path)
    run_file = tmp_path / "data.yaml"
    run_file.write_text(
        f"output: {tmp_path}/out\nsources: {{mine: {{paths: ['{tmp_path}/*.jsonl']}}}}\ntokenizer: {{vocab_size: 300}}\n"
    )
    main(run_file, ["validation_share=0.2", "on_bad_document=skip"])
    entry = Dataset(tmp_path / "out").manifest["sources"]["mine"]
    printed = capsys.readouterr().out
    assert f"{tmp_path}/out: tokenizer of 300 tokens" in printed
    for split in ("train", "validation"):
        counts = entry[split]
        assert f"mine {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens in 1 shard(s)" in printed
    assert f"mine: 4 bad document(s) skipped, the first: {tmp_path}/b.jsonl:1: is not JSON" in printed
