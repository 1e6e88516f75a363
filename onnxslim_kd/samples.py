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
        """Whether every batch has labels."""
        return bool(self.labels) and all(self.labels)
