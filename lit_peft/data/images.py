"""Images: what names one in a row, and reading it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import urllib.request
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from filelock import FileLock

from lit_peft.models.sources import cache_root
from lit_peft.util.disk import whole_file
from lit_peft.util.errors import LitPeftError, first_line
from lit_peft.util.type_checks import brief

if TYPE_CHECKING:
    from PIL import Image

# An image that is fetched may have this many bytes, and take this many seconds to answer.
_MOST_BYTES, _SECONDS = 2**25, 20
# An image may have this many pixels: more would take a gigabyte of memory.
MOST_PIXELS = 80_000_000
# The keys of an object that names an image.
KEYS = ("image", "path", "url", "image_url", "base64", "bytes", "data", "source")
_DATA_URI = "data:"


class ImageSource(NamedTuple):
    """Where an image is: a file, or its bytes.

    Attributes:
        path: the file; "" if there are bytes.
        data: the bytes of the image's file; empty if there is a path.
    """

    path: str
    data: bytes

    def digest(self) -> str:
        """Return a text that is the same for the same image."""
        return self.path or hashlib.sha256(self.data).hexdigest()


def image_source(value: Any, folder: str = "", urls: bool = False) -> ImageSource:
    """Return where an image is.

    Args:
        value: a path, a URL, a `data:` URI, bytes, a PIL image, or an object with one of these, such as OpenAI's
            `{"url": ...}`, Anthropic's `{"source": {"data": ...}}` and datasets' `{"bytes": ..., "path": ...}`.
        folder: where relative paths start.
        urls: images may be fetched from http and https addresses.

    Raises:
        ValueError: it names no image, or one that may not be fetched; the text says why.
    """
    if isinstance(value, dict):
        found = {key: value[key] for key in KEYS if value.get(key) is not None}
        # datasets keeps the name of a file next to its bytes.
        first = "bytes" if "bytes" in found else next(iter(found), None)
        if first is None:
            raise ValueError(f"{brief(value)} names no image; give its path, url, base64 or bytes")
        found_value = found[first]
        if first == "base64" or (first == "data" and isinstance(found_value, str)):
            return ImageSource("", _decoded(found_value))
        return image_source(found_value, folder, urls)
    if isinstance(value, (bytes, bytearray)):
        return ImageSource("", bytes(value))
    if isinstance(value, str) and value.strip():
        return _of_text(value.strip(), folder, urls)
    if hasattr(value, "save") and hasattr(value, "mode"):  # a PIL image
        stream = io.BytesIO()
        value.save(stream, format="PNG")
        return ImageSource("", stream.getvalue())
    raise ValueError(f"{brief(value)} is no image; give a path, a URL, bytes or an object with one of them")


def _of_text(text: str, folder: str, urls: bool) -> ImageSource:
    if text.startswith(_DATA_URI):
        return ImageSource("", _decoded(text.partition(",")[2]))
    scheme = urlsplit(text).scheme.lower() if "://" in text else ""
    if scheme == "file":
        text, scheme = urllib.request.url2pathname(urlsplit(text).path), ""
    if not scheme:
        return ImageSource(str(Path(folder, text).expanduser()), b"")
    if scheme not in ("http", "https"):
        raise ValueError(f"the image {brief(text)} has an address that is neither http nor https; copy the file")
    if not urls:
        raise ValueError(
            f"the image {brief(text)} is an address, and data.image_urls is not set; set it to fetch images, or copy "
            "the file to this machine"
        )
    return ImageSource(str(fetch(text)), b"")


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as problem:
        raise ValueError(f"an image is not valid base64 ({problem})") from problem


class _HttpOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).scheme.lower() not in ("http", "https"):
            raise OSError(f"it redirects to {newurl[:80]!r}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str) -> Path:
    """Return the cached copy of an image at an http or https address, which is fetched once.

    Raises:
        ValueError: it cannot be fetched, or is too large; the text says why.
    """
    target = cache_root() / "images" / hashlib.sha256(url.encode()).hexdigest()[:32]
    if target.is_file():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_file():
                with urllib.request.build_opener(_HttpOnly).open(url, timeout=_SECONDS) as answer:
                    content = answer.read(_MOST_BYTES + 1)
                if len(content) > _MOST_BYTES:
                    raise ValueError(f"the image {brief(url)} has more than {_MOST_BYTES // 2**20} MiB; copy the file")
                with whole_file(target) as temporary:
                    temporary.write_bytes(content)
    except OSError as problem:  # urllib's errors are of this type
        raise ValueError(f"the image {brief(url)} could not be fetched ({first_line(problem)})") from problem
    return target


def read_image(source: ImageSource) -> Image.Image:
    """Read an image, turned upright as its EXIF data say, in RGB.

    Raises:
        ValueError: it cannot be read, or has too many pixels; the text says why.
        LitPeftError: Pillow is missing.
    """
    require_pillow()
    from PIL import Image, ImageOps

    name = f"the image {brief(source.path, 300)}" if source.path else f"an image of {len(source.data):,} bytes"
    # Of a text that is too long for a name, `Path.is_file` raises an error.
    if source.path and not os.path.isfile(source.path):
        raise ValueError(f"{name} does not exist; correct the path, or set data.image_folder")
    try:
        with warnings.catch_warnings():
            # Of too many pixels, Pillow warns as soon as it has read the size.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source.path or io.BytesIO(source.data)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
                return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise ValueError(f"{name} has more than {MOST_PIXELS:,} pixels; make it smaller") from problem
    except Exception as problem:  # a broken file may raise anything
        raise ValueError(f"{name} cannot be read ({first_line(problem)})") from problem


def require_pillow() -> None:
    """Check that Pillow is installed.

    Raises:
        LitPeftError: it is not.
    """
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise LitPeftError(
            'Images are read by Pillow, which is not installed: `pip install "lit-peft[vision]"`.'
        ) from None
