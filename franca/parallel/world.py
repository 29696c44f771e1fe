"""Who and where this process is, and how all processes agree. The environment is read here (and in `cluster/`) only.

One process needs no launcher and no process group. Several are started by `franca launch`, torchrun or srun.
"""

import os
import platform
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.compiler.config
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from franca.core.errors import ConfigError

# What may be written to `environment.json`: settings that change a run, nothing that could hold a secret.
_RECORDED = """CUBLAS_WORKSPACE_CONFIG CUDA_VISIBLE_DEVICES MASTER_ADDR MASTER_PORT OMP_NUM_THREADS RANK WORLD_SIZE
    SLURMD_NODENAME SLURM_JOB_ID SLURM_JOB_NAME SLURM_JOB_NODELIST SLURM_JOB_PARTITION SLURM_NNODES SLURM_NTASKS SLURM_PROCID
    SLURM_RESTART_COUNT"""

# How long one rank's host may keep the others waiting: a save, a validation and an index of the data are among the healthy
# reasons. A dead process is noticed at once, by its closed connection.
HOST_TIMEOUT_S = 1800.0
CUBLAS_DETERMINISTIC = (":4096:8", ":16:8")


@dataclass(frozen=True)
class World:
    """This process among `size`; `local_rank` of them on this machine. Each uses one device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """The sums over all ranks of numbers on the host: no device waits. Every rank must call it, in the same order."""
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.all_reduce(values)
        return values.tolist()

    def gather_sum(self, values: Tensor) -> Tensor:
        """The elementwise sum over all ranks in the order of ranks: the same bits however many values go together."""
        if self.size == 1:
            return values
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values)
        return torch.stack(parts).sum(dim=0)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's plain value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's plain value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def dump_flights_to(self, prefix: Path) -> None:
        """Where NCCL's flight recorder, when a collective fails, writes the last ones: a file per rank, `prefix` and the rank.

        The recorder looks at this when it writes.
        """
        if self.device.type == "cuda":
            _unless_set("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE", value=str(prefix))


def start(timeout_s: float = 600.0) -> World:
    """Find this process's place and, with several processes, join the process group (gloo; NCCL beside it on GPUs).

    All must have come within `timeout_s`.
    """
    rank, size, local_rank = _place(os.environ)
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
        _unless_set("TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_FR_BUFFER_SIZE", value="2000")  # collectives that NCCL remembers
        _unless_set("TORCH_NCCL_DUMP_ON_TIMEOUT", value="1")
    if size > 1:
        backend, place = ("cpu:gloo,cuda:nccl", device) if on_gpu else ("gloo", None)
        wait = timedelta(seconds=timeout_s)
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=wait, device_id=place)
        set_timeout("cpu", HOST_TIMEOUT_S)
    return World(rank, size, local_rank, device)


def set_timeout(device_type: str, timeout_s: float) -> None:
    """How long the collectives on `device_type` may take in every group of this process, from the next one on."""
    device = torch.device(device_type)
    for group in distributed_c10d._world.pg_map:
        if device in group._device_types:
            group._get_backend(device)._set_default_timeout(timedelta(seconds=timeout_s))


def _unless_set(*names: str, value: str) -> None:
    """Set the first of a variable's names, unless the user has set any of them."""
    if not any(name in os.environ for name in names):
        os.environ[names[0]] = value


def set_deterministic(wanted: bool, device: torch.device) -> None:
    """Let PyTorch take only algorithms that give the same bits every time; an operation without one raises RuntimeError.

    Before the first product on the GPU. Raises ConfigError when the environment asks cuBLAS for something else.
    """
    if wanted and device.type == "cuda":  # see "Reproducibility" in NVIDIA's cuBLAS manual
        given = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_DETERMINISTIC[0])
        if given not in CUBLAS_DETERMINISTIC:
            allowed = " or ".join(CUBLAS_DETERMINISTIC)
            raise ConfigError(f"train.deterministic: needs CUBLAS_WORKSPACE_CONFIG {allowed}, but it is {given!r}. Unset it")
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.deterministic = wanted
    if wanted:
        torch.backends.cudnn.benchmark = False


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_compiled(folder: str) -> None:
    """Say where torch.compile keeps its work, before its first: the next start of a job, and all ranks of a machine, find it.

    "none": nowhere. "auto": where TORCHINDUCTOR_CACHE_DIR says, else in a folder of this user alone under XDG_CACHE_HOME or the
    temporary folder: homes are on slow networks, and what others could write must not be run. PyTorch finds work by a hash of
    the code, its own version and settings, and the GPU; here PyTorch, Python and the CPU's instructions part the folders.
    """
    if folder == "none":
        torch.compiler.config.force_disable_caches = True
        return
    if folder == "auto" and os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return
    home = Path(folder).expanduser()
    if folder == "auto":
        chosen = os.environ.get("XDG_CACHE_HOME")
        home = Path(chosen, "franca") if chosen else Path(tempfile.gettempdir(), f"franca-{os.getuid()}")
    key = f"torch-{torch.__version__}-python-{platform.python_version()}-{torch.backends.cpu.get_cpu_capability()}"
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = home.lstat()
        if folder == "auto" and (home.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o022):
            raise ConfigError(f"{home}: others may write there, and what it holds is run. Set parallel.compile_cache")
        (home / key).mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{home}: cannot keep what is compiled ({error.strerror}); set parallel.compile_cache") from None
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(home.absolute() / key)


def _place(environment: Mapping[str, str]) -> tuple[int, int, int]:
    given = {name: environment.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not any(given.values()) and int(environment.get("SLURM_STEP_NUM_TASKS") or 1) > 1:  # one of srun's tasks
        slurm = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        given = {name: environment.get(theirs) for name, theirs in zip(given, slurm, strict=True)}
    if not any(given.values()):
        return 0, 1, 0
    try:
        rank, size, local_rank = (int(value or "") for value in given.values())
    except ValueError:
        shown = ", ".join(f"{name}={value}" for name, value in given.items())
        raise ConfigError(f"the launcher's variables are incomplete: {shown}. Start with: franca launch, or torchrun") from None
    if size > 1 and not environment.get("MASTER_ADDR"):
        raise ConfigError(f"{size} ranks need MASTER_ADDR and MASTER_PORT to meet at. Start with: franca launch, or torchrun")
    return rank, size, local_rank


def environment(world: World) -> dict[str, Any]:
    """What `environment.json` records of this process: the allow-listed variables, the host, the device."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "device": device,
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "variables": {name: os.environ[name] for name in _RECORDED.split() if name in os.environ},
    }
