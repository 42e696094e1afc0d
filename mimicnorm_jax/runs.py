"""Runs from Python, as in a notebook: ``mimicnorm_jax.fit`` and ``mimicnorm_jax.evaluate``."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from mimicnorm_jax.errors import UserError, first_line, unknown
from mimicnorm_jax.guest import process_left_as_it_was
from mimicnorm_jax.paths import expanded

if TYPE_CHECKING:  # slow to import
    from ml_collections import ConfigDict


def read_config(
    config: ConfigDict | str | os.PathLike[str], overrides: Mapping[str, Any] | None = None
) -> ConfigDict:
    """A configuration to look at, to change, and to give to ``fit``.

    Args:
      config: the name of one that comes with the project, such as ``"digits_resnet20"``; the path
        of a config file, which is a program and will be run; or a configuration, which is copied.
      overrides: values of fields by dotted name, such as ``{"data.dir": "photos", "epochs": 5}``.

    Raises:
      UserError: no such file, name or field; a value of another type; or whatever the file raises.
    """
    import numpy as np
    from ml_collections import ConfigDict, FrozenConfigDict

    from mimicnorm_jax.config import FIELDS

    if isinstance(config, FrozenConfigDict):
        config = config.as_configdict()
    if isinstance(config, ConfigDict):
        made = config.copy_and_resolve_references()
    elif isinstance(config, str | os.PathLike):
        made = _made(config)
    else:
        raise UserError(f"a configuration is a {type(config).__name__}; allowed: a name or a path")
    for name, value in (overrides or {}).items():
        if name not in FIELDS:
            raise unknown("field", name, FIELDS)
        value = tuple(value) if isinstance(value, list) else value
        value = str(value) if isinstance(value, os.PathLike) else value
        value = value.item() if isinstance(value, np.generic) else value
        try:
            made.update_from_flattened_dict({name: value})
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} = {value!r}: {first_line(error)}") from error
    return made


def _made(given: str | os.PathLike[str]) -> ConfigDict:
    from ml_collections import ConfigDict

    from mimicnorm_jax.config.packaged import find_config

    path, _, argument = find_config(str(expanded(given))).partition(":")
    spec = importlib.util.spec_from_file_location("mimicnorm_jax_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the types of their fields
    try:
        spec.loader.exec_module(module)
        made = module.get_config(*([argument] if argument else []))
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # a config file is a program: it fails in any way
        raise UserError(f"{path} failed: {type(error).__name__}: {first_line(error)}") from error
    finally:
        del sys.modules[spec.name]
    if not isinstance(made, ConfigDict):
        raise UserError(f"get_config() of {path} returns a {type(made).__name__}, no ConfigDict")
    return made


def fit(
    config: ConfigDict | str | os.PathLike[str],
    workdir: str | os.PathLike[str] | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Trains a run, or goes on with it, in this process, as ``python -m mimicnorm_jax.main`` does.

    It may be called again, and in a thread. There, signals are not its business; in the main
    thread Ctrl-C (the stop button of a notebook) ends it well, and the same call goes on.

    Args:
      config: see ``read_config``.
      workdir: the run's folder; by default ``runs/<config>-<method>-s<seed>``.
      overrides: see ``read_config``.

    Returns:
      The summary, as in ``summary.json``; None if it was stopped before its end.

    Raises:
      UserError: a wrong input; nothing has been written.
      RunError: it cannot go on, such as on a full disk, or diverged.
    """
    from ml_collections import ConfigDict

    from mimicnorm_jax.config import validate

    fields = read_config(config, overrides)
    validate(fields)
    if fields.data.processes:
        _check_main_guard(f"config.data.processes = {fields.data.processes}")
    with process_left_as_it_was():
        from mimicnorm_jax.train import loop, setup
        from mimicnorm_jax.train.workdir import default_workdir

        name = fields.network if isinstance(config, ConfigDict) else str(config)
        folder = pathlib.Path(workdir) if workdir else default_workdir(fields, name)
        setup.configure_jax(fields)
        return loop.train(fields, expanded(folder))


def evaluate(
    run: str | os.PathLike[str],
    which: Literal["best", "latest"] = "best",
    *,
    overrides: Mapping[str, Any] | None = None,
    labels: Literal["names", "numbers"] = "names",
    restrict_classes: bool = False,
) -> dict[str, Any]:
    """Evaluates a run on its test images or on others.

    Args:
      run: the run's folder.
      which: the checkpoint of the best accuracy, or the latest.
      overrides: other images than the run's own, such as
        ``{"data.dir": "others", "data.test_split": "test"}``; see ``read_config``.
      labels: whether the classes of the images are named as the run's, or by the numbers of its
        logits.
      restrict_classes: choose among the classes of the images only, not all of the run.

    Returns:
      What ``--mode=eval`` prints of that checkpoint, such as ``test_accuracy``; with ``classes``,
      ``confusion`` and ``reliability``, see ``mimicnorm_jax.train.scores.details``.

    Raises:
      UserError: no run, or a wrong input; classes that do not match are listed.
    """
    for name, value, allowed in (
        ("which", which, ("best", "latest")),
        ("labels", labels, ("names", "numbers")),
    ):
        if value not in allowed:
            raise unknown(name, value, allowed)
    with process_left_as_it_was():
        from mimicnorm_jax.train.evaluated_run import Question, evaluate_run
        from mimicnorm_jax.train.workdir import saved_config

        folder = expanded(run)
        config = read_config(saved_config(folder), overrides)
        question = Question(labels=labels, restrict_classes=restrict_classes)
        found = evaluate_run(config, folder, question)
    return found.results[which] | found.details[which]


def _check_main_guard(why: str) -> None:
    """Worker processes run a script again, up to its main guard: without one, they would train.

    Raises:
      UserError: the call stands outside a function, and under no ``if __name__ == "__main__":``.
    """
    main = sys.modules["__main__"]
    path = getattr(main, "__file__", None)
    outermost, frame = None, inspect.currentframe()
    while frame is not None:
        if frame.f_globals is vars(main):
            outermost = frame
        frame = frame.f_back
    if path is None or outermost is None or outermost.f_code.co_name != "<module>":
        return
    line = outermost.f_lineno
    for statement in ast.parse(pathlib.Path(path).read_text()).body:
        if not statement.lineno <= line <= (statement.end_lineno or statement.lineno):
            continue
        if isinstance(statement, ast.If) and "__name__" in ast.unparse(statement.test):
            return
        raise UserError(
            f"{why}: worker processes run {path} again; put what it does under "
            'if __name__ == "__main__":'
        )
