"""Refuses a clip that the model cannot make as asked, where diffusers would round the request or fail midway."""

import math

from serve_app.engine.checkpoints import checked_key
from serve_app.engine.clip import ClipRequest
from serve_app.errors import InvalidValue


def check_request(request: ClipRequest, *, size_multiple: int, temporal_compression: int) -> None:
    """Raise `InvalidValue` naming the field if `request` cannot be run.

    `size_multiple` is what width and height must be multiples of, in pixels. The product's own limits (sizes, number of
    frames and steps) are the presets' business; these are the model's.
    """
    checks = (
        ("width", request.width > 0 and request.width % size_multiple == 0, f"a multiple of {size_multiple}"),
        ("height", request.height > 0 and request.height % size_multiple == 0, f"a multiple of {size_multiple}"),
        (
            "frames",
            request.frames > 0 and request.frames % temporal_compression == 1,
            f"of the form {temporal_compression}k+1",
        ),
        ("steps", request.steps >= 1, "at least 1"),
        ("guidance_scale", math.isfinite(request.guidance_scale), "a finite number"),
        ("flow_shift", math.isfinite(request.flow_shift) and request.flow_shift > 0, "a finite number above 0"),
        ("seed", 0 <= request.seed < 2**64, "0 to 2**64 - 1"),
        ("profile", request.profile == "exact", "'exact', the only profile so far"),
    )
    for field, right, rule in checks:
        if not right:
            value = getattr(request, field)
            raise InvalidValue(f"{field} is {value!r}; it must be {rule}", param=field)
    if request.checkpoint_key is not None:
        checked_key(request.checkpoint_key)
