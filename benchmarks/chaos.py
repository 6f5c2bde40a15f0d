"""Random kills of a whole service under load: what was lost, done twice, mixed up or stuck, and what the kills cost.

    python -m benchmarks.chaos --kills 200

A real Ray cluster of three nodes on this machine (tests/cluster/fleet) with the tiny untrained model on the CPU; users
that submit and follow jobs over HTTP; and at random moments a SIGKILL of a replica of any deployment, of a whole node
or of Valkey, or an outage of the artifact storage. Then everything may settle, and every accepted
job is looked at. The seed fixes what is killed in which order; moments and outcomes are the machine's.
"""

import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import ray
import typer
from matplotlib import pyplot
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from serve_app.errors import StoreUnavailable
from serve_app.jobs.job import JobEvent
from serve_app.jobs.store import JobStore
from tests.cluster.fleet.audit import Audit, Facts, Story, audit, job_ids, quiet_run, settle
from tests.cluster.fleet.fleet import Fleet, until
from tests.cluster.fleet.load import Load, Order
from tests.supabase_server import Answer, Hang

WEIGHTS = {
    "Generator": 25, "Conductor": 15, "Finisher": 15, "Ingress": 15, "node": 10, "Valkey": 12, "storage": 8,
}  # fmt: skip
"""How often each thing is hit, in percent. Ray's control plane is not among them: see tests/cluster/fleet/test_nodes.py."""
REPLICAS = ("Generator", "Conductor", "Finisher", "Ingress")
PATIENCE_S = 300.0
"""Without one job ending for so long after the load has stopped, what is left counts as stuck; so long, too, may a busy
machine take to start a replica."""


@dataclass
class Kill:
    """Something that was done to the fleet. `at`: Unix seconds."""

    kind: str
    at: float
    target: str
    took: list[str] = field(default_factory=list)
    """Ids of the generator replicas that died."""
    ready_at: float | None = None
    """For a kill of a generator: when another one was ready to take over (at once, unless it was the last)."""
    wasted_gpu_s: float = 0.0
    clips: int = 0
    """How many clips it interrupted on a generator."""
    recovery_s: list[float] = field(default_factory=list)
    """For each of them: seconds until its next step, waiting for a model to load apart."""


class Watch:
    """Which generators are ready, twice a second, in a thread of its own."""

    def __init__(self, store_url: str) -> None:
        self._url = store_url
        self.samples: list[tuple[float, frozenset[str]]] = []
        self.killed: set[str] = set()
        """Replicas that died, which the store does not know for some seconds."""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._look()))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stopping.set()
        self._thread.join()

    async def _look(self) -> None:
        store = JobStore(self._url, timeout_s=2.0)
        while not self._stopping.is_set():
            try:
                ids = frozenset(replica.id for replica in await store.replicas())
                self.samples.append((time.time(), ids))
            except StoreUnavailable:
                pass  # killed just now
            await asyncio.sleep(0.5)
        await store.close()

    @property
    def ready(self) -> frozenset[str]:
        """Ids of the generators that work now."""
        at, ids = self.samples[-1] if self.samples else (0.0, frozenset[str]())
        return ids - self.killed if time.time() - at < 2.0 else frozenset()

    def ready_at(self, moment: float, gone: set[str]) -> float | None:
        """When, from `moment` on, a generator was ready that is not among the `gone`."""
        before = [ids for at, ids in self.samples if at <= moment][-1:]
        if before and before[0] - gone:
            return moment
        return next((at for at, ids in self.samples if at > moment and ids - gone), None)


def strike(fleet: Fleet, kind: str, draw: random.Random, watch: Watch) -> Kill:
    """Do one thing to the fleet, and mend what does not mend itself. Of the generators only those that work are hit."""
    if kind in REPLICAS:
        victim = draw.choice(
            until(
                lambda: [one for one in fleet.replicas(kind) if kind != "Generator" or one.id in watch.ready],
                f"a {kind} to kill",
                PATIENCE_S,
            )
        )
        kill = Kill(kind, time.time(), victim.id, took=[victim.id] if kind == "Generator" else [])
        fleet.kill_replica(victim)
        return kill
    if kind == "node":
        generators = fleet.replicas("Generator")
        kill = Kill(kind, time.time(), draw.choice(fleet.nodes()))
        fleet.kill_node(kill.target)
        kill.took = [replica.id for replica in generators if replica.node_id == kill.target]
        time.sleep(draw.uniform(0.5, 2.0))
        fleet.start_node()
        return kill
    kill = Kill(kind, time.time(), kind)
    if kind == "Valkey":
        fleet.kill_store()
        time.sleep(draw.uniform(0.2, 3.0))
        fleet.start_store()
    else:
        fault = draw.choice([Answer(500), Hang()])
        kill.target = "answers 500" if isinstance(fault, Answer) else "hangs"
        with fleet.storage_outage(fault):
            time.sleep(draw.uniform(1.0, 4.0))
    return kill


def plan(seed: int) -> Iterator[tuple[str, random.Random]]:
    """What is hit, one after another, and the randomness for each: the same for the same seed."""
    draw = random.Random(seed)
    while True:
        kind = draw.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        yield kind, random.Random(draw.getrandbits(64))


@dataclass
class Outcome:
    """One run: what was done, what was found."""

    kills: list[Kill]
    audit: Audit
    refused: dict[str, int]
    accepted_at: list[float]
    """Seconds since `began_at`, which is in Unix seconds."""
    began_at: float
    settled_s: float
    """Seconds from the end of the load until every job had ended."""


def storm(
    fleet: Fleet, references: dict[Order, Facts], *, kills: int, minutes: float | None = None, seed: int, users: int, pause_s: float,
    tell: Callable[[str, int], None] = lambda *_: None,
) -> Outcome:  # fmt: skip
    """Load the fleet, hit it `kills` times (or for `minutes`), `pause_s` apart on average, let it settle and audit it."""
    known, began_at, done = job_ids(fleet), time.time(), list[Kill]()
    with Watch(fleet.store.url) as watch:
        with Load(fleet.url, users=users, seed=seed) as load:
            for kind, draw in plan(seed):
                if len(done) >= kills if minutes is None else time.time() - began_at > 60 * minutes:
                    break
                time.sleep(draw.uniform(0.2, 2 * pause_s - 0.2))
                until(lambda: load.check() or watch.ready, "a generator that works", PATIENCE_S)
                tell(f"{len(load.accepted)} jobs accepted, killing {kind}", len(done))
                done.append(strike(fleet, kind, draw, watch))
                watch.killed |= set(done[-1].took)
        stopped_at = time.time()
        tell(f"{len(load.accepted)} jobs accepted, settling", len(done))
        settle(fleet, patience_s=PATIENCE_S)
        settled_s = time.time() - stopped_at
    tell("looking at every job", len(done))
    found = audit(fleet, load.accepted, references, known)
    gone = set[str]()
    for kill in done:
        gone |= set(kill.took)
        kill.ready_at = watch.ready_at(kill.at, gone) if kill.took else None
    for story in found.stories:
        attribute(done, story)
    return Outcome(done, found, load.refused, [one.at - began_at for one in load.accepted], began_at, settled_s)


def attribute(kills: Sequence[Kill], story: Story) -> None:
    """Charge what a job lost with generator replicas, and how long its clip stood still, to the kills that did it."""
    lost = [n for n, event in enumerate(story.events) if event.name == "retry" and _by_a_generator(event.data)]
    for n in lost:
        kill = next((kill for kill in reversed(kills) if kill.took and kill.at <= moment(story.events[n])), None)
        goes_on = next((event for event in story.events[n:] if event.name == "progress" or _is_finishing(event)), None)
        if kill is not None and goes_on is not None:
            kill.clips += 1
            kill.wasted_gpu_s += story.job.wasted_gpu_s / len(lost)
            kill.recovery_s.append(moment(goes_on) - max(kill.at, kill.ready_at or kill.at))


def hit_again(kills: Sequence[Kill], kill: Kill, recovery_s: float) -> bool:
    """Whether something else that a clip needs was killed before the clip went on after `kill`."""
    went_on = max(kill.at, kill.ready_at or kill.at) + recovery_s
    needed = ("Generator", "node", "Conductor", "Valkey")
    return any(other.kind in needed and kill.at < other.at < went_on for other in kills if other is not kill)


def _by_a_generator(failure: dict[str, Any]) -> bool:
    return failure["code"] == "frames_lost" or (failure["code"], failure["stage"]) == ("replica_lost", "generating")


def _is_finishing(event: JobEvent) -> bool:
    return event.name == "stage" and event.data["stage"] == "finishing"


def moment(event: JobEvent) -> float:
    """When an event was written, Unix seconds: its id begins with the store's clock."""
    return int(event.id.partition("-")[0]) / 1000


# ---- what is shown


def figures(outcome: Outcome) -> dict[str, Any]:
    """The run in numbers."""
    found, kills = outcome.audit, outcome.kills
    hit = [kill for kill in kills if kill.clips]
    recoveries = [seconds for kill in hit for seconds in kill.recovery_s]
    undisturbed = [seconds for kill in hit for seconds in kill.recovery_s if not hit_again(kills, kill, seconds)]
    return {
        "kills": len(kills),
        "kills by kind": dict(Counter(kill.kind for kill in kills)),
        "jobs accepted": found.accepted,
        "succeeded": found.succeeded,
        "failed": dict(found.failed),
        "lost": len(found.lost),
        "stuck": len(found.stuck),
        "done twice": len(found.twice),
        "mixed up": len(found.mixed_up),
        "followers that missed an event": len(found.missed),
        "jobs that nobody asked for": len(found.unasked),
        "submissions sent again": outcome.refused,
        "GPU-seconds useful": round(found.gpu_s, 1),
        "GPU-seconds wasted": round(found.wasted_gpu_s, 2),
        "kills that interrupted clips": len(hit),
        "clips interrupted": sum(kill.clips for kill in hit),
        "wasted GPU-seconds a kill, mean": round(statistics.mean([kill.wasted_gpu_s for kill in hit] or [0.0]), 3),
        "wasted GPU-seconds a kill, most": round(max([kill.wasted_gpu_s for kill in hit] or [0.0]), 3),
        "recoveries that no other kill ran into": len(undisturbed),
        "such a recovery, median s": round(statistics.median(undisturbed or [0.0]), 2),
        "such a recovery, longest s": round(max(undisturbed or [0.0]), 2),
        "any recovery, median s": round(statistics.median(recoveries or [0.0]), 2),
        "any recovery, longest s": round(max(recoveries or [0.0]), 2),
        "settled after s": round(outcome.settled_s, 1),
    }


def show(numbers: dict[str, Any], console: Console) -> None:
    """The table."""
    table = Table(title="Random kills under load", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in numbers.items():
        text = ", ".join(f"{key} {n}" for key, n in value.items()) or "0" if isinstance(value, dict) else f"{value}"
        table.add_row(name, text)
    console.print(table)


def plot(outcome: Outcome, path: Path) -> None:
    """Accepted and finished jobs over time, with a mark for each kill."""
    ended = sorted((story.job.finished_at or 0) - outcome.began_at for story in outcome.audit.stories)
    figure, axis = pyplot.subplots(figsize=(10, 4))
    for moments, label in ((outcome.accepted_at, "accepted"), (ended, "ended")):
        axis.step(sorted(moments), range(1, len(moments) + 1), where="post", label=f"jobs {label}")
    for n, kind in enumerate(WEIGHTS):
        marks = [kill.at - outcome.began_at for kill in outcome.kills if kill.kind == kind]
        axis.plot(
            marks, [-(n + 1) * len(ended) / 30] * len(marks), "|", markersize=7, label=f"{kind} hit ({len(marks)})"
        )
    axis.set(xlabel="seconds", ylabel="jobs", title=f"{len(ended)} jobs through {len(outcome.kills)} kills")
    axis.legend(fontsize=8, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(
    *,
    kills: Annotated[int, typer.Option(min=1, help="How many.")] = 200,
    minutes: Annotated[float | None, typer.Option(help="For so long, instead of a number of kills.")] = None,
    seed: Annotated[int, typer.Option(help="What is killed in which order.")] = 1,
    users: Annotated[int, typer.Option(min=1, help="Each has one job at a time.")] = 4,
    pause_s: Annotated[float, typer.Option(min=0.5, help="Mean seconds between two kills.")] = 5.0,
    out: Annotated[Path, typer.Option(help="Where to write, without suffix.")] = Path("benchmarks/results/chaos"),
) -> None:
    """Hit a service under load at random and count what was lost. Exits with 1 where a promise was broken."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves nothing behind, as Ctrl-C does
    console = Console(file=sys.stdout)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Ray tells its driver's standard output about every death.
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), Progress(*columns, console=console) as progress:
        bar = progress.add_task("starting the cluster", total=kills if minutes is None else None)
        with Fleet() as fleet:
            settings = fleet.config()["applications"][0]["args"]
            references = quiet_run(fleet, lambda text: progress.update(bar, description=text))
            outcome = storm(
                fleet, references, kills=kills, minutes=minutes, seed=seed, users=users, pause_s=pause_s,
                tell=lambda text, done: progress.update(bar, description=text, completed=done),
            )  # fmt: skip
            progress.update(bar, description="stopping", completed=len(outcome.kills))
    numbers = figures(outcome)
    show(numbers, console)
    for finding in outcome.audit.broken:
        console.print(f"[red]{finding}[/]", highlight=False)
    length = f"--kills {kills}" if minutes is None else f"--minutes {minutes:g}"
    record = {
        "command": f"python -m benchmarks.chaos {length} --seed {seed} --users {users} --pause-s {pause_s:g}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, Ray {ray.__version__}",
        "settings": {
            name: settings[name] for name in ("lease_s", "checkpoint_every_s", "look_ahead_s", "storage_timeout_s")
        },
        "figures": numbers,
        "broken promises": outcome.audit.broken,
        "failed": [
            {
                "type": job.spec.type,
                "error": job.error.code,
                "failures": [failure.model_dump() for failure in job.failures],
            }
            for job in (story.job for story in outcome.audit.stories)
            if job.error
        ],
        "kills": [asdict(kill) | {"at": round(kill.at - outcome.began_at, 2)} for kill in outcome.kills],
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    plot(outcome, out.with_suffix(".png"))
    console.print(f"Written: {out.with_suffix('.json')}, {out.with_suffix('.png')}")
    raise typer.Exit(1 if outcome.audit.broken else 0)


if __name__ == "__main__":
    typer.run(main)
