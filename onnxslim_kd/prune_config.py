"""Every setting of a cut: the options of ``onnxslim-kd prune``, which a run's file takes as well.

A setting is called like its option, with underscores; lists have the plural.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from onnxslim_kd.errors import UserError

if TYPE_CHECKING:  # the options must be known before anything heavy is imported
    from onnxslim_kd.api import Pruned, Reading
    from onnxslim_kd.model import ModelLike
    from onnxslim_kd.passes.prune import Choice
    from onnxslim_kd.passes.targets import Curves, LatencyTarget, Quantity, Target
    from onnxslim_kd.plans import Plan
    from onnxslim_kd.samples import Samples
    from onnxslim_kd.statistics import Ratio


SPELLED = {
    "free_outputs": "free-output",
    "inputs": "input",
    "passes": "pass",
    "passes_after": "pass-after",
}
"""The options whose settings have other names."""


class PruneConfig(BaseModel):
    """What to prune, how much, by which criterion, and what to do with the result.

    The text below a setting is the help of its option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    pattern: str | None = None
    """Regular expression on parameter, node and module names."""
    ratio: float = 0.5
    """Share of the channels that goes."""
    ratios: dict[str, float] | None = None
    """A ratio per parameter, instead of a pattern: name=0.2,name2=0.4."""
    ignore: str | None = None
    """Regular expression of what must stay."""

    target_macs: float | None = None
    """Remove this share of the MACs instead."""
    target_params: float | None = None
    """Remove this share of the parameters."""
    target_size: float | None = None
    """Remove this share of the weights' bytes."""
    target_latency: float | None = None
    """Keep this share of the measured latency."""
    allocation: Literal["uniform", "global", "isomorphic", "sensitivity", "latency"] | None = None
    """The same share of every group (the default), one threshold over all scores, one per kind,
    by measured sensitivities (the default with --sensitivity), or by the latency that widths save
    (the default with --target-latency)."""
    sensitivity: Path | None = None
    """A file of `sensitivity`, from which the ratios come."""
    max_loss: float | None = None
    """With it: the share of the metric a group may cost."""
    round_to: int | None = Field(default=None, ge=1)
    """Keep multiples of this many channels; by default what this CPU computes at once."""
    steps: int = 1
    """Score anew before each step."""

    criterion: str = "l1"
    """l1, l2, lamp, group-l2, geometric-median, bn-scale or random; with --data also taylor,
    activation and reconstruction."""
    group_score: Literal["first", "mean", "max"] = "first"
    """Whose scores count in a group: the first listed parameter's, or all of them."""
    selector: Literal["share", "energy"] = "share"
    """Whether the ratio is a share of the channels or of their squared scores."""
    data: str | None = None
    """Samples for the criterion or --correct; as in train."""
    preprocess: str = ""
    """The same line as in training."""
    samples: int = 512
    """How many at most; in memory."""
    correct: bool = False
    """Let the next layers make up for what went."""

    provider: Literal["cpu", "cuda", "tensorrt"] = "cpu"
    """Where latency is measured."""
    threads: int = Field(default=0, ge=0)
    """Threads inside an operator; 0 for the cores there are."""
    cache: Path | None = None
    """Folder of measured layers."""
    bench: bool = False
    """Measure the result; refuse one that is slower."""
    force_slower: bool = False
    """Let it pass even if it measures slower."""

    attention: Literal["auto", "heads", "dims"] = "auto"
    """Remove whole heads, dimensions of all heads, or heads and, where none can go, dimensions."""
    free_outputs: tuple[str, ...] = ()
    """An output that may lose channels; repeatable."""
    inputs: dict[str, tuple[int, ...]] = {}
    """A shape: name=1x3x224x224; repeatable."""
    passes: tuple[str, ...] = ()
    """module:function on a gs.Graph, before; repeatable."""
    passes_after: tuple[str, ...] = ()
    """The same, after the cut."""
    plan: Path | None = None
    """Replay this plan: it decides everything."""
    verify: bool = True
    """Prove the result."""

    @property
    def looks_at_data(self) -> bool:
        """Whether anything asks for samples."""
        from onnxslim_kd.passes.criteria import FROM_DATA

        return self.correct or self.criterion in FROM_DATA

    def read_samples(self, model: "ModelLike") -> "Samples | None":
        """Return what the criterion and the correction look at.

        Raises:
            UserError: The data is missing, or does not fit the model.
        """
        if self.data is None:
            if self.correct:
                raise UserError("--correct looks at data, labelled or not: give it with --data")
            return None
        if not self.looks_at_data:
            return None
        from onnxslim_kd.model import load
        from onnxslim_kd.training.samples import read

        return read(load(model), self.data, preprocess=self.preprocess, samples=self.samples)

    def reading(self, samples: "Samples | None") -> "Reading":
        """Return how the graph is read, and whether it is corrected in the end."""
        from onnxslim_kd.api import Reading

        return Reading(
            attention=self.attention,
            free_outputs=self.free_outputs,
            inputs=self.inputs or None,
            passes=self.passes,
            passes_after=self.passes_after,
            correct=samples if self.correct else None,
        )

    def choice(self, samples: "Samples | None") -> "Choice | Plan":
        """Return the plan to replay, or what the other settings choose.

        Raises:
            UserError: Settings contradict each other, or a file cannot be read.
        """
        from onnxslim_kd.passes.prune import Choice
        from onnxslim_kd.passes.ratios import Amount
        from onnxslim_kd.passes.targets import Device
        from onnxslim_kd.plans import Plan

        self._refuse_what_would_not_count()
        if self.plan is not None:
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
            device=Device(self.provider, self.threads, self.cache),
            sensitivity=self._curves(),
            max_loss=self.max_loss,
            samples=samples,
            steps=self.steps,
        )

    def _refuse_what_would_not_count(self) -> None:
        given = [n for n, f in type(self).model_fields.items() if getattr(self, n) != f.default]
        if self.plan is not None and (idle := [name for name in given if name in SETTLED]):
            raise UserError(f"--plan decides everything: leave out {_options(idle)}")
        instead = [name for name in given if name in INSTEAD_OF_RATIO]
        if "ratio" in given and instead:
            raise UserError(f"give either --ratio or {_options(instead)}")

    @property
    def target(self) -> "Target | LatencyTarget | None":
        """What the strength is searched for, instead of a ratio.

        Raises:
            UserError: There are several.
        """
        from onnxslim_kd.passes.targets import LatencyTarget, Target

        quantities: tuple[Quantity, ...] = ("macs", "params", "size")
        shares = {q: getattr(self, f"target_{q}") for q in (*quantities, "latency")}
        given = [q for q, share in shares.items() if share is not None]
        if len(given) > 1:
            raise UserError(f"give one target, not {' and '.join(f'--target-{q}' for q in given)}")
        if self.target_latency is not None:
            return LatencyTarget(self.target_latency)
        return next((Target(q, shares[q]) for q in quantities if q in given), None)

    def _curves(self) -> "Curves | None":
        if self.sensitivity is None:
            return None
        from onnxslim_kd import sensitivity

        found = sensitivity.load(self.sensitivity)
        if found.criterion != self.criterion:
            raise UserError(
                f"{self.sensitivity}: was measured with --criterion {found.criterion}, not"
                f" {self.criterion}; give the same"
            )
        return found.curves(moved=self.max_loss is None)


def _options(names: Sequence[str]) -> str:
    return " and ".join(f"--{SPELLED.get(n, n).replace('_', '-')}" for n in names)


def plan(model: "ModelLike", config: PruneConfig) -> "Plan":
    """Decide, and change nothing.

    Raises:
        UserError: The settings do not fit the model.
    """
    from onnxslim_kd import api

    samples = config.read_samples(model)
    return api.plan(model, config.choice(samples), config.reading(samples))


def prune(model: "ModelLike", config: PruneConfig) -> "tuple[Pruned, Ratio | None]":
    """Cut, and measure the result against ``model`` if ``bench`` says so.

    Raises:
        UserError: The settings do not fit the model.
        ProofError: The result is not the silenced original.
        OperationError: The result measures slower than the original.
    """
    from onnxslim_kd import api
    from onnxslim_kd.passes import latency_measure

    samples = config.read_samples(model)
    reading = config.reading(samples)
    done = api.prune(model, config.choice(samples), reading=reading, verify=config.verify)
    if not config.bench:
        return done, None
    ratio = latency_measure.not_slower(
        model,
        done.model,
        shapes=config.inputs,
        setting=latency_measure.quick(config.provider, config.threads),
        force=config.force_slower,
    )
    return done, ratio


INSTEAD_OF_RATIO = [
    "ratios",
    "target_macs",
    "target_params",
    "target_size",
    "target_latency",
    "max_loss",
]
SETTLED = [
    "pattern",
    "ratio",
    "ignore",
    "allocation",
    "sensitivity",
    "round_to",
    "steps",
    "criterion",
    "group_score",
    "selector",
    "attention",
    "free_outputs",
    *INSTEAD_OF_RATIO,
]
"""What a plan has decided."""
