"""One attempt to deliver one webhook: sign it, send it, and say how that went.

Standard Webhooks (github.com/standard-webhooks/standard-webhooks, spec/standard-webhooks.md): `webhook-id` stays over
attempts, `webhook-timestamp` is the attempt's, `webhook-signature` covers both and the body.
"""

import asyncio
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpcore
import httpx
from pydantic import SecretStr
from pydantic_core import to_json
from standardwebhooks import Webhook as Signer

import serve_app
from serve_app.api.schemas import JobView
from serve_app.jobs.job import Job
from serve_app.webhooks.network import AddressRefused, PublicNetwork

TIMEOUT_S = 10.0
"""For the whole attempt, from the name's look-up to the answer's last header: a slow receiver is cut here."""


@dataclass(frozen=True)
class Attempt:
    """How an attempt went."""

    error: str | None
    """None: the receiver answered 2xx."""
    gone: bool = False
    """The receiver answered 410: it wants no more."""
    retry_after_s: float = 0.0
    """Seconds that the receiver asks to be left alone for."""


class Deliverer:
    """Delivers webhooks of jobs that have ended. Raises nothing for what a receiver does. `secrets`: owner -> `whsec_...`."""

    def __init__(
        self, secrets: Mapping[str, SecretStr], network: PublicNetwork, *,
        tls: ssl.SSLContext | None = None, timeout_s: float = TIMEOUT_S,
    ) -> None:  # fmt: skip
        self._secrets = secrets
        self._network = network
        self._tls = tls or httpx.create_ssl_context()
        self._timeout_s = timeout_s

    async def attempt(self, job: Job) -> Attempt:
        """Send the job's webhook once. Redirects are not followed: a 3xx is a failure, so none leads astray."""
        assert job.webhook is not None
        secret = self._secrets.get(job.owner)
        if secret is None:
            return Attempt(f"the service has no webhook secret for {job.owner} any more")
        body = _body(job)
        try:
            async with asyncio.timeout(self._timeout_s):
                status, headers = await self._post(
                    httpx.URL(job.webhook.url), _headers(job, body, secret.get_secret_value()), body
                )
        except TimeoutError:
            return Attempt(f"no answer within {self._timeout_s:g} s")
        except AddressRefused as error:
            return Attempt(str(error))
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            return Attempt(f"{type(error).__name__}: {error}"[:200])
        if 200 <= status < 300:
            return Attempt(None)
        return Attempt(f"HTTP {status}", gone=status == 410, retry_after_s=_retry_after_s(headers.get("retry-after")))

    async def _post(self, url: httpx.URL, headers: dict[str, str], body: str) -> tuple[int, Mapping[str, str]]:
        """Status and headers of the answer. Its body is left unread: nothing in it matters, and it may have no end.

        httpcore rather than httpx, for its network backend, and because it knows no redirects, cookies or proxies.
        """
        where = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        sent = [*headers.items(), ("Host", url.netloc.decode())]
        async with (
            httpcore.AsyncConnectionPool(self._tls, network_backend=self._network) as pool,
            pool.stream("POST", where, headers=sent, content=body.encode()) as answer,
        ):
            return answer.status, {name.decode("latin-1").lower(): v.decode("latin-1") for name, v in answer.headers}


def _body(job: Job) -> str:
    """The same at each attempt, so without the state of its own delivery."""
    moment = datetime.fromtimestamp(job.finished_at or job.created_at, UTC)
    data = JobView.of(job).model_dump(mode="json", exclude={"webhook"})
    return to_json({"type": f"job.{job.status}", "timestamp": moment, "data": data}).decode()


def _headers(job: Job, body: str, secret: str) -> dict[str, str]:
    message_id, now = f"msg_{job.id}", datetime.now(UTC)
    return {
        "content-type": "application/json",
        "user-agent": f"wan-serve/{serve_app.__version__}",
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": Signer(secret).sign(message_id, now, body),
    }


def _retry_after_s(value: str | None) -> float:
    """Seconds of a `Retry-After` header, which holds seconds or a date (RFC 9110, 10.2.3); 0 where it says nothing."""
    if value is None:
        return 0.0
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
