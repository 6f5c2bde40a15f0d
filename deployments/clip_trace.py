"""The part of a job's trace in which a generator replica has one of its clips."""

from serve_app.engine.clip import ClipDone, ClipEvent, ClipFailed, ClipRequest, ClipStarted, StepDone
from serve_app.tracing import Facts, Stages, Tracing


class ClipTrace:
    """A span of a clip, with those of its phases: waiting, text, denoise, decode."""

    def __init__(self, tracing: Tracing, request: ClipRequest, parent: str | None, *, replica: str) -> None:
        shape = f"{request.width}x{request.height}x{request.frames}"
        facts: Facts = {"clip_id": request.clip_id, "shape": shape, "steps": request.steps, "replica": replica}
        self._stages = Stages(tracing, "clip", parent, facts=facts)
        self._stages.enter("waiting")
        self._stepped = False

    def event(self, event: ClipEvent) -> None:
        """Something happened to it. Steps that the device has done since the last word of it are in the phase under way."""
        match event:
            case ClipStarted():
                self._stages.enter("text")
            case StepDone() if event.step == event.steps:
                self._stages.enter("decode")
            case StepDone() if not self._stepped:
                self._stepped = True
                self._stages.enter("denoise")
            case ClipDone():
                self._stages.end(facts={"gpu_s": event.receipt.gpu_s})
            case ClipFailed():
                self._stages.end(failed=event.error.message, facts={"gpu_s": event.gpu_s})

    def end(self) -> None:
        """Nobody wants it any more; without effect where it has ended."""
        self._stages.end(failed="closed before its end")
