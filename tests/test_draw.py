import xml.etree.ElementTree as ET

import pytest
from merge_models import net

from onnxslim_kd.boxes import fold
from onnxslim_kd.draw import draw
from onnxslim_kd.model import load
from onnxslim_kd.passes.merge import merge

SVG = "{http://www.w3.org/2000/svg}"


def modular(blocks=4, **options):
    """The small net with its nodes in modules of torch's older exporter."""
    model = net(**options)
    for index, node in enumerate(model.graph):
        node.name = f"/stage{index // 3}/{node.op_type}_{index}"
    return model


@pytest.fixture
def merged():
    return merge(modular(), modular(width=6, seed=1), ["kl:y=y", "at:r1=r1", "dkd:y=y"])


def titles(lane):
    return [box.title for box in lane]


def test_a_lane_for_each_network_and_for_the_losses(merged):
    folded = fold(merged)
    assert list(folded.lanes) == ["student", "losses", "teacher"]
    assert titles(folded.lanes["student"]) == ["stage0", "stage1", "stage2"]
    assert titles(folded.lanes["teacher"]) == ["stage0", "stage1", "stage2"]
    assert titles(folded.lanes["losses"]) == ["kl", "at", "dkd", "loss"]


def test_every_node_and_every_weight_is_in_one_box(merged):
    folded = fold(merged)
    assert sum(len(box.nodes) for box in folded.boxes) == len(merged.graph)
    weights = [sum(box.parameters for box in lane) for lane in folded.lanes.values()]
    assert weights == [4 * 27 + 16 * 9 + 20, 0, 6 * 27 + 36 * 9 + 30]


def test_edges_follow_the_values(merged):
    folded = fold(merged)
    boxes = folded.boxes
    edges = {
        (boxes[a].lane, boxes[a].title, boxes[b].title): [v.name for v in values]
        for (a, b), values in folded.edges.items()
    }
    assert edges["student", "stage0", "at"] == ["r1"]
    assert edges["teacher", "stage2", "kl"] == ["teacher_y"]
    assert ("student", "stage0", "stage1") in edges
    assert [boxes[i].title for i in folded.inputs[merged.graph.inputs[0]]] == ["stage0"] * 2


def test_without_modules_the_map_size_folds():
    folded = fold(load(net()))
    assert titles(folded.lanes["student"]) == ["8 x 8", "4 x 4", "1 x 1", "2 dimensions"]


def test_without_sizes_the_channels_fold():
    folded = fold(load(net(size="S")))
    assert titles(folded.lanes["student"]) == ["4 channels", "1 x 1", "2 dimensions"]


def test_few_boxes_are_asked_for():
    assert len(fold(load(net()), most=3).boxes) == 3


def test_the_picture_is_svg_with_names_for_hovering(merged):
    root = ET.fromstring(draw(merged))
    text = [element.text for element in root.iter(f"{SVG}text")]
    assert {"stage0", "kl", "loss", "label int64[N]", "y float[N,5]"} <= set(text)
    hover = [element.text for element in root.iter(f"{SVG}title")]
    assert "r1 float[N,4,8,8]" in hover
    width, height = float(root.get("width")), float(root.get("height"))
    for rect in root.iter(f"{SVG}rect"):
        if rect.get("x") is not None:
            assert 0 <= float(rect.get("x")) <= width - float(rect.get("width"))
            assert 0 <= float(rect.get("y")) <= height - float(rect.get("height"))


def test_boxes_do_not_overlap(merged):
    root = ET.fromstring(draw(merged))
    corners = [
        (float(rect.get("x")), float(rect.get("y")))
        for group in root.iter(f"{SVG}g")
        for rect in group.iter(f"{SVG}rect")
        if group.get("class").startswith("box")
    ]
    for i, (x, y) in enumerate(corners):
        assert all(x != x2 or abs(y - y2) >= 44 for x2, y2 in corners[i + 1 :])


def test_names_are_escaped():
    model = net()
    model.graph.outputs[0].name = "a<b>&c"
    assert "a&lt;b&gt;&amp;c" in draw(model)
    ET.fromstring(draw(model))
