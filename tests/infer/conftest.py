"""One small model as a run's checkpoint, made the way a run makes it, and the same as a Hugging Face folder."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a test that needs the network is a wrong test

from franca.checkpoint import convert, sharded
from franca.checkpoint.store import Store
from franca.data.tokenizer import Tokenizer
from franca.models.llama import LlamaConfig
from franca.parallel.apply import init_weights


@dataclass
class Trained:
    """A run folder, its export, and what is in both."""

    run: Path
    folder: Path
    model: Any
    tokenizer: Tokenizer


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("trained")
    texts = ["The miller's daughter counted 1,024 geese;  two were missing.\n", "größer als jedes Haus; l'été déjà passé\n"]
    tokenizer = Tokenizer.train(iter(texts * 10), vocab_size=320)
    (root / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    config = LlamaConfig(
        vocab_size=tokenizer.vocab_size, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64, init_std=0.2
    )
    model = config.build()
    init_weights(model, torch.Generator().manual_seed(0))
    beside = convert.params_writer(config, {"bos": tokenizer.bos, "eos": tokenizer.eos}, root / "tokenizer.json")
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    sharded.save(Store(root / "run" / "checkpoints"), 3, tensors, {}, beside, convert.ONE)
    convert.export(root / "run", root / "hf")
    return Trained(root / "run", root / "hf", model.eval().requires_grad_(False), tokenizer)
