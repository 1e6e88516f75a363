"""PaddleClas: ``Global``, ``Arch``, ``Loss``, ``Optimizer``, ``DataLoader`` and ``Slim``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxslim_kd.convert_common import CRITERIA, Converted, Old, leaves
from onnxslim_kd.errors import UserError


def clas(old: Old, new: Converted) -> None:
    """Convert ``Global``, ``Arch``, ``Loss``, ``Optimizer``, ``DataLoader`` and ``Slim``."""
    globals_, arch = old.get("Global", {}), old["Arch"]
    _clas_data(old.get("DataLoader", {}), new)
    keep, mutual = _clas_models(arch, globals_, new)
    _clas_prune(old.get("Slim", {}), new)
    losses, labels = _clas_losses(old.get("Loss", {}), keep, new)
    if len(keep) > 1 and losses:
        student, *teachers = keep
        teacher = (
            teachers[0].lower() if len(teachers) == 1 else {t.lower(): t.lower() for t in teachers}
        )
        new.stages["merged"] = {"do": "merge", "student": student.lower(), "teacher": teacher}
        new.stages["merged"]["losses"] = losses
    new.stages["trained"] = _clas_train(old, globals_, labels) | (
        {"mutual": True} if mutual else {}
    )
    ship: dict[str, Any] = {"do": "infer_prune", "activation": "softmax"}
    chosen = arch.pop("infer_model_name", None)
    if not arch.pop("infer_add_softmax", True):
        del ship["activation"]
    if chosen in keep[1:]:
        ship["keep"] = "teacher" if len(keep) == 2 else str(chosen).lower()
    new.stages["shipped"] = ship
    for section in ("Infer", "Metric"):
        old.pop(section, None)
    for key in CLAS_OURS:
        globals_.pop(key, None)


def _clas_models(arch: Old, globals_: Old, new: Converted) -> tuple[list[str], bool]:
    """Export every model; return their names, the student first, and whether all are trained."""
    size = "x".join(map(str, [1, *globals_.pop("image_shape", [3, 224, 224])]))
    models = {name: m for each in arch.pop("models", []) for name, m in each.items()}
    frozen = arch.pop("freeze_params_list", [name != "Student" for name in models])
    classes = arch.pop("class_num", None)
    if not models:
        models, frozen = {"Student": arch}, [False]
    else:
        arch.pop("name", None)
    for name, model in models.items():
        new.stages[name.lower()] = _clas_export(
            name, model, size, model.pop("class_num", classes), new
        )
    flags = dict(zip(models, frozen, strict=False))
    names = sorted(models, key=lambda name: (name != "Student", bool(flags.get(name)), name))
    return names, len(models) > 1 and not any(flags.values())


def _clas_export(name: str, model: Old, size: str, classes: int | None, new: Converted) -> Old:
    arch = str(model.pop("name", ""))
    stage: dict[str, Any] = {"do": "export", "arch": ARCHITECTURES.get(arch, arch)}
    stage["inputs"] = {"image": size}
    if classes is not None:
        stage["arguments"] = {"classes": classes}
    if arch not in ARCHITECTURES:
        new.notes.append(
            f"{arch} is not in the zoo: give its module:function as arch of the stage"
            f" {name.lower()}, or remove the stage and name an ONNX file instead"
        )
    weights = model.pop("pretrained", False)
    if weights:
        new.notes.append(
            f"{name}'s pretrained weights ({weights}) are Paddle's: convert them to .npz and name"
            f" the file as `weights` of the stage {name.lower()}"
        )
    patterns = model.pop("return_patterns", None)
    if patterns:
        new.notes.append(
            f"{name}'s return_patterns ({', '.join(patterns)}) are no names of values: see"
            f" `onnxslim-kd inspect --values`, or write ~REGEX for the output of a module"
        )
    return stage


def _clas_prune(slim: Old, new: Converted) -> None:
    prune = slim.pop("prune", None)
    if prune:
        criterion = prune.pop("name", "l1_norm")
        stage = {"do": "prune", "pattern": ".*", "ratio": prune.pop("pruned_ratio", 0.5)}
        stage["criterion"] = CRITERIA.get(criterion, criterion)
        new.stages["pruned"] = {**stage, "model": "student"}
        slim["prune"] = prune


def _clas_losses(loss: Old, models: Sequence[str], new: Converted) -> tuple[list[Old], Old]:
    """Return the terms of the merged graph, and the settings of the loss on labels alone."""
    loss.pop("Eval", None)
    terms, left = [], []
    labels: dict[str, Any] = {}
    for entry in loss.pop("Train", []):
        ((kind, options),) = entry.items()
        if kind == "CELoss":
            labels = {
                "weight": options.pop("weight", 1),
                "smoothing": options.pop("epsilon", 0) or 0,
            }
        elif kind in CLAS_LOSSES:
            terms += CLAS_LOSSES[kind](options, models)
        else:
            left.append({kind: options})
            continue
        new.notes += [f"not carried over: Loss.Train.{kind}.{rest}" for rest in leaves(options)]
    if left:
        loss["Train"] = left
    return terms, labels


def _ground_truth(options: Old, models: Sequence[str]) -> list[Old]:
    asked = options.pop("model_names", [models[0]])
    term = {"kind": "ce", "weight": options.pop("weight", 1)}
    if options.get("epsilon"):
        term["epsilon"] = options.pop("epsilon")
    value = options.pop("key", None) or "logits"
    prefixes = ["" if name == models[0] else f"{_role(name, models)}_" for name in asked]
    return [{**term, "student": f"{prefix}{value}", "name": f"{prefix}ce"} for prefix in prefixes]


def _role(name: str, models: Sequence[str]) -> str:
    return "teacher" if len(models) == 2 else name.lower()


def _pair(kind: str, **renamed: str) -> Callable[[Old, Sequence[str]], list[Old]]:
    """Convert a loss between two models; ``renamed`` are its options, ours by theirs."""

    def build(options: Old, models: Sequence[str]) -> list[Old]:
        pairs = options.pop("model_name_pairs", [])
        key = options.pop("key", None)
        ours = options.pop("s_key", key) or "logits"
        theirs = options.pop("t_key", key) or "logits"
        mode = options.pop("mode", None) if kind == "l2" else None
        term: dict[str, Any] = {"kind": mode or kind, "student": ours, "teacher": theirs}
        term["weight"] = options.pop("weight", 1)
        term |= {new: options.pop(old) for old, new in renamed.items() if old in options}
        for spare in ("name", "base_loss_name", "student_channels", "teacher_channels"):
            options.pop(spare, None)
        others = [n for pair in pairs for n in pair if n != models[0]] or list(models[1:2])
        several = len(models) > 2
        return [
            {**term, "teacher": f"{other.lower()}_{theirs}" if several else theirs}
            for other in dict.fromkeys(others)
        ]

    return build


def _clas_train(old: Old, globals_: Old, labels: Old) -> Old:
    train: dict[str, Any] = {"do": "train", "epochs": globals_.pop("epochs", 1)}
    sampler = old.get("DataLoader", {}).get("Train", {}).get("sampler", {})
    if "batch_size" in sampler:
        train["batch_size"] = sampler.pop("batch_size")
    if "eval_interval" in globals_:
        train["eval_every"] = globals_.pop("eval_interval")
    if labels:
        train["labels"] = labels
    train |= _clas_optimizer(old.get("Optimizer", {}))
    if "EMA" in old:
        train["ema"] = old["EMA"].pop("decay", 0.9999)
    if old.pop("AMP", None):
        train["amp"] = "fp16"
    return train


def _clas_optimizer(optimizer: Old) -> Old:
    if not optimizer:
        return {}
    rate = optimizer.pop("lr", {})
    decay = optimizer.pop("regularizer", None) or {}
    name = optimizer.pop("name", "Momentum")
    ours: dict[str, Any] = {
        "name": OPTIMIZERS.get(name, name),
        "lr": rate.pop("learning_rate", 0.01),
    }
    if "momentum" in optimizer:
        ours["momentum"] = optimizer.pop("momentum")
    if "coeff" in decay:
        decay.pop("name", None)
        ours["weight_decay"] = decay.pop("coeff")
    elif "weight_decay" in optimizer:
        ours["weight_decay"] = optimizer.pop("weight_decay")
    kind = rate.pop("name", "Constant")
    schedule: dict[str, Any] = {"kind": SCHEDULES.get(kind, kind)}
    if "warmup_epoch" in rate:
        schedule["warmup"] = rate.pop("warmup_epoch")
    if kind == "Piecewise":
        schedule["boundaries"] = rate.pop("decay_epochs", rate.pop("boundaries", []))
        schedule["values"] = rate.pop("values", [])
        ours["lr"] = next(iter(schedule["values"]), ours["lr"])
    optimizer |= {"lr": rate, "regularizer": decay}
    return {"optimizer": ours, "schedule": schedule}


def _clas_data(loaders: Old, new: Converted) -> None:
    for part, ours in (("Train", "data"), ("Eval", "val_data")):
        loader = loaders.get(part, {})
        dataset = loader.get("dataset", {})
        if "cls_label_path" in dataset:
            dataset.pop("name", None)
            root = dataset.pop("image_root", ".")
            new.settings[ours] = f"imagelist:{dataset.pop('cls_label_path')}?root={root}"
        steps = _preprocess(dataset)
        if part == "Train" and steps:
            new.settings["preprocess"] = steps
        sampler, workers = loader.get("sampler", {}), loader.pop("loader", {})
        if part == "Train" and workers.get("num_workers"):
            new.settings["workers"] = workers["num_workers"]
        for key in ("name", "shuffle", "drop_last", *(["batch_size"] if part == "Eval" else [])):
            sampler.pop(key, None)
    if not new.settings.get("data"):
        raise UserError("DataLoader.Train.dataset has no cls_label_path: nothing to train on")


def _preprocess(dataset: Old) -> str:
    """Convert the operators that we have; the others stay in the data set's settings."""
    steps, left = [], []
    for operator in dataset.pop("transform_ops", []):
        ((name, options),) = operator.items()
        if name not in OPERATORS:
            left.append(operator)
        elif OPERATORS[name]:
            steps.append(OPERATORS[name].format_map(_sizes(options or {})))
    if left:
        dataset["transform_ops"] = left
    return ",".join(steps)


def _sizes(options: Mapping[str, Any]) -> dict[str, Any]:
    found = {"size": 224, "resize_short": 256, "brightness": 0.4} | dict(options)
    return {k: v[0] if isinstance(v, list) else v for k, v in found.items()}


ARCHITECTURES = {
    "MobileNet": "mobilenet_v1",
    "MobileNetV1": "mobilenet_v1",
    "MobileNetV2": "mobilenet_v2",
    "ResNet18": "resnet18",
    "ResNet34": "resnet34",
    "ResNet50": "resnet50",
    "ResNet50_vd": "resnet50_vd",
    "PPLCNet_x2_5": "pplcnet_x2_5",
}
CLAS_LOSSES: dict[str, Callable[[Old, Sequence[str]], list[Old]]] = {
    "DistillationGTCELoss": _ground_truth,
    "DistillationCELoss": _pair("soft_label"),
    "DistillationKLDivLoss": _pair("kl", temperature="temperature"),
    "DistillationDMLLoss": _pair(
        "dml", act="act", sum_across_class_dim="sum_across_class_dim", weight_ratio="weight_ratio"
    ),
    "DistillationDistanceLoss": _pair("l2", act="act"),
    "DistillationDKDLoss": _pair(
        "dkd",
        temperature="temperature",
        alpha="alpha",
        beta="beta",
        use_target_as_gt="use_target_as_gt",
    ),
    "DistillationDISTLoss": _pair("dist", beta="beta", gamma="gamma"),
    "DistillationPairLoss": _pair("mgd", alpha_mgd="alpha_mgd", lambda_mgd="lambda_mgd"),
    "DistillationSKDLoss": _pair("skd", temperature="temperature", multiplier="multiplier"),
    "DistillationWSLLoss": _pair("wsl", temperature="temperature"),
}
OPTIMIZERS = {"Momentum": "sgd", "SGD": "sgd", "Adam": "adam", "AdamW": "adamw"}
SCHEDULES = {
    "Cosine": "cosine",
    "Piecewise": "piecewise",
    "Linear": "linear",
    "Constant": "constant",
}
OPERATORS = {
    "DecodeImage": "",
    "ToCHWImage": "",
    "RandCropImage": "random-crop={size}",
    "ResizeImage": "resize={resize_short}",
    "CropImage": "crop={size}",
    "RandFlipImage": "flip",
    "ColorJitter": "colour={brightness}",
    "NormalizeImage": "normalize=imagenet",
}
CLAS_OURS = (
    "checkpoints",
    "device",
    "eval_during_train",
    "output_dir",
    "pretrained_model",
    "print_batch_step",
    "save_inference_dir",
    "save_interval",
    "to_static",
    "use_visualdl",
)
"""Of Global: what every run of ours does by itself, or has its own place for."""
