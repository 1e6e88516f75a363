"""The networks of a PaddleClas file: ``Arch``, one network or several with their taps."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onnxslim_kd.convert_common import Converted, Old, leaves

LOGITS = (None, "logits", "output")
"""How losses call what a network says."""


@dataclass(frozen=True)
class Net:
    """One network: PaddleClas' name for it, its architecture, and what is said about it."""

    name: str
    arch: str
    frozen: bool
    settings: Old
    keys: tuple[str, ...] = ()
    """What a transform behind it reads (AFD)."""

    @property
    def stage(self) -> str:
        """The stage that exports it."""
        return re.sub(r"[^A-Za-z0-9_-]", "_", self.name).lower()

    def value(self, key: str | None) -> str:
        """Return our name for an output that a loss calls ``key``; the key where there is none."""
        if key in LOGITS:
            return "logits"
        assert key is not None
        block = re.fullmatch(r"blocks\[(\d+)\]", key)
        if block and self.arch in DEPTHS:
            names = _blocks(DEPTHS[self.arch])
            return names[int(block[1])] if int(block[1]) < len(names) else key
        return TAPS.get((self.arch, key), key)


def _blocks(depths: Sequence[int]) -> list[str]:
    """Return the residual blocks of a ResNet of the zoo in their order."""
    return [
        f"~/res{stage}/res{stage}{'abcdefgh'[block]}$"
        for stage, depth in enumerate(depths, start=2)
        for block in range(depth)
    ]


def networks(arch: Old) -> list[Net]:
    """Return all networks, the one that is shipped first unless it is called Teacher.

    Of an AttentionModel, which is a network and a transform, the network counts.
    """
    chosen = arch.get("infer_model_name")
    models = {name: m for each in arch.pop("models", None) or [] for name, m in each.items()}
    flags = arch.pop("freeze_params_list", None) or [False] * len(models)
    classes = arch.pop("class_num", None)
    if not models:
        whole = {key: arch.pop(key) for key in list(arch) if key != "infer_model_name"}
        return [_net("Student", whole | {"class_num": classes}, frozen=False)]
    arch.pop("name", None)
    nets = []
    for (name, model), flag in zip(models.items(), flags, strict=True):
        nets.append(_net(name, {"class_num": classes} | model, frozen=bool(flag)))
    first = "Student" if "Student" in models else chosen
    return sorted(nets, key=lambda net: (net.name != first, net.frozen, net.name))


def _net(name: str, model: Old, *, frozen: bool) -> Net:
    if "models" not in model:
        return Net(name, str(model.pop("name", "")), frozen, model)
    parts = [settings for each in model["models"] for settings in each.values()]
    flags = model.get("freeze_params_list") or [frozen] * len(parts)
    inner, *transforms = parts
    keys = tuple(key for part in transforms for key in part.get("keys", ()))
    settings = {"class_num": model["class_num"]} | inner
    return Net(name, str(settings.pop("name", "")), bool(flags[0]), settings, keys)


def export(net: Net, size: str, new: Converted) -> Old:
    """Return the stage that exports a network, and note what it does not hold."""
    settings = net.settings
    stage: dict[str, Any] = {"do": "export", "arch": ARCHITECTURES.get(net.arch, net.arch)}
    stage["inputs"] = {"image": size}
    classes = settings.pop("class_num", None)
    if classes is not None:
        stage["arguments"] = {"classes": classes}
    if net.arch not in ARCHITECTURES:
        new.notes.append(
            f"{net.arch} is not in the zoo: give its module:function as arch of the stage"
            f" {net.stage}, or remove the stage and name an ONNX file instead"
        )
    if weights := settings.pop("pretrained", False):
        weights = "use_ssld" if settings.pop("use_ssld", False) else weights
        new.notes.append(
            f"{net.name}'s pretrained weights ({weights}) are Paddle's: convert them to .npz and"
            f" name the file as `weights` of the stage {net.stage}"
        )
    settings.pop("use_ssld", None)
    taps = settings.pop("return_patterns", None) or []
    strange = [tap for tap in taps if net.value(tap) == tap]
    if strange:
        new.notes.append(
            f"{net.name}'s return_patterns ({', '.join(strange)}) are no names of values: see"
            f" `onnxslim-kd inspect --values`, or write ~REGEX for the output of a module"
        )
    new.notes += [f"not carried over: Arch.{net.name}.{left}" for left in leaves(settings)]
    return stage


ARCHITECTURES: Mapping[str, str] = {
    "MobileNet": "mobilenet_v1",
    "MobileNetV1": "mobilenet_v1",
    "MobileNetV2": "mobilenet_v2",
    "ResNet18": "resnet18",
    "ResNet34": "resnet34",
    "ResNet50": "resnet50",
    "ResNet50_vd": "resnet50_vd",
    "PPLCNet_x2_5": "pplcnet_x2_5",
}
DEPTHS: Mapping[str, Sequence[int]] = {
    "ResNet18": (2, 2, 2, 2),
    "ResNet34": (3, 4, 6, 3),
    "ResNet50": (3, 4, 6, 3),
    "ResNet50_vd": (3, 4, 6, 3),
}
TAPS: Mapping[tuple[str, str], str] = {
    **{("PPLCNet_x2_5", f"blocks{n}"): f"~/blocks{n}$" for n in range(2, 7)},
    **{(name, "avg_pool"): "~/fc/fc.0$" for name in DEPTHS},
    ("PPLCNet_x2_5", "avg_pool"): "~/avg_pool$",
}
"""Where the zoo has what PaddleClas calls so."""
