import pytest
from merge_models import HEADER, net, text

from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.losses import LOSSES
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.passes.suggest import suggest


def by_kind(*pair, **options):
    found = {}
    for suggestion in suggest(*pair, **options):
        found.setdefault(suggestion.kind, []).append(suggestion)
    return found


def test_best_first_and_like_with_like():
    found = suggest(net(), net(width=6, seed=1))
    assert [s.score for s in found] == sorted((s.score for s in found), reverse=True)
    kinds = by_kind(net(), net(width=6, seed=1))
    assert kinds["kl"][0].text == "kl:y=y"
    assert kinds["kl"][0].shapes == ("float[N,5]", "float[N,5]")
    assert kinds["ce"][0].text == "ce:y"
    assert {s.text for s in kinds["at"]} == {"at:r1=r1", "at:r2=r2"}
    assert kinds["afd"][0].text == "afd:r1+r2=r1+r2"


def test_other_widths_get_a_trained_layer():
    kinds = by_kind(net(), net(width=6, seed=1))
    assert "l2:r2=r2,align=conv" in [s.text for s in kinds["l2"]]
    assert all(s.align is None for s in by_kind(net(), net(seed=1))["l2"])


def test_what_is_suggested_can_be_merged():
    student, teacher = net(), net(width=6, seed=1)
    found = suggest(student, teacher)
    assert {s.kind for s in found} >= set(LOSSES) - {"fsp", "yolov3", "custom"}
    merged = merge(student, teacher, [s.text for s in found])
    assert len(merged.graph.outputs) == len(found) + 2


def test_a_number_for_the_whole_batch_is_passed_over():
    source = HEADER.format(opset=17) + (
        "s (float[N,4] x) => (float[N,3] y, float m) <float[4,3] w>"
        " { y = MatMul(x, w)  m = ReduceMean<keepdims=0>(y) }"
    )
    assert {s.text for s in by_kind(text(source), text(source))["l2"]} >= {"l2:m=m"}


def test_the_input_of_a_final_softmax_is_suggested():
    source = net()
    proto = HEADER.format(opset=17) + (
        "s (float[N,4] x) => (float[N,3] p) <float[4,3] w> { z = MatMul(x, w)  p = Softmax(z) }"
    )
    assert by_kind(text(proto), text(proto))["kl"][0].text == "kl:z=z"
    assert "kl" not in by_kind(text(proto), source)  # 3 classes and 5


def test_windows_and_time_steps_are_no_samples():
    source = HEADER.format(opset=17) + (
        "s (float[N,7,4] x) => (float[N,7,3] y) <float[4,3] w> { t = Transpose<perm=[1,0,2]>(x)"
        "  r = Relu(t)  a = Add(r, t)  b = Mul(a, r) u = Transpose<perm=[1,0,2]>(b)"
        "  y = MatMul(u, w) }"
    )
    names = {name for s in suggest(text(source), text(source)) for name in s.student}
    assert not names & {"t", "r", "a", "b"}


def test_at_most():
    assert all(len(some) <= 1 for some in by_kind(net(), net(), most=1).values())


def test_no_layer_as_large_as_a_map_squared_is_suggested():
    source = (
        HEADER.format(opset=17)
        + """
        net (float[N,3,512,512] x) => (float[N,4,512,512] y)
        <float[4,3,1,1] w1> { y = Conv(x, w1) }
    """
    )
    student = text(source)
    kinds = by_kind(student, student)
    assert "pefd" not in kinds
    assert "kl" in kinds
    with pytest.raises(UserError, match="loss pefd would train a layer of 1048576 x 1048576"):
        merge(student, student, ["pefd:y=y"])
