"""The Slurm of the tests is one: it starts, ends, requeues, preempts and signals jobs, and leaves nothing behind."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm import Cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=3) as running:
        yield running


@pytest.fixture(scope="module", autouse=True)
def signalled(cluster):
    """A job that is to be told before its time is over, begun before all tests: Slurm looks only every 30 s."""
    script = "trap 'echo signal; exit 0' USR2; echo ready; sleep 1000 & wait"
    return cluster.sbatch(script, "--time=1", "--signal=B:USR2@60", "--nodelist=n3", "--exclusive")


def output(cluster, job):
    """What a job has written, without Slurm's own words."""
    path = cluster.folder / f"{job}.out"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if not line.startswith("slurmstepd")]


def wait_for_text(cluster, job, text):
    """Until a job has written a line: it is then known where it is."""
    for _ in range(600):
        if text in output(cluster, job):
            return
        time.sleep(0.1)
    raise AssertionError(f"job {job} wrote {output(cluster, job)!r}")


def processes(folder):
    """The command lines of all processes that belong to the cluster in a folder: their environment tells."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={folder}/".encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def test_srun_starts_tasks_on_two_nodes(cluster):
    words = cluster.run("srun", "--nodes=2", "--ntasks=2", "sh", "-c", "echo $SLURMD_NODENAME $SLURM_PROCID $SLURM_NTASKS")
    assert sorted(words.splitlines()) == ["n1 0 2", "n2 1 2"]


def test_a_job_gets_the_gpus_and_processors_that_it_asks_for(cluster):
    job = cluster.sbatch("echo $CUDA_VISIBLE_DEVICES, $SLURM_CPUS_ON_NODE", "--gpus-per-node=3", "--cpus-per-task=2")
    assert cluster.wait(job, "COMPLETED", "FAILED") == "COMPLETED"
    assert output(cluster, job) == ["0,1,2, 2"]
    refused = subprocess.run(
        ["sbatch", "--gpus-per-node=9", "--wrap=true"], env=cluster.env, capture_output=True, text=True, timeout=60
    )
    assert "Requested node configuration is not available" in refused.stderr


def test_an_array_has_its_numbers_and_a_failed_task_is_told(cluster):
    job = cluster.sbatch(
        "echo $SLURM_ARRAY_TASK_ID; exit $((SLURM_ARRAY_TASK_ID == 2))", "--array=0-3%2", f"--output={cluster.folder}/a-%a.out"
    )
    states = [cluster.wait(f"{job}_{number}", "COMPLETED", "FAILED") for number in range(4)]
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"]
    assert [(cluster.folder / f"a-{number}.out").read_text() for number in range(4)] == ["0\n", "1\n", "2\n", "3\n"]


def test_a_requeued_job_starts_again_under_its_number(cluster):
    job = cluster.sbatch(
        'echo attempt ${SLURM_RESTART_COUNT:-0}; test -n "$SLURM_RESTART_COUNT" || sleep 1000', "--open-mode=append"
    )
    cluster.wait(job, "RUNNING")
    wait_for_text(cluster, job, "attempt 0")
    cluster.run("scontrol", "requeue", job)
    cluster.wait(job, "COMPLETED")
    assert output(cluster, job) == ["attempt 0", "attempt 1"]
    assert cluster.field(job, "Restarts") == "1"


def test_a_job_of_high_priority_takes_the_place_of_a_low_one(cluster):
    script = "trap 'echo told; exit 1' TERM; echo began; test -n \"$SLURM_RESTART_COUNT\" || { sleep 1000 & wait; }"
    low = cluster.sbatch(script, "--nodelist=n1,n2", "--exclusive", "--open-mode=append")
    cluster.wait(low, "RUNNING")
    wait_for_text(cluster, low, "began")
    high = cluster.sbatch("sleep 1", "--partition=high", "--nodelist=n1", "--exclusive")
    cluster.wait(high, "COMPLETED")
    cluster.wait(low, "COMPLETED")
    assert output(cluster, low).count("began") == 2
    assert "told" in output(cluster, low)
    assert cluster.field(low, "Restarts") == "1"


def test_a_job_of_a_dead_node_starts_on_another(cluster):
    job = cluster.sbatch('echo $SLURMD_NODENAME; test -n "$SLURM_RESTART_COUNT" || sleep 1000', "--open-mode=append")
    cluster.wait(job, "RUNNING")
    wait_for_text(cluster, job, cluster.field(job, "NodeList"))
    node = cluster.field(job, "NodeList")
    cluster.kill(node)
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")  # what a timeout would find later
    cluster.wait(job, "COMPLETED")
    first, second = output(cluster, job)
    assert first == node != second
    cluster.start_node(node)
    cluster.wait_until_idle()


def test_two_clusters_do_not_meet_and_none_outlives_its_process(cluster, tmp_path):
    program = (
        "import pathlib, slurm, sys\n"
        "cluster = slurm.Cluster(pathlib.Path(sys.argv[1]), 1).__enter__()\n"
        "job = cluster.sbatch('setsid sleep 1000 & sleep 1000')\n"
        "cluster.wait(job, 'RUNNING')\n"
        "print('running', flush=True)\n"
        "sys.stdin.read()\n"
    )
    folder = tmp_path / "c"
    command = [sys.executable, "-c", program, str(folder)]
    path = {"PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | path, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "running\n"
        other = cluster.env | {"SLURM_CONF": f"{folder}/slurm.conf"}
        command = ["squeue", "--noheader", "--format=%j", "--nodelist=n1"]
        listed = [subprocess.run(command, env=env, capture_output=True, text=True) for env in (cluster.env, other)]
        assert [done.stdout for done in listed] == ["", "wrap\n"]
        assert sum("sleep 1000" in line for line in processes(folder)) >= 2
        child.send_signal(signal.SIGKILL)
    for _ in itertools.takewhile(lambda _: processes(folder), range(300)):
        time.sleep(0.1)
    assert processes(folder) == []


def test_a_signal_comes_before_the_end(cluster, signalled):
    assert cluster.wait(signalled, "COMPLETED", "TIMEOUT", "FAILED") == "COMPLETED"
    assert output(cluster, signalled) == ["ready", "signal"]
