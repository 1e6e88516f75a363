"""Specs of losses: what is read, what is refused, what a built loss leaves in the graph."""

import numpy as np
import onnx_ir as ir
import pytest
from losses_models import loss_model, value

from onnxslim_kd.errors import ModelError, NotFoundError, UserError
from onnxslim_kd.passes import losses
from onnxslim_kd.passes.losses import LossSpec, from_mapping, parse
from onnxslim_kd.passes.scope import Labels, Scope
from onnxslim_kd.roles import Label, Mask


def test_parse_everything():
    spec = parse("dkd:a.tmp_1=b/c:0,temperature=4,beta=8,weight=0.5,start=2,end=9,name=my.dkd-1")
    assert spec == LossSpec(
        kind="dkd",
        student=("a.tmp_1",),
        teacher=("b/c:0",),
        name="my.dkd-1",
        weight=0.5,
        start_epoch=2,
        end_epoch=9,
        options={"temperature": 4.0, "beta": 8.0},
    )


@pytest.mark.parametrize(
    ("text", "student", "teacher"),
    [
        ("l2:a=b", ("a",), ("b",)),
        ("fsp:a+b=c+d", ("a", "b"), ("c", "d")),
        ("ce:a", ("a",), ()),
        ("ce", (), ()),
        ("ce,epsilon=0.1", (), ()),
    ],
)
def test_parse_values(text, student, teacher):
    spec = parse(text)
    assert (spec.student, spec.teacher) == (student, teacher)


def test_options_are_typed():
    assert parse("dml:a=b,act=none,sum_across_class_dim=true").options == {
        "act": None,
        "sum_across_class_dim": True,
    }
    assert parse("skd:a=b,multiplier=None").options == {"multiplier": None}
    assert parse("afd:a=b,qk_dim=64").options == {"qk_dim": 64}
    assert parse("yolov3:a=b").weight == 1000
    assert parse("yolov3:a=b,weight=1").weight == 1


def test_mapping_is_the_same_as_text():
    given = {
        "kind": "fsp",
        "student": ["a", "b"],
        "teacher": ["c", "d"],
        "weight": 2,
        "start_epoch": 1,
        "end_epoch": None,
    }
    assert from_mapping(given) == parse("fsp:a+b=c+d,weight=2,start=1,end=none")
    assert from_mapping({"kind": "kl", "student": "a+b", "teacher": "c=d"}).student == ("a+b",)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("klx:a=b", NotFoundError, r"loss 'klx' is not one of l1, .*; near misses: kl"),
        ("", NotFoundError, "loss '' is not one of l1"),
        ("kl:a=b,temprature=3", NotFoundError, "no option 'temprature'; near misses: temperature"),
        ("kl:a=b,beta=3", NotFoundError, "it takes temperature, reduction, axis, align, weight"),
        ("kl:a=b,temperature=0", UserError, "loss kl: temperature cannot be '0': Input should be"),
        ("kl:a=b,temperature=inf", UserError, "temperature cannot be 'inf'"),
        ("kl:a=b,temperature=hot", UserError, "temperature cannot be 'hot': .* valid number"),
        ("kl:a=b,weight=nan", UserError, "weight cannot be 'nan'"),
        ("kl:a=b,start=-1", UserError, "start cannot be '-1'"),
        ("kl:a=b,end=1.5", UserError, "end cannot be '1.5'"),
        ("kl:a=b,start=5,end=5", UserError, "loss kl: it ends at epoch 5 and starts at 5"),
        ("kl:a=b,name=a b", UserError, "name cannot be 'a b'"),
        ("l2:a=b,act=tanh", UserError, "act cannot be 'tanh': Input should be 'softmax' or"),
        (
            "l2:a=b,align=stretch",
            UserError,
            "align cannot be 'stretch': .* one of conv, linear, pool, res",
        ),
        ("l2:a=b,weight", UserError, "--loss l2:a=b,weight: 'weight' is not option=value"),
        ("l2:a=b,weight=1,weight=2", UserError, "weight is given twice"),
        ("l2:a=b,start=1,start_epoch=2", UserError, "start_epoch is given twice"),
        ("l2:a+=b", UserError, r"'a\+=b' is not s1\+s2=t1\+t2"),
        ("l2:a=b=c", UserError, "'a=b=c' is not"),
        ("l2:=b", UserError, "'=b' is not"),
        ("l2:a=", UserError, "'a=' is not"),
        ("l2:a=b,student=c", UserError, "student is given twice"),
    ],
)
def test_refusals_of_text(text, error, message):
    with pytest.raises(error, match=message):
        parse(text)


def test_refusals_of_mappings():
    with pytest.raises(NotFoundError, match="loss None is not one of"):
        from_mapping({"student": "a"})
    with pytest.raises(UserError, match="student cannot be 3"):
        from_mapping({"kind": "l2", "student": 3})


@pytest.mark.parametrize(
    ("text", "shapes", "error", "message"),
    [
        ("l2:s", {"s": (2, 3)}, UserError, "loss l2 names no teacher value; write l2:s=t"),
        ("l2", {}, UserError, "loss l2 names no student value; write l2:s=t"),
        (
            "l2:s+s=t",
            {"s": (2, 3), "t": (2, 3)},
            UserError,
            "loss l2 compares pairs, got 2 student and 1 teacher values",
        ),
        (
            "l2:s=t",
            {"s": ("N", 8, 4, 4), "t": ("N", 16, 4, 4)},
            UserError,
            r"loss l2: 's' is \[N,8,4,4\] and 't' is \[N,16,4,4\], which must agree; choose other"
            r" values or pass align=conv, linear, pool or resize",
        ),
        ("l2:s=t", {"s": ("N", 8), "t": ("N", 8, 1)}, UserError, "which must agree"),
        (
            "mgd:s=t",
            {"s": (2, 8, 4, 4), "t": (2, 8, 2, 2)},
            UserError,
            "must agree besides the channels",
        ),
        ("rkd_angle:s=t", {"s": (2, 8), "t": (3, 8)}, UserError, "which must agree"),
        ("l2:s=t,align=conv", {"s": (2, 3), "t": (2, 4)}, UserError, "try align=linear"),
        ("l2:s=t,align=pool", {"s": (2, 3), "t": (2, 4)}, UserError, "align=pool needs maps"),
        ("l2:s=t,align=resize", {"s": (2, 3), "t": (2, 4)}, UserError, "align=resize needs maps"),
        (
            "l2:s=t,align=pool",
            {"s": (2, 3, 8, 8), "t": (2, 3, "h", 4)},
            ModelError,
            "axis 2 of 't' has no fixed size",
        ),
        ("ce:s", {"s": ("N", "C")}, ModelError, "axis 1 of 's' has no fixed size"),
        ("ce:s=t,epsilon=0.1", {"s": (2, 3), "t": (2, 3)}, UserError, "not with a teacher"),
        ("kl:s=t,axis=2", {"s": (2, 3), "t": (2, 3)}, UserError, "axis 2 is not one of 's'"),
        ("dist:s=t", {"s": (2, 3, 4), "t": (2, 3, 4)}, UserError, "loss dist needs logits"),
        ("cwd:s=t", {"s": (2, 3), "t": (2, 3)}, UserError, "loss cwd needs maps"),
        ("at:s=t", {"s": (2, 3), "t": (2, 3)}, UserError, "loss at needs maps"),
        ("mgd:s=t", {"s": (2, 3), "t": (2, 3)}, UserError, "loss mgd needs maps"),
        ("afd:s=t", {"s": (2, 3), "t": (2, 3)}, UserError, "loss afd needs maps"),
        ("overhaul:s=t", {"s": (2, 3), "t": (2, 3)}, UserError, "loss overhaul needs maps"),
        ("fsp:s=t", {"s": (2, 3, 4, 4), "t": (2, 3, 4, 4)}, UserError, r"fsp:s1\+s2=t1\+t2, got 1"),
        ("fsp:s+s=t+t", {"s": (2, 3), "t": (2, 3)}, UserError, "loss fsp needs maps"),
        (
            "fsp:s+s=t+t",
            {"s": (2, 3, 4, 4), "t": (2, 5, 4, 4)},
            UserError,
            r"has channels \[3, 3\], 't' x 't' \[5, 5\]",
        ),
        (
            "yolov3:s=t,classes=2",
            {"s": (2, 22, 4, 4), "t": (2, 22, 4, 4)},
            UserError,
            r"'s' is \[2,22,4,4\], not \[N, A \(5 \+ C\), H, W\] for 3 anchors and 2 classes",
        ),
    ],
)
def test_refusals_of_shapes(text, shapes, error, message):
    with pytest.raises(error, match=message):
        loss_model(text, shapes)


def graph_with(dtype=ir.DataType.FLOAT, *names):
    inputs = [ir.val(name, dtype, ir.Shape(["N", 6])) for name in names or ("s", "t")]
    return ir.Graph(inputs, [], nodes=[], opset_imports={"": 17}, name="g"), inputs


def test_refuses_integers():
    graph, (s, t) = graph_with(ir.DataType.INT64)
    with pytest.raises(UserError, match="loss l2: 's' is INT64; a loss needs floats"):
        losses.build(Scope(graph, "l2"), parse("l2:s=t"), [s], [t])


def test_half_precision_is_computed_in_float32():
    graph, (s, t) = graph_with(ir.DataType.FLOAT16)
    loss = losses.build(Scope(graph, "kl"), parse("kl:s=t"), [s], [t])
    graph.outputs.append(loss)
    feeds = {n: np.full((2, 6), 6e4, np.float16) * np.eye(2, 6, dtype=np.float16) for n in "st"}
    assert loss.dtype == ir.DataType.FLOAT
    assert value(ir.Model(graph, ir_version=8), feeds) == 0


def test_names_parameters_and_masks():
    shape = ir.Shape(["N", 6, 4, 4])
    inputs = [ir.val(n, ir.DataType.FLOAT, shape) for n in "st"]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": 17}, name="g")
    scope = Scope(graph, "feat", seed=5)
    losses.build(scope, parse("mgd:s+s=t+t,lambda_mgd=0.25"), inputs[:1] * 2, inputs[1:] * 2)
    assert all(node.name.startswith("loss/feat/") for node in graph)
    assert scope.masks == [
        Mask(input="loss_feat_0.mask", keep=0.75),
        Mask(input="loss_feat_1.mask", keep=0.75),
    ]
    assert scope.parameters[:2] == [
        "loss_feat_0.generation.0.weight",
        "loss_feat_0.generation.0.bias",
    ]
    assert len(scope.parameters) == 8
    assert set(scope.parameters) <= set(graph.initializers)
    assert [str(d) for d in graph.inputs[2].shape] == ["N", "6", "1", "1"]
    assert scope.labels.roles == []


def test_start_values_follow_the_seed_and_the_name_alone():
    def weights(seed, name="afd"):
        model = loss_model("l1:s=t", {"s": ("N", 6, 4, 4), "t": ("N", 6, 4, 4)})
        scope = Scope(model.graph, name, seed=seed)
        s, t = model.graph.inputs
        losses.build(scope, parse("afd:s=t,qk_dim=8"), [s], [t])
        return np.concatenate(
            [model.graph.initializers[n].const_value.numpy().ravel() for n in scope.parameters]
        )

    assert np.array_equal(weights(1), weights(1))
    assert not np.array_equal(weights(1), weights(2))
    assert not np.array_equal(weights(1), weights(1, "other"))


def test_one_label_for_all_losses():
    graph, (s, t) = graph_with()
    labels = Labels(graph)
    scopes = [Scope(graph, kind, labels=labels) for kind in ("ce", "dkd", "l2")]
    losses.build(scopes[0], parse("ce:s"), [s], [])
    losses.build(scopes[1], parse("dkd:s=t"), [s], [t])
    losses.build(scopes[2], parse("l2:s=t"), [s], [t])
    assert [v.name for v in graph.inputs] == ["s", "t", "label"]
    assert graph.inputs[2].dtype == ir.DataType.INT64
    assert [str(d) for d in graph.inputs[2].shape] == ["N"]
    assert labels.roles == [Label(input="label", scores="s", axis=1)]


def test_labels_of_maps_are_masks():
    graph, _ = graph_with()
    maps = ir.val("m", ir.DataType.FLOAT, ir.Shape(["N", 6, "H", 4]))
    graph.inputs.append(maps)
    scope = Scope(graph, "ce")
    losses.build(scope, parse("ce:m"), [maps], [])
    assert scope.labels.roles == [Label(input="label", kind="mask", scores="m", axis=1)]
    assert [str(d) for d in graph.inputs[3].shape] == ["N", "H", "4"]


def test_refuses_labels_of_two_shapes():
    with pytest.raises(UserError, match=r"input 'label' is \[N\] for one loss and \[N,4,4\]"):
        loss_model("ce:s;ce:m,name=two", {"s": ("N", 6), "m": ("N", 6, 4, 4)})


def test_refuses_an_input_of_the_same_name():
    graph, (s, *_) = graph_with(ir.DataType.FLOAT, "s", "label")
    with pytest.raises(UserError, match="has an input named 'label', which losses need; rename"):
        losses.build(Scope(graph, "ce"), parse("ce:s"), [s], [])


def test_refuses_parameters_of_a_taken_name():
    shapes = {"s": ("N", 6, 4, 4), "t": ("N", 6, 4, 4)}
    with pytest.raises(UserError, match=r"an initializer 'loss_mgd_.*'; give the loss another"):
        loss_model("mgd:s=t,name=mgd;mgd:s=t,name=mgd", shapes)
