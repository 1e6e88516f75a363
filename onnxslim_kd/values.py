"""List the values that losses can name, of one model or of two side by side."""

from dataclasses import dataclass
from difflib import SequenceMatcher

import onnx_ir as ir

from onnxslim_kd.access import is_float
from onnxslim_kd.model import ModelLike, load, name_of
from onnxslim_kd.passes import dims


@dataclass(frozen=True)
class Row:
    """One value.

    Attributes:
        name: In the model's own file.
        type: Element type and shape, as ``float32[N,64,56,56]``.
        op: The operator that computes it.
        depth: How much of the network lies before it, counted in layers with weights, 0 to 1.
    """

    name: str
    type: str
    op: str
    depth: float


def listing(model: ir.Model) -> list[Row]:
    """Return the floating-point values of the main graph, in its order."""
    depth = depths(model)
    return [
        Row(name_of(value), dims.text(value), value.producer().op_type, round(depth[value], 3))  # type: ignore[union-attr]
        for value in tappable(model)
    ]


def side_by_side(student: ModelLike, teacher: ModelLike) -> list[tuple[Row | None, Row | None]]:
    """Return both listings with rows of like operators and sizes on one line.

    The channels may differ; where nothing matches, one side is None.
    """
    ours, theirs = load(student), load(teacher)
    left, right = listing(ours), listing(theirs)
    keys = [[_key(value) for value in tappable(model)] for model in (ours, theirs)]
    rows: list[tuple[Row | None, Row | None]] = []
    for tag, i, i_end, j, j_end in SequenceMatcher(
        None, keys[0], keys[1], autojunk=False
    ).get_opcodes():
        if tag == "equal":
            rows += zip(left[i:i_end], right[j:j_end], strict=True)
        else:
            rows += [(row, None) for row in left[i:i_end]]
            rows += [(None, row) for row in right[j:j_end]]
    return rows


def tappable(model: ir.Model) -> list[ir.Value]:
    """Return the values that a loss can read: computed, floating-point, with a name."""
    return [
        value for node in model.graph for value in node.outputs if value.name and is_float(value)
    ]


def depths(model: ir.Model) -> dict[ir.Value, float]:
    """Say for every value how much of the network lies before it, from 0 to 1.

    The longest way from an input counts, in layers with weights (matrices and kernels).
    """
    found: dict[ir.Value, int] = {}
    for node in model.graph:
        sources = [v for v in node.inputs if v is not None]
        layer = any(v.const_value is not None and len(v.const_value.shape) > 1 for v in sources)
        depth = max((found.get(v, 0) for v in sources), default=0) + layer
        found.update((value, depth) for value in node.outputs)
    most = max(found.values(), default=0) or 1
    return {value: depth / most for value, depth in found.items()}


def _key(value: ir.Value) -> tuple[object, ...]:
    """What makes values of two models alike: the operator and the size of the map."""
    shape = dims.read(value) or []
    producer = value.producer()
    assert producer is not None
    size = [d if isinstance(d, int) else None for d in shape[2:]] if len(shape) == 4 else []
    return producer.op_type, len(shape), *size
