"""Folders with their own code: transformers loads them without franca and computes the same, and we never run that code."""

import ast
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import franca.models.hybrid  # noqa: F401 (all families)
from franca.checkpoint import convert, sharded
from franca.checkpoint.store import Checkpoint, find
from franca.core.config import check, to_dict
from franca.core.errors import ConfigError
from franca.data.tokenizer import Tokenizer
from franca.infer.generate import SamplingConfig, generate
from franca.models import hf, modeling, scan
from franca.models.base import IGNORE, Batch, ModelConfig

RNN = {"width_multiple": 16, "conv_size": 3}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
LLAMA = {"kind": "llama", "num_heads": 4, "num_kv_heads": 2, "mlp_dim": 40, "rope_scaling": SCALING}
MAMBA = {"kind": "mamba", "head_dim": 8, "state_dim": 6, "num_groups": 2}
HAWK = {"kind": "hawk", "mlp_dim": 40, "mlp": "gelu", **RNN}
SHAPES: dict[str, dict[str, Any]] = {
    "mingru": {"kind": "mingru", **RNN},
    "minlstm, tied": {"kind": "minlstm", "tied": True, "gate": "lingua", **RNN},
    "hawk": HAWK,
    "mamba without dt_bias, tied": {**MAMBA, "dt_bias": False, "tied": True},
    "hybrid": {"kind": "hybrid", "num_layers": 3, "blocks": [HAWK, {**LLAMA, "window": 5}, MAMBA]},
    "relu2": {**LLAMA, "mlp": "relu2", "vocab_multiple": 100},
    "relu2, tied, later tokens": {**LLAMA, "mlp": "relu2", "tied": True, "future_tokens": 3, "vocab_multiple": 100},
    "mine": {"kind": "zigzag", "sizes": {"even": 24, "odd": 40}},
}
MINE = {
    "__init__.py": "",
    "config.py": '''"""An architecture of my own: layers of two sizes in turn."""

import importlib
import typing as t

from pydantic import Field
from torch import nn

from franca.core import config as core
from franca.core.config import Count
from franca.models.decoder import TrunkConfig

from . import blocks

core_config = core.config


@core_config
class Sizes:
    even: Count
    odd: t.Annotated[int, Field(ge=1)]

    def of(self, number: int) -> int:
        return self.odd if number % 2 else self.even


@core_config
class ZigzagConfig(TrunkConfig):
    kind: t.Literal["zigzag"]
    sizes: Sizes

    def block(self, number: int) -> nn.Module:
        return blocks.Block(self, self.sizes.of(number))

    def problems(self) -> list[str]:
        return []
''',
    "blocks.py": """import torch
from torch import nn

from franca.models import scan as scans
from franca.models.layers import (
    Linear,
    RMSNorm as Norm,
)


class Block(nn.Module):
    def __init__(self, c, width: int) -> None:
        from .half import half

        super().__init__()
        self.norm, self.input = Norm(c.dim, c.norm_eps), Linear(c.dim, width, c.init_std)
        self.T = nn.Parameter(torch.empty(width, width))
        self.output, self.keep = Linear(width, c.dim, c.residual_std), half(1.0)

    def reset(self, generator) -> None:
        nn.init.normal_(self.T, generator=generator)

    def forward(self, x, context, state):
        new = (self.input(self.norm(x)) @ self.T.to(x.dtype)).float()
        keep = torch.full_like(new, self.keep)
        if context.starts_BT is not None:
            keep = keep.masked_fill(context.starts_BT.unsqueeze(2), 0)
        h = scans.linear_scan(keep, new, None if state is None else state["hidden"])
        if state is not None:
            state["hidden"].copy_(h[:, -1])
        return x + self.output(h.to(x.dtype))

    def new_state(self, rows, max_len, dtype, device):
        return {"hidden": torch.zeros(rows, self.T.shape[0], device=device)}

    def mixing_flops(self, context: int) -> float:
        return 0.0
""",
    "half.py": "def half(x: float) -> float:\n    return x / 2\n",
    "unused.py": "raise RuntimeError\n",
}
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [300, 20, 30]]
# What a reader without franca makes of the folders, all in one process.
READER = """
import sys
sys.modules["franca"] = sys.modules["my_zoo"] = None
import torch
from transformers import AutoModelForCausalLM

out, prompts, tokens, labels = torch.load(sys.argv[1], weights_only=True)
results = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    rough = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        results[folder] = {
            "logits": model(tokens).logits,
            "right": model(tokens, attention_mask=torch.arange(tokens.shape[1]).lt(30).expand(tokens.shape)).logits[:, :30],
            "loss": model(tokens, labels=labels).loss,
            "shared loss": model(tokens, labels=labels, num_items_in_batch=7).loss,
            "single": [model.generate(torch.tensor([p]), **greedy)[0, len(p):].tolist() for p in prompts],
            "padded": model.generate(padded, attention_mask=mask, **greedy)[:, longest:].tolist(),
            "rough": rough(tokens).logits,
            "exact": sorted(n for n, p in rough.named_parameters() if p.dtype == torch.float32),
            "num_parameters": sum(p.numel() for p in model.parameters()),
        }
    model.save_pretrained(folder + "-saved", max_shard_size="40KB")
torch.save(results, out)
"""


def tokens_of(vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (2, 50), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def my_zoo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A user's package on the path, as `imports: [my_zoo.config]` finds it; and a place for what transformers copies."""
    root = tmp_path_factory.mktemp("path")
    (root / "my_zoo").mkdir()
    for name, text in MINE.items():
        (root / "my_zoo" / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(root / "modules"))
        importlib.import_module("my_zoo.config")
        yield
    ModelConfig.members.pop("zigzag")
    for name in [name for name in sys.modules if name.split(".")[0] in ("my_zoo", "transformers_modules")]:
        del sys.modules[name]


def shape(tokenizer: Tokenizer, **options: Any) -> Any:
    shared = {"vocab_size": tokenizer.vocab_size, "dim": 32, "num_layers": 2, "max_seq_len": 64}
    return check(modeling.Stored, {"shape": {**shared, **options}}, "shape").shape


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer, make_checkpoint: Callable[..., Checkpoint]
) -> dict[str, tuple[Checkpoint, Path]]:
    """Every shape as (checkpoint, its export); all folders have one name."""
    made = {}
    for name, options in SHAPES.items():
        root = tmp_path_factory.mktemp("export")
        checkpoint = make_checkpoint(root / "run", shape(tokenizer, **options))
        convert.export(root / "run", root / "my-model")
        made[name] = checkpoint, root / "my-model"
    return made


@pytest.fixture(scope="module")
def read(
    folders: dict[str, tuple[Checkpoint, Path]], tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer
) -> dict[str, dict[str, Any]]:
    """What `READER` made of every folder."""
    root, tokens = tmp_path_factory.mktemp("read"), tokens_of(tokenizer.vocab_size)
    labels = tokens.clone()
    labels[0, :9] = IGNORE
    torch.save((str(root / "out.pt"), PROMPTS, tokens, labels), root / "in.pt")
    (root / "reader.py").write_text(READER)
    paths = {name: str(folder) for name, (_, folder) in folders.items()}
    command = [sys.executable, str(root / "reader.py"), str(root / "in.pt"), *paths.values()]
    environment = {"HF_HOME": str(root / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(root / "out.pt", weights_only=True)
    return {name: results[path] for name, path in paths.items()}


def stored(checkpoint: Checkpoint) -> dict[str, Tensor]:
    model = check(convert.Params, checkpoint.params, "params.json").model.build()
    tensors = {f"model.{name}": torch.full_like(p, torch.nan) for name, p in model.named_parameters()}
    sharded.load(checkpoint, tensors, num_ranks=1)
    return tensors


@pytest.mark.parametrize("name", SHAPES)
def test_without_franca_transformers_computes_the_same(
    name: str, folders: dict[str, tuple[Checkpoint, Path]], read: dict[str, dict[str, Any]], tokenizer: Tokenizer
) -> None:
    ours, _, _ = convert.open_model(folders[name][0].path, torch.device("cpu"), "fp32")
    theirs, tokens = read[name], tokens_of(tokenizer.vocab_size)
    expected = ours(tokens)
    assert expected.std() > 0.3  # else the tolerance would say nothing
    assert (theirs["logits"] - expected).abs().max() <= 1e-5
    assert (theirs["right"] - expected[:, :30]).abs().max() <= 1e-4  # masked: other sums
    targets = torch.cat([tokens[:, 1:], torch.full((2, 1), IGNORE)], dim=1)
    targets[0, :8] = IGNORE
    nll = ours.losses(Batch(tokens, targets))["nll"]
    assert theirs["loss"] == pytest.approx(float(nll) / (49 + 41), rel=1e-5)
    assert theirs["shared loss"] == pytest.approx(float(nll) / 7, rel=1e-5)
    greedy = [result.tokens for result in generate(ours, PROMPTS, SamplingConfig(max_new_tokens=6, temperature=0.0))]
    assert theirs["single"] == greedy
    assert theirs["padded"] == greedy
    assert len({token for row in greedy for token in row}) > 5
    padding = sum(p.numel() - p[: tokenizer.vocab_size].numel() for p in ours.parameters() if len(p) == ours.config.num_rows)
    assert theirs["num_parameters"] == sum(p.numel() for p in ours.parameters()) - padding


@pytest.mark.parametrize("name", SHAPES)
def test_in_bf16_both_keep_decays_and_steps_of_time_in_fp32(
    name: str, folders: dict[str, tuple[Checkpoint, Path]], read: dict[str, dict[str, Any]], tokenizer: Tokenizer
) -> None:
    ours, _, _ = convert.open_model(folders[name][0].path, torch.device("cpu"), "bf16")
    exact = sorted(f"model.{n}" for n, p in ours.named_parameters() if p.dtype == torch.float32)
    assert read[name]["exact"] == exact
    ends = {n.rsplit(".", 1)[-1] for n in exact}
    kinds = {"hawk": {"decay"}, "mamba without dt_bias, tied": {"a_log", "skip"}, "mine": {"T"}}
    assert ends == kinds.get(name, {"decay", "a_log", "dt_bias", "skip"} if name == "hybrid" else set())
    expected, theirs = ours(tokens_of(tokenizer.vocab_size)), read[name]["rough"]
    assert theirs.dtype == expected.dtype == torch.bfloat16
    assert (theirs.float() - expected.float()).norm() <= 1e-3 * expected.float().norm()


@pytest.mark.parametrize("name", SHAPES)
def test_the_import_of_such_a_folder_gives_back_every_bit(
    name: str,
    folders: dict[str, tuple[Checkpoint, Path]],
    read: dict[str, dict[str, Any]],
    tmp_path: Path,
    tokenizer: Tokenizer,
) -> None:
    """Also of one that transformers has saved, in several files."""
    checkpoint, folder = folders[name]
    saved = folder.with_name(folder.name + "-saved")
    assert len(list(saved.glob("*.safetensors"))) > 1
    (saved / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    before = stored(checkpoint)
    for number, source in enumerate((folder, saved)):
        convert.import_folder(source, tmp_path / f"run-{number}")
        again = find(tmp_path / f"run-{number}")
        after = stored(again)
        assert before.keys() == after.keys()
        for n, tensor in after.items():
            padded = len(before[n]) != len(tensor)
            assert torch.equal(tensor, before[n][: tokenizer.vocab_size] if padded else before[n])
        expected = {**checkpoint.params, "model": {**checkpoint.params["model"], "vocab_multiple": 1}}
        assert again.params == expected
    convert.export(tmp_path / "run-0", tmp_path / "hf")
    for file in folder.iterdir():
        assert (tmp_path / "hf" / file.name).read_bytes() == file.read_bytes(), file.name


def test_the_code_imports_nothing_but_python_torch_and_transformers(folders: dict[str, tuple[Checkpoint, Path]]) -> None:
    for _, folder in folders.values():
        for file in folder.glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                assert {name.split(".")[0] for name in names} <= {"torch", "transformers", *sys.stdlib_module_names}, file
            assert "# From franca" in file.read_text() or file.name.startswith("my_zoo")


def test_what_the_model_does_not_need_stays_at_home(folders: dict[str, tuple[Checkpoint, Path]]) -> None:
    ours = {f"franca_models_{name}.py" for name in ("base", "decoder", "layers", "plain_config")} | {"modeling_franca.py"}
    zoo = {"my_zoo_config.py", "my_zoo_blocks.py", "my_zoo_half.py"}
    for name, files in {"relu2": {"llama"}, "mingru": {"minrnn", "scan"}, "hawk": {"hawk", "scan", "llama"}}.items():
        found = {file.name for file in folders[name][1].glob("*.py")}
        assert found == ours | {f"franca_models_{file}.py" for file in files}
    assert {file.name for file in folders["mine"][1].glob("*.py")} >= ours | zoo
    assert not (folders["mine"][1] / "my_zoo_unused.py").exists()


def operator(module: Any) -> str:
    """The name under which PyTorch knows a module's linear scan."""
    return module._scan._opoverload.name()


def test_such_folders_load_beside_franca(folders: dict[str, tuple[Checkpoint, Path]], tokenizer: Tokenizer) -> None:
    """Two of one name, whose code differs, and each of them twice; ours goes on as before."""
    tokens = tokens_of(tokenizer.vocab_size)
    loaded = []
    for name in ("hawk", "hybrid", "hawk", "hybrid"):
        checkpoint, folder = folders[name]
        ours, _, _ = convert.open_model(checkpoint.path, torch.device("cpu"), "fp32")
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        loaded.append((ours, theirs))
        for mine, other in loaded:
            with torch.no_grad():
                assert (other(tokens).logits - mine(tokens)).abs().max() <= 1e-5
    scans = [module for name, module in sys.modules.items() if name.endswith("franca_models_scan")]
    assert len({operator(module) for module in [*scans, scan]}) == len(scans) + 1 == 3
    theirs = AutoTokenizer.from_pretrained(folders["hawk"][1])
    assert theirs.eos_token_id == tokenizer.eos


def test_a_new_model_of_the_folders_config_can_be_trained(folders: dict[str, tuple[Checkpoint, Path]]) -> None:
    values = AutoConfig.from_pretrained(folders["hybrid"][1], trust_remote_code=True)
    assert (values.hidden_size, values.num_hidden_layers, values.max_position_embeddings) == (32, 3, 64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(values, trust_remote_code=True)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.1)
    tokens = tokens_of(values.vocab_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(values.vocab_size), rel=0.05)
    assert losses[-1] < losses[0] - 0.5


def test_a_mask_with_holes_and_a_text_too_long_are_refused(folders: dict[str, tuple[Checkpoint, Path]]) -> None:
    relu2, mingru = (AutoModelForCausalLM.from_pretrained(folders[n][1], trust_remote_code=True) for n in ("relu2", "mingru"))
    tokens = torch.zeros(2, 5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"attention_mask, \(2, 5\): expected \(2, 5\), each row's ones without holes"):
        mingru(tokens, attention_mask=torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 1, 1]]))
    with pytest.raises(ValueError, match=r"attention_mask, \(2, 1, 5, 5\)"):
        mingru(tokens, attention_mask=torch.zeros(2, 1, 5, 5))
    with pytest.raises(ValueError, match="65 tokens were given; the model has positions for 64"):
        relu2(torch.zeros(1, 65, dtype=torch.int64))
    assert mingru(torch.zeros(1, 65, dtype=torch.int64)).logits.shape[:2] == (1, 65)  # it has no positions


def test_shards_are_made_and_read(folders: dict[str, tuple[Checkpoint, Path]], tmp_path: Path, tokenizer: Tokenizer) -> None:
    checkpoint, _ = folders["relu2, tied, later tokens"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf.write_tensors, "__defaults__", (30_000,))
        convert.export(checkpoint.path, tmp_path / "hf", "bf16")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True, dtype="auto")
    assert {p.dtype for p in theirs.parameters()} == {torch.bfloat16}
    ours, _, _ = convert.open_model(checkpoint.path, torch.device("cpu"), "bf16")
    tokens = tokens_of(tokenizer.vocab_size)
    assert (theirs(tokens).logits.float() - ours(tokens).float()).norm() <= 1e-3 * ours(tokens).float().norm()
    names = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {"model.future_heads.0.weight", "model.layers.0.attention.query.weight"} <= names.keys()


# --- nothing of a folder is run


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    """The folder with other values in config.json, and a trap in every file of its code."""
    target.mkdir()
    for file in folder.iterdir():
        trap = f"open({str(target / 'sprung')!r}, 'w')\n".encode() if file.suffix == ".py" else b""
        (target / file.name).write_bytes(trap + file.read_bytes())
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **changes}))
    return target


def test_the_code_of_a_folder_is_not_run_by_us(folders: dict[str, tuple[Checkpoint, Path]], tmp_path: Path) -> None:
    folder = copied(folders["hybrid"][1], tmp_path / "hf")
    modules = set(sys.modules)
    convert.import_folder(folder, tmp_path / "run")
    convert.open_model(folder, torch.device("cpu"), "fp32")
    assert not (folder / "sprung").exists()
    assert set(sys.modules) == modules


def test_the_command_line_knows_all_families(folders: dict[str, tuple[Checkpoint, Path]], tmp_path: Path) -> None:
    for words in (["import", str(folders["hawk"][1]), "run"], ["export", "run", "again"]):
        command = [sys.executable, "-m", "franca", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    for file in folders["hawk"][1].iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": None}, "kind None; expected one of"),
        ({"shape": [1]}, "kind None; expected one of"),
        ({"kind": "sphinx"}, "its model is of kind 'sphinx'; expected one of gpt2, hawk"),
        ({"kind": "sphinx"}, "The code in the folder is not run: if you have the module"),
        ({"blocks": [{"kind": "sphinx"}]}, "shape.blocks[0].kind: 'sphinx' is not one of"),
        ({"imports": ["this"]}, "shape.imports: unknown key"),
        ({"dim": "wide"}, "shape.dim"),
        ({"blocks": [{**LLAMA, "num_heads": 5}]}, "dim 32 does not divide into 5 heads"),
        ({"num_layers": 2}, "not known ['model.layers.2."),
        ({"num_layers": 4}, "missing ['model.layers.3."),
    ],
    ids=str,
)
def test_a_shape_that_cannot_be_is_one_error(
    folders: dict[str, tuple[Checkpoint, Path]], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    shape = json.loads((folders["hybrid"][1] / "config.json").read_text())["shape"]
    changes = changes if "shape" in changes else {"shape": {**shape, **changes}}
    with pytest.raises(ConfigError) as caught:
        convert.import_folder(copied(folders["hybrid"][1], tmp_path / "hf", **changes), tmp_path / "run")
    assert words in str(caught.value)
    assert "this" not in sys.modules
    assert not (tmp_path / "hf" / "sprung").exists()
    assert not (tmp_path / "run").exists()


# --- what cannot go along


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import my_zoo.half as h\n", r"my_zoo\.bad0, line 1: `import my_zoo\.half` cannot be exported; write `from"),
        ("import my_zoo.half\n\nx = my_zoo.half.half(1)\n", r"my_zoo\.bad1, line 1: `import my_zoo\.half` cannot be exported"),
        ("from franca.core.config import Count, check\n", r"my_zoo\.bad2, line 1: check of franca\.core\.config cannot be"),
    ],
    ids=["import as", "import", "core.config"],
)
def test_an_import_that_cannot_be_turned_is_an_error(
    text: str, words: str, request: pytest.FixtureRequest, tokenizer: Tokenizer
) -> None:
    name = f"bad{['import as', 'import', 'core.config'].index(request.node.callspec.id)}"
    config = shape(tokenizer, **SHAPES["mine"])
    folder = Path(sys.modules["my_zoo"].__file__ or "").parent
    (folder / f"{name}.py").write_text(text)
    importlib.invalidate_caches()
    importlib.import_module(f"my_zoo.{name}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(config), "__module__", f"my_zoo.{name}")
        with pytest.raises(ConfigError, match=words):
            modeling.sources(config)


ALONE = """import typing as t

import franca.models.hybrid
from franca.core.config import config
from franca.models.decoder import TrunkConfig
from my_parts import Identity


@config
class AloneConfig(TrunkConfig):
    kind: t.Literal["alone"]

    def block(self, number):
        return Identity()
"""


def test_a_module_beside_a_users_module_goes_along(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Two files in a folder without a package; what is installed elsewhere is not copied."""
    (tmp_path / "my_parts.py").write_text("import yaml\nfrom torch.nn import Identity\n\nyaml.safe_dump({})\n")
    (tmp_path / "my_alone.py").write_text(ALONE)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        importlib.import_module("my_alone")
        files = modeling.sources(shape(tokenizer, kind="alone"))
    assert ModelConfig.members.pop("alone")
    assert {"my_alone.py", "my_parts.py"} <= files.keys()
    assert not any("yaml" in name or "hybrid" in name for name in files)
    assert "from .my_parts import Identity" in files["my_alone.py"]
    assert "import franca." not in files["my_alone.py"]
    assert "import yaml" in files["my_parts.py"]


def test_a_shape_is_written_as_params_say_it(tokenizer: Tokenizer) -> None:
    config = shape(tokenizer, **SHAPES["hybrid"])
    assert modeling.to_config(config)["shape"] == to_dict(config)
