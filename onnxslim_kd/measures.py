"""What sensitivity and search measure: a metric on data, or how far the outputs move."""

from dataclasses import dataclass

from onnxslim_kd.passes.criteria import FROM_DATA
from onnxslim_kd.passes.distance import Distance
from onnxslim_kd.passes.groups import Analysis
from onnxslim_kd.samples import Samples
from onnxslim_kd.sensitivity import Score


@dataclass(frozen=True)
class Measure:
    """Where the numbers come from; without data from random inputs."""

    data: str | None = None
    preprocess: str = ""
    metric: str = "auto"
    """As in eval, or ``distance`` for that between the outputs."""
    samples: int = 1024
    batch_size: int = 64

    def score(self, analysis: Analysis) -> tuple[Score, str, bool]:
        """Return the function that scores a session, its name, and whether lower is better.

        Raises:
            UserError: Data or metric do not fit the model.
        """
        model = analysis.model
        if self.data is None:
            return Distance.of(model, analysis.shapes.inputs), "output distance", True
        if self.metric == "distance":
            held = self._read(analysis)
            return Distance.on(model, held.feeds), f"output distance on {held.name}", True
        from onnxslim_kd.training.scoring import Scorer

        scorer = Scorer.of(
            model,
            data=self.data,
            preprocess=self.preprocess,
            metric=self.metric,
            samples=self.samples,
            batch_size=self.batch_size,
        )
        return scorer, scorer.name, scorer.lower_is_better

    def looked_at(self, analysis: Analysis, criterion: str) -> Samples | None:
        """Return what a criterion looks at, None if it looks at no data.

        Raises:
            UserError: The data do not fit the model.
        """
        wanted = criterion in FROM_DATA and self.data is not None
        return self._read(analysis) if wanted else None

    def _read(self, analysis: Analysis) -> Samples:
        from onnxslim_kd.training.samples import read

        assert self.data is not None
        return read(analysis.model, self.data, preprocess=self.preprocess, samples=self.samples)
