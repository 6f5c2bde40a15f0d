"""The clips that are alive, what they are told, and the one way out for them."""

import logging
import threading

from serve_app.engine.clip import ClipDone, ClipEvent, ClipFailed
from serve_app.engine.clip_state import ClipState
from serve_app.errors import EngineError, ReplicaDraining, WanServeError

_log = logging.getLogger(__name__)


class AliveClips:
    """From `add` to `end` a clip is in `by_id`, in order of arrival. Looking and `add` are for any thread, the rest for one."""

    def __init__(self) -> None:
        self.by_id: dict[str, ClipState] = {}
        self._changed = threading.Condition()
        self._refusing = False

    def add(self, clip: ClipState) -> None:
        """Let a clip in. Raises `EngineError` for a `clip_id` that is alive, `ReplicaDraining` after `refuse_more`."""
        clip_id = clip.request.clip_id
        with self._changed:
            if self._refusing:
                raise ReplicaDraining(f"clip {clip_id}: the engine takes no more clips")
            if clip_id in self.by_id:
                raise EngineError(f"clip {clip_id} is alive already")
            self.by_id[clip_id] = clip

    def refuse_more(self) -> None:
        """Let no more clips in."""
        with self._changed:
            self._refusing = True

    def wait_until_none(self) -> None:
        """Block until no clip is alive."""
        with self._changed:
            self._changed.wait_for(lambda: not self.by_id)

    def all(self) -> list[ClipState]:
        """All of them, in order of arrival."""
        with self._changed:
            return list(self.by_id.values())

    def get(self, clip_id: str) -> ClipState | None:
        """The clip of that name, if it is alive."""
        return self.by_id.get(clip_id)

    def __contains__(self, clip: ClipState) -> bool:
        return self.by_id.get(clip.request.clip_id) is clip

    def tell(self, clip: ClipState, event: ClipEvent) -> None:
        """Tell the clip's owner; one whose listener fails ends."""
        try:
            clip.on_event(event)
        except Exception as error:
            _log.exception("clip %s: on_event failed on %s", clip.request.clip_id, type(event).__name__)
            self.fail(clip, EngineError(f"clip {clip.request.clip_id}: its listener failed: {error}"))

    def fail(self, clip: ClipState, error: WanServeError) -> None:
        """Give the clip no more device time, and end it when what it has under way is done: only then is its cost known."""
        clip.ending = error
        clip.free()
        if not clip.units_in_flight:
            self.end(clip, ClipFailed(clip.request.clip_id, error, clip.gpu_s))

    def end(self, clip: ClipState, last_event: ClipDone | ClipFailed) -> None:
        """The only way out for a clip: leaves nothing on the device and tells exactly one last event."""
        with self._changed:
            if clip not in self:
                return
            del self.by_id[clip.request.clip_id]
        clip.free()
        self.tell(clip, last_event)
        with self._changed:
            self._changed.notify_all()
