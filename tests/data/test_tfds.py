"""TFDS builds that are whole, damaged or not there, read without TensorFlow."""

import json
import re
import shutil

import pytest

from mimicnorm_jax.data.sources import View
from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.data.tfds import TFDSSource, allow_open_files, build_directory, open_build
from mimicnorm_jax.errors import UserError
from mimicnorm_jax.tools.prepare_data.check import check
from tests.archives import (
    TEST,
    TRAIN,
    data_config,
    needs_tensorflow,
)

OWN = "tensorflow_datasets.core.features.features_dict.FeaturesDict"


@needs_tensorflow
class TestDamaged:
    def refused(self, build):
        with pytest.raises(UserError) as caught:
            check("cifar100", build.parent.parent, sample=True)
        message = str(caught.value)
        assert "\n" not in message
        assert "prepare_data cifar100 --data-dir" in message
        return message

    def test_a_missing_shard(self, build):
        (shard,) = build.glob("*train*")
        shard.unlink()
        assert f"{shard} is missing" in self.refused(build)

    @pytest.mark.parametrize("left", [0, 0.5])
    def test_a_truncated_shard(self, build, left):
        (shard,) = build.glob("*train*")
        content = shard.read_bytes()
        shard.write_bytes(content[: int(left * len(content))])
        assert f"{shard}" in self.refused(build)

    def test_a_shard_of_another_split(self, build):
        (train,), (test,) = build.glob("*train*"), build.glob("*test*")
        train.write_bytes(test.read_bytes())
        assert f"{train} has {TEST} records instead of {TRAIN}" in self.refused(build)

    def test_a_build_that_was_not_finished(self, build):
        (build / "dataset_info.json").unlink()
        assert f"{build} was not finished" in self.refused(build)
        build.rename(build.with_name("incomplete.XYZ_3.0.2"))
        assert "was not finished" in self.refused(build)

    def test_a_damaged_description(self, build):
        (build / "dataset_info.json").write_text("{")
        with pytest.raises(UserError, match="cannot be read as a TFDS build"):
            open_build(build)

    def test_a_damaged_record_is_named(self, build):
        (shard,) = build.glob("*train*")
        content = bytearray(shard.read_bytes())
        middle = len(content) // 2
        content[middle : middle + 20_000] = bytes(20_000)
        shard.write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_splits(data_config(build.parent.parent, "cifar100"))
        assert re.match(rf"cannot read {shard} record \d+: ", str(caught.value))
        assert "\n" not in str(caught.value)

    def test_records_of_slices_are_named_rightly(self, build):
        view = View(size=32, resize=32, upright=True)
        whole = {split: TFDSSource(open_build(build), split, view) for split in ("train", "test")}
        both = TFDSSource(open_build(build), "train[10:20]+test", view)
        for index, split, record in ((0, "train", 10), (9, "train", 19), (10, "test", 0)):
            assert both.describe(index).endswith(f"record {record}")
            assert f"cifar100-{split}." in both.describe(index)
            assert both.read(index) == whole[split].read(record)
        parts = [TFDSSource(open_build(build), f"train[:{n}]", view) for n in (20, 40)]
        assert parts[0].identity != parts[1].identity

    def test_an_empty_split_is_refused(self, build):
        view = View(size=32, resize=32, upright=True)
        for split in ("train[:0]", "train[60:50]"):
            with pytest.raises(UserError, match="has no examples"):
                TFDSSource(open_build(build), split, view)

    def test_labels_have_to_be_classes(self, build):
        features = json.loads((build / "features.json").read_text())
        content = features["featuresDict"]["features"]
        content["label"] = content["id"]
        (build / "features.json").write_text(json.dumps(features))
        with pytest.raises(UserError, match="no label of type ClassLabel"):
            TFDSSource(open_build(build), "train", View(size=32, resize=32, upright=True))

    def test_several_configurations_need_a_choice(self, build):
        root = build.parent.parent
        for config in ("small", "large"):
            shutil.copytree(build, root / "other" / config / "1.0.0")
        with pytest.raises(UserError, match=r"say which: \['other/large', 'other/small'\]"):
            build_directory(root, "other")
        assert build_directory(root, "other/small") == root / "other" / "small" / "1.0.0"
        shutil.copytree(build, root / "other" / "small" / "1.0.10")
        shutil.copytree(build, root / "other" / "small" / "1.0.9")
        assert build_directory(root, "other/small").name == "1.0.10"

    def test_a_split_that_does_not_exist(self, build):
        view = View(size=32, resize=32, upright=True)
        with pytest.raises(UserError, match=r"'val'.*allowed: .*train"):
            TFDSSource(open_build(build), "val", view)
        assert len(TFDSSource(open_build(build), "train[:10%]", view)) == TRAIN // 10


def test_as_many_files_may_be_open_as_there_are_shards(monkeypatch):
    """ImageNet has 1,024 shards, the usual limit; each that was read stays open."""
    resource = pytest.importorskip("resource")
    limits = {}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, values: limits.update({kind: values}))
    allow_open_files(700)
    assert not limits
    allow_open_files(1088)
    assert limits == {resource.RLIMIT_NOFILE: (1344, 4096)}
    with pytest.raises(UserError, match="allows 4096; raise that: ulimit -n 5256"):
        allow_open_files(5000)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tfds_name": ""}, "tfds_name is not set"),
        ({"dir": ""}, r"config\.data\.dir is not set.*prepare_data cifar100 --data-dir DIR"),
        ({"dir": "gs://bucket/data"}, "mount remote storage"),
        ({"dir": "/nowhere"}, "no prepared version.*prepare_data cifar100 --data-dir /nowhere"),
    ],
)
def test_a_build_that_is_not_there(values, message):
    with pytest.raises(UserError, match=message):
        open_splits(data_config("D", "cifar100", **values))


@pytest.mark.parametrize("below", ["cifar100", "cifar100/3.0.2", "cifar100/small/3.0.2"])
def test_a_folder_too_deep_is_hinted_at(below, tmp_path):
    version = tmp_path / below
    if version.name == "cifar100":
        version /= "3.0.2"
    version.mkdir(parents=True)
    (version / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=rf"is too deep: .*: --config\.data\.dir={tmp_path}$"):
        build_directory(tmp_path / below, "cifar100")


class TestForeignCode:
    """TFDS imports the modules of the classes that a description names."""

    def description(self, name, key="pythonClassName"):
        return {"featuresDict": {"features": {"image": {key: name}}}, "pythonClassName": OWN}

    @pytest.mark.parametrize("key", ["pythonClassName", "python_class_name", "type"])
    def test_is_not_imported(self, tmp_path, key):
        path = tmp_path / "features.json"
        path.write_text(json.dumps(self.description("tests.data.never_imported.Feature", key)))
        with pytest.raises(UserError, match=r"names 'tests\.data\.never_imported\.Feature'"):
            open_build(tmp_path)
        path.write_text(json.dumps([self.description(OWN, key)]))
        with pytest.raises(UserError, match="cannot be read as a TFDS build"):
            open_build(tmp_path)
