"""What a lowered graph keeps across runs, under names that torch accepts."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor, nn

from onnxslim_kd.access import unique
from onnxslim_kd.errors import ModelError


@dataclass
class Weights:
    """What lives across runs, by initializer (or folded value's) name."""

    trainable: Collection[str]
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    """Initializer name to an attribute name that torch accepts."""

    def register(self, name: str, tensor: Tensor) -> str:
        """Make ``tensor`` a parameter or a buffer; return its name, numbered if it was taken.

        Raises:
            ModelError: Two initializers to be trained, in two subgraphs, have one name.
        """
        if name in self.trainable:
            if name in self.keys:
                raise ModelError(f"two initializers are called {name}; rename one to train them")
            self.parameters[name] = nn.Parameter(tensor)
        else:
            name = unique(name, self.keys)
            self.buffers[name] = tensor
        key = f"w_{identifier(name)}"  # a bare "half" or "train" is a method of every module
        self.keys[name] = unique(key, self.keys.values())
        return name


def identifier(name: str) -> str:
    """Return ``name`` as a Python identifier, so that generated code can be read."""
    plain = name[:1].isalpha() and name != "self"
    return re.sub(r"\W", "_", name if plain else f"v_{name}")
