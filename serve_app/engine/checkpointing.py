"""The engine's side of the checkpoint store: writing a clip's snapshots to it, and finding what a clip can go on from.

Nothing here makes the engine's thread wait for a disk or a network: one thread writes, and each look into the store has its
own. What they find goes back to the engine's thread through `post`.
"""

import hashlib
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tenacity import (
    Retrying,
    retry_if_exception_type,
    sleep_using_event,
    stop_after_attempt,
    stop_when_event_set,
    wait_exponential_jitter,
)

from serve_app.engine.checkpoints import Checkpoint, CheckpointHeader, CheckpointStore
from serve_app.engine.clip import ClipRequest
from serve_app.engine.clip_state import ClipState
from serve_app.engine.load import ModelSource
from serve_app.engine.snapshot import Snapshot, trimmed
from serve_app.engine.solver import SolverState
from serve_app.errors import CheckpointInvalid, CheckpointUnavailable

_log = logging.getLogger(__name__)

_CLOSE_LIMIT_S = 5.0
"""How long `close` waits for the writing thread: a store that hangs must not keep a process alive."""
_FINAL_ATTEMPTS = 5
"""For the latents after the last step, over about 8 s: no later snapshot makes up for them, and without them a lost frame costs
the whole denoising again."""


class Checkpointing:
    """Writes and finds the checkpoints of one engine's clips in `store`.

    `post` hands a function to the engine's thread; `written` is called there after each write, with the error if it failed.
    """

    def __init__(
        self,
        store: CheckpointStore,
        source: ModelSource,
        post: Callable[[Callable[[], None]], None],
        written: Callable[[ClipState, CheckpointHeader, CheckpointUnavailable | None], None],
    ) -> None:
        self._store = store
        self._source = source
        self._post = post
        self._written = written
        self.failures = 0
        """Snapshots, writes and reads that failed; their clips went on without."""
        self._waiting: dict[str, tuple[ClipState, Checkpoint]] = {}
        """The newest unwritten state of each key: a slow store costs no more memory than that."""
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._write_forever, name="checkpoint-writer", daemon=True)
        self._writer.start()

    def write(self, clip: ClipState, snapshot: Snapshot) -> None:
        """Hand a snapshot whose copies are done to the writing thread."""
        key = clip.request.checkpoint_key
        assert key is not None
        header = CheckpointHeader(
            key=key,
            made_from=_made_from(clip.request, self._source),
            step=snapshot.step,
            gpu_s=clip.gpu_s,
            step_s=tuple(clip.step_s),
            resumed_from_steps=clip.resumed_from_steps,
        )
        with self._changed:
            self._waiting[key] = clip, Checkpoint(header, snapshot.tensors)
            self._changed.notify_all()

    def forget(self, key: str) -> None:
        """Drop what is not written yet: the clip was given up, and its job may be removing its checkpoints now."""
        with self._changed:
            self._waiting.pop(key, None)

    def find(self, clip: ClipState) -> None:
        """Look for the clip's checkpoint in a thread of its own; then `clip.checkpoint` is set and `clip.loading_until` None."""
        threading.Thread(target=self._find, args=(clip,), name="checkpoint-reader", daemon=True).start()

    def give_up_finding(self, clip: ClipState) -> None:
        """Let a clip start at step 0 whose look into the store takes too long."""
        self.note_failure(f"clip {clip.request.clip_id} starts at step 0: no answer from the checkpoint store")
        clip.loading_until = None

    def note_failure(self, what: str) -> None:
        """Count and log a failure, with the exception that is being handled if there is one."""
        with self._changed:
            self.failures += 1
        _log.warning(what, exc_info=sys.exc_info()[1])

    def close(self) -> None:
        """Write what waits, for a few seconds at most, and end the writing thread."""
        with self._changed:
            self._closing.set()
            self._changed.notify_all()
        self._writer.join(_CLOSE_LIMIT_S)

    # ---- in threads of their own

    def _write_forever(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
                if not self._waiting:
                    return
                key = next(iter(self._waiting))
                clip, checkpoint = self._waiting.pop(key)
            error = self._save(clip, replace(checkpoint, tensors=trimmed(checkpoint.tensors)))
            self._post(partial(self._written, clip, checkpoint.header, error))

    def _save(self, clip: ClipState, checkpoint: Checkpoint) -> CheckpointUnavailable | None:
        final = checkpoint.header.step == clip.request.steps
        attempts = Retrying(
            retry=retry_if_exception_type(CheckpointUnavailable),
            wait=wait_exponential_jitter(initial=0.5, max=4.0, jitter=0.2),
            stop=stop_after_attempt(_FINAL_ATTEMPTS if final else 1) | stop_when_event_set(self._closing),
            sleep=sleep_using_event(self._closing),
            reraise=True,
        )
        try:
            attempts(self._try_to_save, clip, checkpoint)
        except Exception as error:
            return error if isinstance(error, CheckpointUnavailable) else CheckpointUnavailable(str(error))
        return None

    def _try_to_save(self, clip: ClipState, checkpoint: Checkpoint) -> None:
        if clip.cancelled:
            return  # its job may be removing its checkpoints now
        try:
            self._store.save(checkpoint)
        except Exception:
            self.note_failure(f"checkpoint {checkpoint.header.key} after step {checkpoint.header.step} was not written")
            raise

    def _find(self, clip: ClipState) -> None:
        found: Checkpoint | None = None
        key = clip.request.checkpoint_key
        assert key is not None
        try:
            found = self._store.load(key)
            if found is not None:
                _check(found, clip.request, self._source)
        except CheckpointInvalid as error:
            found = None
            _log.warning("clip %s starts at step 0: %s", clip.request.clip_id, error)
            self._discard(key)
        except Exception:
            found = None
            self.note_failure(f"clip {clip.request.clip_id} starts at step 0: its checkpoint was not read")

        def hand_over() -> None:
            if clip.loading_until is not None:
                clip.checkpoint, clip.loading_until = found, None
                clip.saved_step = 0 if found is None else found.header.step

        self._post(hand_over)

    def _discard(self, key: str) -> None:
        try:
            self._store.delete(key)
        except CheckpointUnavailable as error:
            _log.warning("%s", error)


def _made_from(request: ClipRequest, source: ModelSource) -> dict[str, str | int | float | None]:
    """All that decides a clip's bits, apart from machine and kernels. Prompts are private, so they go in as hashes."""
    return {
        "prompt": hashlib.sha256(request.prompt.encode()).hexdigest(),
        "negative_prompt": hashlib.sha256(request.negative_prompt.encode()).hexdigest(),
        "width": request.width,
        "height": request.height,
        "frames": request.frames,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "flow_shift": request.flow_shift,
        "seed": request.seed,
        "profile": request.profile,
        "model": source.name_or_path,
        "model_revision": source.revision,
    }


def _check(checkpoint: Checkpoint, request: ClipRequest, source: ModelSource) -> None:
    """Raise `CheckpointInvalid` unless `request` on this model can go on from `checkpoint`."""
    header, wanted = checkpoint.header, _made_from(request, source)
    differ = sorted(name for name in wanted if header.made_from.get(name) != wanted[name])
    if differ:
        raise CheckpointInvalid(f"checkpoint {header.key} is of another clip: other {', '.join(differ)}")
    names = {"latents"}
    if header.step < request.steps:
        names |= {f"solver.{name}" for name in SolverState.__dataclass_fields__} | {"prompt_embeds"}
        names |= {"negative_prompt_embeds"} if request.guidance_scale > 1.0 else set()
    if checkpoint.tensors.keys() != names:
        raise CheckpointInvalid(
            f"checkpoint {header.key} holds {sorted(checkpoint.tensors)} where a clip after step {header.step} "
            f"needs {sorted(names)}"
        )
