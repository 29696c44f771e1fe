"""Every recipe can be read by the command that it is for."""

from pathlib import Path

import pytest

from franca.core.config import load
from franca.data.prepare import PrepareConfig
from franca.data.shuffle import ShuffleConfig

RECIPES = Path(__file__).parents[1] / "recipes"
DATA = sorted((RECIPES / "data").glob("*.yaml"))


@pytest.mark.parametrize("path", DATA, ids=lambda path: path.stem)
def test_a_data_recipe_names_a_dataset_of_the_hub(path):
    if path.stem.endswith(".shuffle"):
        settings = load(ShuffleConfig, path)
        corpora = [settings]
    else:
        settings = load(PrepareConfig, path)
        corpora = settings.sources.values()
        assert settings.output == f"data/{path.stem}"
        assert settings.tokenizer.name == "gpt2"
    assert all(corpus.hub.count("/") == 1 and corpus.paths for corpus in corpora)


def test_the_seeds_datasets_are_there():
    wanted = {"fineweb_edu", "fineweb_edu_10bt", "dclm_baseline_1.0", "dclm_baseline_1.0_10prct", "cosmopedia_v2", "oscar_en"}
    assert wanted <= {path.stem for path in DATA}
