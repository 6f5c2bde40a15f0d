"""Every delivered file says that it was made by AI; the C2PA library itself reads it back, and XMP is read byte by byte."""

import asyncio
import hashlib
import io
import json
import multiprocessing
import shutil
import socket
import struct
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import c2pa
import numpy as np
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from PIL import Image
from pydantic import ValidationError
from typer.testing import CliRunner

from deployments.finisher import Finisher
from serve_app.cli import app
from serve_app.doctor import Finding, Verdict, examine
from serve_app.errors import MediaError
from serve_app.jobs.job import Artifact
from serve_app.jobs.presets import JobType
from serve_app.media.certificates import DEVELOPMENT, development_root, open_certificate
from serve_app.media.encode import encode_video
from serve_app.media.finish import make_files
from serve_app.media.probe import check, probe
from serve_app.media.provenance import Origin, mark, ready_certificate
from serve_app.media.verify import read_provenance
from serve_app.settings import Settings
from tests.certificates import open_in, write_chain
from tests.factories import make_job, make_spec
from tests.media_content import decode_rgb, moving_frames
from tests.timestamp_authority import timestamp_authority

AI = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
PROMPT = "a secret prompt about a paper boat"
RECEIPT = {
    "job_id": "01a2",
    "model": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    "model_revision": "0fad780",
    "spec": {"prompt": PROMPT},
    "gpu_s": 12.5,
}
MEDIA = [("image.png", "image/png"), ("poster.jpg", "image/jpeg"), ("video.mp4", "video/mp4")]
ORIGIN = Origin(model="a model", model_revision=None, job_id="j", receipt_sha256="0" * 64)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> Settings:
    return Settings(data_dir=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def root_pem(settings) -> str:
    open_certificate(settings)
    return development_root(settings.provenance_dir).read_text()


@pytest.fixture(scope="module")
def delivered(settings, tmp_path_factory) -> tuple[Path, dict[str, Artifact]]:
    """What a picture job and a video job of one receipt deliver, in one folder."""
    folder, certificate, artifacts = tmp_path_factory.mktemp("delivered"), ready_certificate(settings), []
    for type, frames in ((JobType.IMAGE_FAST, 1), (JobType.VIDEO_FAST, 5)):
        spec = make_spec(type, video_length=frames)
        artifacts += make_files(
            spec, [moving_frames(frames)], folder, settings, receipt=RECEIPT, certificate=certificate
        )
    return folder, {artifact.name: artifact for artifact in artifacts}


def _read(path: Path, anchors: str) -> tuple[str, dict[str, Any], list[str]]:
    """The C2PA library's own verdict, the active manifest, and the codes of what failed."""
    context = c2pa.Context.from_dict({"trust": {"user_anchors": anchors}})
    with context, c2pa.Reader(str(path), context=context) as reader:
        failed = reader.get_validation_results()["activeManifest"]["failure"]
        return reader.get_validation_state(), reader.get_active_manifest(), [one["code"] for one in failed]


@pytest.mark.parametrize(("name", "content_type"), MEDIA)
def test_the_library_reads_back_what_was_signed(name, content_type, delivered, root_pem):
    folder, artifacts = delivered
    state, manifest, failed = _read(folder / name, root_pem)
    assert (state, failed) == ("Trusted", [])
    assert manifest["claim_generator_info"][0]["name"] == "wan-serve"
    assertions = {one["label"]: one["data"] for one in manifest["assertions"]}
    (action,) = assertions["c2pa.actions.v2"]["actions"]
    assert (action["action"], action["digitalSourceType"]) == ("c2pa.created", AI)
    assert action["softwareAgent"] == {"name": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "version": "0fad780"}
    assert datetime.fromisoformat(action["when"]).tzinfo
    receipt = assertions["wan-serve.receipt"]
    assert receipt["job_id"] == "01a2"
    assert receipt["sha256"] == hashlib.sha256((folder / receipt["name"]).read_bytes()).hexdigest()
    assert artifacts[name].content_type == content_type


def test_the_record_describes_the_files_as_signed(delivered):
    folder, artifacts = delivered
    assert set(artifacts) == {path.name for path in folder.iterdir()} == {*dict(MEDIA), "receipt.json"}
    for name, artifact in artifacts.items():
        content = (folder / name).read_bytes()
        assert (artifact.size_bytes, artifact.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert artifacts["receipt.json"].content_type == "application/json"
    assert json.loads((folder / "receipt.json").read_text()) == RECEIPT


@pytest.mark.parametrize("name", dict(MEDIA))
def test_the_prompt_is_not_in_the_file(name, delivered):
    assert PROMPT.encode() not in (delivered[0] / name).read_bytes()


def test_a_models_folder_is_not_told(settings, tmp_path):
    receipt = RECEIPT | {"model": "/srv/secret/place/our-model", "model_revision": None}
    spec, certificate = make_spec(), open_certificate(settings)
    make_files(spec, [moving_frames(1)], tmp_path, settings, receipt=receipt, certificate=certificate)
    assert read_provenance(tmp_path / "image.png").model == "our-model"
    assert b"/srv/secret" not in (tmp_path / "image.png").read_bytes()


def test_marking_changes_nothing_that_is_seen(settings, tmp_path):
    video = tmp_path / "v.mp4"
    encode_video(moving_frames(9, 128, 96), video, fps=16, crf=18, preset="veryfast", timeout_s=60)
    before, facts = decode_rgb(video), probe(video)
    mark(video, "video/mp4", ORIGIN, open_certificate(settings))
    assert np.array_equal(decode_rgb(video), before)
    check(probe(video), frames=9, fps=16, duration_s=facts.duration_s, faststart=True)
    assert list(tmp_path.iterdir()) == [video]


# ---- XMP, parsed here from the bytes --------------------------------------------------------------------------------


def _png_xmp(content: bytes) -> Iterator[bytes]:
    at = 8
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        data, crc = content[at + 8 : at + 8 + length], content[at + 8 + length : at + 12 + length]
        assert zlib.crc32(kind + data) == int.from_bytes(crc)
        keyword, _, rest = data.partition(b"\0")
        if kind == b"iTXt" and keyword == b"XML:com.adobe.xmp":
            assert rest[:2] == b"\0\0", "not compressed"
            yield rest[2:].split(b"\0", 2)[2]
        at += 12 + length


def _jpeg_xmp(content: bytes) -> Iterator[bytes]:
    at = 2
    while content[at + 1] != 0xDA:
        length = int.from_bytes(content[at + 2 : at + 4])
        data = content[at + 4 : at + 2 + length]
        if content[at + 1] == 0xE1 and data.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            yield data.split(b"\0", 1)[1]
        at += 2 + length


def _mp4_xmp(content: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        if kind == b"uuid" and content[at + 8 : at + 24].hex() == "be7acfcb97a942e89c71999491e3afac":
            yield content[at + 24 : at + size]
        at += size
    assert at == len(content)


@pytest.mark.parametrize(("name", "find"), [(MEDIA[0][0], _png_xmp), (MEDIA[1][0], _jpeg_xmp), (MEDIA[2][0], _mp4_xmp)])
def test_xmp_says_so_too(name, find, delivered):
    (packet,) = find((delivered[0] / name).read_bytes())
    (description,) = ET.fromstring(packet.decode()).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert description.get("{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType") == AI
    assert read_provenance(delivered[0] / name).says_ai_in_xmp


# ---- what must be noticed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        ("image.png", b"IDAT", 44, "assertion.dataHash.mismatch"),
        ("image.png", b"Iptc4xmpExt:Digital", 0, "assertion.dataHash.mismatch"),
        ("image.png", b"Wan-AI/", 0, "assertion.hashedURI.mismatch"),
        ("poster.jpg", b"\xff\xda", 42, "assertion.dataHash.mismatch"),
        ("video.mp4", b"mdat", 44, "assertion.bmffHash.mismatch"),
        ("video.mp4", b"moov", 0, "assertion.bmffHash.mismatch"),
        ("video.mp4", b"Iptc4xmpExt:Digital", 0, "assertion.bmffHash.mismatch"),
        ("video.mp4", b"Wan-AI/", 0, "assertion.hashedURI.mismatch"),
    ],
    ids=lambda case: f"{case[0]} {case[1]!r}",
)
def test_a_changed_byte_is_noticed(case, delivered, root_pem, tmp_path):
    name, place, after, code = case
    content = bytearray((delivered[0] / name).read_bytes())
    content[content.index(place) + after] ^= 1
    (tmp_path / name).write_bytes(content)
    state, _, failed = _read(tmp_path / name, root_pem)
    assert state == "Invalid"
    assert code in failed
    found = read_provenance(tmp_path / name, anchors_pem=root_pem)
    assert f"it was changed after it was signed ({code})" in found.problems


def _chunks(content: bytes, is_png: bool) -> Iterator[tuple[bytes, range]]:
    """Kind and place of each chunk of a PNG, or box of an MP4."""
    at = 8 if is_png else 0
    while at < len(content):
        size, kind = struct.unpack(">I4s", content[at : at + 8])
        size += 12 * is_png
        yield kind, range(at, at + size)
        at += size


@pytest.mark.parametrize(("name", "not_covered"), [("x.png", [b"caBX"]), ("x.mp4", [b"ftyp", b"uuid", b"free"])])
def test_every_byte_outside_the_manifest_counts(name, not_covered, settings, root_pem, tmp_path):
    """Of a tiny picture and a tiny video. The XMP of the video, a uuid box like the manifest, is in the test above."""
    path, is_png = tmp_path / name, name == "x.png"
    content_type = "image/png" if is_png else "video/mp4"
    if is_png:
        Image.new("RGB", (8, 8)).save(path)
    else:
        encode_video(moving_frames(1, 32, 32), path, fps=16, crf=40, preset="veryfast", timeout_s=60)
    mark(path, content_type, ORIGIN, open_certificate(settings))
    content, unnoticed = bytearray(path.read_bytes()), []
    covered = [at for kind, place in _chunks(content, is_png) if kind not in not_covered for at in place]
    assert len(covered) > 400
    with c2pa.Context.from_dict({"trust": {"user_anchors": root_pem}}) as context:
        for at in covered:
            content[at] ^= 1
            try:
                with c2pa.Reader(content_type, io.BytesIO(content), context=context) as reader:
                    if reader.get_validation_state() != "Invalid":
                        unnoticed.append(at)
            except c2pa.C2paError:  # it is no such file any more
                pass
            content[at] ^= 1
    assert unnoticed == []


def test_a_file_that_was_saved_again_has_no_manifest(delivered, root_pem, tmp_path):
    with Image.open(delivered[0] / "image.png") as image:
        image.save(tmp_path / "again.png")
    (problem,) = read_provenance(tmp_path / "again.png", anchors_pem=root_pem).problems
    assert "no C2PA manifest" in problem


def test_what_is_neither_picture_nor_video(root_pem, tmp_path):
    (tmp_path / "x.png").write_bytes(b"not a picture")
    (problem,) = read_provenance(tmp_path / "x.png", anchors_pem=root_pem).problems
    assert "cannot be read" in problem


def test_a_manifest_that_does_not_say_ai_is_not_enough(settings, root_pem, tmp_path):
    certificate = open_certificate(settings)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    info = c2pa.C2paSignerInfo(certificate.algorithm, certificate.chain_pem, certificate.key_pem, None)
    camera = {"action": "c2pa.created", "digitalSourceType": AI.replace("trainedAlgorithmicMedia", "digitalCapture")}
    manifest = {"assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [camera]}}]}
    with c2pa.Signer.from_info(info) as signer, c2pa.Builder(manifest) as builder:
        builder.sign_file(tmp_path / "x.png", tmp_path / "y.png", signer)
    (problem,) = read_provenance(tmp_path / "y.png", anchors_pem=root_pem).problems
    assert "does not say that it was made by AI" in problem


# ---- certificates ---------------------------------------------------------------------------------------------------


def test_the_development_certificate_says_so_and_is_trusted_at_home_only(delivered, settings, root_pem, tmp_path):
    image = delivered[0] / "image.png"
    home = read_provenance(image, anchors_pem=root_pem)
    assert (home.problems, home.is_development) == ([], True)
    assert DEVELOPMENT in home.signer
    open_certificate(Settings(data_dir=tmp_path))
    elsewhere = development_root(tmp_path / "provenance").read_text()
    for anchors in (None, elsewhere):  # the other root has the same name, and another key
        (problem,) = read_provenance(image, anchors_pem=anchors).problems
        assert "none of the trusted root certificates vouches" in problem


def test_the_development_certificate_is_made_once(tmp_path):
    """Also when several finishers start at the same moment."""
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        chains = pool.map(open_in, [tmp_path] * 4)
    assert set(chains) == {open_in(tmp_path)}
    assert (tmp_path / "provenance" / "development.pem").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["es256", "es384", "ps256", "ed25519"])
def test_the_operators_certificate_signs(kind, tmp_path):
    chain = write_chain(tmp_path / "pki", kind)
    settings = Settings(data_dir=tmp_path, c2pa_certificate=chain.certificate, c2pa_private_key=chain.key)
    certificate = ready_certificate(settings)
    assert certificate.algorithm == kind
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    mark(tmp_path / "x.png", "image/png", ORIGIN, certificate)
    found = read_provenance(tmp_path / "x.png", anchors_pem=chain.root.read_text())
    assert (found.problems, found.signer, found.is_development) == ([], "Example signer, Example Studio", False)
    assert not (tmp_path / "provenance").exists()


def _signing(settings: Settings) -> Finding:
    return next(one for one in examine(settings) if one.name == "signing")


def _bad(tmp_path: Path, what: str) -> dict[str, Path]:
    good, other = write_chain(tmp_path / "good"), write_chain(tmp_path / "other")
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("-----BEGIN PRIVATE KEY-----\nc2VjcmV0\n-----END PRIVATE KEY-----\n")
    certificate, key = {
        "another key": (good.certificate, other.key),
        "root first": (good.root, good.key),
        "no key there": (good.certificate, tmp_path / "missing.pem"),
        "no key in it": (good.certificate, garbage),
        "no certificate there": (tmp_path / "missing.pem", good.key),
        "no certificate in it": (good.key, good.key),
    }.get(what, (None, None))
    if certificate is None:
        changes = {
            "for TLS": {"usage": ExtendedKeyUsageOID.SERVER_AUTH},
            "expired": {"days": -1},
            "encrypted": {"passphrase": b"open sesame"},
            "odd curve": {"kind": "a curve that C2PA does not know"},
        }[what]
        bad = write_chain(tmp_path / "bad", **changes)
        certificate, key = bad.certificate, bad.key
    return {"c2pa_certificate": certificate, "c2pa_private_key": key}


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("another key", "c2pa_private_key: .*is not the key of the first certificate"),
        ("root first", "c2pa_private_key: .*is not the key of the first certificate"),
        ("no key there", "c2pa_private_key: .*missing.pem cannot be read: No such file"),
        ("no key in it", "c2pa_private_key: .*holds no PEM private key"),
        ("encrypted", "c2pa_private_key: .*is encrypted"),
        ("odd curve", "c2pa_private_key: .*a kind that C2PA does not know"),
        ("no certificate there", "c2pa_certificate: .*missing.pem cannot be read"),
        ("no certificate in it", "c2pa_certificate: .*holds no PEM certificate"),
        ("for TLS", "c2pa_certificate: nothing can be signed with 'Example signer'"),
        ("expired", "c2pa_certificate: .*in force from"),
    ],
)
def test_a_finisher_does_not_start_with_a_bad_certificate(what, words, tmp_path):
    settings = Settings(data_dir=tmp_path, **_bad(tmp_path, what))
    with pytest.raises(MediaError, match=words) as caught:
        Finisher.func_or_class(settings)
    said = caught.value.message + caught.value.hint
    key = settings.c2pa_private_key
    assert not key.exists() or not any(line in said for line in key.read_text().splitlines())
    finding = _signing(settings)
    assert (finding.verdict, finding.found) == (Verdict.FAILED, caught.value.message)


def test_a_certificate_without_its_key_is_refused(tmp_path):
    for given, missing in (("c2pa_certificate", "c2pa_private_key"), ("c2pa_private_key", "c2pa_certificate")):
        with pytest.raises(ValidationError, match=f"{given} is set, so {missing} must be set too"):
            Settings(**{given: tmp_path / "x.pem"})


def test_the_key_is_not_shown(settings):
    assert "PRIVATE KEY" not in repr(open_certificate(settings))


def test_doctor_tells_a_development_certificate_and_one_that_expires(settings, tmp_path):
    assert (_signing(settings).verdict, DEVELOPMENT in _signing(settings).found) == (Verdict.NOTE, True)
    for days, verdict in ((90, Verdict.OK), (10, Verdict.NOTE)):
        chain = write_chain(tmp_path / str(days), days=days)
        own = Settings(data_dir=tmp_path, c2pa_certificate=chain.certificate, c2pa_private_key=chain.key)
        assert _signing(own).verdict == verdict


@pytest.mark.skipif(shutil.which("openssl") is None, reason="OpenSSL's command plays the timestamp authority")
def test_a_timestamp_counts_by_a_trusted_authority_only(root_pem, settings, tmp_path):
    with timestamp_authority(tmp_path) as (url, authority):
        certificate = replace(open_certificate(settings), timestamp_url=url)
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
        mark(tmp_path / "x.png", "image/png", ORIGIN, certificate)
    found = read_provenance(tmp_path / "x.png", anchors_pem=root_pem)
    assert (found.problems, found.timestamped_at) == ([], None)
    found = read_provenance(tmp_path / "x.png", anchors_pem=root_pem + authority.root.read_text())
    assert abs(datetime.fromisoformat(found.timestamped_at) - datetime.fromisoformat(found.made_at)) < timedelta(
        minutes=1
    )


def test_a_silent_timestamp_authority_is_named(tmp_path):
    with socket.socket() as bound:  # bound, not listening: connections are refused
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        certificate = ready_certificate(Settings(data_dir=tmp_path, c2pa_timestamp_url=url))
        Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
        with pytest.raises(MediaError, match="could not be signed") as caught:
            mark(tmp_path / "x.png", "image/png", ORIGIN, certificate)
    assert f"c2pa_timestamp_url, {url}" in caught.value.hint


def test_threads_sign_at_once(delivered, settings, root_pem, tmp_path):
    certificate = open_certificate(settings)

    def signed(number: int) -> list[str]:
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 64), (number, 0, 0)).save(path)
        mark(path, "image/png", ORIGIN, certificate)
        return read_provenance(path, anchors_pem=root_pem).problems

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(signed, range(32))) == [[]] * 32


# ---- the deployment and the command ---------------------------------------------------------------------------------


async def test_a_finisher_delivers_the_receipt_with_the_files(tmp_path):
    async def frames() -> np.ndarray:
        return moving_frames(1)

    settings, job = Settings(data_dir=tmp_path), make_job(fencing_token=3)
    finisher = Finisher.func_or_class(settings)
    *_, delivered = [one async for one in finisher.finish(job, [asyncio.ensure_future(frames())], RECEIPT)]
    assert [artifact.name for artifact in delivered.artifacts] == ["image.png", "receipt.json"]
    assert delivered.receipt == RECEIPT
    folder = settings.artifacts_dir / job.id / "3"
    root = development_root(settings.provenance_dir).read_text()
    found = read_provenance(folder / "image.png", anchors_pem=root, receipt=folder / "receipt.json")
    assert found.problems == []


def _verify(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    return result.exit_code, result.output


def test_verify(delivered, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("WAN_SERVE_DATA_DIR", str(settings.data_dir))
    folder = delivered[0]
    for name in dict(MEDIA):
        code, said = _verify(folder / name, "--receipt", folder / "receipt.json")
        assert code == 0, said
        for words in ("development", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers 0fad780", "wan-serve 0.", "01a2", "made by AI"):
            assert words in said
    code, said = _verify(folder / "video.mp4", "--trust", write_chain(tmp_path / "pki").root)
    assert (code, "vouches" in said) == (1, True)
    other = tmp_path / "receipt.json"
    shutil.copy(folder / "receipt.json", other)
    other.write_text(other.read_text().replace("12.5", "1.5"))
    code, said = _verify(folder / "video.mp4", "--receipt", other)
    assert (code, "is not its receipt" in said) == (1, True)
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8)).save(plain)
    code, said = _verify(plain)
    assert (code, "no C2PA manifest" in said) == (1, True)
    assert _verify(tmp_path / "missing.png")[0] == 2
    code, said = _verify(folder / "image.png", "--trust", folder / "receipt.json")
    assert (code, "--trust" in said) == (2, True)


def test_verify_by_the_operators_root(tmp_path):
    chain = write_chain(tmp_path / "pki")
    settings = Settings(data_dir=tmp_path, c2pa_certificate=chain.certificate, c2pa_private_key=chain.key)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    mark(tmp_path / "x.png", "image/png", ORIGIN, open_certificate(settings))
    code, said = _verify(tmp_path / "x.png", "--trust", chain.root)
    assert code == 0
    assert "signed by a trusted signer" in said
    assert "Example signer, Example Studio" in said
