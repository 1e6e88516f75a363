"""ONNX Runtime sessions: the provider that really runs, and inputs to feed.

onnxruntime is imported on first use, for it costs more than everything else at start-up.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import ModelError, OperationError, UserError

Array = np.ndarray[Any, Any]
PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class Session:
    """A model ready to run on one provider.

    Args:
        source: A path or a model.
        provider: ``cpu``, ``cuda`` or ``tensorrt``; another provider than this one is an error,
            never a silent fallback.
        threads: Threads inside an operator; 0 lets the runtime choose.
        optimise: False runs the graph as written, and opens fast: no weight is rearranged and no
            memory is planned.
        profile_prefix: Where to write a trace of every operator; None for no trace.
        spin: False stops the worker threads from spinning once a run is over, so that an idle
            session takes no core from another one.
        arena: False keeps no memory between runs, and takes no more than a run needs.

    Raises:
        UserError: The provider is not available here.
        ModelError: The runtime refuses the model.
    """

    def __init__(  # noqa: PLR0913 - its options are its arguments
        self,
        source: str | os.PathLike[str] | ir.Model,
        *,
        provider: str = "cpu",
        threads: int = 0,
        optimise: bool = True,
        profile_prefix: str | None = None,
        spin: bool = True,
        arena: bool = True,
    ) -> None:
        ort = _onnxruntime()
        wanted = PROVIDERS.get(provider)
        if wanted is None:
            raise UserError(f"provider {provider!r} is not one of {', '.join(PROVIDERS)}")
        options = ort.SessionOptions()
        options.log_severity_level = 4  # errors are raised, not printed
        options.intra_op_num_threads = threads
        levels = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
        )
        options.enable_cpu_mem_arena = options.enable_mem_pattern = arena
        if not optimise:
            _open_fast(options)
        if not spin:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        if wanted not in ort.get_available_providers():
            raise UserError(f"provider {provider} is not in this onnxruntime build")
        try:
            self._session, self._weights = _open(ort, source, options, wanted)
        except Exception as error:  # onnxruntime's own errors share no public base
            raise ModelError(f"ONNX Runtime refuses the model: {_said(error)}") from error
        ran = self._session.get_providers()[0]
        if ran != wanted:
            raise UserError(f"provider {provider} was asked for but {ran} would run; no GPU here?")
        self.provider = provider
        self.inputs = self._session.get_inputs()
        self.results = self._session.get_outputs()
        self.outputs = [value.name for value in self.results]

    def run(
        self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Return the outputs (all, or those named) for ``feeds``.

        Raises:
            OperationError: The runtime failed while running.
        """
        names = list(outputs) if outputs is not None else self.outputs
        if not names:
            return {}  # which the runtime takes for all
        try:
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        except Exception as error:
            raise OperationError(f"ONNX Runtime failed while running: {_said(error)}") from error

    def bind(self, feeds: Mapping[str, Array]) -> Callable[[], object]:
        """Return a call that runs on ``feeds`` and leaves its outputs where they are computed.

        The inputs are copied there once, here; the call waits until the outputs are whole. What it
        takes is the time of computing alone, on a GPU as well. Strings and sequences live on the
        processor: with them the call is `run`.
        """
        kinds = [value.type for value in (*self.inputs, *self.results)]
        if not all(kind.startswith("tensor(") and kind != "tensor(string)" for kind in kinds):
            return lambda: self.run(feeds)
        ort, device = _onnxruntime(), "cpu" if self.provider == "cpu" else "cuda"
        binding = self._session.io_binding()
        for name, array in feeds.items():
            held = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), device, 0)
            binding.bind_ortvalue_input(name, held)
        for name in self.outputs:
            binding.bind_output(name, device, 0)

        def call() -> None:
            try:
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            except Exception as error:  # onnxruntime's own errors share no public base
                raise OperationError(
                    f"ONNX Runtime failed while running: {_said(error)}"
                ) from error

        return call

    def end_profiling(self) -> Path:
        """Stop profiling and return the trace's path."""
        return Path(self._session.end_profiling())


def _open_fast(options: Any) -> None:
    """For a few runs: the plan of what may share memory alone is quadratic in the nodes.

    Threads that spin while they wait take as much of the processor as the work itself.
    """
    options.enable_mem_pattern = options.enable_mem_reuse = False
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")


def _open(
    ort: Any, source: str | os.PathLike[str] | ir.Model, options: Any, provider: str
) -> tuple[Any, list[Any]]:
    """Open a session; the weights of a model in memory are not copied, they must outlive it."""
    if not isinstance(source, ir.Model):
        return ort.InferenceSession(os.fspath(source), options, providers=[provider]), []
    data, weights = _apart(source)
    values = [ort.OrtValue.ortvalue_from_numpy(array) for array in weights.values()]
    options.add_external_initializers(list(weights), values)
    return ort.InferenceSession(data, options, providers=[provider]), values


def _apart(model: ir.Model) -> tuple[bytes, dict[str, Array]]:
    """Serialise ``model`` with its big weights declared as external data, and give those."""
    inputs = len(model.graph.inputs)
    with model_io.embedded(model), model_io.without_weights(model, only=_is_plain) as proto:
        weights = proto.graph.input[inputs:]
        del proto.graph.input[inputs:]
        for info in weights:
            kind = info.type.tensor_type
            proto.graph.initializer.add(
                name=info.name,
                data_type=kind.elem_type,
                dims=[dim.dim_value for dim in kind.shape.dim],
                data_location=onnx.TensorProto.EXTERNAL,
                external_data=[onnx.StringStringEntryProto(key="location", value="memory")],
            )
    held = model.graph.initializers
    arrays = {info.name: held[info.name].const_value.numpy() for info in weights}  # type: ignore[union-attr]
    return proto.SerializeToString(), arrays


def _is_plain(weight: ir.Value) -> bool:
    """Whether the runtime takes a numpy array for it: one that nothing reads is not asked for."""
    read = bool(weight.uses()) or weight.is_graph_output()
    return weight.dtype in _PLAIN and not weight.is_graph_input() and read


def write_optimised(
    source: str | os.PathLike[str] | ir.Model,
    path: str | os.PathLike[str],
    *,
    settings: Mapping[str, str] | None = None,
) -> None:
    """Let the runtime write ``source`` with its basic optimisations, the only portable ones.

    Args:
        source: A path or a model.
        path: Where to.
        settings: More session configuration entries, by their names in ONNX Runtime.

    Raises:
        OperationError: The runtime refuses the model.
    """
    if isinstance(source, ir.Model):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.onnx"
            model_io.save(source, file)
            write_optimised(file, path, settings=settings)
        return
    _write(source, path, "ORT_ENABLE_BASIC", settings or {})


def write_compiled(source: str | os.PathLike[str], path: Path) -> None:
    """Let the runtime write ``source`` with all optimisations, for this machine alone.

    The weights stand beside it in the layout that the kernels want. A session of this file maps
    them; one of ``source`` would hold them two or three times.

    Raises:
        OperationError: The runtime refuses the model.
    """
    prefix = "session.optimized_model_external_initializers_"
    settings = {f"{prefix}file_name": f"{path.name}.data", f"{prefix}min_size_in_bytes": "1024"}
    _write(source, path, "ORT_ENABLE_ALL", settings)


def _write(
    source: str | os.PathLike[str],
    path: str | os.PathLike[str],
    level: str,
    settings: Mapping[str, str],
) -> None:
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    options.optimized_model_filepath = os.fspath(path)
    _open_fast(options)
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    try:
        _open(ort, source, options, PROVIDERS["cpu"])
    except Exception as error:  # onnxruntime's own errors share no public base
        raise OperationError(f"ONNX Runtime refuses the model: {_said(error)}") from error


def write_ort(source: str | os.PathLike[str] | ir.Model, path: str | os.PathLike[str]) -> None:
    """Write ``source`` in the format of ONNX Runtime's mobile builds.

    Raises:
        OperationError: The runtime refuses the model.
    """
    write_optimised(source, path, settings={"session.save_model_format": "ORT"})


def float16(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a model to half precision with the converter that the runtime ships."""
    _onnxruntime()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted: onnx.ModelProto = convert_float_to_float16(proto, keep_io_types=True)
    return converted


def _onnxruntime() -> Any:
    # From 1.31 on it reports use over the network, and keeps a file for that in the temp folder.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort

    ort.set_default_logger_severity(3)  # no warning storm on machines without a GPU
    return ort


def _said(error: Exception) -> str:
    """What the runtime says, on one line."""
    return " ".join(str(error).split())


_MOST = 2**36
"""Elements of one input: what no network has."""


def random_feeds(
    model: ir.Model, shapes: Mapping[str, Sequence[int]], *, seed: int = 0
) -> dict[str, Array]:
    """Make inputs for ``model``: normal floats, small integers, random booleans.

    Args:
        model: Whose graph inputs to fill.
        shapes: The shape of every input, by name.
        seed: Of the generator.

    Raises:
        UserError: An input's type cannot be made up (strings, sequences).
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for value in model.graph.inputs:
        name, shape = model_io.name_of(value), tuple(shapes[model_io.name_of(value)])
        if prod(shape) > _MOST:
            raise UserError(f"input {name} of shape {list(shape)} is too large to be made up")
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        if dtype.kind == "f" or dtype.name == "bfloat16":
            feeds[name] = rng.standard_normal(shape).astype(dtype)
        elif dtype.kind in "iu":
            feeds[name] = rng.integers(0, 2, shape).astype(dtype)
        elif dtype.kind == "b":
            feeds[name] = rng.integers(0, 2, shape).astype(bool)
        else:
            raise UserError(f"input {name} has type {dtype}; give it with --inputs file.npz")
    return feeds


_PLAIN = (
    ir.DataType.BOOL,
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.INT8,
    ir.DataType.INT16,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.UINT8,
    ir.DataType.UINT16,
    ir.DataType.UINT32,
    ir.DataType.UINT64,
)
"""Types that numpy itself has."""
