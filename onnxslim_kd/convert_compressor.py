"""PaddleSlim's Compressor: ``pruners``, ``distillers``, ``strategies`` and ``compressor``."""

from collections.abc import Callable, Mapping
from typing import Any

from onnxslim_kd.convert_common import CRITERIA, Converted, Old
from onnxslim_kd.errors import UserError, near_misses

STUDENT = "student.onnx"


def compressor(old: Old, new: Converted) -> None:
    """Convert the strategies in the order in which they make sense: first cut, then distil."""
    old.pop("version", None)
    settings = old["compressor"] if "compressor" in old else old["compress_pass"]
    new.settings["data"] = "imagelist:train_list.txt?root=images"
    new.settings["val_data"] = "imagelist:val_list.txt?root=images"
    for strategy in sorted(_chosen(settings, old), key=_place):
        convert = STRATEGIES.get(str(strategy.get("class")))
        if convert is not None:
            strategy.pop("class")
            convert(strategy, old, new)
    new.stages["trained"] = _trained(settings, new)
    new.stages["shipped"] = {"do": "infer_prune"}
    new.stages["bench"] = {"models": [STUDENT, "shipped"]}
    new.stages["eval"] = {"models": [STUDENT, "shipped"]}
    new.notes += [
        "student.onnx (and teacher.onnx) stand for your models: the old file does not name them",
        "data, optimizer and learning rate were in the old script: set data, and optimizer and"
        " schedule of the stage trained",
    ]


def _chosen(settings: Old, old: Old) -> list[Old]:
    strategies = old.get("strategies") or {}
    names = _listed(settings.pop("strategies", settings.pop("compress_pass", list(strategies))))
    for name in names:
        if name not in strategies:
            raise UserError(
                f"compressor.strategies names {name!r}, which strategies does not define"
                f"{near_misses(str(name), strategies)}"
            )
    return [strategies[name] for name in names]


def _listed(names: Any) -> list[Any]:
    """Return a list; a single name may stand without brackets, and none as 'none'."""
    if names is None or names == "none":
        return []
    return names if isinstance(names, list) else [names]


def _place(strategy: Old) -> int:
    """A merged graph is cut by nobody, so that pruning comes first."""
    order = list(STRATEGIES)
    kind = str(strategy.get("class"))
    return order.index(kind) if kind in order else len(order)


def _trained(settings: Old, new: Converted) -> Old:
    train: dict[str, Any] = {"do": "train"}
    if not new.stages:
        train["model"] = STUDENT
    train |= {"epochs": settings.pop("epoch", 1), "labels": {"weight": 1}}
    if settings.get("eval_epoch"):
        train["eval_every"] = settings.pop("eval_epoch")
    if settings.get("init_model"):
        new.notes.append(
            f"init_model {settings.pop('init_model')}: export it to ONNX, then name it"
        )
        train |= {"init_from": "init_model.onnx", "init_shapes": True}
    settings.pop("checkpoint_path", None)  # every stage has its own in the run's folder
    return train


# ------------------------------------------------------------------------------- pruning


def _uniform(strategy: Old, old: Old, new: Converted) -> None:
    new.stages["pruned"] = _cut(strategy, old)


def _sensitive(strategy: Old, old: Old, new: Converted) -> None:
    """Measure first, then cut by what was measured."""
    delta = float(strategy.pop("delta_rate", 0.2))
    stage = _cut(strategy, old)
    steps = strategy.pop("num_steps", 1)
    new.stages["sensitivity"] = {
        "model": STUDENT,
        "pattern": stage["pattern"],
        "criterion": stage["criterion"],
        "ratios": [round(delta * n, 6) for n in range(1, 100) if delta * n < 1 - 1e-9],
    }
    stage["sensitivity"] = "sensitivity"
    new.stages["pruned"] = stage
    if steps != 1:
        strategy["num_steps"] = steps
    if "sensitivities_file" in strategy:
        new.notes.append(
            f"{strategy.pop('sensitivities_file')} cannot be read: the stage sensitivity measures"
            f" anew"
        )


def _automatic(strategy: Old, old: Old, new: Converted) -> None:
    """Stand in for the search with one common ratio, and say how to search."""
    most = strategy.pop("max_ratio", 0.7)
    least = strategy.pop("min_ratio", 0.5)
    controllers = old.get("controllers", {})
    for name in ("controller", "init_tokens", "uniform_range"):
        controllers.pop(str(strategy.pop(name, None)), None)
    share = round((most + least) / 2, 6)
    stage = _cut(strategy | {"target_ratio": share}, old)
    for name in ("pruned_params", "pruner", "start_epoch"):
        strategy.pop(name, None)
    new.stages["pruned"] = stage
    new.notes.append(
        f"the stage pruned takes one ratio for all groups; to search for one per group:"
        f" onnxslim-kd search {STUDENT} --pattern '{stage['pattern']}' --target-macs {share:g}"
        f" -o study.json, then `plan: study.plan.json` instead of the pattern and the target"
    )


def _cut(strategy: Old, old: Old) -> Old:
    pruner = (old.get("pruners") or {}).get(strategy.pop("pruner", None), {})
    criteria = pruner.pop("criterions", None) or {}
    pruner.pop("class", None)
    pruner.pop("pruning_axis", None)  # it was read and ignored
    asked = criteria.pop("*", "l1_norm")
    if criteria:
        pruner["criterions"] = criteria
    if not strategy.get("start_epoch"):
        strategy.pop("start_epoch", None)
    if not strategy.get("end_epoch"):
        strategy.pop("end_epoch", None)
    return {
        "do": "prune",
        "model": STUDENT,
        "pattern": strategy.pop("pruned_params", "conv.*_weights"),
        "target_macs": strategy.pop("target_ratio", 0.5),
        "criterion": CRITERIA.get(asked, asked),
    }


# ------------------------------------------------------------------------------ distilling


def _distil(strategy: Old, old: Old, new: Converted) -> None:
    when = {"start": strategy.pop("start_epoch", 0), "end": strategy.pop("end_epoch", 0)}
    distillers = old.get("distillers") or {}
    losses = []
    for name in _listed(strategy.pop("distillers", [])):
        if name not in distillers:
            raise UserError(
                f"a strategy names the distiller {name!r}, which distillers does not define"
                f"{near_misses(str(name), distillers)}"
            )
        distiller = distillers[name]
        if distiller.get("class") in DISTILLERS:
            loss = {"name": str(name), **_loss(distiller)}
            losses.append(loss | {key: epoch for key, epoch in when.items() if epoch})
    if not losses:
        return
    stage: dict[str, Any] = {"do": "merge"}
    if not new.stages:
        stage["student"] = STUDENT
    new.stages["merged"] = stage | {"teacher": "teacher.onnx", "losses": losses}
    new.notes.append(
        "the losses name values of the old programs: find them in your files with `onnxslim-kd"
        " inspect --values student.onnx teacher.onnx` (a teacher's prefix, as in res50_, goes)"
    )


def _loss(distiller: Old) -> Old:
    loss: dict[str, Any] = {"kind": DISTILLERS[distiller.pop("class")]}
    for side in ("student", "teacher"):
        pairs = distiller.pop(f"{side}_pairs", None) or []
        single = distiller.pop(f"{side}_feature_map", None)
        loss[side] = single or [value for pair in pairs for value in pair]
        if f"{side}_temperature" in distiller:
            loss[f"{side}_temperature"] = distiller.pop(f"{side}_temperature")
    loss["weight"] = distiller.pop("distillation_loss_weight", 1)
    return loss


STRATEGIES: Mapping[str, Callable[[Old, Old, Converted], None]] = {
    "UniformPruneStrategy": _uniform,
    "SensitivePruneStrategy": _sensitive,
    "AutoPruneStrategy": _automatic,
    "DistillationStrategy": _distil,
}
"""In the order of the stages."""
DISTILLERS = {"L2Distiller": "l2", "FSPDistiller": "fsp", "SoftLabelDistiller": "soft_label"}
