"""Whether two models compute the same: inputs to feed, and the difference of their outputs.

reference = Reference.of(original)                 # runs the original once, on two input shapes
reference.differs(changed)                         # None, or a sentence that says what differs
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from onnxslim_kd.access import symbol
from onnxslim_kd.errors import OperationError, ProofError, UserError
from onnxslim_kd.model import name_of
from onnxslim_kd.runtime import Array, Session, random_feeds
from onnxslim_kd.shapes import given_symbols

Runnable: TypeAlias = str | os.PathLike[str] | ir.Model | Session
Feeds: TypeAlias = Mapping[str, Array]
TOLERANCE = 1e-4
"""Of an output's largest magnitude: float32 through a hundred layers stays well below."""
_NARROW = {ir.DataType.FLOAT16: 2e-2, ir.DataType.BFLOAT16: 1e-1}
"""The same where sums are rounded to fewer digits, at places that are the runtime's choice."""
_SMALLEST = 1e-2
"""Magnitudes below count as this one: saturated probabilities have no relative precision."""
_DRAWS = 3
"""Of another rounding."""
_SIZES = (
    (2, 64),
    (3, 32),
    (3, 96),
    (1, 16),
    (1, 224),
    (1, 48),
    (2, 512),
    (1, 576),
    (1, 320),
    (1, 1),
)
"""(batch, every other dynamic dimension) in the order in which they are tried."""


def sample_shapes(
    model: ir.Model, variants: int = 2, given: Mapping[str, Sequence[int]] | None = None
) -> list[dict[str, tuple[int, ...]]]:
    """Return full input shapes for ``model``: ``variants`` of them, one when nothing is dynamic.

    Args:
        model: Whose graph inputs to shape.
        variants: How many choices of the dynamic dimensions.
        given: Shapes of inputs by name instead of the choices made here.

    Raises:
        UserError: ``given`` names no input or contradicts its static dimensions.
    """
    fixed = {name: tuple(map(int, shape)) for name, shape in (given or {}).items()}
    symbols = given_symbols(model, fixed)
    found: list[dict[str, tuple[int, ...]]] = []
    for batch, size in _SIZES:
        shapes = dict(_chosen(model, batch, size, dict(symbols))) | fixed
        if shapes not in found:
            found.append(shapes)
    return found[:variants]


def _chosen(
    model: ir.Model, batch: int, size: int, symbols: dict[str, int]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes for the inputs; equal symbols get equal numbers, an input's first one is its batch."""
    for value in model.graph.inputs:
        shape = list(value.shape or ())
        dynamic = [axis for axis, dim in enumerate(shape) if not _is_static(dim)]
        for axis in dynamic:
            is_batch = axis == dynamic[0] and len(shape) > 1 and (axis == 0 or len(shape) < 4)
            number = batch if is_batch else size
            shape[axis] = symbols.setdefault(symbol(value, axis), number)
        yield name_of(value), tuple(dim for dim in shape if isinstance(dim, int))


def _is_static(dim: object) -> bool:
    return isinstance(dim, int) and dim >= 0  # -1 is how old exporters write "any"


def make_feeds(
    model: ir.Model, shapes: Mapping[str, Sequence[int]], *, seed: int = 0
) -> dict[str, Array]:
    """Make random inputs; an integer that the graph compares with a constant may get that one.

    Raises:
        UserError: An input's type cannot be made up (strings, sequences).
    """
    feeds = random_feeds(model, shapes, seed=seed)
    for value in model.graph.inputs:
        name = name_of(value)
        choices = _compared(value) if feeds[name].dtype.kind in "iu" else []
        if choices and seed % 2:
            feeds[name] = np.full_like(feeds[name], choices[seed // 2 % len(choices)])
    return feeds


def _compared(value: ir.Value) -> list[Any]:
    """The constants that ``value`` is tested for: each opens another branch of the graph."""
    found = []
    for node in value.consumers():
        if node.op_type == "Equal":
            for other in node.inputs:
                tensor = _constant(other)
                if tensor is not None and tensor.size == 1:
                    found.append(tensor.numpy().item())
    return found


def _constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else ir.convenience.get_const_tensor(value)


@dataclass(frozen=True)
class Reference:
    """What a model computes, to hold others against."""

    feeds: tuple[Feeds, ...]
    outputs: tuple[Mapping[str, Array], ...]

    @classmethod
    def of(
        cls,
        model: ir.Model,
        *,
        source: Runnable | None = None,
        outputs: Sequence[str] | None = None,
        given: Mapping[str, Sequence[int]] | None = None,
        variants: int = 2,
    ) -> "Reference":
        """Run ``model`` on ``variants`` input shapes that it takes.

        Args:
            model: Its inputs are fed.
            source: What to run instead, for example the file that ``model`` was loaded from.
            outputs: The outputs to compare; None for all.
            given: Shapes of inputs by name.
            variants: How many shapes of a dynamic model; a static one runs once, or as often as
                here where an integer input opens another branch.

        Raises:
            ProofError: No input was found that the model runs with.
            UserError: As in `sample_shapes` and `make_feeds`.
        """
        session = _session(model if source is None else source)
        feeds: list[Feeds] = []
        results: list[Mapping[str, Array]] = []
        error: OperationError | None = None
        shapes = sample_shapes(model, len(_SIZES), given)
        switched = any(_compared(value) for value in model.graph.inputs)
        tries = shapes * variants if len(shapes) == 1 and switched else shapes
        for choice in tries:
            candidate = make_feeds(model, choice, seed=len(feeds))
            try:
                results.append(session.run(candidate, outputs))
                feeds.append(candidate)
            except OperationError as refused:  # this shape is not for this model
                error = refused
            if len(feeds) == variants:
                break
        if not feeds:
            raise ProofError(
                f"the original does not run with any of {len(tries)} input shapes tried;"
                f" give one with --input NAME=1x3x224x224 (last: {error})"
            )
        return cls(tuple(feeds), tuple(results))

    @property
    def shapes(self) -> list[dict[str, tuple[int, ...]]]:
        """The input shapes that ran."""
        return [{name: array.shape for name, array in feed.items()} for feed in self.feeds]

    def worst(self, model: Runnable, names: Mapping[str, str] | None = None) -> float:
        """Return the largest relative difference of ``model``'s outputs.

        Args:
            model: What to run on the inputs of the reference.
            names: Its output for each output of the reference, where the names differ.

        Raises:
            ProofError: A shape, a type, an integer or a NaN differs, or the model does not run.
        """
        session = _session(model)
        known = {value.name for value in session.inputs}
        largest = 0.0
        for feed, wanted in zip(self.feeds, self.outputs, strict=True):
            mapped = {(names or {}).get(name, name): want for name, want in wanted.items()}
            try:
                got = session.run({k: v for k, v in feed.items() if k in known}, list(mapped))
            except OperationError as error:
                raise ProofError(str(error)) from error
            for name, want in mapped.items():
                largest = max(largest, difference(name, want, got[name]))
        return largest

    def rounding(self, model: ir.Model) -> float:
        """Return how far ``model``, whose outputs these are, moves when it is rounded otherwise.

        Every float it is fed, and every weight that is more than a vector (a scale of Resize is
        not one), is moved by up to one unit in the last place. What such a step does to an output
        cannot be told from the rounding of another order of sums. The weights stay moved.
        """
        floats = [
            {k: v for k, v in held.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
            for held in self.outputs
        ]
        largest = 0.0
        for seed in range(_DRAWS):
            random = np.random.default_rng(seed)
            for tensor in model.graph.initializers.values():
                held = tensor.const_value
                if held is not None and len(held.shape) > 1 and held.dtype.is_floating_point():
                    tensor.const_value = ir.Tensor(_nudged(held.numpy(), random), held.dtype)
            feeds = tuple({k: _nudged(v, random) for k, v in feed.items()} for feed in self.feeds)
            largest = max(largest, Reference(feeds, tuple(floats)).worst(model))
        return largest

    def differs(
        self,
        model: Runnable,
        *,
        tolerance: float = TOLERANCE,
        names: Mapping[str, str] | None = None,
    ) -> str | None:
        """Return what differs between the reference and ``model``, or None."""
        try:
            worst = self.worst(model, names)
        except (ProofError, UserError) as error:
            return str(error)
        if worst > tolerance:
            return f"outputs differ by {worst:.1e} of their magnitude, {tolerance:.0e} allowed"
        return None


def tolerance_of(model: ir.Model) -> float:
    """Return by how much outputs may differ, by the types that ``model`` computes in."""
    values = ir.convenience.create_value_mapping(model.graph).values()
    types = {value.dtype for value in values if value.dtype is not None}
    return max([TOLERANCE, *(_NARROW[kind] for kind in types & _NARROW.keys())])


def difference(name: str, want: Array | list[Any], got: Any) -> float:
    """Return the largest difference over the largest magnitude of ``want``.

    Args:
        name: Of the output, for messages.
        want: An array; of a sequence the list of its arrays, or of its maps to numbers.
        got: What is held against it.

    Raises:
        ProofError: The shape or type differs, or what has no magnitude does (integers, NaN).
    """
    if isinstance(want, list):
        return _of_sequence(name, want, got)
    if want.shape != got.shape or want.dtype != got.dtype:
        raise ProofError(
            f"output {name} is {got.dtype}{list(got.shape)}, not {want.dtype}{list(want.shape)}"
        )
    if want.dtype.kind in "iubSUO":
        if not np.array_equal(want, got):
            raise ProofError(f"output {name}: {np.count_nonzero(want != got)} values differ")
        return 0.0
    want, got = want.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)) or not np.array_equal(
        want[~finite], got[~finite], equal_nan=True
    ):
        raise ProofError(f"output {name}: NaN or infinity stands elsewhere")
    if not finite.any():
        return 0.0
    scale = max(float(np.abs(want[finite]).max()), _SMALLEST)
    return float(np.abs(want[finite] - got[finite]).max()) / scale


def _nudged(array: Array, random: np.random.Generator) -> Array:
    """Move floats towards zero, where nothing overflows and an infinity stays one."""
    if array.dtype.kind != "f":
        return array
    steps = 1 - np.finfo(array.dtype).eps * np.asarray(random.uniform(0, 1, array.shape))
    return np.asarray(array * steps.astype(array.dtype))


def _of_sequence(name: str, want: list[Any], got: Any) -> float:
    """The largest difference of a part."""
    if not isinstance(got, list) or len(got) != len(want):
        raise ProofError(f"output {name} is no sequence of {len(want)}")
    worst = 0.0
    for index, (one, other) in enumerate(zip(want, got, strict=True)):
        part = f"{name}[{index}]"
        if isinstance(one, dict):
            if one.keys() != other.keys():
                raise ProofError(f"output {part} has other keys: {list(other)}, not {list(one)}")
            one, other = (np.array(list(numbers.values())) for numbers in (one, other))
        worst = max(worst, difference(part, one, other))
    return worst


def _session(model: Runnable) -> Session:
    """A session that runs the graph as written: the runtime's fusions would add their own noise."""
    return model if isinstance(model, Session) else Session(model, optimise=False, spin=False)
