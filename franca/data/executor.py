"""Where units are prepared: in processes of this machine, in an array of Slurm jobs, or on a Ray cluster.

All three do the same units, the largest first, and give each record as it is committed. For Slurm and Ray the launching is
datatrove's, and the folder of the dataset must be the same on all nodes. What it refuses to know: what a unit is made of.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal
from uuid import uuid4

from pydantic import Field

from franca.core.config import Choice, Count, config
from franca.core.errors import ConfigError
from franca.core.run import write_atomically
from franca.core.workers import SPAWN, pool
from franca.data import tokenize
from franca.data.tokenize import Policy, Unit

POLL_S = 5.0  # how often Slurm is asked, and the records are looked for
OURS = {"array", "chdir", "error", "export", "job-name", "nodes", "ntasks", "output", "parsable", "test-only", "wait", "wrap"}

Word = Annotated[str, Field(pattern=r"^[^\s\"'\\#]+$")]  # what stands in a line of sbatch as it is
Option = Annotated[str, Field(pattern=r"^[a-z-]+$")]
Records = Iterator[tuple[int, dict[str, Any]]]  # the number and the record of each unit as it is done


class ExecutorConfig(Choice):
    """The open choice `executor: {kind: ...}`."""


@config
class LocalExecutor(ExecutorConfig):
    """`workers` processes of this machine."""

    kind: Literal["local"] = "local"


@config
class SlurmExecutor(ExecutorConfig):
    """An array of Slurm jobs, `workers` at once."""

    kind: Literal["slurm"] = "slurm"
    partition: Word
    time: Word  # of one unit, as sbatch takes it: "04:00:00"
    cpus_per_task: Count = 1
    mem_per_cpu_gb: Count = 2
    qos: Word | None = None
    max_array_size: Count = 1001  # MaxArraySize of `scontrol show config`; more units are several arrays in a row
    env_command: str | None = None  # lines of bash that a job begins with, after Python's folder was put on the PATH
    sbatch_args: dict[Option, Word] = field(default_factory=dict)  # further options, without the dashes: {account: mine}

    def __post_init__(self) -> None:
        if taken := OURS & set(self.sbatch_args):
            raise ValueError(f"sbatch_args: {', '.join(sorted(taken))} is set by franca. Leave it out.")


@config
class RayExecutor(ExecutorConfig):
    """Tasks on a Ray cluster, `workers` at once."""

    kind: Literal["ray"] = "ray"
    address: str | None = None  # of the cluster; None: RAY_ADDRESS, or else this machine alone
    cpus_per_task: Count = 1
    mem_per_cpu_gb: Count = 2


@dataclass(frozen=True)
class Work:
    """Units that are missing under `root`: `missing` are their numbers, the largest first."""

    root: Path
    units: list[Unit]
    missing: list[int]
    policy: Policy
    workers: int
    tick: Callable[[int], None]  # is told how many tokens are new


def run(work: Work, executor: ExecutorConfig) -> Records:
    """Prepare what is missing. Raises ConfigError for a bad document, and when a job failed."""
    if isinstance(executor, SlurmExecutor):
        return _run_in_slurm(work, executor)
    if isinstance(executor, RayExecutor):
        return _run_in_ray(work, executor)
    return _run_here(work)


def _run_here(work: Work) -> Records:
    for path in (work.root / "units").glob("*.partial"):
        shutil.rmtree(path, ignore_errors=True)  # of a killed attempt: now, or a full disk would stay full
    if min(work.workers, len(work.missing)) == 1:
        for number in work.missing:
            yield number, tokenize.run(work.root, work.units[number], work.policy, work.tick)
        return
    count, known = SPAWN.Value("q", 0), 0
    with pool(min(work.workers, len(work.missing)), work.root / "units", work.root, _start_worker, count) as processes:
        pending = {processes.submit(_in_worker, work.root, work.units[n], work.policy): n for n in work.missing}
        while pending:
            finished = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED).done
            work.tick(count.value - known)
            known = count.value
            for future in finished:
                yield pending.pop(future), future.result()


_counts: list[Any] = []  # of a worker: the tokens of all workers


def _start_worker(count: Any) -> None:
    """One thread for each process: their tokenizers would otherwise share all cores, and wait for each other."""
    os.putenv("RAYON_NUM_THREADS", "1")
    _counts[:] = [count]


def _in_worker(root: Path, unit: Unit, policy: Policy) -> dict[str, Any]:
    (count,) = _counts

    def tick(tokens: int) -> None:
        with count.get_lock():
            count.value += tokens

    return tokenize.run(root, unit, policy, tick)


@dataclass(frozen=True, repr=False)  # its repr would fill datatrove's logs
class _Job:
    """What datatrove calls in a job: prepare the unit of a rank, unless another attempt has done it.

    It goes there as a pickle in the folder of the dataset. Who can write that folder can write the tokens as well, and the
    job's own code is imported, not unpickled; no pickle of anyone else is read.
    """

    root: Path
    units: list[Unit]
    policy: Policy
    folder: Path
    place: str  # that relative paths start from
    threads: int

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        os.chdir(self.place)
        os.putenv("RAYON_NUM_THREADS", str(self.threads))
        unit, refused = self.units[rank], self.folder / "refused"
        if refused.exists() or tokenize.committed(self.root, unit, self.policy):
            return
        try:
            tokenize.run(self.root, unit, self.policy, lambda tokens: None)
        except ConfigError as error:
            write_atomically(refused, str(error))
            raise


def _new_job(work: Work, threads: int) -> _Job:
    """A folder in `units/` for the jobs' logs, removed with all that is left over when the dataset is whole."""
    root = work.root.resolve()
    folder = root / "units" / f"franca-{uuid4().hex[:12]}"
    folder.mkdir()
    units = [work.units[number] for number in work.missing]
    names = [unit.id(work.policy) for unit in units]
    for name in names:  # a record that no longer holds would be looked at again and again
        (root / "units" / f"{name}.json").unlink(missing_ok=True)
    write_atomically(folder / "units.json", json.dumps(names))
    return _Job(root, units, work.policy, folder, os.getcwd(), threads)


def _watch(work: Work, folder: Path, is_running: Callable[[], bool], stop: Callable[[], object]) -> Records:
    """The records as jobs commit them, until there is no job any more."""
    missing = {f"{work.units[number].id(work.policy)}.json": number for number in work.missing}
    running, looks = True, 3  # on a network's disk the last records may show a little later
    while running or (missing and looks):
        running = running and is_running()  # asked first: what a job has left is there when it has ended
        looks -= not running
        for name in sorted(missing.keys() & set(os.listdir(work.root / "units"))):
            number = missing[name]
            if record := tokenize.committed(work.root, work.units[number], work.policy):
                del missing[name]
                work.tick(sum(record[split]["tokens"] for split in tokenize.SPLITS))
                yield number, record
        if (folder / "refused").exists():
            stop()
            raise ConfigError((folder / "refused").read_text())
        if running or missing:
            time.sleep(POLL_S)
    if missing:
        what = f"the jobs have ended and {len(missing)} of {len(work.missing)} units are missing"
        advice = "Give them more time or memory, or mend what the log says, and run the same command again."
        raise ConfigError(f"{work.root}: {what}. {advice} Logs: {folder}{_tail(folder)}")


def _tail(folder: Path) -> str:
    """The end of the log of a task that has failed."""
    for path in [*sorted(folder.glob("slurm_logs/*")), *sorted(folder.glob("logs/*"))]:
        if "Processing done" not in (text := path.read_text(errors="replace")):  # datatrove's last words on a task
            lines = [f"{path.relative_to(folder)}:", *text.splitlines()[-10:]]
            return "".join(f"\n  | {line[:200]}" for line in lines)
    return ""


def _run_in_slurm(work: Work, executor: SlurmExecutor) -> Records:
    if shutil.which("sbatch") is None:
        raise ConfigError("executor.kind slurm: there is no `sbatch` here. Run it on a login node of the cluster.")
    names = {work.units[number].id(work.policy) for number in work.missing}
    folder = None
    for found in sorted((work.root / "units").glob("franca-*")):  # of attempts that were killed
        if _is_queued(found.name):
            known = found / "units.json"
            if known.exists() and names <= set(json.loads(known.read_text())) and not (found / "refused").exists():
                print(f"waiting for the Slurm jobs {found.name} of an earlier attempt", file=sys.stderr)
                folder = found
            else:
                _cancel(found.name)
    folder = folder or _submit(work, executor)
    yield from _watch(work, folder, lambda: _is_queued(folder.name), lambda: _cancel(folder.name))


def _submit(work: Work, executor: SlurmExecutor) -> Path:
    slurm = _load("datatrove.executor.slurm", "franca[data]")
    root = str(work.root.resolve())
    if not re.fullmatch(r"[\w./+,@=-]+", root):  # it stands in a shell script as it is
        raise ConfigError(f"output: {root!r}: with executor.kind slurm only letters, digits and ./_+,@=- may be in the path")
    folder_of_python = os.path.dirname(sys.executable)
    commands = [f'export PATH={quote(folder_of_python)}:"$PATH"', executor.env_command or ""]
    job = _new_job(work, executor.cpus_per_task)
    array = slurm.SlurmPipelineExecutor(
        [job],
        time=executor.time,
        partition=executor.partition,
        qos=executor.qos,
        job_name=job.folder.name,  # by which the jobs are found again
        env_command="\n".join(commands),
        sbatch_args=dict(executor.sbatch_args),
        max_array_size=executor.max_array_size,
        with_srun=False,
        **_size(work, executor, job),
    )
    array.launch_merge_stats = lambda: None  # that job would wait for ever once a task has failed
    try:
        array.launch_job()
    except (subprocess.CalledProcessError, OSError) as error:
        raise ConfigError(f"executor: Slurm did not take the job ({error}; what it said is above). Mend `executor`.") from None
    print(f"Slurm job {array.job_id}: {len(job.units)} units; logs in {job.folder}", file=sys.stderr)
    return job.folder


def _size(work: Work, executor: SlurmExecutor | RayExecutor, job: _Job) -> dict[str, Any]:
    one = {"cpus_per_task": executor.cpus_per_task, "mem_per_cpu_gb": executor.mem_per_cpu_gb}
    return {"tasks": len(job.units), "workers": work.workers, "logging_dir": str(job.folder), **one}


def _is_queued(name: str) -> bool:
    """Whether jobs of a name wait or run. Without an answer they may."""
    done = subprocess.run(["squeue", "--all", "--noheader", f"--name={name}"], capture_output=True, text=True)
    return done.returncode != 0 or bool(done.stdout.strip())


def _cancel(name: str) -> None:
    """End the jobs of a name, and wait until they have ended."""
    while _is_queued(name):
        subprocess.run(["scancel", f"--name={name}"], capture_output=True)
        time.sleep(POLL_S)


def _run_in_ray(work: Work, executor: RayExecutor) -> Records:
    ray, theirs = _load("ray", "ray"), _load("datatrove.executor.ray", "franca[data]")
    job = _new_job(work, executor.cpus_per_task)
    tasks = theirs.RayPipelineExecutor([job], **_size(work, executor, job))
    try:
        ray.init(executor.address, log_to_driver=False, include_dashboard=False, ignore_reinit_error=True)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"executor.address: {executor.address!r}: no Ray cluster answers ({error})") from None
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(tasks.run)

        def is_running() -> bool:
            return not future.done() or future.result()  # which raises what went wrong

        try:
            yield from _watch(work, job.folder, is_running, future.exception)
        finally:
            future.exception()  # its tasks have ended
            ray.shutdown()


def _load(module: str, package: str) -> Any:
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"executor: needs a package that is not installed ({error}): pip install '{package}'") from None
    if module.startswith("datatrove"):
        found.logger.disable("datatrove")  # in this process; what it says in the jobs is in their logs
    return found
