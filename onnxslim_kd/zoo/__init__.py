"""Architectures of the tutorials, with the tutorials' parameter names.

A name stands for a builder, ``module:function``, imported when it is asked for. Adding one is a
function that returns a torch module, and a line here.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One architecture."""

    spec: str
    """``module:function`` of the builder."""
    about: str
    shape: tuple[int, ...] = (1, 3, 224, 224)
    """Of the input ``image`` unless the user says otherwise."""
    outputs: tuple[str, ...] = ("logits",)


_HERE = "onnxslim_kd.zoo"

ZOO = {
    "mobilenet_v1": Entry(f"{_HERE}.mobilenet_v1:mobilenet_v1", "MobileNetV1"),
    "mobilenet_v2": Entry(f"{_HERE}.mobilenet_v2:mobilenet_v2", "MobileNetV2"),
    "resnet18": Entry(f"{_HERE}.resnet:resnet18", "ResNet-18"),
    "resnet34": Entry(f"{_HERE}.resnet:resnet34", "ResNet-34"),
    "resnet50": Entry(f"{_HERE}.resnet:resnet50", "ResNet-50"),
}
