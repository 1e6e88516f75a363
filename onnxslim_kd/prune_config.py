"""Every setting of a cut: the options of ``onnxslim-kd prune``, which a run's file takes as well.

A setting is called like its option, with underscores; lists have the plural.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from onnxslim_kd import api
from onnxslim_kd import model as model_io
from onnxslim_kd import sensitivity as sensitivities
from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.prune import Choice
from onnxslim_kd.passes.ratios import Amount
from onnxslim_kd.passes.targets import Curves, LatencyTarget, Quantity, Target
from onnxslim_kd.plans import Plan
from onnxslim_kd.samples import Samples

if TYPE_CHECKING:
    from onnxslim_kd.statistics import Ratio


class PruneConfig(BaseModel):
    """What to prune, how much, by which criterion, and what to do with the result."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    pattern: str | None = None
    ratio: float = 0.5
    ratios: dict[str, float] | None = None
    """By parameter, instead of a pattern."""
    target_macs: float | None = None
    """The share that goes; so for parameters and size."""
    target_params: float | None = None
    target_size: float | None = None
    target_latency: float | None = None
    """The share that stays, as measured here."""
    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    threads: int = Field(default=0, ge=0)
    cache: Path | None = None
    allocation: Literal["uniform", "global", "isomorphic"] = "uniform"
    sensitivity: Path | None = None
    max_loss: float | None = None
    ignore: str | None = None
    criterion: str = "l1"
    steps: int = 1
    data: str | None = None
    preprocess: str = ""
    samples: int = Field(default=512, ge=1)
    correct: bool = False
    group_score: Literal["first", "mean", "max"] = "first"
    selector: Literal["share", "energy"] = "share"
    round_to: int | None = Field(default=None, ge=1)
    """None for what this CPU computes at once."""
    attention: Literal["heads", "dims"] = "heads"
    free_outputs: tuple[str, ...] = ()
    inputs: dict[str, tuple[int, ...]] = {}
    plan: Path | None = None
    """Replay this one: it decides everything."""
    passes: tuple[str, ...] = ()
    passes_after: tuple[str, ...] = ()
    verify: bool = True
    bench: bool = False
    force_slower: bool = False

    def read_samples(self, model: model_io.ModelLike) -> Samples | None:
        """Return what the criterion and the correction look at.

        Raises:
            UserError: The data is missing, or does not fit the model.
        """
        if self.data is None:
            if self.correct:
                raise UserError("--correct looks at data, labelled or not: give it with --data")
            return None
        from onnxslim_kd.training.samples import read

        loaded = model_io.load(model)
        return read(loaded, self.data, preprocess=self.preprocess, samples=self.samples)

    def reading(self, samples: Samples | None) -> api.Reading:
        """Return how the graph is read, and whether it is corrected in the end."""
        return api.Reading(
            attention=self.attention,
            free_outputs=self.free_outputs,
            inputs=self.inputs or None,
            passes=self.passes,
            passes_after=self.passes_after,
            correct=samples if self.correct else None,
        )

    def choice(self, samples: Samples | None) -> Choice | Plan:
        """Return the plan to replay, or what the other settings choose.

        Raises:
            UserError: Settings contradict each other, or a file cannot be read.
        """
        if self.plan is not None:
            if self.pattern or self.ratios:
                raise UserError("--plan decides everything: leave out --pattern and --ratios")
            return Plan.load(self.plan)
        return Choice(
            pattern=self.pattern,
            ratio=self.ratio,
            ratios=self.ratios,
            ignore=self.ignore,
            criterion=self.criterion,
            group_score=self.group_score,
            amount=Amount(self.round_to or 0, self.selector),
            target=self.target,
            allocation=self.allocation,
            sensitivity=self._curves(),
            max_loss=self.max_loss,
            samples=samples,
            steps=self.steps,
        )

    @property
    def target(self) -> Target | LatencyTarget | None:
        """What the strength is searched for, instead of a ratio.

        Raises:
            UserError: There are several.
        """
        quantities: tuple[Quantity, ...] = ("macs", "params", "size")
        shares = {q: getattr(self, f"target_{q}") for q in (*quantities, "latency")}
        given = [q for q, share in shares.items() if share is not None]
        if len(given) > 1:
            raise UserError(f"give one target, not {' and '.join(f'--target-{q}' for q in given)}")
        if self.target_latency is not None:
            return LatencyTarget(self.target_latency, self.provider, self.threads, self.cache)
        return next((Target(q, shares[q]) for q in quantities if q in given), None)

    def _curves(self) -> Curves | None:
        if self.sensitivity is None:
            return None
        found = sensitivities.load(self.sensitivity)
        return {name: found.curve(name) for name in found.losses}


def plan(model: model_io.ModelLike, config: PruneConfig) -> Plan:
    """Decide, and change nothing.

    Raises:
        UserError: The settings do not fit the model.
    """
    samples = config.read_samples(model)
    return api.plan(model, config.choice(samples), config.reading(samples))


def prune(model: model_io.ModelLike, config: PruneConfig) -> "tuple[api.Pruned, Ratio | None]":
    """Cut, and measure the result against ``model`` if ``bench`` says so.

    Raises:
        UserError: The settings do not fit the model.
        ProofError: The result is not the silenced original.
        OperationError: The result measures slower than the original.
    """
    samples = config.read_samples(model)
    reading = config.reading(samples)
    done = api.prune(model, config.choice(samples), reading=reading, verify=config.verify)
    if not config.bench:
        return done, None
    from onnxslim_kd.passes import latency_measure

    ratio = latency_measure.not_slower(
        model,
        done.model,
        shapes=config.inputs,
        setting=latency_measure.quick(config.provider, config.threads),
        force=config.force_slower,
    )
    return done, ratio
