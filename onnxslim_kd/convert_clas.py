"""PaddleClas: ``Global``, ``Arch``, ``Loss``, ``Optimizer``, ``DataLoader`` and ``Slim``."""

from collections.abc import Sequence
from typing import Any

from onnxslim_kd.convert_common import CRITERIA, Converted, Old
from onnxslim_kd.convert_losses import losses
from onnxslim_kd.convert_nets import Net, export, networks
from onnxslim_kd.convert_training import data, mixes, training


def clas(old: Old, new: Converted) -> None:
    """Convert every section; what nobody takes stays in ``old``."""
    globals_, arch = old.get("Global", {}), old["Arch"]
    loaders = old.get("DataLoader", {})
    nets = networks(arch)
    mixed = mixes(loaders) if len(nets) == 1 else {}  # terms of a graph see whole samples
    data(loaders, new)
    size = "x".join(map(str, [1, *globals_.pop("image_shape", [3, 224, 224])]))
    for seed, net in reversed(list(enumerate(nets))):  # the one that is shipped comes last
        new.stages[net.stage] = export(net, size, new)
        if seed and not net.frozen:  # two that learn from each other must not begin as equals
            new.stages[net.stage]["seed"] = seed
    _prune(old.get("Slim", {}), nets[0], new)
    terms, labels = losses(old.get("Loss", {}), nets, new)
    if len(nets) > 1 and terms:
        new.stages["merged"] = _merged(nets, terms, pruned="pruned" in new.stages)
    mutual = len(nets) > 1 and not any(net.frozen for net in nets)
    train = training(old, labels | mixed, new)
    new.stages["trained"] = train | ({"mutual": True} if mutual else {})
    new.stages["shipped"] = _shipped(arch, nets)
    first = nets[-1].stage
    new.stages["bench"] = {"models": [first, "shipped"]}
    if "val_data" in new.settings:
        new.stages["eval"] = {"models": [first, "shipped"]}
    _rest(old, globals_, new)


def _prune(slim: Old, student: Net, new: Converted) -> None:
    prune = slim.pop("prune", None)
    if prune:
        criterion = prune.pop("name", "l1_norm")
        stage = {"do": "prune", "pattern": ".*", "ratio": prune.pop("pruned_ratio", 0.5)}
        stage["criterion"] = CRITERIA.get(criterion, criterion)
        new.stages["pruned"] = {**stage, "model": student.stage}
        slim["prune"] = prune


def _merged(nets: Sequence[Net], terms: list[Old], *, pruned: bool) -> Old:
    student, *teachers = nets
    one = len(teachers) == 1
    return {
        "do": "merge",
        "student": "pruned" if pruned else student.stage,
        "teacher": teachers[0].stage if one else {net.stage: net.stage for net in teachers},
        "losses": terms,
    }


def _shipped(arch: Old, nets: Sequence[Net]) -> Old:
    ship: dict[str, Any] = {"do": "infer_prune", "activation": "softmax"}
    chosen = arch.pop("infer_model_name", None)
    if not arch.pop("infer_add_softmax", True):
        del ship["activation"]
    for net in nets[1:]:
        if net.name == chosen:
            ship["keep"] = "teacher" if len(nets) == 2 else net.stage
    return ship


def _rest(old: Old, globals_: Old, new: Converted) -> None:
    """Take out what needs no setting here, and say where the rest has its place."""
    for key in OURS:
        globals_.pop(key, None)
    if weights := globals_.pop("pretrained_model", None):
        new.notes.append(
            f"Global.pretrained_model ({weights}) is Paddle's: convert it to .npz and name the"
            f" file as `weights` of the stage that exports"
        )
    old.pop("Metric", None)
    labels = (old.pop("Infer", None) or {}).get("PostProcess", {}).get("class_id_map_file")
    if labels:
        new.notes.append(f"to look at images: onnxslim-kd infer ... --labels {labels}")


OURS = (
    "checkpoints",
    "device",
    "eval_during_train",
    "output_dir",
    "save_inference_dir",
    "save_interval",
    "to_static",
    "use_visualdl",
)
"""Of Global: what every run of ours does by itself, or has its own place for."""
