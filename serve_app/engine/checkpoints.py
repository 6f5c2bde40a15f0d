"""Saved denoising states: what is in one, how it lies in a file, and the store of them.

A checkpoint is a safetensors file: the tensors, and in its metadata the format's version, a JSON header and a SHA-256 over
header and tensors. The store is any place that fsspec can write to: a folder, or a URL such as `s3://bucket/checkpoints`
(with the extra `wan-serve[s3]`; endpoint and keys from the usual AWS variables). Importing this module imports no torch.
"""

import hashlib
import json
import os
import re
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import fsspec
from fsspec.implementations.local import LocalFileSystem

from serve_app.errors import CheckpointInvalid, CheckpointUnavailable, InvalidValue

if TYPE_CHECKING:
    import torch

FORMAT_VERSION = 1
"""Changes whenever an older reader would misread a newer file or the other way round; other versions are refused."""

_FORMAT = "wan-serve checkpoint"
_SUFFIX = ".safetensors"
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class CheckpointHeader:
    """Which clip a checkpoint is of, and how far that had come."""

    key: str
    made_from: dict[str, str | int | float | None]
    """All that decides the clip's bits: the request's fields (prompts as SHA-256) and the model. Must match to resume."""
    step: int
    """Denoising steps done; the request's number of steps where the tensors are the final latents."""
    gpu_s: float
    """Device seconds that led here, over all attempts, lost work not included."""
    step_s: tuple[float, ...] = ()
    """Device seconds of each step done, for the receipt."""
    resumed_from_steps: tuple[int, ...] = ()
    """Steps at which earlier attempts were taken up again."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A clip's state after a step, on the host: the header, and tensors by name."""

    header: CheckpointHeader
    tensors: dict[str, "torch.Tensor"]

    def to_bytes(self) -> bytes:
        """The file's content."""
        from safetensors.torch import save

        header = json.dumps(asdict(self.header))
        metadata = {
            "format": f"{_FORMAT} {FORMAT_VERSION}",
            "header": header,
            "sha256": _sha256(header, self.tensors),
        }
        return save(self.tensors, metadata)

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> "Checkpoint":
        """Read and verify a file's content. Raises `CheckpointInvalid`, naming `name`, for any damage or another version."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            (length,) = struct.unpack_from("<Q", data)
            metadata = json.loads(data[8 : 8 + length])["__metadata__"]
            form, header, sha256 = metadata["format"], metadata["header"], metadata["sha256"]
            if form != f"{_FORMAT} {FORMAT_VERSION}":
                raise CheckpointInvalid(f"checkpoint {name} is of format {form!r}, not version {FORMAT_VERSION}")
            tensors = load(data)
        except (struct.error, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointInvalid(f"checkpoint {name} is damaged: {type(error).__name__}: {error}") from error
        if (found := _sha256(header, tensors)) != sha256:
            raise CheckpointInvalid(f"checkpoint {name} is damaged: its SHA-256 is {found}, not {sha256}")
        values = json.loads(header)
        lists = {name: tuple(values[name]) for name in ("step_s", "resumed_from_steps")}
        return cls(CheckpointHeader(**(values | lists)), tensors)


@dataclass(frozen=True)
class StoredCheckpoint:
    """A file in the store."""

    key: str
    size_bytes: int


class CheckpointStore:
    """Checkpoints under keys such as `{job_id}/clip-0`, in a local folder or at any fsspec URL. Calls block.

    Safe to use from many threads and processes: a file appears whole (renamed into place locally, one request on object
    stores), and a torn one is found out by its hash. Every method raises `CheckpointUnavailable` where the store does not
    answer or refuses, and `InvalidValue` for a key that is not safe in every store.
    """

    def __init__(self, url: str) -> None:
        try:
            self._files, self._root = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ValueError, ImportError) as error:
            raise InvalidValue(
                f"checkpoint store {url!r} cannot be opened: {error}",
                hint="Give a folder, or an fsspec URL whose package is installed; for s3:// pip install 'wan-serve[s3]'.",
            ) from error

    def save(self, checkpoint: Checkpoint) -> int:
        """Store `checkpoint` under its key, replacing an earlier one; the size in bytes."""
        key, data = checkpoint.header.key, checkpoint.to_bytes()
        path = self._path(key)
        with _unavailable(f"checkpoint {key} could not be written"):
            if isinstance(self._files, LocalFileSystem):
                _replace_file(Path(path), data)
            else:
                self._files.pipe_file(path, data)
        return len(data)

    def load(self, key: str) -> Checkpoint | None:
        """The verified checkpoint of `key`, or None if there is none. Raises `CheckpointInvalid` for a damaged one."""
        with _unavailable(f"checkpoint {key} could not be read"):
            try:
                data = self._files.cat_file(self._path(key))
            except FileNotFoundError:
                return None
        return Checkpoint.from_bytes(data, key)

    def delete(self, prefix: str) -> None:
        """Remove the checkpoint `prefix` and all whose key starts with the folder `prefix`. Nothing there is no error."""
        path = self._path(prefix)
        with _unavailable(f"checkpoints of {prefix} could not be removed"):
            for found in (path, path.removesuffix(_SUFFIX)):
                with suppress(FileNotFoundError):
                    self._files.rm(found, recursive=True)

    def list(self) -> list[StoredCheckpoint]:
        """All checkpoints, so that a sweep finds those that no job owns."""
        with _unavailable("checkpoints could not be listed"):
            files = self._files.find(self._root, detail=True)
        return [
            StoredCheckpoint(path.removeprefix(self._root).strip("/").removesuffix(_SUFFIX), int(info["size"]))
            for path, info in sorted(files.items())
            if path.endswith(_SUFFIX)
        ]

    def _path(self, key: str) -> str:
        return f"{self._root.rstrip('/')}/{checked_key(key)}{_SUFFIX}"


def checked_key(key: str) -> str:
    """`key` itself if it is safe in every store, else `InvalidValue`.

    Parts between slashes are ASCII letters, digits, `.`, `_` and `-` and do not start with a dot: no way out of the folder.
    """
    if not all(_PART.fullmatch(part) for part in key.split("/")):
        raise InvalidValue(
            f"checkpoint_key is {key!r}; its parts must be ASCII letters, digits, '.', '_', '-', with no leading dot",
            param="checkpoint_key",
        )
    return key


def _sha256(header: str, tensors: dict[str, "torch.Tensor"]) -> str:
    import torch

    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _replace_file(path: Path, data: bytes) -> None:
    """Write `path` so that a reader, even after a power cut, finds the old content or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with unfinished.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _unavailable(what: str) -> Iterator[None]:
    """Turn whatever a file system raises (each has its own kinds) into `CheckpointUnavailable`."""
    try:
        yield
    except InvalidValue:
        raise
    except Exception as error:
        raise CheckpointUnavailable(f"{what}: {type(error).__name__}: {error}") from error
