"""Documents out of files, whole or refused with the place."""

import csv
import gzip
import itertools
import json
import sys
from collections import Counter

import pyarrow
import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from franca.core.errors import ConfigError
from franca.data.sources import CorpusConfig, list_files, read_documents, row_groups

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)
TEXT = "Häuser 語\r\nline two\n\n\x0cpage\u2028same line\n"


def zst(data):
    return zstd.compress(data)


def zst_frames(data):
    half = len(data) // 2
    return zst(data[:half]) + zst(b"") + zst(data[half:])


def gz_members(data):
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(data[half:])


PLAIN = [("", bytes)]
PACKED = [(".gz", gzip.compress), (".gz", gz_members), (".zst", zst), (".zst", zst_frames)]


def read(path, **corpus):
    """The documents of a file and what was said of the bad ones."""
    reasons = []
    documents = list(read_documents(path, CorpusConfig(paths=("unused",), **corpus), reasons.append))
    return documents, reasons


def write_packed(path, pack, data):
    path.write_bytes(pack(data))
    return path


@pytest.mark.parametrize(("suffix", "pack"), PLAIN + PACKED)
def test_a_text_file_is_one_document_to_the_byte(tmp_path, suffix, pack):
    path = write_packed(tmp_path / f"a.txt{suffix}", pack, TEXT.encode())
    assert read(path) == ([TEXT], [])


@pytest.mark.parametrize(("suffix", "pack"), PLAIN + PACKED)
@pytest.mark.parametrize("stem", ["a.jsonl", "a.ndjson", "a.json"])
def test_json_lines_are_documents(tmp_path, suffix, pack, stem):
    lines = [json.dumps({"text": TEXT, "id": 1}), "", json.dumps({"id": 2, "content": "two"}, ensure_ascii=False)]
    path = write_packed(tmp_path / (stem + suffix), pack, "\n".join(lines).encode())
    assert read(path) == ([TEXT, "two"], [])


def test_a_named_field_is_taken_and_no_other(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "t", "body": "b"}\n{"text": "t"}\n{"text": "t", "content": "c"}\n')
    assert read(path, field="body") == (["b"], [f"{path}:{n}: has no text under 'body'" for n in (2, 3)])
    assert read(path)[0] == ["t", "t", "t"]


def test_the_format_can_be_said(tmp_path):
    path = tmp_path / "a.data"
    path.write_text('{"text": "t"}\n')
    assert read(path)[0] == ['{"text": "t"}\n']
    assert read(path, format="jsonl")[0] == ["t"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("not json", "is not JSON"),
        ('{"text": "cut', "is not JSON"),
        (r'{"text": "\ud800"}', "is not JSON"),
        ("[1, 2]", "has no text under 'text' or 'content'"),
        ("7", "has no text under"),
        ('{"text": 5}', "has no text under"),
        ('{"text": null, "content": "x"}', "has no text under"),
        ('{"title": "x"}', "has no text under"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n' + line + '\n{"text": "three"}\n')
    documents, reasons = read(path)
    assert documents == ["one", "three"]
    assert len(reasons) == 1
    assert reasons[0].startswith(f"{path}:2: {reason}")


def test_a_pretty_printed_array_is_told_that_json_lines_are_expected(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=2))
    documents, reasons = read(path)
    assert documents == []
    assert reasons[0].startswith(f"{path}:1: is not JSON")
    assert "JSON lines are expected: one whole object on every line" in reasons[0]


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes(b"abc\xff")
    lines.write_bytes(b'{"text": "abc\xff"}\n')
    assert read(text) == ([], [f"{text}: is not UTF-8 text (b'\\xff': invalid start byte)"])
    assert read(lines)[1][0].startswith(f"{lines}:1: is not JSON")


def test_an_empty_file_is_bad(tmp_path):
    for name in ("a.txt", "a.jsonl", "a.txt.gz", "a.txt.zst"):
        (tmp_path / name).touch()
        assert read(tmp_path / name) == ([], [f"{tmp_path / name}: is an empty file"])


def test_an_archive_of_nothing_is_an_empty_document(tmp_path):
    for suffix, pack in PACKED:
        path = write_packed(tmp_path / f"a.txt{suffix}", pack, b"")
        assert read(path) == ([""], [])


def noise(lines):
    """Lines that do not compress, so that a cut takes content away."""
    return "".join(json.dumps({"text": str(pow(3, 2000 + n))}) + "\n" for n in range(lines)).encode()


@pytest.mark.parametrize(("suffix", "pack"), PACKED)
@pytest.mark.parametrize("cut", [1, 5, 20_000, 250_000])
def test_a_truncated_archive_is_bad_and_never_a_shorter_text(tmp_path, suffix, pack, cut):
    data = noise(700)
    whole = [json.loads(line)["text"] for line in data.splitlines()]
    for stem in ("a.txt", "a.jsonl"):
        path = write_packed(tmp_path / (stem + suffix), pack, data)
        path.write_bytes(path.read_bytes()[:-cut])
        documents, reasons = read(path)
        assert len(reasons) == 1
        assert reasons[0].startswith(f"{path}: cannot be read")
        assert documents == ([] if stem == "a.txt" else whole[: len(documents)])
        assert len(documents) < 700 or cut < 8  # so little is only the checksum at the end


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_an_archive_in_name_only_is_bad(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(b"plain words")
    assert read(path)[0] == []
    assert read(path)[1][0].startswith(f"{path}: cannot be read")


@PROPERTY
@given(data=st.binary(max_size=3000), cuts=st.lists(st.integers(0, 3000), max_size=3))
def test_any_cut_into_frames_gives_the_same_text(tmp_path_factory, data, cuts):
    path = tmp_path_factory.getbasetemp() / "frames.txt.zst"
    bounds = [0, *sorted(cuts), len(data)]
    path.write_bytes(b"".join(zst(data.hex().encode()[2 * a : 2 * b]) for a, b in itertools.pairwise(bounds)))
    expected = "".join(data[a:b].hex() for a, b in itertools.pairwise(bounds))
    assert read(path) == ([expected], [])


def test_a_line_ends_where_editors_end_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT.encode())
    assert read(path, documents="line")[0] == ["Häuser 語\r\n", "line two\n", "\x0cpage\u2028same line\n"]


LINES = st.lists(st.sampled_from(["a\n", "b b\n", "\n", "  \n", "é\r\n", "\r\n"]), max_size=12)


@PROPERTY
@given(lines=LINES, last=st.sampled_from(["", "end"]))
def test_paragraphs_end_at_blank_lines_and_lose_nothing(tmp_path_factory, lines, last):
    text = "".join(lines) + last
    if not text.strip():
        text = "x" + text
    path = tmp_path_factory.getbasetemp() / "paragraphs.txt"
    path.write_bytes(text.encode())
    documents = read(path, documents="paragraph")[0]
    assert "".join(documents) == text
    every = text.splitlines(keepends=True)
    starts = [n for n, line in enumerate(every) if line.strip() and (n == 0 or not every[n - 1].strip())]
    assert len(documents) == len(starts)
    for document, start in zip(documents[1:], starts[1:], strict=True):
        assert document.splitlines(keepends=True)[0] == every[start]


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def list_names(folder, *patterns, exclude=()):
    corpus = CorpusConfig(paths=tuple(f"{folder}/{p}" for p in patterns), exclude=tuple(f"{folder}/{p}" for p in exclude))
    return [str(path.relative_to(folder)) for path in list_files("mine", corpus)]


def test_files_are_found_by_globs_once_and_sorted(tmp_path):
    make_files(tmp_path, "b.txt", "a.txt", "deep/er/c.txt", "deep/d.md")
    assert list_names(tmp_path, "*.txt", "a.*") == ["a.txt", "b.txt"]
    assert list_names(tmp_path, "**/*.txt") == ["a.txt", "b.txt", "deep/er/c.txt"]
    assert list_names(tmp_path, "deep/*") == ["deep/d.md"]  # a folder is no file
    assert list_names(tmp_path, "**/*", exclude=["deep/**", "b.*"]) == ["a.txt"]


def test_a_pattern_without_a_file_is_refused(tmp_path):
    make_files(tmp_path, "a.txt")
    with pytest.raises(ConfigError, match=r"sources\.mine\.paths: '.*/\*\.md' matches no file"):
        list_names(tmp_path, "a.txt", "*.md")
    with pytest.raises(ConfigError, match=r"sources\.mine: `exclude` leaves no file"):
        list_names(tmp_path, "a.txt", exclude=["*"])


def write_tables(folder, columns):
    """One table in every kind of file that holds columns."""
    table = pyarrow.table(columns)
    parquet.write_table(table, folder / "a.parquet", row_group_size=2)
    for name, writer in (("a.arrow", pyarrow.ipc.new_file), ("b.arrow", pyarrow.ipc.new_stream)):
        with writer(str(folder / name), table.schema) as file:
            file.write_table(table, max_chunksize=2)
    rows = list(zip(*columns.values(), strict=True))
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with open(folder / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([list(columns), *rows])
    with gzip.open(folder / "b.csv.gz", "wb") as file:
        file.write((folder / "a.csv").read_bytes())
    return sorted(path for path in folder.iterdir() if path.name.startswith(("a.", "b.")))


TABLE = {"id": ["1", "2", "3"], "content": ['one, "quoted"', "two\nlines\t語", ""], "body": ["x", "y", "z"]}


def test_the_column_of_every_kind_of_table_is_read(tmp_path):
    paths = write_tables(tmp_path, TABLE)
    assert len(paths) == 6
    for path in paths:
        assert read(path) == (TABLE["content"], []), path
        assert read(path, field="body") == (TABLE["body"], []), path
        assert read(path, field="none") == ([], [f"{path}: has no column 'none', only id, content, body"]), path


def test_a_row_without_text_is_named(tmp_path):
    table = pyarrow.table({"text": ["one", None, "three"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (["one", "three"], [f"{tmp_path}/a.parquet: row 2 has no text in column 'text'"])
    (tmp_path / "a.csv").write_text("id,text\n1,one\n2\n3,three\n")
    assert read(tmp_path / "a.csv") == (["one", "three"], [f"{tmp_path}/a.csv:3: has no text in column 'text'"])


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "b.arrow"])
@pytest.mark.parametrize("kept", [0.1, 0.9])
def test_a_truncated_table_is_a_bad_document(tmp_path, name, kept):
    write_tables(tmp_path, {"text": [f"document {number}" for number in range(500)]})
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(kept * len(content))])
    documents, reasons = read(tmp_path / name)
    assert len(documents) < 500
    assert len(reasons) == 1
    assert f"{tmp_path}/{name}: cannot be read past row {len(documents)}" in reasons[0]


def test_tables_without_pyarrow_name_the_extra(tmp_path, monkeypatch):
    parquet.write_table(pyarrow.table({"text": ["one"]}), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r"pip install 'franca\[data\]'"):
        read(tmp_path / "a.parquet")


def test_a_column_of_one_large_text_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "x" * 1_000_000 + "\n")
    assert [len(text) for text in read(tmp_path / "a.csv")[0]] == [1_000_000]


ROWS = [
    {"text": f"t{n}", "lang": lang, "score": score}
    for n, (lang, score) in enumerate([("en", 1), ("eu", 2), ("fr", 2), ("en", 3)])
]


def write_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, ROWS[0])
            table.writeheader()
            table.writerows(ROWS)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(ROWS), path, row_group_size=1)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("where", "texts", "dropped"),
    [
        ({"lang": "en"}, ["t0", "t3"], {"where lang": 2}),
        ({"lang": ("en", "eu")}, ["t0", "t1", "t3"], {"where lang": 1}),
        ({"lang": "en", "score": (1, 2)}, ["t0"], {"where lang": 2, "where score": 1}),
    ],
)
def test_rows_are_chosen_by_their_fields_and_the_others_counted(tmp_path, suffix, where, texts, dropped):
    counts = Counter()
    corpus = CorpusConfig(paths=("unused",), where=where)
    assert list(read_documents(write_rows(tmp_path, suffix), corpus, pytest.fail, counts)) == texts
    assert counts == dropped


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_column_to_choose_by_must_be_there(tmp_path, suffix):
    path = write_rows(tmp_path, suffix)
    wrong = f"{path}: has no column 'language' for `where`, only text, lang, score"
    assert read(path, where={"language": "en"}) == ([], [wrong])


def test_plain_text_has_no_fields_to_choose_by(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ConfigError, match="is plain text, which has no fields for `where`"):
        read(tmp_path / "a.txt", where={"lang": "en"})


def test_text_in_a_column_that_is_not_utf_8_is_named(tmp_path):
    column = pyarrow.array([b"one", b"\xff"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    documents, (reason,) = read(tmp_path / "a.parquet")
    assert documents == []
    assert reason.startswith(f"{tmp_path}/a.parquet: cannot be read past row 0 ('utf-8' codec can't decode byte 0xff")


def test_row_groups_are_found_by_their_bytes_and_read_by_their_numbers(tmp_path):
    path = write_rows(tmp_path, ".parquet")
    groups = row_groups(path)
    ends = [end for _, end in groups]
    assert len(groups) == 4
    assert [begin for begin, _ in groups] == [4, *ends[:-1]]  # one behind the other, after the magic
    parts = [list(read_documents(path, CorpusConfig(paths=()), pytest.fail, groups=(n, n + 1))) for n in range(4)]
    assert parts == [["t0"], ["t1"], ["t2"], ["t3"]]
    path.write_bytes(b"PAR1 and no more")
    assert row_groups(path) == []
