"""What a Serve YAML says of autoscaling is checked before anything starts: Serve itself would find it out on its controller."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from serve_app.up import load_config

RULES = {"startup_s": 60, "target_drain_s": 60, "downscale_delay_s": 60, "headroom": 0.2}
POLICY = "deployments.autoscaling:BacklogPolicy"


def write(folder: Path, deployment: str = "Generator", most: int = 4, **kwargs: Any) -> Path:
    autoscaling = {
        "min_replicas": 0,
        "max_replicas": most,
        "policy": {"policy_function": POLICY, "policy_kwargs": kwargs},
    }
    application = {
        "import_path": "serve_app.app:build",
        "args": {"store_url": "redis://unused", "models": {"wan-1.3b": {}, "large": {}}},
        "deployments": [{"name": deployment, "autoscaling_config": autoscaling}],
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"applications": [application]}))
    return path


def test_rules_that_can_be_are_taken(tmp_path: Path) -> None:
    load_config(write(tmp_path, **RULES))
    load_config(write(tmp_path, "Generator-large", model="large", store_url="redis://other", **RULES))


@pytest.mark.parametrize(
    ("deployment", "kwargs", "said"),
    [
        ("Generator", RULES | {"startup": 3}, "unexpected keyword argument 'startup'"),
        ("Generator", {"startup_s": 60}, "missing 3 required"),
        ("Generator", RULES | {"headroom": -1}, "headroom"),
        ("Generator", RULES | {"model": "large"}, "names the model 'large', whose deployment it is not"),
        ("Generator-large", RULES, "names the model 'wan-1.3b', whose deployment it is not"),
        ("Generator", RULES | {"model": "unheard-of"}, "'unheard-of'"),
    ],
)  # fmt: skip
def test_rules_that_cannot_be_are_named(tmp_path: Path, deployment: str, kwargs: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"the policy of {deployment}.*{said}"):
        load_config(write(tmp_path, deployment, **kwargs))
