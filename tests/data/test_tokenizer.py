"""Text to ids and back without a changed byte; special tokens only where asked for."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from franca.core.errors import ConfigError
from franca.data.tokenizer import END_OF_TEXT, Tokenizer

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
TEXT = Path(json.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(iter([TEXT]), 400)


@PROPERTY
@given(text=st.text(max_size=60))
def test_any_text_comes_back_byte_for_byte(tokenizer, text):
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.eos not in ids


def test_training_gives_the_asked_size_with_all_bytes_and_one_special_token(tokenizer):
    assert tokenizer.vocab_size == 400
    assert (tokenizer.bos, tokenizer.eos) == (None, tokenizer.backend.token_to_id(END_OF_TEXT))
    assert len(tokenizer.encode([TEXT])[0]) < 0.7 * len(TEXT)
    assert Tokenizer.train(iter([TEXT]), 400).fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(iter([TEXT]), 399).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("text", [END_OF_TEXT, f"a{END_OF_TEXT}b", f" {END_OF_TEXT}\n{END_OF_TEXT}"])
def test_a_literal_special_token_is_text(tokenizer, text):
    tokenizer = Tokenizer(Backend.from_str(tokenizer.json))  # fresh: writing one also sets how it reads
    (ids,) = tokenizer.encode([text], eos=True)
    assert ids[:-1].tolist().count(tokenizer.eos) == 0
    assert ids[-1] == tokenizer.eos
    assert tokenizer.decode(ids[:-1].tolist()) == text
    assert tokenizer.decode(ids.tolist()) == text + END_OF_TEXT


def test_an_empty_text_has_no_tokens_and_batches_are_their_texts(tokenizer):
    together = tokenizer.encode(["", "one", TEXT], eos=True)
    assert [ids.tolist() for ids in together] == [tokenizer.encode([text], eos=True)[0].tolist() for text in ("", "one", TEXT)]
    assert len(together[0]) == 0
    assert tokenizer.encode([]) == []


def test_a_written_tokenizer_is_the_same_when_read_and_usual_for_others(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.json, encoding="utf-8")
    loaded = Tokenizer.load(path)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode([TEXT])[0].tolist() == tokenizer.encode([TEXT])[0].tolist()
    assert Backend.from_file(str(path)).encode(END_OF_TEXT).ids == [tokenizer.eos]  # elsewhere it is the special token
    assert tokenizer.eos not in tokenizer.encode([END_OF_TEXT])[0]  # and here it is still none after writing


def with_special(tokenizer, *names):
    backend = Backend.from_str(tokenizer.json)
    backend.add_special_tokens(list(names))
    return Tokenizer(backend)


def test_bos_and_eos_are_found_by_their_usual_names(tokenizer):
    other = with_special(tokenizer, "<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>")
    assert other.vocab_size == 404
    assert (other.bos, other.eos) == (
        other.backend.token_to_id("<|begin_of_text|>"),
        other.backend.token_to_id("<|end_of_text|>"),
    )
    (ids,) = other.encode(["x"], bos=True, eos=True)
    assert ids.tolist() == [other.bos, *tokenizer.encode(["x"])[0], other.eos]


def test_a_special_token_that_does_not_exist_is_refused(tokenizer):
    with pytest.raises(ConfigError, match="this tokenizer has no BOS token; set add_bos: false"):
        tokenizer.encode(["x"], bos=True)


def test_the_size_covers_ids_with_gaps(tokenizer):
    description = json.loads(tokenizer.json)
    last = max(description["model"]["vocab"], key=description["model"]["vocab"].get)
    description["model"]["vocab"][last] = 1000
    assert Tokenizer(Backend.from_str(json.dumps(description))).vocab_size == 1001


def test_padding_and_truncation_of_a_file_are_switched_off(tokenizer, tmp_path):
    backend = Backend.from_str(tokenizer.json)
    backend.enable_padding(length=50)
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    (ids,) = Tokenizer.load(tmp_path / "tokenizer.json").encode(["one two three four five six"])
    assert ids.tolist() == tokenizer.encode(["one two three four five six"])[0].tolist()
    assert len(ids) > 3


@pytest.mark.parametrize("content", ["", "{}", "not json", '{"model": {"type": "Unknown"}}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rf"{path}: is not a tokenizer\.json"):
        Tokenizer.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.json: cannot be read \(No such file or directory\)"):
        Tokenizer.load(tmp_path / "none.json")


TRAPS = [
    "",
    END_OF_TEXT,
    f"a{END_OF_TEXT}b",
    "<s>x</s>",
    "a\0b\0",
    "\0",
    "🎈👩‍👩‍👧 語 e\u0301 \ufeff",
    " ",
    "\r\n\t\n  x  ",
    "\u2028\x85",
    "x" * 3000,
]
CORPUS = [*TRAPS, *TEXT.splitlines(keepends=True), TEXT, *(TEXT[n : n + 77] for n in range(0, len(TEXT), 500)), ""]


@pytest.fixture(scope="module")
def framing(tokenizer):
    """The reference and the fast tokenizer, both with BOS and EOS."""
    both = [with_special(tokenizer, "<s>", "</s>") for _ in range(2)]
    assert both[1].accelerate([])
    return both


@PROPERTY
@given(
    texts=st.lists(st.one_of(st.just(""), st.sampled_from(TRAPS), st.text(max_size=20)), max_size=6),
    bos=st.booleans(),
    eos=st.booleans(),
    fast=st.booleans(),
)
def test_texts_back_to_back_are_the_texts_one_by_one(framing, texts, bos, eos, fast):
    both = framing[fast]
    ids, lengths = both.encode_flat(texts, bos, eos)
    rows = [both.backend.encode(text, add_special_tokens=False).ids for text in texts]
    expected = [[both.bos] * bos + row + [both.eos] * eos if row else [] for row in rows]
    assert (ids.dtype, lengths.dtype) == (np.uint32, np.int64)
    assert lengths.tolist() == [len(row) for row in expected]
    assert ids.tolist() == [token for row in expected for token in row]
    assert [row.tolist() for row in both.encode(texts, bos, eos)] == expected


@pytest.mark.parametrize("names", [(), ("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>", "x y")])
def test_fastokens_has_the_same_ids(tokenizer, names, capsys):
    fast = with_special(tokenizer, *names)
    expected = fast.encode_flat(CORPUS, eos=True)
    assert fast.accelerate(CORPUS[:20])
    found = fast.encode_flat(CORPUS, eos=True)
    assert fast.fast is not None
    assert [part.tolist() for part in found] == [part.tolist() for part in expected]
    assert fast.encode([]) == []
    assert capsys.readouterr().err == ""
    with pytest.raises(ConfigError, match="has no BOS token"):
        with_special(tokenizer, "</s>").encode_flat(["x"], bos=True)


def fake(tokenizer, spoil):
    """A module fastokens that has the ids of `tokenizer` but for what `spoil(ids)` does to those of its last text."""

    class Fast:
        @classmethod
        def from_json_str(cls, text):
            if text != tokenizer.json:
                raise ValueError("model error: not this one")
            return cls()

        def encode_batch_flat(self, texts, split_special_tokens=False):
            assert split_special_tokens
            rows = [tokenizer.backend.encode(text, add_special_tokens=False).ids for text in texts]
            rows[-1:] = [spoil(row) for row in rows[-1:]]
            ends = np.cumsum([0, *map(len, rows)]).astype(np.uint64)
            return np.array([token for row in rows for token in row], np.uint32).tobytes(), ends.tobytes()

    return types.SimpleNamespace(Tokenizer=Fast)


def fail(ids):
    raise RuntimeError("cannot do it")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda ids: ids, None),
        (lambda ids: [*ids[:-1], ids[-1] ^ 1], "it gives other ids"),
        (lambda ids: ids[:-1], "it gives other ids"),
        (lambda ids: [*ids, 1], "it gives other ids"),
        (fail, "cannot do it"),
    ],
    ids=["right", "one other", "one less", "one more", "fails"],
)
def test_a_fast_tokenizer_is_used_only_where_it_is_right(tokenizer, monkeypatch, capsys, spoil, reason):
    other = with_special(tokenizer)
    expected = [part.tolist() for part in other.encode_flat(CORPUS)]
    monkeypatch.setitem(sys.modules, "fastokens", fake(other, spoil))
    assert other.accelerate(CORPUS) == (other.fast is not None) == (reason is None)
    warning = f"warning: fastokens is not used for this tokenizer ({reason})\n"
    assert capsys.readouterr().err == ("" if reason is None else warning)
    assert [part.tolist() for part in other.encode_flat(CORPUS)] == expected


def test_a_tokenizer_that_the_fast_one_does_not_know_is_encoded_as_before(tokenizer, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastokens", fake(tokenizer, lambda ids: ids))
    other = with_special(tokenizer, "<s>")
    assert not other.accelerate(CORPUS)
    assert "(model error: not this one)" in capsys.readouterr().err


def test_without_fastokens_nothing_is_faster(tokenizer, monkeypatch, capsys):
    other = with_special(tokenizer)
    assert with_special(tokenizer).accelerate([])
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert not other.accelerate(CORPUS)
    assert other.fast is None
    assert capsys.readouterr().err == ""
    assert other.encode_flat(["x"])[0].tolist() == tokenizer.encode_flat(["x"])[0].tolist()


def test_a_tokenizer_from_its_text_is_the_one_from_its_file(tokenizer):
    assert Tokenizer.parse(tokenizer.json, "here").fingerprint == tokenizer.fingerprint
    with pytest.raises(ConfigError, match=r"^here: is not a tokenizer\.json"):
        Tokenizer.parse("{}", "here")
