"""ONNX Runtime as the judge of what is lowered."""

import onnx_ir as ir
import onnxruntime as ort
import torch


def run_ort(model, feeds, outputs):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    data = ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(list(outputs), feeds)


def feeds_of(arrays):
    return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
