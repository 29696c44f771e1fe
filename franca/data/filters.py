"""Which documents of a corpus are kept, and with which text: length, patterns, and the quality blocks of datatrove.

A source's `filters:` is a list; a document goes through it in order until one drops it. What it refuses to know: files, tokens
(limits in tokens are only handed on), processes.
"""

import inspect
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import field
from functools import lru_cache
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from franca.core.config import Choice, Count, config, did_you_mean
from franca.core.errors import ConfigError

MAX_CHARACTERS = 10_000_000  # about a GB and some minutes in one block of datatrove; more is not judged
CACHED_CHARACTERS = 1_000_000  # datatrove keeps the words of its last five texts; not those of longer ones
# A word tokenizer's time may grow with the square of such runs without a space; see `word_tokenizer`.
RUN, SYMBOLS, LONG = re.compile(r"(?<!\S)\S{257,}"), re.compile(r"([\W_]{256})."), re.compile(r"(.{10000}).")

Judge = Callable[[str], tuple[str | None, str]]  # the text to keep, perhaps edited, or None and the reason
Block = Literal["c4-quality", "gopher-quality", "gopher-repetition", "fineweb-quality"]
BLOCKS = {
    "c4-quality": "C4QualityFilter",
    "gopher-quality": "GopherQualityFilter",
    "gopher-repetition": "GopherRepetitionFilter",
    "fineweb-quality": "FineWebQualityFilter",
}


class FilterConfig(Choice):
    """One entry of `filters:`; `kind` says which."""

    kind: Any

    def build(self) -> Judge:
        """The function that judges a text, made once for each process."""
        raise NotImplementedError


@config
class LengthConfig(FilterConfig):
    """Limits, both ends included. Those in tokens are for whoever knows the tokens."""

    kind: Literal["length"] = "length"
    min_characters: Count | None = None
    max_characters: Count | None = None
    min_tokens: Count | None = None
    max_tokens: Count | None = None

    def __post_init__(self) -> None:
        pairs = ((self.min_characters, self.max_characters), (self.min_tokens, self.max_tokens))
        if pairs == ((None, None), (None, None)):
            raise ValueError("no limit was given; set min_characters, max_characters, min_tokens or max_tokens")
        for low, high in pairs:
            if low is not None and high is not None and low > high:
                raise ValueError(f"no document has at least {low} and at most {high}; exchange the two limits")

    def build(self) -> Judge:
        low, high = self.min_characters or 0, self.max_characters

        def judge(text: str) -> tuple[str | None, str]:
            if len(text) < low:
                return None, f"fewer than {low:,} characters"
            return (None, f"more than {high:,} characters") if high is not None and len(text) > high else (text, "")

        return judge


@config
class RegexConfig(FilterConfig):
    """Python's `re`, searched anywhere in the text: drop the documents that match, or all others."""

    kind: Literal["regex"] = "regex"
    pattern: str
    drop: Literal["matching", "others"] = "matching"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern {self.pattern!r} is no regular expression ({error})") from None

    def build(self) -> Judge:
        search, drop_matching = re.compile(self.pattern).search, self.drop == "matching"
        reason = ("matches " if drop_matching else "does not match ") + self.pattern
        return lambda text: (None, reason) if bool(search(text)) == drop_matching else (text, "")


@config
class BlockConfig(FilterConfig):
    """A filter of datatrove; `options` are its constructor's own parameters."""

    kind: Block
    options: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        self._block()

    def build(self) -> Judge:
        from datatrove.data import Document  # type: ignore[import-untyped]
        from datatrove.utils.text import split_into_parts  # type: ignore[import-untyped]

        block = self._block()

        def judge(text: str) -> tuple[str | None, str]:
            if len(text) > MAX_CHARACTERS:
                return None, f"more than {MAX_CHARACTERS:,} characters"
            document = Document(text=text, id="")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # numpy's, for the mean of no words
                    result = block.filter(document)
            except (MemoryError, ImportError):  # no property of the text
                raise
            except Exception as error:  # a division by no words, a tokenizer's defect: one text must not end a job
                result = False, f"fails ({type(error).__name__})"
            if len(text) > CACHED_CHARACTERS:
                split_into_parts.cache_clear()
            kept, reason = result if isinstance(result, tuple) else (result, "dropped")
            if kept and not document.text:
                kept, reason = False, "nothing left"
            return (document.text, "") if kept else (None, reason.removeprefix("gopher_"))

        return judge

    def _block(self) -> Any:
        """The block of datatrove. Raises ConfigError for a missing package and for options that it does not have."""
        try:
            from datatrove.pipeline import filters  # type: ignore[import-untyped]

            cls = getattr(filters, BLOCKS[self.kind])
            known = {name: p.annotation for name, p in inspect.signature(cls).parameters.items() if name != "exclusion_writer"}
            options = {name: _option(name, value, known) for name, value in self.options.items()}
            return cls(**{**options, "language": word_tokenizer(options.get("language", "eng"))})
        except ImportError as error:
            raise ConfigError(f"{self.kind}: {error}. It needs datatrove and spaCy; run: pip install 'franca[data]'") from None


def _option(name: str, value: Any, known: dict[str, Any]) -> Any:
    """A value as the constructor's annotation wants it: tuples for lists. Raises ConfigError."""
    if name not in known:
        advice = did_you_mean(name, list(known)) or f" (known here: {', '.join(known)})"
        raise ConfigError(f"options.{name}: unknown option{advice}")
    hint = known[name] if known[name] != tuple[tuple[int, float]] else tuple[tuple[int, float], ...]  # meant so
    try:
        return TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise ConfigError(f"options.{name}: {value!r} is no {hint} ({error.errors()[0]['msg']})") from None


@lru_cache
def word_tokenizer(language: str) -> Any:
    """datatrove's tokenizer of a language (`eng`), behind a guard that puts spaces into long runs without; silences its log.

    spaCy takes minutes for 20,000 brackets or emoji in a row; of texts without such runs the words are its own. Raises
    ConfigError for a language that datatrove does not know, ImportError for a missing package.
    """
    from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer  # type: ignore[import-untyped]
    from loguru import logger

    logger.disable("datatrove")
    try:
        inner = load_word_tokenizer(language)
    except ValueError:
        raise ConfigError(f"language: {language!r} is not known to datatrove; give an ISO 639-3 code like eng or deu") from None

    def guard(text: str) -> str:  # as long as before: spans point into the text
        return RUN.sub(lambda run: LONG.sub(r"\1 ", SYMBOLS.sub(r"\1 ", run[0])), text)

    class Guarded(WordTokenizer):
        def word_tokenize(self, text: str) -> list[str]:
            return inner.word_tokenize(guard(text))

        def sent_tokenize(self, text: str) -> list[str]:
            return inner.sent_tokenize(guard(text))

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return inner.span_tokenize(guard(text))

    return Guarded(language)


class Filters:
    """The filters of a source, ready for use; `min_tokens` and `max_tokens` are the limits that it leaves to its user."""

    def __init__(self, configs: tuple[FilterConfig, ...]) -> None:
        self.judges = [(config.kind, config.build()) for config in configs]
        lengths = [config for config in configs if isinstance(config, LengthConfig)]
        self.min_tokens = max((config.min_tokens for config in lengths if config.min_tokens), default=0)
        self.max_tokens = min((config.max_tokens for config in lengths if config.max_tokens), default=None)

    def apply(self, text: str) -> tuple[str | None, str]:
        """The text to keep, perhaps edited, and ""; or None and the reason, such as `gopher-quality: short_doc`."""
        for kind, judge in self.judges:
            kept, reason = judge(text)
            if kept is None:
                return None, f"{kind}: {reason}"
            text = kept
        return text, ""
