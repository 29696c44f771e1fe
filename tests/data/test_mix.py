"""A mixture folder has its shares, to a document, and no document twice."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest

from franca.core.errors import ConfigError
from franca.data.indexed import Dataset
from franca.data.loader import DataConfig, SourceConfig, open_plan
from franca.data.mix import MixConfig, PartConfig, main, mix
from franca.data.prepare import PrepareConfig, TokenizerConfig, prepare
from franca.data.sources import CorpusConfig
from franca.data.tokenizer import Tokenizer
from franca.data.verify import verify


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three datasets of different sizes in shards of about 400 tokens, every document another one."""
    root = tmp_path_factory.mktemp("mix")
    (root / "tokenizer.json").write_text(Tokenizer.train(iter(["a tokenizer of bytes"]), 257).json)
    for name, count in (("small", 120), ("middle", 400), ("large", 900)):
        texts = [f"{name} {number} " + "x" * (number % 13) for number in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources = {"web": CorpusConfig(paths=(str(root / f"{name}.jsonl"),))}
        tokenizer = TokenizerConfig(path=str(root / "tokenizer.json"))
        settings = {"sources": sources, "tokenizer": tokenizer, "shard_tokens": 400, "validation_share": 0.05}
        prepare(PrepareConfig(output=str(root / name), **settings))
    return root


def documents(root, split="train"):
    """Every document of a folder, by source."""
    found = {}
    for name in Dataset(root).manifest["sources"]:
        found[name] = []
        for shard in Dataset(root).shards(split, name):
            ends = [0, *np.cumsum(shard.document_lengths).tolist()]
            found[name] += [tuple(shard.read(a, b - a).tolist()) for a, b in itertools.pairwise(ends)]
    return found


def settings(folders, output, weights, **changes):
    parts = {name: PartConfig(path=str(folders / name), weight=weight) for name, weight in weights.items()}
    return MixConfig(output=str(output), sources=parts, **changes)


@pytest.mark.parametrize(
    "weights", [{"small": 0.1, "large": 0.9}, {"small": 0.9, "large": 0.1}, {"small": 1, "middle": 1, "large": 3}]
)
def test_shares_are_reached_to_a_document_without_repetition(folders, tmp_path, weights):
    root = mix(settings(folders, tmp_path / "out", weights))
    mixed, whole = documents(root), sum(weights.values())
    tokens = {name: sum(map(len, those)) for name, those in mixed.items()}
    for name, those in mixed.items():
        assert abs(tokens[name] - weights[name] / whole * sum(tokens.values())) < 60  # two documents
        originals = Counter(documents(folders / name)["web"])
        assert not Counter(those) - originals
    scarce = min(weights, key=lambda n: sum(map(len, documents(folders / n)["web"])) / weights[n])
    assert Counter(mixed[scarce]) == Counter(documents(folders / scarce)["web"])  # the one that ends is used up
    assert {n: sorted(d) for n, d in documents(root, "validation").items()} == {
        n: sorted(documents(folders / n, "validation")["web"]) for n in weights
    }
    assert verify(root)["problems"] == []
    assert open_plan(DataConfig(sources=(SourceConfig(path=str(root)),), seq_len=16)).order.epoch_samples > 0


def test_fewer_tokens_may_be_asked_for_and_the_seed_draws_them(folders, tmp_path, capsys):
    one, again, other = (
        mix(settings(folders, tmp_path / name, {"middle": 1, "large": 1}, tokens=3000, seed=seed))
        for name, seed in (("one", 1), ("again", 1), ("other", 2))
    )
    assert documents(one) == documents(again) != documents(other)
    assert sum(len(d) for those in documents(one).values() for d in those) == pytest.approx(3000, abs=60)
    (tmp_path / "mix.yaml").write_text(
        f"output: {tmp_path}/told\ntokens: 3000\nsources:\n  a: {{path: {folders}/middle, weight: 3}}\n"
        f"  b: {{path: {folders}/large, weight: 1}}\n"
    )
    main(tmp_path / "mix.yaml", [])
    told = capsys.readouterr().out
    assert "75.0000% asked, 7" in told
    assert "25.0000% asked, 2" in told


def test_what_cannot_be_mixed_is_refused(folders, tmp_path, dataset):
    with pytest.raises(ConfigError, match="cannot be had without repetition; small ends at"):
        mix(settings(folders, tmp_path / "out", {"small": 1, "large": 1}, tokens=10**9))
    with pytest.raises(ConfigError, match="different tokenizers"):
        mix(
            MixConfig(
                output=str(tmp_path / "out"),
                sources={"a": PartConfig(path=str(folders / "small"), weight=1), "b": PartConfig(path=str(dataset), weight=1)},
            )
        )
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        mix(settings(folders, tmp_path / "there", {"small": 1}))
