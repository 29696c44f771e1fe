"""The same losses and gradients on every mesh as in one process. All meshes of up to 8 ranks: see docs/parallelism.md."""

import math

import pytest
from meshes import differences, every_mesh, name_of, train, write

# tr1-13B's TP 2 x PP 4, the 70B's TP 4 x PP 8 (here PP 2), every axis alone and most pairs.
MESHES = [
    ("llama", {"dp_replicate": 2, "dp_shard": 1}),
    ("llama", {"dp_replicate": 2, "dp_shard": 2}),
    ("llama", {"dp_shard": 3}),
    ("llama", {"pp": 2, "interleave": 2}),
    ("llama", {"pp": 3, "stages": [1, 2, 1]}),
    ("llama", {"cp": 2, "dp_shard": 2}),
    ("llama", {"tp": 4, "pp": 2}),
    ("llama", {"tp": 2, "cp": 2, "dp_shard": 2}),
    ("qwen", {"tp": 2, "cp": 2}),
    ("qwen", {"pp": 2, "dp_replicate": 2}),
    ("gpt2", {"tp": 2, "pp": 4}),
    ("gpt2", {"tp": 2, "dp_shard": 2}),
    ("gpt2", {"pp": 2, "cp": 2}),
    ("mingru", {"dp_shard": 2}),
    ("minlstm", {"dp_replicate": 2}),
    ("hawk", {"dp_shard": 2, "pp": 2}),
    ("mamba", {"dp_shard": 2}),
    ("hybrid", {"dp_shard": 2, "dp_replicate": 2}),
]


@pytest.fixture(scope="module")
def one(dataset, tmp_path_factory):
    """What one process finds, by family and precision."""
    folder, known = tmp_path_factory.mktemp("one"), {}

    def find(family, precision):
        name = f"{family} {precision}"
        if name not in known:
            known[name] = train(write(folder / f"{name}.yaml", dataset, family, {}, precision), 1)
        return known[name]

    return find


def ranks_of(parallel):
    return math.prod(size for axis, size in parallel.items() if axis not in ("interleave", "stages"))


@pytest.mark.parametrize(("family", "parallel"), MESHES, ids=[f"{f} {name_of(p)}" for f, p in MESHES])
def test_losses_and_gradients_are_those_of_one_process(one, dataset, tmp_path, family, parallel) -> None:
    found = train(write(tmp_path / "run.yaml", dataset, family, parallel), ranks_of(parallel))
    wrong = {name: value for name, value in differences(one(family, "fp32"), found).items() if value > 1e-5}
    assert not wrong


@pytest.mark.parametrize("parallel", [{"tp": 2, "dp_shard": 2}, {"pp": 2, "cp": 2}], ids=name_of)
def test_and_in_bf16_up_to_its_rounding(one, dataset, tmp_path, parallel) -> None:
    found = train(write(tmp_path / "run.yaml", dataset, "llama", parallel, "bf16"), 4)
    wrong = {name: value for name, value in differences(one("llama", "bf16"), found).items() if value > 1e-2}
    assert not wrong


def test_what_is_valid_is_known_before_any_process_starts() -> None:
    counts = {family: len(list(every_mesh(family))) for family in ("llama", "gpt2", "hawk")}
    assert counts == {"llama": 75, "gpt2": 75, "hawk": 33}
