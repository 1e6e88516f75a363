"""Load and save ONNX models.

The model of record is `onnx_ir.Model`: weights stay in the file and a round trip is lossless.
What `load` refuses is refused by name; what it accepts is brought into one form (`normalise`).
"""

from collections import Counter

import onnx_ir as ir
from onnx_ir.passes import common

from onnxslim_kd.access import constant, dims, has_rank, name_of, new_initializer
from onnxslim_kd.errors import ModelError, OnnxSlimError
from onnxslim_kd.inference import SMALL, infer_shapes, without_weights
from onnxslim_kd.memory import collection_paused
from onnxslim_kd.normalise import IR_VERSIONS, adopt, normalised, raise_opset
from onnxslim_kd.opening import ModelLike, called, read
from onnxslim_kd.raising import OPSET
from onnxslim_kd.refusals import refuse_unsupported
from onnxslim_kd.saving import (
    TWO_GB,
    check_writable,
    save,
    weight_bytes,
    write_file,
    write_text,
)
from onnxslim_kd.streaming import embedded

__all__ = [
    "IR_VERSIONS",
    "OPSET",
    "SMALL",
    "TWO_GB",
    "ModelLike",
    "adopt",
    "called",
    "cause",
    "check_writable",
    "constant",
    "dims",
    "embedded",
    "has_rank",
    "infer_shapes",
    "load",
    "name_of",
    "new_initializer",
    "normalised",
    "raise_opset",
    "save",
    "weight_bytes",
    "without_weights",
    "write_file",
    "write_text",
]


def load(
    source: ModelLike, *, normalise: bool = True, operators: Counter[str] | None = None
) -> ir.Model:
    """Read a model and bring it into the form that passes expect.

    Args:
        source: A path, a `onnx.ModelProto`, an `onnx_ir.Model` (copied) or a graphsurgeon graph.
        normalise: False keeps the graph exactly as it is in the file.
        operators: Filled with how often each operator stands in the file.

    Raises:
        ModelError: The file is missing, not ONNX, truncated, from a newer ONNX than this one,
            holds what is not supported, or its external data is missing or unsafe.
    """
    try:
        return _loaded(source, operators, normalise=normalise)
    except (OnnxSlimError, MemoryError):
        raise
    except Exception as error:  # onnx and onnx-ir raise many kinds on malformed graphs
        raise ModelError(f"{called(source)}: malformed ONNX: {cause(error)}") from error


@collection_paused()
def _loaded(source: ModelLike, operators: Counter[str] | None, *, normalise: bool) -> ir.Model:
    model, typed = read(source, infer=normalise, operators=operators)
    in_order = refuse_unsupported(model)
    if not in_order:
        common.TopologicalSortPass()(model)
    if normalise:
        normalised(model, typed=typed and in_order)
    return model


def cause(error: BaseException) -> str:
    """What went wrong first, on one line: onnx-ir tells the whole way there, with all it held."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300] or type(error).__name__
