"""Make the student's input fit a teacher of other layout, size, normalisation or type.

Adapters are ordinary nodes between the shared input and the teacher, in this order::

    student's input -> Cast -> (Transpose to NCHW) -> Resize -> Sub mean -> Div std
                    -> (Transpose to NHWC) -> the teacher's input
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import onnx_ir as ir

from onnxslim_kd.errors import UserError, near_misses
from onnxslim_kd.model import new_initializer
from onnxslim_kd.passes import dims

TO_NHWC, TO_NCHW = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(frozen=True)
class Adapter:
    """What the teacher's input needs that the student's has not.

    Attributes:
        layout: The teacher's layout, ``NCHW`` or ``NHWC``, where the student's is the other one.
        resize: The teacher's height and width; bilinear.
        mean: Subtracted per channel, one number or one per channel.
        std: Divided by after that.
        dtype: The teacher's type, such as ``float16``.
    """

    layout: str | None = None
    resize: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.layout not in (None, "NCHW", "NHWC"):
            raise UserError(f"adapter layout must be NCHW or NHWC, got {self.layout!r}")
        if self.resize is not None and (len(self.resize) != 2 or min(self.resize) < 1):
            raise UserError(f"adapter resize must be HEIGHTxWIDTH, got {self.resize}")
        if 0 in self.std:
            raise UserError("adapter std must not be 0")
        if self.dtype is not None and self.dtype.upper() not in ir.DataType.__members__:
            raise UserError(f"adapter dtype {self.dtype!r} is no ONNX type")

    @property
    def type(self) -> ir.DataType | None:
        """The teacher's type, where it differs."""
        return ir.DataType[self.dtype.upper()] if self.dtype is not None else None


def parse(text: str) -> tuple[str, Adapter]:
    """Read ``[INPUT:]layout=NHWC,resize=224x224,mean=0.5,0.5,0.5,std=...``.

    Returns:
        The teacher's input ("" for "its only image input") and the adapter.

    Raises:
        UserError: An unknown key or a value that is no number.
    """
    head, equals, rest = text.partition("=")
    if not equals:
        raise UserError(f"--adapt {text}: expected key=value, such as layout=NHWC,resize=224x224")
    name, _, key = head.rpartition(":")
    options: dict[str, list[str]] = {}
    for part in f"{key}={rest}".split(","):
        before, equals, after = part.partition("=")
        if equals:
            key = before.strip()
            options[key] = [after.strip()]
        else:  # one more number of the option before
            options[key].append(part.strip())
    return name, from_mapping(options)


def from_mapping(options: Mapping[str, list[str]]) -> Adapter:
    """Build an adapter from text values.

    Raises:
        UserError: An unknown key or a value that is no number.
    """
    known = [f.name for f in fields(Adapter)]
    for key in options:
        if key not in known:
            raise UserError(
                f"--adapt: unknown key {key!r}; keys are {', '.join(known)}"
                f"{near_misses(key, known)}"
            )
    try:
        resize = options.get("resize")
        return Adapter(
            layout=options["layout"][0].upper() if "layout" in options else None,
            resize=tuple(int(n) for n in resize[0].split("x")) if resize else None,  # type: ignore[arg-type]
            mean=tuple(float(n) for n in options.get("mean", ())),
            std=tuple(float(n) for n in options.get("std", ())),
            dtype=options["dtype"][0] if "dtype" in options else None,
        )
    except ValueError as error:
        raise UserError(f"--adapt: {error}") from error


def check(source: ir.Value, target: ir.Value, adapter: Adapter, agreed: dims.Agreement) -> None:
    """Agree on the dimensions of the adapted input.

    Raises:
        UserError: It would not be what the teacher takes.
    """
    have = dims.read(source)
    if have is None or len(have) != 4:
        raise UserError(
            f"--adapt needs an input of 4 dimensions; {source.name!r} is {dims.text(source)}"
        )
    if adapter.layout == "NCHW":
        have = [have[i] for i in TO_NCHW]
    for numbers in (adapter.mean, adapter.std):
        if len(numbers) > 1 and isinstance(have[1], int) and len(numbers) != have[1]:
            raise UserError(
                f"--adapt gives {len(numbers)} numbers for the {have[1]} channels of"
                f" {source.name!r}; give one, or one per channel"
            )
    if adapter.resize is not None:
        have[2:] = adapter.resize
    if adapter.layout == "NHWC":
        have = [have[i] for i in TO_NHWC]
    adapted = ir.Value(
        name=source.name,
        shape=ir.Shape(have),
        type=ir.TensorType(adapter.type or source.dtype or ir.DataType.FLOAT),
    )
    if not dims.fits(adapted, target, agreed):
        raise UserError(
            f"the student's input {source.name!r} {dims.text(source)} adapted is"
            f" {dims.text(adapted)}, but the teacher's {target.name!r} is {dims.text(target)}"
        )
    for a, b in zip(have, dims.read(target) or have, strict=True):
        agreed.equate(a, b)


def apply(model: ir.Model, source: ir.Value, adapter: Adapter, name: str) -> ir.Value:
    """Append the adapter's nodes; return the value that the teacher reads, called ``name``."""
    chain = _Chain(model.graph, source, name)
    if adapter.type is not None and adapter.type != source.dtype:
        chain.cast(adapter.type)
    if adapter.layout == "NCHW":
        chain.add("Transpose", perm=list(TO_NCHW))
    if adapter.resize is not None:
        chain.resize(adapter.resize)
    if adapter.mean:
        chain.add("Sub", chain.channels("mean", adapter.mean))
    if adapter.std:
        chain.add("Div", chain.channels("std", adapter.std))
    if adapter.layout == "NHWC":
        chain.add("Transpose", perm=list(TO_NHWC))
    if chain.value is not source:
        chain.value.name = name
    return chain.value


class _Chain:
    """Nodes one after the other, appended to a graph."""

    def __init__(self, graph: ir.Graph, value: ir.Value, name: str) -> None:
        self.graph, self.value, self.scope = graph, value, f"{name}_adapt"
        self.dtype = value.dtype or ir.DataType.FLOAT

    def add(self, op: str, *others: ir.Value, **attributes: int | str | list[int]) -> None:
        self.value = self._node(op, [self.value, *others], **attributes)
        self.value.type = ir.TensorType(self.dtype)

    def cast(self, dtype: ir.DataType) -> None:
        self.dtype = dtype
        self.add("Cast", to=int(dtype))

    def resize(self, size: tuple[int, int]) -> None:
        """Bilinear to ``size``, whatever the batch: opset 17 has no Resize for some axes only."""
        shape = self._node("Shape", [self.value], start=0, end=2)
        wanted = new_initializer(self.graph, f"{self.scope}/size", np.array(size, np.int64))
        sizes = self._node("Concat", [shape, wanted], axis=0)
        self.value = self._node("Resize", [self.value, None, None, sizes], mode="linear")

    def channels(self, name: str, numbers: tuple[float, ...]) -> ir.Value:
        array = np.array(numbers, self.dtype.numpy()).reshape(1, -1, 1, 1)
        return new_initializer(self.graph, f"{self.scope}/{name}", array)

    def _node(
        self, op: str, inputs: list[ir.Value | None], **attributes: int | str | list[int]
    ) -> ir.Value:
        node = ir.node(op, inputs, attributes, name=f"{self.scope}/{op}")
        node.outputs[0].name = f"{self.scope}/{op}_output"
        self.graph.append(node)
        return node.outputs[0]
