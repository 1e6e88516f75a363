"""PaddleSlim's Compressor: ``pruners``, ``distillers``, ``strategies`` and ``compressor``."""

from collections.abc import Callable
from typing import Any

from onnxslim_kd.convert_common import CRITERIA, Converted, Old
from onnxslim_kd.errors import UserError, near_misses


def compressor(old: Old, new: Converted) -> None:
    """Convert ``pruners``, ``distillers``, ``strategies`` and ``compressor``."""
    old.pop("version", None)
    settings = old["compressor"]
    strategies = old.get("strategies", {})
    new.settings["data"] = "imagelist:train_list.txt?root=images"
    new.settings["val_data"] = "imagelist:val_list.txt?root=images"
    names = settings.pop("strategies", settings.pop("compress_pass", list(strategies)))
    for name in names or []:
        if name not in strategies:
            raise UserError(
                f"compressor.strategies names {name!r}, which strategies does not define"
                f"{near_misses(str(name), strategies)}"
            )
        strategy = strategies[name]
        kind = str(strategy.get("class"))
        if kind in STRATEGIES:
            strategy.pop("class")
            STRATEGIES[kind](strategy, old, new)
    train: dict[str, Any] = {"do": "train"}
    if not new.stages:
        train["model"] = "student.onnx"
    train |= {"epochs": settings.pop("epoch", 1), "labels": {"weight": 1}}
    if "eval_epoch" in settings:
        train["eval_every"] = settings.pop("eval_epoch")
    if settings.get("init_model"):
        new.notes.append(
            f"init_model {settings.pop('init_model')}: export it to ONNX, then name it"
        )
        train |= {"init_from": "init_model.onnx", "init_shapes": True}
    settings.pop("checkpoint_path", None)  # every stage has its own in the run's folder
    new.stages["trained"] = train
    new.stages["shipped"] = {"do": "infer_prune"}
    new.notes += [
        "student.onnx (and teacher.onnx) stand for your models: the old file does not name them",
        "data, optimizer and learning rate were in the old script: set data, and optimizer and"
        " schedule of the stage trained",
    ]


def _prune_strategy(strategy: Old, old: Old, new: Converted) -> None:
    pruner = old.get("pruners", {}).get(strategy.pop("pruner", None), {})
    criteria = pruner.pop("criterions", {})
    pruner.pop("class", None)
    pruner.pop("pruning_axis", None)  # it was read and ignored
    stage: dict[str, Any] = {"do": "prune", "model": "student.onnx"}
    stage["pattern"] = strategy.pop("pruned_params", "conv.*_weights")
    stage["target_macs"] = strategy.pop("target_ratio", 0.5)
    asked = criteria.pop("*", "l1_norm")
    stage["criterion"] = CRITERIA.get(asked, asked)
    pruner["criterions"] = criteria
    if strategy.get("start_epoch", 0) == 0:
        strategy.pop("start_epoch", None)
    if "sensitivities_file" in strategy:
        new.notes.append(
            f"{strategy.pop('sensitivities_file')}: write sensitivities anew with `onnxslim-kd"
            f" sensitivity` and name the file as `sensitivity` of the stage pruned"
        )
    new.stages["pruned"] = stage


def _distil_strategy(strategy: Old, old: Old, new: Converted) -> None:
    when = {"start": strategy.pop("start_epoch", 0), "end": strategy.pop("end_epoch", 0)}
    losses = []
    for name in strategy.pop("distillers", []):
        distiller = old.get("distillers", {}).get(name)
        if distiller is None or distiller.get("class") not in DISTILLERS:
            raise UserError(f"distiller {name!r} is not one of {', '.join(DISTILLERS)}")
        kind = DISTILLERS[distiller.pop("class")]
        loss: dict[str, Any] = {"kind": kind, "name": str(name)}
        for side in ("student", "teacher"):
            pairs = distiller.pop(f"{side}_pairs", None)
            loss[side] = distiller.pop(f"{side}_feature_map", None) or [v for p in pairs for v in p]
            if f"{side}_temperature" in distiller:
                loss[f"{side}_temperature"] = distiller.pop(f"{side}_temperature")
        loss["weight"] = distiller.pop("distillation_loss_weight", 1)
        losses.append(loss | {key: epoch for key, epoch in when.items() if epoch})
    stage: dict[str, Any] = {"do": "merge"}
    if not new.stages:
        stage["student"] = "student.onnx"
    new.stages["merged"] = stage | {"teacher": "teacher.onnx", "losses": losses}
    new.notes.append(
        "the losses name values of the old programs: find them in your files with `onnxslim-kd"
        " inspect --values student.onnx teacher.onnx` (a teacher's prefix, as in res50_, goes)"
    )


STRATEGIES: dict[str, Callable[[Old, Old, Converted], None]] = {
    "UniformPruneStrategy": _prune_strategy,
    "SensitivePruneStrategy": _prune_strategy,
    "DistillationStrategy": _distil_strategy,
}
DISTILLERS = {"L2Distiller": "l2", "FSPDistiller": "fsp", "SoftLabelDistiller": "soft_label"}
