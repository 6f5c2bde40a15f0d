"""Which clip gets the next step of a replica's device.

Three rules, the strongest first:

1. *Nobody starves*: the clip that came first has a guaranteed share of the device.
2. *Short work slips in*: a clip that is done within a few steps of the one whose turn it is goes before it.
3. *Promises are kept in the order they were made*: clips are fitted in by deadline, and where they do not all fit, one
   that came late yields. What fits runs earliest deadline first; what does not runs in the gaps, shortest first.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Runnable:
    """A clip that could run its next step now. Moments are Unix seconds, lengths are seconds of device time."""

    clip_id: str
    deadline: float
    arrived_at: float
    """When it came to this replica."""
    last_ran_at: float
    """End of its last step here; `arrived_at` before the first."""
    remaining_s: float
    """All that it still needs, decode included."""
    step_s: float
    """Its next step, during which the device cannot be taken from it: a denoising step, or one latent frame of decode."""
    longest_step_s: float = 0.0
    """Its longest step, done or to come, if that is not the next one: the denoising step of a clip that decodes."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Run `clip_id`. Asked again at a step boundary before `until` (Unix seconds), the policy would say the same, as long
    as no other clip ran, none came or went, and the clip's `step_s` is what it was."""

    clip_id: str
    until: float


class StepPolicy:
    """Picks the clip that runs next. It keeps nothing between calls: all that it goes by is in the clips.

    **Starvation is bounded.** Call *first* the clip that arrived first of those present, and let its patience be
    `step_s · (1/share − 1)`. It starts its next step at the first step boundary at which two patiences have passed since
    its last step (one, if nothing short slips in). So it gets at least one step in every `2·step_s/share + longest`
    seconds, `longest` being the longest step of any other clip; and since clips that come later cannot become first
    before it, a clip is finished at the latest after the sum of that over all steps that were outstanding, its own
    included, when it arrived, whatever arrives afterwards.

    **Short work starts at the next step boundary**: a clip that needs at most `slip_steps` steps of the one whose turn it
    is goes before it, unless a still shorter one is there or the first clip has waited its two patiences.
    """

    def __init__(
        self, share: float = 1 / 32, slip_steps: float = 4.0, headroom: float = 1.125, length_weight: float = 0.5
    ) -> None:
        """All four are ratios, so that they hold on any card; `benchmarks/mixed_load.py` shows what they do.

        share: of the device, guaranteed to the clip that arrived first. Clips that could be on time lose what it takes, so
            it is small: each 1% costs about 1% of the video_high deadlines at 0.95 load.
        slip_steps: four lets both picture presets pass both video presets (image_high is three steps of video_fast).
        headroom: when clips are fitted in, work counts this many times. That leaves room for the guaranteed share and for
            the pictures to come (7% of the work in the usual mix).
        length_weight: of two clips, the one yields whose arrival + length_weight · remaining_s is later. At 0 short and
            long videos miss their deadlines alike; the larger it is, the more the long ones pay for the short, and the
            more jobs in all are on time. Started clips are protected, since their remaining_s shrinks.
        """
        if not (0 < share <= 1 and slip_steps >= 0 and headroom >= 1 and length_weight >= 0):
            raise ValueError(
                "need 0 < share <= 1, slip_steps >= 0, headroom >= 1, length_weight >= 0; "
                f"got {share=}, {slip_steps=}, {headroom=}, {length_weight=}"
            )
        self.share = share
        self.slip_steps = slip_steps
        self.headroom = headroom
        self.length_weight = length_weight

    def pick(self, clips: Sequence[Runnable], now: float) -> str:
        """Id of the clip that runs the next step. O(n log n). Raises ValueError if there are no clips."""
        return self.decide(clips, now).clip_id

    def decide(self, clips: Sequence[Runnable], now: float) -> Decision:
        """The same, with how long it holds: a simulator need not ask at every step."""
        if not clips:
            raise ValueError("there is no clip to pick from")
        if len(clips) == 1:
            return Decision(clips[0].clip_id, math.inf)
        first = shortest = clips[0]
        for clip in clips:  # two `min`s, written out: a simulator asks millions of times
            if clip.arrived_at <= first.arrived_at and (
                clip.arrived_at < first.arrived_at or clip.clip_id < first.clip_id
            ):
                first = clip
            if clip.remaining_s <= shortest.remaining_s and (
                clip.remaining_s < shortest.remaining_s or clip.clip_id < shortest.clip_id
            ):
                shortest = clip
        patience = self.patience(first)
        due = first.last_ran_at + patience
        overdue = due + patience
        if now >= overdue:
            return Decision(first.clip_id, now)

        fit = _Fit(clips, now, self.headroom, self.length_weight)
        turn = first if now >= due else (fit.head or shortest)
        slips_in = shortest.remaining_s <= self.slip_steps * max(turn.step_s, turn.longest_step_s)
        chosen = shortest if slips_in else turn
        until = fit.holds_until(chosen)
        if now >= due:
            # The first clip's own step makes it patient again.
            until = now if chosen is first else min(until, overdue)
        elif chosen is not first:
            until = min(until, due)
        return Decision(chosen.clip_id, until)

    def patience(self, clip: Runnable) -> float:
        """Seconds between two steps of a clip that gets exactly its share of the device."""
        return clip.step_s * (1 / self.share - 1)


class _Fit:
    """Which clips can all keep their deadlines, and whose turn it is by that alone: `head`.

    Moore and Hodgson's algorithm (J. M. Moore, Management Science 15(1), 1968) with another choice of who yields: theirs,
    the longest, makes the fewest clips late, and nearly all of them video_high.
    """

    def __init__(self, clips: Sequence[Runnable], now: float, headroom: float, length_weight: float) -> None:
        self._now = now
        self._headroom = headroom
        self._length_weight = length_weight
        self._in_order = sorted([(clip.deadline, clip.clip_id, clip) for clip in clips])
        self._tests: list[tuple[int, float]] = []
        """Each comparison made: the position, and by how much the work fitted in so far overruns the deadline there."""
        self._yields: list[tuple[str, int, float]] = []
        """Each clip that yielded: when, by the number of comparisons before, and how far its place was from the next one's."""
        self._fitted: dict[str, int] = {}
        """Position of each clip that fits, in order."""
        tests, fitted = self._tests, self._fitted
        end = now
        yields_first: list[tuple[float, str, float]] | None = None
        """A heap of those that fit, the first to yield first; not made before somebody must."""

        def yielding(clip: Runnable) -> tuple[float, str, float]:
            return -clip.arrived_at - length_weight * clip.remaining_s, clip.clip_id, headroom * clip.remaining_s

        for position, (deadline, clip_id, clip) in enumerate(self._in_order):
            remaining_s = clip.remaining_s
            if now + remaining_s > deadline:
                continue
            fitted[clip_id] = position
            end += headroom * remaining_s
            if yields_first is not None:
                heapq.heappush(yields_first, yielding(clip))
            while fitted:
                tests.append((position, end - deadline))
                if end <= deadline:
                    break
                if yields_first is None:
                    yields_first = [yielding(self._in_order[place][2]) for place in fitted.values()]
                    heapq.heapify(yields_first)
                place, yielded, work_s = heapq.heappop(yields_first)
                ahead = yields_first[0][0] - place if yields_first else math.inf
                self._yields.append((yielded, len(tests), ahead))
                del fitted[yielded]
                end -= work_s
        self.head = self._in_order[next(iter(fitted.values()))][2] if fitted else None
        """Nobody, where none fits."""

    def holds_until(self, running: Runnable) -> float:
        """Earliest moment at which a comparison, or who yields, could turn out otherwise while `running` alone runs."""
        until, now = math.inf, self._now
        for deadline, _, clip in self._in_order:
            latest_start = deadline - clip.remaining_s
            if now <= latest_start < until and clip is not running:
                until = latest_start
        counted_at, counted_to = self._comparisons_with(running)
        for number, (position, overrun) in enumerate(self._tests):
            # As time passes, the fitted work ends later; where the running clip is part of it, earlier, by its headroom.
            if position < counted_at or number >= counted_to:
                if overrun <= 0 and now - overrun < until:
                    until = now - overrun
            elif overrun > 0 and self._headroom > 1:
                until = min(until, now + overrun / (self._headroom - 1))
        if counted_to < math.inf and self._length_weight > 0:
            # It yielded, and as it becomes shorter, another may have to in its stead.
            ahead = next(ahead for clip_id, _, ahead in self._yields if clip_id == running.clip_id)
            until = min(until, now + ahead / self._length_weight)
        return until

    def _comparisons_with(self, clip: Runnable) -> tuple[float, float]:
        """In which comparisons its work was counted: those from a position in order on, and before a number of them."""
        if self._now + clip.remaining_s > clip.deadline:
            return math.inf, math.inf
        if clip.clip_id in self._fitted:
            return self._fitted[clip.clip_id], math.inf
        position = self._in_order.index((clip.deadline, clip.clip_id, clip))
        return position, next(number for yielded, number, _ in self._yields if yielded == clip.clip_id)
