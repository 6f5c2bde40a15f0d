"""Who signs the files: the operator's certificate, or one that is made here for development and says so.

What C2PA asks of a certificate: C2PA Technical Specification 2.2, section 14.5 ("X.509 Certificates").
"""

import fcntl
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from serve_app.errors import MediaError
from serve_app.media.whole import os_error, written_whole
from serve_app.settings import Settings

DEVELOPMENT = "wan-serve development (not for production)"
"""Organization of every development certificate: what each reader of a file shows as its signer."""
DEVELOPMENT_LIFE = timedelta(days=3650)
C2PA_SIGNING = x509.ObjectIdentifier("1.3.6.1.4.1.62558.2.1")
"""The extended key usage that C2PA gives to signers of claims."""
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


@dataclass(frozen=True)
class SigningCertificate:
    """A certificate with its private key, found to belong together and to be in force."""

    chain_pem: bytes
    """The end-entity certificate first."""
    key_pem: bytes = field(repr=False)
    """PKCS 8, unencrypted."""
    algorithm: str
    """C2PA's name: es256, es384, es512, ps256 or ed25519."""
    common_name: str
    organization: str
    not_after: datetime
    timestamp_url: str | None = None

    @property
    def is_development(self) -> bool:
        """Whether it was made here, so that no reader elsewhere trusts it."""
        return self.organization == DEVELOPMENT


def open_certificate(settings: Settings) -> SigningCertificate:
    """The certificate that the settings name; without one, that of this data folder for development, made if need be.

    Blocks. Raises MediaError, naming the setting, for files that cannot be read, a key of another certificate, a kind of
    key that C2PA does not know, and a certificate that is not in force.
    """
    if settings.c2pa_certificate and settings.c2pa_private_key:
        return _load(settings.c2pa_certificate, settings.c2pa_private_key, settings.c2pa_timestamp_url)
    path = _development_pem(settings.provenance_dir)
    return _load(path, path, settings.c2pa_timestamp_url)


def development_root(provenance_dir: Path) -> Path:
    """Where the root certificate lies that vouches for a data folder's development certificate."""
    return provenance_dir / "development-root.pem"


def read_roots(path: Path) -> str:
    """Root certificates to trust, as PEM. Raises OSError, and ValueError where `path` holds none."""
    content = path.read_bytes()
    try:
        x509.load_pem_x509_certificates(content)
    except ValueError:
        raise ValueError(f"{path} holds no PEM certificate") from None
    return content.decode()


def _load(certificate: Path, private_key: Path, timestamp_url: str | None) -> SigningCertificate:
    try:
        chain = x509.load_pem_x509_certificates(_read("c2pa_certificate", certificate))
    except ValueError:
        raise MediaError(f"c2pa_certificate: {certificate} holds no PEM certificate") from None
    try:
        key = load_pem_private_key(_read("c2pa_private_key", private_key), password=None)
    except TypeError:
        raise MediaError(
            f"c2pa_private_key: the key in {private_key} is encrypted",
            hint="Decrypt it: openssl pkey -in encrypted.pem -out key.pem; and let only the service read the result.",
        ) from None
    except ValueError:  # whose text may hold a part of the key
        raise MediaError(f"c2pa_private_key: {private_key} holds no PEM private key") from None
    first = chain[0]
    form = Encoding.DER, PublicFormat.SubjectPublicKeyInfo
    if key.public_key().public_bytes(*form) != first.public_key().public_bytes(*form):
        raise MediaError(
            f"c2pa_private_key: {private_key} is not the key of the first certificate in {certificate}, "
            f"{first.subject.rfc4514_string()}",
            hint="c2pa_certificate must begin with the end-entity certificate, and c2pa_private_key must be its key.",
        )
    now = datetime.now(UTC)
    if not first.not_valid_before_utc <= now <= first.not_valid_after_utc:
        raise MediaError(
            f"c2pa_certificate: {first.subject.rfc4514_string()} in {certificate} is in force from "
            f"{first.not_valid_before_utc:%Y-%m-%d} to {first.not_valid_after_utc:%Y-%m-%d}, and it is {now:%Y-%m-%d}",
            hint="Renew it. A development certificate is made anew when its file is removed.",
        )
    return SigningCertificate(
        chain_pem=b"".join(one.public_bytes(Encoding.PEM) for one in chain),
        key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        algorithm=_algorithm(key, private_key),
        common_name=_name(first, NameOID.COMMON_NAME),
        organization=_name(first, NameOID.ORGANIZATION_NAME),
        not_after=first.not_valid_after_utc,
        timestamp_url=timestamp_url,
    )


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise MediaError(f"{setting}: {path} cannot be read: {error.strerror}") from error


def _name(certificate: x509.Certificate, which: x509.ObjectIdentifier) -> str:
    found = certificate.subject.get_attributes_for_oid(which)
    return str(found[0].value) if found else ""


def _algorithm(key: PrivateKeyTypes, path: Path) -> str:
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES:
        return _CURVES[key.curve.name]
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256"
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise MediaError(
        f"c2pa_private_key: the key in {path} is of a kind that C2PA does not know",
        hint="C2PA takes ECDSA on P-256, P-384 or P-521, RSA of 2048 bits or more, and Ed25519.",
    )


# ---- for development ------------------------------------------------------------------------------------------------


def _development_pem(folder: Path) -> Path:
    """The file with the development key, its certificate and the root; made if it is not there, by one process only."""
    path, root_path = folder / "development.pem", development_root(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                secret, root = _make_development_chain()
                with written_whole(root_path) as part:
                    part.write_bytes(root)
                with written_whole(path) as part:
                    part.touch(mode=0o600)
                    part.write_bytes(secret)
    except OSError as error:
        raise os_error(error, path) from error
    return path


def _make_development_chain() -> tuple[bytes, bytes]:
    """A new key with its certificate and root, and the root alone; PEM. The root's own key is kept nowhere."""
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = _certificate("root", root_key.public_key(), "root", root_key, is_root=True).public_bytes(Encoding.PEM)
    signer = _certificate("signer", key.public_key(), "root", root_key, is_root=False).public_bytes(Encoding.PEM)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + signer + root, root


def _certificate(
    subject: str, key: ec.EllipticCurvePublicKey, issuer: str, issuer_key: ec.EllipticCurvePrivateKey, *, is_root: bool
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_development_name(subject))
        .issuer_name(_development_name(issuer))
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))  # clocks of readers may be a little behind
        .not_valid_after(now + DEVELOPMENT_LIFE)
        .add_extension(x509.BasicConstraints(ca=is_root, path_length=0 if is_root else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_root, key_cert_sign=is_root, crl_sign=is_root, content_commitment=False,
                key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )  # fmt: skip
    if not is_root:
        usages = [C2PA_SIGNING, ExtendedKeyUsageOID.EMAIL_PROTECTION]  # older readers know the second only
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _development_name(role: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, DEVELOPMENT),
            x509.NameAttribute(NameOID.COMMON_NAME, f"wan-serve development {role}"),
        ]
    )
