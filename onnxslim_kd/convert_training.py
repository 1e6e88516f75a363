"""How a PaddleClas file trains: ``Global``, ``Optimizer``, ``DataLoader``, ``AMP`` and ``EMA``."""

from collections.abc import Callable, Mapping
from typing import Any

from onnxslim_kd.convert_common import Converted, Old, leaves


def training(old: Old, labels: Old, new: Converted) -> Old:
    """Return the stage that trains."""
    globals_ = old.get("Global", {})
    train: dict[str, Any] = {"do": "train", "epochs": globals_.pop("epochs", 1)}
    sampler = old.get("DataLoader", {}).get("Train", {}).get("sampler", {})
    if "batch_size" in sampler:
        train["batch_size"] = sampler.pop("batch_size")
        new.notes.append(
            f"batch_size {train['batch_size']} was that of one GPU; here it is that of all"
            f" processes together"
        )
    for theirs, ours in GLOBALS.items():
        if globals_.get(theirs) is not None:
            train[ours] = globals_.pop(theirs)
    if labels:
        train["labels"] = labels
    train |= _optimizer(old.get("Optimizer", {}), new)
    if "EMA" in old:
        train["ema"] = old["EMA"].pop("decay", 0.9999)
    amp = old.pop("AMP", None)
    if amp is not None and amp.pop("use_amp", True):
        train["amp"] = "fp16"
    return train


def _optimizer(optimizer: Any, new: Converted) -> Old:
    if isinstance(optimizer, list):  # each entry with its own scope
        new.notes.append("of several optimizers the first is carried over, for all parameters")
        ((name, first),) = optimizer.pop(0).items()
        optimizer = {"name": name, **first}
        optimizer.pop("scope", None)
    if not optimizer:
        return {}
    rate = optimizer.pop("lr", {})
    decay = optimizer.pop("regularizer", None) or {}
    name = optimizer.pop("name", "Momentum")
    if name not in OPTIMIZERS:
        new.notes.append(f"optimizer {name} is not here: SGD with momentum stands for it")
    ours: dict[str, Any] = {"name": OPTIMIZERS.get(name, "sgd")}
    ours["lr"] = float(rate.pop("learning_rate", 0.01))
    for theirs, mine in (("momentum", "momentum"), ("use_nesterov", "nesterov"),
                         ("epsilon", "eps")):  # fmt: skip
        if theirs in optimizer:
            ours[mine] = optimizer.pop(theirs)
    if "beta1" in optimizer and "beta2" in optimizer:
        ours["betas"] = [optimizer.pop("beta1"), optimizer.pop("beta2")]
    if "coeff" in decay:
        decay.pop("name", None)
        ours["weight_decay"] = float(decay.pop("coeff"))
    elif "weight_decay" in optimizer:
        ours["weight_decay"] = float(optimizer.pop("weight_decay"))
    schedule = _schedule(rate, ours, new)
    optimizer |= {"lr": rate, "regularizer": decay}
    new.notes += [f"not carried over: Optimizer.{left}" for left in leaves(optimizer)]
    optimizer.clear()
    return {"optimizer": ours, "schedule": schedule}


def _schedule(rate: Old, optimizer: Old, new: Converted) -> Old:
    kind = rate.pop("name", "Constant")
    if kind not in SCHEDULES:
        new.notes.append(f"learning rate {kind} is not here: it stays constant")
    schedule: dict[str, Any] = SCHEDULES.get(kind, _plain("constant"))(rate, optimizer)
    if "warmup_epoch" in rate:
        schedule["warmup"] = rate.pop("warmup_epoch")
    return schedule


def _plain(kind: str) -> Callable[[Old, Old], Old]:
    return lambda rate, optimizer: {"kind": kind}


def _piecewise(rate: Old, optimizer: Old) -> Old:
    boundaries = rate.pop("decay_epochs", None) or rate.pop("boundaries", [])
    values = rate.pop("values", [])
    optimizer["lr"] = float(next(iter(values), optimizer["lr"]))
    return {"kind": "piecewise", "boundaries": boundaries, "values": values}


def _milestones(rate: Old, optimizer: Old) -> Old:
    """Times gamma at every milestone."""
    boundaries, gamma = rate.pop("milestones", []), rate.pop("gamma", 0.1)
    if rate.get("step_each_epoch") == 1:  # in epochs, as ours are
        del rate["step_each_epoch"]
    values = [float(f"{optimizer['lr'] * gamma**n:g}") for n in range(len(boundaries) + 1)]
    return {"kind": "piecewise", "boundaries": boundaries, "values": values}


# ---------------------------------------------------------------------------------- data


def data(loaders: Old, new: Converted) -> None:
    """Set ``data``, ``val_data``, ``preprocess`` and ``workers``."""
    for part, ours in (("Train", "data"), ("Eval", "val_data")):
        loader = loaders.get(part) or {}
        dataset = loader.get("dataset") or {}
        if "cls_label_path" in dataset:
            if dataset.get("name") == "ImageNetDataset":
                del dataset["name"]
            root = dataset.pop("image_root", ".")
            new.settings[ours] = f"imagelist:{dataset.pop('cls_label_path')}?root={root}"
        steps = _preprocess(dataset)
        if part == "Train" and steps:
            new.settings["preprocess"] = steps
        sampler, workers = loader.get("sampler") or {}, loader.pop("loader", None) or {}
        if part == "Train" and workers.get("num_workers"):
            new.settings["workers"] = workers["num_workers"]
        for key in ("name", "shuffle", "drop_last", *(["batch_size"] if part == "Eval" else [])):
            sampler.pop(key, None)
    if "data" not in new.settings:
        new.settings["data"] = "imagelist:train_list.txt?root=images"
        new.notes.append("DataLoader.Train.dataset has no cls_label_path: set data")


def mixes(loaders: Old) -> Old:
    """Take out mixup or CutMix, which shape the loss on labels."""
    dataset = (loaders.get("Train") or {}).get("dataset") or {}
    found: dict[str, Any] = {}
    left = []
    for operator in dataset.pop("batch_transform_ops", None) or []:
        ((name, options),) = operator.items()
        if name in MIXES and not found:
            found[MIXES[name]] = (options or {}).get("alpha", 1.0)
        else:
            left.append(operator)
    if left:
        dataset["batch_transform_ops"] = left
    return found


def _preprocess(dataset: Old) -> str:
    """Convert the operators that we have; the others stay in the data set's settings."""
    steps, left = [], []
    for operator in dataset.pop("transform_ops", None) or []:
        ((name, options),) = operator.items()
        options = dict(options or {})
        if name not in OPERATORS:
            left.append(operator)
            continue
        if step := OPERATORS[name](options):
            steps.append(step)
        for plain in PLAIN:
            options.pop(plain, None)
        left += [{name: options}] if options else []
    if left:
        dataset["transform_ops"] = left
    return ",".join(steps)


def _size(options: Old, name: str, default: int) -> str:
    size = options.pop(name, default)
    return "x".join(map(str, size)) if isinstance(size, list) else str(size)


def _resize(options: Old) -> str:
    if "size" in options:
        size = _size(options, "size", 224)
        return f"resize={size if 'x' in size else f'{size}x{size}'}"
    return f"resize={_size(options, 'resize_short', 256)}"


def _normalize(options: Old) -> str:
    numbers = [options.pop(key, default) for key, default in IMAGENET.items()]
    if numbers == list(IMAGENET.values()):
        return "normalize=imagenet"
    return f"normalize={':'.join('/'.join(map(str, each)) for each in numbers)}"


GLOBALS = {
    "eval_interval": "eval_every",
    "print_batch_step": "log_steps",
    "update_freq": "accumulate",
    "seed": "seed",
}
OPTIMIZERS = {"Momentum": "sgd", "SGD": "sgd", "Adam": "adam", "AdamW": "adamw"}
SCHEDULES: Mapping[str, Callable[[Old, Old], Old]] = {
    "Cosine": _plain("cosine"),
    "Linear": _plain("linear"),
    "Constant": _plain("constant"),
    "ConstLR": _plain("constant"),
    "Piecewise": _piecewise,
    "MultiStepDecay": _milestones,
}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
OPERATORS: Mapping[str, Callable[[Old], str]] = {
    "DecodeImage": lambda options: "",
    "ToCHWImage": lambda options: "",
    "RandCropImage": lambda options: f"random-crop={_size(options, 'size', 224)}",
    "ResizeImage": _resize,
    "CropImage": lambda options: f"crop={_size(options, 'size', 224)}",
    "RandFlipImage": lambda options: "flip",
    "ColorJitter": lambda options: f"colour={options.pop('brightness', 0.4)}",
    "NormalizeImage": _normalize,
}
PLAIN = ("backend", "channel_first", "channel_num", "flip_code", "order", "scale", "to_rgb",
         "output_fp16", "contrast", "saturation")  # fmt: skip
"""Options of operators that say what we do anyway."""
MIXES = {"MixupOperator": "mixup", "CutmixOperator": "cutmix"}
