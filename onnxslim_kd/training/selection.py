"""What trains, what is frozen, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import UserError
from onnxslim_kd.roles import Roles
from onnxslim_kd.training.config import TrainConfig
from onnxslim_kd.training.lowering import Lowered
from onnxslim_kd.training.optim import matching
from onnxslim_kd.training.weights import Role, roles_of, statistics_of

LOSS = "loss/"
"""How the names of what a loss computes with begin; its parameters are listed in the roles."""


@dataclass(frozen=True)
class Selection:
    """The float initializers of a model, by whether they train; each with the reason."""

    trained: Mapping[str, str]
    frozen: Mapping[str, str] = field(default_factory=dict)


def teacher_prefixes(roles: Roles | None) -> tuple[str, ...]:
    """Return the prefixes of everything that came from a teacher."""
    return tuple(teacher.prefix for teacher in roles.teachers) if roles else ()


def select(model: ir.Model, roles: Roles | None, config: TrainConfig) -> Selection:
    """Decide what trains: weights, not the teacher's unless it learns too, then the patterns.

    Raises:
        NotFoundError: A pattern matches nothing.
        UserError: Nothing is left to train.
    """
    prefixes = () if config.mutual else teacher_prefixes(roles)
    trained: dict[str, str] = {}
    frozen: dict[str, str] = {}
    statistics = statistics_of(model)
    for name, role in roles_of(model).items():
        if name in statistics or not _is_float(model, name):
            continue
        reason = _kept(name, role, prefixes, roles)
        if reason is None:
            trained[name] = role.reason
        else:
            frozen[name] = reason
    for name in matching(config.train, [*trained, *frozen], "train"):
        trained[name] = trained.get(name) or f"asked for ({frozen.pop(name)})"
    for name in matching(config.freeze, [*trained, *frozen], "freeze"):
        if trained.pop(name, None):
            frozen[name] = "asked for"
    if not trained:
        raise UserError("no parameter is left to train; see the train and freeze patterns")
    return Selection(trained, frozen)


def _kept(name: str, role: Role, prefixes: tuple[str, ...], roles: Roles | None) -> str | None:
    """Return why an initializer does not train, or None where it does."""
    if prefixes and name.startswith(prefixes):
        return "teacher"
    if roles is not None and name in roles.loss_parameters:
        return None
    if roles is not None and name.startswith(LOSS):
        return "constant of a loss"
    return None if role.trains else role.reason


def _is_float(model: ir.Model, name: str) -> bool:
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        return False
    return value.const_value.dtype.is_floating_point()


def freeze_statistics(
    model: ir.Model, roles: Roles | None, config: TrainConfig, lowered: Lowered
) -> None:
    """Keep in inference mode: a frozen teacher, BatchNormalizations whose scale does not train.

    With ``bn: frozen`` every BatchNormalization keeps its statistics.
    """
    prefixes = () if config.mutual else teacher_prefixes(roles)
    names = {
        str(node.name)
        for node in model.graph
        if (prefixes and str(node.name).startswith(prefixes))
        or (node.op_type == "BatchNormalization" and _stays(node, config, lowered))
    }
    lowered.freeze_statistics(names & lowered.modal_nodes().keys())


def _stays(node: ir.Node, config: TrainConfig, lowered: Lowered) -> bool:
    scale = model_io.name_of(node.inputs[1])
    return config.bn == "frozen" or scale not in lowered.parameters_by_name
