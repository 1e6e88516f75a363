"""Append standard ONNX nodes to a graph under a readable name.

Everything that a loss adds is named after it: nodes and values ``loss/<name>/...``, trained
initializers ``loss_<name>_...``. Shapes are inferred as nodes are added, so that builders can ask.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx.shape_inference import infer_node_outputs

from onnxslim_kd.errors import ModelError, PassError, UserError
from onnxslim_kd.model import dims, name_of
from onnxslim_kd.passes.dims import settled
from onnxslim_kd.roles import Label, Mask

Array = np.ndarray[Any, Any]
Number = float | int | bool
Operand = ir.Value | Number | Array | Sequence[int] | None
LABEL = "label"
LabelKind = Literal["class", "mask", "soft", "ratios"]
_FIXED_BITS = 62
"""Fixed-point bits of `Scope.stop_gradient`: exact for float32 numbers down to 2**-38."""


@dataclass
class Labels:
    """The ground-truth inputs of a graph, each made once and shared by all losses.

    ``class`` is ``label``, int64 [N] or [N, L], and so is ``mask``, int64 [N, H, W]; ``soft`` is
    ``label_soft``, float [N, C]; ``ratios`` is ``label_ratios``, float [N, 2, C].
    """

    graph: ir.Graph
    roles: list[Label] = field(default_factory=list)

    def get(
        self, kind: LabelKind, shape: ir.Shape, scores: str = "", axis: int | None = None
    ) -> ir.Value:
        """Return the graph input for ``kind``, made on first use.

        Args:
            kind: Of ground truth.
            shape: Of the input.
            scores: The value from which it has its shape.
            axis: Of ``scores`` that it lacks.

        Raises:
            UserError: Two losses need it in different shapes, or its name is taken.
        """
        classes = kind in ("class", "mask")
        name = LABEL if classes else f"{LABEL}_{kind}"
        known = next((v for v in self.graph.inputs if v.name == name), None)
        if known is None:
            dtype = ir.DataType.INT64 if classes else ir.DataType.FLOAT
            known = ir.val(name, dtype, settled(shape, self.graph.inputs))
            self.graph.inputs.append(known)
            self.roles.append(Label(input=name, kind=kind, scores=scores, axis=axis))
        elif name not in [label.input for label in self.roles]:
            raise UserError(f"the graph has an input named {name!r}, which losses need; rename it")
        elif not _compatible(dims(known), tuple(d if isinstance(d, int) else None for d in shape)):
            raise UserError(
                f"input {name!r} is {known.shape} for one loss and {shape} for another; distil"
                f" values with the same batch and map size, or merge twice"
            )
        return known


class Scope:
    """Adds nodes to ``graph`` for the loss ``name``.

    Args:
        graph: The graph to extend; its opset decides the form of the nodes.
        name: Of the loss, unique in the graph.
        labels: Shared by all losses of the graph.
        seed: For the values that trained parameters start from.

    Attributes:
        parameters: Names of the initializers to train.
        masks: The graph inputs that the trainer fills with noise.
    """

    def __init__(
        self, graph: ir.Graph, name: str, *, labels: Labels | None = None, seed: int = 0
    ) -> None:
        self.graph, self.name = graph, name
        self.opset = graph.opset_imports[""]
        self.labels = labels if labels is not None else Labels(graph)
        self.random = np.random.default_rng([seed, *name.encode()])  # not by order of the losses
        self.parameters: list[str] = []
        self.masks: list[Mask] = []
        self._constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = {}
        self._counts: dict[str, int] = {}
        self._part = ""

    @contextmanager
    def numbered(self, number: int | None) -> Iterator[None]:
        """Begin the names of parameters and masks with ``number``; None leaves them."""
        self._part = "" if number is None else f"{number}."
        try:
            yield
        finally:
            self._part = ""

    # ------------------------------------------------------------------------- nodes

    def op(self, op_type: str, *inputs: Operand, **attributes: Any) -> ir.Value:
        """Add a node with one output; numbers and arrays become constants.

        A Python number takes the type of the last value among the inputs.
        """
        types = [v.dtype for v in inputs if isinstance(v, ir.Value) and v.dtype is not None]
        like = types[-1] if types else ir.DataType.FLOAT  # the first may be a Where's condition
        values = [self._value(operand, like) for operand in inputs]
        name = self._fresh(op_type)
        result = ir.Value(name=name)
        node = ir.node(op_type, values, attributes, outputs=[result], name=name)
        self.graph.append(node)
        result.type, result.shape = self._inferred(node)
        return result

    def reduce(
        self, op_type: str, x: ir.Value, axes: Sequence[int] | None = None, *, keep: bool = False
    ) -> ir.Value:
        """Add a Reduce* node; whether axes are an input or an attribute is the opset's matter."""
        schema = onnx.defs.get_schema(op_type, self.opset)
        if axes is None:
            return self.op(op_type, x, keepdims=int(keep))
        if any(i.name == "axes" for i in schema.inputs):
            return self.op(op_type, x, list(axes), keepdims=int(keep))
        return self.op(op_type, x, axes=list(axes), keepdims=int(keep))

    def mean(
        self, x: ir.Value, axes: Sequence[int] | None = None, *, keep: bool = False
    ) -> ir.Value:
        """Add ReduceMean, over all axes by default."""
        return self.reduce("ReduceMean", x, axes, keep=keep)

    def sum(
        self, x: ir.Value, axes: Sequence[int] | None = None, *, keep: bool = False
    ) -> ir.Value:
        """Add ReduceSum, over all axes by default."""
        return self.reduce("ReduceSum", x, axes, keep=keep)

    def square(self, x: ir.Value) -> ir.Value:
        """Add x * x."""
        return self.op("Mul", x, x)

    def divide(self, x: ir.Value, by: float) -> ir.Value:
        """Add x / ``by``, or nothing for 1."""
        return x if by == 1 else self.op("Div", x, float(by))

    def total(self, terms: Sequence[ir.Value]) -> ir.Value:
        """Add the sum of ``terms``."""
        return terms[0] if len(terms) == 1 else self.op("Sum", *terms)

    def pick(self, x: ir.Value, index: int, axis: int) -> ir.Value:
        """Add x[..., index, ...] along ``axis``, which goes."""
        return self.op("Gather", x, np.array(index, np.int64), axis=axis)

    def float32(self, x: ir.Value) -> ir.Value:
        """Add Cast to float32."""
        return self.op("Cast", x, to=ir.DataType.FLOAT.value)

    def shape(self, x: ir.Value, start: int = 0, end: int | None = None) -> ir.Value:
        """Add Shape of the axes ``start`` to ``end``."""
        if end is None:
            return self.op("Shape", x, start=start)
        return self.op("Shape", x, start=start, end=end)

    def stop_gradient(self, x: ir.Value) -> ir.Value:
        """Return ``x``, a number of [0, 1], as a constant to every differentiator.

        ONNX has no such operator. A round trip through integers is one: no gradient flows through
        an integer, and with 62 fractional bits the float32 numbers come back unchanged.
        """
        wide = self.op("Cast", x, to=ir.DataType.DOUBLE.value)
        fixed = self.op("Cast", self.op("Mul", wide, 2.0**_FIXED_BITS), to=ir.DataType.INT64.value)
        back = self.op(
            "Mul", self.op("Cast", fixed, to=ir.DataType.DOUBLE.value), 2.0**-_FIXED_BITS
        )
        return self.float32(back)

    def batch_norm(self, x: ir.Value, name: str) -> ir.Value:
        """Add BatchNormalization over axis 1, with trained scale and bias, momentum 0.9."""
        channels = static(x, 1, "BatchNormalization")
        scale = self.parameter(f"{name}.weight", np.ones(channels))
        bias = self.parameter(f"{name}.bias", np.zeros(channels))
        mean = self.statistics(f"{name}._mean", np.zeros(channels))
        variance = self.statistics(f"{name}._variance", np.ones(channels))
        return self.op("BatchNormalization", x, scale, bias, mean, variance)

    # ------------------------------------------------------------------------- leaves

    def constant(self, array: Number | Array | Sequence[int], dtype: ir.DataType) -> ir.Value:
        """Return an initializer that never trains; equal ones are shared."""
        held = np.ascontiguousarray(np.asarray(array, dtype.numpy()))
        held = held.reshape(np.shape(array))  # ascontiguousarray makes a scalar a vector
        key = (held.dtype.str, held.shape, held.tobytes())
        if key not in self._constants:
            self._constants[key] = self._initializer(self._fresh("const"), held)
        return self._constants[key]

    def parameter(self, name: str, start: Array) -> ir.Value:
        """Add an initializer ``loss_<name>_...`` that trains with the student."""
        value = self._initializer(f"loss_{self.name}_{self._part}{name}", start.astype(np.float32))
        self.parameters.append(name_of(value))
        return value

    def statistics(self, name: str, start: Array) -> ir.Value:
        """Add a running mean or variance: kept by the trainer, but not by gradient."""
        return self._initializer(f"loss_{self.name}_{self._part}{name}", start.astype(np.float32))

    def mask(self, name: str, shape: Sequence[int | str | ir.SymbolicDim], keep: float) -> ir.Value:
        """Add a graph input of zeros and ones that the trainer draws, 1 with probability keep."""
        full = f"loss_{self.name}_{self._part}{name}"
        value = ir.val(full, ir.DataType.FLOAT, settled(ir.Shape(shape), self.graph.inputs))
        self.graph.inputs.append(value)
        self.masks.append(Mask(input=name_of(value), keep=keep))
        return value

    def label(self, like: ir.Value, axis: int = 1) -> ir.Value:
        """Return the graph input of class numbers: the shape of ``like`` without ``axis``."""
        assert like.shape is not None
        axis %= len(like.shape)
        shape = ir.Shape([d for i, d in enumerate(like.shape) if i != axis])
        kind: LabelKind = "class" if len(shape) < 3 else "mask"
        return self.labels.get(kind, shape, name_of(uncast(like)), axis)

    def soft_label(self, like: ir.Value) -> ir.Value:
        """Return the graph input of class probabilities, in the shape of ``like``."""
        assert like.shape is not None
        return self.labels.get("soft", like.shape, name_of(uncast(like)))

    def ratios(self, batch: int | ir.SymbolicDim, classes: int | ir.SymbolicDim) -> ir.Value:
        """Return the graph input [N, 2, C] of labels and their ratios."""
        return self.labels.get("ratios", ir.Shape([batch, 2, classes]))

    def adopt(self, graph: ir.Graph, *, train: bool) -> None:
        """Move initializers and nodes of ``graph`` to the end of the scope's, under its name.

        Args:
            graph: Left empty; what its inputs were used for must have been replaced before.
            train: Whether its float initializers become parameters.
        """
        for name, value in list(graph.initializers.items()):
            tensor = value.const_value
            assert tensor is not None
            trains = train and tensor.dtype.is_floating_point() and tensor.size > 1
            add = self.parameter if trains else self._hold
            ir.convenience.replace_all_uses_with(value, add(name, tensor.numpy()))
        for node in list(graph):
            graph.remove(node)
            self.graph.append(node)
            node.name = f"loss/{self.name}/{node.name}"
            for output in node.outputs:
                output.name = f"loss/{self.name}/{output.name}" if output.name else output.name

    # ------------------------------------------------------------------------ insides

    def _hold(self, name: str, array: Array) -> ir.Value:
        return self._initializer(f"loss/{self.name}/{name}", array)

    def _value(self, operand: Operand, like: ir.DataType) -> ir.Value | None:
        if operand is None or isinstance(operand, ir.Value):
            return operand
        if isinstance(operand, np.ndarray):
            return self.constant(operand, ir.DataType.from_numpy(operand.dtype))
        if isinstance(operand, bool | int | float):
            return self.constant(operand, like)
        return self.constant(operand, ir.DataType.INT64)

    def _fresh(self, what: str) -> str:
        number = self._counts.get(what, 0)
        self._counts[what] = number + 1
        return f"loss/{self.name}/{what}_{number}"

    def _initializer(self, name: str, array: Array) -> ir.Value:
        if name in self.graph.initializers:
            raise UserError(f"the graph has an initializer {name!r}; give the loss another name")
        tensor = ir.Tensor(array, name=name)
        shape, kind = ir.Shape(array.shape), ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=shape, type=kind, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _inferred(self, node: ir.Node) -> tuple[ir.TypeProtocol | None, ir.Shape | None]:
        """Return the type and shape of the node's output, by ONNX's own inference."""
        schema = onnx.defs.get_schema(node.op_type, self.opset)
        inputs = [v for v in node.inputs if v is not None]
        types = {name_of(v): ir.serde.serialize_value(v).type for v in inputs}
        known = {
            name_of(v): ir.serde.serialize_tensor(v.const_value)
            for v in inputs
            if v.const_value is not None and v.const_value.size < 64
        }
        imports = [onnx.helper.make_opsetid("", self.opset)]
        try:
            found = infer_node_outputs(
                schema, ir.serde.serialize_node(node), types, known, opset_imports=imports
            )
        except Exception as error:  # onnx raises its own kinds, which share no base
            raise PassError(f"{node.name} of loss {self.name} does not fit: {error}") from error
        proto = found[name_of(node.outputs[0])]
        kind = ir.serde.deserialize_type_proto_for_type(proto)
        return kind, ir.serde.deserialize_type_proto_for_shape(proto)


def shown(value: ir.Value) -> str:
    """Return the name to show the user: that of the model's value, before the loss's own Cast."""
    return repr(uncast(value).name)


def uncast(value: ir.Value) -> ir.Value:
    """Return the model's own value behind a loss's Cast."""
    node = value.producer()
    while node is not None and node.op_type == "Cast" and node.inputs[0] is not None:
        value, node = node.inputs[0], node.inputs[0].producer()
    return value


def static(value: ir.Value, axis: int, why: str) -> int:
    """Return a dimension that must be known when merging.

    Raises:
        ModelError: It is not; the message says what needs it.
    """
    size = dims(value)[axis]
    if size is None:
        raise ModelError(
            f"axis {axis} of {shown(value)} has no fixed size ({value.shape}), which {why} needs;"
            f" give the inputs' shapes"
        )
    return size


def _compatible(a: Sequence[int | None], b: Sequence[int | None]) -> bool:
    return len(a) == len(b) and all(
        x is None or y is None or x == y for x, y in zip(a, b, strict=True)
    )
