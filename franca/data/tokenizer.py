"""Text to token ids and back: a thin, strict wrapper over Hugging Face `tokenizers`.

A literal special token in a document is text, never the special token. What it refuses to know: files of documents.
"""

import hashlib
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from franca.core.errors import ConfigError

Ids = NDArray[np.uint32]

END_OF_TEXT = "<|endoftext|>"
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
_EOS_NAMES = ("<|end_of_text|>", END_OF_TEXT, "</s>", "<eos>", "[EOS]")

# Where backends have differed: special tokens written out, white space, what is no letter, long runs.
TRAPS = (
    f"a{END_OF_TEXT}b {END_OF_TEXT}",
    " \t\n\r\n  x  \u00a0\u2003\u2028\x85\v ",
    "e\u0301 \ufeff\u200d語🎈👩\u200d👩\u200d👧\x00 \u1100\u1161 \uff46\u0301 ﬁ ①",
    "<|begin_of_text|><s></s>[EOS]<unk><0x41>",
    "I'll DON'T we\u2019ve it'S'\u017f 1234567 3.14 ٣٤ ⅷ x²\n\n\tdef f(x):\r\n\r\n  return 1/2/",
    "日本語の文章、한국어 Ελληνικά ÀÉÎ ǅ ขอบคุณ हिन्दी ▁ ▁▁",
    *(sign * length for sign in " x1\nž-▁" for length in (2, 7, 100, 1000)),
    " ",
    "\x00",
)


class Tokenizer:
    """A `tokenizer.json`. `bos` and `eos` are token ids, None where the tokenizer has no such token."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True  # special-token text inside a document stays text
        self.fast: Any = None
        self.bos, self.eos = self._first_of(_BOS_NAMES), self._first_of(_EOS_NAMES)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        try:
            return cls.parse(path.read_text(encoding="utf-8"), str(path))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a tokenizer.json.") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: is not a tokenizer.json ({error})") from None

    @classmethod
    def parse(cls, text: str, where: str) -> "Tokenizer":
        """A tokenizer from the text of a `tokenizer.json`; `where` names it in messages."""
        try:
            return cls(Backend.from_str(text))
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(f"{where}: is not a tokenizer.json ({error})") from None

    @classmethod
    def train(cls, texts: Iterator[str], vocab_size: int) -> "Tokenizer":
        """A byte-level BPE tokenizer (Sennrich et al. 2016, over bytes) with one special token, END_OF_TEXT."""
        backend = Backend(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    def _first_of(self, names: Sequence[str]) -> int | None:
        return next((found for name in names if (found := self.backend.token_to_id(name)) is not None), None)

    @cached_property
    def vocab_size(self) -> int:
        """The smallest size of an embedding that has a row for every id (ids may have gaps)."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def json(self) -> str:
        """The `tokenizer.json` that is written: as it was read, so that other libraries read it the usual way."""
        self.backend.encode_special_tokens = False
        text = str(self.backend.to_str(pretty=True))
        self.backend.encode_special_tokens = True
        return text

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    def encode(self, texts: Sequence[str], bos: bool = False, eos: bool = False) -> list[NDArray[np.int64]]:
        """Token ids of each text; an empty text has none, whatever `bos` and `eos` say."""
        ids, lengths = self.encode_flat(texts, bos, eos)
        return np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1]) if len(texts) else []

    def encode_flat(self, texts: Sequence[str], bos: bool = False, eos: bool = False) -> tuple[Ids, NDArray[np.int64]]:
        """The same back to back: the ids of all texts, and how many each text has."""
        for name, wanted, token in (("bos", bos, self.bos), ("eos", eos, self.eos)):
            if wanted and token is None:
                raise ConfigError(f"this tokenizer has no {name.upper()} token; set add_{name}: false")
        if self.fast is not None:
            content, bounds = self.fast.encode_batch_flat(list(texts), split_special_tokens=True)
            ids, ends = np.frombuffer(content, np.uint32), np.frombuffer(bounds, np.uint64).astype(np.int64)
            lengths = ends[1:] - ends[:-1]
        else:
            encodings: list[Any] = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
            lists = [encoding.ids for encoding in encodings]
            lengths = np.fromiter(map(len, lists), np.int64, len(lists))
            ids = np.fromiter(chain.from_iterable(lists), np.uint32, int(lengths.sum()))
        return (ids, lengths) if not (bos or eos) else self._framed(ids, lengths, bos, eos)

    def _framed(self, ids: Ids, lengths: NDArray[np.int64], bos: bool, eos: bool) -> tuple[Ids, NDArray[np.int64]]:
        """BOS before and EOS after every text that has tokens."""
        some = lengths > 0
        framed = lengths + (bos + eos) * some
        ends = framed.cumsum()
        result, own = np.empty(framed.sum(), np.uint32), np.ones(framed.sum(), np.bool_)
        for wanted, token, places in ((bos, self.bos, (ends - framed)[some]), (eos, self.eos, ends[some] - 1)):
            if wanted:
                result[places], own[places] = token, False
        result[own] = ids
        return result, framed

    @cached_property
    def _fastokens(self) -> Any:
        try:
            from fastokens import Tokenizer as Fast  # type: ignore[import-untyped]
        except ImportError:
            return None
        return Fast.from_json_str(self.json)

    def accelerate(self, sample: Sequence[str]) -> bool:
        """Encode with fastokens from now on if it is installed and has the same ids for `sample`; says whether."""
        self.fast, wrong = None, ""
        expected = self.encode_flat([*sample, *TRAPS])
        try:
            self.fast = self._fastokens
            ids, lengths = self.encode_flat([*sample, *TRAPS])
            same = np.array_equal(ids, expected[0]) and np.array_equal(lengths, expected[1])
            wrong = "" if same else "it gives other ids"
        except Exception as error:  # a tokenizer that it does not know
            wrong = str(error)
        if wrong:
            self.fast = None
            print(f"warning: fastokens is not used for this tokenizer ({wrong})", file=sys.stderr, flush=True)
        return self.fast is not None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens written out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))
