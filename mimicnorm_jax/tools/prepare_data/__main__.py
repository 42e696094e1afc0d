"""Prepares a data set for training, or says what is missing.

python -m mimicnorm_jax.tools.prepare_data cifar100 --data-dir data
python -m mimicnorm_jax.tools.prepare_data imagenet2012 --data-dir data --manual-dir archives
python -m mimicnorm_jax.tools.prepare_data imagenet2012 --data-dir data --check

Builds it with tensorflow-datasets, in array_record format, which training reads without
TensorFlow; a build in tfrecord format gets array_record files beside its own.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from mimicnorm_jax.data.tfds import (
    PREPARABLE,
)
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools.prepare_data.build import prepare
from mimicnorm_jax.tools.prepare_data.check import check, missing_archives


def _path(text: str) -> pathlib.Path:
    return pathlib.Path(text).expanduser()  # which no shell does in --data-dir=~/data


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="python -m mimicnorm_jax.tools.prepare_data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", choices=PREPARABLE, help="the data set")
    parser.add_argument("--data-dir", type=_path, required=True, help="where it goes")
    parser.add_argument(
        "--manual-dir",
        type=_path,
        help="where the archives are (default: DATA_DIR/archives)",
    )
    parser.add_argument("--check", action="store_true", help="only say what is there or missing")
    parser.add_argument(
        "--sample", action="store_true", help="the archives hold a part of the published data set"
    )
    return parser.parse_args(arguments)


def _check_only(options: argparse.Namespace) -> str:
    try:
        return check(options.name, options.data_dir, sample=options.sample)
    except UserError as error:
        manual_dir = options.manual_dir or options.data_dir / "archives"
        lines = missing_archives(options.name, manual_dir, sample=options.sample)
        raise UserError("; ".join([str(error), *lines])) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""
    try:
        options = _parse(arguments)
        if options.check:
            print(_check_only(options))
        else:
            print(
                prepare(
                    options.name,
                    options.data_dir,
                    manual_dir=options.manual_dir,
                    sample=options.sample,
                )
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
