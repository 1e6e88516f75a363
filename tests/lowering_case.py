"""One small model, or several, for every operator that can be lowered."""

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

_RNG = np.random.default_rng(0)


@dataclass(frozen=True)
class Case:
    """Nodes as ONNX text; arrays named w... are weights, c... constants, others are fed."""

    text: str
    arrays: dict
    opset: int = 20
    grad: bool = True
    tolerance: float = 1e-5
    outputs: tuple = ("y",)
    ops: tuple = field(init=False)

    def __post_init__(self):
        nodes = onnx.parser.parse_graph(f"g () => () {{ {self.text} }}").node
        object.__setattr__(self, "ops", tuple(node.op_type for node in nodes))

    @property
    def feeds(self):
        return {k: v for k, v in self.arrays.items() if k[0] not in "wc"}

    @property
    def weights(self):
        return [k for k, v in self.arrays.items() if k[0] == "w" and v.dtype.kind == "f"]

    def model(self, double: bool = False) -> ir.Model:
        text = f'<ir_version: 10, opset_import: ["":{self.opset}]>'
        text += f"g () => ({', '.join(self.outputs)}) {{ {self.text} }}"
        proto = onnx.parser.parse_model(text)
        for name, array in self.arrays.items():
            if double and array.dtype == np.float32:
                array = array.astype(np.float64)
            if name[0] in "wc":
                proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
            else:
                kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
                info = onnx.helper.make_tensor_value_info(name, kind, array.shape)
                proto.graph.input.append(info)
        return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def f(*shape, low=-2.0, high=2.0):
    """Random floats, none of them near another: no ties, and no kinks within a difference."""
    count = max(int(np.prod(shape)), 1)
    step = (high - low) / count
    spread = low + step * (np.arange(np.prod(shape)) + _RNG.uniform(0.1, 0.9))
    return _RNG.permutation(spread).reshape(shape).astype(np.float32)


def pos(*shape):
    return f(*shape, low=0.2, high=2.0)


def i(*numbers):
    return np.array(numbers, dtype=np.int64)


def n(number, dtype=np.int64):
    return np.array(number, dtype=dtype)


def flags(*shape):
    return _RNG.integers(0, 2, shape).astype(bool)


def ints(*shape, low=-9, high=9, dtype=np.int64):
    return _RNG.integers(low, high, shape).astype(dtype)


X = {"x": f(2, 3, 4)}
XY = {"x": f(2, 3, 4), "z": f(3, 1)}
IMAGE = {"x": f(2, 4, 7, 6)}
