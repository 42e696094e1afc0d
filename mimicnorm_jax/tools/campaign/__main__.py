"""Trains networks by several methods as long as a given time allows, without checkpoints.

python -m mimicnorm_jax.tools.campaign train --config configs/cifar10_folder_resnet20.py \
      --data=DIR --numbers=OUT --limit=400   # DIR/<data set>/{train,test}/<class>/*.jpg
python -m mimicnorm_jax.tools.campaign agreement --config configs/cifar10_folder_resnet20.py \
      --numbers=OUT   # is a step of this GPU that of a CPU?

The configuration gives the recipe; network, method, seed, length and folder are the campaign's.
Numbers go to one JSON file a run, written anew after each epoch, and ``plan.json``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pathlib
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mimicnorm_jax import command_line
from mimicnorm_jax.config import validate
from mimicnorm_jax.data.splits import Splits, has_test_split, splits_of
from mimicnorm_jax.errors import RunError, UserError, refused_by_system
from mimicnorm_jax.parallel import make_mesh
from mimicnorm_jax.paths import define_path
from mimicnorm_jax.tools.campaign import runs
from mimicnorm_jax.tools.campaign.agreement import TOLERANCE, differences
from mimicnorm_jax.tools.campaign.budget import Cost, choose_epochs, fits
from mimicnorm_jax.train.experiment import experiment_of, images_of
from mimicnorm_jax.train.json_files import write_json
from mimicnorm_jax.train.program import Images
from mimicnorm_jax.train.resident import ResidentExperiment, ResidentSplit, with_resident
from mimicnorm_jax.train.setup import configure_jax, silence_false_alarms

METHODS = ("batchnorm", "mimicnorm", "nonorm")
# (data set, network), the most wanted first; more seeds of them come last
GROUPS = (("imagenet200_32", "resnet18"), ("imagenet200_32", "vgg16"), ("cifar10", "resnet18"))
# of one step in float32: a residual network with and without BatchNorms, and one with max-pools
AGREEMENTS = (("resnet20", "batchnorm"), ("resnet20", "mimicnorm"), ("vgg11", "mimicnorm"))

_DATA = define_path("data", None, "train: the folder with the data sets' folders.")
_NUMBERS = define_path("numbers", None, "The folder where the numbers go.")
_LIMIT = flags.DEFINE_float("limit", 400.0, "train: seconds in all.", 1.0)
_SEEDS = flags.DEFINE_integer("seeds", 3, "train: of each run, if time is left.", 1)
_LEAST = flags.DEFINE_integer("least", 3, "train: epochs of the shortest run worth a start.", 1)
_MOST = flags.DEFINE_integer("most", 150, "train: epochs of the longest run; the recipe's.", 1)
_SHARE = flags.DEFINE_float("share", 0.5, "train: of the time left, for the next group.", 0.01, 1.0)
_TIMED = flags.DEFINE_float("timed", 2.0, "train: seconds that a speed is measured.", 0.01)
_PER_CALL = flags.DEFINE_list("steps-per-call", ["1", "8"], "train: what is tried.")


class Opened(NamedTuple):
    """A data set in memory and on the devices."""

    splits: Splits
    images: Images
    resident: ResidentSplit


class Campaign:
    """Runs groups of comparable runs, the most wanted first, within a time.

    Args:
      config: the recipe.
      data: the folder of the data sets.
      numbers: the folder of the results; it exists.
      limit: seconds in all, from ``began`` on.
      began: a reading of ``time.monotonic``.
    """

    def __init__(
        self,
        config: ConfigDict,
        data: pathlib.Path,
        numbers: pathlib.Path,
        limit: float,
        began: float,
    ):
        self._config = config
        self._data = data
        self._numbers = numbers
        self._end = began + limit
        self._mesh: Mesh = make_mesh(config.num_devices)
        silence_false_alarms(self._mesh)
        self._open = functools.cache(self._opened)
        self._plan: list[dict[str, Any]] = []
        self._costs: dict[tuple[str, str], Cost] = {}  # by network and method

    def run(self) -> None:
        """Runs what fits: each group with the first seed, then all of them with the others."""
        planned = []
        for data_set, network in GROUPS:
            variants = {m: self._variant(data_set, network, m) for m in METHODS}
            measured = {m: self._measure(data_set, variant) for m, variant in variants.items()}
            left = self._left()
            epochs = choose_epochs(
                left,
                [one.cost for one in measured.values()],
                share=_SHARE.value,
                least=_LEAST.value,
                most=_MOST.value,
            )
            self._decide(
                data_set=data_set,
                network=network,
                seconds_left=left,
                epochs=epochs,
                measured={m: dataclasses.asdict(one) for m, one in measured.items()},
            )
            group = (data_set, variants, measured, epochs)
            if epochs:
                planned.append(group)
                self._group(*group, seed=self._config.seed)
        for seed in range(self._config.seed + 1, self._config.seed + _SEEDS.value):
            for group in planned:
                self._group(*group, seed=seed)

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _decide(self, **decision: Any) -> None:
        """Keeps a decision, with what it was made from."""
        self._plan.append(decision)
        write_json(self._numbers / "plan.json", self._plan)
        said = {k: v for k, v in decision.items() if k != "measured"}
        print(", ".join(f"{k} {v}" for k, v in said.items()), flush=True)

    def _variant(self, data_set: str, network: str, method: str) -> ConfigDict:
        config = copy.deepcopy(self._config)
        config.network, config.method = network, method
        config.data.dir = str(self._data / data_set)
        validate(config)
        return config

    def _opened(self, data_set: str) -> Opened:
        config = self._variant(data_set, self._config.network, self._config.method)
        if not has_test_split(config.data):
            raise UserError("there is no test split; a campaign compares test accuracies")
        splits = splits_of(config)
        resident = ResidentSplit(splits.train, self._mesh)
        return Opened(splits, images_of(config, splits.train), resident)

    def _experiment(self, data_set: str, config: ConfigDict) -> ResidentExperiment:
        opened = self._open(data_set)
        experiment = experiment_of(config, opened.images, self._mesh, opened.splits)
        return with_resident(experiment, opened.resident)

    def _measure(self, data_set: str, variant: ConfigDict) -> runs.Measured:
        measured = runs.fastest(
            lambda count: self._experiment(
                data_set, runs.with_length(variant, _LEAST.value, count)
            ),
            tuple(int(count) for count in _PER_CALL.value),
            _TIMED.value,
        )
        key = variant.network, variant.method
        cost = self._costs[key] = measured.cost.no_cheaper_than(self._costs.get(key))
        measured = dataclasses.replace(measured, cost=cost)
        print(
            f"{data_set} {variant.network} {variant.method}: {measured.images_per_second:.0f} "
            f"images/s with {measured.steps_per_call} step(s) a call; "
            f"{measured.cost.fixed_s:.1f} s and {measured.cost.epoch_s:.2f} s an epoch",
            flush=True,
        )
        return measured

    def _group(
        self,
        data_set: str,
        variants: dict[str, ConfigDict],
        measured: dict[str, runs.Measured],
        epochs: int,
        *,
        seed: int,
    ) -> None:
        for method, variant in variants.items():
            name = f"{data_set}-{variant.network}-{method}-s{seed}"
            if not fits(self._left(), measured[method].cost, epochs):
                self._decide(run=name, seconds_left=self._left(), epochs=0)
                continue
            config = runs.with_length(variant, epochs, measured[method].steps_per_call)
            config.seed = seed

            def note(record: runs.Record, name: str = name, data_set: str = data_set) -> None:
                write_json(self._numbers / f"{name}.json", record | {"data_set": data_set})

            record = runs.train(self._experiment(data_set, config), note)
            note(record)
            print(
                f"{name}: {epochs} epochs, final_test_accuracy {record['final_test_accuracy']}, "
                f"best {record['best_test_accuracy']}, exact statistics "
                f"{record['final_test_accuracy_recalibrated']}, "
                f"{record['images_per_second'] or 0:.0f} images/s, {record['seconds']:.1f} s"
                + (
                    f", diverged at {record.get('diverged_at_step')}"
                    * ("diverged_at_step" in record)
                ),
                flush=True,
            )


def _folder() -> pathlib.Path:
    with refused_by_system(f"--numbers={_NUMBERS.value} cannot be used"):
        if not _NUMBERS.value or not pathlib.Path(_NUMBERS.value).is_dir():
            raise UserError(f"--numbers={_NUMBERS.value} is not a folder")
    return pathlib.Path(_NUMBERS.value)


def _train() -> None:
    began, numbers = time.monotonic(), _folder()
    if not _DATA.value:
        raise UserError("--data is missing: the folder with the data sets' folders")
    if _LEAST.value > _MOST.value:
        raise UserError(f"--least={_LEAST.value} is above --most={_MOST.value}")
    if not all(count.isdigit() and int(count) for count in _PER_CALL.value):
        raise UserError(f"--steps-per-call={','.join(_PER_CALL.value)}; allowed: numbers from 1")
    config = command_line.config()
    configure_jax(config)
    Campaign(config, pathlib.Path(_DATA.value), numbers, _LIMIT.value, began).run()


def _agreement() -> None:
    numbers, config = _folder(), command_line.config()
    size, found, bad = config.data.image_size, {}, []
    images = Images((size, size, 3), 10, 10 * config.batch_size, (0.5,) * 3, (0.25,) * 3)
    configure_jax(config)
    for network, method in AGREEMENTS:
        variant = copy.deepcopy(config)
        variant.network, variant.method = network, method
        found[f"{network} {method}"] = apart = differences(variant, images)
        print(f"{network} {method}: " + ", ".join(f"{k} {v:.1e}" for k, v in apart.items()))
        bad += [f"{network} {method}" for v in apart.values() if not v <= TOLERANCE][:1]
    device = jax.devices()[0].device_kind
    report = {"device": device, "tolerance": TOLERANCE, "relative_differences": found}
    write_json(numbers / "agreement.json", report)
    if bad:
        raise RunError(f"a step on {device} is not that of a CPU: {', '.join(bad)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; arguments and result as those of ``mimicnorm_jax.main.main``."""
    return command_line.run_program({"train": _train, "agreement": _agreement}, argv=argv)


if __name__ == "__main__":
    main()
