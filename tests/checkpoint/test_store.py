"""Commit by rename: a checkpoint is whole or it is not there, whenever the writer dies."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from franca.checkpoint.store import Checkpoint, Store, find, sha256
from franca.core.errors import ConfigError

DIE_AT = Path(__file__).with_name("die_at.py")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "checkpoints")


def commit(store: Store, step: int, content: bytes = b"weights" * 20) -> Checkpoint:
    folder = store.begin(step)
    (folder / "weights").write_bytes(content)
    (folder / "params.json").write_text('{"model": {"kind": "llama"}}')
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in sorted(folder.iterdir())}
    return store.commit(step, {"files": files, "samples": 8 * step})


def steps(store: Store) -> list[int]:
    return [checkpoint.step for checkpoint in store.committed()]


def sentinels(root: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("checkpoint_")) for path in root.glob("checkpoint_*.done"))


# --- what there is


def test_a_store_without_a_folder_is_empty(store: Store) -> None:
    assert store.committed() == []
    assert store.retain(1) == []
    assert not store.root.exists()


def test_a_checkpoint_is_invisible_until_it_is_committed(store: Store) -> None:
    folder = store.begin(5)
    (folder / "weights").write_bytes(b"half")
    assert steps(store) == []
    assert not store.sentinel(5).exists()
    checkpoint = store.commit(5, {"files": {}})
    assert steps(store) == [5]
    assert store.sentinel(5).exists()
    assert not folder.exists()
    assert (checkpoint.path / "weights").read_bytes() == b"half"


def test_committed_ones_are_in_the_order_of_steps(store: Store) -> None:
    for step in (9, 10, 100, 12_345_678_901):
        commit(store, step)
    assert steps(store) == [9, 10, 100, 12_345_678_901]
    (store.root / "0000000050").mkdir()  # no meta.json: not committed by us
    (store.root / "notes.txt").write_text("a user's own")
    assert steps(store) == [9, 10, 100, 12_345_678_901]


def test_a_second_begin_starts_from_an_empty_folder(store: Store) -> None:
    (store.begin(1) / "old").touch()
    assert list(store.begin(1).iterdir()) == []


def test_what_is_committed_is_read_back(store: Store) -> None:
    checkpoint = Checkpoint(commit(store, 3).path)
    assert checkpoint.step == 3
    assert (checkpoint.meta["step"], checkpoint.meta["samples"], checkpoint.meta["format"]) == (3, 24, 1)
    assert checkpoint.params == {"model": {"kind": "llama"}}


def test_a_commit_of_the_same_step_takes_the_place_of_the_old_one(store: Store) -> None:
    commit(store, 3, b"old")
    checkpoint = commit(store, 3, b"new")
    assert (checkpoint.path / "weights").read_bytes() == b"new"
    assert (steps(store), checkpoint.damage(), sentinels(store.root)) == ([3], [], [3])


def test_a_commit_removes_later_ones_that_the_run_fell_back_from(store: Store) -> None:
    """Else `retain(1)` would keep the damaged one, as the newest, and delete the good one."""
    for step in (10, 20, 30):
        commit(store, step)
    (store.folder(30) / "weights").unlink()
    commit(store, 25)
    assert (steps(store), sentinels(store.root)) == ([10, 20, 25], [10, 20, 25])
    store.retain(1)
    assert steps(store) == [25]


@pytest.mark.parametrize(("keep", "left"), [(None, [1, 2, 3, 4]), (9, [1, 2, 3, 4]), (2, [3, 4]), (1, [4]), (0, [4])])
def test_the_newest_are_kept(store: Store, keep: int | None, left: list[int]) -> None:
    for step in (1, 2, 3, 4):
        commit(store, step)
    assert store.retain(keep) == [step for step in (1, 2, 3, 4) if step not in left]
    assert (steps(store), sentinels(store.root)) == (left, left)
    assert sorted(path.name for path in store.root.iterdir() if path.name.startswith(".")) == []


# --- tidying up


def test_tidy_makes_the_folder(store: Store) -> None:
    store.tidy()
    assert list(store.root.iterdir()) == []


def test_tidy_sweeps_what_is_half_there_and_mends_sentinels(store: Store) -> None:
    commit(store, 1), commit(store, 2)
    (store.begin(3) / "weights").write_bytes(b"half")
    shutil.copytree(store.folder(1), store.root / ".0000000000.deleting")
    store.sentinel(1).unlink()
    store.sentinel(8).touch()
    store.tidy()
    assert (steps(store), sentinels(store.root)) == ([1, 2], [1, 2])
    assert [path.name for path in store.root.iterdir() if path.name.startswith(".")] == []


def test_tidy_leaves_what_is_not_ours(store: Store) -> None:
    commit(store, 1)
    for name in ("checkpoint_best.done", "notes.txt", ".gitignore"):
        (store.root / name).write_text("a user's own")
    store.tidy()
    for name in ("checkpoint_best.done", "notes.txt", ".gitignore"):
        assert (store.root / name).read_text() == "a user's own"


# --- death at every moment


def died_everywhere(tmp_path: Path, template: Store, action: str) -> list[Store]:
    """The stores as they were left by processes killed before the 1st, 2nd, ... operation; the last one was not killed."""
    output = tmp_path / action
    output.mkdir()
    subprocess.run([sys.executable, str(DIE_AT), str(template.root), str(output), action], check=True, timeout=120)
    return [Store(path) for path in sorted(output.iterdir())]


def sound(store: Store) -> bool:
    """Everything visible is whole, everything else is gone, and the sentinels say the same."""
    hidden = [path.name for path in store.root.iterdir() if path.name.startswith(".")]
    damage = [text for checkpoint in store.committed() for text in checkpoint.damage()]
    return not hidden and not damage and sentinels(store.root) == steps(store)


def test_a_death_while_writing_leaves_the_old_ones_and_the_new_one_whole_or_not_at_all(tmp_path: Path, store: Store) -> None:
    commit(store, 1), commit(store, 2)
    left = died_everywhere(tmp_path, store, "commit")
    seen = []
    for dead in left:
        seen.append(steps(dead))
        assert all(checkpoint.damage() == [] for checkpoint in dead.committed())  # also before anyone has tidied up
        assert set(sentinels(dead.root)) <= set(steps(dead))
        dead.tidy()
        assert steps(dead) == seen[-1]
        assert sound(dead)
    assert len(left) > 8
    assert seen == sorted(seen)  # not there, then there for good
    assert (seen[0], seen[-1]) == ([1, 2], [1, 2, 3])


def test_a_death_while_replacing_a_damaged_one_costs_no_good_one(tmp_path: Path, store: Store) -> None:
    commit(store, 1), commit(store, 2)
    (store.folder(2) / "weights").write_bytes(b"damaged")
    left = died_everywhere(tmp_path, store, "replace")
    for dead in left:
        assert {1} <= set(steps(dead)) <= {1, 2}
        dead.tidy()
        assert Checkpoint(dead.folder(1)).damage() == []
        new = dead.folder(2) / "more"
        assert not new.exists() or Checkpoint(dead.folder(2)).damage() == []
    assert sound(left[-1])
    assert (steps(left[-1]), len(left) > 12) == ([1, 2], True)


def test_a_death_while_deleting_leaves_every_checkpoint_whole_or_not_at_all(tmp_path: Path, store: Store) -> None:
    for step in (1, 2, 3):
        commit(store, step)
    left = died_everywhere(tmp_path, store, "retain")
    seen = []
    for dead in left:
        seen.append(steps(dead))
        assert all(checkpoint.damage() == [] for checkpoint in dead.committed())
        assert set(sentinels(dead.root)) <= set(steps(dead))
        dead.tidy()
        assert steps(dead) == seen[-1]
        assert sound(dead)
    assert len(left) > 8
    assert seen[0] == [1, 2, 3]
    assert [2, 3] in seen
    assert seen[-1] == [3]


# --- damage


def test_a_whole_checkpoint_has_no_damage(store: Store) -> None:
    assert commit(store, 1).damage() == []


@pytest.mark.parametrize("name", ["weights", "params.json", "meta.json"])
def test_every_flipped_byte_is_damage(store: Store, name: str) -> None:
    checkpoint = commit(store, 1)
    file = checkpoint.path / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert Checkpoint(checkpoint.path).damage() != [], f"byte {place} of {name}: {whole[place : place + 1]!r}"
    file.write_bytes(whole)
    assert Checkpoint(checkpoint.path).damage() == []


@pytest.mark.parametrize("name", ["weights", "params.json", "meta.json"])
def test_every_truncation_is_damage(store: Store, name: str) -> None:
    checkpoint = commit(store, 1)
    file = checkpoint.path / name
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert Checkpoint(checkpoint.path).damage() != [], f"{name} cut to {length} bytes"


@pytest.mark.parametrize("name", ["weights", "params.json", "meta.json"])
def test_a_removed_file_is_damage_that_names_it(store: Store, name: str) -> None:
    checkpoint = commit(store, 1)
    (checkpoint.path / name).unlink()
    [text] = Checkpoint(checkpoint.path).damage()
    assert name in text


def test_several_checkers_find_together_what_one_finds(store: Store) -> None:
    checkpoint = commit(store, 1)
    for name in ("weights", "params.json"):
        (checkpoint.path / name).unlink()
    alone = checkpoint.damage()
    for parts in (2, 3, 5):
        assert sorted(text for part in range(parts) for text in checkpoint.damage(part, parts)) == sorted(alone)
    assert len(alone) == 2


@pytest.mark.parametrize("content", ["", "[]", "3", "null", "{}", '{"format": 2}', "\udcff"])
def test_a_meta_file_that_says_nothing_is_one_error(store: Store, content: str) -> None:
    checkpoint = commit(store, 1)
    (checkpoint.path / "meta.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match=checkpoint.path.name):
        _ = Checkpoint(checkpoint.path).meta
    assert len(Checkpoint(checkpoint.path).damage()) == 1


def test_the_checksum_is_of_everything_that_meta_json_says(store: Store) -> None:
    checkpoint = commit(store, 1)
    values = json.loads((checkpoint.path / "meta.json").read_text())
    for name in [name for name in values if name != "format"]:
        (checkpoint.path / "meta.json").write_text(json.dumps({**values, name: None}))
        assert Checkpoint(checkpoint.path).damage() == ["meta.json has changed since it was written"]


# --- what a user means


def test_a_run_means_its_newest_checkpoint(tmp_path: Path) -> None:
    store = Store(tmp_path / "run" / "checkpoints")
    commit(store, 1), commit(store, 2)
    assert find(tmp_path / "run").step == 2
    assert find(store.folder(1)).step == 1


def test_a_run_may_be_named_by_a_number(tmp_path: Path) -> None:
    commit(Store(tmp_path / "4711" / "checkpoints"), 2)
    assert find(tmp_path / "4711").step == 2


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    store = Store(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match="is neither a run nor a checkpoint folder"):
        find(tmp_path / "run")
    store.begin(3)
    with pytest.raises(ConfigError, match="has no committed checkpoint yet"):
        find(tmp_path / "run")
    with pytest.raises(ConfigError, match="is no committed checkpoint"):
        find(store.partial(3))
    with pytest.raises(ConfigError, match="is no committed checkpoint"):
        find(store.folder(3))
