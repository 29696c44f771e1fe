"""A tokenizer trained on the spot, and checkpoints of small models made the way a run makes them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs the network is a wrong test

from franca.checkpoint import convert, sharded
from franca.checkpoint.store import Checkpoint, Store
from franca.data.tokenizer import Tokenizer
from franca.models.llama import LlamaConfig
from franca.parallel.apply import init_weights

CORPUS = [
    "The ship's log says: 12 barrels of wine, 3 of oil, and one of salted fish.\n",
    "Where the river bends, the miller's daughter counted 1,024 geese;  two were missing.\n",
    "Ein Schiff fährt über das Meer - größer als jedes Haus; l'été déjà passé, ¿dónde está?\n",
    "def harbour(ships: list[int]) -> int:\n    return sum(ship for ship in ships if ship > 0)\n",
]


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(Tokenizer.train(iter(CORPUS * 10), vocab_size=384).json, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_file)


def scatter_weights(model: nn.Module) -> None:
    """Weights as far from their start as a trained model's: norms with gains of their own, logits of size 1."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data = 1 + 0.3 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)


@pytest.fixture(scope="session")
def make_checkpoint(tokenizer_file: Path, tokenizer: Tokenizer) -> Callable[..., Checkpoint]:
    """`make_checkpoint(run folder, config, step=...)`: through `sharded.save`, as training does it."""

    def make(run: Path, config: LlamaConfig, step: int = 7) -> Checkpoint:
        model = config.build()
        init_weights(model, torch.Generator().manual_seed(0))
        scatter_weights(model)
        tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
        beside = convert.params_writer(config, {"bos": tokenizer.bos, "eos": tokenizer.eos}, tokenizer_file)
        return sharded.save(Store(run / "checkpoints"), step, tensors, {"samples": step * 4}, beside, convert.ONE)

    return make
