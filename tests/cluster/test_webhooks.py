"""The conductor's courier, in the whole service."""

from serve_app.client import AsyncClient
from serve_app.jobs.job import WebhookState
from tests.cluster.running_service import RunningService
from tests.receiver import receiving


async def test_a_finished_job_is_told_to_its_receiver(service: RunningService) -> None:
    async with receiving() as receiver, AsyncClient(service.url) as client:
        job = await client.submit("a red kite", "image_fast", sample_steps=1, webhook_url=receiver.url)
        assert job.webhook is not None
        assert job.webhook.state == WebhookState.PENDING
        await receiver.heard()
    payload = receiver.requests[0].verified()
    assert (payload["type"], payload["data"]["id"]) == ("job.succeeded", job.id)
    assert [artifact["name"] for artifact in payload["data"]["artifacts"]] == ["image.png", "receipt.json"]
