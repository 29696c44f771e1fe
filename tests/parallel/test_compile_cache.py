"""What was compiled is found again by the next start, in a folder that is this user's alone."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from franca.core.config import check
from franca.core.errors import ConfigError
from franca.models.layers import Linear
from franca.parallel import world
from franca.parallel.apply import parallelize
from franca.parallel.mesh import ALONE, ParallelConfig

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own; what is set is put back."""
    for name in (VARIABLE, "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "franca"


class Block(nn.Module):
    """Two products and something between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = Linear(8, 16, 0.1), Linear(16, 8, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().sum()


def start(**parallel: Any) -> tuple[list[Tensor], dict[str, dict[str, int]]]:
    """A job's first step as a new process would make it: the loss and all gradients, and the compiler's counters."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import clear_caches

    torch._dynamo.reset()
    clear_caches()
    counters.clear()
    os.environ.pop(VARIABLE, None)  # the compiler sets it, whoever asks for its folder
    with torch.device("meta"):
        model = Tiny()
    parallelize(model, ALONE, check(ParallelConfig, parallel, "test"), "fp32", torch.device("cpu"), seed=0)
    loss = model(torch.linspace(-1, 1, 32).view(4, 8).requires_grad_())
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())], {name: dict(counts) for name, counts in counters.items()}


def test_the_second_start_finds_what_the_first_compiled(home: Path) -> None:
    """All blocks share one graph; recomputation by operator does not keep it from being found."""
    recompute = {"kind": "selective", "every_second_product": True}
    plain, _ = start()
    first, cold = start(recompute=recompute, compile=True)
    assert home.stat().st_mode & 0o777 == 0o700
    (folder,) = home.iterdir()
    assert folder.name.startswith(f"torch-{torch.__version__}-python-3.")
    assert any(path.is_file() for path in folder.rglob("*"))
    second, warm = start(recompute=recompute, compile=True)
    for given in (first, second):
        for mine, theirs in zip(given, plain, strict=True):
            torch.testing.assert_close(mine, theirs)
    assert cold["stats"]["unique_graphs"] == warm["stats"]["unique_graphs"] == 1
    assert not cold.get("graph_break")
    assert cold["aot_autograd"]["autograd_cache_miss"] >= 1
    assert warm["aot_autograd"]["autograd_cache_hit"] >= 1
    assert not {"autograd_cache_miss", "autograd_cache_bypass"} & set(warm["aot_autograd"])
    assert not {"fxgraph_cache_miss", "fxgraph_cache_bypass"} & set(warm.get("inductor", {}))


def test_a_budget_is_the_compilers_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._functorch.config as functorch

    monkeypatch.setattr(functorch, "activation_memory_budget", 1.0)
    parallel = check(ParallelConfig, {"recompute": {"kind": "budget", "budget": 0.25}, "compile": True}, "test")
    parallel.recompute.apply(Tiny().layers)
    assert functorch.activation_memory_budget == 0.25


def test_the_folder_is_chosen_by_the_user_before_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.keep_compiled(str(tmp_path / "chosen" / "here"))
    chosen = os.environ[VARIABLE]
    assert Path(chosen).parent == tmp_path / "chosen" / "here"
    world.keep_compiled("auto")
    assert os.environ[VARIABLE] == chosen, "what the environment says stays"
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(world.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    world.keep_compiled("auto")
    assert Path(os.environ[VARIABLE]).parent == tmp_path / "tmp" / f"franca-{os.getuid()}"
    assert stat.S_IMODE(Path(os.environ[VARIABLE]).parent.stat().st_mode) == 0o700


def test_a_cache_that_others_may_write_is_not_used(home: Path) -> None:
    home.mkdir()
    home.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write there"):
        world.keep_compiled("auto")
    home.rmdir()
    home.symlink_to(home.parent / "elsewhere")
    (home.parent / "elsewhere").mkdir()
    with pytest.raises(ConfigError, match="others may write there"):
        world.keep_compiled("auto")
    assert VARIABLE not in os.environ


def test_none_keeps_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler.config, "force_disable_caches", False)
    world.keep_compiled("none")
    assert torch.compiler.config.force_disable_caches
    assert not home.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/cache: cannot keep what is compiled .* set parallel.compile_cache"):
        world.keep_compiled(str(tmp_path / "file" / "cache"))
