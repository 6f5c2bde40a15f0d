"""The mark that every delivered file carries: made by AI, by which model, signed by whom (C2PA, https://spec.c2pa.org).

What is signed says which model of which version made the file, when, through which service, for which job, and the
SHA-256 of the job's `receipt.json`. The prompt and the rest of the receipt are not in it: files are passed on to people
whom they do not concern, and the hash still binds the two together.
"""

import hashlib
import tempfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import c2pa
from PIL import Image

from serve_app import __version__
from serve_app.errors import MediaError
from serve_app.jobs.receipt import RECEIPT_NAME
from serve_app.media.certificates import SigningCertificate, open_certificate
from serve_app.media.whole import os_error, written_whole
from serve_app.media.xmp import MADE_BY_AI, add_xmp
from serve_app.settings import Settings

SERVICE = "wan-serve"
RECEIPT_LABEL = "wan-serve.receipt"
"""Our own assertion in a manifest: `job_id`, `name` and `sha256` of the receipt."""
BUILDER_SETTINGS = {
    "core": {"backing_store_memory_threshold_in_mb": 32},
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_after_sign": True},
}
"""Files of over 32 MB pass through the disk: the library would hold them in memory, twice. Without a thumbnail, which would be larger
than the rest and show what the file shows."""


@dataclass(frozen=True)
class Origin:
    """What a file's manifest says about how it came to be."""

    model: str
    model_revision: str | None
    job_id: str
    receipt_sha256: str
    upscaled_by: str | None = None
    """The network, where the file shows more pixels than the model made."""


TRIAL = Origin(model="trial", model_revision=None, job_id="trial", receipt_sha256="0" * 64)


def origin_of(receipt: dict[str, Any], content: bytes) -> Origin:
    """The origin of the files of a job's `receipt`, which is delivered as `content`."""
    model = receipt["model"]
    return Origin(
        model=Path(model).name if Path(model).is_absolute() else model,  # where it lies is nobody's business
        model_revision=receipt["model_revision"],
        job_id=receipt["job_id"],
        receipt_sha256=hashlib.sha256(content).hexdigest(),
        upscaled_by=receipt["upscale"]["model"] if "upscale" in receipt else None,
    )


def mark(path: Path, content_type: str, origin: Origin, certificate: SigningCertificate) -> None:
    """Let the file at `path` say in XMP and in a signed C2PA manifest that it was made by AI, and how.

    This must be the last change of the file: any later one, a remux too, breaks or drops the signature. An MP4's index
    stays before its data. Blocks; sends a request where the certificate has a `timestamp_url`. Raises MediaError.
    """
    try:
        add_xmp(path, content_type)
        with written_whole(path) as part, path.open("rb") as source, part.open("w+b") as target:
            _sign(source, target, content_type, _manifest(path.name, origin), certificate)
    except OSError as error:
        raise os_error(error, path) from error
    except c2pa.C2paError as error:
        hint = "Check c2pa_certificate and c2pa_private_key with: wan-serve doctor"
        if certificate.timestamp_url:
            hint += f"; and that c2pa_timestamp_url, {certificate.timestamp_url}, answers"
        raise MediaError(f"{path.name} could not be signed: {error}", hint=hint) from error


def _sign(
    source: Any, target: Any, content_type: str, manifest: dict[str, Any], certificate: SigningCertificate
) -> None:
    info = c2pa.C2paSignerInfo(
        certificate.algorithm, certificate.chain_pem, certificate.key_pem, certificate.timestamp_url
    )
    with (
        c2pa.Context.from_dict(BUILDER_SETTINGS) as context,
        c2pa.Signer.from_info(info) as signer,
        c2pa.Builder(manifest, context=context) as builder,
    ):
        builder.sign(signer, content_type, source, target)


def _manifest(title: str, origin: Origin) -> dict[str, Any]:
    """A manifest definition in the C2PA library's JSON form."""
    agent = {"name": origin.model}
    if origin.model_revision:
        agent["version"] = origin.model_revision
    now = datetime.now(UTC).isoformat(timespec="seconds")
    actions = [{"action": "c2pa.created", "when": now, "digitalSourceType": MADE_BY_AI, "softwareAgent": agent}]
    if origin.upscaled_by:
        actions.append({"action": "c2pa.resized", "when": now, "softwareAgent": {"name": origin.upscaled_by}})
    receipt = {"job_id": origin.job_id, "name": RECEIPT_NAME, "sha256": origin.receipt_sha256}
    return {
        "title": title,
        "claim_generator_info": [{"name": SERVICE, "version": __version__}],
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": RECEIPT_LABEL, "kind": "Json", "data": receipt},
        ],
    }


def ready_certificate(settings: Settings) -> SigningCertificate:
    """The certificate that signs, after it has signed a picture on trial (without a timestamp).

    A certificate for TLS, say, is refused here and not after a job has used a GPU for minutes. Blocks for some
    milliseconds. Raises MediaError, naming the setting.
    """
    certificate = open_certificate(settings)
    with tempfile.TemporaryDirectory() as folder:
        trial = Path(folder) / "trial.png"
        Image.new("RGB", (1, 1)).save(trial)
        try:
            mark(
                trial,
                "image/png",
                TRIAL,
                replace(certificate, timestamp_url=None),
            )
        except MediaError as error:
            raise MediaError(
                f"c2pa_certificate: nothing can be signed with {certificate.common_name!r}: {error.message}",
                hint="C2PA wants an end-entity certificate of version 3 with the key usage digitalSignature, the extended key "
                "usage emailProtection, documentSigning or C2PA's own, and an authority key identifier; not a self-signed one.",
            ) from error
    return certificate
