"""Out to Hugging Face and in again: transformers computes what we compute, and nothing changes on the way back."""

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from franca.checkpoint import convert, sharded
from franca.checkpoint.store import Checkpoint, Store, find
from franca.core.config import check
from franca.core.errors import ConfigError
from franca.data.tokenizer import END_OF_TEXT, Tokenizer
from franca.models import hf, modeling
from franca.models.gpt2 import GPT2Config
from franca.models.layers import RopeScaling
from franca.models.llama import LlamaConfig
from franca.models.mamba import MambaConfig

# In 64 positions, wavelengths of all three regimes: kept, interpolated, stretched.
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped": {"num_kv_heads": 2},
    "one key head": {"num_kv_heads": 1},
    "tied": {"tied": True},
    "qk_norm": {"qk_norm": True},
    "llama3": {"rope_scaling": LLAMA3},
    "wide heads": {"head_dim": 16},
    "narrow heads": {"head_dim": 4},
    "mlp, theta and eps": {"mlp_dim": 40, "rope_theta": 500.0, "norm_eps": 1e-2},
    "like Llama 3.2": {"num_kv_heads": 2, "tied": True, "rope_scaling": LLAMA3, "rope_theta": 500.0},
    "like Qwen 3": {"num_kv_heads": 2, "tied": True, "qk_norm": True, "head_dim": 16, "rope_theta": 1e6, "norm_eps": 1e-6},
    "qk_norm and llama3": {"num_kv_heads": 1, "qk_norm": True, "rope_scaling": LLAMA3, "mlp_dim": 40},
    "like Mistral": {"num_kv_heads": 2, "window": 9},
    "like Qwen 2": {"num_kv_heads": 2, "tied": True, "qkv_bias": True, "rope_theta": 1e6, "norm_eps": 1e-6},
    "qkv_bias and window": {"qkv_bias": True, "window": 9},
    "gpt2": {"kind": "gpt2"},
    "gpt2, untied": {"kind": "gpt2", "tied": False, "mlp_dim": 40, "dropout": 0.0},
    "mamba": {"kind": "mamba", "head_dim": 8, "state_dim": 6, "num_groups": 2},
    "mamba, tied": {"kind": "mamba", "head_dim": 16, "state_dim": 5, "tied": True, "norm_eps": 1e-3, "conv_size": 3},
}
TEXTS = [
    "The ship's log says: 12 barrels.",
    "  two leading spaces, a tab\tand a line\nbreak ",
    "größer, l'été, ¿dónde?, Ελλάδα, 船, नमस्ते, 👩‍🚀, e\u0301 and \u00e9, \u0000, \ufeff",
    "",
    " ",
]


def shape(tokenizer: Tokenizer, kind: str = "llama", **options: Any) -> Any:
    defaults = {"vocab_size": tokenizer.vocab_size, "dim": 32, "num_layers": 2, "max_seq_len": 64}
    if kind == "mamba":
        return MambaConfig(kind="mamba", **{**defaults, **options})
    return {"llama": LlamaConfig, "gpt2": GPT2Config}[kind](**{**defaults, "num_heads": 4, **options})


@dataclass
class Exported:
    checkpoint: Checkpoint
    folder: Path
    ours: Any
    theirs: Any


@pytest.fixture(scope="module", params=OPTIONS.values(), ids=OPTIONS.keys())
def exported(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer: Tokenizer,
    make_checkpoint: Callable[..., Checkpoint],
) -> Exported:
    root = tmp_path_factory.mktemp("export")
    checkpoint = make_checkpoint(root / "run", shape(tokenizer, **request.param))
    convert.export(root / "run", root / "hf")
    ours, _, _ = convert.open_model(checkpoint.path, torch.device("cpu"), "fp32")
    return Exported(checkpoint, root / "hf", ours, AutoModelForCausalLM.from_pretrained(root / "hf"))


def ids(vocab_size: int, rows: int = 3, length: int = 64) -> Tensor:
    return torch.randint(0, vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def model_config(checkpoint: Checkpoint) -> Any:
    return check(convert.Params, checkpoint.params, "params.json").model


def stored(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors of a checkpoint, as they lie on the disk."""
    model = model_config(checkpoint).build()
    tensors = {f"model.{name}": torch.full_like(p, torch.nan) for name, p in model.named_parameters()}
    sharded.load(checkpoint, tensors, num_ranks=1)
    return tensors


def test_transformers_computes_the_same_logits(exported: Exported) -> None:
    tokens = ids(exported.ours.config.vocab_size)
    with torch.no_grad():
        ours, theirs = exported.ours(tokens), exported.theirs(tokens).logits
    assert theirs.dtype == torch.float32
    assert theirs.std() > 0.5  # else the tolerance would say nothing
    assert (ours - theirs).abs().max() <= 1e-4


def test_the_exported_family_is_the_one_that_has_these_layers(exported: Exported) -> None:
    c = exported.ours.config
    if c.kind in ("gpt2", "mamba"):
        expected = {"gpt2": "gpt2", "mamba": "mamba2"}[c.kind]
    else:
        expected = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias else "mistral" if c.window else "llama"
    assert exported.theirs.config.model_type == expected
    assert sum(p.numel() for p in exported.theirs.parameters()) == sum(p.numel() for p in exported.ours.parameters())


def test_the_end_token_is_known_to_model_tokenizer_and_generation(exported: Exported, tokenizer: Tokenizer) -> None:
    theirs = AutoTokenizer.from_pretrained(exported.folder)
    assert tokenizer.eos is not None
    assert exported.theirs.config.eos_token_id == tokenizer.eos
    assert exported.theirs.generation_config.eos_token_id == tokenizer.eos
    assert (theirs.eos_token, theirs.eos_token_id) == (END_OF_TEXT, tokenizer.eos)
    assert exported.theirs.config.bos_token_id is None
    assert theirs.bos_token is None


def test_importing_the_export_gives_back_every_bit(exported: Exported, tmp_path: Path) -> None:
    convert.import_folder(exported.folder, tmp_path / "run")
    again = find(tmp_path / "run")
    before, after = stored(exported.checkpoint), stored(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.params["tokenizer"] == exported.checkpoint.params["tokenizer"]
    assert again.damage() == []
    built = model_config(again)
    if built.kind in ("gpt2", "mamba"):
        assert built == exported.ours.config
    else:  # what was derived is now written out; the shape is the same
        expected = exported.ours.config
        assert (built.width_of_head, built.width_of_mlp) == (expected.width_of_head, expected.width_of_mlp)
    assert (again.step, again.meta["weights_only"]) == (0, True)


def test_exporting_the_import_gives_the_same_files(exported: Exported, tmp_path: Path) -> None:
    convert.import_folder(exported.folder, tmp_path / "run")
    convert.export(tmp_path / "run", tmp_path / "hf")
    names = sorted(path.name for path in exported.folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "hf").iterdir())
    for name in names:
        assert (tmp_path / "hf" / name).read_bytes() == (exported.folder / name).read_bytes(), name


# --- one export is enough for these


@pytest.fixture(scope="module")
def one(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, make_checkpoint: Callable[..., Checkpoint]
) -> tuple[Checkpoint, Path]:
    root = tmp_path_factory.mktemp("one")
    checkpoint = make_checkpoint(root / "run", shape(tokenizer, num_kv_heads=2))
    convert.export(root / "run", root / "hf")
    return checkpoint, root / "hf"


@pytest.mark.parametrize("text", TEXTS, ids=["plain", "spaces", "unicode", "empty", "space"])
def test_their_tokenizer_gives_our_ids_and_the_text_back(one: tuple[Checkpoint, Path], tokenizer: Tokenizer, text: str) -> None:
    theirs = AutoTokenizer.from_pretrained(one[1])
    ours = tokenizer.encode([text])[0].tolist()
    assert theirs(text)["input_ids"] == ours
    assert theirs.decode(ours) == text
    assert tokenizer.decode(ours) == text


def test_a_special_token_in_a_text_is_text_here_and_the_token_there_unless_asked(
    one: tuple[Checkpoint, Path], tokenizer: Tokenizer
) -> None:
    """`tokenizer.json` is written as it was read, so other libraries read it the usual way."""
    theirs, text = AutoTokenizer.from_pretrained(one[1]), f"one{END_OF_TEXT}two"
    ours = tokenizer.encode([text])[0].tolist()
    assert tokenizer.eos not in ours
    assert tokenizer.decode(ours) == text
    assert theirs(text, split_special_tokens=True)["input_ids"] == ours
    assert theirs(text)["input_ids"].count(tokenizer.eos) == 1


def test_a_bf16_export_is_bf16_there(one: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    convert.export(one[0].path, tmp_path / "hf", "bf16")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    exact = stored(one[0])["model.layers.1.mlp.up.weight"]
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, exact.bfloat16())


def test_shards_with_an_index_load_there_and_here(one: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    whole = tmp_path / "hf"
    convert.export(one[0].path, whole)
    ours, _, _ = convert.open_model(one[0].path, torch.device("cpu"), "fp32")
    (whole / "model.safetensors").unlink()
    tensors = dict(ours.named_parameters())
    hf.write_tensors(whole, ours.config, tensors, lambda names: {n: tensors[n] for n in names}, torch.float32, 30_000)
    assert len(list(whole.glob("*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(whole)
    again, _, _ = convert.open_model(whole, torch.device("cpu"), "fp32")
    tokens = ids(ours.config.vocab_size)
    with torch.no_grad():
        assert torch.equal(again(tokens), ours(tokens))
        assert (theirs(tokens).logits - ours(tokens)).abs().max() <= 1e-4


def test_a_model_opened_in_bf16_holds_bf16_and_computes_nearly_the_same(one: tuple[Checkpoint, Path]) -> None:
    exact, _, _ = convert.open_model(one[0].path, torch.device("cpu"), "fp32")
    rough, _, _ = convert.open_model(one[0].path, torch.device("cpu"), "bf16")
    tokens = ids(exact.config.vocab_size)
    assert {p.dtype for p in rough.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in rough.parameters())
    assert torch.nn.functional.cosine_similarity(exact(tokens), rough(tokens).float(), dim=-1).min() > 0.99


def test_an_existing_folder_is_never_written_over(one: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="there: exists already"):
        convert.export(one[0].path, tmp_path / "there")
    with pytest.raises(ConfigError, match="there: exists already"):
        convert.import_folder(one[1], tmp_path / "there")
    assert list((tmp_path / "there").iterdir()) == []


def test_a_failed_import_leaves_no_run_and_can_be_repeated(one: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    broken = copied(one[1], tmp_path / "hf")
    tokenizer_json = (broken / "tokenizer.json").read_bytes()
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"tokenizer\.json: cannot be read"):
        convert.import_folder(broken, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / ".run.partial").exists()
    (broken / "tokenizer.json").write_bytes(tokenizer_json)
    convert.import_folder(broken, tmp_path / "run")
    assert find(tmp_path / "run").damage() == []


def test_neither_way_needs_transformers(one: tuple[Checkpoint, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # an import of it is now an error
    convert.export(one[0].path, tmp_path / "hf")
    convert.import_folder(tmp_path / "hf", tmp_path / "run")
    assert find(tmp_path / "run").damage() == []


def test_the_model_is_not_built_to_be_exported(
    one: tuple[Checkpoint, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is read in the parts that the files of the export have."""
    read: list[int] = []
    load = sharded.load

    def noted(checkpoint: Checkpoint, tensors: dict[str, Tensor], num_ranks: int) -> None:
        read.append(sum(tensor.nbytes for tensor in tensors.values()))
        load(checkpoint, tensors, num_ranks)

    monkeypatch.setattr(sharded, "load", noted)
    monkeypatch.setattr(hf.write_tensors, "__defaults__", (30_000,))
    convert.export(one[0].path, tmp_path / "hf", "bf16")
    assert len(read) == len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    assert max(read) <= 30_000
    exact = stored(one[0])["model.layers.1.mlp.up.weight"]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert torch.equal(theirs.model.layers[1].mlp.up_proj.weight, exact.bfloat16())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_padded_vocabulary_is_exported_without_its_padding(
    tokenizer: Tokenizer, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, kind: str
) -> None:
    config = shape(tokenizer, kind, vocab_multiple=1000)
    checkpoint = make_checkpoint(tmp_path / "run", config)
    convert.export(checkpoint.path, tmp_path / "hf")
    ours, _, _ = convert.open_model(checkpoint.path, torch.device("cpu"), "fp32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    tokens = ids(tokenizer.vocab_size)
    with torch.no_grad():
        assert ours(tokens).shape == theirs(tokens).logits.shape
        assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


def test_heads_of_later_tokens_are_left_out_aloud(
    tokenizer: Tokenizer, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path / "run", shape(tokenizer, future_tokens=3))
    with pytest.warns(UserWarning, match=r"left out, .*: future_heads\.0\.weight, future_heads\.1\.weight"):
        convert.export(checkpoint.path, tmp_path / "hf")
    ours, _, _ = convert.open_model(checkpoint.path, torch.device("cpu"), "fp32")
    again, _, _ = convert.open_model(tmp_path / "hf", torch.device("cpu"), "fp32")
    assert torch.equal(ours(ids(tokenizer.vocab_size)), again(ids(tokenizer.vocab_size)))


def test_an_export_that_fails_leaves_no_folder(
    tokenizer: Tokenizer, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(config: Any) -> Any:
        raise ConfigError("its code cannot be exported")

    monkeypatch.setattr(modeling, "sources", refused)
    checkpoint = make_checkpoint(tmp_path / "run", shape(tokenizer, mlp="relu2"))
    with pytest.raises(ConfigError, match="its code cannot be exported"):
        convert.export(checkpoint.path, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# --- one torch file


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options", [{}, {"kind": "gpt2"}, {"future_tokens": 2, "mlp": "relu2"}], ids=["llama", "gpt2", "others"]
)
def test_a_torch_file_comes_back_as_the_same_checkpoint(
    tokenizer: Tokenizer, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path, options: dict[str, Any], precision: Any
) -> None:
    """Also one of a model that has no counterpart at Hugging Face."""
    checkpoint = make_checkpoint(tmp_path / "run", shape(tokenizer, **options))
    convert.export(checkpoint.path, tmp_path / "model.pt", precision, "torch")
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    before = stored(checkpoint)
    assert held["model"].keys() == {name.removeprefix("model.") for name in before}
    assert {tensor.dtype for tensor in held["model"].values()} == {torch.float32 if precision == "fp32" else torch.bfloat16}
    convert.import_folder(tmp_path / "model.pt", tmp_path / "again")
    again = find(tmp_path / "again")
    after = stored(again)
    rounded = {name: tensor.to(held["model"][name.removeprefix("model.")].dtype).float() for name, tensor in before.items()}
    assert all(torch.equal(rounded[name], after[name]) for name in before)
    assert again.params == checkpoint.params
    assert (again.path / "tokenizer.json").read_bytes() == (checkpoint.path / "tokenizer.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "model.pt", "run"]


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_torch_file_is_unpickled_by_nobody(tmp_path: Path) -> None:
    torch.save({"model": {}, "params": Trap(tmp_path / "sprung"), "tokenizer": "{}"}, tmp_path / "model.pt")
    with pytest.raises(ConfigError, match=r"model\.pt: is no file of `export --format torch` \(UnpicklingError\)") as caught:
        convert.import_folder(tmp_path / "model.pt", tmp_path / "run")
    assert "weights_only" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.norm.weight": None}, "norm.weight is missing"),
        ({"model.norm.weight": torch.zeros(33)}, "norm.weight is (33,), params say (32,)"),
        ({"model.norm.weight": torch.zeros(32).int()}, "norm.weight is missing, or holds no numbers of a model"),
        ({"model.norm.bias": torch.zeros(32)}, "norm.bias is not known"),
        ({"params": None}, "is no file of `export --format torch` (KeyError)"),
        ({"params": {"model": {"kind": "llama", "dims": 1}}}, "dims"),
        ({"tokenizer": "{}"}, "tokenizer: is not a tokenizer.json"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_torch_file_that_does_not_fit_is_one_error(
    one: tuple[Checkpoint, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    convert.export(one[0].path, tmp_path / "model.pt", "fp32", "torch")
    held = torch.load(tmp_path / "model.pt", weights_only=True)
    for name, value in changes.items():
        part, key = (held["model"], name.removeprefix("model.")) if name.startswith("model.") else (held, name)
        part.pop(key, None)
        if value is not None:
            part[key] = value
    torch.save(held, tmp_path / "changed.pt")
    with pytest.raises(ConfigError) as caught:
        convert.import_folder(tmp_path / "changed.pt", tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_torn_torch_file_is_one_error(one: tuple[Checkpoint, Path], tmp_path: Path, keep: int) -> None:
    convert.export(one[0].path, tmp_path / "model.pt", "fp32", "torch")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "model.pt").read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"torn\.pt: is no file of"):
        convert.import_folder(tmp_path / "torn.pt", tmp_path / "run")
    with pytest.raises(ConfigError, match=r"model\.pt: exists already"):
        convert.export(one[0].path, tmp_path / "model.pt", "fp32", "torch")


# --- folders that others made


def copied(folder: Path, target: Path, **config_changes: Any) -> Path:
    target.mkdir(parents=True)
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **config_changes}))
    return target


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "eos_token_id": 0,
    "bos_token_id": None,
}
THEIR_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
THEIRS = {
    "llama3": ("llama", {"rope_parameters": THEIR_ROPE}),
    "llama, tied, head_dim": ("llama", {"tie_word_embeddings": True, "head_dim": 16}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "gpt2": ("gpt2", {}),
    "mamba2": ("mamba2", {"num_heads": 8, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 10}),
}


@pytest.mark.parametrize(("kind", "options"), THEIRS.values(), ids=THEIRS.keys())
def test_a_folder_saved_by_transformers_imports_with_equal_logits(
    tmp_path: Path,
    tokenizer: Tokenizer,
    tokenizer_file: Path,
    kind: str,
    options: Any,
) -> None:
    torch.manual_seed(0)
    values = AutoConfig.for_model(kind, vocab_size=tokenizer.vocab_size, **SIZES, **options)
    theirs = AutoModelForCausalLM.from_config(values).eval()
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="30KB")
    (tmp_path / "hf" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    convert.import_folder(tmp_path / "hf", tmp_path / "run")
    ours, _, special = convert.open_model(tmp_path / "run", torch.device("cpu"), "fp32")
    tokens = ids(tokenizer.vocab_size)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.5
        assert (ours(tokens) - expected).abs().max() <= 1e-4
    assert special == {"bos": None, "eos": 0}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attention_bias": True}, "attention_bias is True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": "gpt_neox"}, "model_type 'gpt_neox'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'yarn'"),
        ({"intermediate_size": 7}, "config.json says (7, 32)"),
        ({"num_hidden_layers": 1}, "not known ['model.layers.1."),
        ({"num_hidden_layers": 3}, "missing ['model.layers.2."),
        ({"num_attention_heads": 5, "head_dim": None}, "dim 32 does not divide into 5 heads"),
        ({"vocab_size": "many"}, "vocab_size"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_import_that_cannot_be_is_one_error_and_no_folder(
    one: tuple[Checkpoint, Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        convert.import_folder(copied(one[1], tmp_path / "hf", **changes), tmp_path / "run")
    assert words in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_several_end_tokens_are_all_kept(one: tuple[Checkpoint, Path], tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = copied(one[1], tmp_path / "hf", eos_token_id=[5, 9], bos_token_id=3)
    convert.import_folder(folder, tmp_path / "run")
    special = convert.open_model(tmp_path / "run", torch.device("cpu"), "fp32")[2]
    assert special == {"bos": 3, "eos": [5, 9]}
    assert [convert.ids_of(special, name) for name in ("bos", "eos", "pad")] == [[3], [5, 9], []]
    convert.export(tmp_path / "run", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == [5, 9]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == tokenizer.backend.id_to_token(5)


def damage(checkpoint: Checkpoint) -> None:
    file = checkpoint.path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_damaged_checkpoint_is_not_used_and_another_one_is_named(
    tokenizer: Tokenizer, make_checkpoint: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    config = shape(tokenizer, num_layers=1)
    good, bad = (make_checkpoint(tmp_path / "run", config, step) for step in (3, 8))
    damage(bad)
    words = rf"0000000008: is damaged: __0_0\.distcp has changed since it was written\. Use {good.path}\."
    with pytest.raises(ConfigError, match=words):
        convert.export(tmp_path / "run", tmp_path / "hf")
    with pytest.raises(ConfigError, match=words):
        convert.open_model(bad.path, torch.device("cpu"), "fp32")
    assert not (tmp_path / "hf").exists()
    convert.export(good.path, tmp_path / "hf")
    damage(good)
    shutil.rmtree(bad.path)
    with pytest.raises(ConfigError, match=r"0000000003: is damaged: .* There is no other one beside it"):
        convert.open_model(tmp_path / "run", torch.device("cpu"), "fp32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": None}, "tokenizer: is required and was not given"),
        ({"model": None}, "model: is required and was not given"),
        ({"model": None, "tokenizer": None}, "2 problems"),
        ({"tokenizer": {"eos": "</s>"}}, "tokenizer"),
    ],
    ids=str,
)
def test_params_that_say_too_little_are_one_error(
    tokenizer_file: Path, tokenizer: Tokenizer, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    params = {
        "model": {"kind": "llama", "vocab_size": tokenizer.vocab_size, "dim": 16, "num_heads": 2},
        "tokenizer": {"eos": 0},
    }

    def beside(folder: Path) -> None:
        kept = {name: value for name, value in {**params, **change}.items() if value is not None}
        (folder / "params.json").write_text(json.dumps(kept))
        (folder / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())

    sharded.save(Store(tmp_path / "run" / "checkpoints"), 1, {"x": torch.zeros(1)}, {}, beside, convert.ONE)
    with pytest.raises(ConfigError, match=rf"(?s)params\.json: .*{words}"):
        convert.open_model(tmp_path / "run", torch.device("cpu"), "fp32")


def test_a_folder_that_is_none_is_said_to_be_none(one: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is not a Hugging Face folder .*, nor a file"):
        convert.import_folder(tmp_path, tmp_path / "run")
    with pytest.raises(ConfigError, match="is neither a run nor a checkpoint folder"):
        convert.export(tmp_path, tmp_path / "hf")
    (copied(one[1], tmp_path / "torn") / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match=r"torn/config\.json: cannot be read"):
        convert.import_folder(tmp_path / "torn", tmp_path / "run")


def test_an_exported_config_is_read_whole_by_transformers(one: tuple[Checkpoint, Path]) -> None:
    """What they do not know they keep as it is; what they know must not have been replaced by a default."""
    written, read = json.loads((one[1] / "config.json").read_text()), AutoConfig.from_pretrained(one[1]).to_dict()
    kept = {"rope_theta", "rope_scaling", "torch_dtype"}  # in the spelling of transformers 4
    assert {name: read[name] for name in written if name not in kept} == {n: v for n, v in written.items() if n not in kept}
