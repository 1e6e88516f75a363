"""How far outputs move when channels are silent: a stand-in for a metric where there is no data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxslim_kd.compare import make_feeds
from onnxslim_kd.runtime import Array, Session

SEEDS = 4
"""Random inputs to average over, where there are no others."""


@dataclass(frozen=True)
class Distance:
    """Relative distance of the outputs to the original's, plus one: 1 is "the same".

    The distance of one output is the norm of the difference over the norm of the original.
    """

    feeds: tuple[Mapping[str, Array], ...]
    outputs: tuple[Mapping[str, Array], ...]

    @classmethod
    def of(cls, model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> "Distance":
        """Run ``model`` on random inputs of these shapes."""
        feeds = [make_feeds(model, shapes, seed=2 * seed) for seed in range(SEEDS)]
        return cls.on(model, feeds)

    @classmethod
    def on(cls, model: ir.Model, feeds: Sequence[Mapping[str, Array]]) -> "Distance":
        """Run ``model`` on these inputs."""
        session = Session(model)
        return cls(tuple(feeds), tuple(session.run(feed) for feed in feeds))

    def __call__(self, session: Session) -> float:
        """Return 1 + the mean distance over inputs and outputs."""
        found = []
        for feed, wanted in zip(self.feeds, self.outputs, strict=True):
            got = session.run(feed)
            for name, want in wanted.items():
                if want.dtype.kind == "f":
                    norm = float(np.linalg.norm(want.astype(np.float64))) or 1.0
                    found.append(float(np.linalg.norm(got[name] - want)) / norm)
        return 1.0 + float(np.mean(found))
