"""What the lowering of one operator sees of a node, and ONNX types in torch's terms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from onnxslim_kd.errors import ModelError

T = TypeVar("T")
Kernel: TypeAlias = "Callable[..., Any] | nn.Module"
"""Takes the node's inputs (None for an absent or bound one), returns its output or outputs."""
Reader: TypeAlias = Callable[[Tensor | None], list[Any]]


@dataclass
class OpNode:
    """A node while it is lowered: its attributes, and those inputs that are constants."""

    op: str
    name: str
    since: int
    """The opset in which the operator got the meaning that this model uses."""
    attributes: Mapping[str, Any]
    constants: Sequence[Tensor | None]
    """By input; None where it is computed, trained or absent."""
    present: Sequence[bool]
    """By input, whether the node has it."""
    outputs: Sequence[bool]
    """By output, whether somebody may read it."""
    ranks: Sequence[int | None]
    """By input; None where it is not known."""
    bound: set[int] = field(default_factory=set)
    """Inputs read now, once: the kernel gets None for them."""
    host: set[int] = field(default_factory=set)
    """Inputs that are read as Python numbers and therefore stay on the CPU."""

    def get(self, name: str, default: T) -> T:
        """Return an attribute, or ``default``."""
        value = self.attributes.get(name)
        return default if value is None else value

    def ints(self, name: str) -> list[int] | None:
        """Return a list of integers, or None."""
        value = self.attributes.get(name)
        return None if value is None else [int(item) for item in value]

    def has(self, index: int) -> bool:
        """Tell whether the node has input ``index``."""
        return index < len(self.present) and self.present[index]

    def numbers(self, index: int) -> Reader:
        """Return how to read input ``index`` as Python numbers: now if constant, else each run."""
        self.host.add(index)
        constant = self.constants[index] if self.has(index) else None
        if constant is None:
            return _read
        fixed = _read(constant)
        self.bound.add(index)
        return lambda _: fixed

    def fixed(self, index: int) -> list[Any] | None:
        """Return the numbers of a constant input, or None where it is not constant."""
        constant = self.constants[index] if self.has(index) else None
        if constant is None:
            return None
        self.bound.add(index)
        return _read(constant)

    def refuse(self, what: str) -> ModelError:
        """Return the error for a variant of the operator that is not supported."""
        return ModelError(f"node {self.name} ({self.op}): {what}; it cannot be trained")


def describe(node: ir.Node, known: Sequence[Tensor | None], opset: int) -> OpNode:
    """Return what an operator's lowering sees of ``node``."""
    schema = onnx.defs.get_schema(node.op_type, opset)
    attributes = {
        name: to_torch(attribute.as_tensor())
        if attribute.type == ir.AttributeType.TENSOR
        else attribute.value
        for name, attribute in node.attributes.items()
    }
    return OpNode(
        op=node.op_type,
        name=node.name or "?",
        since=schema.since_version,
        attributes=attributes,
        constants=known,
        present=[value is not None for value in node.inputs],
        outputs=[
            bool(value.name) and bool(value.uses() or value.is_graph_output())
            for value in node.outputs
        ],
        ranks=[
            len(v.shape) if v is not None and v.shape is not None else None for v in node.inputs
        ],
    )


class Modal(nn.Module):
    """A node that behaves otherwise in training, unless it is frozen."""

    def __init__(self, node: OpNode) -> None:
        super().__init__()
        self.node_name = node.name
        self.frozen = False

    def train(self, mode: bool = True) -> "Modal":  # noqa: FBT001, FBT002 - torch's signature
        """Set the mode; a frozen node stays in inference."""
        super().train(mode and not self.frozen)
        return self


def _read(value: Tensor | None) -> list[Any]:
    assert value is not None
    return list(value.reshape(-1).tolist())


def torch_dtype(code: int) -> torch.dtype:
    """Return torch's type for an ONNX type code.

    Raises:
        ModelError: torch has no such type.
    """
    try:
        return DTYPES[ir.DataType(code)]
    except KeyError:
        raise ModelError(f"torch has no type for ONNX's {ir.DataType(code).name}") from None


def to_torch(tensor: ir.TensorProtocol) -> Tensor:
    """Copy an ONNX tensor; int4 and uint4, which torch cannot compute with, become int8."""
    array = np.array(tensor.numpy(), copy=True, order="C")  # torch must not own the mapped file
    if tensor.dtype in NARROW:
        return torch.from_numpy(array.astype(NARROW[tensor.dtype]))
    wanted = torch_dtype(tensor.dtype)
    if array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat16", "float8")):
        bits = np.uint16 if array.dtype.itemsize == 2 else np.uint8
        return torch.from_numpy(array.view(bits)).view(wanted)
    return torch.from_numpy(array)


def to_ir(tensor: Tensor, dtype: ir.DataType, name: str) -> ir.TensorProtocol:
    """Copy a torch tensor into an ONNX tensor of type ``dtype``."""
    held = tensor.detach().cpu().contiguous()
    array = held.float().numpy() if held.dtype == torch.bfloat16 else held.numpy()
    return ir.Tensor(np.array(array, dtype=dtype.numpy()), dtype=dtype, name=name)


NARROW = {ir.DataType.INT4: np.int8, ir.DataType.UINT4: np.uint8}
DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.BOOL: torch.bool,
}
