"""Small data sets in the formats that people have: the same images in each."""

import gzip
import io
import json
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image

from mimicnorm_jax.tools.prepare_data.build import import_images

CLASSES = ("ant", "bee", "cat")
PER_CLASS = {"train": 4, "test": 2}
HUGGING_FACE = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASSES}}


def encoded(split, label, index):
    """A PNG of 8 pixels that is none of the others."""
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[...] = (50 * label, 10 * index, 200 if split == "train" else 100)
    pixels[0, 0] = 255
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def examples(split):
    """Image, label and file name, not in the order of the classes."""
    found = [
        (encoded(split, label, index), label, f"{split}{label}_{index}")
        for index in range(PER_CLASS[split])
        for label in range(len(CLASSES))
    ]
    return found[::-1]


def in_order(split):
    """Images and labels as every import has them."""
    found = sorted(examples(split), key=lambda example: (example[1], example[2]))
    return [(data, label) for data, label, _ in found]


def write_folder(root, splits=("train", "test")):
    for split in splits:
        for data, label, name in examples(split):
            path = root / split / CLASSES[label] / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    return root


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_tars(root, label="cls"):
    """Two files a split; of labels ``cls`` or ``json``, or the images in folders of classes."""
    for split in PER_CLASS:
        found = examples(split)
        for number, part in enumerate((found[::2], found[1::2])):
            members = []
            for data, number_of_class, name in part:
                if label == "folders":
                    members.append((f"./{split}/{CLASSES[number_of_class]}/{name}.png", data))
                    continue
                told = {"cls": str(number_of_class), "json": json.dumps({"label": number_of_class})}
                members += [(f"{name}.{label}", told[label].encode()), (f"{name}.png", data)]
            write_tar(root / f"bugs-{split}-{number:03}.tar", members)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    return root


def write_parquet_file(path, rows, features=None, names=("image", "label")):
    """Rows of image bytes (or None), label and path."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": data, "path": name} for data, _, name in rows]
    labels = pa.array([label for _, label, _ in rows])
    table = pa.table({names[0]: pa.array(images, kind), names[1]: labels})
    told = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.replace_schema_metadata(told), path, row_group_size=3)


def write_parquet(root):
    for split in PER_CLASS:
        found = [(data, label, f"{name}.png") for data, label, name in examples(split)]
        for number, part in enumerate((found[::2], found[1::2])):
            path = root / "data" / f"{split}-{number:05}-of-00002.parquet"
            write_parquet_file(path, part, HUGGING_FACE)
    return root


def pixels_of(count, shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def cifar(count, classes, seed):
    """Pixels as CIFAR's files have them, and labels."""
    return pixels_of(count, (3072,), seed), [(7 * index) % classes for index in range(count)]


def write_cifar10(root, *, is_binary):
    root.mkdir(parents=True)
    names = [f"kind{index}" for index in range(10)]
    for seed, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        pixels, labels = cifar(6, 10, seed)
        if is_binary:
            rows = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], 1)
            (root / f"{name}.bin").write_bytes(rows.tobytes())
        else:
            batch = {"batch_label": name, "labels": labels, "data": pixels, "filenames": ["a"] * 6}
            (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    if is_binary:
        (root / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    else:
        (root / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol=2))
    return root


def write_cifar100(root, *, is_binary):
    root.mkdir(parents=True)
    names = {"fine": [f"f{index}" for index in range(100)], "coarse": list("abcdefghijklmnopqrst")}
    for seed, name in enumerate(("train", "test")):
        pixels, labels = cifar(8, 100, seed)
        coarse = [label // 5 for label in labels]
        if is_binary:
            both = np.array([coarse, labels], np.uint8).T
            (root / f"{name}.bin").write_bytes(np.concatenate([both, pixels], 1).tobytes())
        else:
            batch = {"fine_labels": labels, "coarse_labels": coarse, "data": pixels}
            (root / name).write_bytes(pickle.dumps(batch, protocol=2))
    if is_binary:
        for kind, listed in names.items():
            (root / f"{kind}_label_names.txt").write_text("\n".join(listed))
    else:
        meta = {f"{kind}_label_names": listed for kind, listed in names.items()}
        (root / "meta").write_bytes(pickle.dumps(meta, protocol=2))
    return root


def write_idx(root, prefix, images, labels):
    root.mkdir(parents=True, exist_ok=True)
    header = bytes((0, 0, 8, 3)) + np.array(images.shape, ">u4").tobytes()
    name = root / f"{prefix}-images-idx3-ubyte.gz"
    name.write_bytes(gzip.compress(header + images.tobytes()))
    header = bytes((0, 0, 8, 1)) + np.array(labels.shape, ">u4").tobytes()
    name = root / f"{prefix}-labels-idx1-ubyte.gz"
    name.write_bytes(gzip.compress(header + labels.astype(np.uint8).tobytes()))


def imported(source, root, **options):
    import_images(source, root / "data", name="bugs", **options)
    return root / "data" / "bugs" / "1.0.0"


def examples_of(build, split):
    """Encoded images, labels and file names, as TFDS reads them."""
    builder = tfds.builder_from_directory(build)
    read = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    found = [read[index] for index in range(len(read))]
    return [(each["image"], int(each["label"])) for each in found]


def classes_of(build):
    return tuple(tfds.builder_from_directory(build).info.features["label"].names)
