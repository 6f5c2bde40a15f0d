"""The mix of job types on a real engine: how busy it keeps its GPU, how soon it lets go, whether deadlines are kept.

    python -m benchmarks.mixed_load --engine --budget-s 160    # one GPU with 24 GB or more
    python -m benchmarks.mixed_load --engine --tiny --budget-s 60    # any CPU: shows that it runs, its times mean little

Within the budget, the most important first, and written after each: unloaded times; a picture that arrives and a cancel, both
during a video; busy share under a backlog; the mix by our policy; the same arrivals first come first served. Beside each
replay stands what the simulator says of that very stream. `--steps-scale` shortens the jobs of the mix, so that more of them
fit; what is measured before it has full length.
"""

import json
import math
import shlex
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.driven_engine import Clock, DrivenEngine, Heard, OutOfTime, file_without_tearing
from benchmarks.engine_stages import Alone, Busy, Responsiveness, measure_alone, measure_busy, measure_responsiveness
from benchmarks.mixed_load import MIX, POLICIES, TypeResult, share_on_time, type_result
from benchmarks.mixed_load_report import draw, show
from serve_app.engine.clip import ClipRequest, ClipStarted
from serve_app.engine.receipt import versions
from serve_app.jobs.presets import PRESETS, JobType, size_of
from serve_app.scheduling.simulate import Outcome, simulate
from serve_app.scheduling.workload import JobKind, Phase, SimulatedJob

OURS, BASELINE = "wan-serve", "first come first served"

_CLOSING_S = 3.0
"""Of the budget, for the last writes and the engine's end."""
_MARGIN = 1.15
"""A replay may take so many times what the simulator says."""
_COMPARED_DECKS = 2
"""Decks of jobs from which on half of the time is better spent on the baseline."""
_POLL_S = 0.02
_NOTED_EVERY_S = 2.0
"""A replay that is cut from outside leaves a record that is no older."""


@dataclass(frozen=True)
class Replay:
    """One stream under one policy."""

    policy: str
    simulated: bool
    """On a virtual clock, with the unloaded times of this run."""
    load: float
    jobs: int
    cut: int
    """Jobs left out because the time was up before their deadline. Those already late count as late."""
    on_time: float
    types: dict[str, TypeResult]


@dataclass
class Results:
    """All that a run found so far."""

    command: str
    when: str
    device: str
    versions: dict[str, str]
    setup: dict[str, Any]
    ready_after_s: float | None = None
    """Imports, model and warm-up."""
    alone: dict[str, Alone] = field(default_factory=dict)
    responsiveness: Responsiveness | None = None
    busy: Busy | None = None
    replays: list[Replay] = field(default_factory=list)
    ended: str = "cut from outside"


@dataclass(frozen=True)
class Options:
    """What the command line says (mixed_load.py)."""

    tiny: bool
    budget_s: float
    load: float
    types: list[JobType]
    warm_up: list[JobType]
    steps_scale: float
    skip_batches: bool
    seed: int
    out: Path


def run(options: Options, started_at: float) -> Results:
    """Measure what fits into the budget, which counts from `started_at` (monotonic seconds).

    Prints progress and tables, and writes `out`.json after every measurement and, where matplotlib is installed, `out`.png.
    """
    clock = Clock(started_at, options.budget_s - _CLOSING_S)
    clock.say("imported")
    results = Results(
        command=shlex.join(["python", "-m", "benchmarks.mixed_load", *sys.argv[1:]]),
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        device="CPU, small model" if options.tiny else torch.cuda.get_device_name(),
        versions=versions(),
        setup={name: value for name, value in asdict(options).items() if name != "out"},
    )
    requests = {kind: request_of(kind, options) for kind in options.types}
    compiled = [] if options.tiny else [request for kind, request in requests.items() if kind in options.warm_up]
    with DrivenEngine(small=options.tiny, warm_up=compiled, skip_batches=options.skip_batches, clock=clock) as driven:
        results.ready_after_s = clock.seconds
        clock.say(f"engine ready; compiled: {', '.join(request.clip_id for request in compiled) or 'nothing'}")
        session = Session(driven, requests, options, results)
        try:
            session.measure()
            results.ended = "complete"
        except OutOfTime:
            results.ended = "budget spent"
            driven.cancel_all()
        except Exception as error:
            results.ended = f"failed: {type(error).__name__}: {error}"
            raise
        finally:
            clock.say(f"ended: {results.ended}")
            session.save()
    show(results)
    draw(session.record_path)
    return results


@dataclass
class Session:
    """One run: its measurements in order of importance."""

    driven: DrivenEngine
    requests: dict[JobType, ClipRequest]
    options: Options
    results: Results

    @property
    def record_path(self) -> Path:
        """The JSON file."""
        return self.options.out.with_suffix(".json")

    def save(self) -> None:
        """Write what there is."""
        file_without_tearing(self.record_path, json.dumps(asdict(self.results), indent=1) + "\n")

    def measure(self) -> None:
        """Everything. Raises `OutOfTime`."""
        results = self.results
        warm = [kind for kind in self.requests if self.options.tiny or kind in self.options.warm_up]
        warm = warm or list(self.requests)
        self.measure_alone(warm)
        pictures = [kind for kind in warm if PRESETS[kind].is_image]
        videos = [kind for kind in warm if not PRESETS[kind].is_image]
        if pictures and videos:
            results.responsiveness = measure_responsiveness(
                self.driven, pictures[0], videos[0], self.requests, results.alone
            )
            self.save()
        results.busy = measure_busy(self.driven, {kind: self.requests[kind] for kind in warm}, results.alone)
        self.save()
        draw(self.record_path)
        self.measure_alone([kind for kind in self.requests if kind not in warm])
        self.measure_mix()

    def measure_alone(self, kinds: Sequence[JobType]) -> None:
        """The unloaded times of `kinds`."""
        for kind in kinds:
            self.results.alone[kind.value] = alone = measure_alone(self.driven, kind, self.requests[kind])
            self.driven.clock.say(f"{kind} alone: {alone.unloaded_s:.3f} s, step {1000 * alone.step_s:.1f} ms")
            self.save()

    def measure_mix(self) -> None:
        """A stream by our policy and, if there is time, by the baseline; simulated and real. Raises `OutOfTime`."""
        clock, load = self.driven.clock, self.options.load
        kinds = [job_kind(name, alone) for name, alone in self.results.alone.items()]
        decks = decks_within(clock.left_s / 2, kinds, self.options)
        if decks < _COMPARED_DECKS:
            decks = decks_within(clock.left_s, kinds, self.options)
        if decks == 0:
            clock.say("no time is left for the mix: choose a larger budget, a smaller --steps-scale or fewer --types")
            raise OutOfTime
        jobs = stream(kinds, load=load, decks=decks, seed=self.options.seed)
        predicted = {name: simulate(jobs, POLICIES[name]) for name in (OURS, BASELINE)}
        self.results.replays = [summary(name, load, predicted[name], simulated=True) for name in predicted]
        self.save()
        for name in (OURS, BASELINE):
            if clock.left_s < makespan_s(predicted[name]):
                clock.say(f"no time is left to replay {name}; the simulator's word stands")
                raise OutOfTime
            clock.say(f"{len(jobs)} jobs at load {load}, {name}")
            self.replay(name, jobs)

    def replay(self, policy: str, jobs: Sequence[SimulatedJob]) -> None:
        """The stream in real time, noted as it goes. Raises `OutOfTime` where the budget is spent before all are done."""
        driven, clock, before = self.driven, self.driven.clock, list(self.results.replays)
        driven.policy.policy = POLICIES[policy]
        waiting = deque(jobs)
        heard: list[tuple[SimulatedJob, Heard]] = []
        zero = noted_at = time.monotonic()

        def note() -> None:
            outcomes = known_outcomes(heard, zero)
            cut = len(jobs) - len(outcomes)
            if outcomes:
                so_far = summary(policy, self.options.load, outcomes, simulated=False, cut=cut)
                self.results.replays = [*before, so_far]
                self.save()

        while waiting or not all(clip.ended for _, clip in heard):
            now = time.monotonic()
            if clock.left_s < 0:
                note()
                clock.say(f"the budget is spent in the middle of the replay, with {len(waiting)} jobs still to come")
                raise OutOfTime
            if waiting and now >= zero + waiting[0].arrived_at:
                job = waiting.popleft()
                request = self.requests[JobType(job.kind)]
                heard.append((job, driven.submit(request, due_in_s=job.deadline - job.arrived_at)))
                continue
            if now > noted_at + _NOTED_EVERY_S:
                noted_at = now
                note()
            until_next_s = zero + waiting[0].arrived_at - now if waiting else math.inf
            time.sleep(min(_POLL_S, until_next_s))
        note()


# ---- the mix


def request_of(kind: JobType, options: Options) -> ClipRequest:
    """A clip of the preset, its steps scaled; for the small model of a few pixels and frames."""
    preset = PRESETS[kind]
    width, height = size_of(preset.resolution)
    frames = preset.video_length
    return ClipRequest(
        clip_id=kind.value,
        prompt="prompt",
        negative_prompt="negative prompt",
        width=width // 5 // 16 * 16 if options.tiny else width,
        height=height // 5 // 16 * 16 if options.tiny else height,
        frames=frames // 16 * 4 + 1 if options.tiny else frames,
        steps=max(2, round(preset.sample_steps * options.steps_scale)),
        guidance_scale=preset.guidance_scale,
        flow_shift=preset.sample_shift,
        seed=0,
        deadline=0.0,
    )


def job_kind(name: str, alone: Alone) -> JobKind:
    """The type as the simulator knows it: its phases, stretched so that a job takes its unloaded time."""
    stretch = alone.unloaded_s / (alone.steps * alone.step_s + alone.decode_s)
    phases = (
        Phase(alone.steps, alone.step_s * stretch),
        Phase(alone.latent_frames, alone.decode_s / alone.latent_frames * stretch),
    )
    return JobKind(name, MIX[JobType(name)], alone.promised_s, phases)


def stream(kinds: Sequence[JobKind], *, load: float, decks: int, seed: int) -> list[SimulatedJob]:
    """Jobs in exactly the mix's proportions, shuffled, with exponential gaps stretched so that the load is exactly `load`.

    For short streams: one of `workload.poisson` can be far off the mix and the load that were asked for.
    """
    random = Random(seed)
    common = math.gcd(*(int(kind.weight) for kind in kinds))
    order = [kind for kind in kinds for _ in range(decks * int(kind.weight) // common)]
    random.shuffle(order)
    moments = list(accumulate(random.expovariate(1.0) for _ in order))
    stretch = sum(kind.work_s for kind in order) / load / moments[-1]
    return [
        SimulatedJob(f"{number:06}", kind.name, stretch * moment, stretch * moment + kind.promised_s, kind.phases)
        for number, (kind, moment) in enumerate(zip(order, moments, strict=True))
    ]


def decks_within(seconds: float, kinds: Sequence[JobKind], options: Options) -> int:
    """The most decks that are done in so many seconds, by the simulator and a margin; 0 if not even one is."""
    decks = 0
    while decks < 100:
        jobs = stream(kinds, load=options.load, decks=decks + 1, seed=options.seed)
        if _MARGIN * makespan_s(simulate(jobs, POLICIES[OURS])) > seconds:
            break
        decks += 1
    return decks


def makespan_s(outcomes: Sequence[Outcome]) -> float:
    """When the last job is done."""
    return max(outcome.finished_at for outcome in outcomes)


def known_outcomes(heard: Sequence[tuple[SimulatedJob, Heard]], zero: float) -> list[Outcome]:
    """Of the jobs whose fate is known now: they are done, or late already. Raises the error of one that failed."""
    now = time.monotonic()
    outcomes = []
    for job, clip in heard:
        started_at = (clip.moment(ClipStarted) or math.nan) - zero
        if clip.failure is not None:
            raise clip.failure.error
        if clip.receipt is not None:
            outcomes.append(Outcome(job, started_at, clip.ended_at - zero))
        elif zero + job.deadline < now:
            outcomes.append(Outcome(job, started_at, now - zero))
    return outcomes


def summary(policy: str, load: float, outcomes: Sequence[Outcome], *, simulated: bool, cut: int = 0) -> Replay:
    """How the jobs fared, in all and by type."""
    by_type = {kind.value: [o for o in outcomes if o.job.kind == kind] for kind in MIX}
    types = {name: type_result(group) for name, group in by_type.items() if group}
    return Replay(policy, simulated, load, len(outcomes), cut, share_on_time(outcomes), types)
