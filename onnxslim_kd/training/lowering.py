"""ONNX to torch: a module whose parameters are the initializers, by name.

`OPS` is the whole of what is supported; its functions live in the ``ops_*`` files, by family. To
add an operator, write a function that takes an `OpNode` and returns a kernel (a function of the
node's input tensors), put it in its family's table, and add a case to the tests.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor, fx, nn

from onnxslim_kd.errors import ModelError, NotFoundError, UserError, near_misses
from onnxslim_kd.model import name_of
from onnxslim_kd.training.fuse import fuse
from onnxslim_kd.training.opnode import Modal, to_ir
from onnxslim_kd.training.ops_attention import ATTENTION
from onnxslim_kd.training.ops_elementwise import ELEMENTWISE
from onnxslim_kd.training.ops_index import INDEX
from onnxslim_kd.training.ops_linear import LINEAR
from onnxslim_kd.training.ops_loss import LOSS
from onnxslim_kd.training.ops_norm import NORM
from onnxslim_kd.training.ops_pad import PAD
from onnxslim_kd.training.ops_pool import POOL
from onnxslim_kd.training.ops_quant import QUANT
from onnxslim_kd.training.ops_random import DRAWN
from onnxslim_kd.training.ops_reduce import REDUCE
from onnxslim_kd.training.ops_region import REGION
from onnxslim_kd.training.ops_resize import RESIZE
from onnxslim_kd.training.ops_rnn import RECURRENT
from onnxslim_kd.training.ops_shape import SHAPE
from onnxslim_kd.training.reach import needed_nodes, refuse_unknown
from onnxslim_kd.training.state import Weights
from onnxslim_kd.training.translate import STRUCTURAL, Lower, Translator, copied
from onnxslim_kd.training.weights import statistics_of, trainable_parameters

OPS: dict[str, Lower] = {
    **ELEMENTWISE,
    **REDUCE,
    **SHAPE,
    **INDEX,
    **PAD,
    **RESIZE,
    **LINEAR,
    **POOL,
    **REGION,
    **NORM,
    **RECURRENT,
    **ATTENTION,
    **QUANT,
    **LOSS,
    **DRAWN,
}


class Program:
    """A stateless fx module for some outputs, and what to call it with."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.arguments = [
            ("weight", node.meta["weight"])
            if "weight" in node.meta
            else ("feed", node.meta["feed"])
            for node in module.graph.nodes
            if node.op == "placeholder"
        ]


class Lowered(nn.Module):
    """An ONNX graph as a torch module.

    Attributes:
        parameters_by_name: The trained weights by initializer name.
        buffers_by_name: The other weights and constants that live on the device, by value name.
        outputs: The value names that `forward` can return.
    """

    def __init__(self, graph: fx.Graph, weights: Weights, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.ops = nn.ModuleDict(modules)
        self._keys = weights.keys
        self._trained = tuple(weights.parameters)
        self._fixed = tuple(weights.buffers)
        for name, parameter in weights.parameters.items():
            self.register_parameter(weights.keys[name], parameter)
        for name, buffer in weights.buffers.items():
            self.register_buffer(weights.keys[name], buffer)
        self._graph = graph
        self._programs: dict[tuple[str, ...], Program] = {}
        self.outputs: tuple[str, ...] = tuple(graph.output_node().args[0])  # type: ignore[arg-type]

    @property
    def parameters_by_name(self) -> dict[str, nn.Parameter]:
        """The trained weights, by initializer name."""
        return {name: self.get_parameter(self._keys[name]) for name in self._trained}

    @property
    def buffers_by_name(self) -> dict[str, Tensor]:
        """Frozen weights, running statistics and constants, by value name."""
        return {name: self.get_buffer(self._keys[name]) for name in self._fixed}

    def forward(
        self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None
    ) -> dict[str, Tensor]:
        """Compute ``outputs`` (all by default), and nothing that they do not need.

        Raises:
            UserError: An input is missing.
            NotFoundError: An output was not among those chosen when lowering.
        """
        wanted = self.outputs if outputs is None else tuple(outputs)
        program = self._programs.get(wanted) or self._program(wanted)
        results = program.module(*self._gather(program, feeds))
        return dict(zip(wanted, results, strict=True))

    def _gather(self, program: Program, feeds: Mapping[str, Tensor]) -> list[Tensor | None]:
        tensors = {**self._buffers, **self._parameters}
        try:
            return [
                tensors[key] if kind == "weight" else feeds[key] for kind, key in program.arguments
            ]
        except KeyError as error:
            raise UserError(f"input {error} is missing among the feeds {sorted(feeds)}") from None

    def _program(self, wanted: tuple[str, ...]) -> Program:
        """Cut the graph down to what ``wanted`` needs; kept, for every step asks for the same."""
        results = self._graph.output_node().args[0]
        assert isinstance(results, dict)
        for name in wanted:
            if name not in results:
                hint = near_misses(name, results)
                raise NotFoundError(f"output {name!r} was not chosen when lowering{hint}")
        chosen = [results[name] for name in wanted]
        needed = set(chosen)
        for node in reversed(self._graph.nodes):
            if node in needed:
                needed.update(node.all_input_nodes)
        part = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self._graph.nodes:
            if node in needed:
                copies[node] = copied(part, node, copies)
        part.output(tuple(copies[node] for node in chosen))
        self._programs[wanted] = Program(fx.GraphModule(self, part))
        return self._programs[wanted]

    def freeze_statistics(self, nodes: Collection[str] | None = None) -> None:
        """Keep BatchNormalization and Dropout nodes in inference mode, whatever `train` says.

        Args:
            nodes: Their names (of a teacher, say); None for all.

        Raises:
            NotFoundError: A name is not one of a node with two modes.
        """
        by_name = self.modal_nodes()
        for name in by_name if nodes is None else nodes:
            if name not in by_name:
                hint = near_misses(name, by_name)
                raise NotFoundError(f"{name!r} is no node with a training mode{hint}")
            by_name[name].frozen = True
            by_name[name].eval()

    def modal_nodes(self) -> dict[str, Modal]:
        """Return the nodes that behave otherwise in training (BatchNormalization, Dropout)."""
        return {node.node_name: node for node in self.modules() if isinstance(node, Modal)}

    def write_back(self, model: ir.Model) -> None:
        """Put trained weights and running statistics into ``model``, under their names.

        Raises:
            ModelError: An initializer is missing there, or has another shape.
        """
        statistics = statistics_of(model)
        for name, tensor in {**self.buffers_by_name, **self.parameters_by_name}.items():
            if name not in self._trained and name not in statistics:
                continue
            value = _initializer(model, name)
            if value is None or value.const_value is None:
                raise ModelError(f"initializer {name} is not in the model to be written")
            if tuple(value.const_value.shape.numpy()) != tuple(tensor.shape):
                raise ModelError(
                    f"initializer {name} has shape {list(tensor.shape)} here and"
                    f" {list(value.const_value.shape.numpy())} in the model to be written"
                )
            value.const_value = to_ir(tensor, value.const_value.dtype, name)

    def first_nonfinite(
        self, feeds: Mapping[str, Tensor], outputs: Sequence[str] | None = None
    ) -> str | None:
        """Run once, slowly, and return the first computed value that is not finite."""
        wanted = self.outputs if outputs is None else tuple(outputs)
        program = self._programs.get(wanted) or self._program(wanted)
        finder = _Finder(program.module)
        with torch.no_grad(), self._untouched():
            finder.run(*self._gather(program, feeds))
        return finder.found

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Undo what a run does to running statistics."""
        held = {name: buffer.clone() for name, buffer in self.named_buffers()}
        try:
            yield
        finally:
            for name, buffer in self.named_buffers():
                buffer.copy_(held[name])


class _Finder(fx.Interpreter):
    """Remembers the first value with a NaN or an infinity.

    Weights are left out: the step that failed has spoilt the running statistics already.
    """

    found: str | None = None

    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        bad = isinstance(result, Tensor) and result.is_floating_point()
        counts = bad and n.op != "output" and "weight" not in n.meta
        if counts and self.found is None and not bool(result.isfinite().all()):
            self.found = str(n.meta.get("value", n.name))
        return result


def lower(
    model: ir.Model,
    *,
    trainable: Collection[str] | None = None,
    outputs: Sequence[str] | None = None,
) -> Lowered:
    """Turn ``model`` into a torch module, in inference mode.

    Args:
        model: A loaded model; it is only read.
        trainable: The initializers to train; None for all in weight positions.
        outputs: The value names to compute; None for the graph's outputs.

    Raises:
        ModelError: Operators without lowering; all are listed.
        NotFoundError: A name is not one of an initializer (trainable) or a value (outputs).
    """
    if trainable is None:
        trainable = trainable_parameters(model)
    for name in trainable:
        _check_trainable(model, name)
    _check_statistics(model, trainable)
    results = _values(model, outputs)
    needed = needed_nodes(results)
    refuse_unknown([n for n in model.graph.all_nodes() if n in needed], {*OPS, *STRUCTURAL})
    weights = Weights(frozenset(trainable))
    translator = Translator(OPS, weights, model.graph.opset_imports[""])
    translator.translate(model.graph, needed)
    translator.graph.output({name_of(value): translator.result(value) for value in results})
    fuse(translator.graph, weights.buffers)
    return Lowered(translator.graph, weights, translator.modules).eval()


def _initializer(model: ir.Model, name: str) -> ir.Value | None:
    return next((g.initializers[name] for g in model.graphs() if name in g.initializers), None)


def _check_trainable(model: ir.Model, name: str) -> None:
    value = _initializer(model, name)
    if value is None or value.const_value is None:
        known = [name for graph in model.graphs() for name in graph.initializers]
        raise NotFoundError(f"{name!r} is no initializer of the model{near_misses(name, known)}")
    if not value.const_value.dtype.is_floating_point():
        kind = value.const_value.dtype.name
        raise ModelError(f"initializer {name} has type {kind}; only floating point can be trained")


def _check_statistics(model: ir.Model, trainable: Collection[str]) -> None:
    """Refuse running statistics of two nodes that train: each would spoil the other's."""
    for node in model.graph.all_nodes():
        if node.op_type != "BatchNormalization" or name_of(node.inputs[1]) not in trainable:
            continue
        for value in node.inputs[3:5]:
            if value is not None and len(value.uses()) > 1:
                others = ", ".join(str(user.name) for user, _ in value.uses())
                raise ModelError(
                    f"running statistics {value.name} are shared by {others}; untie them"
                )


def _values(model: ir.Model, names: Sequence[str] | None) -> list[ir.Value]:
    if names is None:
        return list(model.graph.outputs)
    known = ir.convenience.create_value_mapping(model.graph)
    for name in names:
        if name not in known:
            raise NotFoundError(f"{name!r} is no value of the graph{near_misses(name, known)}")
    return [known[name] for name in names]
