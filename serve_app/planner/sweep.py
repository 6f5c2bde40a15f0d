"""Many settings tried on one load: which of those that meet a target costs least."""

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields, replace
from functools import partial
from itertools import product
from typing import Any

from serve_app.errors import InvalidValue
from serve_app.planner.demand import Demand
from serve_app.planner.plan import ClusterSettings, Plan, plan

SWEPT: dict[str, type] = {field.name: type(field.default) for field in fields(ClusterSettings)}
"""What can be swept, and the type of each."""


def axes_of(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`max_replicas=4,8` ... as values by name. Raises InvalidValue."""
    axes: dict[str, list[Any]] = {}
    for text in texts:
        name, _, values = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in SWEPT:
            raise InvalidValue(f"--sweep {text!r} names no setting", hint=f"Settings are {', '.join(SWEPT)}.")
        try:
            axes[name] = [SWEPT[name](value) for value in values.split(",")]
        except ValueError:
            raise InvalidValue(
                f"--sweep {text!r}: {values!r} is no list of numbers", hint=f"Write it as {name}=1,2,4."
            ) from None
    return axes


def combinations(base: ClusterSettings, axes: dict[str, list[Any]]) -> list[ClusterSettings]:
    """Every combination of the values, the rest as in `base`. Raises InvalidValue where one is impossible."""
    return [replace(base, **dict(zip(axes, values, strict=True))) for values in product(*axes.values())]


def sweep(
    demand: Demand, settings: Sequence[ClusterSettings], told: Callable[[int], None] = lambda count: None
) -> list[Plan]:
    """A plan for each, in that order, on all cores; `told` hears how many are made."""
    workers = min(os.cpu_count() or 1, len(settings))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(partial(plan, demand, one)) for one in settings]
        for count, _ in enumerate(as_completed(futures), 1):
            told(count)
        return [future.result() for future in futures]


def cheapest(plans: Sequence[Plan], target: float) -> Plan | None:
    """Of those whose share of jobs in time is `target` or more the cheapest: by node time, then by the share."""
    meeting = [one for one in plans if one.on_time >= target]
    return min(meeting, key=lambda one: (one.cost, one.node_hours, -one.on_time), default=None)
