"""Some inputs of a model, held in memory, with their labels where there are any."""

from collections.abc import Mapping
from dataclasses import dataclass

from onnxslim_kd.runtime import Array


@dataclass(frozen=True)
class Samples:
    """What criteria and corrections look at.

    Attributes:
        name: Where they come from, in words.
        feeds: One array per graph input, for each batch.
        labels: The labels of each batch by entry; empty where there are none.
    """

    name: str
    feeds: tuple[Mapping[str, Array], ...]
    labels: tuple[Mapping[str, Array], ...] = ()

    @property
    def labelled(self) -> bool:
        """Whether there are classes, of samples or pixels; -1 stands for none."""
        found = [batch.get("label", batch.get("mask")) for batch in self.labels]
        return any(labels is not None and bool((labels >= 0).any()) for labels in found)
