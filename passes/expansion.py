"""Write the standard form of one node in its place: what every expansion in `unfuse` works with."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.shape_inference import InferenceError, infer_node_outputs

from onnxslim_kd.access import constant, dims, has_rank, name_of, new_initializer
from onnxslim_kd.inference import SMALL

Operand = ir.Value | float | Sequence[int] | None
_NOT_INFERRED = (onnx.defs.SchemaError, InferenceError, RuntimeError, ValueError)


class Unsupported(Exception):
    """This form of the operator has no expansion, for this reason."""


@dataclass
class Expansion:
    """A fused node, and the nodes that are to take its place."""

    node: ir.Node
    graph: ir.Graph
    nodes: list[ir.Node] = field(default_factory=list)

    @property
    def opset(self) -> int:
        """The version of the standard operators."""
        return self.graph.opset_imports[""]

    # ------------------------------------------------------------------- what is given

    def given(self, index: int) -> ir.Value | None:
        """Return an input, None where it was left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def need(self, index: int) -> ir.Value:
        """Return an input that must be there."""
        value = self.given(index)
        if value is None:
            raise Unsupported(f"input {index} is missing")
        return value

    def refuse_inputs(self, *indices: int) -> None:
        """Refuse a form of the operator that has one of these inputs."""
        for index in indices:
            if self.given(index) is not None:
                raise Unsupported(f"input {index} ({name_of(self.given(index))}) is given")

    def wanted(self, index: int) -> bool:
        """Tell whether an output is there and used."""
        outputs = self.node.outputs[index : index + 1]
        return any(value.uses() or value.is_graph_output() for value in outputs)

    def refuse_outputs(self, *indices: int) -> None:
        """Refuse a form of the operator where one of these outputs is used."""
        for index in indices:
            if self.wanted(index):
                raise Unsupported(f"output {self.node.outputs[index].name} is used")

    def refuse_attributes(self, **expected: int) -> None:
        """Refuse a form of the operator where an attribute is not what it is by default."""
        for name, default in expected.items():
            number = self.node.attributes.get_int(name, default)
            if number != default:
                raise Unsupported(f"{name} is {number}")

    def attributes(self, *left_out: str) -> dict[str, Any]:
        """Return the node's attributes without some, to pass on."""
        return {k: a.value for k, a in self.node.attributes.items() if k not in left_out}

    # --------------------------------------------------------------------- what is made

    def op(self, op_type: str, *inputs: Operand, **attributes: Any) -> ir.Value:
        """Add a node with one output; numbers become constants of the first input's type."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(self, op_type: str, count: int, *inputs: Operand, **attributes: Any) -> list[ir.Value]:
        """Add a node with several outputs."""
        like = next((v for v in inputs if isinstance(v, ir.Value)), None)
        values = [self._value(x, like) for x in inputs]
        name = f"{self.node.name}/{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, values, attributes, num_outputs=count, name=name)
        for index, value in enumerate(node.outputs):
            value.name = f"{name}_output_{index}"
        infer(node, self.graph.opset_imports)
        if op_type == "Cast":
            node.outputs[0].type = ir.TensorType(ir.DataType(attributes["to"]))
        self.nodes.append(node)
        return list(node.outputs)

    def _value(self, operand: Operand, like: ir.Value | None) -> ir.Value | None:
        if operand is None or isinstance(operand, ir.Value):
            return operand
        if isinstance(operand, Sequence):
            return self.array(np.array(operand, np.int64))
        return self.array(np.array(operand, self._type(like).numpy()))

    def _type(self, like: ir.Value | None) -> ir.DataType:
        """The type of a value; where it is not known, that of the floats that the node reads."""
        kinds = [v.dtype for v in (like, *self.node.inputs) if v is not None and v.dtype]
        known = like is not None and like.dtype is not None
        found = kinds[:1] if known else [k for k in kinds if k.is_floating_point()]
        if not found:
            raise Unsupported("the type of what it computes with is not known")
        return found[0]

    def array(self, array: np.ndarray[Any, Any], name: str = "") -> ir.Value:
        """Add a constant."""
        return new_initializer(self.graph, name or f"{self.node.name}/constant", array)

    def pick(self, x: ir.Value, index: int) -> ir.Value:
        """Add x[index], which has one axis less."""
        return self.op("Gather", x, self.array(np.array(index, np.int64)), axis=0)

    def reduce(self, op_type: str, x: ir.Value, axis: int, *, keep: bool) -> ir.Value:
        """Add a reduction; whether its axes are an attribute depends on the opset."""
        schema = onnx.defs.get_schema(op_type, self.opset)
        if "axes" in schema.attributes:
            return self.op(op_type, x, axes=[axis], keepdims=int(keep))
        return self.op(op_type, x, [axis], keepdims=int(keep))


def rank_of(value: ir.Value) -> int:
    """Return the rank of a value that has one."""
    if not has_rank(value):
        raise Unsupported(f"the rank of {value.name} is not known")
    return len(dims(value))


def width_of(value: ir.Value) -> int:
    """Return the last dimension of a value."""
    width = dims(value)[-1] if rank_of(value) else None
    if width is None:
        raise Unsupported(f"the last dimension of {value.name} is not known")
    return width


def infer(node: ir.Node, versions: dict[str, int]) -> None:
    """Set the output types of one node that follow from those of its inputs, by ONNX's inference.

    Nothing is set where an input's type is not known, or ONNX does not know the operator.
    """
    given = [v for v in node.inputs if v is not None]
    if any(v.type is None for v in given):
        return
    small = [v for v in given if v.const_value is not None and v.const_value.nbytes <= SMALL]
    try:
        found = infer_node_outputs(
            onnx.defs.get_schema(node.op_type, versions.get(node.domain, 1), node.domain),
            ir.serde.serialize_node(node),
            {name_of(v): ir.serde.serialize_value(v).type for v in given},
            {name_of(v): onnx.numpy_helper.from_array(_array(v)) for v in small},
            opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in versions.items()],
        )
    except _NOT_INFERRED:
        return
    for value in node.outputs:
        proto = found.get(value.name or "")
        if proto is not None:
            value.type = ir.serde.deserialize_type_proto_for_type(proto)
            value.shape = ir.serde.deserialize_type_proto_for_shape(proto)


def _array(value: ir.Value) -> np.ndarray[Any, Any]:
    array = constant(value)
    return np.empty(0) if array is None else array
