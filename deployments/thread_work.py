"""Blocking work for one job, in a thread beside the event loop of a replica."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from concurrent.futures import CancelledError, Executor, Future
from typing import Any, Literal, TypeVar

from serve_app.jobs.job import Stage, StageProgress

TELL_EVERY_S = 0.4
"""At most so often progress is told: a few times a second."""

Value = TypeVar("Value")
News = Stage | StageProgress


class ThreadWork:
    """What the thread and the loop have to say to each other. Make it on the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[News | None] = asyncio.Queue()
        self._asked: set[asyncio.Task[Any]] = set()
        self._is_stopped = False
        self._told_at = 0.0

    # ---- on the loop

    async def run(self, pool: Executor, work: Callable[[], Value]) -> AsyncGenerator[News | Value, None]:
        """Do `work` in a thread of `pool`; yield the news that it tells as they come, and in the end what it returns.

        Closing the stream stops the work, and it has ended when this has.
        """
        running = pool.submit(work)
        running.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._news.put_nowait, None))
        try:
            while (news := await self._news.get()) is not None:
                yield news
            yield running.result()
        finally:
            self.stop()
            if not running.cancel():
                await asyncio.gather(asyncio.wrap_future(running), return_exceptions=True)

    def stop(self) -> None:
        """Cancel what the thread has asked for, and what it is about to: it raises CancelledError there, as the next `tell` does."""
        self._is_stopped = True
        for task in self._asked:
            task.cancel()

    async def _answered(self, question: Coroutine[Any, Any, Value]) -> Value:
        if self._is_stopped:
            question.close()
            raise CancelledError
        task = asyncio.current_task()
        assert task is not None
        self._asked.add(task)
        try:
            return await question
        finally:
            self._asked.remove(task)

    # ---- in the thread

    def ask(self, question: Coroutine[Any, Any, Value]) -> "Future[Value]":
        """Have the loop find the answer."""
        return asyncio.run_coroutine_threadsafe(self._answered(question), self._loop)

    def tell(self, news: News) -> None:
        """Say what is new."""
        if self._is_stopped:
            raise CancelledError
        self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    def tell_progress(self, unit: Literal["frames", "bytes"], done: int, total: int) -> None:
        """Say how far it is: at most every TELL_EVERY_S seconds, and at the end."""
        now = time.monotonic()
        if done == total or now - self._told_at > TELL_EVERY_S:
            self._told_at = now
            self.tell(StageProgress(unit=unit, done=done, total=total))
        elif self._is_stopped:
            raise CancelledError
