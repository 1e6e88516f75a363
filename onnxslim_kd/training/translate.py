"""Turn an ONNX graph into one `torch.fx` graph without state: weights are its arguments.

A value is a *constant* (known now), or is computed in each run. Computed values live on the device
of the data, except shape arithmetic (what descends from Shape and Size alone), which stays on the
CPU as small integer tensors, so that a GPU never has to be waited for.
"""

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from onnxslim_kd.access import RANDOM, unique
from onnxslim_kd.errors import ModelError
from onnxslim_kd.model import name_of
from onnxslim_kd.training.opnode import Kernel, OpNode, describe, to_torch, torch_dtype
from onnxslim_kd.training.state import Weights, identifier

Lower: TypeAlias = Callable[[OpNode], Kernel]
QUANTISED = frozenset(
    (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16, ir.DataType.INT32)
)
"""Types that inside are kept in floating point, for gradients to pass (`ops_quant`)."""
STRUCTURAL = frozenset({"Identity", "If"})
"""Not computed, and so not in the table of kernels."""
ON_HOST = frozenset({"ConstantOfShape", "RandomNormal", "RandomUniform", "Range", "Shape", "Size"})
"""Made from sizes and numbers, on the CPU, whatever the device."""


class Branch(nn.Module):
    """An If whose condition is known only in the run."""

    def __init__(self, then_branch: fx.GraphModule, else_branch: fx.GraphModule) -> None:
        super().__init__()
        self.then_branch = then_branch
        self.else_branch = else_branch

    def forward(self, condition: Tensor, *captured: Tensor) -> Any:
        """Run one of the two."""
        branch = self.then_branch if bool(condition) else self.else_branch
        return branch(*captured)


class Translator:
    """Translates one graph; a subgraph's translator has a ``parent`` and captures from it."""

    def __init__(
        self,
        table: Mapping[str, Lower],
        weights: Weights,
        opset: int,
        parent: "Translator | None" = None,
    ) -> None:
        self.table = table
        self.weights = weights
        self.opset = opset
        self.parent = parent
        self.graph = fx.Graph()
        self.constants: dict[ir.Value, Tensor] = {} if parent is None else parent.constants
        self.modules: dict[str, nn.Module] = {}
        self.captured: list[ir.Value] = []
        self._nodes: dict[ir.Value, fx.Node] = {}
        self._on_host: set[fx.Node] = set()

    # ------------------------------------------------------------------------ values

    def source(self, value: ir.Value) -> fx.Node:
        """Return the fx node of ``value`` on the device of the data."""
        if value not in self._nodes:
            self._nodes[value] = self._argument(value)
        return self._nodes[value]

    def _argument(self, value: ir.Value) -> fx.Node:
        """Let ``value`` come in from outside: a feed, a weight, or captured from the parent."""
        name = name_of(value)
        node = placeholder(self.graph, name)
        if self.parent is not None:
            self.captured.append(value)
            if self.parent.is_host(value):
                self._on_host.add(node)
        elif value in self.constants or value.const_value is not None:
            tensor = self.constants.get(value)
            held = tensor if tensor is not None else to_torch(_tensor(value))
            name = self.weights.register(name, held)
            node.meta["weight"] = self.weights.keys[name]
            node.meta["shape"] = held.shape
        else:
            node.meta["feed"] = name
        node.meta["value"] = name
        node.meta["rank"] = rank(value)
        return node

    def result(self, value: ir.Value) -> fx.Node:
        """Return an output; what was computed with whole numbers in floats gets its type."""
        node = self.source(value)
        if value.dtype not in QUANTISED:
            return node
        return self.graph.call_method("to", (node, torch_dtype(value.dtype)))

    def is_host(self, value: ir.Value) -> bool:
        """Tell whether ``value`` is computed on the CPU."""
        if value in self._nodes:
            return self._nodes[value] in self._on_host
        return self.parent is not None and self.parent.is_host(value)

    def constant(self, value: ir.Value | None) -> Tensor | None:
        """Return what is known of ``value`` now; never of a trained weight."""
        if value is None or value.is_graph_input():
            return None
        if value in self.constants:
            return self.constants[value]
        if value.const_value is None or value.name in self.weights.trainable:
            return None
        self.constants[value] = to_torch(value.const_value)
        return self.constants[value]

    # ------------------------------------------------------------------------- nodes

    def translate(self, graph: ir.Graph, needed: Collection[ir.Node]) -> None:
        """Translate the needed nodes of ``graph``, in their order."""
        for node in graph:
            if node in needed:
                try:
                    self._node(node, needed)
                except (KeyError, ValueError, TypeError, RuntimeError) as error:
                    where = f"node {node.name} ({node.op_type})"
                    raise ModelError(f"{where} cannot be lowered: {error}") from error

    def _node(self, node: ir.Node, needed: Collection[ir.Node]) -> None:
        if node.op_type == "If":
            self._branch(node, needed)
            return
        if node.op_type == "Identity":
            assert node.inputs[0] is not None
            self._alias(node.outputs[0], node.inputs[0])
            return
        known = [self.constant(value) for value in node.inputs]
        seen = describe(node, known, self.opset)
        kernel = self.table[node.op_type](seen)
        if self._folds(node, known) and not isinstance(kernel, nn.Module):
            self._fold(node, seen, known, kernel)
        else:
            self._emit(node, seen, kernel)

    @staticmethod
    def _folds(node: ir.Node, known: Sequence[Tensor | None]) -> bool:
        pairs = zip(node.inputs, known, strict=True)
        return node.op_type not in RANDOM and all(v is None or k is not None for v, k in pairs)

    def _fold(
        self, node: ir.Node, seen: OpNode, known: Sequence[Tensor | None], kernel: Kernel
    ) -> None:
        with torch.no_grad():
            result = kernel(*(None if i in seen.bound else k for i, k in enumerate(known)))
        results = result if isinstance(result, tuple) else (result,)
        self.constants.update(zip(node.outputs, results, strict=False))

    def _emit(self, node: ir.Node, seen: OpNode, kernel: Kernel) -> None:
        host = node.op_type in ON_HOST or self._runs_on_host(node, seen)
        call = self._call(node, kernel, self._arguments(node, seen, host=host))
        if host:
            self._on_host.add(call)
        else:
            call.meta.update(op=node.op_type, numbers=_numbers(seen), attributes=seen.attributes)
        self._bind(node, call)

    def _call(self, node: ir.Node, kernel: Kernel, args: tuple[Any, ...]) -> fx.Node:
        name = identifier(node.outputs[0].name or node.op_type)
        if isinstance(kernel, nn.Module):
            key = unique(f"n_{identifier(node.name or node.op_type)}", self.modules)
            self.modules[key] = kernel
            return self.graph.create_node("call_module", f"ops.{key}", args, name=name)
        return self.graph.create_node("call_function", kernel, args, name=name)

    def _bind(self, node: ir.Node, call: fx.Node) -> None:
        call.meta["value"] = node.outputs[0].name
        call.meta["rank"] = rank(node.outputs[0])
        if len(node.outputs) == 1:
            self._nodes[node.outputs[0]] = call
            return
        for index, value in enumerate(node.outputs):
            if value.name and (value.uses() or value.is_graph_output()):
                item = self.graph.call_function(operator.getitem, (call, index))
                item.meta["value"] = value.name
                self._nodes[value] = item
                if call in self._on_host:
                    self._on_host.add(item)

    # ------------------------------------------------------------------- host or device

    def _runs_on_host(self, node: ir.Node, seen: OpNode) -> bool:
        """Tell whether all data comes from shape arithmetic (small constants may join)."""
        return all(
            value is None or index in seen.host or self._may_be_host(value)
            for index, value in enumerate(node.inputs)
        ) and any(value is not None and self.is_host(value) for value in node.inputs)

    def _may_be_host(self, value: ir.Value) -> bool:
        constant = self.constant(value)
        if constant is not None:
            return constant.numel() <= 1 or not constant.is_floating_point()
        return value in self._nodes and self.is_host(value)

    def _arguments(self, node: ir.Node, seen: OpNode, *, host: bool) -> tuple[Any, ...]:
        args: list[fx.Node | None] = []
        moved: list[int] = []
        for index, value in enumerate(node.inputs):
            if value is None or index in seen.bound:
                args.append(None)
                continue
            constant = self.constant(value)
            if constant is not None and (host or index in seen.host):
                args.append(self._host_constant(value, constant))
                continue
            args.append(self.source(value))
            if not host and index not in seen.host and self.is_host(value):
                moved.append(index)
        self._move(args, moved)
        return tuple(args)

    def _move(self, args: list[fx.Node | None], moved: Sequence[int]) -> None:
        """Bring results of shape arithmetic to the device of the other arguments."""
        device = [arg for index, arg in enumerate(args) if arg is not None and index not in moved]
        data = [arg for arg in device if arg not in self._on_host]
        for index in moved if data else ():
            args[index] = self.graph.call_function(to_device, (args[index], data[0]))

    def _host_constant(self, value: ir.Value, tensor: Tensor) -> fx.Node:
        """Bind a constant that must not follow the module to another device."""
        node = self.graph.create_node(
            "call_function", lambda: tensor, name=identifier(str(value.name))
        )
        node.meta["value"] = value.name
        return node

    # ---------------------------------------------------------------------------- If

    def _branch(self, node: ir.Node, needed: Collection[ir.Node]) -> None:
        condition = node.inputs[0]
        assert condition is not None
        known = self.constant(condition)
        graphs = [node.attributes[key].as_graph() for key in ("then_branch", "else_branch")]
        if known is not None:
            chosen = graphs[0] if bool(known) else graphs[1]
            self.translate(chosen, needed)
            for outer, inner in zip(node.outputs, chosen.outputs, strict=True):
                self._alias(outer, inner)
            return
        inner_translators = [self._inner(graph, needed) for graph in graphs]
        captured = list(dict.fromkeys(v for t in inner_translators for v in t.captured))
        module = Branch(*(t.module(captured) for t in inner_translators))
        args = (self.source(condition), *(self.source(value) for value in captured))
        self._bind(node, self._call(node, module, args))

    def _alias(self, outer: ir.Value, inner: ir.Value) -> None:
        constant = self.constant(inner)
        if constant is not None:
            self.constants[outer] = constant
        else:
            self._nodes[outer] = self.source(inner)

    def _inner(self, graph: ir.Graph, needed: Collection[ir.Node]) -> "Translator":
        inner = Translator(self.table, self.weights, self.opset, parent=self)
        inner.translate(graph, needed)
        results = tuple(inner.source(value) for value in graph.outputs)
        inner.graph.output(results if len(results) > 1 else results[0])
        return inner

    def module(self, captured: Sequence[ir.Value]) -> fx.GraphModule:
        """Return the translated subgraph as a function of ``captured``, in that order."""
        ordered = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for value in captured:
            argument = placeholder(ordered, name_of(value))
            if value in self.captured:
                copies[self._nodes[value]] = argument
        for node in self.graph.nodes:
            if node not in copies:
                copies[node] = copied(ordered, node, copies)
        root = {f"ops.{key}": module for key, module in self.modules.items()}
        return fx.GraphModule(root, ordered)


def placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """Add an argument to ``graph``, called like no other of its variables."""
    node = graph.create_node("placeholder", identifier(name), name=identifier(name))
    node.target = node.name  # fx keeps node names apart, but not the arguments'
    return node


def copied(graph: fx.Graph, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Copy ``node`` into ``graph``, where its inputs have ``copies``."""
    copy = graph.node_copy(node, lambda old: copies[old])
    if copy.op == "placeholder":
        copy.target = copy.name
    return copy


def rank(value: ir.Value) -> int | None:
    """Return the number of axes of ``value``, where it is known."""
    return len(value.shape) if value.shape is not None else None


def _numbers(seen: OpNode) -> list[float | None]:
    """Return the inputs that are single numbers, for `fuse` to recognise."""
    return [float(k) if k is not None and k.numel() == 1 else None for k in seen.constants]


def to_device(tensor: Tensor, like: Tensor) -> Tensor:
    """Move ``tensor`` to where ``like`` is."""
    return tensor.to(like.device, non_blocking=True)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value
