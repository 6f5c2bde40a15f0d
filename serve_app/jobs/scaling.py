"""What the autoscaling policy writes down: each change that it asked for, and why."""

from pydantic import BaseModel


class ScalingNote(BaseModel):
    """The policy asked for another number of a model's replicas."""

    at: float
    """Unix seconds."""
    had: int
    """What had been asked for before."""
    wanted: int
    reason: str
