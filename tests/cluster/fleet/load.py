"""A steady mixed load over HTTP: users that submit, follow or poll, and submit again, whatever answers they get."""

import asyncio
import random
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from serve_app.client import AsyncClient
from serve_app.errors import WanServeError
from serve_app.jobs.job import FINAL_EVENTS


@dataclass(frozen=True)
class Order:
    """What a user asks for. Each has a seed of its own, so that each has files of its own."""

    type: str
    seed: int
    sample_steps: int
    video_length: int

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of the request."""
        return {"prompt": f"a paper boat drifts down a rainy street, take {self.seed}", **vars(self)}


MIX = tuple(
    Order(type, seed=100 * n + take, sample_steps=steps, video_length=frames)
    for take in (1, 2)
    for n, (type, steps, frames) in enumerate(
        (
            ("image_fast", 20, 1),
            ("image_fast", 40, 1),
            ("video_fast", 30, 5),
            ("video_fast", 20, 9),
            ("video_high", 16, 13),
        )
    )
)
"""1 to 4 s of device time each on one core with the tiny model, most of it in steps: that is where kills cost."""


@dataclass
class Accepted:
    """A submission that was answered with 202."""

    id: str
    order: Order
    at: float
    """Unix seconds."""
    seen: list[str] = field(default_factory=list)
    """Ids of the events that a follower got, over all its connections."""
    followed: bool = False
    """Whether a follower got to the end."""


class Load:
    """`users` users in a thread with its own event loop, from `start` to `stop`."""

    def __init__(self, url: str, *, users: int, seed: int) -> None:
        self._url, self._users, self._seed = url, users, seed
        self.accepted: list[Accepted] = []
        self.refused: dict[str, int] = {}
        """Submissions that got another answer, or none, by its code. Each was sent again."""
        self._stopping = threading.Event()
        self._errors: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._thread.join()
        if exc_info[0] is None:
            self.check()

    def check(self) -> None:
        """Raise what ended the load before its time, if anything did."""
        if self._errors:
            raise self._errors[0]

    def _run(self) -> None:
        try:
            asyncio.run(self._all())
        except BaseException as error:
            self._errors.append(error)

    async def _all(self) -> None:
        async with asyncio.TaskGroup() as group:
            stopped = group.create_task(asyncio.to_thread(self._stopping.wait))
            for number in range(self._users):
                group.create_task(self._user(number, stopped))

    async def _user(self, number: int, stopped: asyncio.Task[bool]) -> None:
        draw = random.Random(f"{self._seed}/{number}")
        async with AsyncClient(self._url, timeout_s=20) as client, httpx.AsyncClient(base_url=self._url) as http:
            while not stopped.done():
                job = await self._submit(http, draw.choice(MIX))  # to its answer, also after the end
                self.accepted.append(job)
                watch = self._follow if draw.random() < 0.5 else self._poll
                watching = asyncio.create_task(watch(client, job))
                await asyncio.wait({watching, stopped}, return_when=asyncio.FIRST_COMPLETED)
                if not watching.done():
                    watching.cancel()
                    await asyncio.wait({watching})
                else:
                    watching.result()

    async def _submit(self, http: httpx.AsyncClient, order: Order) -> Accepted:
        """Send it until it is accepted, under one Idempotency-Key."""
        headers = {"Idempotency-Key": secrets.token_hex(8)}
        while True:
            try:
                answer = await http.post("/v1/jobs", json=order.body, headers=headers, timeout=20)
                if answer.status_code == 202:
                    return Accepted(answer.json()["id"], order, time.time())
                problem = f"HTTP {answer.status_code}"
            except httpx.TransportError as error:
                problem = type(error).__name__
            self.refused[problem] = self.refused.get(problem, 0) + 1
            await asyncio.sleep(0.5)

    async def _follow(self, client: AsyncClient, job: Accepted) -> None:
        while not job.followed:
            try:
                async for event in client.events(job.id, job.seen[-1] if job.seen else None):
                    job.seen.append(event.id)
                    job.followed = event.name in FINAL_EVENTS
            except WanServeError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(0.5)

    async def _poll(self, client: AsyncClient, job: Accepted) -> None:
        while True:
            try:
                if (await client.get(job.id)).status.is_final:
                    return
            except WanServeError as error:
                if not error.retryable:
                    raise
            await asyncio.sleep(0.5)
