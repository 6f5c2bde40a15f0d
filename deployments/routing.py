"""The request router of generator replicas: a clip goes to the replica with the least backlog in GPU-seconds.

Serve's own router counts requests, and a video is worth a hundred pictures. Serve runs a router in the process that holds the
handle: a conductor, which hears every replica's report from the JobStore and tells it to `placement.HERE`. Replicas that drain
are no candidates: Serve takes them out before it stops them.
"""

import time

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from serve_app.scheduling import placement  # the module, not what is in it: Serve pickles this file by value


class BacklogRouter(RequestRouter):
    """Serve's extension point for routers (alpha in Ray 2.60), for requests whose first argument is a ClipRequest."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The candidates in order of preference, each a rank of its own."""
        if pending_request is None:
            return [candidate_replicas]
        clip = pending_request.args[0]
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        order = placement.HERE.place(clip.clip_id, clip.estimated_gpu_s, list(by_id), time.monotonic())
        return [[by_id[replica]] for replica in order]
