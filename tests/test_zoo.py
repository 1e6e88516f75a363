import functools
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from onnxslim_kd import plugins
from onnxslim_kd.zoo import ZOO
from onnxslim_kd.zoo.blocks import Linear, calibrate, onnx_names

GOLDEN = Path(__file__).parent / "golden"

# Million multiply-accumulates at 224 x 224 and million parameters, both of PaddleSlim's nets,
# and how many parameters a pattern of the pruning tutorials matches.
TUTORIALS = {
    "mobilenet_v1": (568.74, 4.254, r".*_sep_weights", 13),
    "mobilenet_v2": (313.62, 3.540, r".*[r|d]_weights", 34),
    "resnet34": (3676.6, 21.82, r".*branch.*_weights", 36),
}


def build(name: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return plugins.find(ZOO[name].spec)(**arguments)


def shapes(net: nn.Module) -> dict[str, list[int]]:
    names = onnx_names(net)
    return {
        names[name]: list(tensor.shape)
        for name, tensor in net.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


@functools.cache
def shapes_of(name: str) -> dict[str, list[int]]:
    return shapes(build(name))


def macs(net: nn.Module, x: torch.Tensor) -> int:
    counted = []

    def count(module, inputs, output):
        positions = output.shape[2:].numel() if output.dim() == 4 else 1
        counted.append(module.weight.numel() * positions)

    for module in net.modules():
        if isinstance(module, nn.Conv2d | Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        net(x)
    return sum(counted)


@pytest.mark.parametrize("name", TUTORIALS)
def test_has_the_tutorials_size_and_names(name) -> None:
    million_macs, million_parameters, pattern, matches = TUTORIALS[name]
    net = build(name)
    found = shapes(net)
    assert macs(net, torch.zeros(1, 3, 224, 224)) / 1e6 == pytest.approx(million_macs, rel=1e-4)
    size = sum(torch.Size(shape).numel() for shape in found.values())
    assert size / 1e6 == pytest.approx(million_parameters, rel=2e-4)
    assert sum(re.match(pattern, parameter) is not None for parameter in found) == matches


@pytest.mark.parametrize(
    ("name", "million_parameters"),
    [("resnet50_vd", 25.63), ("pplcnet_x2_5", 9.045), ("deeplabv3p_xception65", 41.26)],
)
def test_has_the_published_size(name, million_parameters) -> None:
    size = sum(torch.Size(shape).numel() for shape in shapes_of(name).values())
    assert size / 1e6 == pytest.approx(million_parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "parameter", "shape"),
    [
        ("resnet50_vd", "res2a_branch1_weights", [256, 64, 1, 1]),
        ("resnet50_vd", "bnv1_1_scale", [32]),
        ("pplcnet_x2_5", "blocks6.1.se.conv1.weight", [320, 1280, 1, 1]),
        ("deeplabv3p_xception65", "xception_65/entry_flow/conv1/BatchNorm/gamma", [32]),
        ("deeplabv3p_xception65", "encoder/aspp3/depthwise/weights", [2048, 1, 3, 3]),
        ("deeplabv3p_xception65", "decoder/concat/weights", [48, 256, 1, 1]),
        ("deeplabv3p_mobilenet_v2", "conv8_1_linear_weights", [320, 960, 1, 1]),
        ("deeplabv3p_mobilenet_v2", "logit/biases", [19]),
        ("yolov3_mobilenet_v1", "yolo_block.0.0.0.conv.weights", [512, 1024, 1, 1]),
        ("yolov3_mobilenet_v1", "yolo_block.2.tip.bn.var", [256]),
        ("yolov3_resnet34", "yolo_output.1.conv.bias", [255]),
        ("yolov3_resnet34", "yolo_transition.1.conv.weights", [128, 256, 1, 1]),
        ("mobilenet_small", "conv4_2_dwise_weights", [256, 1, 3, 3]),
    ],
)
def test_has_the_tutorials_names(name, parameter, shape) -> None:
    assert shapes_of(name)[parameter] == shape


def test_mobilenet_v2_has_every_name_and_shape_of_the_tutorial() -> None:
    expected = json.loads((GOLDEN / "mobilenet_v2_shapes.json").read_text())
    assert shapes(build("mobilenet_v2")) == expected


@pytest.mark.parametrize("name", ZOO)
def test_names_are_unique(name) -> None:
    net = build(name)
    names = [n for n in onnx_names(net).values() if not n.endswith("num_batches_tracked")]
    assert len(names) == len(set(names))
    assert not net.training


@pytest.mark.parametrize("name", ["mobilenet_v2", "pplcnet_x2_5", "resnet20", "digits_cnn"])
def test_activations_are_of_order_one(name) -> None:
    net = build(name)
    channels, height = ZOO[name].shape[1:3]
    size = min(height, 64)
    calibrate(net, channels, size, size)
    with torch.no_grad():
        outputs = net(torch.randn(2, channels, size, size))
    assert 0.1 < outputs.std() < 30
    assert not net.training


def test_seed_decides_the_weights() -> None:
    first, second = build("resnet20"), build("resnet20")
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )
    third = plugins.find(ZOO["resnet20"].spec)()
    assert not torch.equal(next(first.parameters()), next(third.parameters()))


def test_width_and_classes_are_arguments() -> None:
    assert shapes(build("mobilenet_v1", scale=0.25, classes=10))["fc7_weights"] == [256, 10]
    assert shapes(build("mobilenet_v2", scale=0.5, classes=7))["fc10_weights"] == [1280, 7]
