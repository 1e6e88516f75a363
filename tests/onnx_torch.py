"""An independent differentiator: runs an ONNX graph with torch, node by node, for gradients.

It shares no code with the package, covers what losses consist of, and works in float64 so that a
difference is the graph's and not rounding.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F


def gradients(
    model: ir.Model,
    feeds: Mapping[str, np.ndarray],
    wanted: list[str],
    *,
    dtype: torch.dtype = torch.float64,
    training: bool = False,
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the first output and its gradient to inputs and initializers named in ``wanted``."""
    arrays = {k: v.const_value.numpy() for k, v in model.graph.initializers.items()} | dict(feeds)
    values = {}
    for name, array in arrays.items():
        tensor = torch.from_numpy(np.array(array))
        values[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    for name in wanted:
        values[name].requires_grad_()
    for node in model.graph:
        run(node, values, dtype, training)
    loss = values[model.graph.outputs[0].name]
    leaves = [values[name] for name in wanted]
    if not leaves:
        return loss.item(), {}
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.item(), {n: g.numpy() for n, g in zip(wanted, found, strict=True)}


def run(node: ir.Node, values: dict[str, torch.Tensor], dtype: torch.dtype, training: bool) -> None:
    args = [None if v is None else values[v.name] for v in node.inputs]
    attributes = {k: v.value for k, v in node.attributes.items()}
    if node.op_type == "Cast":
        result = _cast(args[0], ir.DataType(attributes["to"]), dtype)
    elif node.op_type == "BatchNormalization":
        x, scale, bias, mean, variance = args
        result = F.batch_norm(x, mean.clone(), variance.clone(), scale, bias, training, eps=1e-5)
    elif node.op_type.startswith("Reduce"):
        result = _reduce(node.op_type, args, attributes)
    else:
        result = OPS[node.op_type](*args, **attributes)
    values[node.outputs[0].name] = result


def _cast(x: torch.Tensor, to: ir.DataType, dtype: torch.dtype) -> torch.Tensor:
    wide = dtype if to == ir.DataType.FLOAT else None
    return x.to(wide or torch.from_numpy(np.empty(0, to.numpy())).dtype)


def _reduce(op: str, args: list, attributes: dict) -> torch.Tensor:
    x = args[0]
    axes = attributes.get("axes") or (args[1].tolist() if len(args) > 1 else range(x.ndim))
    keep = bool(attributes.get("keepdims", 1))
    if op == "ReduceProd":
        return x.prod()
    kinds = {"ReduceSum": torch.sum, "ReduceMean": torch.mean, "ReduceLogSumExp": torch.logsumexp}
    return kinds[op](x, dim=tuple(axes), keepdim=keep)


def _reshape(x, shape):
    return x.reshape([x.shape[i] if d == 0 else d for i, d in enumerate(shape.tolist())])


def _slice(x, start, end, axis):
    index = [slice(None)] * x.ndim
    index[int(axis)] = slice(int(start), int(end))
    return x[tuple(index)]


def _gather(x, index, axis):
    found = x.index_select(axis, index.flatten())
    return found.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


def _resize(x, _roi, _scales, sizes, mode):
    assert mode == "linear"
    return F.interpolate(x, sizes[2:].tolist(), mode="bilinear", align_corners=False)


def _unsqueeze(x, axes):
    for axis in axes.tolist():
        x = x.unsqueeze(axis)
    return x


OPS = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "ArgMax": lambda x, axis, keepdims: torch.argmax(x, axis, keepdim=bool(keepdims)),
    "AveragePool": lambda x, kernel_shape, strides: F.avg_pool2d(x, kernel_shape, strides),
    "Concat": lambda *xs, axis: torch.cat(xs, axis),
    "Conv": lambda x, w, b, kernel_shape, pads: F.conv2d(x, w, b, padding=pads[:2]),
    "Div": torch.div,
    "Equal": torch.eq,
    "Exp": torch.exp,
    "EyeLike": lambda x: torch.eye(len(x), dtype=x.dtype),
    "Flatten": lambda x, axis: x.flatten(axis),
    "Gather": _gather,
    "GlobalAveragePool": lambda x: x.mean((2, 3), keepdim=True),
    "Greater": torch.gt,
    "Less": torch.lt,
    "Log": torch.log,
    "LogSoftmax": lambda x, axis: torch.log_softmax(x, axis),
    "MatMul": torch.matmul,
    "Max": torch.maximum,
    "MaxPool": lambda x, kernel_shape, strides: F.max_pool2d(x, kernel_shape, strides),
    "Min": torch.minimum,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Or": torch.logical_or,
    "Pow": torch.pow,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Reshape": _reshape,
    "Resize": _resize,
    "Shape": lambda x, start=0, end=None: torch.tensor(list(x.shape)[start:end]),
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": lambda x, axis: torch.softmax(x, axis),
    "Softplus": F.softplus,
    "Sqrt": torch.sqrt,
    "Sub": torch.sub,
    "Sum": lambda *xs: sum(xs[1:], xs[0]),
    "Transpose": lambda x, perm: x.permute(perm),
    "Unsqueeze": _unsqueeze,
    "Where": torch.where,
}
