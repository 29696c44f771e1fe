"""One small model as a run's checkpoint, made the way a run makes it, and the same as a Hugging Face folder."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs the network is a wrong test

from franca.checkpoint import convert, sharded
from franca.checkpoint.store import Store
from franca.data.tokenizer import Tokenizer
from franca.models.gpt2 import GPT2Config
from franca.models.hawk import HawkConfig
from franca.models.hybrid import HybridConfig
from franca.models.llama import LlamaConfig
from franca.models.mamba import MambaConfig
from franca.models.minrnn import MinGRUConfig
from franca.parallel.apply import init_weights

# One small shape of every kind of cache: whoever adds a family adds a line.
SHARED: dict[str, Any] = {"vocab_size": 96, "dim": 24, "num_layers": 2, "max_seq_len": 64, "init_std": 0.3}
LLAMA = LlamaConfig(num_heads=4, num_kv_heads=2, mlp_dim=32, **SHARED)
MAMBA = MambaConfig(kind="mamba", head_dim=8, state_dim=6, num_groups=2, **SHARED)
HAWK = HawkConfig(kind="hawk", width_multiple=8, mlp_dim=32, **SHARED)
MINGRU = MinGRUConfig(kind="mingru", width_multiple=8, **SHARED)
FAMILIES: dict[str, Any] = {
    "llama": LLAMA,
    "gpt2": GPT2Config(num_heads=4, dropout=0.0, **SHARED),
    "hybrid": HybridConfig(
        kind="hybrid", blocks=(HAWK, replace(LLAMA, window=7), MAMBA, MINGRU), **{**SHARED, "num_layers": 4}
    ),
}


@pytest.fixture(scope="session", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    """A random model of each family."""
    model = FAMILIES[request.param].build()
    init_weights(model, torch.Generator().manual_seed(1))
    return model.eval().requires_grad_(False)


@dataclass
class Trained:
    """A run folder, its export, and what is in both."""

    run: Path
    folder: Path
    model: Any
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    shape = {"dim": 32, "num_layers": 2, "max_seq_len": 64, "init_std": 0.2}
    return make_trained(tmp_path_factory.mktemp("trained"), LlamaConfig(num_heads=4, num_kv_heads=2, **shape))


@pytest.fixture(scope="session")
def make() -> Any:
    """`make(folder, shape)`: a run and its export, with a vocabulary of its own."""
    return make_trained


def make_trained(root: Path, shape: Any) -> Trained:
    texts = ["The miller's daughter counted 1,024 geese;  two were missing.\n", "größer als jedes Haus; l'été déjà passé\n"]
    tokenizer = Tokenizer.train(iter(texts * 10), vocab_size=320)
    (root / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    config = replace(shape, vocab_size=tokenizer.vocab_size)
    model = config.build()
    init_weights(model, torch.Generator().manual_seed(0))
    beside = convert.params_writer(config, {"bos": tokenizer.bos, "eos": tokenizer.eos}, root / "tokenizer.json")
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    sharded.save(Store(root / "run" / "checkpoints"), 3, tensors, {}, beside, convert.ONE)
    convert.export(root / "run", root / "hf")
    return Trained(root / "run", root / "hf", model.eval().requires_grad_(False), tokenizer)
