"""An RFC 3161 timestamp authority on this machine: OpenSSL's, behind a small HTTP server."""

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from cryptography.x509.oid import ExtendedKeyUsageOID

from tests.certificates import Chain, write_chain

CONFIG = """
[tsa]
default_tsa = ours
[ours]
serial = {folder}/serial
signer_cert = {chain.certificate}
certs = {chain.root}
signer_key = {chain.key}
signer_digest = sha256
default_policy = 1.2.3.4.1
digests = sha256, sha384, sha512
ess_cert_id_alg = sha256
"""


@contextmanager
def timestamp_authority(folder: Path) -> Iterator[tuple[str, Chain]]:
    """Its address and its certificates, while the `with` block lasts. It writes into `folder`."""
    chain = write_chain(folder / "authority", usage=ExtendedKeyUsageOID.TIME_STAMPING)
    config, query = folder / "ts.cnf", folder / "query"
    config.write_text(CONFIG.format(folder=folder, chain=chain))
    (folder / "serial").write_text("01\n")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query.write_bytes(self.rfile.read(int(self.headers["content-length"])))
            command = ["openssl", "ts", "-reply", "-config", str(config), "-queryfile", str(query)]
            reply = subprocess.run(command, capture_output=True, check=True).stdout
            self.send_response(200)
            self.send_header("content-type", "application/timestamp-reply")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", chain
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
