from merge_models import HEADER, net, text

from onnxslim_kd.model import load
from onnxslim_kd.passes.suggest import suggest
from onnxslim_kd.values import Row, listing, side_by_side


def test_listing_has_names_types_and_depth():
    rows = listing(load(net()))
    assert [row.name for row in rows] == ["c1", "r1", "c2", "r2", "g", "f", "y"]
    assert rows[1] == Row("r1", "float[N,4,8,8]", "Relu", 0.333)
    assert [row.depth for row in rows] == [0.333, 0.333, 0.667, 0.667, 0.667, 0.667, 1.0]


def test_side_by_side_aligns_operators_and_sizes():
    rows = side_by_side(net(), net(width=6, y="z"))
    assert [(a.name, b.name) for a, b in rows] == [
        ("c1", "c1"), ("r1", "r1"), ("c2", "c2"), ("r2", "r2"), ("g", "g"), ("f", "f"), ("y", "z"),
    ]  # fmt: skip


def test_side_by_side_leaves_gaps():
    rows = side_by_side(net(size=8), net(size=16))
    assert (None, None) not in rows
    assert any(a is None for a, _ in rows)
    assert any(b is None for _, b in rows)
    assert [a.name for a, _ in rows if a] == [b.name for _, b in rows if b]


def test_sequences_are_no_values_for_losses():
    model = text(
        HEADER.format(opset=17) + "g (float[N,4] x) => (float[N,4] y, seq(float[]) s)"
        " { y = Relu(x)  s = SplitToSequence<axis=1>(y) }"
    )
    assert [row.name for row in listing(load(model))] == ["y"]
    assert {s.student for s in suggest(model, model)} == {("y",)}
