"""Device work that is launched and not yet accounted for."""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from serve_app.engine.clip_state import ClipState, Phase
from serve_app.engine.device_span import DeviceSpan
from serve_app.engine.snapshot import Snapshot


@dataclass(frozen=True)
class Unit:
    """One launched piece of device work of one clip. The tensors are valid once the span is finished."""

    clip: ClipState
    phase: Phase | None
    """None: no part of the way to the frames, but a snapshot or a preview alone."""
    span: DeviceSpan
    finite: torch.Tensor | None = None
    """Whether the step's latents were all finite (bool, scalar)."""
    snapshot: Snapshot | None = None
    preview: tuple[int, torch.Tensor] | None = None
    """Steps done, and the picture on the host: uint8 RGB [height, width, 3]."""
    share: float = 1.0
    """The clip's part of the span, which units that are launched together have in common."""
    expected_s: float = 0.0
    """Device seconds that the whole span should take, from what such work took before; 0: not known, or next to nothing."""

    @property
    def seconds(self) -> float:
        """Device seconds of the clip's part of the finished work."""
        return self.span.seconds * self.share


class InFlight:
    """The units, oldest first: the device works in the order of launching."""

    def __init__(self) -> None:
        self.units: deque[Unit] = deque()
        self._oldest_began_at = 0.0
        """Monotonic seconds: when the device turned to the oldest, as near as it can be seen from here."""

    def __len__(self) -> int:
        """How many pieces of work the device was given: units that share a span are one."""
        return len({id(unit.span) for unit in self.units})

    def add(self, *units: Unit) -> None:
        """Take up what was launched just now."""
        if not self.units:
            self._oldest_began_at = time.monotonic()
        for unit in units:
            unit.clip.units_in_flight += 1
            self.units.append(unit)

    def finished(self, *, leave: int) -> Iterator[Unit]:
        """Take out the units that the device has finished; wait for the oldest until at most `leave` pieces are in flight."""
        while self.units and (self.units[0].span.finished or len(self) > leave):
            unit = self._pop()
            unit.span.wait()
            self._oldest_began_at = time.monotonic()
            yield unit

    def rest_s(self) -> float:
        """Seconds after which the device should have done everything; 0 or less: any moment now, or it is not known."""
        longest = dict[int, float]()
        for unit in self.units:
            longest[id(unit.span)] = max(unit.expected_s, longest.get(id(unit.span), 0.0))
        return self._oldest_began_at + sum(longest.values()) - time.monotonic()

    def clear(self) -> None:
        """Forget all: the device will not finish them."""
        while self.units:
            self._pop()

    def _pop(self) -> Unit:
        unit = self.units.popleft()
        unit.clip.units_in_flight -= 1
        return unit
