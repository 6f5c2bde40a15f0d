"""The jobs of a plan: from a synthetic mix, a trace in a CSV file, or what a JobStore remembers."""

import csv
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from serve_app.api.admit import admit
from serve_app.api.schemas import JobRequest
from serve_app.errors import InvalidValue, WanServeError
from serve_app.jobs.job import Job, JobSpec, JobStatus
from serve_app.jobs.plan import generated_frames
from serve_app.jobs.presets import DEFAULT_MODEL_NAME, JobType
from serve_app.jobs.store import JobStore
from serve_app.scheduling.cost import ARCHITECTURES, CARDS, deadline
from serve_app.scheduling.workload import JobKind, Phase, SimulatedJob, clip_phases, poisson
from serve_app.settings import ModelSettings, Settings

OVERRIDES = {"resolution": str, "video_length": int, "seconds": float, "sample_steps": int}
"""Columns of a trace that change how much work a job is; names and limits are those of POST /v1/jobs."""
COLUMNS = ("arrived_at_s", "job_type", *OVERRIDES, "estimated_gpu_s")


class Demand(Protocol):
    """Where jobs come from. Can be asked again for the same ones, in this process or another."""

    def jobs(self) -> Iterable[SimulatedJob]:
        """The jobs, in order of arrival."""


@dataclass(frozen=True)
class Recorded:
    """Jobs that are known one by one."""

    known: Sequence[SimulatedJob]

    def jobs(self) -> Iterable[SimulatedJob]:
        """All of them."""
        return self.known


@dataclass(frozen=True)
class Mix:
    """`count` jobs that come independently of each other (a Poisson process), `per_hour` on average. Same seed, same jobs."""

    kinds: Sequence[JobKind]
    per_hour: float
    count: int
    seed: int = 0

    @property
    def load_gpus(self) -> float:
        """GPUs that the work keeps busy on average."""
        weights = sum(kind.weight for kind in self.kinds)
        return self.per_hour / 3600 * sum(kind.weight * kind.work_s for kind in self.kinds) / weights

    def jobs(self) -> Iterator[SimulatedJob]:
        """Made as they are asked for."""
        return poisson(self.kinds, load=self.load_gpus, jobs=self.count, seed=self.seed)


class Costs:
    """What jobs take on a card, and what is promised for them, as the service itself would say it."""

    def __init__(self, card: str, architecture: str = "1.3B") -> None:
        model = ModelSettings(reference_card=card, architecture=architecture)
        self._card, self._architecture = CARDS[model.reference_card], ARCHITECTURES[model.architecture]
        self._settings = Settings(
            models={DEFAULT_MODEL_NAME: model}, default_model=DEFAULT_MODEL_NAME, job_types={}, storage="local"
        )
        self._asked = lru_cache(maxsize=10_000)(self._ask)

    def kind(self, job_type: JobType, weight: float = 1.0) -> JobKind:
        """A job type's preset, in a mix."""
        asked = self._asked(job_type.value)
        [phases] = asked.clips
        return JobKind(job_type.value, weight, asked.promised_s, phases)

    def job(
        self, job_id: str, arrived_at: float, job_type: str, gpu_s: float | None = None, **overrides: Any
    ) -> SimulatedJob:
        """A job as POST /v1/jobs would take it; `gpu_s`: it takes so many GPU-seconds in all. Raises WanServeError."""
        asked = self._asked(job_type, **overrides)
        clips, promised_s = asked.clips, asked.promised_s
        if gpu_s is not None:
            preset = self._asked(job_type)
            stretch = gpu_s / asked.work_s
            clips = tuple(tuple(Phase(phase.steps, phase.step_s * stretch) for phase in clip) for clip in clips)
            promised_s = deadline(0.0, preset.promised_s, gpu_s, preset.work_s)
        return SimulatedJob(job_id, job_type, arrived_at, arrived_at + promised_s, clips[0], clips[1:])

    def job_of_record(self, job: Job) -> SimulatedJob:
        """A job of the past, as if it came again on this card; its promise is that of its time."""
        clips = self._clips(job.spec)
        return SimulatedJob(job.id, job.spec.type.value, job.created_at, job.deadline, clips[0], clips[1:])

    def _ask(self, job_type: str, **overrides: Any) -> "_Asked":
        request = JobRequest(type=job_type, prompt="planned", seed=0, **overrides)
        job = admit(request, "planner", self._settings, now=0.0)
        clips = self._clips(job.spec)
        return _Asked(clips, job.deadline)

    def _clips(self, spec: JobSpec) -> tuple[tuple[Phase, ...], ...]:
        def phases(frames: int, steps: int) -> tuple[Phase, ...]:
            size = {"width": spec.width, "height": spec.height, "frames": generated_frames(frames)}
            return clip_phases(self._card, self._architecture, **size, steps=steps)

        return tuple(phases(clip.frames, clip.sample_steps) for clip in spec.clips)


@dataclass(frozen=True)
class _Asked:
    clips: tuple[tuple[Phase, ...], ...]
    promised_s: float

    @property
    def work_s(self) -> float:
        return sum(phase.work_s for clip in self.clips for phase in clip)


# ---- a trace


def read_trace(path: Path, costs: Costs) -> Recorded:
    """The jobs of a CSV file with a header: `arrived_at_s` and `job_type`, and any other of COLUMNS; an empty cell is the preset's.

    Raises InvalidValue, which names the line and the value, where something is missing, unknown or impossible.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            _check_header(path, rows.fieldnames or ())
            jobs = [_job_of_row(f"{path}, line {rows.line_num}", rows.line_num, row, costs) for row in rows]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidValue(f"{path} cannot be read: {error}") from None
    except csv.Error as error:
        raise InvalidValue(f"{path} is no CSV file: {error}") from None
    if not jobs:
        raise InvalidValue(f"{path} has no jobs, only a header")
    return Recorded(sorted(jobs, key=lambda job: job.arrived_at))


def _check_header(path: Path, names: Sequence[str]) -> None:
    known = f"columns are {', '.join(COLUMNS)}"
    for name in COLUMNS[:2]:
        if name not in names:
            raise InvalidValue(f"{path}, line 1 has no column {name!r}", hint=f"The first line names them; {known}.")
    for name in names:
        if name not in COLUMNS:
            raise InvalidValue(f"{path}, line 1 has an unknown column {name!r}", hint=f"Known {known}.")


def _job_of_row(where: str, line: int, row: dict[str, Any], costs: Costs) -> SimulatedJob:
    if None in row or None in row.values():
        raise InvalidValue(f"{where} has another number of values than the first line has names")
    arrived_at = _number(where, "arrived_at_s", row, float)
    gpu_s = _number(where, "estimated_gpu_s", row, float) if row.get("estimated_gpu_s") else None
    if gpu_s is not None and gpu_s <= 0:
        raise InvalidValue(f"{where}: estimated_gpu_s is {gpu_s:g}; it must be more than 0")
    overrides = {name: _number(where, name, row, kind) for name, kind in OVERRIDES.items() if row.get(name)}
    job_type = row["job_type"].strip()
    if job_type not in list(JobType):
        raise InvalidValue(f"{where}: job_type is {job_type!r}; it must be one of {', '.join(JobType)}")
    try:
        return costs.job(f"{line:07}", arrived_at, job_type, gpu_s, **overrides)
    except WanServeError as error:
        raise InvalidValue(f"{where}: {error.message}", hint=error.hint) from None


def _number(where: str, name: str, row: dict[str, Any], kind: type) -> Any:
    text = row[name].strip()
    try:
        value = kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except ValueError:
        what = {int: "a whole number", float: "a finite number"}[kind]
        raise InvalidValue(f"{where}: {name} is {text!r}; it must be {what}") from None
    return value


# ---- the past


async def read_history(store: JobStore, model: str, costs: Costs) -> Recorded:
    """The jobs of a model that a store remembers to have succeeded or failed. Raises StoreUnavailable; InvalidValue: there is none."""
    ended = (JobStatus.SUCCEEDED, JobStatus.FAILED)
    jobs = [
        costs.job_of_record(job) async for job in store.history() if job.spec.model == model and job.status in ended
    ]
    if not jobs:
        raise InvalidValue(
            f"the job store remembers no finished job of the model {model}",
            hint="Name its store with --store-url (and --store-prefix), or plan a synthetic mix.",
        )
    return Recorded(sorted(jobs, key=lambda job: (job.arrived_at, job.job_id)))
