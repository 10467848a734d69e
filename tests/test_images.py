"""Images: what names one, reading and fetching it, and its place in a conversation."""

from __future__ import annotations

import base64
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vision_models import picture

from lit_peft.data import images
from lit_peft.data.image_messages import place_images
from lit_peft.data.images import ImageSource, image_source, read_image

TEXT = {"type": "text", "text": "What?"}


def png(number: int = 0) -> bytes:
    stream = io.BytesIO()
    picture(number).save(stream, format="PNG")
    return stream.getvalue()


def test_an_image_with_too_many_pixels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_PIXELS", 60 * 40 - 1)
    with pytest.raises(ValueError, match=r"more than 2,399 pixels"):
        read_image(ImageSource("", png()))


def test_images_are_upright_and_without_transparency(tmp_path: Path) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture(0).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(ImageSource(str(tmp_path / "turned.jpg"), b"")).size == (40, 60)
    assert read_image(image_source(Image.new("RGBA", (4, 4), (9, 8, 7, 255)))).getpixel((0, 0)) == (9, 8, 7)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "0.png").write_bytes(png())

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def do_GET(self) -> None:
            if self.path == "/away":
                self.send_response(302)
                self.send_header("Location", "ftp://127.0.0.1/0.png")
                self.end_headers()
            else:
                super().do_GET()

        def log_message(self, *arguments: Any) -> None:
            pass

    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_address[1]}"
    found.shutdown()
    found.server_close()


def test_addresses_are_fetched_once_if_allowed(
    server: str, tmp_path: Path, new_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"{server}/0.png"
    source = image_source({"url": address}, urls=True)
    assert read_image(source).tobytes() == picture(0).tobytes()
    (tmp_path / "0.png").unlink()
    assert image_source(address, urls=True) == source
    with pytest.raises(ValueError, match="could not be fetched"):
        image_source(f"{server}/1.png", urls=True)
    with pytest.raises(ValueError, match=r"could not be fetched .*redirects to 'ftp:"):
        image_source(f"{server}/away", urls=True)
    (tmp_path / "2.png").write_bytes(bytes(100))
    monkeypatch.setattr(images, "_MOST_BYTES", 99)
    with pytest.raises(ValueError, match="has more than"):
        image_source(f"{server}/2.png", urls=True)


def test_places_of_images_that_messages_name_and_of_the_column() -> None:
    located: list[Any] = []

    def locate(value: Any) -> ImageSource:
        located.append(value)
        return ImageSource(str(value), b"")

    parts = [{"type": "image"}, {"type": "text", "text": "and <image>"}]
    messages, found = place_images(
        [{"role": "user", "content": parts}, {"role": "assistant", "content": "red"}], ["a", None, "b"], locate
    )
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text", "image"]
    assert [source.path for source in found] == ["a", "b"] == located


def test_the_forms_of_providers_name_their_images_and_texts() -> None:
    """Anthropic's messages, and those of OpenAI's Responses."""
    code = base64.b64encode(png()).decode()
    messages = [
        {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": code}}, TEXT]},
        {
            "role": "user",
            "content": [
                {"type": "input_image", "image_url": f"data:image/png;base64,{code}"},
                {"type": "input_text", "text": "What?"},
            ],
        },
    ]
    placed, found = place_images(messages, None, image_source)
    assert [message["content"] for message in placed] == [[{"type": "image"}, TEXT]] * 2
    assert found == [ImageSource("", png())] * 2
