"""A dataset that is whole is found whole; whatever is broken in it is named."""

import json
import shutil

import pytest

from franca.core.errors import ConfigError
from franca.data.indexed import Dataset
from franca.data.verify import main, verify


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def first(root, suffix, split="train"):
    return next((root / split).rglob(f"*.{suffix}"))


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def change_manifest(root, change):
    manifest = json.loads((root / "manifest.json").read_text())
    change(manifest)
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_what_was_prepared_is_whole(copy, capsys):
    entry = Dataset(copy).manifest["sources"]["stdlib"]
    assert main(copy, True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problems"] == []
    assert found["tokens"] == entry["train"]["tokens"] + entry["validation"]["tokens"]
    assert found["documents"] == entry["train"]["documents"] + entry["validation"]["documents"]
    assert main(copy, False) == 0
    assert "all as the manifest says" in capsys.readouterr().out


BREAKS = {
    "a token": (lambda root: flip(first(root, "bin"), 1000), "has changed since it was written"),
    "a held-out token": (lambda root: flip(first(root, "bin", "validation"), 10), "has changed since it was written"),
    "a length": (lambda root: flip(first(root, "idx"), 34 + 4 * 7), "has changed since it was written"),
    "the end": (lambda root: first(root, "bin").write_bytes(first(root, "bin").read_bytes()[:-2]), "it is truncated"),
    "a file": (lambda root: first(root, "idx").unlink(), "cannot be read"),
    "the tokenizer": (lambda root: (root / "tokenizer.json").write_text("{}"), "is not a tokenizer.json"),
    "the vocabulary": (lambda root: change_manifest(root, lambda m: m["tokenizer"].update(vocab_size=300)), "has 300 ids"),
    "EOS": (lambda root: change_manifest(root, lambda m: m["tokenizer"].update(eos=5)), "do not end with EOS (5)"),
    "a count": (
        lambda root: change_manifest(root, lambda m: m["sources"]["stdlib"]["train"].update(documents=1)),
        "the manifest says 1 and",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_named(copy, capsys, name):
    broken, message = BREAKS[name]
    broken(copy)
    assert main(copy, False) == 1
    assert message in capsys.readouterr().out


def test_what_is_no_dataset_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no manifest"):
        verify(tmp_path)
