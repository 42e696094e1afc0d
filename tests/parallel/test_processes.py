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
# processes, devices of each; the last needs more cores than there may be, and is long
LAYOUTS = ((1, 4), (2, 2), (4, 1))


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


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("mlp", 2), id="mlp"),
        pytest.param(("mlp", 3), id="mlp-4", marks=pytest.mark.long),
        pytest.param(("resnet8", 3), id="resnet8", marks=pytest.mark.long),
    ],
)
def chosen(request):
    """The network, and how many of the layouts."""
    network, count = request.param
    return f"--config.network={network}", LAYOUTS[:count]


@pytest.fixture(scope="module")
def whole(chosen, tmp_path_factory):
    """Each layout's uninterrupted run."""
    network, layouts = chosen
    root = tmp_path_factory.mktemp("layouts")
    workdirs = {}
    for layout in layouts:
        workdirs[layout] = root / f"run{layout}"
        output = run(root / f"out{layout}", workdirs[layout], layout, STEPS, network)
        assert f"process 0/{layout[0]}, {layout[1]} local device" in output
    return workdirs


def test_the_layouts_have_the_same_losses_and_evaluation_counts(whole):
    first, *others = whole.values()
    assert len(losses(first)) == STEPS
    assert [step for step, _, _ in evaluations(first)] == [12, 20]
    assert {examples for _, _, examples in evaluations(first)} == {360}
    for other in others:
        np.testing.assert_allclose(losses(other), losses(first), rtol=0, atol=1e-9)
        assert evaluations(other) == evaluations(first)
    processes = [summary(path)["num_processes"] for path in whole.values()]
    assert processes == [count for count, _ in whole]
    assert {summary(path)["num_devices"] for path in whole.values()} == {4}


def test_the_checkpoints_of_each_layout_restore_in_each_other(whole, chosen, tmp_path):
    network, layouts = chosen
    one = layouts[0]
    walk = (*layouts, one)
    for number, layout in enumerate(walk):
        steps = STEPS - 3 * (len(walk) - 1 - number)
        output = run(tmp_path / "out", tmp_path / "run", layout, steps, network)
        if number:
            assert f"resumed from the checkpoint of step {steps - 3}, saved by " in output
        assert saved_steps(tmp_path / "run")[-1] == steps
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole[one]), rtol=0, atol=1e-9)
