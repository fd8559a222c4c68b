"""Images: each mode and orientation becomes upright RGB; broken, huge and hostile files are rejected."""

from __future__ import annotations

import os
import struct
import tracemalloc
import warnings
import zlib
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from localization_heads.data import images
from localization_heads.data.address import ImageError
from localization_heads.data.images import image_size, list_image_files, load_image, quiet_decoders
from localization_heads.errors import UsageError


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(image: Image.Image, format: str = "PNG", **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def corner(image: Image.Image, x: int = 0, y: int = 0) -> tuple[int, ...]:
    assert image.mode == "RGB"
    pixel = image.getpixel((x, y))
    assert isinstance(pixel, tuple)
    return pixel


# ----------------------------------------------------------------------------------------- modes and formats


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_each_raster_format_loads(format, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded(Image.new("RGB", (5, 3), (200, 30, 40)), format))
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (5, 3))
    np.testing.assert_allclose(corner(image), (200, 30, 40), atol=6)
    assert load_image(str(path)).size == (5, 3)


@pytest.mark.parametrize(
    ("image", "format", "expected"),
    [
        (Image.new("1", (2, 2), 1), "PNG", (255, 255, 255)),
        (Image.new("L", (2, 2), 99), "PNG", (99, 99, 99)),
        (Image.new("LA", (2, 2), (0, 0)), "PNG", (255, 255, 255)),
        (Image.new("LA", (2, 2), (40, 255)), "PNG", (40, 40, 40)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 255)), "PNG", (10, 20, 30)),
        (Image.new("RGBA", (2, 2), (10, 20, 30, 0)), "PNG", (255, 255, 255)),
        (Image.new("RGBA", (2, 2), (0, 0, 0, 128)), "PNG", (127, 127, 127)),
        (Image.new("RGB", (2, 2), (10, 20, 30)).quantize(2), "PNG", (10, 20, 30)),
        (Image.new("CMYK", (2, 2), (255, 0, 0, 0)), "TIFF", (0, 255, 255)),
        (Image.new("F", (2, 2), 0.5), "TIFF", (128, 128, 128)),
        (Image.new("F", (2, 2), 100.0), "TIFF", (100, 100, 100)),
        (Image.new("F", (2, 2), float("nan")), "TIFF", (0, 0, 0)),
        (Image.new("I", (2, 2), 200), "TIFF", (200, 200, 200)),
        (Image.new("I", (2, 2), -5), "TIFF", (0, 0, 0)),
        (Image.fromarray(np.full((2, 2), 257 * 80, np.uint16)), "PNG", (80, 80, 80)),
        (Image.fromarray(np.full((2, 2), 100, np.uint16)), "PNG", (0, 0, 0)),
    ],
)
def test_each_mode_converts_to_rgb(image, format, expected, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(encoded(image, format))
    assert corner(load_image(path)) == expected
    assert corner(load_image(image)) == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16", "I", "F"])
def test_conversion_in_strips_equals_conversion_at_once(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The white level of 16- and 32-bit images is computed from the whole image, not per strip."""
    values = np.random.default_rng(0).integers(0, 256, (24, 17, 4), dtype=np.uint8)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray((values[..., 0] * np.arange(24)[:, None]).astype(kind))
    else:
        image = Image.fromarray(values, "RGBA").convert(mode)
    whole = np.asarray(load_image(image))
    monkeypatch.setattr(images, "STRIP_PIXELS", 50)
    np.testing.assert_array_equal(np.asarray(load_image(image)), whole)


def test_downscale_for_model() -> None:
    seen = {(6000, 4000): (6000, 4000), (8000, 8000): (4000, 4000), (64000, 999): (32000, 500)}
    assert {size: images.downscale_for_model(Image.new("1", size).convert("L")).size for size in seen} == seen


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_transparent_colour_is_composited_on_white(mode, tmp_path):
    colour = {"P": 1, "RGB": (9, 9, 9), "L": 9}[mode]
    image = Image.new(mode, (2, 2), colour)
    if mode == "P":
        image.putpalette([0, 0, 0, 9, 9, 9])
    (tmp_path / "a.png").write_bytes(encoded(image, transparency=colour))
    assert corner(load_image(tmp_path / "a.png")) == (255, 255, 255)


TURNED = ("JPEG", "PNG", "WEBP", "TIFF", "MPO")


@pytest.mark.parametrize("format", TURNED)
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_applied(turn, format, tmp_path):
    """To the pixels and to the size from the header, in each format that has an orientation."""
    image = Image.new("RGB", (32, 16), "black")
    image.paste((255, 255, 255), (0, 0, 8, 8))  # the top left corner as stored
    exif = Image.Exif()
    exif[0x0112] = turn
    options = {"save_all": True, "append_images": [image]} if format == "MPO" else {}
    (tmp_path / "a").write_bytes(encoded(image, format, exif=exif, quality=95, **options))
    upright = np.asarray(load_image(tmp_path / "a").convert("L")) > 128
    assert upright.shape == ((16, 32) if turn < 5 else (32, 16))
    # https://www.exif.org: row 0 and column 0 of the stored image are the visual ...
    rows, columns = np.nonzero(upright)
    is_top, is_left = rows.min() == 0, columns.min() == 0
    assert (is_top, is_left) == {
        1: (True, True), 2: (True, False), 3: (False, False), 4: (False, True),
        5: (True, True), 6: (True, False), 7: (False, False), 8: (False, True),
    }[turn]  # fmt: skip
    assert image_size(tmp_path / "a") == upright.shape[::-1]
    with Image.open(tmp_path / "a") as opened:
        assert image_size(opened) == load_image(opened).size == upright.shape[::-1]
        assert load_image(opened).size == upright.shape[::-1]  # also once it is decoded


def test_image_size_does_not_decode(tmp_path):
    """Truncated files suffice: a PNG too, in whose later chunks Pillow would look for EXIF data."""
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        content = encoded(Image.effect_noise((64, 64), 90), format)
        (tmp_path / "a").write_bytes(content[: len(content) // 2] if format != "TIFF" else content)
        if format == "WEBP":  # Pillow reads the whole file
            (tmp_path / "a").write_bytes(content)
        assert image_size(tmp_path / "a") == (64, 64), format


def test_malformed_exif_is_ignored(tmp_path):
    exif = b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff\x01\x12garbage"
    (tmp_path / "a.jpg").write_bytes(encoded(Image.new("RGB", (8, 8)), "JPEG", exif=exif))
    assert load_image(tmp_path / "a.jpg").size == (8, 8)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation_is_loaded(format, tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    (tmp_path / "a").write_bytes(content)
    red, _, blue = corner(load_image(tmp_path / "a"))
    assert red > 200 and blue < 60


def test_loaded_image_is_a_copy():
    image = Image.new("RGB", (2, 2), "red")
    load_image(image).putpixel((0, 0), (0, 0, 0))
    assert corner(image) == (255, 0, 0)


def test_error_for_a_strange_file_name_is_one_line():
    for name in ("a\nb\x1b[31m.png", "x" * 100_000):
        with pytest.raises(ImageError) as caught:
            load_image(name)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 400


def test_relative_path_falls_back_to_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sets").mkdir()
    Image.new("RGB", (3, 2)).save("sets/a.png")
    assert load_image("a.png", base="sets").size == (3, 2)
    with pytest.raises(ImageError, match=r"^b\.png: no such file \(nor in sets\)$"):
        load_image("b.png", base="sets")


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((30_000, 30_000), "30000 x 30000 = 900 MP, over the limit of 64 MP"),
        ((8001, 8000), "8001 x 8000 = 64.01 MP, over the limit of 64 MP"),
        ((10_000, 10_000), "10000 x 10000 = 100 MP"),
        ((2**31 - 1, 2**31 - 1), "over the limit"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_oversized_image_is_rejected_from_its_header(size, message, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(ImageError, match=f"^{path}: .*{message}"):
        load_image(path)


@pytest.mark.parametrize("format", ["BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_pixel_limit_applies_to_each_format_and_in_memory(format, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    image = Image.new("L", (2000, 1000))
    (tmp_path / "a").write_bytes(encoded(image, format))
    for source in (tmp_path / "a", image):
        with pytest.raises(ImageError, match="2000 x 1000 = 2 MP, over the limit of 1 MP"):
            load_image(source)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n%%EOF\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"hello", "not an image in a known format"),
        (EPS, "not an image in a known format"),
        (SVG, "not an image in a known format"),
        (b"%PDF-1.7\n", "not an image in a known format"),
        (encoded(Image.new("RGB", (9, 9)), "ICO"), "not an image in a known format"),
        (encoded(Image.effect_noise((64, 64), 90))[:200], "broken or cut short"),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:700], "broken or cut short"),
        (encoded(Image.effect_noise((64, 64), 90), "WEBP")[:100], "broken|not an image"),
        (encoded(Image.effect_noise((64, 64), 90), "BMP")[:100], "broken"),
        (png_header(10, 10), "broken or cut short"),
        (png_header(0, 10), "not an image|no pixels|broken"),
        (b"P6 10 10 255\nabc", "broken or cut short"),
    ],
)
def test_invalid_file_gives_a_one_line_error(content, message, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=message) as caught:
        load_image(path)
    assert caught.value.path == str(path)
    assert isinstance(caught.value, UsageError)
    assert "\n" not in str(caught.value)


def tags(*entries: tuple[int, int, int, int], order: str = "<", at: int = 8) -> bytes:
    """A tag directory as in EXIF and TIFF, with entries (number, type, count, value or offset)."""
    start = b"II*\0" if order == "<" else b"MM\0*"
    listed = b"".join(struct.pack(order + "HHLL", *entry) for entry in entries)
    return start + struct.pack(order + "LH", at, len(entries)) + listed + bytes(4)


def overlapping(size: int, count: int, order: str = "<") -> bytes:
    """Tags that all point to the same `size` bytes."""
    return tags(*((20_000 + n, 7, size, 0) for n in range(count)), order=order).ljust(size, b"\0")


def with_segments(*segments: tuple[int, bytes]) -> bytes:
    """A JPEG with these segments inserted at the start."""
    content = encoded(Image.new("RGB", (8, 8)), "JPEG")
    made = b"".join(bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body for kind, body in segments)
    return content[:2] + made + content[2:]


EXIF = b"Exif\0\0"
BLOB = overlapping(64_000, 5_000)


OVERLAPPING = {
    "tiff": overlapping(400_000, 30_000),
    "big-endian tiff": overlapping(400_000, 30_000, ">"),
    "exif": with_segments((0xE1, EXIF + BLOB)),
    "exif with two prefixes": with_segments((0xE1, EXIF + EXIF + BLOB[:65_000])),
    "exif in parts": with_segments((0xE1, EXIF + BLOB), *[(0xE1, EXIF + bytes(60_000))] * 3),
    "mpf": with_segments((0xE2, b"MPF\0" + BLOB)),
    "after junk": b"\xff\xd8\xff\x00junk" + with_segments((0xE1, EXIF + BLOB))[2:],
    "subdirectory": tags((0x8769, 4, 1, 100)).ljust(100, b"\0") + overlapping(400_000, 30_000)[8:],
}


@pytest.mark.parametrize("content", OVERLAPPING.values(), ids=OVERLAPPING)
def test_overlapping_tags_are_rejected_without_using_memory(content, tmp_path):
    """5,000 tags that share 64 KB would take 320 MB, and 30,000 that share 400 KB 12 GB."""
    (tmp_path / "a").write_bytes(content)
    tracemalloc.start()
    try:
        for read in (load_image, image_size):
            with pytest.raises(ImageError, match="its tags hold more than the file"):
                read(tmp_path / "a")
        assert tracemalloc.get_traced_memory()[1] < 8 * len(content) + (64 << 20)
    finally:
        tracemalloc.stop()


def test_realistic_exif_is_accepted(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = 6, "maker " * 20, b"x" * 30_000
    exif.get_ifd(0x8769)[0x927C] = b"note" * 1000
    for format in TURNED[:4]:
        (tmp_path / "a").write_bytes(encoded(Image.new("RGB", (32, 16)), format, exif=exif))
        assert load_image(tmp_path / "a").size == image_size(tmp_path / "a") == (16, 32)


def test_jpeg_with_too_many_scans_is_rejected(tmp_path):
    """A scan of a few bytes makes the decoder go over all pixels."""
    content = encoded(Image.new("RGB", (64, 64), (9, 99, 200)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    thumbnail = (0xE1, b"thumb" + b"\xff\xda" * 200)  # not scans, since they are inside a segment
    scans, after_the_end = content[last:-2], b"\xff\xd9" + b"\xff\xda" * 200
    (tmp_path / "a").write_bytes(content[:last] + scans * 50 + after_the_end)
    assert load_image(tmp_path / "a").size == (64, 64)
    (tmp_path / "a").write_bytes(content[:last] + scans * 200 + after_the_end)
    with pytest.raises(ImageError, match="a JPEG of more than 100 scans"):
        load_image(tmp_path / "a")
    (tmp_path / "a").write_bytes(with_segments(thumbnail))
    assert load_image(tmp_path / "a").size == (8, 8)


def run_length_bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IHHI", 2000, 0, 0, 1078)
    header += struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 256, 0)
    return b"BM" + header + bytes(1024) + b"\x01\x05\x00\x00" * height


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"P3 2001 2000 255\n", "2001 x 2000 = 4.002 MP, over the limit of 4 MP"),
        (b"P6 2001 2000 65535\n", "over the limit of 4 MP"),
        (run_length_bmp(2001, 2000), "over the limit of 4 MP"),
        (b"P3 20 20 255\n" + b" " * (2 << 20), "larger than the limit of 1 MB"),
        (b"P6 2001 2000 255\n", "broken or cut short"),  # decoded in C: no lower limit
    ],
)
def test_slowly_decoded_formats_have_a_lower_limit(content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_SLOW_BYTES", 1 << 20)
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        load_image(tmp_path / "a")


@pytest.mark.parametrize(
    "how",
    ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "tiff_lzw", "tiff_adobe_deflate", "group4", "jpeg"],
)
def test_corrupted_file_loads_or_raises_and_prints_nothing(how, tmp_path, capfd):
    """libtiff prints to stderr from C, and Pillow issues warnings."""
    noise = Image.effect_noise((64, 64) if how.islower() else (16, 16), 90)
    options = {"format": "TIFF", "compression": how} if how.islower() else {"format": how}
    good = encoded(noise.convert("1") if how == "group4" else noise, **options)
    rng = np.random.default_rng(0)
    for _ in range(60):
        content = bytearray(good)
        for place in rng.integers(0, min(len(good), 400) if how.isupper() else len(good), 4):
            content[place] = rng.integers(256)
        (tmp_path / "a").write_bytes(content)
        with suppress(ImageError):
            image_size(tmp_path / "a")
        with suppress(ImageError):
            assert load_image(tmp_path / "a").mode == "RGB"
    assert capfd.readouterr() == ("", "")


def test_overlapping_threads_restore_warning_filters():
    """Pillow stays quiet until the last thread ends; then the filters are as before."""
    before = list(warnings.filters)
    first, second = quiet_decoders(), quiet_decoders()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert len(warnings.filters) == len(before) + 1
    second.__exit__(None, None, None)
    assert list(warnings.filters) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [("no.png", "no such file"), ("", "is a folder"), ("a\0b", "not the name"), ("x" * 300, "too long")],
)
def test_missing_file_or_folder_is_rejected(name, message, tmp_path):
    with pytest.raises(ImageError, match=message):
        load_image(f"{tmp_path}/{name}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_and_devices_are_rejected(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/null"):
        with pytest.raises(ImageError, match="not a plain file"):
            load_image(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file_is_rejected(tmp_path):
    (tmp_path / "a.png").touch(0o000)
    with pytest.raises(ImageError, match="ermission"):
        load_image(tmp_path / "a.png")


# ------------------------------------------------------------------------------------ folders and patterns


def test_list_image_files(tmp_path):
    """Sorted. A folder is filtered by extension; a glob is not."""
    (tmp_path / "inner.png").mkdir()
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in list_image_files(str(tmp_path))] == ["a.jpg", "b.PNG"]
    assert [path.name for path in list_image_files(str(tmp_path / "*"))] == ["a.jpg", "b.PNG", "notes.txt"]
    assert list_image_files(str(tmp_path / "a.jpg")) is None
    odd = tmp_path / "what [1].png"
    odd.write_bytes(b"")
    assert list_image_files(str(odd)) is None, "a file of that very name is that file"
    assert list_image_files("no.png") is None
    assert list_image_files("https://example.org/cat.png?size=2") is None


def test_list_image_files_rejects_empty_and_huge_folders(tmp_path, monkeypatch):
    with pytest.raises(ImageError, match="no image file there"):
        list_image_files(str(tmp_path))
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(b"")
    monkeypatch.setattr(images, "MAX_FILES", 2)
    with pytest.raises(ImageError, match="more than 2 files; write a data file"):
        list_image_files(str(tmp_path))
