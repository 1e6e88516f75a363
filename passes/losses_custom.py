"""The user's own loss: an ONNX file, or a function that builds nodes."""

from collections.abc import Sequence
from pathlib import Path

import google.protobuf.message
import onnx
import onnx_ir as ir

from onnxslim_kd import model as model_io
from onnxslim_kd import plugins
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.scope import Scope


def custom(
    scope: Scope,
    students: Sequence[ir.Value],
    teachers: Sequence[ir.Value],
    *,
    file: str | None = None,
    function: str | None = None,
    train: bool = False,
    **options: object,
) -> ir.Value:
    """The loss in an ONNX ``file``, or built by a Python ``function`` (``module:name``).

    A file holds a model, or one function, whose inputs are the student's values and then the
    teacher's, and whose one output is a scalar; with ``train`` its float initializers train with
    the student. A function is called as ``name(scope, students, teachers, **options)`` with a
    `Scope` and two lists of values, and returns the scalar.

    Shapes: what the loss takes.

    Raises:
        UserError: Not exactly one of both is given, it cannot be loaded, or its result is no
            scalar.
        OperationError: The function fails.
    """
    if (file is None) == (function is None):
        raise UserError("loss custom takes file=loss.onnx or function=module:name")
    if function is not None:
        build = plugins.find(function)
        loss = plugins.call(function, build, scope, students, teachers, **options)
    elif options:
        raise UserError(f"loss custom: a file takes no option {', '.join(options)}")
    else:
        assert file is not None
        loss = insert(scope, file, [*students, *teachers], train=train)
    if not isinstance(loss, ir.Value):
        raise UserError(f"loss custom: {function} returned {type(loss).__name__}, not a value")
    if loss.shape is not None and len(loss.shape) != 0:
        raise UserError(f"loss custom: {file or function} gives {loss.shape}, not a scalar")
    return scope.float32(loss)


def insert(scope: Scope, file: str, values: Sequence[ir.Value], *, train: bool) -> ir.Value:
    """Move the graph in ``file`` into the scope's, fed by ``values``.

    Raises:
        UserError: The number of inputs or outputs, or the opset, does not fit.
        ModelError: The file cannot be read.
    """
    model = load_loss(file, values)
    model_io.raise_opset(model, scope.opset)
    graph = model.graph
    if graph.opset_imports[""] > scope.opset:
        raise UserError(
            f"loss custom: {file} has opset {graph.opset_imports['']}, the models {scope.opset};"
            f" export it with an older opset"
        )
    _check_signature(file, len(values), len(graph.inputs), len(graph.outputs))
    result = graph.outputs[0]
    for taken, value in zip(list(graph.inputs), values, strict=True):
        ir.convenience.replace_all_uses_with(taken, value)
    scope.adopt(graph, train=train)
    return result


def load_loss(file: str, values: Sequence[ir.Value]) -> ir.Model:
    """Load a loss between ``values``, from a model or from a single function.

    Raises:
        ModelError: The file is neither.
    """
    function = onnx.FunctionProto()
    try:
        function.ParseFromString(Path(file).read_bytes())
    except (OSError, google.protobuf.message.DecodeError):
        return model_io.load(file)  # which says what is wrong with the file
    if not (function.name and function.node):
        return model_io.load(file)
    _check_signature(file, len(values), len(function.input), len(function.output))
    return model_io.load(_calling(function, values))


def _check_signature(file: str, wanted: int, inputs: int, outputs: int) -> None:
    if (inputs, outputs) != (wanted, 1):
        raise UserError(
            f"loss custom: {file} takes {inputs} values and gives {outputs}, it must take {wanted}"
            f" and give 1"
        )


def _calling(function: onnx.FunctionProto, values: Sequence[ir.Value]) -> onnx.ModelProto:
    """Wrap a function in a model that calls it with inputs like ``values``."""
    helper, names = onnx.helper, list(function.input)
    call = helper.make_node(function.name, names, function.output, domain=function.domain)
    taken = [
        helper.make_value_info(name, ir.serde.serialize_value(value).type)
        for name, value in zip(names, values, strict=True)
    ]
    given = [helper.make_empty_tensor_value_info(name) for name in function.output]
    graph = helper.make_graph([call], function.name, taken, given)
    opsets = [*function.opset_import, helper.make_opsetid(function.domain, 1)]
    version = model_io.IR_VERSIONS[1]
    return helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=version)
