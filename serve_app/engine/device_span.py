"""How long the device worked on something, and whether it is done, without making it wait."""

import time
from types import TracebackType

import torch


class DeviceSpan:
    """The device's time for what is launched inside the `with` block.

    On a GPU: two CUDA events in the current stream. On a CPU, where work is done when the call returns: two clock readings.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._start: float | torch.cuda.Event
        self._end: float | torch.cuda.Event

    def __enter__(self) -> "DeviceSpan":
        self._start = self._mark()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end = self._mark()

    def _mark(self) -> "float | torch.cuda.Event":
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def finished(self) -> bool:
        """Whether the device has done the work."""
        return isinstance(self._end, float) or bool(self._end.query())

    def wait(self) -> None:
        """Block this thread until the device has done the work."""
        if not isinstance(self._end, float):
            self._end.synchronize()

    @property
    def seconds(self) -> float:
        """Device seconds of the finished work."""
        if isinstance(self._end, float):
            assert isinstance(self._start, float)
            return self._end - self._start
        return float(self._start.elapsed_time(self._end)) / 1000.0  # type: ignore[union-attr]
