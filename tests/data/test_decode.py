from __future__ import annotations

import io
import struct
import subprocess
import sys

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageOps

from research.data import decode, resampling, stored_pixels
from research.data.decode import DamagedImageError, decode_image
from research.data.formats import FORMATS
from research.data.resampling import to_square
from research.data.resizing import BARS, RESIZES, place
from research.data.thread_pool import pillow_warnings_hidden
from tests.helpers import ROOT


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB", size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Left half red, right half blue."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[:, : size[0] // 2] = (255, 0, 0)
    pixels[:, size[0] // 2 :] = (0, 0, 255)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF", "WEBP", "JPEG"])
def test_every_format_becomes_rgb_of_the_same_size(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode_image(encode(halves(), kind, **options))
    assert pixels.shape == (20, 40, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[10, 2], (255, 0, 0), atol=3)
    np.testing.assert_allclose(pixels[10, 37], (0, 0, 255), atol=3)


@pytest.fixture
def heic():
    """A photo in the format of iPhones."""
    pillow_heif = pytest.importorskip("pillow_heif")
    image = pillow_heif.from_pillow(halves(size=(80, 40)))
    buffer = io.BytesIO()
    image.save(buffer, quality=95)
    return buffer.getvalue()


def test_heic_is_decoded(heic):
    pixels = decode_image(heic)
    assert pixels.shape == (40, 80, 3)
    np.testing.assert_allclose(pixels[20, 4], (255, 0, 0), atol=8)
    np.testing.assert_allclose(pixels[20, 75], (0, 0, 255), atol=8)


def test_heic_without_its_package_says_how(heic, monkeypatch):
    monkeypatch.setattr(decode, "readable_formats", lambda: FORMATS)
    with pytest.raises(DamagedImageError, match=r"HEIC, .*: pip install -e '\.\[heic\]'"):
        decode_image(heic)


@pytest.mark.parametrize(
    ("mode", "kind", "left", "right"),
    [
        ("L", "PNG", (76, 76, 76), (29, 29, 29)),
        ("1", "PNG", None, None),
        ("P", "PNG", (255, 0, 0), (0, 0, 255)),
        ("RGBA", "PNG", (255, 0, 0), (0, 0, 255)),
        ("CMYK", "JPEG", (255, 0, 0), (0, 0, 255)),  # inverted, as Adobe and Pillow write it
        ("CMYK", "TIFF", (255, 0, 0), (0, 0, 255)),
        ("LAB", "TIFF", None, None),
    ],
)
def test_other_colour_modes_become_rgb(mode, kind, left, right):
    image = ImageCms.profileToProfile(*to_lab()) if mode == "LAB" else halves(mode)
    pixels = decode_image(encode(image, kind))
    assert pixels.shape == (20, 40, 3)
    if left:
        np.testing.assert_allclose(pixels[10, 2], left, atol=4)
        np.testing.assert_allclose(pixels[10, 37], right, atol=4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize("size", [None, 16])
def test_sixteen_bits_are_scaled_to_eight_and_not_clipped(kind, size):
    shades = np.repeat(np.arange(16, dtype=np.uint16) * 4369, 16).reshape(16, 16)
    pixels = decode_image(encode(Image.fromarray(shades), kind), size)
    np.testing.assert_array_equal(pixels, np.stack([shades // 257] * 3, axis=-1))


def test_grey_tiff_files_of_twelve_bits_and_with_white_as_zero_have_their_brightness():
    shades = np.repeat(np.arange(16, dtype=np.uint16) * 273, 16).reshape(16, 16)  # up to 4095
    high, low = shades[:, ::2], shades[:, 1::2]
    packed = np.stack([high >> 4, (high & 15) << 4 | low >> 8, low & 255], axis=-1)
    tiff = tiff_of(packed.astype(np.uint8).tobytes(), bits=12, black_is_zero=True)
    expected = np.stack([shades >> 4] * 3, axis=-1)
    np.testing.assert_array_equal(decode_image(tiff), expected)
    tiff = tiff_of((65535 - shades * 16).astype("<u2").tobytes(), bits=16, black_is_zero=False)
    np.testing.assert_allclose(decode_image(tiff), expected, atol=1)


def tiff_of(strip: bytes, bits: int, black_is_zero: bool) -> bytes:
    """Returns a grey TIFF file of 16 x 16 pixels, which Pillow cannot write."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, int(black_is_zero))]
    tags += [(273, 8), (277, 1), (278, 16), (279, len(strip))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    header = struct.pack("<2sHI", b"II", 42, 8 + len(strip))
    return header + strip + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("size", [None, 16])
def test_transparent_parts_of_a_sixteen_bit_png_become_white(size):
    shades = np.full((16, 16), 30_000, np.uint16)
    shades[8:] = 7  # nearly black
    image = Image.fromarray(shades)
    pixels = decode_image(encode(image, "PNG", transparency=7), size)
    np.testing.assert_array_equal(pixels[0], 30_000 >> 8)
    np.testing.assert_array_equal(pixels[15], 255)


def test_sixteen_bits_per_channel_are_scaled_to_eight():
    red_to_black = b"P6 2 1 65535\n" + np.array([65535, 0, 0, 0, 0, 0], ">u2").tobytes()
    np.testing.assert_array_equal(decode_image(red_to_black), [[(255, 0, 0), (0, 0, 0)]])


@pytest.mark.parametrize("numbers", [np.float32, np.int32])
def test_pixels_of_unknown_range_are_refused(numbers):
    content = encode(Image.fromarray(np.full((4, 4), 7, numbers)), "TIFF")
    with pytest.raises(DamagedImageError, match="32-bit numbers"):
        decode_image(content)


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "GIF")]
)
@pytest.mark.parametrize("size", [None, 8])
def test_transparent_parts_become_white(mode, kind, size):
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))  # transparent black
    image.paste((0, 0, 0, 255), (20, 0, 40, 20))
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    pixels = decode_image(encode(image, kind), size)
    np.testing.assert_allclose(pixels[3, 1], (255, 255, 255), atol=3)
    np.testing.assert_allclose(pixels[3, -2], (0, 0, 0), atol=3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"])
def test_the_first_of_several_frames_is_used(kind):
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "lime", "blue")]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    for size in (None, 16):
        assert np.abs(decode_image(content, size) - np.array((255.0, 0, 0))).max() <= 3


def test_a_photo_of_one_pixel_and_one_of_20_000_are_used():
    dot, wide = Image.new("RGB", (1, 1), "red"), encode(halves(size=(20_000, 30)), "JPEG")
    for resize in RESIZES:
        assert (decode_image(encode(dot, "PNG"), 8, resize) == (255, 0, 0)).all()
        pixels = decode_image(wide, 8, resize)
        np.testing.assert_allclose(pixels[4, [0, 7]], [(255, 0, 0), (0, 0, 255)], atol=4)


@pytest.mark.parametrize("cut", [2, 6, 12])
def test_a_photo_with_damaged_exif_is_used_without_rotation(cut):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a maker whose name is written behind the entries"
    content = encode(halves(), "JPEG", exif=exif.tobytes()[:-cut])
    whole = encode(halves(), "JPEG")
    with pillow_warnings_hidden():
        pixels = decode_image(content)
    assert pixels.shape in ((20, 40, 3), (40, 20, 3))  # the orientation may still be readable
    assert pixels.sum() == decode_image(whole).sum()
    nonsense = encode(halves(), "JPEG", exif=b"Exif\0\0" + bytes(range(40)))
    with pillow_warnings_hidden():
        np.testing.assert_array_equal(decode_image(nonsense), decode_image(whole))


def test_a_jpeg_without_a_jfif_header_is_used():
    content = encode(halves(), "JPEG")
    length = int.from_bytes(content[4:6], "big")
    assert content[2:4] == b"\xff\xe0"
    without = content[:2] + content[4 + length :]
    assert b"JFIF" not in without
    np.testing.assert_array_equal(decode_image(without), decode_image(content))


def test_the_content_decides_the_format():
    for kind in ("BMP", "GIF", "WEBP", "AVIF", "TIFF"):
        assert decode_image(encode(halves(), kind), 8).shape == (8, 8, 3)


def to_lab() -> tuple[Image.Image, object, object, int, str]:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return halves(), *profiles, 0, "LAB"


def test_a_photo_is_rotated_by_its_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    pixels = decode_image(encode(halves(), "PNG", exif=exif))
    assert pixels.shape == (40, 20, 3)
    np.testing.assert_array_equal(pixels[2, 10], (255, 0, 0))


def test_resizing_averages_pixels():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[::2] = 255  # stripes one pixel wide: subsampling would give black or white
    small = decode_image(encode(Image.fromarray(pixels), "PNG"), 8)
    assert small.shape == (8, 8, 3)
    np.testing.assert_allclose(small, 127, atol=16)


def test_a_large_jpeg_decoded_at_reduced_size_looks_the_same():
    gradient = np.linspace(0, 255, 1600, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(gradient[None, :, None], (1200, 1600, 3)).copy())
    by_jpeg = decode_image(encode(image, "JPEG", quality=95), 64).astype(int)
    by_png = decode_image(encode(image, "PNG"), 64).astype(int)
    assert np.abs(by_jpeg - by_png).max() <= 3


def thirds(size: tuple[int, int]) -> Image.Image:
    """Green, with red and blue at the left and right end, outside of the central square."""
    image, end = Image.new("RGB", size, "lime"), abs(size[0] - size[1]) // 2
    image.paste("red", (0, 0, end, size[1]))
    image.paste("blue", (size[0] - end, 0, *size))
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("width", [60, 61, 1200])
def test_crop_takes_the_central_square(kind, width):
    for turned in (thirds((width, 40)), thirds((width, 40)).transpose(Image.Transpose.ROTATE_90)):
        pixels = decode_image(encode(turned, kind), 16, "crop")
        assert pixels.shape == (16, 16, 3)
        np.testing.assert_allclose(pixels[2:-2, 2:-2], np.full((12, 12, 3), (0, 255, 0)), atol=30)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_pad_shows_the_whole_photo_between_equal_bars(kind):
    content = encode(thirds((64, 32)), kind)
    pixels = decode_image(content, 32, "pad")
    assert pixels.shape == (32, 32, 3)
    assert (pixels[:8] == BARS).all()
    assert (pixels[-8:] == BARS).all()
    inner = decode_image(content)[::2, ::2]
    np.testing.assert_allclose(pixels[8:-8, ::8], inner[:, ::8], atol=40)
    upright = decode_image(encode(thirds((64, 32)).transpose(Image.Transpose.ROTATE_90), kind))
    turned = decode_image(encode(Image.fromarray(upright), "PNG"), 32, "pad")
    assert (turned[:, :8] == BARS).all()
    assert (turned[:, -8:] == BARS).all()


def test_a_square_photo_is_the_same_with_each_way_of_resizing():
    content = encode(halves(size=(100, 100)), "PNG")
    squashed, cropped, padded = (decode_image(content, 32, resize) for resize in RESIZES)
    np.testing.assert_array_equal(squashed, cropped)
    np.testing.assert_array_equal(squashed, padded)


def test_bars_are_not_taken_for_transparent_parts():
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    pixels = decode_image(encode(image, "PNG"), 16, "pad")
    assert (pixels[:4] == BARS).all()
    assert (pixels[4:-4] == 255).all()


@pytest.mark.parametrize("size", [8, 15, 160])
def test_a_padded_photo_keeps_its_shape_and_at_least_a_pixel(size):
    random = np.random.default_rng(0)
    for width, height in [(1, 20_000), (20_000, 1), *random.integers(1, 3000, (200, 2)).tolist()]:
        (_, _, right, lower), inner = place(width, height, size, "pad")
        assert (right, lower) == (width, height)
        assert max(inner) == size
        assert min(inner) >= 1
        exact = size * min(width, height) / max(width, height)
        assert abs(min(inner) - max(exact, 1)) <= 1
        assert (size - min(inner)) % 2 == 0


def test_an_unknown_way_of_resizing_is_refused():
    with pytest.raises(ValueError, match="resize is 'fit'; expected one of: squash, crop, pad"):
        decode_image(encode(halves(), "JPEG"), 8, "fit")


@pytest.mark.parametrize(
    ("resize", "stored", "size", "decoded"),
    [
        ("squash", (479, 479), 160, (479, 479)),
        ("squash", (480, 480), 160, (240, 240)),
        ("squash", (960, 960), 160, (240, 240)),
        ("squash", (800, 800), 50, (100, 100)),
        ("crop", (4000, 479), 160, (4000, 479)),
        ("crop", (4000, 480), 160, (2000, 240)),
        ("pad", (479, 200), 160, (479, 200)),
        ("pad", (480, 200), 160, (240, 100)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_sufficient_size(
    monkeypatch, resize, stored, size, decoded
):
    seen = []

    def spy(pixels, *arguments):
        seen.append((pixels.shape[1], pixels.shape[0]))
        return to_square(pixels, *arguments)

    monkeypatch.setattr(decode, "to_square", spy)
    pixels = decode_image(encode(halves(size=stored), "JPEG"), size, resize)
    assert pixels.shape == (size, size, 3)
    assert seen == [decoded]


def drawing(size):
    noise = np.random.default_rng(0).integers(0, 256, (9, 11, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize("side", [1, 17, 90, 200])
def test_a_jpeg_has_the_pixels_that_pillow_decodes_at_each_scale(options, side):
    content = encode(drawing((611, 403)), "JPEG", **options)
    image = Image.open(io.BytesIO(content))
    image.draft("RGB", (side, side))
    decoded = stored_pixels._jpeg_pixels(content, image)
    np.testing.assert_array_equal(decoded, np.asarray(image))
    assert image.width < 611 or side == 200


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
def test_an_ordinary_jpeg_has_the_pixels_that_pillow_decodes(options):
    content = encode(drawing((61, 43)), "JPEG", **options)
    decoded = stored_pixels.ordinary_jpeg_pixels(content, 32, "squash")
    np.testing.assert_array_equal(decoded, np.asarray(Image.open(io.BytesIO(content))))


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    b'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="3"'
    b"/></rdf:RDF></x:xmpmeta>"
)


def test_a_photo_is_rotated_by_its_xmp_orientation():
    photo = drawing((61, 43))
    plain, turned = (decode_image(encode(photo, "JPEG", **one), 16) for one in ({}, {"xmp": XMP}))
    assert np.abs(turned[::-1, ::-1].astype(int) - plain).max() <= 2
    assert np.abs(turned.astype(int) - plain).max() > 50


def test_an_unusual_jpeg_is_opened_by_pillow():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    photo, content = drawing((61, 43)), encode(drawing((61, 43)), "JPEG")
    turned = encode(photo, "JPEG", exif=exif)
    profile = b"\xff\xe2\0\x06" + b"\xff\xda" * 2  # a segment that contains markers of a scan
    unusual = {
        "no JPEG": encode(photo, "PNG"),
        "turned": turned,
        "turned, after a profile": turned[:2] + profile + turned[2:],
        "turned, after fill bytes": turned[:2] + b"\xff\xff" + turned[2:],
        "turned by XMP": encode(photo, "JPEG", xmp=XMP),
        "of a rare sampling": content.replace(b"\x01\x22\x00", b"\x01\x14\x00", 1),
        "grey": encode(photo.convert("L"), "JPEG"),
        "CMYK": encode(photo.convert("CMYK"), "JPEG"),
        "truncated": content[:-300],
        "large": encode(drawing((96, 96)), "JPEG"),
        "too large for the memory of a thread": encode(drawing((20_000, 80)), "JPEG"),
    }
    for name, one in unusual.items():
        assert stored_pixels.ordinary_jpeg_pixels(one, 32, "squash") is None, name
    assert stored_pixels.ordinary_jpeg_pixels(content, 32, "squash") is not None


@pytest.mark.parametrize("side", [24, 32])
def test_a_decoded_photo_does_not_change_when_the_next_one_is_decoded(side):
    first, second = (
        encode(one.resize((side, side)), "JPEG") for one in (halves(), drawing((9, 9)))
    )
    kept = decode_image(first, 32)
    before = kept.copy()
    assert not np.array_equal(decode_image(second, 32), before)
    np.testing.assert_array_equal(kept, before)


def test_faults_of_a_jpeg_are_judged_by_pillow():
    content = encode(drawing((64, 48)), "JPEG")
    scan = content.index(b"\xff\xda")
    damaged = content[: scan + 200] + bytes(40) + content[scan + 240 :]
    image = Image.open(io.BytesIO(damaged))
    assert stored_pixels._jpeg_pixels(damaged, image) is None
    np.testing.assert_array_equal(decode_image(damaged), np.asarray(image))
    with pytest.raises(DamagedImageError, match="truncated"):
        decode_image(content[: scan + 200])


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pixels_are_turned_as_pillow_turns_them(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(drawing((30, 20)), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    np.testing.assert_array_equal(decode_image(content), np.asarray(expected))


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize("stored", [(11, 9), (300, 217), (40, 500)])
def test_photos_are_resized_alike_with_and_without_the_fast_package(
    monkeypatch, mode, resize, stored
):
    pixels = np.asarray(drawing(stored).convert(mode)).copy()
    if mode == "RGBA":
        pixels[..., 3] = pixels[..., 0] // 2 + 100
    found = to_square(pixels, 32, resize)
    monkeypatch.setattr(resampling, "fast", None)
    difference = np.abs(to_square(pixels, 32, resize).astype(int) - found)
    assert difference.max() <= (1 if mode == "RGB" else 3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"", "empty file"),
        (b"<html>not found</html>", "not an image but an HTML page"),
        (b"\r\n<!DOCTYPE html><title>404</title>", "not an image but an HTML page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known format"),
        (b"GIF89a" + bytes(7) + b";", "not an image"),
        (b"\0\0\0\x18ftypqt  " + bytes(40), "not an image of a known format"),
        (b"\0\0\0\x18ftypheic" + bytes(40), "."),
        (encode(halves(size=(400, 300)), "JPEG")[:500], "(?i)truncated"),
        (encode(halves(size=(400, 300)), "PNG")[:60], "."),
    ],
)
def test_damaged_content_is_refused_with_a_reason(content, reason):
    with pytest.raises(DamagedImageError, match=reason) as error:
        decode_image(content, 32)
    assert "\n" not in str(error.value)


# A program without TensorFlow, which would take far more memory than the images.
PEAK_OF_BOMBS = """
import pathlib, struct, sys, zlib
from research.data import decode, resampling, stored_pixels
from research.data.decode import DamagedImageError, decode_image
from research.data.thread_pool import pillow_warnings_hidden

def png(side):
    packer = zlib.compressobj(1)
    rows = [packer.compress(bytes((1 + side) * 1000)) for _ in range(side // 1000)]
    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", b"".join([*rows, packer.flush()])), (b"IEND", b"")]
    return b"\\x89PNG\\r\\n\\x1a\\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )

gif = struct.pack("<6sHHBBB", b"GIF89a", 60000, 60000, 128, 0, 0) + bytes(6)
gif += struct.pack("<BHHHHB", 44, 0, 0, 60000, 60000, 0) + b"\\2\\2\\x44\\1\\0;"
bmp = b"BM" + struct.pack("<IIIIiiHHIIiiII", 54, 0, 54, 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0)
tiny = pathlib.Path(sys.argv[1]).read_bytes()
frame = tiny.index(b"\\xff\\xc0") + 5
jpeg = tiny[:frame] + struct.pack(">HH", 65000, 65000) + tiny[frame + 4 :]
with pillow_warnings_hidden():
    for bomb in (png(20000), png(13000), gif, bmp, jpeg):
        try:
            decode_image(bomb, 64)
            print("decoded")
        except DamagedImageError as damage:
            print(damage)
status = pathlib.Path("/proc/self/status").read_text()  # getrusage would include the parent process
print(status.partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_a_decompression_bomb_is_refused_before_it_takes_memory(tmp_path):
    (tmp_path / "tiny.jpg").write_bytes(encode(halves(), "JPEG"))
    command = [sys.executable, "-W", "error", "-c", PEAK_OF_BOMBS, str(tmp_path / "tiny.jpg")]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.stderr == ""
    *reasons, peak = process.stdout.splitlines()
    assert len(reasons) == 5
    assert all("more than 120,000,000 pixels" in reason for reason in reasons)
    assert reasons[1].startswith("13,000 x 13,000 is ")
    assert int(peak) < 200 * 1024  # KiB; a PNG would take 500 MiB or more
