import numpy as np
import onnx
import onnx_ir as ir
import pytest
from merge_models import HEADER, net, run, saved, text

from onnxslim_kd import api, roles
from onnxslim_kd.errors import ModelError, NotFoundError, ProofError, UserError
from onnxslim_kd.model import load, save
from onnxslim_kd.passes.join import join
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.passes.prune import Choice
from onnxslim_kd.passes.ratios import Amount
from onnxslim_kd.runtime import random_feeds
from onnxslim_kd.verify_merge import verify_merge

RNG = np.random.default_rng(0)


def images(batch=2, size=8):
    return RNG.standard_normal((batch, 3, size, size)).astype(np.float32)


def check(model):
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def names(values):
    return [value.name for value in values]


# ------------------------------------------------------------------------- the result


def test_outputs_are_the_students_then_the_loss_then_the_terms():
    merged = merge(net(), net(width=6, seed=1), ["l2:y=y", "kl:y=y,temperature=4,weight=0.5"])
    check(merged)
    assert names(merged.graph.inputs) == ["x"]
    assert names(merged.graph.outputs) == ["y", "loss", "l2", "kl"]
    assert [value.shape for value in merged.graph.outputs[1:]] == [ir.Shape([])] * 3


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_student_and_teacher_compute_what_they_did_alone(batch):
    student, teacher = net(), net(width=6, seed=1)
    merged = merge(student, teacher, ["l2:y=y,weight=3", "cosine:y=y"])
    x = images(batch)
    merged.graph.outputs.append(
        next(n for n in merged.graph if n.name == "teacher_MatMul_6").outputs[0]
    )
    got = run(merged, {"x": x})
    ours, theirs = run(student, {"x": x})["y"], run(teacher, {"x": x})["y"]
    assert np.array_equal(got["y"], ours)
    assert np.array_equal(got["teacher_y"], theirs)
    assert got["l2"] == pytest.approx(np.mean((ours - theirs) ** 2), rel=1e-5)
    assert got["loss"] == pytest.approx(3 * got["l2"] + got["cosine"], rel=1e-6)


def test_what_is_given_stays_as_it_is():
    student, teacher = ir.to_proto(load(net())), load(net(seed=1))
    before = student.SerializeToString(), ir.to_proto(teacher).SerializeToString()
    merge(student, {"one": student, "two": teacher}, ["l2:y=one_y", "l2:y=two_y"])
    assert (student.SerializeToString(), ir.to_proto(teacher).SerializeToString()) == before
    assert {v.const_value.name for v in teacher.graph.initializers.values()} == set(
        teacher.graph.initializers
    )


def test_a_teacher_may_give_what_it_takes():
    source = HEADER.format(opset=17) + (
        "s (float[N,3] x) => (float[N,3] y, float[N,3] x) { y = Relu(x) }"
    )
    merged = merge(text(source), text(source), ["l2:y=y"])
    assert names(merged.graph.outputs) == ["y", "x", "loss", "l2"]
    verify_merge(merged, text(source), text(source))


def test_roles_say_who_is_who():
    merged = merge(
        net(), net(width=6, x="image", seed=1), ["mgd:r2=r2,name=m,weight=2,start=1,end=4", "ce:y"]
    )
    record = roles.read(merged)
    assert record.student_inputs == ("x",)
    assert record.student_outputs == ("y",)
    assert record.teachers == (
        roles.Teacher(
            name="teacher", prefix="teacher_", inputs={"image": "x"}, outputs=("teacher_y",)
        ),
    )
    assert record.terms[0] == roles.Term(
        name="m", kind="mgd", output="m", weight=2, start_epoch=1, end_epoch=4
    )
    assert [label.input for label in record.labels] == ["label"]
    assert record.loss_parameters
    assert set(record.loss_parameters) <= set(merged.graph.initializers)
    assert {mask.input for mask in record.masks} <= set(names(merged.graph.inputs))


def test_labels_are_inputs_only_when_a_loss_needs_them():
    without = merge(net(), net(seed=1), ["l2:y=y"])
    shared = merge(net(), net(seed=1), ["dkd:y=y", "ce:y", "wsl:y=y"])
    assert names(without.graph.inputs) == ["x"]
    assert names(shared.graph.inputs) == ["x", "label"]


def test_nodes_say_which_term_they_belong_to():
    merged = merge(net(), net(seed=1), ["l2:y=y,name=logits"])
    terms = [node.metadata_props.get(roles.TERM) for node in merged.graph]
    assert terms[:14] == [None] * 14
    assert set(terms[14:]) == {"logits", "loss"}


def test_kinds_used_twice_are_numbered():
    merged = merge(net(), net(seed=1), ["l2:y=y", "l2:r1=r1", "l2:r2=r2,name=deep"])
    assert names(merged.graph.outputs)[2:] == ["l2", "l2_2", "deep"]


def test_given_models_stay_as_they_are():
    student = net()
    before = ir.to_proto(student).SerializeToString()
    merge(student, student, ["l2:y=y"])
    assert ir.to_proto(student).SerializeToString() == before


def test_the_same_file_is_student_and_teacher(tmp_path):
    (path,) = saved(tmp_path, net=net())
    merged = merge(path, path, ["dml:y=y"])
    check(merged)
    assert run(merged, {"x": images()})["loss"] == pytest.approx(0, abs=1e-6)


def test_a_pruned_model_learns_from_its_original():
    original = net(width=16)
    decided = api.plan(original, Choice(pattern="w", ratio=0.5, amount=Amount(round_to=1)))
    pruned = api.cut(original, decided)
    merged = merge(pruned, original, ["kl:y=y", "l2:r2=r2,align=conv"])
    check(merged)
    assert list(merged.graph.initializers["w2"].shape) == [8, 8, 3, 3]
    assert list(merged.graph.initializers["teacher_w2"].shape) == [16, 16, 3, 3]
    verify_merge(merged, pruned, original)


def test_several_teachers_have_their_own_prefix():
    teachers = {"big": net(width=6, seed=1), "small": net(width=3, seed=2, y="z")}
    merged = merge(net(), teachers, ["l2:y=big_y", "l2:y=z,name=to_small"])
    check(merged)
    assert [t.prefix for t in roles.read(merged).teachers] == ["big_", "small_"]
    assert verify_merge(merged, net(), teachers).values == 3 + 1 - 1
    assert {"big_w1", "small_w1", "w1"} <= set(merged.graph.initializers)


def test_weights_of_loss_layers_follow_the_seed():
    one, same, other = (
        merge(net(), net(width=6, seed=1), ["mgd:r2=r2"], seed=seed) for seed in (0, 0, 1)
    )
    name = roles.read(one).loss_parameters[0]
    weights = [m.graph.initializers[name].const_value.numpy() for m in (one, same, other)]
    assert np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[0], weights[2])


def test_the_older_opset_is_raised():
    for student, teacher in ((13, 18), (18, 17), (17, 21)):
        merged = merge(net(opset=student), net(opset=teacher, seed=1), ["l2:y=y"])
        check(merged)
        assert merged.graph.opset_imports[""] == max(student, teacher)
        verify_merge(merged, net(opset=student), net(opset=teacher, seed=1))


def test_raising_the_opset_keeps_notes():
    proto = ir.to_proto(net())
    proto.graph.node[1].metadata_props.add(key="k", value="v")
    note = proto.graph.quantization_annotation.add(tensor_name="r1")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w1")
    merged = ir.to_proto(merge(proto, net(opset=21, seed=1), ["l2:y=y"]))
    assert merged.opset_import[0].version == 21
    assert [p.value for p in merged.graph.node[1].metadata_props] == ["v"]
    assert [a.tensor_name for a in merged.graph.quantization_annotation] == ["r1"]


def test_saved_and_loaded_it_is_the_same(tmp_path):
    merged = merge(net(), net(seed=1), ["kl:y=y", "ce:y"])
    save(merged, tmp_path / "merged.onnx", external_data=True)
    again = load(tmp_path / "merged.onnx")
    assert roles.read(again) == roles.read(merged)
    feeds = {"x": images(), "label": np.array([0, 3])}
    assert run(again, feeds)["loss"] == run(merged, feeds)["loss"]


# ------------------------------------------------------------------------------ names

WITH_IF = (
    HEADER
    + """
branchy (float[N,4] x) => (float[N,4] y) <float[4,4] w> {{
  total = ReduceSum<keepdims=0>(x)
  zero = Constant<value_float=0.0>()
  positive = Greater(total, zero)
  h = MatMul(x, w)
  y = If(positive)<
    then_branch = then () => (float[N,4] a) {{ a1 = Relu(h)  a = Add(a1, w0) }},
    else_branch = other () => (float[N,4] b) {{ b = Mul(h, x) }}
  >
}}
"""
)


def branchy(seed=0):
    source = WITH_IF.format(opset=17).replace("Add(a1, w0)", "MatMul(a1, w)")
    return text(source, seed=seed)


def test_names_captured_by_if_bodies_get_the_prefix():
    merged = merge(branchy(), branchy(1), ["l2:y=y"])
    check(merged)
    teacher_if = [node for node in merged.graph if node.op_type == "If"][1]
    bodies = [a.as_graph() for a in teacher_if.attributes.values()]
    inside = {v.name for body in bodies for node in body for v in (*node.inputs, *node.outputs)}
    assert inside == {"teacher_h", "teacher_w", "x", "teacher_a1", "teacher_a", "teacher_b"}
    for sign in (1, -1):
        x = sign * np.abs(RNG.standard_normal((3, 4))).astype(np.float32)
        wanted = np.mean((run(branchy(), {"x": x})["y"] - run(branchy(1), {"x": x})["y"]) ** 2)
        assert run(merged, {"x": x})["l2"] == pytest.approx(wanted, rel=1e-5)


def test_quantisation_annotations_get_the_prefix():
    proto = ir.to_proto(net())
    note = proto.graph.quantization_annotation.add(tensor_name="r1")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w1")
    merged = ir.to_proto(merge(proto, proto, ["l2:y=y"]))
    found = {
        a.tensor_name: a.quant_parameter_tensor_names[0].value
        for a in merged.graph.quantization_annotation
    }
    assert found == {"r1": "w1", "teacher_r1": "teacher_w1"}


def test_functions_are_inlined_under_the_prefix():
    source = """
    <ir_version: 8, opset_import: ["" : 17, "own" : 1]>
    f (float[N,4] x) => (float[N,4] y) { y = own.twice(x) }
    <domain: "own", opset_import: ["" : 17]>
    twice (a) => (b) { b = Add(a, a) }
    """
    merged = merge(text(source), text(source), ["l2:y=y"])
    check(merged)
    assert not merged.functions
    assert [n.op_type for n in merged.graph][:2] == ["Add", "Add"]


def test_module_paths_get_the_prefix():
    model = net()
    key = "pkg.torch.onnx.name_scopes"
    model.graph[1].metadata_props[key] = "['', 'layer1', 'layer1.act', 'relu']"
    merged = merge(model, model, ["l2:~layer1=~layer1"])
    teacher = next(n for n in merged.graph if n.name == "teacher_Relu_1")
    assert "'teacher_layer1.act'" in teacher.metadata_props[key]


def test_metadata_of_the_teacher_is_kept_under_the_prefix():
    teacher = net(seed=1)
    teacher.metadata_props["names"] = "cat, dog"
    assert merge(net(), teacher, ["l2:y=y"]).metadata_props["teacher_names"] == "cat, dog"


def test_symbols_that_are_not_shared_get_the_prefix():
    source = HEADER.format(opset=17) + (
        "t (float[B,3,8,8] x) => (float[B,5] y, float[M,4] where) <float[192,5] w> {"
        "  f = Flatten(x)  y = MatMul(f, w)  n = NonZero(x)  k = Transpose<perm=[1,0]>(n)"
        "  where = Cast<to=1>(k) }"
    )
    joined = join(net(), {"teacher": text(source)}, {}, {})
    assert list(joined.teachers["teacher"].values["y"].shape) == ["N", 5]
    assert joined.teachers["teacher"].values["where"].shape[0].value.startswith("teacher_")


# ------------------------------------------------------------------------------- taps


def test_regular_expressions_tap_values_in_order():
    merged = merge(net(), net(seed=1), ["l2:~r\\d=~r\\d"])
    single = merge(net(), net(seed=1), ["l2:r1+r2=r1+r2"])
    x = {"x": images()}
    assert run(merged, x)["l2"] == run(single, x)["l2"]


def test_regular_expressions_tap_the_last_output_of_modules():
    student = net()
    for index, node in enumerate(student.graph):
        node.name = f"/stage{index // 2}/{node.op_type}"
    merged = merge(student, student, ["l2:~/stage[01]$=r1+r2"])
    assert run(merged, {"x": images()})["l2"] == 0


# --------------------------------------------------------------------------- refusals


def refusal(*losses, student=None, teacher=None, kind=UserError, **options):
    with pytest.raises(kind) as caught:
        merge(student or net(), teacher or net(width=6, seed=1), losses or ["l2:y=y"], **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_unknown_value_gets_near_misses_with_shapes():
    message = refusal("l2:r3=r2", kind=NotFoundError)
    assert message.startswith("the student has no value 'r3'; near misses: ")
    assert "r2 float[N,4,4,4]" in message
    assert "the teacher has no value 'r9'" in refusal("l2:r2=r9", kind=NotFoundError)


def test_a_value_of_the_other_side_is_pointed_out():
    teacher = net(y="logits")
    message = refusal("l2:logits=logits", teacher=teacher, kind=NotFoundError)
    assert "the student has no value 'logits'; the teacher has one" in message


def test_a_value_inside_of_a_body_cannot_be_tapped():
    message = refusal("l2:a1=y", student=branchy(), teacher=branchy(), kind=NotFoundError)
    assert "value 'a1' of the student is inside of node 'If_3'" in message


def test_patterns_that_match_nothing_or_are_none():
    assert "matches '^conv'" in refusal("l2:~^conv=r1", kind=NotFoundError)
    assert "is no regular expression" in refusal("l2:~(=r1")


def test_wrong_shapes_name_both_sides():
    message = refusal("l2:r2=r2")
    assert "r2" in message
    assert "teacher_r2" in message
    assert "4" in message


def test_losses_on_integers_are_refused():
    source = HEADER.format(opset=17) + (
        "t (float[N,5] x) => (int64[N,1] y) { y = ArgMax<axis=1>(x) }"
    )
    assert "y" in refusal("l2:y=y", student=text(source), teacher=text(source))


def test_two_losses_of_one_name():
    assert "two losses are called 'a'" in refusal("l2:y=y,name=a", "kl:y=y,name=a")
    assert "a value has that name" in refusal("l2:y=y,name=r1")
    assert "'loss'" in refusal("l2:y=y,name=loss")
    assert "'loss'" in refusal("l2:loss=y", student=net(y="loss"))


def test_prefix_collisions():
    student = net(y="teacher_y")
    message = refusal("l2:teacher_y=y", student=student)
    assert message == (
        "prefix 'teacher_' gives a name that is there already, 'teacher_y';"
        " choose another with --prefix"
    )


def test_a_merged_model_is_not_merged_again():
    merged = merge(net(), net(seed=1), ["l2:y=y"])
    assert refusal(student=merged).startswith("the student is a merged model already")
    assert refusal(teacher=merged).startswith("teacher 'teacher' is a merged model already")


def test_ambiguous_teachers():
    teachers = {"a": net(seed=1), "b": net(seed=2)}
    assert "write one of a_y, b_y" in refusal("l2:y=y", teacher=teachers)
    assert "has no value 'q'" in refusal("l2:y=q", teacher=teachers, kind=NotFoundError)


def test_no_losses():
    with pytest.raises(UserError, match="at least one loss"):
        merge(net(), net(), [])


def test_operator_domains_in_two_versions():
    header = HEADER.format(opset='17, "own" : {}')
    source = header + "f (float[4] x) => (float[4] y) {{ y = own.op(x) }}"
    student, teacher = text(source.format(1)), text(source.format(2))
    message = refusal("l2:x=x", student=student, teacher=teacher, kind=ModelError)
    assert "'own' in different versions (1 and 2)" in message


# ------------------------------------------------------------------------------ proof


def test_the_proof_counts_values_and_sizes():
    student, teacher = net(), net(width=6, seed=1)
    merged = merge(student, teacher, ["l2:y=y", "at:r2=r2"])
    proof = verify_merge(merged, student, teacher)
    assert proof.values == 4
    assert [size["x"][0] for size in proof.sizes] == [2, 3]
    assert set(proof.losses) == {"loss", "l2", "at"}


def test_the_proof_finds_one_changed_bit():
    student, teacher = net(), net(width=6, seed=1)
    merged = merge(student, teacher, ["l2:y=y"])
    value = merged.graph.initializers["teacher_fc"]
    array = value.const_value.numpy().copy()
    array[0, 0] = np.nextafter(array[0, 0], np.float32(9))
    value.const_value = ir.tensor(array, name="teacher_fc")
    with pytest.raises(ProofError, match="'y' of teacher 'teacher' is not the same"):
        verify_merge(merged, student, teacher)


def test_the_proof_refuses_losses_that_are_not_finite():
    teacher = net(seed=1)
    merged = merge(net(), teacher, ["l2:y=y,weight=3e38"])
    with pytest.raises(ProofError, match="'loss' is inf"):
        verify_merge(merged, net(), teacher)


def test_the_proof_names_a_value_that_a_mask_has_filled():
    source = (
        HEADER.format(opset=17)
        + """
        net (float[N,4] x) => (float[N,4] y) <float[4] mask = {0, 0, 0, -3e38}>
        { masked = Add(x, mask) y = Softmax(masked) }
    """
    )
    student = text(source)
    merged = merge(student, student, ["kl:y=y", "cosine:masked=masked,name=hint"])
    with pytest.raises(
        ProofError, match=r"'hint' is nan .* value 'masked' of the student reaches 3"
    ):
        verify_merge(merged, student, student)


def only_of(height):
    return text(
        HEADER.format(opset=17)
        + f"""
        net (float[N,1,H,48] x) => (float[N,M] y)
        <int64[3] shape = {{0, {height}, 48}}> {{ r = Reshape(x, shape) y = Flatten(r) }}
    """
    )


def test_the_proof_finds_sizes_that_the_models_take():
    student = only_of(32)
    merged = merge(student, student, ["l2:y=y"])
    assert verify_merge(merged, student, student).sizes == ({"x": (3, 1, 32, 48)},)
    student = only_of(33)
    merged = merge(student, student, ["l2:y=y"])
    with pytest.raises(
        ProofError, match="with any of 10 input shapes tried; give one with --input"
    ):
        verify_merge(merged, student, student)
    with pytest.raises(ProofError, match="no input sizes were found that all models take"):
        verify_merge(merge(net(size="S"), net(size="S"), ["l2:y=y"]), net(size="S"), only_of(33))


def test_the_proof_needs_a_merged_model():
    with pytest.raises(UserError, match="not made by merge"):
        verify_merge(net(), net(), net())


def test_random_inputs_can_be_given_a_shape():
    student = net(size="S")
    merged = merge(student, student, ["l2:y=y"])
    proof = verify_merge(merged, student, student, shapes=[{"x": (4, 3, 16, 16)}])
    assert proof.sizes == ({"x": (4, 3, 16, 16)},)
    assert random_feeds(merged, proof.sizes[0])["x"].shape == (4, 3, 16, 16)


def test_labels_have_the_batch_of_the_inputs_whatever_exporters_call_that_of_outputs():
    student = net()
    student.graph.outputs[0].shape = ir.Shape(["Gemm_y_dim_0", 5])
    merged = merge(student, net(width=6, seed=1), ["dkd:y=y", "ce:y,soft=true"])
    shapes = {value.name: value.shape for value in merged.graph.inputs}
    assert shapes["label"] == ir.Shape(["N"])
    assert shapes["label_soft"] == ir.Shape(["N", 5])
    verify_merge(merged, student, net(width=6, seed=1))


def test_labels_of_maps_are_as_large_as_the_maps_are_and_not_as_an_exporter_says():
    source = (
        HEADER.format(opset=17)
        + """
        net (float[N,3,8,S] x) => (float[same,4,same,w] y)
        <float[4,3,3,3] w1> { y = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w1) }
    """
    )
    student = text(source)
    merged = merge(student, student, ["ce:y"])
    (label,) = roles.read(merged).labels
    assert (label.scores, label.axis) == ("y", 1)
    proof = verify_merge(merged, student, student)
    assert [size["label"] for size in proof.sizes] == [(2, 4, 32), (3, 4, 48)]


def test_the_proof_leaves_out_what_is_random():
    source = (
        HEADER.format(opset=17)
        + """
        net (float[N,4] x) => (float[N,4] y, float[N,4] noisy)
        <float[4,4] w> { y = MatMul(x, w) noise = RandomNormalLike(y) noisy = Add(y, noise) }
    """
    )
    student = text(source)
    proof = verify_merge(merge(student, student, ["l2:y=y", "l1:noisy=noisy"]), student, student)
    assert (proof.values, proof.random) == (2, 2)
