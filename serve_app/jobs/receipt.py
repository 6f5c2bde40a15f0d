"""The receipt of a job: what was asked for and what ran, enough to make the artifact again."""

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serve_app import __version__
from serve_app.jobs.job import Job

if TYPE_CHECKING:
    from serve_app.engine.clip import ClipReceipt

RECEIPT_NAME = "receipt.json"
"""The receipt's name among a job's artifacts."""


UNTRAINED_NOTICE = "Made by the untrained test model: the output is noise, not what the prompt says."
PACED_NOTICE = "A rehearsal: no model ran, and the frames only say so."

SUMMED = ("steps", "gpu_s", "decode_ms")


def make_receipt(job: Job, clips: Sequence["ClipReceipt"]) -> dict[str, Any]:
    """JSON-ready receipt. `trained` is false where the tiny test model made noise or none ran; `notice` says so in words.

    Of a video of several clips, what is counted (steps, seconds) is the sum, the rest is the first clip's, and `clips` has
    each one's own.
    """
    receipt = {
        "job_id": job.id,
        "service": f"wan-serve {__version__}",
        "spec": job.spec.model_dump(mode="json"),
        "attempts": job.attempts,
        **dataclasses.asdict(clips[0]),
    }
    if len(clips) > 1:
        each = [dataclasses.asdict(clip) for clip in clips]
        receipt |= {name: sum(clip[name] for clip in each) for name in SUMMED}
        receipt["clips"] = each
    if not clips[0].trained:
        receipt["notice"] = PACED_NOTICE if clips[0].paced else UNTRAINED_NOTICE
    return receipt


def receipt_json(receipt: dict[str, Any]) -> bytes:
    """The content of `receipt.json`."""
    return (json.dumps(receipt, indent=2, ensure_ascii=False) + "\n").encode()
