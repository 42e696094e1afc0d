"""Prepares a data set for training, or says what is missing.

python -m mimicnorm_jax.tools.prepare_data cifar100 --data-dir data
python -m mimicnorm_jax.tools.prepare_data imagenet2012 --data-dir data --manual-dir archives
python -m mimicnorm_jax.tools.prepare_data imagenet2012 --data-dir data --check
python -m mimicnorm_jax.tools.prepare_data import SOURCE --data-dir data --name birds

Builds it with tensorflow-datasets, in array_record format, which training reads without
TensorFlow; a build in tfrecord format gets array_record files beside its own. import copies
images that are there already, in class folders, parquet files, WebDataset's tar files, SVHN's,
STL-10's, MNIST's or CIFAR's own files, into such a build, and needs no TensorFlow.
"""

from __future__ import annotations

import argparse
import pathlib
import re
from collections.abc import Sequence

from mimicnorm_jax.arguments import Parser, run
from mimicnorm_jax.data.tfds import PREPARABLE, build_directory
from mimicnorm_jax.errors import UserError, refused_by_system, unknown
from mimicnorm_jax.paths import expanded
from mimicnorm_jax.tools.prepare_data.build import import_images, prepare
from mimicnorm_jax.tools.prepare_data.check import check, check_import, missing_archives

_IMPORT = "import"


def _path(text: str) -> pathlib.Path:
    return expanded(text)  # which no shell does in --data-dir=~/data


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser("python -m mimicnorm_jax.tools.prepare_data", str(__doc__))
    parser.add_argument(
        "what",
        metavar="DATA_SET|import",
        help=f"the data set, {', '.join(PREPARABLE)}; or import, for your own images",
    )
    parser.add_argument(
        "source", metavar="SOURCE", nargs="?", type=_path, help="import: the images"
    )
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
    parser.add_argument("--name", help="import: of the data set, such as birds")
    parser.add_argument(
        "--label", default="", help="import: the column, or the kind of labels, of several"
    )
    options = parser.parse_args(arguments)
    if options.what not in (*PREPARABLE, _IMPORT):
        raise unknown("data set", options.what, (*PREPARABLE, _IMPORT))
    if options.what == _IMPORT:
        _check_import_options(options)
    elif options.source or options.name or options.label:
        raise UserError(f"SOURCE, --name and --label go with import, not with {options.what}")
    return options


def _check_import_options(options: argparse.Namespace) -> None:
    if not options.name or not re.fullmatch("[a-z][a-z0-9_]*", options.name):
        raise UserError(
            f"--name={options.name or ''} is no name of a data set; allowed: small letters, digits "
            "and _, such as birds_2"
        )
    if options.source is None and not options.check:
        raise UserError("import needs the images: import SOURCE --data-dir DIR --name NAME")
    if options.manual_dir or options.sample:
        raise UserError("--manual-dir and --sample do not go with import")


def _check_only(options: argparse.Namespace) -> str:
    if options.what == _IMPORT:
        return check_import(build_directory(options.data_dir, options.name))
    try:
        return check(options.what, options.data_dir, sample=options.sample)
    except UserError as error:
        manual_dir = options.manual_dir or options.data_dir / "archives"
        lines = missing_archives(options.what, manual_dir, sample=options.sample)
        raise UserError("; ".join([str(error), *lines])) from error


def _prepare(options: argparse.Namespace) -> str:
    if options.what == _IMPORT:
        return import_images(
            options.source, options.data_dir, name=options.name, label=options.label
        )
    return prepare(
        options.what, options.data_dir, manual_dir=options.manual_dir, sample=options.sample
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the program."""

    def program() -> None:
        options = _parse(arguments)
        with refused_by_system(f"--data-dir={options.data_dir} cannot be used"):
            print(_check_only(options) if options.check else _prepare(options))

    run(program, interrupted="stopped; the same command goes on")


if __name__ == "__main__":
    main()
