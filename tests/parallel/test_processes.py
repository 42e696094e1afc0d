"""1 process × 4 devices, 2 × 2 and 4 × 1 are the same run."""

import numpy as np
import pytest

from tests.runs import TINY, Run, rows, saved_steps, summary

STEPS = 20
# 23 steps an epoch of digits: evaluated at 12 and 20
CONFIG = (
    *TINY,
    "--config.precision=float64",
    "--config.batch_size=64",
    "--config.checkpoint_every=0.01",
    "--config.eval_every=0.5",
)
LAYOUTS = ((1, 4), (2, 2), (4, 1))  # processes, devices of each


def run(folder, workdir, layout, steps, network):
    count, devices = layout
    arguments = (*CONFIG, network, f"--workdir={workdir}", f"--config.max_steps={steps}")
    with Run(folder, *arguments, count=count, devices=devices) as started:
        return started.succeeds()


def losses(workdir):
    return [row["train_loss"] for row in rows(workdir) if "train_loss" in row]


def evaluations(workdir):
    return [
        (row["step"], row["test_accuracy"], row["test_examples"])
        for row in rows(workdir)
        if "test_accuracy" in row
    ]


@pytest.fixture(scope="module", params=["mlp", pytest.param("resnet8", marks=pytest.mark.long)])
def network(request):
    return f"--config.network={request.param}"


@pytest.fixture(scope="module")
def whole(network, tmp_path_factory):
    """Each layout's uninterrupted run."""
    root = tmp_path_factory.mktemp("layouts")
    workdirs = {}
    for layout in LAYOUTS:
        workdirs[layout] = root / f"run{layout}"
        output = run(root / f"out{layout}", workdirs[layout], layout, STEPS, network)
        assert f"process 0/{layout[0]}, {layout[1]} local device" in output
    return workdirs


def test_the_layouts_have_the_same_losses_and_evaluation_counts(whole):
    first, *others = (whole[layout] for layout in LAYOUTS)
    assert len(losses(first)) == STEPS
    assert [step for step, _, _ in evaluations(first)] == [12, 20]
    assert {examples for _, _, examples in evaluations(first)} == {360}
    for other in others:
        np.testing.assert_allclose(losses(other), losses(first), rtol=0, atol=1e-9)
        assert evaluations(other) == evaluations(first)
    processes = [summary(path)["num_processes"] for path in whole.values()]
    assert processes == [1, 2, 4]
    assert {summary(path)["num_devices"] for path in whole.values()} == {4}


def test_the_checkpoints_of_each_layout_restore_in_each_other(whole, network, tmp_path):
    one, two, four = LAYOUTS
    walk = (one, two, four, one)
    for number, layout in enumerate(walk):
        steps = STEPS - 3 * (len(walk) - 1 - number)
        output = run(tmp_path / "out", tmp_path / "run", layout, steps, network)
        if number:
            assert f"resumed from the checkpoint of step {steps - 3}, saved by " in output
        assert saved_steps(tmp_path / "run")[-1] == steps
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole[one]), rtol=0, atol=1e-9)
