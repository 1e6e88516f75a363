"""Whether two models compute the same."""

from collections.abc import Sequence

import onnx_ir as ir

from onnxslim_kd.compare import TOLERANCE, Feeds, Reference
from onnxslim_kd.runtime import Session


def outputs_differ(
    first: ir.Model, second: ir.Model, feeds: Sequence[Feeds] = (), *, tolerance: float = TOLERANCE
) -> str | None:
    """Return what differs between the outputs of two models, or None.

    Args:
        first: The reference.
        second: The model to hold against it, with the same names of inputs and outputs.
        feeds: Inputs; without any, `Reference.of` makes them.
        tolerance: Largest difference over the reference's largest magnitude, for each output.
    """
    if not feeds:
        return Reference.of(first).differs(second, tolerance=tolerance)
    session = Session(first, optimise=False)
    reference = Reference(tuple(feeds), tuple(session.run(feed) for feed in feeds))
    return reference.differs(second, tolerance=tolerance)
