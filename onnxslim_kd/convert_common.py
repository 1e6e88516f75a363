"""What the converters of old settings share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Old = dict[str, Any]
"""Settings that are taken out as they are converted."""


@dataclass
class Converted:
    """A recipe, and what it does not hold."""

    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What the user must look at, or could not be carried over, one sentence each."""

    @property
    def stages(self) -> dict[str, Any]:
        """The stages."""
        found: dict[str, Any] = self.settings.setdefault("stages", {})
        return found


def unshared(old: Any) -> Any:
    """Copy settings so that what a YAML anchor shares can be taken apart in each place."""
    if isinstance(old, Mapping):
        return {key: unshared(value) for key, value in old.items()}
    return [unshared(value) for value in old] if isinstance(old, list) else old


def leaves(old: Any, place: str = "") -> Iterator[str]:
    """Name the settings that nobody took."""
    if isinstance(old, Mapping) and old:
        for key, value in old.items():
            yield from leaves(value, f"{place}.{key}" if place else str(key))
    elif old not in ({}, None, []):
        yield f"{place}: {old}"


CRITERIA = {
    "l1_norm": "l1",
    "l2_norm": "l2",
    "geometry_median": "geometric-median",
    "fpgm": "geometric-median",
    "bn_scale": "bn-scale",
}
