"""A real Slurm on this machine, for tests: virtual nodes, as the current user, in one folder, and nothing outlives the test.

Each daemon runs below a keeper: this file as a program, which adopts all that descends from its daemon (steps and their jobs
too) and kills it when its pipe is closed or its parent has died. So a node dies as a machine does, and a killed test leaves
nothing. There is no security (auth/none): a job runs as whoever asks. What it refuses to know: what the jobs do.
"""

import ctypes
import os
import pwd
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

UNPACKED = Path(__file__).parents[1] / ".venv" / "slurm"  # by the Makefile, where the machine has no Slurm of its own
GPUS = 8  # of every node

# cred_expire is what a requeued job waits before it starts again; below 5 s Slurm makes it 120.
CONFIG = """
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=100
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
EnforcePartLimits=ALL
JobRequeue=1
ReturnToService=2
SlurmdTimeout=30
KillWait=2
"""
PARTITIONS = """
PartitionName=low Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=0 State=UP
PartitionName=high Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
"""


class Cluster:
    """`with Cluster(folder, nodes=4) as cluster:` Nodes n1, n2, ... of 4 CPUs and 8 false GPUs; partitions `low` and `high`.

    `env` is the environment in which its commands work; `settings` are lines of slurm.conf that replace those above.
    """

    def __init__(self, folder: Path, nodes: int = 2, **settings: str) -> None:
        self.folder, self.names = folder, [f"n{number + 1}" for number in range(nodes)]
        self.lock, port = _ports(nodes + 2)
        self.keepers: dict[str, subprocess.Popen[bytes]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self.env = _environment() | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._configure(port, settings)

    def _configure(self, port: int, settings: Mapping[str, str]) -> None:
        host, user = socket.gethostname().split(".")[0], pwd.getpwuid(os.getuid()).pw_name
        places = {
            "ClusterName": "test",
            "SlurmctldHost": f"{host}(127.0.0.1)",
            "SlurmctldPort": str(port + 1),
            "SlurmUser": user,
            "SlurmdUser": user,
            "StateSaveLocation": f"{self.folder}/state",
            "SlurmdSpoolDir": f"{self.folder}/spool-%n",
            "SlurmctldPidFile": f"{self.folder}/slurmctld.pid",
            "SlurmdPidFile": f"{self.folder}/slurmd-%n.pid",
            "JobCompLoc": f"{self.folder}/jobs.txt",
        }
        plugins = next(UNPACKED.glob("usr/lib/*/slurm-wlm"), None)
        if plugins:
            places["PluginDir"] = str(plugins)
        values = dict(line.split("=", 1) for line in CONFIG.split()) | places | settings
        lines = [f"{key}={value}" for key, value in values.items()]
        for number, name in enumerate(self.names):
            place = f"NodeHostname={host} NodeAddr=127.0.0.1 Port={port + 2 + number}"
            lines.append(f"NodeName={name} {place} CPUs=4 RealMemory=5000 Gres=gpu:{GPUS} State=UNKNOWN")
            (self.folder / f"spool-{name}").mkdir(exist_ok=True)
        (self.folder / "state").mkdir(exist_ok=True)
        for number in range(GPUS):
            (self.folder / f"gpu{number}").symlink_to("/dev/null")  # must be a device
        (self.folder / "slurm.conf").write_text("\n".join(lines) + PARTITIONS)
        gpus = f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]"
        (self.folder / "gres.conf").write_text("".join(f"NodeName={name} {gpus}\n" for name in self.names))

    def __enter__(self) -> "Cluster":
        try:
            self._keep("slurmctld", "slurmctld", "-D")
            for name in self.names:
                self.start_node(name)
            self.wait_until_idle()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.down()

    def _keep(self, name: str, *command: str) -> None:
        log = open(self.folder / f"{name}.log", "ab")  # noqa: SIM115 (the daemon's)
        program = [sys.executable, "-I", "-S", __file__, *command]
        with log:
            self.keepers[name] = subprocess.Popen(
                program, stdin=subprocess.PIPE, stdout=log, stderr=log, env=self.env, start_new_session=True
            )

    def start_node(self, name: str) -> None:
        """Start a node, or start it again after `kill`."""
        stepd = shutil.which("slurmstepd", path=self.env["PATH"])
        self._keep(name, "slurmd", "-D", "-N", name, *(["-d", stepd] if stepd else []))

    def kill(self, name: str) -> None:
        """End a node (or `slurmctld`) with all that runs on it, at once, as a power cut does."""
        keeper = self.keepers.pop(name)
        assert keeper.stdin is not None
        keeper.stdin.close()
        keeper.wait(30)

    def down(self) -> None:
        """End everything."""
        for keeper in self.keepers.values():
            assert keeper.stdin is not None
            keeper.stdin.close()
        for keeper in self.keepers.values():
            keeper.wait(30)
        self.keepers = {}
        self.lock.close()

    def run(self, *command: str, **variables: str) -> str:
        """What a command prints; AssertionError with its words when it fails."""
        done = subprocess.run(command, env=self.env | variables, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def sbatch(self, script: str, *options: str) -> str:
        """Submit a script of bash; returns the number of the job. Its output goes to `<folder>/<job>.out`."""
        output = f"--output={self.folder}/%j.out"
        return self.run("sbatch", "--parsable", output, *options, f"--wrap={script}")

    def field(self, job: str, name: str) -> str:
        """One field of `scontrol show job`, for instance JobState, Restarts or NodeList."""
        words = self.run("scontrol", "show", "job", job).split()
        return next(value for key, _, value in (word.partition("=") for word in words) if key == name)

    def wait(self, job: str, *states: str, timeout_s: float = 60.0) -> str:
        """Wait until a job is in one of the states (as in COMPLETED); returns it."""
        return self._until(lambda: self.field(job, "JobState"), states, timeout_s)

    def wait_until_idle(self, timeout_s: float = 60.0) -> None:
        """Wait until all nodes are there and have nothing to do."""
        self._until(lambda: " ".join(sorted(set(self._states()))), ["idle"], timeout_s)

    def _states(self) -> Iterable[str]:
        command = ["sinfo", "--noheader", "--Node", "--partition=low", "--format=%T"]
        return subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60).stdout.split()

    def _until(self, state: Callable[[], str], wanted: Iterable[str], timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        while (now := state()) not in wanted:
            if time.monotonic() > deadline:
                logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(self.folder.glob("*.log")))
                raise AssertionError(f"still {now!r} and not {wanted} after {timeout_s} s\n{logs}")
            time.sleep(0.1)
        return now


def _environment() -> dict[str, str]:
    """This process's, without what another Slurm has put there, and with the programs and libraries that were unpacked."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN", "SALLOC"))}
    folders = [f"{UNPACKED}/usr/bin", f"{UNPACKED}/usr/sbin"] if (UNPACKED / "usr").is_dir() else []
    env["PATH"] = ":".join([*folders, env.get("PATH", ""), "/usr/sbin", "/usr/bin", "/bin"])
    libraries = [str(folder) for pattern in ("usr/lib/*/slurm-wlm", "usr/lib/*-linux-*") for folder in UNPACKED.glob(pattern)]
    if libraries:
        env["LD_LIBRARY_PATH"] = ":".join([*libraries, *filter(None, [env.get("LD_LIBRARY_PATH")])])
    if shutil.which("slurmctld", path=env["PATH"]) is None:
        raise FileNotFoundError("there is no slurmctld on this machine: `make .venv/slurm` unpacks one")
    return env


def _ports(count: int) -> tuple[socket.socket, int]:
    """`count` free ports in a row, below those that the kernel gives out; the first stays taken while the socket is open."""
    for first in range(17_000 + os.getpid() % 50 * 100, 32_000, count):
        sockets: list[socket.socket] = []
        try:
            for port in range(first, first + count):
                sockets.append(socket.socket())
                sockets[-1].bind(("127.0.0.1", port))
        except OSError:
            sockets[0].close()
            continue
        finally:
            for other in sockets[1:]:
                other.close()
        return sockets[0], first
    raise OSError("no free ports")


def _children() -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, _, rest = stat.read_text().partition(" (")
        except OSError:
            continue  # it has just ended
        if int(rest.rpartition(") ")[2].split()[1]) == os.getpid():
            found.append(int(pid))
    return found


def keep(command: list[str]) -> None:
    """Run a daemon until standard input is closed or the parent has died; then kill all that ever came from it."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what loses its parent below here becomes ours
    subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while os.getppid() == parent and not select.select([0], [], [], 0.2)[0]:
        _reap()
    while children := _children():
        for child in children:
            os.kill(child, signal.SIGKILL)
        _reap()
        time.sleep(0.01)


def _reap() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


if __name__ == "__main__":
    keep(sys.argv[1:])
