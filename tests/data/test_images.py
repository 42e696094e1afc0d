"""Decoding, cropping and resizing, against Pillow, and every kind of bad file."""

import io
import pathlib
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import simplejpeg
import sklearn.datasets
from PIL import Image

from mimicnorm_jax.data import images, pillow
from mimicnorm_jax.data.images import (
    Crop,
    centre_crop,
    decode,
    decode_crop,
)

DECODING_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
PHOTOS = sorted((pathlib.Path(sklearn.datasets.__file__).parent / "images").glob("*.jpg"))
CROPS = [  # of 427 x 640 pixels: at the edges, aligned with blocks and not, tiny, all
    Crop(0, 0, 427, 640),
    Crop(0, 0, 64, 64),
    Crop(63, 17, 1, 3),
    Crop(31, 5, 33, 90),
    Crop(100, 101, 160, 200),
    Crop(326, 539, 101, 101),
    Crop(426, 639, 1, 1),
]


@pytest.fixture(params=PHOTOS, ids=lambda path: path.stem)
def photo(request):
    return request.param.read_bytes()


def saved(image, kind="jpeg", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_pillow(data, mode="RGB"):
    return np.asarray(Image.open(io.BytesIO(data)).convert(mode))


def difference(got, expected):
    return np.abs(got.astype(int) - expected.astype(int)).mean()


def crop_of(image, crop):
    return image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]


def torchvision_centre(image, size, resize):
    """``Resize(resize)`` and ``CenterCrop(size)`` of torchvision, for Pillow images."""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    other = int(resize * long / short)
    resized = image.resize(
        (resize, other) if width <= height else (other, resize), Image.Resampling.BILINEAR
    )
    left, top = (round((side - size) / 2.0) for side in resized.size)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize(("size", "resize"), [(224, 256), (32, 32), (128, 400)])
def test_the_centre_is_that_of_torchvision(photo, size, resize):
    for image in (photo, saved(Image.open(io.BytesIO(photo)).rotate(90, expand=True))):
        expected = torchvision_centre(Image.open(io.BytesIO(image)).convert("RGB"), size, resize)
        got = centre_crop(decode(image, upright=False), size, resize)
        assert got.shape == (size, size, 3) and got.dtype == np.uint8
        assert difference(got, expected) < 0.5


JPEGS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "optimized": {"optimize": True, "quality": 97},
}


@pytest.mark.parametrize("kind", [*JPEGS, "grey"])
@pytest.mark.parametrize("crop", CROPS)
def test_what_is_decoded_of_a_photo_is_exactly_the_crop(kind, crop):
    """The rows below it are never read, which must not show."""
    image = Image.open(PHOTOS[0])
    data = saved(image.convert("L")) if kind == "grey" else saved(image, **JPEGS[kind])
    size = 512  # more than half of any side: no scaling by the decoder
    asked = []

    def choose(height, width):
        asked.append((height, width))
        return crop

    got = decode_crop(data, choose, size, upright=False)
    assert asked == [(427, 640)]
    whole = simplejpeg.decode_jpeg(data, "RGB", fastdct=True)
    expected = cv2.resize(crop_of(whole, crop), (size, size), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(got, expected)
    assert difference(whole, with_pillow(data)) < 1.5


def test_a_large_crop_is_decoded_at_a_fraction_of_its_size(photo):
    crop = Crop(8, 48, 416, 448)  # of whole blocks; others move by a pixel of the file
    for size in (100, 50, 24):
        got = decode_crop(photo, lambda height, width: crop, size, upright=False)
        part = crop_of(with_pillow(photo), crop)
        expected = np.asarray(Image.fromarray(part).resize((size, size), Image.Resampling.BOX))
        skipping = cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)
        assert difference(got, expected) < 0.9 * difference(skipping, expected)
        for axis in (0, 1):
            for shift in (-1, 1):
                shifted = np.roll(expected, shift, axis)
                assert difference(got, expected) < 0.6 * difference(got, shifted)


def test_other_formats_are_cropped_alike(photo):
    crop = Crop(100, 101, 300, 260)
    png = saved(Image.fromarray(decode(photo, upright=False)), "png")
    of_png, of_jpeg = (
        decode_crop(data, lambda height, width: crop, 224, upright=False) for data in (png, photo)
    )
    assert difference(of_png, of_jpeg) < 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed_or_ignored(photo, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(Image.open(io.BytesIO(photo)), exif=exif, quality=95)
    stored = with_pillow(data)
    turned = {
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored[::-1].transpose(1, 0, 2),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: stored[:, ::-1].transpose(1, 0, 2),
    }.get(orientation, stored)
    np.testing.assert_array_equal(decode(data, upright=False), stored)
    np.testing.assert_array_equal(decode(data, upright=True), turned)
    crop = Crop(20, 30, 224, 224)
    got = decode_crop(data, lambda height, width: crop, 224, upright=True)
    assert difference(got, crop_of(turned, crop)) < 1.5


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about those data
def test_damaged_exif_data_turn_nothing(photo):
    """Found by fuzzing: a tag of the wrong type, where the orientation is one that turns."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.open(io.BytesIO(photo)), exif=exif)
    at = data.index(b"Exif\0\0") + 6
    for offset in range(26):  # the header and the only entry
        for value in (0, 2, 255):
            damaged = bytearray(data)
            damaged[at + offset] = value
            for image in (
                decode(bytes(damaged), upright=True),
                decode_crop(bytes(damaged), lambda h, w: Crop(0, 0, 8, 8), 8, upright=True),
            ):
                assert image.shape[2] == 3


NARROW_MARGINS = [(Crop(1, 43, 382, 237), 59), (Crop(1, 13, 93, 403), 5)]  # a row was lost here


def random_crops(height, width):
    generator = np.random.default_rng(0)
    for _ in range(60):
        h, w = generator.integers(64, [height + 1, width + 1]).tolist()
        top, left = generator.integers(0, [height - h + 1, width - w + 1]).tolist()
        yield Crop(top, left, h, w), min(h, w) // int(generator.choice([2, 4, 8]))


@pytest.mark.parametrize("kind", [*JPEGS, "rotated 4:2:2"])
def test_scaled_crops_have_all_their_rows(kind):
    """As the decoder's rows are fewer and larger, so is the margin below the crop."""
    image = Image.open(PHOTOS[0])
    if kind == "rotated 4:2:2":
        image = image.transpose(Image.Transpose.ROTATE_90)
    data = saved(image, **JPEGS.get(kind, {"subsampling": 1}))
    for crop, size in (*NARROW_MARGINS, *random_crops(image.height, image.width)):
        got = decode_crop(data, lambda h, w, crop=crop: crop, size, upright=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(images, "_BLOCK_ROWS", 1 << 20)  # nothing is cut off
            expected = decode_crop(data, lambda h, w, crop=crop: crop, size, upright=False)
        np.testing.assert_array_equal(got, expected)


def gradient(mode):
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    return Image.fromarray(np.stack([ramp[None].repeat(64, 0)] * 3, -1)).convert(mode)


def loaded(data):
    """Both ways that an image is loaded; they have to agree."""
    whole = decode(data, upright=True)
    cropped = decode_crop(data, lambda h, w: Crop(0, 0, h, w), whole.shape[0], upright=True)
    assert whole.shape[2] == 3 and whole.dtype == np.uint8
    if whole.shape[0] == whole.shape[1]:
        assert difference(cropped, whole) < 1.5
    return whole


class TestUnusualFilesThatAreFine:
    def test_cmyk(self):
        assert difference(loaded(saved(gradient("CMYK"))), np.asarray(gradient("RGB"))) < 3

    def test_grey(self):
        assert difference(loaded(saved(gradient("L"))), np.asarray(gradient("RGB"))) < 3

    def test_16_bits(self):
        ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
        got = loaded(saved(Image.fromarray(ramp), "png"))
        np.testing.assert_allclose(got[..., 0], ramp / 257, atol=1)

    def test_a_palette_with_alpha(self):
        red = Image.new("RGB", (8, 8), (255, 0, 0)).convert("P", palette=Image.Palette.ADAPTIVE)
        got = loaded(saved(red, "png", transparency=b"\x80"))
        np.testing.assert_array_equal(got, np.full((8, 8, 3), (255, 127, 127)))

    @pytest.mark.parametrize(
        ("mode", "kind"), [("RGBA", "png"), ("LA", "png"), ("RGBA", "webp"), ("RGBA", "tiff")]
    )
    def test_transparent_images_are_put_on_the_background(self, mode, kind):
        image = Image.new("RGBA", (8, 8), (200, 200, 200, 0))
        image.paste((100, 100, 100, 255), (0, 0, 4, 8))
        options = {"lossless": True} if kind == "webp" else {}
        data = saved(image.convert(mode), kind, **options)
        for background in ((255, 255, 255), (10, 20, 30)):
            got = decode(data, upright=True, background=background)
            np.testing.assert_array_equal(got[:, :4], np.full((8, 4, 3), 100))
            np.testing.assert_array_equal(got[:, 4:], np.full((8, 4, 3), background))

    @pytest.mark.parametrize("kind", ["png", "jpeg"])
    def test_a_single_pixel_is_enlarged(self, kind):
        data = saved(Image.new("RGB", (1, 1), (10, 200, 30)), kind, quality=100, subsampling=0)
        assert loaded(data).shape == (1, 1, 3)
        cropped = decode_crop(data, lambda h, w: Crop(0, 0, h, w), 8, upright=False)
        centre = centre_crop(decode(data, upright=False), 8, 9)
        for image in (cropped, centre):
            assert difference(image, np.full((8, 8, 3), (10, 200, 30))) < 2

    def test_superfluous_bytes(self, photo):
        clean = decode(photo, upright=False)
        np.testing.assert_array_equal(loaded(photo + b"\0" * 100), clean)
        padded = photo.replace(b"\xff\xd9", b"\0\0\0\xff\xd9")
        assert difference(loaded(padded), clean) < 0.01


def huge_png():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    crc = zlib.crc32(chunk).to_bytes(4)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + crc + saved_tail()


def saved_tail():
    return saved(Image.new("RGB", (1, 1)), "png")[33:]


def huge_jpeg():
    data = saved(Image.new("RGB", (16, 16)))
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 60_000, 60_000) + data[at + 4 :]


def truncated(fraction):
    data = PHOTOS[0].read_bytes()
    return data[: int(len(data) * fraction)]


BAD = {
    "empty": (b"", "it is no image of a kind that is read"),
    "text": (b"this is not an image\n" * 20, "it is no image of a kind that is read"),
    "truncated in the header": (truncated(0.001), "it is no image|truncated|Truncated"),
    "truncated early": (truncated(0.2), "truncated"),
    "truncated late": (truncated(0.98), "truncated"),
    "huge png": (huge_png(), "claims 60000 x 60000 pixels, which take .* GiB|exceeds limit"),
    "huge jpeg": (
        huge_jpeg(),
        "claims 60000 x 60000 pixels, which take 10.1 GiB to decode",
    ),
    "zeros": (bytes(4096), "it is no image of a kind that is read"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_files_are_refused(kind):
    data, message = BAD[kind]
    with pytest.raises(DECODING_ERRORS, match=message):
        decode(data, upright=True)
    # also where the crop ends above what is missing
    with pytest.raises(DECODING_ERRORS, match=message):
        decode_crop(data, lambda height, width: Crop(0, 0, 16, 16), 16, upright=True)


READ = {
    "jpeg": {"quality": 100, "subsampling": 0},
    **{kind: {} for kind in ("png", "bmp", "gif", "tiff", "ppm")},
    "webp": {"lossless": True},
    "avif": {"quality": 100},
}


@pytest.mark.parametrize("kind", READ)
def test_kinds_that_are_read(kind):
    if kind.upper() not in pillow.KINDS:
        pytest.skip("AVIF needs Pillow 11.3")
    image = gradient("RGB")
    assert difference(loaded(saved(image, kind, **READ[kind])), np.asarray(image)) < 3


@pytest.mark.parametrize("kind", ["ico", "tga", "pcx", "sgi", "eps", "pdf", "jpeg2000"])
def test_other_kinds_are_not_opened_whatever_they_are_called(kind):
    with pytest.raises(ValueError, match="no image of a kind that is read"):
        decode(saved(gradient("RGB"), kind), upright=True)


def test_what_is_not_read_is_named():
    box = struct.pack(">I", 24) + b"ftyp"
    with pytest.raises(ValueError, match="it is HEIC, which is not read: make it a JPEG"):
        decode(box + b"heic" + bytes(12), upright=True)
    floats = Image.fromarray(np.ones((4, 4), np.float32))
    with pytest.raises(ValueError, match="floating-point numbers"):
        decode(saved(floats, "tiff"), upright=True)


def test_the_first_picture_of_several():
    pictures = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (250, 100)]
    data = saved(pictures[0], "gif", save_all=True, append_images=pictures[1:])
    assert decode(data, upright=True)[0, 0].tolist() == [250, 0, 0]


def test_an_image_is_refused_by_what_it_takes(monkeypatch):
    photo = saved(gradient("RGB"), "png")
    for mode, kind, bytes_a_pixel in (("RGB", "png", 10), ("RGBA", "png", 18), ("L", "gif", 11)):
        data = saved(gradient("RGB").convert(mode), kind)
        monkeypatch.setattr(pillow, "MAX_BYTES", 64 * 64 * bytes_a_pixel)
        decode(data, upright=True)
        monkeypatch.setattr(pillow, "MAX_BYTES", 64 * 64 * bytes_a_pixel - 1)
        with pytest.raises(ValueError, match="its header claims 64 x 64 pixels"):
            decode(data, upright=True)
    monkeypatch.setattr(pillow, "MAX_BYTES", 2**30)
    decode(photo, upright=True)


def test_all_threads_together_hold_no_more_than_they_may(monkeypatch):
    size = 64 * 64 * 10
    monkeypatch.setattr(pillow, "_SMALL", size)
    monkeypatch.setattr(pillow, "_memory", pillow._Memory(2 * size))
    inside, most = [], []
    as_rgb = pillow._as_rgb

    def watched(*args):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return as_rgb(*args)

    monkeypatch.setattr(pillow, "_as_rgb", watched)
    data = saved(gradient("RGB"), "png")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: decode(data, upright=True), range(16)))
    assert max(most) == 2


@pytest.mark.parametrize("turned", [False, True])
def test_a_large_photograph_is_decoded_at_a_part_of_its_size(turned):
    """The one by libjpeg-turbo, the other, which EXIF turns, by Pillow."""
    large = Image.open(PHOTOS[0]).resize((1280, 854))
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1
    data = saved(large, "jpeg", quality=95, exif=exif)
    whole = decode(data, upright=True)
    assert whole.shape == ((1280, 854, 3) if turned else (854, 1280, 3))
    for at_least, part in ((854, 1), (428, 1), (427, 2), (213, 4), (106, 8), (20, 8)):
        found = decode(data, upright=True, at_least=at_least)
        height, width = (-(-side // part) for side in whole.shape[:2])
        assert found.shape == (height, width, 3), at_least
    small = [
        centre_crop(image, 64, 64) for image in (whole, decode(data, upright=True, at_least=64))
    ]
    assert difference(*small) < 2
    assert abs(float(small[0].mean()) - float(small[1].mean())) < 0.5
