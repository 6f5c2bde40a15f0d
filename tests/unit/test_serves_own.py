"""The rule that benchmarks/autoscaling.py compares with decides as Serve's own code does."""

from random import Random
from types import SimpleNamespace

import pytest
from ray.serve import autoscaling_policy
from ray.serve.config import AutoscalingConfig

from benchmarks.autoscaling import SETTINGS, ServesOwn
from serve_app.scheduling.claim import Outstanding
from serve_app.scheduling.scale import Backlog


@pytest.mark.parametrize("seed", range(30))
def test_it_decides_as_serve_does(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    random, now = Random(seed), 0.0
    target_ongoing = random.choice((1.0, 2.0, 4.0))
    config = AutoscalingConfig(
        min_replicas=0,
        max_replicas=SETTINGS.max_replicas,
        target_ongoing_requests=target_ongoing,
        upscale_delay_s=0.0,
        downscale_delay_s=SETTINGS.downscale_delay_s,
    )
    serves = autoscaling_policy._apply_autoscaling_config(autoscaling_policy.default_autoscaling_policy)
    monkeypatch.setattr(autoscaling_policy.time, "time", lambda: now)
    ours, asked, state, here = ServesOwn(SETTINGS, target_ongoing), 0, {}, 0
    clip = Outstanding(0.0, 1.0)
    for _ in range(400):
        now += random.choice((1.0, 10.0, 60.0))
        here = random.choice((here, asked))  # replicas come a while after they were asked for
        waiting, running = random.choice((0, 0, 0, 1, 5, 40)), random.choice((0, 1, 2)) * here
        context = SimpleNamespace(
            config=config, current_num_replicas=here, target_num_replicas=asked,
            total_num_requests=float(waiting + running), policy_state=state,
        )  # fmt: skip
        wanted, state = serves(context)
        asked = max(0, min(SETTINGS.max_replicas, int(wanted)))  # Serve's controller applies the bounds around it
        replicas = [[clip] * (running // here) for _ in range(here)]
        assert ours.decide(Backlog([clip] * waiting, replicas, 0), now).replicas == asked
