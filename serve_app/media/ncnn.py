"""A network in ncnn's files (`.param`, `.bin`) -> the same network as an ONNX model.

For the Real-ESRGAN family, whose smallest openly licensed weights come as ncnn files. The layers that those networks have
are known, and no others. Formats: https://github.com/Tencent/ncnn/wiki/param-and-model-file-structure and
https://github.com/Tencent/ncnn/wiki/operation-param-weight-table.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from serve_app.errors import UpscalerUnusable

MAGIC = "7767517"
HALF_PRECISION = 0x01306B47
"""ncnn's tag before weights in fp16."""
ARRAY = -23300
"""ncnn writes parameter k as key ARRAY - k where it is an array."""
OPSET = 17
IR_VERSION = 9
"""Of ONNX 1.14, so that ONNX Runtime from 1.16 on reads it."""


@dataclass(frozen=True)
class Layer:
    """A line of a `.param` file."""

    kind: str
    name: str
    inputs: list[str]
    outputs: list[str]
    parameters: dict[int, str]

    def number(self, key: int, default: float = 0) -> int:
        """Parameter `key` as an integer."""
        return int(self.parameters.get(key, default))

    def numbers(self, key: int) -> list[float]:
        """Parameter `key`, an array."""
        return [float(value) for value in self.parameters.get(ARRAY - key, "0").split(",")[1:]]


def onnx_from_ncnn(param: Path, weights: Path) -> onnx.ModelProto:
    """The network with input `data` and output `output`, float32 RGB [1, 3, height, width] of 0 to 1, of any size.

    Raises UpscalerUnusable for files that are not ncnn's, are cut off, or hold a layer that is not known.
    """
    content = _Weights(weights)
    nodes: list[onnx.NodeProto] = []
    initializers: list[onnx.TensorProto] = []
    for layer in _layers(param):
        for made in _translated(layer, content):
            if isinstance(made, onnx.TensorProto):
                initializers.append(made)
            else:
                nodes.append(made)
    content.must_be_used_up()
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3, *size])
        for name, size in (("data", ["height", "width"]), ("output", ["out_height", "out_width"]))
    ]
    graph = helper.make_graph(nodes, param.stem, ends[:1], ends[1:], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def _layers(param: Path) -> Iterator[Layer]:
    lines = [line.split() for line in param.read_text().splitlines() if line.strip()]
    if not lines or lines[0] != [MAGIC]:
        raise UpscalerUnusable(f"{param} is no ncnn network: it does not begin with {MAGIC}")
    for kind, name, n_inputs, n_outputs, *rest in lines[2:]:
        ends = int(n_inputs) + int(n_outputs)
        parameters = (part.split("=", 1) for part in rest[ends:])
        yield Layer(
            kind,
            name,
            rest[: int(n_inputs)],
            rest[int(n_inputs) : ends],
            {int(key): value for key, value in parameters},
        )


def _translated(layer: Layer, weights: "_Weights") -> Iterator[onnx.NodeProto | onnx.TensorProto]:
    """The nodes and the constants of one layer."""
    name, inputs, outputs = layer.name, layer.inputs, layer.outputs
    match layer.kind:
        case "Input":
            return
        case "Split":
            for output in outputs:
                yield helper.make_node("Identity", inputs, [output])
        case "Convolution":
            yield from _convolution(layer, weights)
        case "PReLU":
            slopes = weights.raw(layer.number(0)).reshape(-1, 1, 1)
            yield numpy_helper.from_array(slopes, f"{name}.slope")
            yield helper.make_node("PRelu", [*inputs, f"{name}.slope"], outputs)
        case "PixelShuffle" if layer.number(1) == 0:
            yield helper.make_node("DepthToSpace", inputs, outputs, blocksize=layer.number(0), mode="CRD")
        case "Interp" if layer.number(0) == 1:
            scales = np.array([1, 1, *(float(layer.parameters[key]) for key in (1, 2))], np.float32)
            yield numpy_helper.from_array(scales, f"{name}.scales")
            nearest = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
            yield helper.make_node("Resize", [*inputs, "", f"{name}.scales"], outputs, **nearest)
        case "BinaryOp" if layer.number(0) == 0 and layer.number(1) == 0:
            yield helper.make_node("Add", inputs, outputs)
        case "Eltwise" if layer.number(0) == 1:
            terms = []
            for index, (term, factor) in enumerate(zip(inputs, layer.numbers(1), strict=True)):
                yield numpy_helper.from_array(np.array(factor, np.float32), f"{name}.factor{index}")
                yield helper.make_node("Mul", [term, f"{name}.factor{index}"], [f"{name}.term{index}"])
                terms.append(f"{name}.term{index}")
            yield helper.make_node("Sum", terms, outputs)
        case "Concat" if layer.number(0) == 0:
            yield helper.make_node("Concat", inputs, outputs, axis=1)
        case _:
            raise UpscalerUnusable(f"layer {name} is {layer.kind} {layer.parameters}, which no Real-ESRGAN network has")


def _convolution(layer: Layer, weights: "_Weights") -> Iterator[onnx.NodeProto | onnx.TensorProto]:
    name, channels, kernel, count = layer.name, layer.number(0), layer.number(1), layer.number(6)
    if (layer.number(2, 1), layer.number(3, 1), layer.number(5)) != (1, 1, 1) or layer.number(9) not in (0, 2):
        raise UpscalerUnusable(f"layer {name} is a convolution {layer.parameters}, which no Real-ESRGAN network has")
    kernels = weights.tagged(count).reshape(channels, -1, kernel, kernel)
    yield numpy_helper.from_array(kernels, f"{name}.weight")
    yield numpy_helper.from_array(weights.raw(channels), f"{name}.bias")
    leaky = layer.number(9) == 2
    output = f"{name}.linear" if leaky else layer.outputs[0]
    pads = [layer.number(4)] * 4
    yield helper.make_node("Conv", [*layer.inputs, f"{name}.weight", f"{name}.bias"], [output], pads=pads)
    if leaky:
        yield helper.make_node("LeakyRelu", [output], layer.outputs, alpha=layer.numbers(10)[0])


class _Weights:
    """A `.bin` file, read in the order of the layers."""

    def __init__(self, path: Path) -> None:
        self._path, self._content, self._at = path, path.read_bytes(), 0

    def tagged(self, count: int) -> np.ndarray:
        """`count` weights as float32, which lie there in the precision that a tag tells."""
        tag = int.from_bytes(self._take(4), "little")
        if tag == HALF_PRECISION:
            halves = np.frombuffer(self._take(count * 2), np.float16).astype(np.float32)
            self._take(-count * 2 % 4)
            return halves
        if tag == 0:
            return self.raw(count)
        raise UpscalerUnusable(f"{self._path} holds weights of the kind {tag:#x}; float32 and float16 can be read")

    def raw(self, count: int) -> np.ndarray:
        """`count` float32."""
        return np.frombuffer(self._take(count * 4), np.float32)

    def must_be_used_up(self) -> None:
        """Raise UpscalerUnusable unless all has been read."""
        if left := len(self._content) - self._at:
            raise UpscalerUnusable(
                f"{self._path} has {left} bytes more than its network takes: they do not belong together"
            )

    def _take(self, count: int) -> bytes:
        taken = self._content[self._at : self._at + count]
        if len(taken) < count:
            raise UpscalerUnusable(f"{self._path} is cut off, or belongs to another network")
        self._at += count
        return taken
