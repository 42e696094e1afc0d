"""Who is a process of which run."""

import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel.startup import Membership, find_cluster, membership
from tests.runs import TINY, Run


def nothing():
    return None


def refuse():
    raise AssertionError("no cluster is to be looked for")


def test_alone_where_there_is_no_cluster():
    assert membership("auto", None, None, None, find=nothing) is None
    assert membership("off", None, None, None, find=refuse) is None


def test_the_command_line_comes_before_a_cluster():
    place = membership("auto", "10.0.0.2:8476", 8, 3, find=refuse)
    assert place == Membership("the command line", "10.0.0.2:8476", 8, 3)
    found = Membership("SLURM", "node1:1234", 2, 1)
    for mode in ("auto", "on"):
        assert membership(mode, None, None, None, find=lambda: found) == found


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("on", None, None, None), "--distributed=on, but no cluster is found"),
        (("off", None, 2, None), "--num-processes does not go with --distributed=off"),
        (("auto", "a:1", None, None), "--num-processes and --process-id missing beside --coord"),
        (("auto", None, 2, 0), "--coordinator missing beside --num-processes and --process-id"),
        (("auto", "a:1", 2, 2), "--process-id=2 is not below --num-processes=2"),
        (("auto", "a", 2, 1), "--coordinator=a is not HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_together_are_one_line(flags, message):
    mode, *place = flags
    with pytest.raises(UserError, match=message):
        membership(mode, *place, find=nothing)


@pytest.fixture
def environment(monkeypatch):
    """Sets what a cluster tells its processes, and nothing else."""
    for name in ("SLURM_JOB_ID", "OMPI_MCA_orte_hnp_uri", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)

    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return set_all


SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[3-6]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_JOB_NUM_NODES": "4",
}


def test_slurm_is_found(environment):
    environment(**SLURM)
    place = find_cluster(5.0)
    assert (place.found_by, place.count, place.index) == ("SLURM", 4, 2)
    assert place.coordinator.startswith("node3:")
    assert place.local_devices is None  # all of the machine


def test_slurm_processes_that_share_a_machine_share_its_devices(environment):
    environment(**SLURM | {"SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"})
    assert find_cluster(5.0).local_devices == (1,)


def test_a_slurm_job_of_one_process_runs_alone(environment):
    environment(**SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"})
    for mode in ("auto", "on"):
        assert membership(mode, None, None, None, find=lambda: find_cluster(5.0)) is None


def test_no_cluster_is_found_where_none_is(environment):
    assert find_cluster(5.0) is None


def test_a_kubernetes_job_needs_to_be_told(environment):
    environment(KUBERNETES_SERVICE_HOST="10.0.0.1")
    assert find_cluster(5.0) is None  # a notebook in a pod, say
    environment(JOB_COMPLETION_INDEX="1")
    with pytest.raises(UserError, match="Kubernetes job: give --coordinator"):
        find_cluster(5.0)


def test_a_batch_script_without_srun_runs_alone(environment):
    environment(SLURM_JOB_ID="4711", SLURM_NTASKS="4")
    assert find_cluster(5.0) is None


def test_a_cluster_that_tells_nonsense_is_one_line(environment):
    environment(**SLURM | {"SLURM_NTASKS": "many"})
    with pytest.raises(UserError, match=r"this looks like SLURM, but: .*--distributed=off"):
        find_cluster(5.0)


def test_a_process_that_waits_in_vain_says_for_whom_and_ends(tmp_path):
    arguments = (*TINY, f"--workdir={tmp_path / 'run'}", "--wait-seconds=2")
    places = [("--coordinator=localhost:1", "--num-processes=2", "--process-id=1")]
    with Run(tmp_path / "out", *arguments, flags=places) as alone:
        assert alone.wait() == [1]
        assert alone.output().startswith("process 1/2 of a run described by the command line")
        assert alone.errors() == (
            "error: process 0 did not come to localhost:1 within 2 s (Connection refused); was it "
            "started, and can this machine reach it?\n"
        )
    assert not (tmp_path / "run").exists()


def test_processes_that_were_not_started_alike_all_end_with_one_reason(tmp_path):
    arguments = (*TINY, f"--workdir={tmp_path / 'run'}", "--config.max_steps=2")
    flags = [("--config.seed=1",), ("--config.seed=2",)]
    with Run(tmp_path / "out", *arguments, count=2, flags=flags) as run:
        assert run.wait() == [2, 2]
        assert "config.seed" in run.errors(0)
        assert run.errors(0).startswith("error: ") and "process 1" in run.errors(0)
    assert not (tmp_path / "run").exists()


def test_devices_that_the_processes_cannot_share_are_one_line(tmp_path):
    arguments = (*TINY, f"--workdir={tmp_path / 'run'}", "--config.num_devices=3")
    with Run(tmp_path / "out", *arguments, count=2, devices=2) as run:
        assert run.wait() == [2, 2]
        assert run.errors(0) == "error: config.num_devices = 3 does not divide by the 2 processes\n"
