"""Small archives in the formats of the published ones, and how they are prepared."""

import importlib.util
import io
import os
import pathlib
import tarfile

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from mimicnorm_jax.config import default_config, validate
from tests import forkserver

TRAIN, TEST = 150, 40  # examples of the fake CIFAR-100
SYNSETS = ("n01440764", "n01443537", "n04486054")  # three of ImageNet's classes
PER_SYNSET, VALIDATION = 4, 6

TENSORFLOW = importlib.util.find_spec("tensorflow") is not None
needs_tensorflow = pytest.mark.skipif(
    not TENSORFLOW,
    reason="NOT TESTED: preparing data sets needs the extra prepare (TensorFlow)",
)


def write_cifar100_to(folder):
    folder.mkdir()
    write_cifar100(folder / "cifar-100-binary.tar.gz")


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def cifar100_pixels(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 3, 32, 32), np.uint8)


def write_cifar100(path):
    """Of each example a coarse label, a fine label, and 3 x 1024 bytes."""

    def records(count, seed):
        pixels = cifar100_pixels(count, seed)
        return b"".join(bytes((i % 20, i % 100)) + pixels[i].tobytes() for i in range(count))

    with tarfile.open(path, "w:gz") as archive:
        for name, content in (
            ("train.bin", records(TRAIN, 0)),
            ("test.bin", records(TEST, 1)),
            ("coarse_label_names.txt", "\n".join(f"coarse{i}" for i in range(20)).encode()),
            ("fine_label_names.txt", "\n".join(f"fine{i}" for i in range(100)).encode()),
        ):
            add(archive, f"cifar-100-binary/{name}", content)


def photographs():
    """JPEGs cut from two photographs, none like another, one of them grey."""
    folder = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    index = 0
    while True:
        with Image.open(sorted(folder.glob("*.jpg"))[index % 2]) as image:
            left = 20 * index
            part = image.crop((left, 10 * index, left + 200 + 7 * index, 10 * index + 150))
        file = io.BytesIO()
        (part.convert("L") if index == 3 else part).save(file, "jpeg")
        yield file.getvalue()
        index += 1


def write_imagenet(directory):
    """Of each class an archive in the training archive; the validation images in one."""
    photos = photographs()
    with tarfile.open(directory / "ILSVRC2012_img_train.tar", "w") as archive:
        for synset in SYNSETS:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as of_synset:
                for index in range(PER_SYNSET):
                    add(of_synset, f"{synset}_{index}.JPEG", next(photos))
            add(archive, f"{synset}.tar", inner.getvalue())
    with tarfile.open(directory / "ILSVRC2012_img_val.tar", "w") as archive:
        for index in range(VALIDATION):
            add(archive, f"ILSVRC2012_val_{index + 1:08d}.JPEG", next(photos))


def run_tool(*arguments):
    writes = "--check" not in arguments and TENSORFLOW
    modules = ("tensorflow", "tensorflow_datasets", "sklearn.datasets") if writes else ()
    return forkserver.run(
        "mimicnorm_jax.tools.prepare_data",
        arguments,
        env=os.environ,
        modules=modules or forkserver.PRELOADED,
    )


def data_config(root, name, **values):
    config = default_config()
    config.data.update({"name": "tfds", "tfds_name": name, "dir": str(root)} | values)
    validate(config)
    return config.data


def write_folders(archive, prefix="", *, classes=3, train=16, test=4):
    """A ``.tar.xz`` of noise as JPEG files of 32 pixels in ``prefix{train,test}/<class>/``."""
    generator = np.random.default_rng(0)
    with tarfile.open(archive, "w:xz") as tar:
        for split, count in (("train", train), ("test", test)):
            for label in range(classes):
                for number in range(count):
                    file = io.BytesIO()
                    pixels = generator.integers(0, 256, (32, 32, 3), np.uint8)
                    Image.fromarray(pixels).save(file, "jpeg")
                    info = tarfile.TarInfo(f"{prefix}{split}/class{label}/{number:04}.jpg")
                    info.size = file.tell()
                    file.seek(0)
                    tar.addfile(info, file)
