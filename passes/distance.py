"""How far outputs move when channels are silent: a stand-in for a metric where there is no data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxslim_kd.compare import make_feeds
from onnxslim_kd.errors import UserError
from onnxslim_kd.runtime import Array, Session

SEEDS = 4
"""Random inputs to average over, where there are no others."""


@dataclass(frozen=True)
class Distance:
    """Relative distance of the outputs to the original's, plus one: 1 is "the same".

    The distance of one output is the norm of the difference over the norm of the original. Where
    no output is a float, as behind an ArgMax, it is the share of the numbers that differ.
    """

    feeds: tuple[Mapping[str, Array], ...]
    outputs: tuple[Mapping[str, Array], ...]
    """Those that are compared."""

    @classmethod
    def of(cls, model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> "Distance":
        """Run ``model`` on random inputs of these shapes."""
        feeds = [make_feeds(model, shapes, seed=2 * seed) for seed in range(SEEDS)]
        return cls.on(model, feeds)

    @classmethod
    def on(cls, model: ir.Model, feeds: Sequence[Mapping[str, Array]]) -> "Distance":
        """Run ``model`` on these inputs.

        Raises:
            UserError: None of its outputs is a tensor.
        """
        session = Session(model)
        outputs = [session.run(feed) for feed in feeds]
        kinds = {n: a.dtype.kind for n, a in outputs[0].items() if isinstance(a, np.ndarray)}
        names = [name for name, kind in kinds.items() if kind == "f"] or list(kinds)
        if not names:
            raise UserError("no output is a tensor, which could be compared: give --data instead")
        return cls(tuple(feeds), tuple({n: found[n] for n in names} for found in outputs))

    def __call__(self, session: Session) -> float:
        """Return 1 + the mean distance over inputs and outputs."""
        found = []
        for feed, wanted in zip(self.feeds, self.outputs, strict=True):
            got = session.run(feed)
            found += [_apart(want, got[name]) for name, want in wanted.items()]
        return 1.0 + float(np.mean(found))


def _apart(want: Array, got: Array) -> float:
    """The distance of one output; 1 where another number of things was found."""
    if want.shape != got.shape:
        return 1.0
    if want.dtype.kind != "f":
        return float(np.mean(want != got)) if want.size else 0.0
    original = want.astype(np.float64)
    norm = float(np.linalg.norm(original)) or 1.0
    return float(np.linalg.norm(got.astype(np.float64) - original)) / norm
