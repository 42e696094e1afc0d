import io
import os
import pathlib
import shutil

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from mimicnorm_jax.config import default_config
from mimicnorm_jax.data.folder import FolderSource
from mimicnorm_jax.data.sources import View, cache, channel_statistics
from mimicnorm_jax.data.splits import open_splits
from mimicnorm_jax.errors import UserError

PHOTO = (pathlib.Path(sklearn.datasets.__file__).parent / "images" / "china.jpg").read_bytes()
VIEW = View(size=8, resize=8, upright=True)


@pytest.fixture
def folder(tmp_path):
    """Two classes in two splits, three images each, of several shapes and kinds."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(("cat", "dog")):
            directory = tmp_path / split / name
            directory.mkdir(parents=True)
            for index, shape in enumerate(((8, 8, 3), (16, 8, 3), (8, 8))):
                pixels = generator.integers(0, 100, shape, np.uint8) + 100 * label
                suffix = ("png", "JPEG", "jpg")[index]
                Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{index}.{suffix}")
    return tmp_path


def paths_of(source):
    return [source.path(index) for index in range(len(source))]


def index_of(source, path):
    return paths_of(source).index(path)


def data_config(**values):
    data = default_config().data
    data.update(values)
    return data


def test_digits_are_split_in_strata_once_and_for_all():
    train, test = open_splits(data_config(name="digits", image_size=8))
    assert (len(train), len(test)) == (1437, 360)
    assert train.image_shape == (8, 8, 1) and train.images.dtype == np.uint8
    assert train.class_names == [str(d) for d in range(10)]
    counts = np.bincount(test.labels)
    assert counts.min() >= 35 and counts.max() <= 37
    seen = {image.tobytes() for image in train.images}
    assert not seen & {image.tobytes() for image in test.images}
    # the split must not move between versions: every published accuracy hangs on it
    assert int(test.images.sum()) == 1_790_819


def test_digits_are_resized():
    train, _ = open_splits(data_config(name="digits", image_size=32))
    assert train.image_shape == (32, 32, 1)
    assert train.images.max() > 200


def test_folder_yields_rgb_squares_with_the_labels_of_sorted_classes(folder):
    source = FolderSource(folder / "train", VIEW)
    assert len(source) == 6 and source.class_names == ["cat", "dog"]
    for index in range(6):
        image, label = source[index]
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8
        assert label == index // 3
        assert (image.mean() > 100) == (label == 1)


def test_an_image_of_the_right_size_is_not_resampled(folder):
    source = FolderSource(folder / "train", VIEW)
    path = folder / "train" / "cat" / "0.png"
    image, _ = source[index_of(source, path)]
    np.testing.assert_array_equal(image, np.asarray(Image.open(path)))


def test_a_long_side_is_cropped_at_the_centre(folder):
    path = folder / "train" / "cat" / "1.JPEG"
    tall = np.zeros((24, 8, 3), np.uint8)
    tall[8:16] = 200
    Image.fromarray(tall).save(path, quality=100)
    source = FolderSource(folder / "train", VIEW)
    assert source[index_of(source, path)][0].min() > 150


def as_png(folder, image, **options):
    path = folder / "train" / "cat" / "0.png"
    image.save(path, **options)
    source = FolderSource(folder / "train", VIEW)
    return source[index_of(source, path)][0]


def test_16_bit_images_keep_their_scale(folder):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    got = as_png(folder, Image.fromarray(ramp))
    np.testing.assert_allclose(got[..., 0], ramp / 257, atol=1)


def test_transparent_palettes_and_cmyk_become_rgb(folder):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    got = as_png(folder, red.convert("P", palette=Image.Palette.ADAPTIVE), transparency=b"\x80")
    np.testing.assert_array_equal(got[0, 0], (255, 127, 127))  # half of it on white
    path = folder / "train" / "dog" / "2.jpg"
    red.convert("CMYK").save(path)
    source = FolderSource(folder / "train", VIEW)
    np.testing.assert_allclose(source[index_of(source, path)][0][0, 0], (255, 0, 0), atol=3)


def test_photos_are_turned_upright(folder):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 200  # the upper half is bright
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    got = as_png(folder, Image.fromarray(pixels), exif=exif)
    assert got[:4].max() == 0 and got[4:].min() == 200


def test_the_identity_is_that_of_the_examples_and_not_of_their_place(folder, tmp_path):
    def identity(root, **values):
        return open_splits(data_config(name="folder", dir=str(root), **values))[0].identity

    before = identity(folder)
    assert identity(folder, cache_gib=0.0) == before
    moved = tmp_path / "moved"
    shutil.copytree(folder / "train", moved / "train")
    shutil.copytree(folder / "test", moved / "test")
    assert identity(moved) == before
    path = moved / "train" / "cat" / "2.jpg"
    path.rename(path.with_name("3.jpg"))
    renamed = identity(moved)
    path.with_name("3.jpg").write_bytes((moved / "train" / "dog" / "1.JPEG").read_bytes())
    assert len({before, renamed, identity(moved)}) == 3
    for path in moved.rglob("*.*"):
        os.utime(path, (1, 1))
    assert identity(moved) == identity(moved, cache_gib=0.0) != before


def test_inverted_images_of_the_same_size_are_others(folder):
    for cat in (folder / "train" / "cat").glob("*.png"):
        pixels = np.asarray(Image.open(cat))
        Image.fromarray(pixels).save(cat.with_suffix(".bmp"))
        cat.unlink()
    source = FolderSource(folder / "train", VIEW)
    before = source.identity
    path = folder / "train" / "cat" / "0.bmp"
    size = path.stat().st_size
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    after = FolderSource(folder / "train", VIEW)
    assert path.stat().st_size == size and paths_of(source) == paths_of(after)
    assert before != after.identity

    digits = [open_splits(data_config(name="digits", image_size=8)) for _ in range(2)]
    assert digits[0][0].identity == digits[1][0].identity != digits[0][1].identity


def test_caching_changes_nothing_but_the_speed(folder):
    lazy = open_splits(data_config(name="folder", dir=str(folder), image_size=8, cache_gib=0.0))[0]
    cached = open_splits(data_config(name="folder", dir=str(folder), image_size=8))[0]
    assert isinstance(lazy, FolderSource) and not isinstance(cached, FolderSource)
    for index in range(len(lazy)):
        np.testing.assert_array_equal(lazy[index][0], cached[index][0])
        assert lazy[index][1] == cached[index][1]
    for got, expected in zip(channel_statistics(lazy), channel_statistics(cached), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_channel_statistics_of_photographs_are_measured_on_a_part_of_their_size(folder):
    photo = Image.open(io.BytesIO(PHOTO)).resize((640, 427))
    for index in range(3):
        photo.rotate(30 * index).save(folder / "train" / "cat" / f"9{index}.jpg", quality=95)
    source = FolderSource(folder / "train", VIEW)
    exact = channel_statistics(cache(source, description=""))
    for got, expected in zip(channel_statistics(source), exact, strict=True):
        np.testing.assert_allclose(got, expected, atol=2e-3)


def test_channel_statistics_are_those_of_the_pixels():
    train, _ = open_splits(data_config(name="digits", image_size=8))
    mean, std = channel_statistics(train)
    np.testing.assert_allclose(mean, [np.mean(train.images / 255.0)], rtol=1e-9)
    np.testing.assert_allclose(std, [np.std(train.images / 255.0)], rtol=1e-9)


def test_synthetic_says_loudly_that_its_labels_are_random(capsys):
    train, test = open_splits(data_config(name="synthetic", num_examples=40, image_size=8))
    assert (len(train), len(test)) == (40, 10)
    assert "LABELS ARE RANDOM" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [b"", b"not an image", pytest.param("truncated", id="truncated")],
)
@pytest.mark.parametrize("cached", [True, False])
def test_a_damaged_image_is_named(folder, content, cached):
    victim = folder / "train" / "dog" / "1.JPEG"
    victim.write_bytes(victim.read_bytes()[:200] if content == "truncated" else content)
    source = FolderSource(folder / "train", VIEW)
    with pytest.raises(UserError, match=r"cannot read image .*dog/1\.JPEG"):
        cache(source, description="") if cached else source[index_of(source, victim)]


def test_wrong_folders_are_named(folder):
    with pytest.raises(UserError, match="is not a folder"):
        open_splits(data_config(name="folder", dir=str(folder / "nowhere")))
    with pytest.raises(UserError, match="has no folder others; to test on a tenth"):
        open_splits(data_config(name="folder", dir=str(folder), test_split="others"))
    (folder / "test" / "emu").mkdir()
    with pytest.raises(UserError, match="emu has no images"):
        open_splits(data_config(name="folder", dir=str(folder)))
    Image.new("RGB", (8, 8)).save(folder / "test" / "emu" / "0.png")
    with pytest.raises(UserError, match="differ: emu"):
        open_splits(data_config(name="folder", dir=str(folder)))
    (folder / "one" / "cat").mkdir(parents=True)
    with pytest.raises(UserError, match="a single class, cat"):
        open_splits(data_config(name="folder", dir=str(folder), train_split="one"))
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        open_splits(data_config(name="folder", dir="x" * 300))
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        open_splits(data_config(name="folder", dir=str(folder), train_split="empty"))


def test_hidden_files_are_neither_classes_nor_images(folder):
    before = FolderSource(folder / "train", VIEW)
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "cat" / "._0.png").write_bytes(b"of a file manager")
    after = FolderSource(folder / "train", VIEW)
    assert after.class_names == before.class_names and paths_of(after) == paths_of(before)


def test_any_name_that_the_system_allows_has_an_identity(folder):
    os.rename(folder / "train" / "cat" / "0.png", os.fsencode(folder) + b"/train/cat/\xff.png")
    assert len(FolderSource(folder / "train", VIEW).identity) == 66


def test_an_image_that_went_away_is_named(folder):
    source = FolderSource(folder / "train", VIEW)
    (folder / "train" / "cat" / "0.png").unlink()
    with pytest.raises(UserError, match=r"cannot read image .*cat/0\.png: No such file"):
        source[0]
    with pytest.raises(UserError, match="cannot read the images in"):
        _ = source.identity
