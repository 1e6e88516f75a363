"""What latency_pruning.py compares with: one ratio for every layer by Torch-Pruning, from torch."""

import warnings
from pathlib import Path

import onnx_ir as ir
import torch
from densenet import densenet121
from torch import nn

from onnxslim_kd import model as model_io
from onnxslim_kd.zoo import blocks
from onnxslim_kd.zoo.export import build, export

SIZE = (3, 224, 224)
NAMES = ("mobilenet_v1", "mobilenet_v2", "resnet18", "resnet50", "densenet121")


def module(name: str) -> nn.Module:
    """Build one of `NAMES` out of layers that Torch-Pruning knows."""
    torch.manual_seed(0)
    net = densenet121() if name == "densenet121" else build(name, {})
    for parent in list(net.modules()):
        for child, layer in parent.named_children():
            if isinstance(layer, blocks.Linear):  # the same product, its weight the other way up
                setattr(parent, child, nn.Linear(*layer.weight.shape))
    return net


def original(name: str) -> ir.Model:
    """Return one of `NAMES` as our exporter writes it."""
    spec = "densenet:densenet121" if name == "densenet121" else name
    return export(spec, inputs={"image": (1, *SIZE)})


def cut(name: str, ratio: float, path: Path) -> ir.Model:
    """Prune a module with Torch-Pruning and write it as torch's exporter does."""
    import torch_pruning as tp

    net, example = module(name), torch.zeros(1, *SIZE)
    tp.pruner.BasePruner(
        net,
        example,
        importance=tp.importance.MagnitudeImportance(p=1),
        pruning_ratio=ratio,
        ignored_layers=[layer for layer in net.modules() if isinstance(layer, nn.Linear)],
    ).step()
    blocks.calibrate(net, *SIZE)  # an uncalibrated net computes with denormals, which takes longer
    with warnings.catch_warnings():  # of the exporter that keeps to opset 17
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (example,),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["image"],
            output_names=["logits"],
        )
    return model_io.load(path)
