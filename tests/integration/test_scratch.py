"""Folders of a killed process go; those of a live one stay."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from serve_app.media.scratch import scratch_folder, sweep_scratch

MAKE_ONE_AND_WAIT = "from serve_app.media.scratch import *; f = scratch_folder(); print(f.name, flush=True); input()"


def test_only_the_folders_of_dead_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / "wan-serve-by-hand").mkdir()
    with (
        scratch_folder() as mine,
        subprocess.Popen(
            [sys.executable, "-c", MAKE_ONE_AND_WAIT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as other,
    ):
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        assert sweep_scratch() == []
        other.kill()
        other.wait()
        assert sweep_scratch() == [theirs]
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([Path(mine).name, "wan-serve-by-hand"])
