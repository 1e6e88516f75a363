"""Everything that a search can be told: the command line and the stage of a run read the same."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from onnxslim_kd import api, search
from onnxslim_kd.measures import Measure
from onnxslim_kd.model import ModelLike
from onnxslim_kd.plans import Refusal


class SearchConfig(BaseModel):
    """What to search for, under which budget, by which metric."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    target_macs: float | None = None
    """Remove this share of the MACs."""
    target_latency: float | None = None
    """Keep this share of the latency."""
    trials: int = Field(default=100, ge=1)
    pattern: str = ".*"
    ignore: str | None = None
    criterion: str = "l1"
    round_to: int | None = Field(default=None, ge=1)
    data: str | None = None
    """None measures how far the outputs move on random inputs."""
    preprocess: str = ""
    metric: str = "auto"
    samples: int = Field(default=1024, ge=1)
    inputs: dict[str, tuple[int, ...]] = Field({})
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    threads: int = Field(default=0, ge=0)
    cache: Path | None = None
    """With target_latency: folder of measured layers."""

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        if (self.target_macs is None) == (self.target_latency is None):
            raise ValueError("give either target_macs or target_latency")
        if self.target_latency is not None and self.round_to is not None:
            raise ValueError("round_to: the widths of target_latency are those that run fast here")
        return self

    def job(self, model: ModelLike) -> tuple[search.Job, Sequence[Refusal]]:
        """Return what to search for in ``model``, and the parameters that must stay.

        Raises:
            UserError: The settings do not fit the model.
        """
        from onnxslim_kd.passes import prune
        from onnxslim_kd.passes.ratios import Amount

        analysis = api.inspect(model, api.Reading(inputs=self.inputs))
        measure = Measure(self.data, self.preprocess, self.metric, self.samples)
        choice = prune.Choice(
            pattern=self.pattern,
            ignore=self.ignore,
            criterion=self.criterion,
            samples=measure.looked_at(analysis, self.criterion),
        )
        ranked, refused, _ = prune.rank(analysis, choice)
        amount = prune.resolved(Amount(self.round_to or 0))
        budget = self._budget(analysis, ranked, amount)
        score = measure.score(analysis)
        return search.Job(analysis, ranked, budget, *score, self.criterion), refused

    def _budget(self, analysis: Any, ranked: Any, amount: Any) -> Any:
        from onnxslim_kd import budgets
        from onnxslim_kd.passes.targets import Device, LatencyTarget, Target

        if self.target_macs is not None:
            return budgets.Macs(analysis, ranked, Target("macs", self.target_macs), amount)
        assert self.target_latency is not None
        device = Device(self.provider, self.threads, self.cache)
        return budgets.Seconds.of(analysis, ranked, LatencyTarget(self.target_latency), device)

    @property
    def runtime(self) -> dict[str, Any]:
        """Where trials run."""
        return {"provider": self.provider, "threads": self.threads}
