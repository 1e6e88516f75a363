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
_SEGMENTATION = (1, 3, 256, 256)
_DETECTION = (1, 3, 320, 320)
_MAPS = ("yolo_output.0", "yolo_output.1", "yolo_output.2")

ZOO = {
    "mobilenet_v1": Entry(f"{_HERE}.mobilenet_v1:mobilenet_v1", "MobileNetV1"),
    "mobilenet_v2": Entry(f"{_HERE}.mobilenet_v2:mobilenet_v2", "MobileNetV2"),
    "resnet18": Entry(f"{_HERE}.resnet:resnet18", "ResNet-18"),
    "resnet34": Entry(f"{_HERE}.resnet:resnet34", "ResNet-34"),
    "resnet50": Entry(f"{_HERE}.resnet:resnet50", "ResNet-50"),
    "resnet152": Entry(f"{_HERE}.resnet:resnet152", "ResNet-152"),
    "resnet50_vd": Entry(f"{_HERE}.resnet_vd:resnet50_vd", "ResNet-50-D"),
    "pplcnet_x2_5": Entry(f"{_HERE}.pplcnet:pplcnet_x2_5", "PP-LCNet x2.5"),
    "deeplabv3p_xception65": Entry(
        f"{_HERE}.deeplab:deeplabv3p_xception65", "DeepLabV3+, Xception-65", _SEGMENTATION
    ),
    "deeplabv3p_mobilenet_v2": Entry(
        f"{_HERE}.deeplab:deeplabv3p_mobilenet_v2", "DeepLabV3+, MobileNetV2", _SEGMENTATION
    ),
    "yolov3_mobilenet_v1": Entry(
        f"{_HERE}.yolov3:yolov3_mobilenet_v1", "YOLOv3, MobileNetV1", _DETECTION, _MAPS
    ),
    "yolov3_resnet34": Entry(
        f"{_HERE}.yolov3:yolov3_resnet34", "YOLOv3, ResNet-34", _DETECTION, _MAPS
    ),
    "resnet20": Entry(f"{_HERE}.small:resnet20", "ResNet-20 for CIFAR", (1, 3, 32, 32)),
    "mobilenet_small": Entry(
        f"{_HERE}.small:mobilenet_small", "MobileNetV2, short", (1, 3, 32, 32)
    ),
    "digits_cnn": Entry(f"{_HERE}.small:digits_cnn", "three convolutions", (1, 1, 8, 8)),
}
