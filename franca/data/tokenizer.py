"""Text to token ids and back: a thin, strict wrapper over Hugging Face `tokenizers`.

A literal special token in a document is text, never the special token. What it refuses to know: files of documents.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from franca.core.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
_BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
_EOS_NAMES = ("<|end_of_text|>", END_OF_TEXT, "</s>", "<eos>", "[EOS]")


class Tokenizer:
    """A `tokenizer.json`. `bos` and `eos` are token ids, None where the tokenizer has no such token."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()
        self.backend.encode_special_tokens = True  # special-token text inside a document stays text
        self.bos, self.eos = self._first_of(_BOS_NAMES), self._first_of(_EOS_NAMES)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        try:
            return cls(Backend.from_str(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror}). Give the path of a tokenizer.json.") from None
        except Exception as error:  # tokenizers raises plain Exception
            raise ConfigError(f"{path}: is not a tokenizer.json ({error})") from None

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

    @property
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
        for name, wanted, token in (("bos", bos, self.bos), ("eos", eos, self.eos)):
            if wanted and token is None:
                raise ConfigError(f"this tokenizer has no {name.upper()} token; set add_{name}: false")
        head, tail = [self.bos] if bos else [], [self.eos] if eos else []
        encodings: list[Any] = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([*head, *e.ids, *tail] if e.ids else [], np.int64) for e in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens written out."""
        return str(self.backend.decode(list(ids), skip_special_tokens=False))
