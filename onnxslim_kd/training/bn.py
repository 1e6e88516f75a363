"""BatchNormalization for training: keep it, put it back where it was folded, re-estimate it."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from onnxslim_kd import model as model_io
from onnxslim_kd import roles as roles_io
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes import batchnorm
from onnxslim_kd.passes.batch import free_batch, has_fixed_batch
from onnxslim_kd.plans import Plan
from onnxslim_kd.roles import Roles
from onnxslim_kd.training.data import Batch, Loader
from onnxslim_kd.training.datasets import open_source
from onnxslim_kd.training.feeds import Feeder
from onnxslim_kd.training.lowering import lower
from onnxslim_kd.training.ops_norm import BatchNorm
from onnxslim_kd.training.tidy import extract
from onnxslim_kd.training.transforms import Preprocess

Array = np.ndarray[Any, Any]
BATCHES = 8
"""Batches that statistics are measured on."""


def student_of(model: ir.Model, roles: Roles | None) -> ir.Model:
    """Return the student of a merged model, a plain model itself."""
    if roles is None:
        return model
    return extract(model, roles.student_outputs, roles.student_inputs)


def some_batches(
    model: ir.Model, data: str, *, preprocess: str = "", batches: int = BATCHES, size: int = 64
) -> list[Batch]:
    """Read up to ``batches`` batches of ``size`` from all over ``data``, labels or not.

    Raises:
        UserError: The data cannot be read.
    """
    source = open_source(data, Feeder(model, roles_io.read(model)).shapes())
    return Loader(source, Preprocess(preprocess), size).some(batches)


def wants_reinsertion(mode: str, model: ir.Model) -> bool:
    """Tell whether the mode asks for new nodes: ``auto`` does where the model has none."""
    live = any(node.op_type == "BatchNormalization" for node in model.graph)
    return mode == "reinsert" or (mode == "auto" and not live)


def reinsert(
    model: ir.Model,
    roles: Roles | None,
    batches: list[Batch],
    like: Path | None = None,
    plan: Path | None = None,
) -> list[str]:
    """Put BatchNormalization behind the student's bare convolutions, in place.

    Args:
        model: Plain or merged.
        roles: Of a merged model.
        batches: Unlabelled data to measure on.
        like: The model before it was pruned; without it the model itself, which changes nothing.
        plan: The pruning plan, where channels were removed since ``like``.

    Returns:
        The normalised values.

    Raises:
        UserError: ``like`` has other channels and no plan says which were kept, or other values.
    """
    student = _of_any_batch(student_of(model, roles))
    bare = batchnorm.bare_convolutions(student)
    if not bare:
        return []
    now = batchnorm.channel_statistics(student, bare, arrays(student, batches))
    wanted = dict(now)
    if like is not None:
        original = _of_any_batch(model_io.load(like))
        common = _common(original, now, like)
        measured = batchnorm.channel_statistics(original, common, arrays(original, batches))
        kept = _kept(student, Plan.load(plan)) if plan is not None else {}
        for name, (mean, deviation) in measured.items():
            rows = kept.get(name, np.arange(len(mean)))
            if len(rows) != len(now[name][0]):
                raise UserError(
                    f"{name} has {len(mean)} channels in {like} and {len(now[name][0])} here;"
                    f" give the pruning plan, which says which were kept"
                )
            wanted[name] = mean[rows], deviation[rows]
    return batchnorm.reinsert(model, wanted, now)


def _of_any_batch(model: ir.Model) -> ir.Model:
    """Return the model itself, or with its batch of 1 freed: statistics are of whole batches."""
    return free_batch(model) if has_fixed_batch(model) else model


def _common(original: ir.Model, now: Collection[str], like: Path) -> list[str]:
    """Return the normalised values that ``like`` has as well: where BN lives there, its outputs."""
    there = {output.name for node in original.graph for output in node.outputs}
    common = [name for name in now if name in there]
    if not common:
        raise UserError(
            f"{like} has none of the values that are to be normalised: {', '.join(now)}"
        )
    return common


def _kept(student: ir.Model, plan: Plan) -> dict[str, Array]:
    """Return which channels each convolution's output kept."""
    kept = {
        member.parameter: np.array(member.kept)
        for group in plan.groups
        for member in group.members
        if member.kept is not None and member.axis == 0
    }
    found = {}
    for node in student.graph:
        if node.op_type == "Conv" and (name := model_io.name_of(node.inputs[1])) in kept:
            found[model_io.name_of(node.outputs[0])] = kept[name]
    return found


def arrays(model: ir.Model, batches: Iterable[Batch]) -> Iterator[dict[str, Array]]:
    """Give the batches as ONNX Runtime takes them."""
    feeder = Feeder(model)
    for batch in batches:
        yield {name: tensor.numpy() for name, tensor in feeder(batch).items()}


@torch.no_grad()
def reestimate(model: ir.Model, batches: Iterable[Batch]) -> list[str]:
    """Set running statistics to their mean over ``batches``, in place; weights stay.

    Of a merged model those of the student alone. Every layer sees what the normalised layers
    before it give ("precise" statistics, Wu and Johnson 2021), so the order needs no care.

    Returns:
        The names of the BatchNormalization nodes.
    """
    student = _of_any_batch(student_of(model, roles_io.read(model)))
    lowered = lower(student, trainable=()).train()
    nodes = {name: n for name, n in lowered.modal_nodes().items() if isinstance(n, BatchNorm)}
    feeder, count = Feeder(student), 0
    for module in lowered.modal_nodes().values():
        module.train(module.node_name in nodes)  # no dropout
    for count, batch in enumerate(batches):
        for node in nodes.values():
            node.momentum = count / (count + 1)  # running = the mean so far
        lowered(feeder(batch))
    lowered.write_back(model)
    return list(nodes)


def calibrate(
    model: ir.Model, batches: list[Batch], like: Path | None = None, plan: Path | None = None
) -> Mapping[str, int]:
    """Re-estimate statistics on unlabelled data, in place; nothing is trained.

    A model with live BatchNormalization gets new running statistics. One where it was folded gets
    it back with the statistics of ``like``, re-estimated here, and folded again: weights and
    biases then give each channel the mean and deviation that it had in ``like``.

    Raises:
        UserError: There is nothing to calibrate or no data, or ``like`` does not fit.
    """
    if not batches:
        raise UserError("the data has no samples to measure on")
    roles = roles_io.read(model)
    if not wants_reinsertion("auto", student_of(model, roles)):
        if like is not None or plan is not None:
            raise UserError(
                "the model has live BatchNormalization, which needs no --like or --plan"
            )
        return {"reestimated": len(reestimate(model, batches)), "corrected": 0}
    if like is None:
        raise UserError("the model has no BatchNormalization; give the original with --like")
    done = reinsert(model, roles, batches, like, plan)
    if not done:
        raise UserError("the model has no convolution that statistics could correct")
    reestimate(model, batches)
    batchnorm.fold(model)
    return {"reestimated": 0, "corrected": len(done)}
