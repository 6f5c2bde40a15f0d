"""What arrives: streams of jobs by type, to replay through the simulator or a real engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from serve_app.scheduling.cost import Architecture, Card, decode_gpu_s, step_gpu_s


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of equal length: the denoising steps of a clip, or the latent frames of its decode."""

    steps: int
    step_s: float
    """Device seconds of one."""

    @property
    def work_s(self) -> float:
        """Device seconds of all."""
        return self.steps * self.step_s


@dataclass(frozen=True, slots=True)
class SimulatedJob:
    """A job of one clip, or of several. Moments are seconds on the virtual clock.

    Raises ValueError if a phase has no steps or takes no time.
    """

    job_id: str
    kind: str
    """Its job type; for reports only."""
    arrived_at: float
    deadline: float
    phases: tuple[Phase, ...]
    """Of its clip; of its first one, if it has several."""
    further_clips: tuple[tuple[Phase, ...], ...] = ()
    """The phases of each of the others. All clips of a job are placed at once and run independently."""
    work_s: float = field(init=False, compare=False, repr=False)
    """Device seconds of all clips."""

    def __post_init__(self) -> None:
        work_s = 0.0
        for phases in (self.phases, *self.further_clips):
            if not phases:
                raise ValueError(f"job {self.job_id} has a clip without phases")
            for phase in phases:
                if phase.steps < 1 or not phase.step_s > 0:
                    raise ValueError(
                        f"job {self.job_id} needs phases of at least one step that takes time, got {phases}"
                    )
                work_s += phase.work_s
        object.__setattr__(self, "work_s", work_s)


@dataclass(frozen=True, slots=True)
class JobKind:
    """A job type in a mix."""

    name: str
    weight: float
    """How many of it come, relative to the others."""
    promised_s: float
    """Seconds from arrival to deadline."""
    phases: tuple[Phase, ...]

    @property
    def work_s(self) -> float:
        """Device seconds of one job."""
        return sum(phase.work_s for phase in self.phases)


def clip_phases(
    card: Card, architecture: Architecture, *, width: int, height: int, frames: int, steps: int
) -> tuple[Phase, Phase]:
    """A clip by the cost model: its denoising steps, then its decode, one latent frame at a time."""
    latent_frames = architecture.latent_frames(frames)
    decode_s = decode_gpu_s(card, width=width, height=height, frames=frames)
    step_s = step_gpu_s(card, architecture, width=width, height=height, frames=frames)
    return Phase(steps, step_s), Phase(latent_frames, decode_s / latent_frames)


def poisson(
    kinds: Sequence[JobKind], *, load: float, jobs: int, seed: int, replicas: int = 1
) -> Iterator[SimulatedJob]:
    """That many jobs of the mix, in order of arrival, coming independently of each other.

    `load` is the share of the replicas' time that the work takes in the long run (1 = all of it); a stream of few jobs
    can be some way off it.
    """
    random = Random(seed)
    weights = [kind.weight for kind in kinds]
    mean_work_s = sum(kind.weight * kind.work_s for kind in kinds) / sum(weights)
    arrived_at = 0.0
    for number in range(jobs):
        arrived_at += random.expovariate(load * replicas / mean_work_s)
        [kind] = random.choices(kinds, weights)
        yield SimulatedJob(f"{number:06}", kind.name, arrived_at, arrived_at + kind.promised_s, kind.phases)
