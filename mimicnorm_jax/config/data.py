"""Fields of the data: which images, how they are read and augmented."""

from __future__ import annotations

import math

from mimicnorm_jax.config.field import Field, at_least, colour, each, pair, true_or_false

DATA_SETS = ("digits", "folder", "idx", "synthetic", "tfds", "webdataset")
GENERATED = ("digits", "synthetic")  # which read no files
ENCODED = ("folder", "tfds", "webdataset")  # whose images are files, or parts of files

FIELDS: dict[str, Field] = {
    "data.name": Field("digits", "The data set: scikit-learn's handwritten digits, images in class folders, MNIST's own files, random images with random labels, a TFDS build, or tar files as WebDataset writes them.", DATA_SETS),
    "data.dir": Field("", "folder: the directory with <split>/<class>/*.jpg; tfds: that of prepare_data; idx: that of train-images-idx3-ubyte.gz and its like; webdataset: that of the .tar files, or one of these."),
    "data.tfds_name": Field("", "tfds: name of the data set, such as cifar100."),
    "data.labels_file": Field("", "folder: a CSV file in data.dir with the columns path and label, and maybe split, for images that are in no class folders."),
    "data.train_split": Field("train", "Name of the training split or its folder."),
    "data.test_split": Field("test", "Name of the test split or its folder; folder, tfds, webdataset: empty where there is none, which takes data.holdout."),
    "data.holdout": Field(0.0, "Share of the training images of each class that is not trained on: these choose the best checkpoint, in place of the test images, and the temperature of the probabilities.", **at_least(0, 0.5)),
    "data.image_size": Field(32, "Height and width of the images in pixels; others are resized.", **at_least(1, 8192)),
    "data.resize": Field(None, "folder, tfds, webdataset: short side of an image before its centre is cropped to image_size (unset: image_size).", **at_least(1, 8192), kind=int),
    "data.upright": Field(True, "folder, tfds, webdataset: turn images as their EXIF orientation says, which published ImageNet results do not.", **true_or_false()),
    "data.background": Field((255, 255, 255), "folder, tfds, webdataset: colour behind transparent images: red, green, blue.", **colour()),
    "data.random_resized_crop": Field(False, "folder, tfds, webdataset: train on crops of random size and shape, resized to image_size.", **true_or_false()),
    "data.crop_scale": Field((0.08, 1.0), "Least and greatest share of the area in such a crop.", **pair(0, 1)),
    "data.crop_ratio": Field((3 / 4, 4 / 3), "Least and greatest ratio of its width to its height.", **pair(0, 100)),
    "data.threads": Field(None, "folder, tfds, webdataset: decoding threads in each process (unset: one a core).", **at_least(1, 1024), kind=int),
    "data.processes": Field(0, "folder, tfds, webdataset: worker processes that decode; 0 decodes in the threads of the training process.", **at_least(0, 1024)),
    "data.cache_gib": Field(2.0, "folder, tfds, webdataset: decode a split once and keep it in memory if it takes at most this many GiB.", **at_least(0)),
    "data.mean": Field((), "Channel means for normalization, in units of 1; empty: measured on the training set.", **each("numbers in [0, 1], one a channel", lambda x: 0 <= x <= 1)),
    "data.std": Field((), "Channel standard deviations, likewise.", **each("positive numbers, one a channel", lambda x: 0 < x < math.inf)),
    "data.pad_crop": Field(0, "Zero pixels padded on each side before a random crop back to size.", **at_least(0)),
    "data.rotation": Field(0.0, "Random rotation by up to this many degrees either way, with zeros outside; the authors' code has 15 for CIFAR.", **at_least(0, 180)),
    "data.flip": Field(False, "Random horizontal flip.", **true_or_false()),
    "data.num_classes": Field(10, "synthetic: number of classes.", **at_least(2)),
    "data.num_examples": Field(1024, "synthetic: examples in the training split; the test split has a quarter.", **at_least(4)),
}  # fmt: skip
