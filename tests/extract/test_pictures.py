"""Which picture a record names, and how it lies."""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from calib.errors import FormatError, InputError, MissingFileError
from calib.extract import dataset, pictures
from calib.extract.pictures import image_path, read_image

COCO = "http://images.cocodataset.org/"


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pictures_of_more_than_8_bits_are_refused(tmp_path: Path, mode: str) -> None:
    values = np.array([[100, 1000], [30000, 65535]]).astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode])
    name = "p.png" if mode == "I;16" else "p.tif"
    Image.fromarray(values).save(tmp_path / name)
    with pytest.raises(FormatError, match=r"more than 8 bits per channel"):
        read_image({"id": 1, "file_name": name}, tmp_path)


@pytest.mark.parametrize(
    ("mode", "options"),
    [("L", {}), ("P", {}), ("RGBA", {}), ("LA", {}), ("1", {}), ("CMYK", {"format": "JPEG"}), ("RGB", {})],
)
def test_pictures_of_any_kind_become_rgb(tmp_path: Path, mode: str, options: dict[str, str]) -> None:
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8)).convert(mode)
    noise.save(tmp_path / "p", **({"format": "PNG"} | options))
    pixels = read_image({"id": 1, "file_name": "p", "height": 9, "width": 13}, tmp_path)
    assert pixels.shape == (9, 13, 3) and pixels.dtype == np.uint8
    if mode != "CMYK":
        assert np.array_equal(pixels, np.asarray(noise.convert("RGB")))
    if mode in ("L", "LA", "1"):
        assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_what_is_transparent_has_the_colour_that_is_stored_under_it(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128]))
    colours = np.array([[[10, 20, 30], [200, 100, 50]]], np.uint8)
    Image.fromarray(np.dstack([colours, np.array([[0, 128]], np.uint8)])).save(tmp_path / "alpha.png")
    for name in ("palette.png", "alpha.png"):
        assert np.array_equal(read_image({"id": 1, "file_name": name}, tmp_path), colours)


def test_where_pictures_are_looked_for(tmp_path: Path) -> None:
    (tmp_path / "val2017").mkdir()
    (tmp_path / "val2017" / "7.jpg").touch()
    (tmp_path / "8.jpg").touch()
    (tmp_path / "000000000010.jpg").touch()
    coco = "http://images.cocodataset.org/val2017/"
    assert image_path({"id": 7, "coco_url": coco + "7.jpg"}, tmp_path) == tmp_path / "val2017" / "7.jpg"
    assert image_path({"id": 8, "coco_url": coco + "8.jpg"}, tmp_path) == tmp_path / "8.jpg"
    assert image_path({"id": 10, "file_name": "val2017/000000000010.jpg"}, tmp_path) == tmp_path / "000000000010.jpg"
    for record in ({"id": 9, "file_name": "9.jpg"}, {"id": 9}, {"id": 9, "file_name": "val2017"}):
        with pytest.raises(MissingFileError, match="image 9 not found") as e:
            image_path(record, tmp_path)
        assert "--images" in e.value.hint


def test_pictures_that_are_damaged_or_of_another_size(tmp_path: Path, draw: Callable[..., Any]) -> None:
    record = {"id": 1, "file_name": "p.png", "height": 9, "width": 13}
    Image.fromarray(draw(9, 13)).save(tmp_path / "p.png")
    content = (tmp_path / "p.png").read_bytes()
    for damaged in (b"", b"no picture", content[:30], content[: len(content) // 2]):
        (tmp_path / "p.png").write_bytes(damaged)
        with pytest.raises(FormatError, match=r"p\.png cannot be read"):
            read_image(record, tmp_path)
    Image.fromarray(draw(13, 9)).save(tmp_path / "p.png")
    with pytest.raises(FormatError, match=r"p\.png is 13 x 9, the json says 9 x 13"):
        read_image(record, tmp_path)


# What a record of image 42 says, --images under the root, and the file that is meant.
NAMED: list[tuple[dict[str, Any], str, str]] = [
    ({"file_name": "a/1.png"}, ".", "a/1.png"),
    ({"file_name": "./a/1.png"}, ".", "a/1.png"),
    ({"file_name": "a//1.png"}, "./", "a/1.png"),
    ({"file_name": "a/1.png"}, "a", "a/1.png"),
    ({"file_name": "x/a/1.png"}, "x/a", "x/a/1.png"),
    ({"file_name": "../b/1.png"}, "a", "b/1.png"),
    ({"file_name": "a\\1.png"}, ".", "a/1.png"),
    ({"file_name": ".\\a\\1.png"}, ".", "a/1.png"),
    ({"file_name": "a\\1.png"}, "a", "a/1.png"),
    ({"file_name": "caf\u00e9.png"}, ".", "cafe\u0301.png"),
    ({"file_name": "cafe\u0301.png"}, ".", "caf\u00e9.png"),
    ({"file_name": "a b.png"}, ".", "a b.png"),
    ({"file_name": "100%25 #1?.png"}, ".", "100%25 #1?.png"),
    ({"file_name": "\u65e5\u672c/100%.png"}, "\u65e5\u672c", "\u65e5\u672c/100%.png"),
    ({"coco_url": "http://host/some/where/a/my%20photo.png?size=1"}, ".", "a/my photo.png"),
    ({"coco_url": "http://host/a/my%20photo.png"}, "a", "a/my%20photo.png"),
    ({"coco_url": "http://host/1.png"}, ".", "1.png"),
    ({"file_name": "https://host/a/1.png"}, ".", "a/1.png"),
    ({"file_name": None, "coco_url": COCO + "val2017/000000000042.jpg"}, "val2017", "val2017/000000000042.jpg"),
    ({"file_name": "000000000042.jpg", "coco_url": COCO + "val2017/000000000042.jpg"}, ".", "val2017/000000000042.jpg"),
    ({"file_name": "COCO_val2014_000000000042.jpg"}, ".", "val2014/COCO_val2014_000000000042.jpg"),
    ({"file_name": "COCO_val2014_000000000042.jpg"}, "val2014", "val2014/COCO_val2014_000000000042.jpg"),
    (
        {"file_name": "COCO_val2014_000000000042.jpg", "coco_url": COCO + "train2017/000000000042.jpg"},
        "all",
        "all/000000000042.jpg",
    ),
    (
        {"flickr_url": "http://farm7.staticflickr.com/6116/6255196340_da26cf2c9e_z.jpg"},
        ".",
        "6255196340_da26cf2c9e_z.jpg",
    ),
]


@pytest.mark.parametrize(("record", "folder", "expected"), NAMED, ids=str)
def test_the_picture_is_the_one_that_is_named(
    tmp_path: Path, record: dict[str, Any], folder: str, expected: str
) -> None:
    path = tmp_path / expected
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    (tmp_path / folder).mkdir(exist_ok=True)
    assert image_path({"id": 42} | record, tmp_path / folder).samefile(path)


# The file that is there is another one.
OTHERS: list[tuple[dict[str, Any], str, str]] = [
    ({"file_name": "a/1.png"}, "b", "b/1.png"),
    ({"file_name": "a/1.png"}, ".", "1.png"),
    ({"file_name": "x/a/1.png"}, "a", "a/1.png"),
    ({"file_name": "x/a/1.png"}, "y/a", "y/a/1.png"),
    ({"file_name": "/run1/frames/1.png"}, "frames", "frames/1.png"),
    ({"file_name": "C:\\a\\1.png"}, ".", "a/1.png"),
    ({"file_name": "../b/1.png"}, "a", "a/1.png"),
    ({"coco_url": "http://host/a/42.png"}, "b", "b/42.png"),
    ({"coco_url": "http://host/a/42.png"}, ".", "42.png"),
    ({"file_name": "val2017/1.png"}, ".", "1.png"),
    ({"file_name": "1.png"}, ".", "a/1.png"),
    ({"file_name": "1.png"}, ".", "1.png/is a folder"),
    ({"file_name": "1\0.png"}, ".", "1.png"),
    ({"file_name": "1" * 300}, ".", "1.png"),
    ({"file_name": "", "coco_url": "http://[", "flickr_url": None}, ".", "1.png"),
]


@pytest.mark.parametrize(("record", "folder", "there"), OTHERS, ids=lambda value: str(value)[:60])
def test_no_other_picture_stands_for_one_that_is_missing(
    tmp_path: Path, record: dict[str, Any], folder: str, there: str
) -> None:
    path = tmp_path / there
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(MissingFileError, match="image 42 not found"):
        image_path({"id": 42} | record, tmp_path / folder)


def test_all_places_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "val2017"
    (folder / "p.jpg").mkdir(parents=True)
    with pytest.raises(MissingFileError) as e:
        image_path({"id": 42, "file_name": "p.jpg", "coco_url": COCO + "val2017/000000000042.jpg"}, folder)
    for place in ("p.jpg (a folder)", "val2017/000000000042.jpg", "000000000042.jpg"):
        assert str(folder / place) in str(e.value)
    for name in (7, ["p.jpg"], {}):
        with pytest.raises(FormatError, match="file_name of image 42"):
            image_path({"id": 42, "file_name": name}, folder)


def test_a_name_that_means_two_files_is_refused_with_both(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "a"
    inner.mkdir(parents=True)
    (inner / "1.png").touch()
    record = {"id": 42, "file_name": "a/1.png"}
    assert image_path(record, tmp_path / "a") == inner / "1.png"
    (tmp_path / "a" / "1.png").touch()
    with pytest.raises(InputError) as e:
        image_path(record, tmp_path / "a")
    assert not isinstance(e.value, MissingFileError)
    assert str(inner / "1.png") in str(e.value) and str(tmp_path / "a" / "1.png") in str(e.value)
    assert image_path(record, tmp_path) == tmp_path / "a" / "1.png"
    (inner / "1.png").unlink()
    (inner / "1.png").symlink_to(tmp_path / "a" / "1.png")  # one file under two names
    assert image_path(record, tmp_path / "a").samefile(tmp_path / "a" / "1.png")


def test_links_to_pictures_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "2.png").symlink_to(tmp_path / "a" / "1.png")
    (tmp_path / "3.png").symlink_to(tmp_path / "nothing")
    assert image_path({"id": 1, "file_name": "a/1.png"}, tmp_path / "link") == tmp_path / "link" / "1.png"
    assert image_path({"id": 1, "file_name": "link/1.png"}, tmp_path / "link") == tmp_path / "link" / "1.png"
    assert image_path({"id": 1, "file_name": "2.png"}, tmp_path) == tmp_path / "2.png"
    with pytest.raises(MissingFileError, match=r"3\.png"):
        image_path({"id": 1, "file_name": "3.png"}, tmp_path)


def test_the_folder_one_stands_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").touch()
    monkeypatch.chdir(tmp_path / "a")
    assert image_path({"id": 1, "file_name": "a/1.png"}, Path()).samefile(tmp_path / "a" / "1.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingFileError):
        image_path({"id": 1, "file_name": "a/2.png"}, Path())


def tagged(path: Path, seen: Any, orientation: int) -> None:
    """Write ``seen`` as a camera does that was held otherwise."""
    stored = {1: seen, 2: seen[:, ::-1], 3: seen[::-1, ::-1], 4: seen[::-1], 5: seen.swapaxes(0, 1)}
    stored |= {6: np.rot90(seen), 7: seen[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(seen, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    quality = {"lossless": True} if path.suffix == ".webp" else {"quality": 95} if path.suffix == ".jpg" else {}
    Image.fromarray(np.ascontiguousarray(stored[orientation])).save(path, exif=exif, **quality)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(40, 64), (48, 48)])
def test_tagged_pictures_are_read_as_they_are_seen(
    tmp_path: Path, suffix: str, orientation: int, size: tuple[int, int]
) -> None:
    seen = np.zeros((*size, 3), np.uint8)
    seen[: size[0] // 2, : size[1] // 2] = (250, 0, 0)
    seen[size[0] // 2 :, : size[1] // 2] = (0, 250, 0)
    tagged(tmp_path / f"p{suffix}", seen, orientation)
    for said in ({"height": size[0], "width": size[1]}, {}, {"width": size[1]}):
        pixels = read_image({"id": 1, "file_name": f"p{suffix}"} | said, tmp_path)
        assert pixels.shape == seen.shape and pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - seen).mean() < (4 if suffix == ".jpg" else 1e-9)


def test_the_json_says_which_way_a_tagged_picture_lies(tmp_path: Path) -> None:
    seen = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    tagged(tmp_path / "p.png", seen, 6)
    stored = read_image({"id": 1, "file_name": "p.png", "height": 60, "width": 40}, tmp_path)
    assert np.array_equal(stored, np.rot90(seen))
    with pytest.raises(FormatError, match=r"40 x 60 \(60 x 40 without its EXIF orientation\), the json says 40 x 40"):
        read_image({"id": 1, "file_name": "p.png", "height": 40, "width": 40}, tmp_path)


def test_damaged_tags_do_not_matter(tmp_path: Path) -> None:
    seen = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\1\x12", b"\0" * 9):
        Image.fromarray(seen).save(tmp_path / "p.png", exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert np.array_equal(read_image({"id": 1, "file_name": "p.png"}, tmp_path), seen)
    for orientation in (0, 9, 65535):
        exif_of = Image.Exif()
        exif_of[0x0112] = orientation
        Image.fromarray(seen).save(tmp_path / "p.png", exif=exif_of)
        assert np.array_equal(read_image({"id": 1, "file_name": "p.png"}, tmp_path), seen)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP", "MPO"])
def test_of_several_frames_the_first_is_read(tmp_path: Path, kind: str) -> None:
    first, *more = (Image.new("RGB", (16, 12), colour) for colour in ("red", "lime", "blue"))
    options = {"lossless": True} if kind == "WEBP" else {}
    first.save(tmp_path / "p", kind, save_all=True, append_images=more, **options)
    pixels = read_image({"id": 1, "file_name": "p", "height": 12, "width": 16}, tmp_path)
    assert np.abs(pixels.astype(int) - (255, 0, 0)).max() <= 2


def test_colour_of_16_bits_keeps_its_upper_eight(tmp_path: Path) -> None:
    import struct
    import zlib

    value = np.array([[[0, 0x1234, 0xFFFF], [0x8000, 0x00FF, 0x7FFF]]], ">u2")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"\0" + value.tobytes())) + chunk(b"IEND", b"")
    (tmp_path / "p.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    assert np.array_equal(read_image({"id": 1, "file_name": "p.png"}, tmp_path), value >> 8)


@pytest.mark.slow
def test_pictures_that_pillow_alone_refuses_are_read(tmp_path: Path) -> None:
    Image.new("1", (19_000, 10_000), 1).save(tmp_path / "p.png")  # Pillow's own limit: 178,956,970
    pixels = read_image({"id": 1, "file_name": "p.png", "height": 10_000, "width": 19_000}, tmp_path)
    assert pixels.shape == (10_000, 19_000, 3) and pixels.min() == 255


def test_pictures_past_the_limit_are_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Image.MAX_IMAGE_PIXELS is not None and pictures.MOST_PIXELS <= Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(pictures, "MOST_PIXELS", 1000)
    Image.new("RGB", (50, 50)).save(tmp_path / "p.png")
    with pytest.raises(FormatError, match=r"p\.png is too large: 50 x 50 pixels") as e:
        read_image({"id": 1, "file_name": "p.png"}, tmp_path)
    assert "1000 pixels" in e.value.hint and "damaged" not in e.value.hint
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(FormatError, match=r"p\.png is too large"):
        read_image({"id": 1, "file_name": "p.png"}, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM", "TGA"])
def test_changed_files_are_read_or_refused(tmp_path: Path, kind: str, draw: Callable[..., Any]) -> None:
    rng = random.Random(kind)
    Image.fromarray(draw(24, 32)).save(tmp_path / "good", kind)
    good = (tmp_path / "good").read_bytes()
    for _ in range(150):
        content = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            content[rng.randrange(min(len(content), rng.choice([64, 10_000])))] = rng.randrange(256)
        (tmp_path / "p").write_bytes(content[: rng.choice([len(content), rng.randrange(len(content))])])
        try:
            assert read_image({"id": 1, "file_name": "p"}, tmp_path).shape[2] == 3
        except FormatError as e:
            assert str(tmp_path / "p") in str(e)


def test_they_have_a_second_name() -> None:
    assert dataset.read_image is read_image and dataset.image_path is image_path
