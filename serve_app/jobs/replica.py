"""What a generator replica tells the store about itself, once a second: who it is and which clips it holds."""

from pydantic import BaseModel


class ClipReport(BaseModel):
    """A clip that a replica holds. `remaining_s` are this replica's own device seconds, decode included."""

    clip_id: str
    job_id: str
    deadline: float
    step: int
    steps: int
    remaining_s: float


class ReplicaReport(BaseModel):
    """A live generator replica."""

    id: str
    cluster: str = ""
    """The Ray cluster that it is in: during an upgrade two may share a store."""
    node: str
    device: str
    model: str
    """Which of the service's models it holds, by the name in the settings."""
    source: str
    """The directory or hub id that it was loaded from."""
    trained: bool
    clips: list[ClipReport] = []
    running: str | None = None
    """Id of the clip that has the device now."""
    busy_share: float = 0.0
    """Of its time since the report before this one, in which the device worked."""
