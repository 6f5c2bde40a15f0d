"""Certificate chains as an operator would have them, good and bad."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from serve_app.media.certificates import open_certificate
from serve_app.settings import Settings

KEYS = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
    "a curve that C2PA does not know": lambda: ec.generate_private_key(ec.SECP256K1()),
}


@dataclass
class Chain:
    certificate: Path
    """The end-entity certificate; the root is not in it, as is usual."""
    key: Path
    root: Path


def write_chain(
    folder: Path,
    kind: str = "es256",
    *,
    usage: x509.ObjectIdentifier = ExtendedKeyUsageOID.EMAIL_PROTECTION,
    days: int = 90,
    passphrase: bytes | None = None,
) -> Chain:
    """A root and a certificate of "Example Studio" that ends in `days` from now, written into `folder` as PEM."""
    folder.mkdir()
    root_key, key = KEYS["es256"](), KEYS[kind]()
    now = datetime.now(UTC)

    def named(name: str) -> x509.Name:
        return x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Example Studio"),
                x509.NameAttribute(NameOID.COMMON_NAME, name),
            ]
        )

    def certificate(subject: str, public_key, is_root: bool) -> x509.Certificate:
        usages = x509.KeyUsage(not is_root, False, False, False, False, is_root, is_root, False, False)
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("Example root"))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=400))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(is_root, None), critical=True)
            .add_extension(usages, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        )
        if not is_root:
            builder = builder.add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
        return builder.sign(root_key, hashes.SHA256())

    lock: KeySerializationEncryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    chain = Chain(folder / "certificate.pem", folder / "key.pem", folder / "root.pem")
    chain.root.write_bytes(certificate("Example root", root_key.public_key(), True).public_bytes(Encoding.PEM))
    chain.certificate.write_bytes(certificate("Example signer", key.public_key(), False).public_bytes(Encoding.PEM))
    chain.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock))
    return chain


def open_in(data_dir: Path) -> bytes:
    """The development chain of a data folder; here, so that a fresh process has little to import."""
    return open_certificate(Settings(data_dir=data_dir)).chain_pem
