"""What real models taught: each a small graph that once was refused, tied too widely, or wrong."""

from collections.abc import Callable

import numpy as np
import pytest

from onnxslim_kd import Amount, Choice, Reading, api
from onnxslim_kd.cost import cost
from onnxslim_kd.errors import ModelError, NotFoundError, UserError
from onnxslim_kd.passes.channels import Attention
from tests.models import Case, build

ALL = Choice(pattern=".*", ratio=0.5, amount=Amount(round_to=1))
TOKENS = {"inputs": "float[N,T,6] x", "outputs": "float[N,T,6] y"}
SIZES = "sx = Shape(x) n = Slice(sx, zero, one) len = Slice(sx, one, two)"
NUMBERS = (
    "zero = Constant<value_ints=[0]>() one = Constant<value_ints=[1]>()"
    " two = Constant<value_ints=[2]>() three = Constant<value_ints=[3]>()"
    " four = Constant<value_ints=[4]>() eight = Constant<value_ints=[8]>()"
    f" last = Constant<value_ints=[-1]>() {SIZES}"
)
SPLIT = "p = MatMul(x, w1) st = Concat<axis=0>(n, len, four, two) g = Reshape(p, st)"
ATTEND = "fk = Transpose<perm=[0,2,1]>(f) fs = MatMul(f, fk) a = MatMul(fs, f)"
JOIN = "sj = Concat<axis=0>(n, len, last) j = Reshape(c, sj) y = MatMul(j, w2)"
WEIGHTS = "float[6,8] w1, float[8,6] w2"

CASES = {
    # FocalNet: a gate of one channel, cut out of a wider layer, is repeated over all channels
    "one-channel-repeated": Case(
        "h = Conv(x, w1) zero = Constant<value_ints=[0]>() one = Constant<value_ints=[1]>()"
        " eight = Constant<value_ints=[8]>() nine = Constant<value_ints=[9]>()"
        " a = Slice(h, zero, eight, one) g = Slice(h, eight, nine, one)"
        " m = Mul(a, g) y = Conv(m, w2)",
        "float[9,3,1,1] w1, float[4,8,1,1] w2",
        units={"w1": 8},
    ),
    # BLOOM: batch * heads in one axis, and the batch read back as that axis / heads
    "batch-times-heads": Case(
        f"{NUMBERS} {SPLIT} t = Transpose<perm=[0,2,1,3]>(g) b = Mul(n, four)"
        f" sf = Concat<axis=0>(b, len, two) f = Reshape(t, sf) {ATTEND} sb = Shape(a)"
        " bh = Slice(sb, zero, one) back = Div(bh, four)"
        " su = Concat<axis=0>(back, four, len, two) u = Reshape(a, su)"
        f" c = Transpose<perm=[0,2,1,3]>(u) {JOIN}",
        WEIGHTS,
        **TOKENS,
        units={"w1": 4},
    ),
    # ViT by the dynamo exporter: a token expanded over the batch gives the batch channels, too
    "token-and-flat-heads": Case(
        f"{NUMBERS} six = Constant<value_ints=[6]>() se = Concat<axis=0>(n, one, six)"
        " e = Expand(w3, se) z = Concat<axis=1>(e, x) p = MatMul(z, w1) sz = Shape(z)"
        " more = Slice(sz, one, two) st = Concat<axis=0>(n, more, four, two) g = Reshape(p, st)"
        " t = Transpose<perm=[0,2,1,3]>(g) sf = Concat<axis=0>(last, more, two)"
        f" f = Reshape(t, sf) {ATTEND} su = Concat<axis=0>(n, four, more, two) u = Reshape(a, su)"
        " c = Transpose<perm=[0,2,1,3]>(u) sj = Concat<axis=0>(n, more, last) j = Reshape(c, sj)"
        " y = MatMul(j, w2)",
        f"{WEIGHTS}, float[1,1,6] w3",
        inputs="float[N,T,6] x",
        outputs="float[N,U,6] y",
        units={"w1": 4},
    ),
    # Qwen3: a norm inside of every head does not tie the heads
    "norm-inside-heads": Case(
        f"{NUMBERS} {SPLIT} s = Mul(g, g) m = ReduceMean(s, last) r = Sqrt(m) c = Div(g, r) {JOIN}",
        WEIGHTS,
        **TOKENS,
        units={"w1": 4},
    ),
    # Phi, GPT-NeoX: only a part of every head is rotated
    "partial-rotation": Case(
        f"{NUMBERS} p = MatMul(x, w1) st = Concat<axis=0>(n, len, four, four) g = Reshape(p, st)"
        " a = Slice(g, zero, two, three) b = Slice(g, two, four, three)"
        f" r = Mul(a, w3) c = Concat<axis=3>(r, b) {JOIN}",
        "float[6,16] w1, float[16,6] w2, float[2] w3",
        **TOKENS,
        units={"w1": 4},
    ),
    # BiT: weights standardised by a BatchNormalization in training mode
    "standardised-weights": Case(
        "sw = Constant<value_ints=[1,8,27]>() f = Reshape(w1, sw)"
        " o, m, v = BatchNormalization<training_mode=1>(f, w3, w4, w5, wpos6)"
        " sb = Constant<value_ints=[8,3,3,3]>() k = Reshape(o, sb)"
        " h = Conv<pads=[1,1,1,1]>(x, k) y = Conv(h, w2)",
        "float[8,3,3,3] w1, float[4,8,1,1] w2, float[8] w3, float[8] w4, float[8] w5,"
        " float[8] wpos6",
        units={"w3": 8},
    ),
    # ONNX Runtime's QOperator format: the weight of QLinearConv is its fourth input
    "grouped-qlinear-conv": Case(
        "h = Conv(x, w1) q = QuantizeLinear(h, wpos5, wz6)"
        " a = QLinearConv<group=2>(q, wpos5, wz6, w3, wpos7, wz8, wpos5, wz6)"
        " t = DequantizeLinear(a, wpos5, wz6) y = Conv(t, w2)",
        "float[8,3,1,1] w1, float wpos5, uint8 wz6, int8[8,4,1,1] w3, float[8] wpos7, int8[8] wz8,"
        " float[4,8,1,1] w2",
        units={"w1": 4, "w3": 4},
    ),
    # the numbers of half precision are proven to fewer digits
    "half-precision": Case(
        "h = Conv<pads=[1,1,1,1]>(x, w1) r = Relu(h) a = Conv<pads=[1,1,1,1]>(r, w3)"
        " b = Conv<pads=[1,1,1,1]>(a, w4) y = Conv(b, w2)",
        "float16[32,3,3,3] w1, float16[64,32,3,3] w3, float16[64,64,3,3] w4, float16[4,64,1,1] w2",
        inputs="float16[N,3,8,8] x",
        outputs="float16[N,4,8,8] y",
        units={"w1": 32},
    ),
    # one shuffle after another: the source of the second one has become a Gather
    "shuffle-twice": Case(
        "h = Conv(x, w1) s = Constant<value_ints=[0,2,3,8,8]>()"
        " r = Constant<value_ints=[0,6,8,8]>()"
        " a = Reshape(h, s) b = Transpose<perm=[0,2,1,3,4]>(a) c = Reshape(b, r)"
        " d = Reshape(c, s) e = Transpose<perm=[0,2,1,3,4]>(d) f = Reshape(e, r) y = Conv(f, w2)",
        "float[6,3,1,1] w1, float[4,6,1,1] w2",
        units={"w1": 6},
    ),
    # Conditional DETR: a channel is split off and squeezed, so that there must be one
    "single-channels-split-off": Case(
        f"{NUMBERS} p = MatMul(x, w1) a, b = Split<axis=2,num_outputs=2>(p) c = Squeeze(a, two)"
        " d = Unsqueeze(c, two) e = Mul(d, w2) f = Mul(b, w3) y = Add(e, f)",
        "float[6,2] w1, float[6] w2, float[6] w3",
        **TOKENS,
        units={"w1": 1},
    ),
    # Phi3: a rotation of all of every head passes nothing by
    "empty-slice": Case(
        f"{NUMBERS} p = MatMul(x, w1) st = Concat<axis=0>(n, len, four, two) g = Reshape(p, st)"
        " a = Slice(g, zero, two, three) b = Slice(g, two, four, three)"
        f" r = Mul(a, w3) c = Concat<axis=3>(r, b) {JOIN}",
        f"{WEIGHTS}, float[2] w3",
        **TOKENS,
        units={"w1": 4},
    ),
    # Deformable DETR: data and positions are sampled for batch * heads
    "sampled-per-head": Case(
        f"{NUMBERS} p = MatMul(x, w1) st = Concat<axis=0>(n, len, four, two) g = Reshape(p, st)"
        " t = Transpose<perm=[0,2,3,1]>(g) sf = Concat<axis=0>(last, two, len, one)"
        " f = Reshape(t, sf) q = MatMul(x, w3) u = Reshape(q, st) v = Transpose<perm=[0,2,1,3]>(u)"
        " sg = Concat<axis=0>(last, len, one, two) h = Reshape(v, sg) k = GridSample(f, h)"
        " su = Concat<axis=0>(n, four, two, len) m = Reshape(k, su)"
        f" c = Transpose<perm=[0,3,1,2]>(m) {JOIN}",
        f"{WEIGHTS}, float[6,8] w3",
        **TOKENS,
        units={"w1": 4, "w3": 4},
    ),
    # ResNeSt, SKNet: a softmax chooses between parts; their channels stay apart
    "softmax-over-parts": Case(
        f"{NUMBERS} p = MatMul(x, w1) st = Concat<axis=0>(n, len, two, four) g = Reshape(p, st)"
        f" s = Softmax<axis=2>(g) c = Mul(s, g) {JOIN}",
        WEIGHTS,
        **TOKENS,
        units={"w1": 4},
    ),
}

WHOLE = {"single-channels-split-off"}
"""What keeps everything, for every part of it is the last one."""

FUSED = {
    # BLIP, ViT: Q, K and V out of one product, told apart by index
    "fused-by-part": ("three, four, two", "[2,0,3,1,4]", 0),
    # BLOOM, Falcon: the same inside of every head
    "fused-by-head": ("four, three, two", "[0,2,3,1,4]", 2),
}


def test_a_vector_of_several_layers_is_cut_for_each() -> None:
    """RT-DETR: a plan told a vector's use by its name alone."""
    case = Case(
        'a = Einsum<equation="nt,c->ntc">(x, w1) b = Einsum<equation="nt,c->ntc">(x, w1)'
        " c = MatMul(a, w2) d = MatMul(b, w3) y = Add(c, d)",
        "float[8] w1, float[8,4] w2, float[8,4] w3",
        inputs="float[N,5] x",
        outputs="float[N,5,4] y",
    )
    done = api.prune(build(case), ALL)
    assert [m.kept is not None for g in done.plan.groups for m in g.members].count(True) == 2


def test_a_vector_along_several_groups_kills_none() -> None:
    """What comes first in the concatenation must stay: the norm has channels of the other alone."""
    case = Case(
        "a = Conv(x, w1) b = Conv<pads=[1,1,1,1]>(a, w2)"
        " c = Concat<axis=1>(z, b) n = BatchNormalization(c, w3, w4, w5, wpos6) y = Conv(n, w7)",
        "float[8,3,1,1] w1, float[3,8,3,3] w2, float[4] w3, float[4] w4, float[4] w5,"
        " float[4] wpos6, float[4,4,1,1] w7",
        inputs="float[N,3,8,8] x, float[N,1,8,8] z",
    )
    for score in ("first", "mean"):
        choice = Choice(pattern=".*", ratio=0.99, group_score=score, amount=Amount(round_to=1))
        done = api.prune(build(case), choice)
        assert done.model.graph.initializers["w2"].shape == [1, 1, 3, 3]
        assert sorted(group.units for group in done.plan.groups) == [3, 8]


@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("name", FUSED)
def test_parts_of_one_product_lose_the_same(name: str, attention: Attention) -> None:
    grid, perm, axis = FUSED[name]
    body = (
        f"{NUMBERS} p = MatMul(x, w1) st = Concat<axis=0>(n, len, {grid}) g = Reshape(p, st)"
        f" t = Transpose<perm={perm}>(g) i = Constant<value_int=0>() h = Constant<value_int=1>()"
        f" d = Constant<value_int=2>() q = Gather<axis={axis}>(t, i) k = Gather<axis={axis}>(t, h)"
        f" v = Gather<axis={axis}>(t, d)"
    )
    case = Case(
        f"{body} kt = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, kt) a = MatMul(s, v)"
        f" c = Transpose<perm=[0,2,1,3]>(a) {JOIN}",
        "float[6,24] w1, float[8,6] w2",
        **TOKENS,
    )
    analysis = api.inspect(build(case), Reading(attention=attention))
    birth = next(p.birth for p in analysis.parameters if p.name == "w1" and p.produces)
    assert len(np.unique(analysis.labels(birth))) == (4 if attention == "heads" else 2)
    done = api.prune(build(case), ALL, reading=Reading(attention=attention))
    assert done.model.graph.initializers["w1"].shape == [6, 12]


@pytest.mark.parametrize("name", CASES)
def test_the_cut_is_proven_and_as_fine_as_can_be(name: str) -> None:
    case = CASES[name]
    analysis = api.inspect(build(case))
    for parameter, expected in case.units.items():
        births = [p.birth for p in analysis.parameters if p.name == parameter]
        labels = np.unique(analysis.labels(births[0]))
        assert sum(int(x) not in analysis.components.pinned for x in labels) == expected
    done = api.prune(build(case), ALL)
    assert (done.after.parameters < done.before.parameters) == (name not in WHOLE)


def test_a_dynamic_dimension_times_heads_stays_dynamic() -> None:
    """Qwen 3 of ONNX Runtime GenAI: the norm inside of the heads sees tokens times heads."""
    case = Case(
        "s = Constant<value_ints=[0,-1,2]>() t = Constant<value_ints=[0,-1,8]>()"
        " h = MatMul(x, w1) g = Reshape(h, s) m = Mul(g, w2) j = Reshape(m, t) y = MatMul(j, w3)",
        "float[6,8] w1, float[2] w2, float[8,4] w3",
        inputs="float[N,T,6] x",
        outputs="float[N,T,4] y",
    )
    done = api.prune(build(case), ALL)
    shape = {v.name: v.shape for node in done.model.graph for v in node.outputs}
    assert shape["h"][2] == shape["j"][2] == 4
    assert not isinstance(shape["g"][1], int) and not isinstance(shape["m"][1], int)


def test_sound_is_long_enough_for_its_strides() -> None:
    """wav2vec 2: of a short sample no frame was left, and no shape behind it was known."""
    case = Case(
        "s = Constant<value_ints=[0,-1,2,4]>() t = Constant<value_ints=[0,-1,8]>()"
        " a = Conv<strides=[9]>(x, w1) b = Conv<strides=[2]>(a, w2) c = Transpose<perm=[0,2,1]>(b)"
        " d = Reshape(c, s) e = Relu(d) f = Reshape(e, t) y = MatMul(f, w3)",
        "float[6,1,9] w1, float[8,6,3] w2, float[8,4] w3",
        inputs="float[N,1,T] x",
        outputs="float[N,F,4] y",
    )
    plan = api.plan(build(case), ALL)
    assert {r.parameter: r.reason for r in plan.refused} == {"w3": "graph output y"}
    assert [group.removed for group in plan.groups] == [3, 2]


def test_outputs_keep_their_symbols() -> None:
    """YOLOS: after the cut inference knows a dimension that the interface leaves open."""
    done = api.prune(build(CASES["norm-inside-heads"]), ALL)
    assert [str(d) for d in done.model.graph.outputs[0].shape or ()] == ["N", "T", "6"]


def test_every_axis_of_an_output_has_its_own_reason() -> None:
    """ViT: the classes were said to be pinned by what the batch meets."""
    done = api.prune(build(CASES["token-and-flat-heads"]), ALL)
    assert {r.parameter: r.reason for r in done.plan.refused} == {"w2": "graph output y"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "c = ReduceSum<keepdims=0>(x) d = Cast<to=9>(c)"
            " y = If(d) <then_branch = a () => (float[N] u) { u = Mul(x, w1) },"
            " else_branch = b () => (float[N] v) { v = Mul(x, w1) }>",
            "every layer with weights is in a body of If, and bodies are left whole",
        ),
        ("y = MatMulNBits(x, w1)", "there is no rule for MatMulNBits"),
        ("y = Relu(x)", "no node of the model has a weight with channels"),
    ],
)
def test_a_model_without_parameters_says_so(body: str, reason: str) -> None:
    case = Case(body, "float[1] w1", inputs="float[N] x", outputs="float[N] y")
    with pytest.raises(NotFoundError, match=f"nothing can be pruned: {reason}"):
        api.prune(build(case), ALL)


def test_every_weight_that_stays_is_named_with_its_reason() -> None:
    """Weights inside of bodies, and those behind others' slices of an operator without a rule."""
    branch = "{0} = Conv(x, {1})"
    case = Case(
        "c = ReduceSum<keepdims=0>(x) d = Cast<to=9>(c)"
        f" h = If(d) <then_branch = a () => (float[N,8,6,6] u) {{ {branch.format('u', 'w1')} }},"
        f" else_branch = b () => (float[N,8,6,6] v) {{ {branch.format('v', 'w2')} }}>"
        " one = Constant<value_ints=[1]>() nine = Constant<value_ints=[9]>()"
        " k = Slice(w3, one, nine, one) z = DeformConv(h, k, o) y = Relu(z)",
        "float[8,3,3,3] w1, float[8,3,3,3] w2, float[4,9,1,1] w3",
        inputs="float[N,3,8,8] x, float[N,2,6,6] o",
    )
    analysis = api.inspect(build(case))
    reasons = {p.name: analysis.refusal(p) for p in analysis.parameters if p.produces}
    assert reasons == {
        "w1": "captured by the body of If If_2",
        "w2": "captured by the body of If If_2",
        "w3": "no rule for DeformConv DeformConv_4",
    }
    assert cost(analysis.model, analysis.shapes).parameters == 2 * 8 * 27 + 36


def test_heads_that_a_factor_does_not_have_leave_the_dims() -> None:
    """ConditionalDETR, Swin v2: scores whose heads stay, times values of which dims can go."""
    case = Case(
        "v = MatMul(x, w1) a = Constant<value_ints=[0,0,4,4]>() b = Reshape(v, a)"
        " c = Transpose<perm=[0,2,1,3]>(b) d = MatMul(s, c) e = Transpose<perm=[0,2,1,3]>(d)"
        " f = Constant<value_ints=[0,0,16]>() g = Reshape(e, f) y = MatMul(g, w2)",
        "float[8,16] w1, float[16,8] w2",
        inputs="float[N,T,8] x, float[N,4,T,T] s",
        outputs="float[N,T,8] y",
    )
    done = api.prune(build(case), ALL)
    assert done.plan.groups[0].units == 4
    assert done.after.macs < 0.6 * done.before.macs


def test_a_model_that_never_ran_is_told_so() -> None:
    """What exporters get wrong is not ours: here 4 channels meet 8."""
    case = Case(
        "a = MatMul(x, w1) b = MatMul(a, w2) c = Concat<axis=1>(a, b) d = MatMul(x, w3)"
        " s = Constant<value_ints=[-1,2,4]>() e = Reshape(d, s) f = Mul(e, c) y = MatMul(f, w4)",
        "float[6,8] w1, float[8,8] w2, float[6,8] w3, float[8,4] w4",
        inputs="float[N,6] x",
        outputs="float[N,2,4] y",
    )
    with pytest.raises(ModelError, match="ONNX Runtime refuses the model"):
        api.prune(build(case), ALL)


def test_a_static_model_says_all_its_shapes_after_the_cut() -> None:
    """ShuffleNet: ONNX does not follow the bounds of its Slices; an open output stays open."""
    case = Case(
        "h = Conv(x, w1) s = Shape(h) one = Constant<value_ints=[1]>()"
        " two = Constant<value_ints=[2]>() zero = Constant<value_ints=[0]>()"
        " c = Gather(s, one) half = Div(c, two) a = Slice(h, zero, half, one)"
        " b = Slice(h, half, c, one) r = Relu(b) m = Concat<axis=1>(a, r) y = Conv(m, w2)",
        "float[8,3,1,1] w1, float[4,8,1,1] w2",
        inputs="float[1,3,4,4] x",
        outputs="float[N,4,4,4] y",
    )
    done = api.prune(build(case), ALL)
    shape = {v.name: v.shape for node in done.model.graph for v in node.outputs}
    assert shape["a"] == shape["b"] == shape["r"] == [1, 2, 4, 4]
    assert not isinstance(shape["y"][0], int)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Choice(pattern="w", group_score="median"), "group-score 'median' is not one of"),
        (lambda: Choice(pattern="w", allocation="fair"), "allocation 'fair' is not one of uniform"),
        (lambda: Amount(selector="half"), "selector 'half' is not one of share, energy"),
        (lambda: Reading(attention="all"), "attention 'all' is not one of auto, heads, dims"),
    ],
)
def test_a_word_that_is_none_of_those_known_is_refused(
    make: Callable[[], object], text: str
) -> None:
    with pytest.raises(UserError, match=text):
        make()
