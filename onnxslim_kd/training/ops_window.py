"""Sliding windows: the attributes that convolutions and poolings share."""

from collections.abc import Sequence
from dataclasses import dataclass

from onnxslim_kd.training.opnode import OpNode


@dataclass(frozen=True)
class Window:
    """Kernel, strides, dilations and pads of one node."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    auto_pad: str
    ceil: bool

    @property
    def same(self) -> bool:
        """Whether pads depend on the input's size."""
        return self.auto_pad.startswith("SAME")

    @property
    def symmetric(self) -> bool:
        """Whether torch's own padding can be used."""
        return not self.same and self.begin == self.end

    def pads(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return the pads before and after each spatial axis for an input of ``sizes``."""
        if not self.same:
            return self.begin, self.end
        begin, end = [], []
        for n, k, s, d in zip(sizes, self.kernel, self.strides, self.dilations, strict=True):
            small, large = halves(max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0))
            begin.append(small if self.auto_pad == "SAME_UPPER" else large)
            end.append(large if self.auto_pad == "SAME_UPPER" else small)
        return begin, end

    def output_sizes(self, sizes: Sequence[int]) -> list[int]:
        """Return the spatial sizes of the result, by ONNX's formula."""
        begin, end = self.pads(sizes)
        result = []
        for i, n in enumerate(sizes):
            reach = (self.kernel[i] - 1) * self.dilations[i] + 1
            room = n + begin[i] + end[i] - reach
            out = (-(-room // self.strides[i]) if self.ceil else room // self.strides[i]) + 1
            if self.ceil and (out - 1) * self.strides[i] >= n + begin[i]:
                out -= 1  # a window must begin inside of the input or the padding before it
            result.append(out)
        return result


def halves(total: int) -> tuple[int, int]:
    """Split a padding in two, the first not larger."""
    return total // 2, total - total // 2


def window(node: OpNode, kernel: list[int]) -> Window:
    """Read the attributes of ``node``, whose kernel has the sizes ``kernel``."""
    rank = len(kernel)
    auto_pad = node.get("auto_pad", "NOTSET")
    pads = node.ints("pads") or [0] * (2 * rank)
    if auto_pad != "NOTSET":
        pads = [0] * (2 * rank)
    return Window(
        kernel=kernel,
        strides=node.ints("strides") or [1] * rank,
        dilations=node.ints("dilations") or [1] * rank,
        begin=pads[:rank],
        end=pads[rank:],
        auto_pad=auto_pad,
        ceil=bool(node.get("ceil_mode", 0)),
    )


def torch_pads(begin: Sequence[int], end: Sequence[int]) -> list[int]:
    """Return pads in the order of `torch.nn.functional.pad`: the last axis first."""
    return [pad for pair in zip(reversed(begin), reversed(end), strict=True) for pad in pair]
