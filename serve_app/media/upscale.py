"""Frames -> larger frames: a network of the Real-ESRGAN family in ONNX Runtime, tile by tile. Needs `wan-serve[upscale]`.

Any ONNX file will do whose network takes RGB of 0 to 1 as [1, 3, height, width] of any size and gives the same, some whole number
of times larger. It is asked for x2 or x4: one that makes less is run twice, and what is too large then is made smaller by a Lanczos
filter with antialiasing. So a x4 network serves both, x2 in the time of x4.
"""

import logging
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from serve_app.errors import UpscalerUnusable

OVERLAP_PX = 24
"""How much of its surroundings a tile sees beyond what is kept of it. What lies farther than 18 px away changes nothing with
realesr-animevideov3 (18 convolutions of 3x3), and next to nothing with the deeper ones."""
STEP_PX = 8
"""Tiles are multiples of it: some networks begin by folding 2x2 or 4x4 pixels into one."""
TRIAL_PX = 64
GREY, GREY_TOLERANCE = 128, 32
"""A grey picture must stay about as grey, or the network wants other values than RGB of 0 to 1."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tile:
    """A stretch of one axis, in pixels: what the network sees, and which part of that is kept."""

    start: int
    stop: int
    keep_from: int
    keep_to: int


def tiles(length: int, longest: int, overlap: int = OVERLAP_PX) -> list[Tile]:
    """The fewest tiles of at most `longest` (a multiple of STEP_PX) that cover an axis of `length`, all of one size.

    The kept parts cover the axis without a gap, each at least `overlap` away from the ends of its tile, save at the picture's edge.
    """
    if length <= longest:
        return [Tile(0, length, 0, length)]
    count = -(-(length - 2 * overlap) // (longest - 2 * overlap))
    size = -(-(length + (count - 1) * 2 * overlap) // count)
    size = -(-size // STEP_PX) * STEP_PX
    starts = [round(index * (length - size) / (count - 1)) for index in range(count)]
    seams = [0, *((after + before + size) // 2 for before, after in pairwise(starts)), length]
    return [Tile(start, start + size, seams[i], seams[i + 1]) for i, start in enumerate(starts)]


class Upscaler:
    """One network, on the CPU or a GPU. One frame at a time: calls from several threads would each take its memory."""

    def __init__(
        self, model: Path, *, tile_px: int, threads: int = 0, device: Literal["auto", "cuda", "cpu"] = "auto"
    ) -> None:
        """Load the ONNX file `model` and try it. `threads`: of the CPU; 0 for all cores.

        Raises UpscalerUnusable where it is no such network, or `device` is cuda and it cannot run there.
        """
        self._tile_px = tile_px
        network = _on_bytes(_loaded(model))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that wait for the next operator by spinning would take the cores from FFmpeg.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(
                network.SerializeToString(), options, providers=_providers(device)
            )
            grey = self._enlarged(np.full((TRIAL_PX, TRIAL_PX, 3), GREY, np.uint8))
        except Exception as error:  # ONNX Runtime's own exceptions have no common base but this
            raise UpscalerUnusable(f"{model} cannot be run: {error}", hint="See upscale_model.") from error
        self.provider: str = self._session.get_providers()[0]
        """What it runs on, in ONNX Runtime's words: `CUDAExecutionProvider`, `CPUExecutionProvider`."""
        if device == "cuda" and self.provider != "CUDAExecutionProvider":
            raise UpscalerUnusable(
                f"device is cuda, but ONNX Runtime can only use {', '.join(onnxruntime.get_available_providers())} here",
                hint="Install onnxruntime-gpu in place of onnxruntime (README, 'Upscaling').",
            )
        self.scale = grey.shape[0] // TRIAL_PX
        """How many times larger the network itself makes a picture."""
        if grey.shape != (TRIAL_PX * self.scale, TRIAL_PX * self.scale, 3) or self.scale < 2:
            raise UpscalerUnusable(f"{model} makes {grey.shape} of {TRIAL_PX}x{TRIAL_PX}: it does not upscale")
        if abs(float(grey.mean()) - GREY) > GREY_TOLERANCE:
            raise UpscalerUnusable(
                f"{model} makes {grey.mean():.0f} of {GREY}: it wants other values than RGB of 0 to 1"
            )
        logger.info("upscaling x%d by %s on %s", self.scale, model.name, self.provider)

    def upscale(self, frame: np.ndarray, factor: int) -> np.ndarray:
        """The frame (uint8 RGB [height, width, 3]) `factor` times as wide and as high. Blocks."""
        height, width = frame.shape[0] * factor, frame.shape[1] * factor
        while frame.shape[0] < height:
            frame = self._in_tiles(frame)
        if frame.shape[0] > height:
            frame = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS))
        return frame

    def _in_tiles(self, frame: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        scale = self.scale
        whole = np.empty((height * scale, width * scale, 3), np.uint8)
        for down in tiles(height, self._tile_px):
            for across in tiles(width, self._tile_px):
                tile = self._enlarged(frame[down.start : down.stop, across.start : across.stop])
                rows = slice((down.keep_from - down.start) * scale, (down.keep_to - down.start) * scale)
                columns = slice((across.keep_from - across.start) * scale, (across.keep_to - across.start) * scale)
                whole[
                    down.keep_from * scale : down.keep_to * scale, across.keep_from * scale : across.keep_to * scale
                ] = tile[rows, columns]
        return whole

    def _enlarged(self, tile: np.ndarray) -> np.ndarray:
        (enlarged,) = self._session.run(None, {BYTES_IN: np.ascontiguousarray(tile)[np.newaxis]})
        return enlarged[0]


def _providers(device: str) -> list[Any]:
    if device == "cpu" or "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return ["CPUExecutionProvider"]
    onnxruntime.preload_dlls()  # CUDA and cuDNN out of the packages that came with torch
    # By default it times every algorithm for each new shape, for seconds.
    return [("CUDAExecutionProvider", {"cudnn_conv_algo_search": "HEURISTIC"}), "CPUExecutionProvider"]


def _loaded(path: Path) -> onnx.ModelProto:
    try:
        return onnx.load(path)
    except Exception as error:  # OSError, or protobuf's, which has no stable name
        raise UpscalerUnusable(f"{path} is no ONNX file: {error}", hint="See upscale_model.") from error


BYTES_IN, BYTES_OUT = "wan_serve.frame", "wan_serve.enlarged"


def _on_bytes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network from uint8 RGB [1, height, width, 3] to the same, so that the conversions run where it does, and a GPU is sent and
    sends an eighth of the bytes or less. Raises UpscalerUnusable where it is not of the form that the module's docstring says."""
    graph = model.graph
    constants = {constant.name for constant in graph.initializer}
    inputs = [end for end in graph.input if end.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise UpscalerUnusable(f"the network has {len(inputs)} inputs and {len(graph.output)} outputs, not one of each")
    kind = inputs[0].type.tensor_type.elem_type
    shape = inputs[0].type.tensor_type.shape.dim
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16) or len(shape) != 4 or shape[1].dim_value not in (0, 3):
        raise UpscalerUnusable(
            f"the network takes {TensorProto.DataType.Name(kind)} {_told(shape)}, not [1, 3, height, width]"
        )
    if shape[2].dim_value or shape[3].dim_value:
        raise UpscalerUnusable(
            f"the network takes pictures of {_told(shape)} only",
            hint="Export it with height and width as dynamic axes.",
        )
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    name, out = inputs[0].name, graph.output[0].name
    for constant, value in (("255", 255), ("1/255", 1 / 255), ("half", 0.5)):
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype), f"wan_serve.{constant}"))
    before = [
        helper.make_node("Cast", [BYTES_IN], ["wan_serve.cast"], to=kind),
        helper.make_node("Mul", ["wan_serve.cast", "wan_serve.1/255"], ["wan_serve.scaled"]),
        helper.make_node("Transpose", ["wan_serve.scaled"], [name], perm=[0, 3, 1, 2]),
    ]
    after = [
        helper.make_node("Transpose", [out], ["wan_serve.pixels"], perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["wan_serve.pixels", "wan_serve.255"], ["wan_serve.levels"]),
        helper.make_node("Add", ["wan_serve.levels", "wan_serve.half"], ["wan_serve.raised"]),  # the cast cuts off
        helper.make_node("Relu", ["wan_serve.raised"], ["wan_serve.above"]),
        helper.make_node("Min", ["wan_serve.above", "wan_serve.255"], ["wan_serve.within"]),
        helper.make_node("Cast", ["wan_serve.within"], [BYTES_OUT], to=TensorProto.UINT8),
    ]
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.input[:], graph.output[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(BYTES_IN, TensorProto.UINT8, [1, "height", "width", 3]))
    graph.output.append(helper.make_tensor_value_info(BYTES_OUT, TensorProto.UINT8, [1, None, None, 3]))
    return model


def _told(shape: Any) -> str:
    return f"[{', '.join(str(axis.dim_value or axis.dim_param or '?') for axis in shape)}]"
