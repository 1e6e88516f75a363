"""Random networks made of all rule families: the proof holds and nothing is forgotten."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxslim_kd import Amount, Choice, Reading, api
from onnxslim_kd.passes.channels import Attention
from onnxslim_kd.proof import structure
from tests.models import Case, build

BLOCKS = [
    "conv",
    "residual",
    "branch",
    "concat",
    "split",
    "shuffle",
    "squeeze-excite",
    "depthwise",
    "grouped",
    "norm",
    "shared",
    "nhwc",
    "attention",
    "fused-attention",
    "softmax-parts",
    "slices",
    "single",
    "pixel-shuffle",
    "deconv",
    "group-norm",
    "gather",
    "pad",
    "lstm",
    "gate",
]

INEXACT = {"group-norm", "softmax-parts"}
"""What counts the channels: a norm, or a softmax over what is left."""


class Net:
    """A network as ONNX text that grows block by block; ``width`` channels at the end."""

    def __init__(self, width: int) -> None:
        self.lines: list[str] = []
        self.weights: list[str] = []
        self.width = 3
        self.last = "x"
        self.shared: dict[int, str] = {}
        self.conv(width)

    def name(self) -> str:
        return f"v{len(self.lines)}"

    def weight(self, *shape: int, prefix: str = "w") -> str:
        name = f"{prefix}{len(self.weights)}_"
        self.weights.append(f"float[{','.join(map(str, shape))}] {name}")
        return name

    def add(self, text: str) -> str:
        name = self.name()
        self.lines.append(f"{name} = {text}")
        self.last = name
        return name

    def conv(self, width: int, source: str | None = None, groups: int = 1) -> str:
        weight = self.weight(width, self.width // groups, 3, 3)
        text = f"Conv<pads=[1,1,1,1],group={groups}>({source or self.last}, {weight})"
        self.width = width
        return self.add(text)

    def grow(self, kind: str, width: int) -> None:
        getattr(self, "_" + kind.replace("-", "_"))(width)

    def _conv(self, width: int) -> None:
        self.conv(width)
        self.add(f"Relu({self.last})")

    def _residual(self, width: int) -> None:
        start, own = self.last, self.width
        self.conv(width)
        self.conv(own)
        self.add(f"Add({start}, {self.last})")

    def _branch(self, width: int) -> None:
        start, own = self.last, self.width
        left = self.conv(width, start)
        self.width = own
        right = self.conv(width, start)
        self.add(f"Max({left}, {right})")

    def _concat(self, width: int) -> None:
        start, own = self.last, self.width
        self.conv(width)
        self.add(f"Concat<axis=1>({start}, {self.last}, {start})")
        self.width = 2 * own + width

    def _split(self, width: int) -> None:
        if self.width < 4:
            return
        left, right = f"{self.name()}a", f"{self.name()}b"
        sizes = f"{self.name()}s"
        self.lines.append(
            f"{sizes} = Constant<value_ints=[2,{self.width - 2}]>()"
            f" {left}, {right} = Split<axis=1>({self.last}, {sizes})"
        )
        self.width -= 2
        self.conv(2, right)
        self.add(f"Mul({left}, {self.last})")

    def _shuffle(self, width: int) -> None:
        if self.width % 2:
            return
        half = self.width // 2
        shape = f"{self.name()}s"
        self.lines.append(f"{shape} = Constant<value_ints=[0,2,{half},6,6]>()")
        self.add(f"Reshape({self.last}, {shape})")
        self.add(f"Transpose<perm=[0,2,1,3,4]>({self.last})")
        back = f"{self.name()}s"
        self.lines.append(f"{back} = Constant<value_ints=[0,{self.width},6,6]>()")
        self.add(f"Reshape({self.last}, {back})")

    def _squeeze_excite(self, width: int) -> None:
        start, own = self.last, self.width
        self.add(f"GlobalAveragePool({start})")
        self.add(f"Conv({self.last}, {self.weight(2, own, 1, 1)})")
        self.add(f"Conv({self.last}, {self.weight(own, 2, 1, 1)})")
        self.add(f"Sigmoid({self.last})")
        self.add(f"Mul({start}, {self.last})")

    def _depthwise(self, width: int) -> None:
        self.conv(self.width, groups=self.width)

    def _grouped(self, width: int) -> None:
        if self.width % 2 == 0:
            self.conv(width + width % 2, groups=2)

    def _norm(self, width: int) -> None:
        vectors = [self.weight(self.width) for _ in range(3)]
        vectors.append(self.weight(self.width, prefix="wpos"))
        self.add(f"BatchNormalization({self.last}, {', '.join(vectors)})")

    def _shared(self, width: int) -> None:
        if self.width not in self.shared:
            self.shared[self.width] = self.weight(self.width, self.width, 3, 3)
        self.add(f"Conv<pads=[1,1,1,1]>({self.last}, {self.shared[self.width]})")
        self.add(f"Conv<pads=[1,1,1,1]>({self.last}, {self.shared[self.width]})")

    def _nhwc(self, width: int) -> None:
        self.add(f"Transpose<perm=[0,2,3,1]>({self.last})")
        self.add(f"MatMul({self.last}, {self.weight(self.width, width)})")
        self.add(f"Add({self.last}, {self.weight(width)})")
        self.add(f"Transpose<perm=[0,3,1,2]>({self.last})")
        self.width = width

    def numbers(self, *values: int) -> str:
        name = f"{self.name()}c{len(self.lines)}"
        self.lines.append(f"{name} = Constant<value_ints=[{','.join(map(str, values))}]>()")
        return name

    def to_tokens(self) -> None:
        """[N, C, 6, 6] to [N, 36, C]."""
        self.add(f"Reshape({self.last}, {self.numbers(0, self.width, 36)})")
        self.add(f"Transpose<perm=[0,2,1]>({self.last})")

    def to_image(self, width: int) -> None:
        self.add(f"Transpose<perm=[0,2,1]>({self.last})")
        self.add(f"Reshape({self.last}, {self.numbers(0, width, 6, 6)})")
        self.width = width

    def _attention(self, width: int) -> None:
        """Three products, split into heads of ``width``, joined again."""
        self.to_tokens()
        source, heads = self.last, 2
        parts = []
        for perm in ("0,2,1,3", "0,2,3,1", "0,2,1,3"):
            self.add(f"MatMul({source}, {self.weight(self.width, heads * width)})")
            self.add(f"Reshape({self.last}, {self.numbers(0, 36, heads, width)})")
            parts.append(self.add(f"Transpose<perm=[{perm}]>({self.last})"))
        self.attend(*parts, width)

    def _fused_attention(self, width: int) -> None:
        """One product, of which Q, K and V are told by their index."""
        self.to_tokens()
        self.add(f"MatMul({self.last}, {self.weight(self.width, 6 * width)})")
        self.add(f"Reshape({self.last}, {self.numbers(0, 36, 3, 2, width)})")
        fused = self.add(f"Transpose<perm=[2,0,3,1,4]>({self.last})")
        parts = []
        for index in range(3):
            i = f"{self.name()}i{index}"
            self.lines.append(f"{i} = Constant<value_int={index}>()")
            parts.append(self.add(f"Gather({fused}, {i})"))
        parts[1] = self.add(f"Transpose<perm=[0,1,3,2]>({parts[1]})")
        self.attend(*parts, width)

    def attend(self, q: str, k: str, v: str, width: int) -> None:
        self.add(f"MatMul({q}, {k})")
        self.add(f"Softmax<axis=-1>({self.last})")
        self.add(f"MatMul({self.last}, {v})")
        self.add(f"Transpose<perm=[0,2,1,3]>({self.last})")
        self.add(f"Reshape({self.last}, {self.numbers(0, 36, 2 * width)})")
        self.to_image(2 * width)

    def _softmax_parts(self, width: int) -> None:
        if self.width % 2 == 0:
            own, half = self.width, self.width // 2
            grid = self.add(f"Reshape({self.last}, {self.numbers(0, 2, half, 6, 6)})")
            self.add(f"Softmax<axis=1>({grid})")
            self.add(f"Mul({self.last}, {grid})")
            self.add(f"Reshape({self.last}, {self.numbers(0, own, 6, 6)})")

    def _slices(self, width: int) -> None:
        """Overlapping parts, one of them with steps, joined in another order."""
        if self.width < 4:
            return
        start, own = self.last, self.width
        zero, one, two = self.numbers(0), self.numbers(1), self.numbers(2)
        end, cut = self.numbers(own), self.numbers(own - 1)
        a = self.add(f"Slice({start}, {one}, {end}, {one})")
        b = self.add(f"Slice({start}, {zero}, {cut}, {one}, {two})")
        self.add(f"Concat<axis=1>({a}, {b})")
        self.width = own - 1 + len(range(0, own - 1, 2))

    def _single(self, width: int) -> None:
        """One channel is split off and gates the others."""
        if self.width < 2:
            return
        own = self.width
        one, rest = f"{self.name()}a", f"{self.name()}b"
        sizes = self.numbers(1, own - 1)
        self.lines.append(f"{one}, {rest} = Split<axis=1>({self.last}, {sizes})")
        squeezed = self.add(f"Squeeze({one}, {self.numbers(1)})")
        gate = self.add(f"Unsqueeze({squeezed}, {self.numbers(1)})")
        self.add(f"Mul({gate}, {rest})")
        self.width = own - 1

    def _pixel_shuffle(self, width: int) -> None:
        self.conv(4 * width)
        self.add(f"DepthToSpace<blocksize=2>({self.last})")
        self.add(f"AveragePool<kernel_shape=[2,2],strides=[2,2]>({self.last})")
        self.width = width

    def _deconv(self, width: int) -> None:
        weight = self.weight(self.width, width, 3, 3)
        self.add(f"ConvTranspose<pads=[1,1,1,1]>({self.last}, {weight})")
        self.width = width

    def _group_norm(self, width: int) -> None:
        if self.width % 2 == 0:
            scale, shift = self.weight(self.width), self.weight(self.width)
            self.add(f"GroupNormalization<num_groups=2>({self.last}, {scale}, {shift})")

    def _gather(self, width: int) -> None:
        order = np.random.default_rng(width).permutation(self.width)
        self.add(f"Gather<axis=1>({self.last}, {self.numbers(*order.tolist())})")

    def _pad(self, width: int) -> None:
        self.add(f"Pad({self.last}, {self.numbers(0, 1, 0, 0, 0, 2, 0, 0)})")
        self.width += 3

    def _lstm(self, width: int) -> None:
        self.to_tokens()
        self.add(f"Transpose<perm=[1,0,2]>({self.last})")
        w, r = self.weight(1, 4 * width, self.width), self.weight(1, 4 * width, width)
        self.add(f"LSTM<hidden_size={width}>({self.last}, {w}, {r})")
        self.add(f"Squeeze({self.last}, {self.numbers(1)})")
        self.add(f"Transpose<perm=[1,0,2]>({self.last})")
        self.to_image(width)

    def _gate(self, width: int) -> None:
        """GLU: half of a product gates the other half."""
        start = self.conv(2 * width)
        a, b = f"{self.name()}a", f"{self.name()}b"
        self.lines.append(f"{a}, {b} = Split<axis=1,num_outputs=2>({start})")
        self.add(f"Sigmoid({b})")
        self.add(f"Mul({a}, {self.last})")
        self.width = width

    def case(self) -> Case:
        self.conv(4)
        self.lines.append(f"y = Identity({self.last})")
        return Case(
            " ".join(self.lines), ", ".join(self.weights), "float[N,3,6,6] x", "float[N,4,6,6] y"
        )


def network(blocks: list[tuple[str, int]]) -> Case:
    net = Net(6)
    for kind, width in blocks:
        if net.width <= 40:
            net.grow(kind, width)
    return net.case()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    blocks=st.lists(st.tuples(st.sampled_from(BLOCKS), st.integers(1, 9)), max_size=7),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    criterion=st.sampled_from(["l1", "geometric-median", "random"]),
    seed=st.integers(0, 3),
    attention=st.sampled_from(["auto", "heads", "dims"]),
)
def test_random_networks(
    blocks: list[tuple[str, int]], ratio: float, criterion: str, seed: int, attention: Attention
) -> None:
    kinds = {kind for kind, _ in blocks}
    model = build(network(blocks), seed)
    choice = Choice(pattern=".*", ratio=ratio, criterion=criterion, amount=Amount(round_to=1))
    result = api.prune(model, choice, reading=Reading(attention=attention))
    structure(result.model)
    assert not result.plan.approximate or kinds & INEXACT
    refused = {refusal.parameter for refusal in result.plan.refused}
    touched = {m.parameter for group in result.plan.groups for m in group.members}
    parameters = {p.name for p in api.inspect(model).parameters}
    assert parameters <= refused | touched
    for value in result.model.graph.initializers.values():
        assert 0 not in value.shape.numpy()
    for group in result.plan.groups:
        blocks_of = [m for m in group.members if m.kept is not None]
        assert all(m.after == len(m.kept) for m in blocks_of)
        assert group.removed <= group.units - 1
        if ratio == 0.9 and group.units >= 20:
            assert group.removed > 0
    again = api.prune(model, result.plan)
    assert again.after == result.after


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_reshape_carries_ids_as_numpy_does(sizes: list[int], seed: int) -> None:
    """Splitting and merging axes moves ids exactly as reshaping the array of ids would."""
    from onnxslim_kd.passes.blocks import reshaped
    from onnxslim_kd.passes.channels import Block

    total = int(np.prod(sizes))
    ids = np.random.default_rng(seed).permutation(total)
    split = reshaped(Block((1,), ids), (2, total), (2, *sizes))
    if split is not None:
        full = np.broadcast_to(
            split.ids.reshape(
                [sizes[a - 1] if a in split.axes else 1 for a in range(1, len(sizes) + 1)]
            ),
            sizes,
        )
        assert np.array_equal(full, ids.reshape(sizes))
        merged = reshaped(split, (2, *sizes), (2, total))
        assert merged is not None and np.array_equal(merged.ids, ids)
    else:
        assert total == 1
