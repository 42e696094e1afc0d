"""From archives in the published formats through the real TFDS builders to a trained step."""

import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.data.tfds import PREPARABLE, TFDSSource, how_to_prepare
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools.prepare_data.__main__ import main
from mimicnorm_jax.tools.prepare_data.check import DATA_SETS
from tests.archives import (
    PER_SYNSET,
    SYNSETS,
    TEST,
    TRAIN,
    VALIDATION,
    cifar100_pixels,
    data_config,
    needs_tensorflow,
    run_tool,
    write_cifar100_to,
)


@needs_tensorflow
class TestPrepared:
    def test_the_report_counts_what_is_there(self, prepared):
        root, outputs = prepared
        assert f"train: {TRAIN} of 50000 examples, 100 classes" in outputs["cifar100"].stdout
        assert f"test: {TEST} of 10000 examples" in outputs["cifar100"].stdout
        assert f"train: {len(SYNSETS) * PER_SYNSET} of 1281167" in outputs["imagenet2012"].stdout
        assert f"validation: {VALIDATION} of 50000" in outputs["imagenet2012"].stdout
        assert "removing" in outputs["cifar100"].stderr  # what the interrupted attempt left
        assert not list(root.glob("*/incomplete.*")) and not list(root.glob("extracted-*"))

    def test_the_examples_are_those_of_the_archive(self, prepared):
        root, _ = prepared
        train, test = open_splits(data_config(root, "cifar100"))
        assert (len(train), len(test)) == (TRAIN, TEST)
        assert train.class_names == [f"fine{i}" for i in range(100)]
        expected = {
            pixels.transpose(1, 2, 0).tobytes(): index % 100
            for index, pixels in enumerate(cifar100_pixels(TRAIN, 0))
        }
        got = {i.tobytes(): int(label) for i, label in zip(train.images, train.labels, strict=True)}
        assert got == expected
        assert train.identity != test.identity
        again, _ = open_splits(data_config(root, "cifar100", cache_gib=0.0))
        assert isinstance(again, TFDSSource) and again.identity == train.identity

    def test_large_images_stay_encoded_and_know_where_they_are(self, prepared):
        root, _ = prepared
        values = {"test_split": "validation", "image_size": 64, "resize": 72}
        data = data_config(root, "imagenet2012", random_resized_crop=True, **values)
        train, test = open_splits(data)
        assert isinstance(train, TFDSSource) and train.image_shape == (64, 64, 3)
        assert len(train.class_names) == 1000
        labels = [train[i][1] for i in range(len(train))]
        assert sorted(labels) == sorted([0, 1, 873] * PER_SYNSET)
        where = train.describe(len(train) - 1)
        assert re.search(r"-00000-of-00001 record 11 \(n04486054_\d\.JPEG\)$", where)
        assert str(root) in where
        with pytest.raises(IndexError):
            train.describe(len(train))
        assert test.image_shape == (64, 64, 3)

    @pytest.mark.parametrize(
        ("config", "options"),
        [
            ("cifar100_vgg16", ["--config.network=vgg11", "--config.width=0.0625"]),
            pytest.param(
                "imagenet_resnet50",
                [
                    "--config.network=resnet8",
                    "--config.width=0.5",
                    "--config.data.image_size=64",
                    "--config.data.resize=72",
                    "--config.data.processes=1",
                ],
                marks=pytest.mark.long,
            ),
        ],
    )
    def test_it_is_trained_on_from_the_command_line(
        self, prepared, tmp_path, run_main, config, options
    ):
        root, _ = prepared
        done = run_main(
            f"--config=configs/{config}.py",
            f"--config.data.dir={root}",
            "--config.max_steps=3",
            "--config.batch_size=8",
            f"--workdir={tmp_path / 'run'}",
            *options,
        )
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["steps"] == 3 and np.isfinite(summary["final_train_loss"])
        assert summary["test_examples"] == (TEST if "cifar" in config else VALIDATION)
        rows = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        (row,) = (row for row in rows if "train_loss" in row)
        assert 0 <= row["input_wait_fraction"] <= 1
        assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr

    def test_reading_needs_no_tensorflow(self, prepared):
        root, _ = prepared
        script = (
            "import sys\n"
            "from mimicnorm_jax.config import default_config\n"
            "from mimicnorm_jax.data.pipeline import Pipeline\n"
            "from mimicnorm_jax.data.splits import open_splits\n"
            "data = default_config().data\n"
            "data.update(name='tfds', tfds_name='imagenet2012', dir=sys.argv[1], image_size=32)\n"
            "data.update(test_split='validation', cache_gib=0.0)\n"
            "batches = Pipeline(open_splits(data)[0], batch_size=4, seed=0).batches(0, 2)\n"
            "assert [len(batch['label']) for batch in batches] == [4, 4]\n"
            "assert 'tensorflow_datasets' in sys.modules and 'tensorflow' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", script, str(root)], check=True)

    def test_a_second_call_only_checks(self, prepared):
        root, _ = prepared
        before = {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}
        done = run_tool("cifar100", "--data-dir", root, "--sample")
        assert done.returncode == 0 and f"train: {TRAIN} of 50000" in done.stdout
        assert before == {p: p.stat().st_mtime_ns for p in root.rglob("*") if p.is_file()}

    def test_a_sample_passes_for_the_whole_only_when_asked(self, prepared, tmp_path):
        root, _ = prepared
        done = run_tool("cifar100", "--data-dir", root, "--check")
        assert done.returncode == 2
        assert f"split train has {TRAIN} examples instead of 50000" in done.stderr
        done = run_tool("cifar100", "--data-dir", tmp_path, "--manual-dir", root / "archives")
        assert done.returncode == 2
        assert "wrong checksum; if it is a sample, --sample" in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr

    def test_a_damaged_archive_is_one_line(self, prepared, tmp_path):
        write_cifar100_to(tmp_path / "archives")
        archive = tmp_path / "archives" / "cifar-100-binary.tar.gz"
        archive.write_bytes(archive.read_bytes()[:5000])
        done = run_tool("cifar100", "--data-dir", tmp_path, "--sample")
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "error: cifar100 could not be prepared: " in done.stderr.splitlines()[-1]

    def test_a_tfrecord_build_is_converted_beside_its_files(self, prepared, tmp_path):
        root, _ = prepared
        script = (
            "import sys, tensorflow_datasets as tfds\n"
            "from mimicnorm_jax.tools.prepare_data.build import _accept_any_archive\n"
            "import pathlib\n"
            "builder = tfds.builder('cifar100', data_dir=sys.argv[1], file_format='tfrecord')\n"
            "_accept_any_archive(builder, pathlib.Path(sys.argv[2]))\n"
            "builder.download_and_prepare(\n"
            "    download_config=tfds.download.DownloadConfig(manual_dir=sys.argv[2]))\n"
        )
        arguments = [str(tmp_path), str(root / "archives")]
        subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
        with pytest.raises(UserError, match=r"tfrecord format.*prepare_data cifar100"):
            open_splits(data_config(tmp_path, "cifar100"))
        # the file of one split is damaged; the other's is converted, and not once more afterwards
        (test,) = tmp_path.rglob("*-test.tfrecord-*")
        whole = test.read_bytes()
        test.write_bytes(whole[:-100])
        done = run_tool("cifar100", "--data-dir", tmp_path, "--sample")
        assert done.returncode == 2 and f"error: cannot read {test}: " in done.stderr
        assert not list(tmp_path.rglob("*-test.array_record-*[0-9]"))
        (train,) = tmp_path.rglob("*-train.array_record-*")
        written = train.stat().st_mtime_ns
        test.write_bytes(whole)
        done = run_tool("cifar100", "--data-dir", tmp_path, "--sample")
        assert done.returncode == 0, done.stderr[-2000:]
        assert train.stat().st_mtime_ns == written
        assert list(tmp_path.rglob("*.tfrecord-*")) and list(tmp_path.rglob("*.array_record-*"))
        converted, _ = open_splits(data_config(tmp_path, "cifar100"))
        original, _ = open_splits(data_config(root, "cifar100"))
        np.testing.assert_array_equal(converted.images, original.images)
        np.testing.assert_array_equal(converted.labels, original.labels)


@needs_tensorflow
class TestDamaged:
    def test_the_advice_helps(self, build):
        """A folder of a version without its description made TFDS believe that all is there."""
        root = build.parent.parent
        (build / "dataset_info.json").unlink()
        write_cifar100_to(root / "archives")
        done = run_tool("cifar100", "--data-dir", root, "--sample")
        assert done.returncode == 0, done.stderr[-2000:]
        assert f"removing {build}" in done.stderr

    def test_a_damaged_description_does_not_stop_the_tool_with_a_traceback(self, build):
        (build / "dataset_info.json").write_text("{")
        done = run_tool("cifar100", "--data-dir", build.parent.parent)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"{build} cannot be read as a TFDS build" in done.stderr


def test_what_is_missing_is_said_with_names_places_and_sizes(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["imagenet2012", "--data-dir", str(tmp_path), "--check"])
    (line,) = capsys.readouterr().err.splitlines()
    archive = tmp_path / "archives" / "ILSVRC2012_img_train.tar"
    assert f"{archive} is missing (147897477120 bytes)" in line
    archive.parent.mkdir()
    archive.write_bytes(b"123")
    with pytest.raises(SystemExit) as exit_:
        main(["imagenet2012", "--data-dir", str(tmp_path)])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{archive} has 3 bytes instead of 147897477120" in line
    assert "ILSVRC2012_img_val.tar is missing (6744924160 bytes); from https://image-net" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar11", "--data-dir", "D"], r"unknown data set 'cifar11' \(did you mean 'cifar10"),
        (["cifar10"], "--data-dir"),
        (["cifar10", "--data-dir", "D", "more"], "more"),
        (["cifar10", "--data-dir", __file__], "cannot be used"),
    ],
)
def test_a_wrong_command_line_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_the_home_directory_is_found_where_no_shell_expands_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(SystemExit):
        main(["cifar10", "--data-dir=~/data", "--check"])
    assert f"{tmp_path}/data/cifar10 has no prepared version" in capsys.readouterr().err


def test_what_the_tool_prepares_is_what_errors_advise():
    assert set(DATA_SETS) == set(PREPARABLE)
    assert "prepare_data svhn" not in how_to_prepare("svhn_cropped", "D")


def test_without_tensorflow_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["cifar10", "--data-dir", str(tmp_path)])
    assert "pip install 'mimicnorm-jax[prepare]'" in capsys.readouterr().err
