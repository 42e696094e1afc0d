"""Evaluation of a run, on its own test images or on any others."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from mimicnorm_jax.config import FREE_FIELDS, TEST_FIELDS, flatten, validate
from mimicnorm_jax.config.data import ENCODED
from mimicnorm_jax.data.classes import Labels, columns_of
from mimicnorm_jax.data.sources import Source
from mimicnorm_jax.data.splits import Splits, has_test_split, open_test_split, splits_of, view_of
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.parallel import connect, coordination, make_mesh, replicate
from mimicnorm_jax.train.calibrated import read_calibration
from mimicnorm_jax.train.checkpoint import Checkpoints
from mimicnorm_jax.train.description import Description, check_network, read_description
from mimicnorm_jax.train.evaluation import averaged, outputs_of, recalibrate
from mimicnorm_jax.train.experiment import Experiment, experiment_of, images_of, pipeline_of
from mimicnorm_jax.train.metrics import accuracies
from mimicnorm_jax.train.program import Program, make_program
from mimicnorm_jax.train.scores import Outputs, details, scores
from mimicnorm_jax.train.setup import (
    check_same_configuration,
    check_same_images,
    configure_jax,
    silence_false_alarms,
)
from mimicnorm_jax.train.state import TrainState
from mimicnorm_jax.train.workdir import (
    check_data,
    check_workdir,
    data_identity,
    read_identity,
    same_images,
    saved_config,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class Question:
    """What an evaluation is to find out.

    Attributes:
      exact: also with the last BN's statistics of the whole training split.
      labels: whether the classes of the images are named as the network's, or by the numbers of
        its logits.
      restrict_classes: choose among the classes of the images only, not among all of the network.
    """

    exact: bool = False
    labels: Labels = "names"
    restrict_classes: bool = False


class Evaluation(NamedTuple):
    """What was found, by checkpoint: ``best``, ``latest``, ``best_recalibrated`` and so on.

    Attributes:
      results: the numbers, see ``evaluate_run``.
      details: see ``scores.details``.
      is_own: whether the images are the run's own, as it evaluates them itself.
      images: how many there are, in words.
    """

    results: dict[str, dict[str, Any]]
    details: dict[str, dict[str, Any]]
    is_own: bool
    images: str


class _Opened(NamedTuple):
    """A run and the images of its evaluation.

    Attributes:
      program: of the run.
      training: the run with its training images, where these are needed.
      split: ``"test"``; or ``"holdout"``, of a run without a test split.
      images: of the split.
      columns: of the logits, for each class of the images.
      class_names: of the logits.
      is_own: whether the images are those that the run was made with.
    """

    program: Program
    training: Experiment | None
    split: str
    images: Source
    columns: list[int]
    class_names: tuple[str, ...]
    is_own: bool


def evaluate_run(
    config: ConfigDict, workdir: pathlib.Path, question: Question = Question()
) -> Evaluation:
    """Evaluates the latest and the best checkpoint of a run on a test split.

    The run may be going on: nothing of it is changed. Training images are read only where they
    are needed: for exact statistics, for those of averaged parameters, for the images held out
    of a run without a test split, and for a run of a version that did not keep its classes.

    Args:
      config: of the run; in ``TEST_FIELDS`` it may name other images.
      workdir: the run's folder.
      question: what to find out.

    Returns:
      For each checkpoint ``step``; ``temperature`` of its calibrated probabilities, None where it
      has none; and of the test images ``test_accuracy``, ``test_loss``,
      ``test_calibration_error``, ``test_examples`` and the rest of ``scores.scores``. Where the
      images are the run's own, these numbers are also written to ``eval.json`` in ``workdir``.

    Raises:
      UserError: a wrong input, or a folder without checkpoints.
    """
    directory = workdir / "checkpoints"

    def check() -> None:
        if not directory.is_dir():
            raise UserError(f"--workdir={workdir} has no checkpoints to evaluate; train it first")
        check_workdir(workdir, config, writes=False, free=(*FREE_FIELDS, *TEST_FIELDS))
        check_network(workdir, config)

    coordination.together("workdir", check)
    check_same_configuration(config)
    opened = coordination.together("set-up", lambda: _open(config, workdir, question))
    check_same_images({opened.split: opened.images})
    states = _states(opened, directory, workdir)
    found = Evaluation({}, {}, opened.is_own, _in_words(opened, question))
    for suffix in ("", "_recalibrated") if question.exact else ("",):
        for name, state in states.items():
            best = found.results.get(f"best{suffix}")
            if best is not None and best["step"] == int(state.step):
                known = f"best{suffix}"  # which is the latest
                results, more = found.results[known], found.details[known]
            else:
                results, more = _evaluate(opened, question, state, workdir, exact=bool(suffix))
            found.results[name + suffix], found.details[name + suffix] = results, more
    if opened.is_own and coordination.is_first():
        write_json(workdir / "eval.json", found.results)
    return found


def _in_words(opened: _Opened, question: Question) -> str:
    images, classes = opened.images, opened.class_names
    count = len(set(opened.columns))
    words = f"{len(images)} images of {count} {'class' if count == 1 else 'classes'}"
    if question.labels == "numbers":
        pairs = list(zip(images.class_names, opened.columns, strict=True))[:3]
        words += f" ({', '.join(f'{name} is {classes[column]!r}' for name, column in pairs)} …)"
    if count == len(classes):
        return words
    among = "these" if question.restrict_classes else f"all {len(classes)}"
    return f"{words}, evaluated among {among}"


def _evaluate(
    opened: _Opened, question: Question, state: TrainState, workdir: pathlib.Path, *, exact: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Results and details of one state."""
    if opened.training is not None:
        state = (recalibrate if exact else averaged)(opened.training, state)
    split = pipeline_of(opened.program.config, opened.images)
    outputs, names = _of_classes(opened, question, outputs_of(opened.program, state, split))
    # a temperature belongs to the statistics that it was fitted with
    calibration = None if exact else read_calibration(workdir, int(state.step))
    temperature = None if calibration is None else calibration["temperature"]
    results = {"step": int(state.step), "temperature": temperature}
    numbers = scores(outputs, temperature)
    results |= {f"{opened.split}_{name}": value for name, value in numbers.items()}
    return results, details(outputs, names, temperature)


def _states(
    opened: _Opened, directory: pathlib.Path, workdir: pathlib.Path
) -> dict[str, TrainState]:
    checkpoints, target = Checkpoints(directory), opened.program.abstract_state
    best = checkpoints.restore_best(target, accuracies(workdir))
    latest = checkpoints.restore_latest(target, set_aside=False)
    return {
        name: replicate(restored.state, opened.program.mesh)
        for name, restored in (("best", best), ("latest", latest))
        if restored is not None
    }


def _of_classes(
    opened: _Opened, question: Question, outputs: Outputs
) -> tuple[Outputs, Sequence[str]]:
    """The outputs with labels of the network, over the classes that were asked for; their names."""
    columns = np.asarray(opened.columns)
    outputs = dataclasses.replace(outputs, labels=columns[outputs.labels])
    if not question.restrict_classes:
        return outputs, opened.class_names
    chosen = sorted(set(opened.columns))
    return outputs.restricted(chosen), [opened.class_names[column] for column in chosen]


def _open(config: ConfigDict, workdir: pathlib.Path, question: Question) -> _Opened:
    validate(config)
    configure_jax(config)
    of_run = saved_config(workdir) if (workdir / "config.json").exists() else config
    config = _on_devices_here(config, of_run)
    mesh = make_mesh(config.num_devices)
    connect(mesh)
    silence_false_alarms(mesh)
    description, training = read_description(workdir), None
    if description is None:
        training = _training_images(config, of_run, workdir)
        images_trained_on = images_of(config, training.train)
        description = Description.of(config, training.train, images_trained_on)
    program = make_program(config, description.images, mesh)
    has_averages = program.abstract_state.ema_params is not None
    has_test = has_test_split(config.data)
    if (
        question.exact
        or not has_test
        or (has_averages and jax.tree.leaves(program.abstract_state.batch_stats))
    ):
        training = training or _training_images(config, of_run, workdir)
    if has_test:
        split, images = "test", open_test_split(config.data, description.images.shape)
    else:
        assert training is not None
        assert training.holdout is not None
        split, images = "holdout", training.holdout
    columns = columns_of(images.class_names, description.class_names, question.labels)
    has_all = len(set(columns)) == len(description.class_names)
    is_usual = question.labels == "names" and (has_all or not question.restrict_classes)
    if question.restrict_classes and len(set(columns)) == 1:
        raise UserError(
            f"the images have a single class, {images.class_names[0]!r}, which leaves nothing to "
            "choose; leave out --restrict-classes"
        )
    return _Opened(
        program=program,
        training=training and experiment_of(config, description.images, mesh, training),
        split=split,
        images=images,
        columns=columns,
        class_names=description.class_names,
        is_own=is_usual and _is_own({split: images}, workdir, config, of_run),
    )


def _on_devices_here(config: ConfigDict, of_run: ConfigDict) -> ConfigDict:
    """The configuration, on a single device where the run had more than there are here."""
    here = config.copy_and_resolve_references()
    asked = config.num_devices
    if asked and asked == of_run.num_devices and asked > jax.device_count():
        here.num_devices = coordination.process_count()
    return here


def _training_images(config: ConfigDict, of_run: ConfigDict, workdir: pathlib.Path) -> Splits:
    """The run's own, where ``config`` says, or else where the run found them; no test images."""

    def opened(candidate: ConfigDict) -> Splits:
        alone = candidate.copy_and_resolve_references()
        if alone.data.name in ENCODED:
            alone.data.test_split = ""
        splits = splits_of(alone)._replace(test=None)
        check_data(workdir, data_identity(splits._asdict()))
        return splits

    try:
        return opened(config)
    except UserError:
        # without a test split they are what is evaluated, and so what was asked for
        if not has_test_split(config.data) or flatten(config.data) == flatten(of_run.data):
            raise
    return opened(of_run)


def _is_own(
    images: dict[str, Source | None], workdir: pathlib.Path, config: ConfigDict, of_run: ConfigDict
) -> bool:
    """Whether images are those that the run was made with, brought to size as there.

    Raises:
      UserError: they are others, and nobody asked for others.
    """
    path, now = workdir / "data.json", data_identity(images)
    before = read_identity(path) if path.exists() else now
    # a source that is opened alone may not know of classes that none of its images has
    same = all(
        same_images(before.get(split, {}), identity, counted=("examples",))
        for split, identity in now.items()
    )
    if not same and all(flatten(config)[name] == flatten(of_run)[name] for name in TEST_FIELDS):
        check_data(workdir, now)
    return same and view_of(config.data) == view_of(of_run.data)
