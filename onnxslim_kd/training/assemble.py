"""From a model and settings to a `Plant`: every check that needs no step happens here."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch

from onnxslim_kd import model as model_io
from onnxslim_kd import roles as roles_io
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.batch import free_batch
from onnxslim_kd.passes.prepare import prepare
from onnxslim_kd.training import bn, optim
from onnxslim_kd.training.config import TrainConfig
from onnxslim_kd.training.data import Loader, check_labels
from onnxslim_kd.training.datasets import open_source
from onnxslim_kd.training.distributed import World
from onnxslim_kd.training.feeds import Feeder
from onnxslim_kd.training.initial import load_weights, take_shapes
from onnxslim_kd.training.lowering import Lowered, lower
from onnxslim_kd.training.objective import Objective
from onnxslim_kd.training.plant import Plant
from onnxslim_kd.training.selection import (
    Selection,
    freeze_statistics,
    select,
    teacher_prefixes,
)
from onnxslim_kd.training.sync_bn import synchronise
from onnxslim_kd.training.teacher import Cache, Split, Teacher, split
from onnxslim_kd.training.tidy import tidied
from onnxslim_kd.training.transforms import Preprocess
from onnxslim_kd.training.weights import untie

if TYPE_CHECKING:
    from onnxslim_kd.training.shrink import GroupSparsity

Speak = Callable[[Mapping[str, Any]], None]


def assemble(model: ir.Model, config: TrainConfig, world: World, speak: Speak) -> Plant:
    """Put together a run of ``model``; say what trains and what does not.

    Raises:
        UserError: Settings, data and model do not fit together.
        ModelError: Operators that cannot be trained; all are listed.
    """
    roles = roles_io.read(model)
    _check(config, roles, world)
    model = _free(model, config, world)
    if notes := prepare(model):
        speak({"event": "prepared", "notes": notes})
    untie(model)
    if config.init_from is not None:
        given = model_io.load(config.init_from)
        prepare(given)
        untie(given)  # so that the names are the same
        if config.init_shapes:
            take_shapes(model, given)
        speak({"event": "init", **load_weights(model, given)})
    feeder = Feeder(model, roles, config.seed, world.device, world.shard)
    loader, val_loader = _loaders(config, feeder, world)
    _reinsert(model, roles, loader, config, speak)
    objective = Objective(model, roles, config)
    for held in (loader, val_loader):
        if held is not None:
            check_labels(held.source, objective.classes)
    selection = select(model, roles, config)
    _check_amp(selection, model, config)
    parts = None if config.mutual else split(model, teacher_prefixes(roles))
    lowered = _lowered(parts.rest if parts else model, objective, selection, config)
    teacher = _teacher(parts, config, world, len(loader.source)) if parts else None
    if config.sync_bn and world.size > 1:
        synchronise(lowered)
    lowered.to(world.device)
    freeze_statistics(model, roles, config, lowered)
    world.broadcast([*lowered.parameters_by_name.values(), *lowered.buffers_by_name.values()])
    speak(_inventory(selection, lowered, teacher))
    return Plant(
        model=model,
        roles=roles,
        config=config,
        world=world,
        lowered=lowered,
        objective=objective,
        feeder=feeder,
        loader=loader,
        val_loader=val_loader,
        teacher=teacher,
        optimizer=optim.build(lowered.parameters_by_name, config),
        sparsity=_sparsity(model, lowered, config),
    )


def _check(config: TrainConfig, roles: roles_io.Roles | None, world: World) -> None:
    """Refuse settings that cannot work, or would do nothing."""
    if config.amp == "fp16" and world.device == "cpu":
        raise UserError("amp fp16 needs a CUDA device; use bf16 or none on the CPU")
    if config.checkpoint_steps and config.checkpoint is None:
        raise UserError("checkpoint_steps has no effect without checkpoint")
    for setting in ("mutual", "cache_teacher") if not teacher_prefixes(roles) else ():
        if getattr(config, setting):
            raise UserError(f"{setting} needs a merged model with a teacher; this one has none")


def _check_amp(selection: Selection, model: ir.Model, config: TrainConfig) -> None:
    """Refuse mixed precision for weights that have no more digits than it."""
    if config.amp == "none":
        return
    for name in selection.trained:
        weight = model.graph.initializers.get(name)
        if weight is not None and weight.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            raise UserError(
                f"amp {config.amp} is for weights in float32, and {name!r} is in"
                f" {weight.dtype.name.lower()} already; leave amp out"
            )


def _free(model: ir.Model, config: TrainConfig, world: World) -> ir.Model:
    """Return the model with a batch as large as training wants it."""
    piece = config.batch_size // world.size // config.accumulate
    for value in model.graph.inputs:
        sides = model_io.dims(value) if model_io.has_rank(value) else ()
        if not sides or sides[0] in (None, piece):
            continue
        if sides[0] == 1 and roles_io.read(model) is None:
            return free_batch(model)
        raise UserError(
            f"input {value.name!r} has a fixed batch of {sides[0]}, training computes {piece} at"
            f" once; free the batch before merging, or set batch_size and accumulate to match"
        )
    return model


def _reinsert(
    model: ir.Model, roles: roles_io.Roles | None, loader: Loader, config: TrainConfig, speak: Speak
) -> None:
    """Put BatchNormalization back, in place, where the config wants that."""
    done: list[str] = []
    if bn.wants_reinsertion(config.bn, bn.student_of(model, roles)):
        done = bn.reinsert(model, roles, loader.some(bn.BATCHES), config.like, config.plan)
        speak({"event": "bn", "reinserted": done})
    if config.like is not None and not done:
        raise UserError(
            f"like is for BatchNormalization that is put back, and with bn {config.bn} none is in"
            f" this model; leave like out"
        )


def _loaders(config: TrainConfig, feeder: Feeder, world: World) -> tuple[Loader, Loader | None]:
    preprocess = Preprocess(config.preprocess)
    shapes = feeder.shapes()
    settings: dict[str, Any] = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "workers": config.workers,
        "shard": world.shard,
        "max_bad": config.max_bad,
    }
    loader = Loader(open_source(config.data, shapes), preprocess, **settings)
    counts = world.gather(len(loader.source))
    if len(set(counts)) > 1:
        raise UserError(
            f"the processes see different data, of {', '.join(map(str, counts))} samples; each"
            f" takes its own part of the same list"
        )
    val_data = config.val_data
    if val_data is None and config.data == "digits":
        val_data = "digits?split=test"
    if val_data is None:
        if config.metric != "auto":
            raise UserError(f"metric {config.metric} has nothing to measure: give val_data as well")
        return loader, None
    return loader, Loader(open_source(val_data, shapes), preprocess, **settings)


def _lowered(
    model: ir.Model, objective: Objective, selection: Selection, config: TrainConfig
) -> Lowered:
    names = [name for name in selection.trained if name in model.graph.initializers]
    wanted = objective.all_outputs()
    lowered = lower(tidied(model, wanted, keep=names), trainable=names, outputs=wanted)
    if not lowered.parameters_by_name:
        raise UserError("no parameter that trains is on the way to the loss")
    if config.channels_last:
        for tensor in [*lowered.parameters(), *lowered.buffers()]:
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return lowered


def _teacher(parts: Split, config: TrainConfig, world: World, samples: int) -> Teacher:
    engine = config.teacher_runtime
    if engine == "auto":
        engine = "ort" if world.device == "cpu" else "torch"
    cache = None
    if config.cache_teacher:
        if Preprocess(config.preprocess).is_random or config.labels.mixup or config.labels.cutmix:
            raise UserError(
                "cache_teacher needs the same images in every epoch; take random steps out of"
                " preprocess, and mixup and cutmix out of labels"
            )
        cache = Cache(samples, config.cache_mib * 2**20)
    return Teacher(parts, engine=engine, device=world.device, cache=cache)


def _sparsity(model: ir.Model, lowered: Lowered, config: TrainConfig) -> "GroupSparsity | None":
    if config.sparsity is None:
        return None
    from onnxslim_kd.training.shrink import GroupSparsity  # brings scipy

    return GroupSparsity(model, lowered.parameters_by_name, config.sparsity)


def _inventory(selection: Selection, lowered: Lowered, teacher: Teacher | None) -> dict[str, Any]:
    """Say what trains, what is frozen and what the loss never touches."""
    trained = lowered.parameters_by_name
    return {
        "event": "start",
        "trained": {name: selection.trained[name] for name in trained},
        "numbers": sum(parameter.numel() for parameter in trained.values()),
        "frozen": dict(selection.frozen),
        "unused": [name for name in selection.trained if name not in trained],
        "teacher": teacher.engine if teacher else None,
    }
