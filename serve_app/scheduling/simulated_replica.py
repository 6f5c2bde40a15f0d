"""One device on a virtual clock: the step policy of the engine, run over clips of known cost.

The policy is asked again only when its decision may have changed (`Decision.until`, a clip that came or went, another
length of step), which gives the same schedule as asking at every step, at a fraction of the decisions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from serve_app.scheduling.claim import Outstanding
from serve_app.scheduling.steps import Decision, Runnable
from serve_app.scheduling.workload import Phase, SimulatedJob


class Policy(Protocol):
    """What decides on a replica: `StepPolicy`, or one to compare it with."""

    def decide(self, clips: Sequence[Runnable], now: float) -> Decision:
        """Which of the clips runs, and until when that holds."""


ClipEnded = Callable[[SimulatedJob, float, float], None]
"""Is told of each clip that ends: its job, when it started and when it ended."""


class _Clip:
    """A clip on a replica: how far it is, and how the policy sees it."""

    __slots__ = (
        "_later",
        "_outstanding",
        "arrived_at",
        "clip_id",
        "deadline",
        "job",
        "last_ran_at",
        "later_s",
        "longest_step_s",
        "runnable",
        "started_at",
        "step_s",
        "steps_left",
    )  # fmt: skip

    def __init__(self, clip_id: str, job: SimulatedJob, phases: tuple[Phase, ...], arrived_at: float) -> None:
        self.clip_id = clip_id
        self.job = job
        self.deadline = job.deadline
        self.arrived_at = self.last_ran_at = arrived_at
        self.started_at = math.nan
        self.longest_step_s = max([phase.step_s for phase in phases])
        self.runnable: Runnable | None = None
        self._outstanding: Outstanding | None = None
        self._enter(phases)

    @property
    def remaining_s(self) -> float:
        """Device seconds that it still needs."""
        return self.steps_left * self.step_s + self.later_s

    def show(self) -> Runnable:
        """The clip as the policy sees it; kept as `runnable` until it has run."""
        self.runnable = shown = Runnable(
            self.clip_id,
            self.deadline,
            self.arrived_at,
            self.last_ran_at,
            self.remaining_s,
            self.step_s,
            self.longest_step_s,
        )
        return shown

    def outstanding(self) -> Outstanding:
        """The clip as the look-ahead sees it, kept likewise."""
        if self._outstanding is None:
            self._outstanding = Outstanding(self.deadline, self.remaining_s)
        return self._outstanding

    def run(self, steps: int, start: float) -> float:
        """Runs that many steps of its phase from `start` on; returns when they end."""
        if self.last_ran_at == self.arrived_at:
            self.started_at = start
        self.last_ran_at = end = start + steps * self.step_s
        self.steps_left -= steps
        self.runnable = self._outstanding = None
        if self.steps_left == 0 and self._later:
            self._enter(self._later)
        return end

    def _enter(self, phases: tuple[Phase, ...]) -> None:
        self.steps_left, self.step_s = phases[0].steps, phases[0].step_s
        self._later = later = phases[1:]
        self.later_s = sum([phase.work_s for phase in later]) if later else 0.0


class SimulatedReplica:
    """One device and its clips. It stands at a step boundary, or idle, and runs only when somebody looks."""

    def __init__(self, policy: Policy, clip_ended: ClipEnded, number: int) -> None:
        self.number = number
        """Replicas are told apart, and ordered, by it."""
        self.free_at = -math.inf
        """When it is through with all its work: a device that never idles with work gets there in any order."""
        self._policy = policy
        self._clip_ended = clip_ended
        self._clips: dict[str, _Clip] = {}
        self._boundary = -math.inf
        self._turn: _Clip | None = None
        """Whose turn it is, by the last decision, as long as that holds."""
        self._turn_until = math.inf
        self._ran: _Clip | None = None
        """What ran up to the boundary; done, perhaps."""

    def backlog_s(self, now: float) -> float:
        """Device seconds of work that it has."""
        return max(0.0, self.free_at - now)

    def outstanding(self, now: float) -> list[Outstanding]:
        """Its unfinished clips and what they still need, to the moment: also within a step."""
        self.run_until(now)
        step_left_s = self._boundary - now
        if step_left_s <= 0 or self._ran is None:
            return [clip.outstanding() for clip in self._clips.values()]
        ran = self._ran
        running = Outstanding(ran.deadline, ran.remaining_s + step_left_s)
        return [running, *[clip.outstanding() for clip in self._clips.values() if clip is not ran]]

    def load_before(self, deadline: float, now: float, *, late: bool) -> tuple[float, float]:
        """Device seconds of clips due no later than `deadline`: of those that are late, or of those that can be on time.

        And the first moment at which one of these might turn late.
        """
        load, turns_late_at = 0.0, math.inf
        for clip in self.outstanding(now):
            due, remaining_s = clip.deadline, clip.remaining_s
            if due <= deadline and (now + remaining_s > due) == late:  # is_late, written out
                load += remaining_s
                turns_late_at = min(turns_late_at, due - remaining_s)
        return load, turns_late_at

    def add(self, clip_id: str, job: SimulatedJob, phases: tuple[Phase, ...], now: float) -> None:
        """Takes a clip, which waits for the next boundary. `now` must not be before any moment seen so far."""
        self.run_until(now)
        self._boundary = max(self._boundary, now)
        self._turn = None
        self._clips[clip_id] = clip = _Clip(clip_id, job, phases, now)
        self.free_at = max(self.free_at, now) + clip.remaining_s

    def run_until(self, moment: float) -> None:
        """Runs to the first step boundary at or after `moment`, or until nothing is left to do."""
        clips = self._clips
        while clips and self._boundary < moment:
            start, clip = self._boundary, self._turn
            if clip is None:
                decision = self._policy.decide([clip.runnable or clip.show() for clip in clips.values()], start)
                self._turn = clip = clips[decision.clip_id]
                self._turn_until = decision.until
            steps, step_s = clip.steps_left, clip.step_s
            ask_again_in = min(self._turn_until, moment) - start
            if ask_again_in < steps * step_s:
                steps = max(1, math.ceil(ask_again_in / step_s))
            is_phase_done = steps == clip.steps_left
            self._boundary = end = clip.run(steps, start)
            self._ran = clip
            if is_phase_done or end >= self._turn_until:
                self._turn = None
            if clip.steps_left == 0:
                del clips[clip.clip_id]
                self._clip_ended(clip.job, clip.started_at, end)
