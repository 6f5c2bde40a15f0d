"""Each alert fires when it should, as Prometheus' own promtool evaluates them; skipped where that is not installed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
RULES = yaml.safe_load((ROOT / "cluster" / "observability" / "prometheus-rule.yaml").read_text())["spec"]
STORY = (Path(__file__).parent / "alerts.yaml").read_text()


def test_the_story_has_every_alert() -> None:
    assert set(re.findall(r'alertname="(\w+)"', STORY)) == {rule["alert"] for rule in RULES["groups"][0]["rules"]}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian: apt-get install prometheus)")
def test_every_alert_fires(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(RULES))
    (tmp_path / "alerts.yaml").write_text(STORY)
    command = ["promtool", "test", "rules", "alerts.yaml"]
    ran = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
