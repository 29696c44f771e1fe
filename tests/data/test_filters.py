"""Filters against datatrove's blocks called directly; what a user may write; texts that are too much for a block."""

import itertools
import json
import random
import sys

import pytest
from datatrove.data import Document
from datatrove.pipeline import filters as blocks
from datatrove.utils.text import split_into_parts
from datatrove.utils.word_tokenizers import load_word_tokenizer

from franca.core.config import check, config, to_dict
from franca.core.errors import ConfigError
from franca.data import filters as module
from franca.data.filters import FilterConfig, Filters, word_tokenizer

STOP = ["the", "of", "and", "that", "have", "with", "rain"]
WORDS = [*STOP * 20, *("".join(letters) for letters in itertools.product("bdgkmt", "aeiou", "lnrst", "aeiou"))]


@config
class Sections:
    filters: tuple[FilterConfig, ...] = ()


def checked(*entries):
    return check(Sections, {"filters": list(entries)}, "data.yaml").filters


def made(*entries):
    return Filters(checked(*entries))


def refused(entry):
    with pytest.raises(ConfigError) as caught:
        checked(entry)
    return str(caught.value)


def page(rng):
    """A text like a web page: as good as any, or bad in one of many ways."""
    sentences = [" ".join(rng.choices(WORDS, k=rng.randint(8, 20))).capitalize() for _ in range(rng.randint(8, 20))]
    if rng.random() < 0.3:
        return (
            " and. ".join(sentences) + ".\n" + ".[1]\n".join(sentences[:6])
            if rng.random() < 0.3
            else ".\n".join(sentences) + "."
        )
    end = rng.choice(["\n", "...\n", " # # ", ".[1] ", ". \n\n", " ", "!\nno\n"])
    extra = rng.choice(
        ["Lorem ipsum dolor. ", "{", "- \n" * 40, "x" * 1200 + ".\n", "same line\n" * 20, "1 2 3 4 5 6\n" * 90, ""]
    )
    return end.join(sentences[: rng.choice([1, 5, 20])]) + extra + rng.choice(["", "We use cookies and javascript here.\n"])


PAGES = [page(random.Random(seed)) for seed in range(90)]
KINDS = {
    "c4-quality": [(blocks.C4QualityFilter, {}), (blocks.C4QualityFilter, {"split_paragraph": False, "min_num_sentences": 2})],
    "gopher-quality": [
        (blocks.GopherQualityFilter, {}),
        (blocks.GopherQualityFilter, {"min_doc_words": 10, "stop_words": ["rain"], "min_stop_words": 1}),
    ],
    "gopher-repetition": [
        (blocks.GopherRepetitionFilter, {}),
        (blocks.GopherRepetitionFilter, {"top_n_grams": [[2, 0.05]], "dup_line_frac": None}),
    ],
    "fineweb-quality": [
        (blocks.FineWebQualityFilter, {}),
        (blocks.FineWebQualityFilter, {"stop_chars": [".", "!"], "new_line_ratio": 0.07, "char_duplicates_ratio": 0.5}),
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_says_what_datatrove_says_and_keeps_its_edits(kind, capfd):
    for cls, options in KINDS[kind]:
        tuples = {name: tuple(value) if name == "stop_chars" else value for name, value in options.items()}
        reference, mine = cls(**tuples), made({"kind": kind, "options": options})
        kept = edited = 0
        reasons = set()
        for text in PAGES:
            document = Document(text=text, id="")
            try:
                result = reference.filter(document)
            except ZeroDivisionError:
                continue
            keep, reason = result if isinstance(result, tuple) else (result, None)
            wanted = (document.text, "") if keep else (None, f"{kind}: {reason.removeprefix('gopher_')}")
            assert mine.apply(text) == wanted == mine.apply(text)
            kept, edited = kept + keep, edited + (keep and document.text != text)
            reasons.add(wanted[1])
        assert kept >= 5, reasons
        assert len(reasons) >= 3, reasons
        assert (edited > 0) == (kind == "c4-quality")
    assert capfd.readouterr() == ("", "")


def test_filters_work_in_order_on_what_the_one_before_left():
    text = "This is a sentence of ours.[1]\nhome | about\n" * 5
    c4 = {"kind": "c4-quality"}
    citation = {"kind": "regex", "pattern": r"\[\d\]"}
    edited = "\n".join(["This is a sentence of ours."] * 5)
    assert made(c4, citation).apply(text) == (edited, "")
    assert made(citation, c4).apply(text) == (None, r"regex: matches \[\d\]")
    assert made(c4, {"kind": "length", "max_characters": len(edited)}).apply(text) == (edited, "")
    assert made().apply(text) == (text, "")


def test_length_counts_characters_and_hands_on_the_limits_in_tokens():
    both = made(
        {"kind": "length", "min_characters": 2, "max_characters": 4, "min_tokens": 7},
        {"kind": "length", "min_tokens": 5, "max_tokens": 90},
    )
    assert [both.apply("語" * count)[1] for count in range(6)] == [
        *["length: fewer than 2 characters"] * 2,
        *[""] * 3,
        "length: more than 4 characters",
    ]
    assert (both.min_tokens, both.max_tokens) == (7, 90)
    assert (made().min_tokens, made().max_tokens) == (0, None)


def test_regex_drops_what_matches_or_all_others():
    matching, others = (
        made({"kind": "regex", "pattern": "(?i)spam"}),
        made({"kind": "regex", "pattern": "^#", "drop": "others"}),
    )
    assert matching.apply("some SPAM") == (None, "regex: matches (?i)spam")
    assert matching.apply("some ham") == ("some ham", "")
    assert others.apply("# title") == ("# title", "")
    assert others.apply("no # title") == (None, "regex: does not match ^#")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"kind": "gopher"}, "filters[0].kind: 'gopher' is not one of c4-quality, fineweb-quality, gopher-quality, gopher-rep"),
        ({"kind": "gopher-quality", "min_doc_words": 3}, "filters[0].min_doc_words: unknown key (known here: kind, options)"),
        (
            {"kind": "gopher-quality", "options": {"min_doc_word": 3}},
            "options.min_doc_word: unknown option (did you mean 'min_doc_words'?)",
        ),
        (
            {"kind": "c4-quality", "options": {"exclusion_writer": 3}},
            "unknown option (known here: split_paragraph, remove_citations,",
        ),
        (
            {"kind": "gopher-quality", "options": {"min_doc_words": "9"}},
            "options.min_doc_words: '9' is no int | None (Input should be",
        ),
        (
            {"kind": "gopher-repetition", "options": {"top_n_grams": [2]}},
            "options.top_n_grams: [2] is no tuple[tuple[int, float]",
        ),
        (
            {"kind": "c4-quality", "options": {"language": "english"}},
            "language: 'english' is not known to datatrove; give an ISO",
        ),
        ({"kind": "regex", "pattern": "(a"}, "filters[0]: pattern '(a' is no regular expression (missing )"),
        ({"kind": "regex", "pattern": "a", "drop": "all"}, "filters[0].drop: 'all' is not one of 'matching' or 'others'"),
        ({"kind": "length"}, "filters[0]: no limit was given; set min_characters"),
        (
            {"kind": "length", "min_tokens": 5, "max_tokens": 4},
            "no document has at least 5 and at most 4; exchange the two limits",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_advice(entry, message):
    assert message in refused(entry)


def test_filters_survive_being_written_to_a_file_and_can_be_keys_of_a_cache():
    entries = [{"kind": "gopher-repetition", "options": {"dup_n_grams": [[5, 0.2]]}}, {"kind": "regex", "pattern": "a"}]
    section = check(Sections, {"filters": entries}, "data.yaml")
    again = check(Sections, json.loads(json.dumps(to_dict(section))), "manifest.json")
    assert again == section
    assert hash(again.filters) == hash(section.filters)
    assert checked({"kind": "c4-quality", "options": {"max_word_length": 9}}) != checked({"kind": "c4-quality"})


@pytest.mark.parametrize("package", ["datatrove.pipeline", "datatrove.utils.word_tokenizers"])
def test_a_missing_package_is_named_with_what_installs_it(package, monkeypatch):
    word_tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    assert "pip install 'franca[data]'" in refused({"kind": "c4-quality"})
    assert made({"kind": "regex", "pattern": "a"}, {"kind": "length", "min_tokens": 1}).apply("b") == ("b", "")


def test_a_text_that_a_block_cannot_judge_is_dropped_with_a_reason():
    broken = made({"kind": "gopher-quality", "options": {"min_doc_words": 0}})
    assert broken.apply("") == (None, "gopher-quality: fails (ZeroDivisionError)")
    assert broken.apply("### ###")[0] is None  # numpy would warn: the mean of no words
    nothing = made({"kind": "c4-quality", "options": {"min_num_sentences": -1}})
    assert nothing.apply("no end") == (None, "c4-quality: nothing left")


def test_a_very_long_text_is_not_judged_and_a_long_one_is_not_kept_in_memory(monkeypatch):
    quality = made({"kind": "fineweb-quality"})
    text = "\n".join(f"The rain number {number} fell on the river in the evening." for number in range(300))
    monkeypatch.setattr(module, "MAX_CHARACTERS", len(text))
    assert quality.apply(text + ".") == (None, f"fineweb-quality: more than {len(text):,} characters")
    assert quality.apply(text) == (text, "")
    assert split_into_parts.cache_info().currsize > 0
    monkeypatch.setattr(module, "CACHED_CHARACTERS", len(text) - 1)
    assert quality.apply(text) == (text, "")
    assert split_into_parts.cache_info().currsize == 0


def test_long_runs_without_a_space_are_cut_before_spacy_sees_them(monkeypatch):
    guarded, inner = word_tokenizer("eng"), load_word_tokenizer("eng")
    ordinary = " ".join(["It's a test (of 3.5 words)...", "x" * 9999, "(" * 256, "a\n\n  b"])
    assert guarded.word_tokenize(ordinary) == inner.word_tokenize(ordinary)
    assert guarded.span_tokenize(ordinary) == inner.span_tokenize(ordinary)
    seen = []
    for method in ("word_tokenize", "sent_tokenize", "span_tokenize"):
        monkeypatch.setattr(inner, method, seen.append)
        getattr(guarded, method)("so: " + "(" * 600 + " " + "x" * 10_002)
    assert (
        seen == [f"so: {'(' * 256} {'(' * 256} {'(' * 86} {'x' * 10_000} x"] * 3
    )  # as long as before: spans point into the text
