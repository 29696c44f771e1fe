"""The pages of `docs/` are true: what they show is run, in their order, in a fresh folder.

A block that names a file, as in "```yaml run.yaml", is written there; where the repository has that file, both are equal.
In a `console` block, `$ ` begins a command and what follows is what it prints: `...` stands for anything, and what a clock or
rounding decides (decimals, times, speeds) may differ. A command ends well, or shows an `error:`. Other blocks are not run.
"""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import franca.models.hybrid  # noqa: F401 (with all families)
from franca.models.base import ModelConfig
from franca.models.decoder import TrunkConfig
from franca.models.hf import FAMILIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+) ?(\S*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MEASURED = re.compile(r"\d+\.\d+(e[+-]\d+)?|\d+:\d\d|[\d,]+ tokens/s")
END = "-- end of a command:"
LIMIT_S = 300


def commands_of(blocks: list[Any]) -> list[tuple[str, str]]:
    """The commands of all `console` blocks, each with what it is to print."""
    parts = [part for kind, _, text in blocks if kind == "console" for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]]
    return [(command, shown.strip()) for command, _, shown in (part.partition("\n") for part in parts)]


def fits(printed: str, shown: str) -> bool:
    printed, shown = (MEASURED.sub("#", text) for text in (printed, shown))
    return re.fullmatch(re.escape(shown).replace(re.escape("..."), ".*"), printed, re.DOTALL) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_is_what_happens(page: Path, tmp_path: Path) -> None:
    blocks = BLOCK.findall(page.read_text())
    for _, name, text in blocks:
        if name:
            assert not (ROOT / name).is_file() or (ROOT / name).read_text() == text, f"{page.name}: {name} is not as shown"
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
    commands = commands_of(blocks)
    script = "exec 2>&1\n" + "".join(f"{command}\necho '{END}' $?\n" for command, _ in commands)
    caches = {"HF_HOME": str(tmp_path / "hf_home"), "PYTHONUNBUFFERED": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | caches | {"PATH": path}
    given: dict[str, Any] = {"cwd": tmp_path, "env": environment, "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
    result = subprocess.run(["bash", "-c", script], text=True, timeout=LIMIT_S, **given)
    found = re.findall(rf"(.*?){END} (\d+)\n", result.stdout, re.DOTALL)
    for (command, shown), (printed, code) in zip(commands, found, strict=True):
        assert (code == "0") == ("error: " not in shown), f"{page.name}: $ {command}\nexit code {code}\n{printed}"
        assert fits(printed.strip(), shown), f"{page.name}: $ {command}\n{printed}\n--- the page says\n{shown}"


def test_numbers_that_a_machine_decides_may_differ_and_nothing_else() -> None:
    assert fits("step 3/3 loss 1.25 at 3,100 tokens/s\nin 0:12\nend", "step 3/3 loss 1.5 at 900 tokens/s\n...\nend")
    assert not fits("step 3/3 loss 1.25", "step 2/3 loss 1.25")
    assert not fits("one\ntwo", "one")


def test_every_option_of_every_family_has_its_line() -> None:
    page = (ROOT / "docs" / "models.md").read_text()
    sections = dict[str, str]()
    for title, *text in (section.splitlines() for section in page.split("\n## ")[1:]):
        sections |= dict.fromkeys(re.findall(r"`(\w+)`", title), "\n".join(text))
    shared = {field.name for field in fields(TrunkConfig)}
    families = {kind: family for kind, family in ModelConfig.members.items() if family.__module__.startswith("franca.")}
    options = {"model": shared} | {kind: {f.name for f in fields(x)} - shared - {"kind"} for kind, x in families.items()}
    assert len(options) == 8
    wanted = [(kind, name) for kind, names in options.items() for name in sorted(names)]
    assert [pair for pair in wanted if f"\n| `{pair[1]}` | " not in sections.get(pair[0], "")] == []
    given = {(kind, name) for kind, text in sections.items() for name in re.findall(r"^\| `(\w+)` \| ", text, re.MULTILINE)}
    assert given == set(wanted), "an option that is no more"
    assert [f.architecture for f in FAMILIES.values() if f"`{f.architecture}`" not in page] == []
