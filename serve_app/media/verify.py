"""What a file says about its origin, read back with the C2PA library, and whether that can be believed."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import c2pa
from av.error import FFmpegError
from PIL import Image, UnidentifiedImageError

from serve_app.media.certificates import DEVELOPMENT
from serve_app.media.provenance import RECEIPT_LABEL
from serve_app.media.xmp import MADE_BY_AI


@dataclass(frozen=True)
class Provenance:
    """What was read from a file. Without `problems` it is what it says, signed by somebody trusted, and unchanged."""

    says_ai_in_xmp: bool
    """Whether its XMP has IPTC's digital source type of media made by a trained model. Not signed by itself."""
    says_ai_in_manifest: bool = False
    """Whether its C2PA manifest begins with a `c2pa.created` action of that source type."""
    signer: str | None = None
    """Common name and organization of the certificate."""
    is_development: bool = False
    """Whether the certificate is one that wan-serve makes for development."""
    model: str | None = None
    model_version: str | None = None
    upscaled_by: str | None = None
    """The network that made it larger."""
    service: str | None = None
    """Name and version of what made the claim."""
    made_at: str | None = None
    """ISO 8601, by the signer's clock."""
    timestamped_at: str | None = None
    """ISO 8601, by a timestamp authority that the trusted root certificates vouch for."""
    job_id: str | None = None
    receipt_sha256: str | None = None
    problems: list[str] = field(default_factory=list)
    """A sentence for each reason not to believe it."""


def read_provenance(path: Path, *, anchors_pem: str | None = None, receipt: Path | None = None) -> Provenance:
    """Read all that the file at `path` says, and check it.

    `anchors_pem`: root certificates to trust, concatenated; without them nobody is. `receipt`: the `receipt.json` that must be
    the one of this file. Asks nothing of the network. Raises OSError where a file cannot be read.
    """
    xmp = read_xmp(path)
    says_ai_in_xmp = xmp is not None and MADE_BY_AI in xmp
    settings: dict[str, Any] = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
    if anchors_pem:
        settings["trust"] = {"user_anchors": anchors_pem}
    try:
        with (
            path.open("rb") as file,
            c2pa.Context.from_dict(settings) as context,
            c2pa.Reader(None, file, context=context) as reader,
        ):
            manifest, results = reader.get_active_manifest(), reader.get_validation_results()
    except c2pa.C2paError.ManifestNotFound:
        also = "its XMP says that it was made by AI" if says_ai_in_xmp else "its XMP says nothing of AI"
        return Provenance(
            says_ai_in_xmp=says_ai_in_xmp,
            problems=[
                "it has no C2PA manifest: either none was ever made, or something has removed it since, as an editor, a "
                f"converter or a messenger does ({also})"
            ],
        )
    except c2pa.C2paError as error:
        return Provenance(says_ai_in_xmp=says_ai_in_xmp, problems=[f"its C2PA manifest cannot be read: {error}"])
    return _judged(says_ai_in_xmp, manifest or {}, (results or {}).get("activeManifest", {}), receipt)


def _judged(
    says_ai_in_xmp: bool, manifest: dict[str, Any], results: dict[str, Any], receipt: Path | None
) -> Provenance:
    """`manifest` and `results` are the C2PA library's JSON."""
    assertions = {one["label"]: one["data"] for one in manifest.get("assertions", [])}
    actions = assertions.get("c2pa.actions.v2", assertions.get("c2pa.actions", {})).get("actions", [])
    created: dict[str, Any] = next((one for one in actions if one["action"] == "c2pa.created"), {})
    agent = created.get("softwareAgent") or {}
    resized: dict[str, Any] = next((one for one in actions if one["action"] == "c2pa.resized"), {})
    signature, claim = manifest.get("signature_info") or {}, (manifest.get("claim_generator_info") or [{}])[0]
    about_receipt = assertions.get(RECEIPT_LABEL, {})
    says_ai = created.get("digitalSourceType") == MADE_BY_AI
    signer = ", ".join(part for part in (signature.get("common_name"), signature.get("issuer")) if part) or None

    is_timestamped = any(one["code"] == "timeStamp.trusted" for one in results.get("success", []))
    problems = [_sentence(one, signer) for one in results.get("failure", [])]
    if not results:
        problems.append("the C2PA library did not validate it")
    if not says_ai:
        problems.append("its C2PA manifest does not say that it was made by AI")
    if receipt is not None:
        problems += _receipt_problems(receipt, about_receipt.get("sha256"))
    return Provenance(
        says_ai_in_xmp=says_ai_in_xmp,
        says_ai_in_manifest=says_ai,
        signer=signer,
        is_development=signature.get("issuer") == DEVELOPMENT,
        model=agent.get("name"),
        model_version=agent.get("version"),
        upscaled_by=(resized.get("softwareAgent") or {}).get("name"),
        service=" ".join(part for part in (claim.get("name"), claim.get("version")) if part) or None,
        made_at=created.get("when"),
        timestamped_at=signature.get("time") if is_timestamped else None,
        job_id=about_receipt.get("job_id"),
        receipt_sha256=about_receipt.get("sha256"),
        problems=problems,
    )


def _sentence(failure: dict[str, str], signer: str | None) -> str:
    """A failure of the C2PA library's validation in words; its codes are those of the specification, section 15."""
    code = failure["code"]
    if code == "signingCredential.untrusted":
        return f"it is signed by {signer}, for whom none of the trusted root certificates vouches"
    if code == "signingCredential.expired":
        return f"the certificate of {signer} was not in force when it was signed, or has expired since and no timestamp tells"
    if code.endswith("mismatch"):
        return f"it was changed after it was signed ({code})"
    return f"{failure.get('explanation') or 'validation failed'} ({code})"


def _receipt_problems(receipt: Path, sha256: str | None) -> list[str]:
    found = hashlib.sha256(receipt.read_bytes()).hexdigest()
    if sha256 is None:
        return [f"its manifest names no receipt, so {receipt.name} cannot be shown to be its own"]
    if found != sha256:
        return [f"{receipt.name} is not its receipt: its SHA-256 is {found}, the manifest says {sha256}"]
    return []


def read_xmp(path: Path) -> str | None:
    """The XMP packet of a PNG, JPEG, WebP or MP4 as text, or None where there is none or the file cannot be read as one."""
    try:
        with Image.open(path) as image:
            found = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
        return found.decode(errors="replace") if isinstance(found, bytes) else found
    except UnidentifiedImageError:
        pass
    try:
        with av.open(str(path), options={"export_xmp": "1"}) as container:
            return container.metadata.get("xmp")
    except FFmpegError:
        return None
