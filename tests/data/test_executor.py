"""Units prepared by Slurm, on a real one, and by Ray give the bytes of this process, whatever happens on the way."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import pytest
from datatrove.executor.ray import RayPipelineExecutor
from preparing import TEXTS, contents, write_lines
from slurm import Cluster

from franca.core.config import check, to_dict
from franca.core.errors import ConfigError
from franca.data import executor as module
from franca.data import prepare as prepare_module
from franca.data.executor import LocalExecutor, RayExecutor, SlurmExecutor
from franca.data.prepare import PrepareConfig, prepare

SLURM = SlurmExecutor(partition="low", time="5", mem_per_cpu_gb=1)
PROGRAM = """
import sys
from pathlib import Path
from franca.data import executor, prepare
prepare.UNIT_BYTES, executor.POLL_S = 1, 0.2
prepare.main(Path(sys.argv[1]), [])
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("slurm"), nodes=2) as running:
        yield running


@pytest.fixture(autouse=True)
def here(cluster, monkeypatch):
    """This process as one on a login node of the cluster, where every file is a unit."""
    for key, value in cluster.env.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 1)
    monkeypatch.setattr(module, "POLL_S", 0.2)


@pytest.fixture
def files(tmp_path):
    """Two units, the second of which is the larger one."""
    for name, texts in (("a", TEXTS[:40]), ("b", TEXTS[40:150])):
        write_lines(tmp_path / f"{name}.jsonl", texts)


def jobs(cluster):
    """The numbers of all jobs that the cluster has ever had."""
    path = cluster.folder / "jobs.txt"
    return {line.split()[0] for line in path.read_text().splitlines()} if path.exists() else set()


@pytest.mark.parametrize("workers", [1, 2])
def test_slurm_gives_the_same_folder(tmp_path, files, make, cluster, workers, capfd):
    expected = contents(prepare(make("*.jsonl", output="local", workers=workers)))
    before = jobs(cluster)
    root = prepare(make("*.jsonl", output="slurm", workers=workers, executor=SLURM))
    assert contents(root) == expected
    assert len(jobs(cluster) - before) == 2
    assert f"2 units; logs in {root}/units/franca-" in capfd.readouterr().err
    prepare(make("*.jsonl", output="slurm", executor=SLURM))
    assert len(jobs(cluster) - before) == 2
    assert cluster.run("squeue", "--noheader") == ""


def write_settings(path, settings):
    path.write_text(json.dumps(to_dict(settings)))
    return path


class Master:
    """`franca prepare` in a process of its own."""

    def __init__(self, path):
        self.log = path.with_suffix(".log")
        with self.log.open("a") as log:
            self.process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], stdout=log, stderr=log)

    def wait_for(self, text):
        for _ in range(600):
            if text in self.log.read_text():
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.1)
        raise AssertionError(self.log.read_text())

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture
def gate(tmp_path):
    """Jobs wait until this file is there."""
    path = tmp_path / "gate"
    yield path
    path.touch()


def behind(gate):
    return SlurmExecutor(partition="low", time="5", mem_per_cpu_gb=1, env_command=f"until test -e {gate}; do sleep 0.1; done")


@pytest.fixture
def start(tmp_path):
    """`start(settings)`: a master; none outlives its test."""
    masters = []

    def new(settings):
        masters.append(Master(write_settings(tmp_path / "data.json", settings)))
        return masters[-1]

    yield new
    for master in masters:
        master.kill()


def test_a_master_that_is_killed_and_started_again_waits_for_its_jobs(tmp_path, files, make, cluster, gate, start):
    expected = contents(prepare(make("*.jsonl", output="local")))
    before = jobs(cluster)
    settings = make("*.jsonl", workers=2, executor=behind(gate))
    first = start(settings)
    first.wait_for("Slurm job")
    first.kill()
    second = start(settings)
    second.wait_for("of an earlier attempt")
    assert len(set(cluster.run("squeue", "--noheader", "--format=%F").split())) == 1
    gate.touch()
    assert second.process.wait(120) == 0, second.log.read_text()
    assert len(jobs(cluster) - before) == 2
    assert second.log.read_text().count("Slurm job ") == 1
    assert contents(tmp_path / "out") == expected


def test_jobs_of_other_settings_are_ended_first(tmp_path, files, make, cluster, gate, start):
    expected = contents(prepare(make("*.jsonl", output="local", add_eos=False)))
    first = start(make("*.jsonl", workers=2, executor=behind(gate)))
    first.wait_for("Slurm job")
    first.kill()
    in_a_row = SlurmExecutor(partition="low", time="5", mem_per_cpu_gb=1, max_array_size=1)  # two arrays
    assert contents(prepare(make("*.jsonl", add_eos=False, workers=2, executor=in_a_row))) == expected
    assert cluster.run("squeue", "--noheader") == ""
    assert not gate.exists()


def test_a_job_that_fails_is_told_with_its_log_and_only_its_unit_is_done_again(tmp_path, files, make, cluster):
    expected = contents(prepare(make("*.jsonl", output="local")))
    breaks = SlurmExecutor(
        partition="low",
        time="5",
        mem_per_cpu_gb=1,
        env_command="# a comment\nif [ $SLURM_ARRAY_TASK_ID = 1 ]; then\n  echo 'out of paper' >&2; exit 3\nfi",
    )
    with pytest.raises(ConfigError, match=r"1 of 2 units are missing\. (?s:.*)Logs: .*/units/franca-\w+\n(?s:.*)out of paper"):
        prepare(make("*.jsonl", workers=2, executor=breaks))
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert cluster.run("squeue", "--noheader") == ""
    before = jobs(cluster)
    assert contents(prepare(make("*.jsonl", executor=SLURM))) == expected
    assert len(jobs(cluster) - before) == 1


def test_a_bad_document_is_told_as_on_this_machine(tmp_path, files, make, cluster):
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("not json\n")
    messages = []
    for output, executor in (("local", LocalExecutor()), ("slurm", SLURM)):
        with pytest.raises(ConfigError) as caught:
            prepare(make("*.jsonl", output=output, executor=executor))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert "b.jsonl:111: is not JSON" in messages[0]
    assert cluster.run("squeue", "--noheader") == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partition": "low; touch x"}, r"executor\.partition: string should match pattern"),
        ({"partition": "low\n#SBATCH --wrap=x"}, r"executor\.partition: string should match pattern"),
        ({"time": "1 day"}, r"executor\.time: string should match pattern"),
        ({"sbatch_args": {"comment": "a b"}}, r"executor\.sbatch_args\.comment: string should match pattern"),
        ({"sbatch_args": {"a b": "c"}}, r"executor\.sbatch_args.*: string should match pattern"),
        ({"sbatch_args": {"wrap": "true"}}, r"executor: sbatch_args: wrap is set by franca"),
        ({"cpus": 2}, r"executor\.cpus: unknown key"),
    ],
)
def test_what_does_not_belong_into_a_job_is_refused(tmp_path, make, change, message):
    values = to_dict(make("*.jsonl", executor=SLURM))
    values["executor"] |= change
    with pytest.raises(ConfigError, match=message):
        check(PrepareConfig, values, "data.yaml")


def test_a_partition_that_slurm_does_not_know_and_a_path_that_a_shell_would_split(tmp_path, files, make, cluster, capfd):
    before = cluster.run("squeue", "--noheader")
    with pytest.raises(ConfigError, match="Slurm did not take the job"):
        prepare(make("*.jsonl", executor=SlurmExecutor(partition="none", time="5")))
    assert "invalid partition" in capfd.readouterr().err
    with pytest.raises(ConfigError, match=r"only letters, digits and \./_\+,@=- may be in the path"):
        prepare(make("*.jsonl", output="my data; touch x", executor=SLURM))
    assert cluster.run("squeue", "--noheader") == before


def test_without_slurm_or_datatrove_the_message_says_what_to_do(tmp_path, files, make, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove.executor.slurm", None)
    with pytest.raises(ConfigError, match=r"pip install 'franca\[data\]'"):
        prepare(make("*.jsonl", executor=SLURM))
    monkeypatch.setenv("PATH", "/usr/nothing")
    with pytest.raises(ConfigError, match="there is no `sbatch` here"):
        prepare(make("*.jsonl", executor=SLURM))
    assert not list((tmp_path / "out" / "units").glob("franca-*"))


class TasksHere(RayPipelineExecutor):
    """The real executor of datatrove, but its tasks run here, one after the other, through its own code for a task."""

    def run(self):
        for rank in range(self.world_size):
            try:
                self._run_for_rank(rank)
            except ConfigError:  # Ray would have it in a log
                continue


def test_tasks_of_ray_give_the_same_folder_and_the_same_message(tmp_path, files, make, monkeypatch):
    """Without Ray, which is heavy: only what is between the preparation and datatrove's executor is tested here."""
    calls = []
    start = SimpleNamespace(init=lambda *given, **more: calls.append(given), shutdown=lambda: calls.append("end"))
    monkeypatch.setitem(sys.modules, "ray", start)
    monkeypatch.setattr("datatrove.executor.ray.RayPipelineExecutor", TasksHere)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    expected = contents(prepare(make("*.jsonl", output="local")))
    ray = RayExecutor(address="10.0.0.1:6379")
    assert contents(prepare(make("*.jsonl", output="ray", workers=2, executor=ray))) == expected
    assert calls == [("10.0.0.1:6379",), "end"]
    with (tmp_path / "b.jsonl").open("a") as file:
        file.write("not json\n")
    with pytest.raises(ConfigError, match=r"b\.jsonl:111: is not JSON"):
        prepare(make("*.jsonl", output="ray", executor=ray))
    assert calls[2:] == [("10.0.0.1:6379",), "end"]


def test_without_ray_the_message_says_what_to_do(files, make, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="pip install 'ray'"):
        prepare(make("*.jsonl", executor=RayExecutor()))
