"""Every setting of a search: the options of ``onnxslim-kd search``, which a run takes as well."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:  # the options must be known before anything heavy is imported
    from onnxslim_kd.model import ModelLike
    from onnxslim_kd.plans import Refusal
    from onnxslim_kd.search import Job


class SearchConfig(BaseModel):
    """What to search for, under which budget, by which metric.

    The text below a setting is the help of its option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    target_macs: float | None = None
    """Remove this share of the MACs."""
    target_latency: float | None = None
    """Keep this share of the latency: trials by layers, the plan as measured."""
    trials: int = Field(default=100, ge=1)
    """In all, those that the study has among them."""
    pattern: str = ".*"
    """Which parameters."""
    ignore: str | None = None
    """Regular expression of what must stay."""
    criterion: str = "l1"
    """Which channels go first."""
    round_to: int | None = Field(default=None, ge=1)
    """Keep multiples of this many channels; by default what this CPU computes at once."""
    data: str | None = None
    """As in train; without it the outputs' distance on random inputs is measured."""
    preprocess: str = ""
    """The same line as in training."""
    metric: str = "auto"
    """auto, top1, miou, map, distance or module:function."""
    samples: int = Field(default=1024, ge=1)
    """At most this many; in memory."""
    inputs: dict[str, tuple[int, ...]] = Field({})
    """A shape: name=1x3x224x224; repeatable."""
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """Where to run; running elsewhere is an error."""
    threads: int = Field(default=0, ge=0)
    """Threads inside an operator; 0 for the cores there are."""
    cache: Path | None = None
    """With --target-latency: folder of measured layers."""

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        if (self.target_macs is None) == (self.target_latency is None):
            raise ValueError("give either target_macs or target_latency")
        if self.target_latency is not None and self.round_to is not None:
            raise ValueError("round_to: the widths of target_latency are those that run fast here")
        return self

    def job(self, model: "ModelLike") -> "tuple[Job, Sequence[Refusal]]":
        """Return what to search for in ``model``, and the parameters that must stay.

        Raises:
            UserError: The settings do not fit the model.
        """
        from onnxslim_kd import api
        from onnxslim_kd.measures import Measure
        from onnxslim_kd.passes import prune
        from onnxslim_kd.passes.ratios import Amount
        from onnxslim_kd.search import Job

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
        return Job(analysis, ranked, budget, *score, self.criterion), refused

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
