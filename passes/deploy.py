"""What inference shall compute: whose outputs, and in which form. These change the outputs.

Everything after (`cleanup`) must not, so the proof of infer-prune starts from here.
"""

from collections.abc import Sequence
from typing import Literal

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnxslim_kd import roles
from onnxslim_kd.access import is_float
from onnxslim_kd.errors import NotFoundError, PassError, UserError, near_misses
from onnxslim_kd.model import constant, has_rank, infer_shapes, name_of
from onnxslim_kd.passes import dims
from onnxslim_kd.passes.standardise import is_training, standardise
from onnxslim_kd.roles import Roles, Teacher

Activation = Literal["softmax", "sigmoid"]


def keep_role(model: ir.Model, keep: str) -> list[str] | None:
    """Make the outputs of one role the outputs of the graph, and forget the roles.

    Args:
        model: A merged model, or any other, which has no roles to choose from.
        keep: ``student``, ``teacher``, or the name of one of several teachers.

    Returns:
        The inputs that this role had; None for "those that are needed".

    Raises:
        UserError: ``keep`` is no role of this model.
    """
    record = roles.read(model)
    if record is None:
        if keep != "student":
            raise UserError(f"--keep {keep}: this model was not made by merge, it has no {keep}")
        return [name_of(value) for value in model.graph.inputs]
    del model.metadata_props[roles.KEY]
    if keep == "student":
        keep_values(model, record.student_outputs)
        _free_shapes(model, record)
        return list(record.student_inputs)
    teacher = _teacher(record, keep)
    keep_values(model, teacher.outputs)
    RemoveUnusedNodesPass()(model)  # the student is gone, and its names are free
    taken = set(ir.convenience.create_value_mapping(model.graph))
    for value in model.graph.outputs:
        original = name_of(value).removeprefix(teacher.prefix)
        if original not in taken:
            value.name = original
    return None


def _free_shapes(model: ir.Model, record: Roles) -> None:
    """Make the dimensions dynamic again that were so before a teacher of a fixed size joined."""
    freed = False
    for value in (*model.graph.inputs, *model.graph.outputs):
        now, alone = dims.read(value), record.student_shapes.get(name_of(value), ())
        if now is not None and len(now) == len(alone):
            shape = [n if isinstance(a, int) else a for n, a in zip(now, alone, strict=True)]
            if shape != now:
                value.shape, freed = ir.Shape(shape), True
    if freed:
        RemoveUnusedNodesPass()(model)  # a teacher takes its own size only
        for node in model.graph.all_nodes():
            for value in node.outputs:
                if not value.is_graph_output():
                    value.shape = None
        infer_shapes(model)


def _teacher(record: Roles, keep: str) -> Teacher:
    named = {teacher.name: teacher for teacher in record.teachers}
    if keep == "teacher" and len(named) == 1:
        return record.teachers[0]
    if keep not in named:
        known = ", ".join(["student", *named])
        raise UserError(f"--keep {keep}: the roles of this model are {known}")
    return named[keep]


def keep_values(model: ir.Model, names: Sequence[str]) -> None:
    """Make the named values, which may stand anywhere in the graph, its outputs.

    Raises:
        NotFoundError: There is no such value.
    """
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    chosen = []
    for name in names:
        if name not in values:
            raise NotFoundError(f"{name!r} is not a value of the graph{near_misses(name, values)}")
        value = values[name]
        if value.producer() is None:
            raise NotFoundError(f"{name!r} is an input or a weight, not computed; name an output")
        chosen.append(value)
    model.graph.outputs.clear()
    model.graph.outputs.extend(chosen)


def keep_inputs(model: ir.Model, names: Sequence[str] | None) -> None:
    """Drop the graph inputs that are not in ``names``, or that nothing needs.

    Raises:
        PassError: The outputs need another input.
    """
    kept = []
    for value in model.graph.inputs:
        needed = bool(value.uses())
        if names is not None and needed and value.name not in names:
            raise PassError(f"the kept outputs need the input {value.name!r}, which is not theirs")
        if needed if names is None else value.name in names:
            kept.append(value)
    model.graph.inputs.clear()
    model.graph.inputs.extend(kept)


def to_inference(model: ir.Model) -> int:
    """Switch BatchNormalization and Dropout from training to inference; return how many were."""
    switched = 0
    standardise(model.graph)
    for node in model.graph.all_nodes():
        if is_training(node):
            if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
                continue  # the statistics themselves are asked for
            node.attributes["training_mode"] = ir.AttrInt64("training_mode", 0)
            node.resize_outputs(1)
            switched += 1
        elif node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
            flag = constant(node.inputs[2])
            node.resize_inputs(2)
            switched += flag is None or bool(flag.any())
    return switched


def add_activation(model: ir.Model, activation: Activation) -> None:
    """Let every float output go through softmax or sigmoid; the names of the outputs stay.

    The classes are axis 1 of an image-shaped output (N, C, H, W), else the last axis.

    Raises:
        UserError: An output already comes from such a node, or is a single number or an input.
    """
    graph = model.graph
    operator = {"softmax": "Softmax", "sigmoid": "Sigmoid"}[activation]
    for index, value in enumerate(graph.outputs):
        if not is_float(value):
            continue
        producer, name = value.producer(), name_of(value)
        if producer is None or value.shape == ():
            raise UserError(f"output {name!r} holds no scores of classes: leave out {activation}")
        if producer.op_type in ("Softmax", "Sigmoid"):
            raise UserError(f"output {name!r} already comes from {producer.op_type}")
        value.name = f"{name}.logits"
        axis = 1 if has_rank(value) and len(value.shape or ()) == 4 else -1
        attributes = {"axis": axis} if operator == "Softmax" else {}
        node = ir.node(operator, [value], attributes=attributes, name=f"{name}.{activation}")
        output = node.outputs[0]
        output.name, output.shape, output.type = name, value.shape, value.type
        graph.append(node)
        graph.outputs[index] = output
