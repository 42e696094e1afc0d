"""The campaign's runs: as long as fits, on batches that are the ordinary ones."""

import json
import math
import tarfile

import numpy as np
import pytest

from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools.campaign import runs
from mimicnorm_jax.tools.campaign.budget import RESERVE, Cost, choose_epochs, fits
from mimicnorm_jax.train.loop import train
from mimicnorm_jax.train.resident import ResidentSplit, with_resident
from mimicnorm_jax.train.setup import set_up
from mimicnorm_jax.train.state import digest
from tests.archives import write_folders

OPTIONS = {"network": "mlp", "network_options__depth": 3, "epochs": 2.0, "num_devices": None}


@pytest.fixture
def resident(tiny_config):
    def make(**options):
        experiment = set_up(tiny_config(**OPTIONS | options))
        split = ResidentSplit(experiment.train_data.source, experiment.mesh)
        return with_resident(experiment, split)

    return make


@pytest.mark.parametrize("devices", [1, 4])
def test_a_gathered_batch_is_the_ordinary_one(resident, devices):
    experiment = resident(num_devices=devices)
    first, last = 43, 47  # an epoch of 44.9 steps ends between them
    for step, batch in zip(range(first, last), experiment.batches(first, last), strict=True):
        expected = experiment.train_data.batch(step)
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            assert batch[name].dtype == value.dtype
            assert len(batch[name].sharding.device_set) == devices
            np.testing.assert_array_equal(batch[name], value)


def test_images_that_are_not_in_memory_are_refused(tiny_config, tmp_path):
    write_folders(tmp_path / "small.tar.xz")
    with tarfile.open(tmp_path / "small.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    folders = {"data__name": "folder", "data__dir": str(tmp_path), "data__cache_gib": 0.0}
    experiment = set_up(tiny_config(**OPTIONS | folders))
    with pytest.raises(UserError, match=r"are not in memory.*config\.data\.cache_gib"):
        ResidentSplit(experiment.train_data.source, experiment.mesh)


def test_a_run_is_the_training_programs(resident, tiny_config, tmp_path):
    states = []
    experiment = resident(num_devices=1)
    original = experiment.train_step

    def train_step(state, batch):
        state, metrics = original(state, batch)
        states[:] = [digest(state)]
        return state, metrics

    object.__setattr__(experiment, "train_step", train_step)
    notes = []
    record = runs.train(experiment, lambda so_far: notes.append(json.dumps(so_far)))
    summary = train(tiny_config(**OPTIONS | {"num_devices": 1}), tmp_path / "run")
    assert states == [summary["state_sha256"]]
    for name in ("final_test_accuracy", "best_test_accuracy", "steps"):
        assert record[name] == summary[name]
    exact = "final_test_accuracy_recalibrated"
    assert record[exact] == summary[exact]
    assert record["finished"] and [len(json.loads(n)["curve"]) for n in notes] == [1, 2]
    assert not json.loads(notes[-1])["finished"] and record["images_per_second"] > 0


def test_a_run_that_diverges_ends_and_has_no_final_accuracy(resident):
    bad = {"learning_rate": 1e30, "schedule__warmup_epochs": 0.0}
    record = runs.train(resident(**bad), lambda so_far: None)
    assert record["diverged_at_step"] in (1, 2, 3, 4) and record["finished"]
    assert record["final_test_accuracy"] is None and record["curve"] == []


def test_a_measured_cost_is_of_everything_that_a_run_does(resident):
    measured = runs.fastest(lambda count: resident(steps_per_call=count), (1, 8), 0.05)
    assert measured.steps_per_call == 1  # on a CPU
    assert measured.images_per_second > 0
    assert measured.cost.fixed_s > 0 and measured.cost.epoch_s > 0


def test_a_shorter_run_keeps_the_shape_of_its_schedule(tiny_config):
    recipe = tiny_config(epochs=150.0, schedule__warmup_epochs=2.0)
    config = runs.with_length(recipe, 15, 8)
    assert config.epochs == 15.0 and config.steps_per_call == 8
    assert config.schedule.warmup_epochs == pytest.approx(0.2)
    assert config.schedule.milestones == pytest.approx((8.0, 11.0, 13.5))
    # the recipe, which the next run starts from, stays what it was
    assert recipe.epochs == 150.0 and recipe.schedule.warmup_epochs == 2.0
    assert recipe.schedule.milestones == (80.0, 110.0, 135.0)


COSTS = [Cost(10.0, 2.0), Cost(5.0, 1.0)]


def test_runs_take_their_share_of_the_time():
    share = {"share": 0.5, "least": 1, "most": 100}
    epochs = choose_epochs(200.0, COSTS, **share)
    together = sum(cost.seconds(epochs) for cost in COSTS)
    more = sum(cost.seconds(epochs + 1) for cost in COSTS)
    assert together <= 100.0 < more
    assert choose_epochs(1e9, COSTS, **share) == 100
    # the least that is worth running may take more than the share
    assert choose_epochs(20.0, COSTS, **share) == 1


def test_no_run_starts_that_cannot_end():
    generator = np.random.default_rng(0)
    for _ in range(300):
        wanted = [Cost(*generator.exponential(10.0, 2)) for _ in range(3)]
        seconds, share = generator.uniform(0, 300), generator.uniform(0.01, 1)
        epochs = choose_epochs(seconds, wanted, share=share, least=2, most=30)
        assert epochs == 0 or 2 <= epochs <= 30
        left = seconds
        for cost in wanted if epochs else []:
            assert fits(left, cost, epochs)
            # as slow as the reserve allows
            left -= (cost.fixed_s + epochs * cost.epoch_s) * (1 + RESERVE) * (1 - 1e-12)
        assert epochs or math.fsum(cost.seconds(2) for cost in wanted) > seconds
        assert left >= 0


def test_what_the_compilers_cache_had_is_not_thought_to_be_quick():
    assert Cost(3.0, 2.0).no_cheaper_than(Cost(25.0, 9.0)) == Cost(25.0, 2.0)
    assert Cost(30.0, 2.0).no_cheaper_than(Cost(25.0, 9.0)) == Cost(30.0, 2.0)
    assert Cost(3.0, 2.0).no_cheaper_than(None) == Cost(3.0, 2.0)


@pytest.mark.parametrize("wrong", [{"share": 0.0}, {"least": 0}, {"most": 0}])
def test_a_wrong_plan_is_an_error(wrong):
    with pytest.raises(ValueError, match="least="):
        choose_epochs(1.0, COSTS, **{"share": 0.5, "least": 1, "most": 2} | wrong)
