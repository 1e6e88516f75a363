"""Run a model as it is written and look at any value inside of it.

Big weights are fed as inputs, so that the runtime reads them where they are (in the mapped file)
instead of copying them: a session of a 3 GB model needs no 3 GB of its own.
"""

from collections.abc import Mapping, Sequence

import onnx_ir as ir

from onnxslim_kd.model import name_of, weight_bytes, without_weights
from onnxslim_kd.runtime import Array, Session

BIG = 256 * 2**20
"""Bytes of weights from which they are fed; below, the copy costs nothing that matters."""
PART = 2**20
"""Bytes of a tensor from which it is fed: small ones may be constants that operators insist on."""


class Probe:
    """A session without optimisation that also returns inner values.

    Args:
        model: The model; it stays as it is.
        outputs: Names of values of its main graph.

    Raises:
        ModelError: The runtime refuses the model.
    """

    def __init__(self, model: ir.Model, outputs: Sequence[str]) -> None:
        self.outputs = list(outputs)
        self.weights: dict[str, Array] = {}
        probe = model.clone()
        values = values_by_name(probe)
        have = {value.name for value in probe.graph.outputs}
        probe.graph.outputs.extend(values[name] for name in outputs if name not in have)
        if weight_bytes(probe) >= BIG:
            probe = self._without_big(probe)
        self._session = Session(probe, optimise=False)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Return the values for ``feeds``.

        Raises:
            OperationError: The runtime failed while running.
        """
        return self._session.run({**feeds, **self.weights}, self.outputs)

    def _without_big(self, probe: ir.Model) -> ir.Model:
        """Turn big weights into inputs, and keep what to feed."""
        with without_weights(probe, PART) as proto:
            light = ir.serde.deserialize_model(proto)
        for name, value in light.graph.initializers.items():  # a file beside has lost its folder
            value.const_value = probe.graph.initializers[name].const_value
        inputs = {value.name for value in light.graph.inputs}
        for name, value in probe.graph.initializers.items():
            if name in inputs and value.const_value is not None:
                self.weights[name] = value.const_value.numpy()
        return light


def values_by_name(model: ir.Model) -> dict[str, ir.Value]:
    """Return every computed value of the main graph by its name."""
    return {name_of(v): v for node in model.graph for v in node.outputs if v.name}
