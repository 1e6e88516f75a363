"""Random networks made of all rule families: the proof holds and nothing is forgotten."""

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxslim_kd import Amount, Choice, api
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
]


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


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    blocks=st.lists(st.tuples(st.sampled_from(BLOCKS), st.integers(1, 9)), max_size=7),
    ratio=st.sampled_from([0.0, 0.3, 0.5, 0.9]),
    criterion=st.sampled_from(["l1", "geometric-median", "random"]),
    seed=st.integers(0, 3),
)
def test_random_networks(
    blocks: list[tuple[str, int]], ratio: float, criterion: str, seed: int
) -> None:
    model = build(network(blocks), seed)
    choice = Choice(pattern=".*", ratio=ratio, criterion=criterion, amount=Amount(round_to=1))
    result = api.prune(model, choice)
    structure(result.model)
    assert not result.plan.approximate
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
