"""Prune: decide (`plan`), then slice (`cut`); the two never mix.

Before: ``Conv(W[64, 3, 3, 3]) -> BatchNormalization(64) -> Conv(W[128, 64, 3, 3])``
After:  ``Conv(W[32, 3, 3, 3]) -> BatchNormalization(32) -> Conv(W[128, 32, 3, 3])``

1. What lives and dies together comes from `ties`; a group is cut as a whole or not at all.
2. A parameter that was asked for and stays is in the plan, with its reason.
3. Weights are sliced, numbers that count channels are repaired (`fixups`), shapes are inferred
   again and must agree with the plan.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import PassError, UserError
from onnxslim_kd.passes import fixups
from onnxslim_kd.passes.channels import Birth, Ids
from onnxslim_kd.passes.criteria import COMPARABLE, FROM_DATA, criterion
from onnxslim_kd.passes.groups import Analysis, analyse, find, match
from onnxslim_kd.passes.importance import Criterion
from onnxslim_kd.passes.ratios import (
    Amount,
    Candidate,
    GroupScore,
    Request,
    candidates,
    machine_block,
)
from onnxslim_kd.passes.targets import (
    Allocation,
    Allocator,
    Curves,
    Found,
    LatencyTarget,
    Target,
    allocator,
    by_loss,
    curve_of,
    search,
)
from onnxslim_kd.plans import Group, Member, Options, Plan, Refusal
from onnxslim_kd.samples import Samples

PLAN_KEY = "onnxslim_kd.pruned"


@dataclass(frozen=True)
class Choice:
    """What to prune and how; the fields are the options of the command.

    Raises:
        UserError: A field is out of range; the message names the option.
    """

    pattern: str | None = None
    ratio: float = 0.5
    ratios: Mapping[str, float] | None = None
    ignore: str | None = None
    criterion: str = "l1"
    group_score: GroupScore = "first"
    amount: Amount = field(default_factory=lambda: Amount(round_to=0))
    target: Target | LatencyTarget | None = None
    """Instead of a ratio: find the strength that removes this share of MACs, ..., or measure."""
    allocation: Allocation = "uniform"
    sensitivity: Curves | None = None
    """Per parameter, the loss by ratio; the ratios then come from it."""
    max_loss: float | None = None
    """The loss that each group may cost, as a share of the metric; or give a target."""
    samples: Samples | None = None
    """For the criteria that look at data."""
    steps: int = 1
    """Go there in that many steps, scoring anew before each."""

    def __post_init__(self) -> None:
        criterion(self.criterion, self.samples)
        if (self.pattern is None) == (not self.ratios):
            raise UserError("give either a pattern (with a ratio) or a ratio per parameter")
        for name, ratio in {"ratio": self.ratio, **(self.ratios or {})}.items():
            if not (isfinite(ratio) and 0 <= ratio < 1):
                raise UserError(f"{name}: a ratio must be in [0, 1), got {ratio:g}")
        if self.amount.round_to < 0:
            raise UserError(f"round-to must be 1 or more, got {self.amount.round_to}")
        if self.steps < 1:
            raise UserError(f"--steps must be 1 or more, got {self.steps}")
        if self.max_loss is not None and not (isfinite(self.max_loss) and self.max_loss >= 0):
            raise UserError(f"--max-loss must be 0 or more, got {self.max_loss:g}")
        if (self.sensitivity is None) != (self.max_loss is None) and self.target is None:
            raise UserError("--sensitivity goes with --max-loss or a target, and the other way")

    def requests(self, analysis: Analysis) -> list[Request]:
        """Return the parameters asked for, with their ratios.

        Raises:
            NotFoundError: A pattern or name matches nothing.
        """
        if self.pattern is not None:
            chosen = match(analysis, self.pattern, self.ignore)
            return [Request(p, self.ratio) for p in chosen]
        return [Request(find(analysis, name), r) for name, r in (self.ratios or {}).items()]


def plan(analysis: Analysis, choice: Choice) -> Plan:
    """Decide which channels go.

    Args:
        analysis: A model with its ties solved (`groups.analyse`).
        choice: What to prune and how.

    Raises:
        UserError: The choice names nothing, or its criterion cannot score a parameter.
    """
    if isinstance(choice.target, LatencyTarget):
        from onnxslim_kd.passes import latency  # it cuts and measures, with what is below

        return latency.plan(analysis, choice, choice.target)
    if choice.steps > 1:
        from onnxslim_kd.passes import steps  # it ranks and cuts again, with what is below

        return steps.plan(analysis, choice)
    ranked, refused, notes = rank(analysis, choice)
    ranked, removed, more = decide(analysis, choice, ranked)
    notes += more
    return describe(analysis, ranked, removed, choice.criterion, refused=refused, notes=notes)


def decide(
    analysis: Analysis, choice: Choice, ranked: Sequence[Candidate]
) -> tuple[list[Candidate], Ids, list[str]]:
    """Return the groups with the ratio that was found, the mask over components, and notes."""
    notes: list[str] = []
    allocate = _allocate(analysis, choice, ranked, notes)
    if not isinstance(choice.target, Target):
        strength = choice.ratio if choice.max_loss is None else choice.max_loss
        return list(ranked), mark(analysis, allocate(strength)), notes
    found = search(analysis, allocate, choice.target)
    notes.append(_searched(choice.target, found))
    return [replace(c, ratio=found.strength) for c in ranked], found.removed, notes


def _allocate(
    analysis: Analysis, choice: Choice, ranked: Sequence[Candidate], notes: list[str]
) -> Allocator:
    """Return how a strength is spread: a ratio, a threshold, or a loss."""
    amount = resolved(choice.amount)
    if choice.sensitivity is not None:
        curves = [curve_of(choice.sensitivity, c) for c in ranked]
        notes += [
            f"{c.asked[0].name} is not in the sensitivity file and stays"
            for c, curve in zip(ranked, curves, strict=True)
            if not curve
        ]
        return by_loss(ranked, curves, amount)
    if choice.allocation == "uniform" and choice.target is None:
        return lambda _: [amount.removed(c, c.ratio) for c in ranked]
    return allocator(choice.allocation, analysis, ranked, amount)


def _searched(target: Target, found: Found) -> str:
    text = f"strength {found.strength:g} removes {found.share:.1%} of the {target.quantity}"
    if found.reached:
        return text
    return (
        f"{text}; {target.share:.1%} was asked for and cannot be reached: what was chosen holds"
        f" too little of it, or comes in too coarse blocks (see what was left alone)"
    )


def resolved(amount: Amount) -> Amount:
    """Replace ``round_to=0`` by this machine's block."""
    return amount if amount.round_to else Amount(machine_block(), amount.selector)


def rank(
    analysis: Analysis, choice: Choice, score: Criterion | None = None
) -> tuple[list[Candidate], list[Refusal], list[str]]:
    """Return the groups asked for with their units ranked, the refusals, and notes.

    Args:
        analysis: The solved model.
        choice: What to prune and how.
        score: Instead of the criterion that the choice names.
    """
    requests = choice.requests(analysis)
    refused, free = [], []
    for request in requests:
        reason = analysis.refusal(request.parameter)
        if reason is None:
            free.append(request)
        else:
            refused.append(Refusal(parameter=request.parameter.name, reason=reason))
    score = score or criterion(choice.criterion, choice.samples)
    ranked, notes = candidates(analysis, free, score, choice.group_score)
    if choice.samples is not None and choice.criterion in FROM_DATA:
        notes.append(f"{choice.criterion} was measured on {choice.samples.name}")
    if choice.criterion == "taylor" and not (choice.samples and choice.samples.labelled):
        notes.append("the data has no labels: gradients are those of half the mean squared output")
    comparable = choice.criterion in COMPARABLE
    return [replace(c, comparable=comparable) for c in ranked], refused, notes


def mark(analysis: Analysis, removed: Sequence[Ids]) -> Ids:
    """Return a mask over components, True for those that go."""
    mask = np.zeros(analysis.components.count, bool)
    for labels in removed:
        mask[labels] = True
    return mask


def describe(
    analysis: Analysis,
    ranked: Sequence[Candidate],
    removed: Ids,
    criterion: str,
    *,
    refused: Sequence[Refusal] = (),
    notes: Sequence[str] = (),
) -> Plan:
    """Write the decision down as a `Plan`."""
    owner = np.full(analysis.components.count, -1)
    for index, candidate in enumerate(ranked):
        owner[candidate.units] = index
    members: list[list[Member]] = [[] for _ in ranked]
    produced = {p.birth.start for p in analysis.parameters if p.produces}
    for birth in analysis.births:
        for index in _owners(owner[analysis.labels(birth)]):
            produces = birth.start in produced
            members[index].append(_member(analysis, birth, removed, produces=produces))
    approximate = _approximate(analysis, owner, removed)
    groups = [
        Group(
            asked_by=tuple(dict.fromkeys(p.name for p in c.asked)),
            ratio=c.ratio,
            units=len(c.units),
            removed=int(removed[c.units].sum()),
            members=tuple(members[i]),
            importance=tuple(c.scores.tolist()),
            approximate=tuple(approximate.get(i, ())),
        )
        for i, c in enumerate(ranked)
    ]
    return Plan(
        options=Options(attention=analysis.channels.attention, free_outputs=analysis.free_outputs),
        criterion=criterion,
        groups=tuple(groups),
        refused=tuple(refused),
        notes=tuple(notes),
        macs_before=analysis.macs(),
        macs_after=analysis.macs(removed),
    )


def _owners(owners: Ids) -> list[int]:
    if not owners.size or (owners == owners[0]).all():
        return [int(i) for i in owners[:1] if i >= 0]
    return [int(i) for i in np.unique(owners) if i >= 0]


def _member(analysis: Analysis, birth: Birth, removed: Ids, *, produces: bool) -> Member:
    keep = np.flatnonzero(~removed[analysis.labels(birth)])
    return Member(
        parameter=birth.value.name or "?",
        axis=birth.axis,
        node=birth.node.name or "?",
        before=birth.size,
        after=len(keep),
        kept=tuple(keep.tolist()) if produces else None,
    )


def _approximate(analysis: Analysis, owner: Ids, removed: Ids) -> dict[int, list[str]]:
    """Per group, where removal differs from masking."""
    found: dict[int, list[str]] = {}
    for node, ids, reason in analysis.channels.approximate:
        label = analysis.components.label[ids]
        for index in _owners(owner[label[removed[label]]]):
            found.setdefault(index, []).append(f"{node.name}: {reason}")
    return found


# ------------------------------------------------------------------------------- cut


def cut(model: model_io.ModelLike, plan: Plan) -> ir.Model:
    """Return ``model`` without the channels that ``plan`` removes; it decides nothing.

    Raises:
        UserError: The plan was made for another model.
        PassError: The cut graph is not what the plan says.
    """
    analysis = analyse(
        model_io.load(model),
        attention=plan.options.attention,
        free_outputs=plan.options.free_outputs,
    )
    apply(analysis, removed_by(analysis, plan))
    return analysis.model


def removed_by(analysis: Analysis, plan: Plan) -> Ids:
    """Return the mask over components that ``plan`` means, for this model.

    Raises:
        UserError: The plan names what the model does not have, or cuts what must stay.
    """
    births = {(b.value.name, b.axis, b.size): b for b in analysis.births}
    gone: list[Ids] = []
    outputs: list[tuple[Member, Birth]] = []
    for member in (m for group in plan.groups for m in group.members):
        birth = births.get((member.parameter, member.axis, member.before))
        if birth is None:
            raise UserError(
                f"the plan was made for another model: here is no {member.parameter} with"
                f" {member.before} channels along axis {member.axis}"
            )
        if member.kept is not None:
            drop = np.ones(birth.size, bool)
            drop[list(member.kept)] = False
            gone.append(analysis.labels(birth)[drop])
            outputs.append((member, birth))
    removed = mark(analysis, gone)
    for label in np.flatnonzero(removed):
        if (reason := analysis.components.pinned.get(int(label))) is not None:
            raise UserError(f"the plan was made for another model: it cuts what stays ({reason})")
    for member, birth in outputs:
        keep = np.flatnonzero(~removed[analysis.labels(birth)])
        if tuple(keep.tolist()) != member.kept:
            raise UserError(
                f"the plan was made for another model: {member.parameter} would keep"
                f" {len(keep)} channels, the plan says {member.after}"
            )
    return removed


def apply(analysis: Analysis, removed: Ids) -> None:
    """Slice the weights of the analysed model in place and repair what counts channels.

    Raises:
        PassError: The shapes of the cut graph are not what the plan says.
    """
    if not removed.any():
        return
    gone = removed[analysis.components.label].astype(bool)
    _ = analysis.other_sample  # of the graph before its weights change
    state = fixups.Cut(analysis, gone, analysis.new_shapes(removed))
    _slice_weights(analysis, gone)
    fixups.repair(state)
    for value, expected in state.shapes.items():
        if value.shape is not None and not value.is_initializer():
            before = analysis.shapes.shape[value]
            changed = zip(value.shape, before, expected, strict=True)
            value.shape = ir.Shape([have if old == new else new for have, old, new in changed])
    declared = {value: value.shape for value in analysis.model.graph.outputs}
    model_io.infer_shapes(analysis.model)
    _check_shapes(state)
    for value, shape in declared.items():  # symbols stay symbols, whatever inference now knows
        value.shape = shape


def _slice_weights(analysis: Analysis, gone: Ids) -> None:
    """Slice every weight along its cut axes; a vector shared by layers is cloned first."""
    axes: dict[ir.Value, dict[int, Ids]] = {}
    vectors: dict[ir.Value, list[tuple[Birth, Ids]]] = {}
    for birth in analysis.births:
        drop = gone[birth.start : birth.start + birth.size]
        if birth.operand is None:
            continue
        keep = np.flatnonzero(~drop)
        if len(analysis.shapes.shape[birth.value]) == 1:
            vectors.setdefault(birth.value, []).append((birth, keep))
        elif drop.any():
            axes.setdefault(birth.value, {})[birth.axis] = keep
    for value, cuts in axes.items():
        _slice(value, cuts)
    for value, uses in vectors.items():
        _slice_vector(analysis.model.graph, value, uses)


def _slice(value: ir.Value, cuts: Mapping[int, Ids]) -> None:
    array = _numbers(value)
    for axis, keep in sorted(cuts.items(), key=lambda cut: len(cut[1])):
        array = np.take(array, keep, axis=axis)
    tensor = ir.Tensor(np.ascontiguousarray(array), name=value.name)
    value.const_value, value.shape = tensor, ir.Shape(array.shape)


def _numbers(value: ir.Value) -> np.ndarray[Any, Any]:
    assert value.const_value is not None
    if value.const_value.dtype.bitwidth < 8:
        raise UserError(
            f"{value.name} has type {value.const_value.dtype.name}, whose elements share bytes:"
            f" leave it out with --ignore"
        )
    return value.const_value.numpy()


def _slice_vector(graph: ir.Graph, value: ir.Value, uses: Sequence[tuple[Birth, Ids]]) -> None:
    """Slice a vector for each of its uses; equal cuts share one."""
    whole = len(_numbers(value))
    kinds = {keep.tobytes() for _, keep in uses}
    if kinds == {np.arange(whole).tobytes()}:
        return
    if len(kinds) == 1 and len(uses) == len(value.uses()):
        _slice(value, {0: uses[0][1]})
        return
    clones: dict[bytes, ir.Value] = {}
    for birth, keep in uses:
        if len(keep) == whole:
            continue
        if keep.tobytes() not in clones:
            array = _numbers(value)[keep]
            clones[keep.tobytes()] = model_io.new_initializer(graph, value.name or "w", array)
        assert birth.operand is not None
        birth.node.replace_input_with(birth.operand, clones[keep.tobytes()])
    fixups.remove_dead(graph, [value])


def _check_shapes(state: fixups.Cut) -> None:
    """Read the cut graph's shapes back: each must be what the plan says."""
    for value, expected in state.shapes.items():
        node = value.producer()
        if value.shape is None or node is None or node.graph is None:
            continue  # not inferred, a weight, or removed with what it fed
        for have, want in zip(model_io.dims(value), expected, strict=True):
            if have is not None and have != want:
                raise PassError(
                    f"after the cut {value.name} has shape {list(value.shape)},"
                    f" the plan says {list(expected)}"
                )


def record(model: ir.Model, plan: Plan) -> None:
    """Leave in the metadata which plan made the model, without its long lists."""
    summary = {
        "criterion": plan.criterion,
        "groups": len(plan.groups),
        "macs": [plan.macs_before, plan.macs_after],
        "approximate": plan.approximate,
    }
    model.metadata_props[PLAN_KEY] = json.dumps(summary)
