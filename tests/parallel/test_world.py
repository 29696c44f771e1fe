"""Timeouts, the flight recorder and determinism: what is set, when, and never over a user's own setting."""

import multiprocessing
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from franca.core.errors import ConfigError
from franca.parallel import world
from franca.parallel.world import World

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    return group._get_backend(CPU).options._timeout


def test_a_timeout_reaches_every_group_of_its_device() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=600))
    try:
        groups = [dist.group.WORLD, dist.new_group([0], timeout=timedelta(seconds=77))]
        assert [timeout_of(group).total_seconds() for group in groups] == [600, 77]
        world.set_timeout("cpu", 5)
        assert [timeout_of(group).total_seconds() for group in groups] == [5, 5]
    finally:
        dist.destroy_process_group()


def wait_for_a_late_rank(rank: int, store: Path, over: multiprocessing.Event) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
    dist.all_reduce(torch.ones(1))  # with the loose timeout: both are there
    if rank == 1:
        os._exit(0 if over.wait(60) else 1)  # never comes
    world.set_timeout("cpu", 0.2)
    try:
        dist.all_reduce(torch.ones(1))
        code = 2
    except RuntimeError as error:
        code = 0 if "Timed out waiting 200ms" in str(error) else 3
    over.set()
    os._exit(code)


def test_a_tight_timeout_ends_the_wait_for_a_rank_that_does_not_come(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    over = fork.Event()
    processes = [fork.Process(target=wait_for_a_late_rank, args=(rank, tmp_path / "store", over)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(80)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("name", ["TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"])
def test_the_flight_recorder_dumps_into_the_run_unless_the_user_said_where(monkeypatch, tmp_path, name: str) -> None:
    monkeypatch.setattr(os, "environ", {})
    World(0, 2, 0, CPU).dump_flights_to(tmp_path / "rank")
    assert os.environ == {}, "there is no NCCL on a CPU"
    World(0, 2, 0, CUDA).dump_flights_to(tmp_path / "rank")
    assert os.environ == {"TORCH_FR_DUMP_TEMP_FILE": str(tmp_path / "rank")}
    mine = {name: "/mine/rank"}
    monkeypatch.setattr(os, "environ", dict(mine))
    World(0, 2, 0, CUDA).dump_flights_to(tmp_path / "rank")
    assert os.environ == mine


def test_determinism_on_a_gpu_needs_a_workspace_of_cublas(monkeypatch) -> None:
    try:
        monkeypatch.setattr(os, "environ", {"CUBLAS_WORKSPACE_CONFIG": ":0:0"})
        with pytest.raises(ConfigError, match=r"needs CUBLAS_WORKSPACE_CONFIG :4096:8 or :16:8, but it is ':0:0'. Unset it"):
            world.set_deterministic(True, CUDA)
        assert not torch.are_deterministic_algorithms_enabled()
        world.set_deterministic(False, CUDA)  # nobody's business then
        for given, used in (({}, ":4096:8"), ({"CUBLAS_WORKSPACE_CONFIG": ":16:8"}, ":16:8")):
            monkeypatch.setattr(os, "environ", dict(given))
            world.set_deterministic(True, CUDA)
            assert os.environ == {"CUBLAS_WORKSPACE_CONFIG": used}
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.backends.cudnn.deterministic
        with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
            torch.ones(3).put_(torch.tensor([0, 0]), torch.ones(2), accumulate=False)
    finally:
        world.set_deterministic(False, CPU)
    assert not torch.are_deterministic_algorithms_enabled()
