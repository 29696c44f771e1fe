"""What others write is read, and what is written here equals what they write: datatrove, and the byte layout itself."""

import json
import struct

import numpy as np
import pytest
from datatrove.executor.local import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import MegatronDocumentTokenizer

from franca.core.errors import ConfigError
from franca.core.schedule import Stage, Timeline
from franca.data.indexed import HEADER, MAGIC, Dataset, Shard, ShardWriter
from franca.data.loader import DataConfig, Loader, Megatron2021Config, SourceConfig, open_plan, validation_sets
from franca.data.prepare import PrepareConfig, TokenizerConfig, prepare
from franca.data.sources import CorpusConfig
from franca.data.tokenizer import END_OF_TEXT, Tokenizer

TEXTS = [f"{number} Häuser, 語 and {number * number} more\n" * (1 + number % 7) for number in range(300)]


def read_layout(prefix):
    """Documents of a `.bin/.idx` pair, by the layout alone; none of franca's code."""
    index, tokens = prefix.with_suffix(".idx").read_bytes(), prefix.with_suffix(".bin").read_bytes()
    assert index[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, bounds = struct.unpack("<QBQQ", index[9:34])
    assert (version, bounds) == (1, sequences + 1)
    kind = {4: "i", 8: "H"}[code]
    lengths = struct.unpack(f"<{sequences}i", index[34 : 34 + 4 * sequences])
    offsets = struct.unpack(f"<{sequences}q", index[34 + 4 * sequences : 34 + 12 * sequences])
    assert struct.unpack(f"<{bounds}q", index[34 + 12 * sequences :]) == tuple(range(bounds))
    size = struct.calcsize(f"<{kind}")
    pieces = zip(lengths, offsets, strict=True)
    return [struct.unpack(f"<{length}{kind}", tokens[offset : offset + size * length]) for length, offset in pieces]


@pytest.mark.parametrize("vocab_size", [300, 70_000])
def test_datatrove_writes_the_same_bytes_and_both_are_read_by_the_layout(tmp_path, vocab_size, capfd):
    tokenizer = Tokenizer.train(iter(TEXTS), 300)
    tokens = json.loads(tokenizer.json)
    tokens["model"]["vocab"] |= {f"unused {n}": n for n in range(300, vocab_size)}  # 70,000 ids do not fit into 16 bits
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokens))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    steps = [
        JsonlReader(str(tmp_path / "in")),
        MegatronDocumentTokenizer(str(tmp_path / "theirs"), "x", str(tmp_path / "tokenizer.json"), END_OF_TEXT),
    ]
    LocalPipelineExecutor(steps, tasks=1, logging_dir=str(tmp_path / "logs")).run()
    capfd.readouterr()  # it talks
    (theirs,) = (path.with_suffix("") for path in (tmp_path / "theirs").rglob("*.bin"))
    path = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
    corpus = CorpusConfig(paths=(str(tmp_path / "in" / "*.jsonl"),))
    root = prepare(PrepareConfig(output=str(tmp_path / "out"), sources={"x": corpus}, tokenizer=path, validation_share=0.0))
    (ours,) = Dataset(root).shards("train", "x")
    assert ours.bin_path.read_bytes() == theirs.with_suffix(".bin").read_bytes()
    assert ours.idx_path.read_bytes() == theirs.with_suffix(".idx").read_bytes()
    documents = read_layout(ours.prefix)
    assert documents == read_layout(theirs)
    written = Tokenizer.load(root / "tokenizer.json")
    assert [written.decode(document[:-1]) for document in documents] == TEXTS
    read = Shard(theirs)
    assert read.dtype == (np.uint16 if vocab_size == 300 else np.int32)
    assert read.tokens.tolist() == [token for document in documents for token in document]


def write_pair(prefix, code, dtype, documents):
    """A pair as Megatron's builders write it, with any dtype code."""
    lengths = np.array([len(document) for document in documents], np.int32)
    offsets = (np.cumsum(lengths, dtype=np.int64) - lengths) * np.dtype(dtype).itemsize
    bounds = np.arange(len(documents) + 1, dtype=np.int64)
    prefix.with_suffix(".bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    header = HEADER.pack(MAGIC, 1, code, len(documents), len(bounds))
    prefix.with_suffix(".idx").write_bytes(header + lengths.tobytes() + offsets.tobytes() + bounds.tobytes())
    return Shard(prefix)


@pytest.mark.parametrize(
    ("code", "dtype"),
    [(1, "u1"), (2, "i1"), (3, "i2"), (4, "i4"), (5, "i8"), (6, "f8"), (7, "f4"), (7, "f8"), (8, "u2")],
)
def test_every_dtype_code_is_read_and_seven_by_its_width(tmp_path, code, dtype):
    """Code 7 is float32 to Megatron-LM and float64 to Megatron-DeepSpeed; the file's length tells."""
    documents = [np.arange(1, 6), np.arange(3), np.array([7])]
    shard = write_pair(tmp_path / "x", code, dtype, documents)
    assert shard.num_tokens == 9
    assert shard.read(0, 9).astype(np.int64).tolist() == [1, 2, 3, 4, 5, 0, 1, 2, 7]
    assert shard.boundaries(0, 9) == [0, 5, 8]


def test_the_format_before_is_refused_by_name(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"")
    (tmp_path / "x.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(40))
    with pytest.raises(ConfigError, match="legacy fairseq format"):
        Shard(tmp_path / "x")


def test_a_bare_pair_of_files_is_trained_on_as_it_lies(tmp_path):
    tokenizer = Tokenizer.train(iter(TEXTS), 300)
    place = tmp_path / "tokenizer.json"
    place.write_text(tokenizer.json)
    ids = [np.append(ids, tokenizer.eos) for ids in tokenizer.encode(TEXTS)]
    writer = ShardWriter(tmp_path / "meg_text_document", np.dtype(np.uint16))
    writer.add(np.concatenate(ids), np.array([len(each) for each in ids]))
    writer.commit()
    source = SourceConfig(path=str(tmp_path / "meg_text_document"), tokenizer=str(place))
    plan = open_plan(DataConfig(sources=(source,), seq_len=16, order=Megatron2021Config(kind="megatron-2021", samples=50)))
    said = {"sha256": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size, "bos": None, "eos": tokenizer.eos}
    assert plan.tokenizer == said
    assert plan.datasets[0].tokenizer_path == place
    loader = Loader(plan.order, plan.shards, Timeline((Stage(0, 0, 5),), 16, plan.order.epoch_samples), 50)
    rows = loader.rows(0, 50).tokens_BT
    stream = np.concatenate(ids).tolist()
    assert all(token in stream for token in rows.ravel())
    assert validation_sets(plan, DataConfig(sources=(source,), seq_len=16)) == {}
    identity = plan.datasets[0].train_hash
    (tmp_path / "meg_text_document.bin").write_bytes(np.concatenate(ids)[::-1].astype(np.uint16).tobytes())
    changed = open_plan(DataConfig(sources=(source,), seq_len=16)).datasets[0]
    assert changed.train_hash != identity
    assert changed.manifest["tokenizer"]["eos"] is None  # its documents do not end with it


def test_a_bare_pair_says_what_is_missing_or_wrong(tmp_path):
    place = tmp_path / "tokenizer.json"
    place.write_text(Tokenizer.train(iter(TEXTS), 300).json)
    writer = ShardWriter(tmp_path / "x", np.dtype(np.uint16))
    writer.add(np.array([5, 300]), np.array([2]))
    writer.commit()
    given = {"path": str(tmp_path / "x"), "tokenizer": str(place)}
    for source, message in (
        ({"path": given["path"]}, "does not say what its tokens mean; give `tokenizer`, a tokenizer.json"),
        (given, "holds ids from 5 to 300, but .* has 300 tokens. Give the tokenizer that it was made with"),
        (given | {"path": str(tmp_path)}, "was given a tokenizer, but there is no .*.idx to go with it"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_plan(DataConfig(sources=(SourceConfig(**source),), seq_len=1))
