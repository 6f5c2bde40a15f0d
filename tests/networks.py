"""Small ONNX networks in the form of Real-ESRGAN's, that do what is easily foretold."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save_enlarging(path: Path, scale: float = 4, *, convolutions: int = 0, **changes: Any) -> Path:
    """A network that repeats each pixel `scale` times each way.

    `convolutions`: so many of 64 channels work beside that without effect, to cost time. `changes`: `size` (of pictures; free where
    left out), `channels`, `dtype` (TensorProto's), `gain` (what it multiplies by).
    """
    dtype = changes.get("dtype", TensorProto.FLOAT)
    size = changes.get("size", ["height", "width"])
    channels = changes.get("channels", 3)
    array = helper.tensor_dtype_to_np_dtype(dtype)
    constants = {"scales": np.array([1, 1, scale, scale], np.float32), "gain": np.array(changes.get("gain", 1), array)}
    nodes = [helper.make_node("Mul", ["in", "gain"], ["x0"])]
    last = "x0"
    if convolutions:
        into = np.zeros((64, channels, 3, 3), array)
        into[range(channels), range(channels), 1, 1] = 1
        within, out_of = np.zeros((64, 64, 3, 3), array), np.zeros((channels, 64, 3, 3), array)
        within[range(64), range(64), 1, 1] = 1
        out_of[range(channels), range(channels), 1, 1] = 1
        for index, kernel in enumerate([into, *[within] * convolutions, out_of]):
            constants[f"w{index}"] = kernel
            nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], pads=[1, 1, 1, 1]))
            last = f"c{index}"
    nodes.append(
        helper.make_node(
            "Resize", [last, "", "scales"], ["out"],
            mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric",
        )
    )  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, dtype, [1, channels, *shape])
        for name, shape in (("in", size), ("out", [None] * 2))
    ]
    graph = helper.make_graph(
        nodes,
        "enlarging",
        ends[:1],
        ends[1:],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path
