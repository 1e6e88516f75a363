"""Why a parameter can or cannot lose channels, in words."""

import numpy as np
from pydantic import BaseModel, ConfigDict

from onnxslim_kd.passes.groups import Analysis, Parameter
from onnxslim_kd.passes.matching import find
from onnxslim_kd.passes.ties import chain


class Touched(BaseModel):
    """An axis that loses channels together with the parameter."""

    model_config = ConfigDict(frozen=True)

    parameter: str
    axis: int
    channels: int
    """How many of its channels belong to the parameter's group."""
    node: str


class Story(BaseModel):
    """What `explain` found."""

    model_config = ConfigDict(frozen=True)

    headline: str
    chain: tuple[str, ...] = ()
    """The nodes on the way to what pins the parameter."""
    members: tuple[Touched, ...] = ()


def explain(analysis: Analysis, name: str) -> Story:
    """Tell a parameter's group, or the way to what pins it.

    Raises:
        NotFoundError: There is no such parameter.
    """
    parameter = find(analysis, name)
    reason = analysis.refusal(parameter)
    if reason is not None:
        return Story(
            headline=f"{parameter.name} (axis {parameter.axis}) must stay: {reason}",
            chain=tuple(_to_pin(analysis, parameter)),
            members=tuple(_members(analysis, parameter)),
        )
    units = len(np.unique(analysis.labels(parameter.birth)))
    return Story(
        headline=f"{parameter.name} (axis {parameter.axis}) has {parameter.birth.size} channels"
        f" in {units} removable units",
        members=tuple(_members(analysis, parameter)),
    )


def _to_pin(analysis: Analysis, parameter: Parameter) -> list[str]:
    birth = parameter.birth
    start = np.arange(birth.start, birth.start + birth.size)
    return chain(analysis.channels, start, analysis.channels.pins)


def _members(analysis: Analysis, parameter: Parameter) -> list[Touched]:
    mine = np.zeros(analysis.components.count, bool)
    mine[analysis.labels(parameter.birth)] = True
    found = []
    for birth in analysis.births:
        channels = int(mine[analysis.labels(birth)].sum())
        if channels and birth.operand is not None:
            found.append(
                Touched(
                    parameter=birth.value.name or "?",
                    axis=birth.axis,
                    channels=channels,
                    node=birth.node.name or "?",
                )
            )
    return found
