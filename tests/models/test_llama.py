"""The family's config: what it derives, what it refuses, what it names."""

import dataclasses
import re
from typing import Any

import pytest
import torch

from franca.core.config import check, config, to_dict
from franca.core.errors import ConfigError
from franca.models.base import ModelConfig
from franca.models.hf import their_names
from franca.models.layers import RopeScaling
from franca.models.llama import LlamaConfig
from franca.parallel.apply import init_weights

SMALL = LlamaConfig(vocab_size=61, dim=32, num_layers=2, num_heads=4, max_seq_len=16)


@config
class Section:
    model: ModelConfig


def test_widths_are_derived_when_not_given() -> None:
    assert SMALL.width_of_head == 8
    assert dataclasses.replace(SMALL, head_dim=24).width_of_head == 24
    assert dataclasses.replace(SMALL, dim=4096).width_of_mlp == 11008  # as published for Llama 2 7B
    assert dataclasses.replace(SMALL, mlp_dim=100).width_of_mlp == 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, ["32", "5", "head_dim"]),
        ({"dim": 36}, ["9 wide", "even"]),
        ({"head_dim": 7}, ["7 wide", "even"]),
        ({"num_kv_heads": 3}, ["num_kv_heads", "3"]),
    ],
)
def test_a_shape_that_cannot_be_built_is_one_problem_in_words(options: dict[str, Any], words: list[str]) -> None:
    found = dataclasses.replace(SMALL, **options).problems()
    assert len(found) == 1
    assert all(word in found[0] for word in words)


@pytest.mark.parametrize(
    "options",
    [{"dim": 0}, {"num_layers": -1}, {"num_kv_heads": 0}, {"norm_eps": 0.0}, {"rope_scaling": {"factor": 0.0}}],
    ids=str,
)
def test_a_number_out_of_range_is_refused_when_the_config_is_read(options: dict[str, Any]) -> None:
    [(name, value)] = options.items()
    if isinstance(value, dict):
        [(key, value)] = value.items()
        name = f"{name}.{key}"
    with pytest.raises(ConfigError, match=rf"^here: model\.{re.escape(name)}: .*greater than .*got {value} "):
        check(Section, {"model": {"kind": "llama", **options}}, "here")


@pytest.mark.parametrize(
    "options", [{}, {"num_kv_heads": 1}, {"num_heads": 5, "head_dim": 6}, {"num_kv_heads": 4, "head_dim": 2}]
)
def test_a_shape_without_problems_computes(options: dict[str, Any]) -> None:
    shape = dataclasses.replace(SMALL, **options)
    model = shape.build()
    init_weights(model, torch.Generator().manual_seed(0))
    assert shape.problems() == []
    assert model(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 61)


@pytest.mark.parametrize("options", [{}, {"rope_scaling": RopeScaling(factor=2.5)}, {"tied": True, "num_kv_heads": 2}])
def test_a_config_survives_the_way_to_plain_types_and_back(options: dict[str, Any]) -> None:
    shape = dataclasses.replace(SMALL, **options)
    assert check(Section, {"model": to_dict(shape)}, "here").model == shape


def test_an_unknown_option_is_refused_by_its_name() -> None:
    with pytest.raises(ConfigError, match=r"model\.num_head: unknown key \(did you mean 'num_heads'\?\)"):
        check(Section, {"model": {"kind": "llama", "num_head": 4}}, "here")


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"qk_norm": True}])
def test_every_parameter_has_one_name_in_the_other_library(options: dict[str, Any]) -> None:
    shape = dataclasses.replace(SMALL, **options)
    ours = [name for name, _ in shape.build().named_parameters()]
    theirs = their_names(shape, ours)
    assert list(theirs) == ours
    assert len(set(theirs.values())) == len(ours)
    assert theirs["layers.1.mlp.gate.weight"] == "model.layers.1.mlp.gate_proj.weight"


def test_a_parameter_without_a_name_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"layers\.{}\.router\.weight"):
        their_names(SMALL, ["layers.0.router.weight"])
