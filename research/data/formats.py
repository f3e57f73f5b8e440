"""The image formats that are read, and names for others."""

from __future__ import annotations

import functools
import importlib.util

# By default Pillow tries every format it knows, including formats that start another program.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "AVIF", "PPM")
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Returns `FORMATS`, and HEIC if the package pillow-heif is installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return FORMATS
    import pillow_heif

    pillow_heif.register_heif_opener()
    return (*FORMATS, "HEIF")


def unknown_format(encoded: bytes) -> str:
    """Returns what the content of a file is that is in none of the formats."""
    if encoded[4:8] == b"ftyp" and encoded[8:12] in HEIC_BRANDS:
        return "HEIC, which needs the package pillow-heif: pip install -e '.[heic]'"
    # A failed download often stores an HTML page under the name of the image.
    if encoded[:1000].lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "not an image but an HTML page"
    return "not an image of a known format"
