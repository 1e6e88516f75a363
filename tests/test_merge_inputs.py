"""How a teacher's inputs become the student's: by name, by fit, by map, adapted, any batch."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from merge_models import HEADER, net, run, text

from onnxslim_kd import roles
from onnxslim_kd.errors import ProofError, UserError
from onnxslim_kd.passes.adapters import Adapter, parse
from onnxslim_kd.passes.batch import free_batch, has_fixed_batch
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.verify_merge import verify_merge

RNG = np.random.default_rng(0)


def two(a="int64[N,S] ids", b="int64[N,S] mask", y="y"):
    name_a, name_b = a.split()[1], b.split()[1]
    source = f"""{HEADER.format(opset=17)}
    two ({a}, {b}) => (float[N,1] {y}) <int64[1] axes = {{1}}> {{
      i = Cast<to=1>({name_a})  m = Cast<to=1>({name_b})  p = Mul(i, m)
      {y} = ReduceSum<keepdims=1>(p, axes)
    }}"""
    return text(source)


def feeds(merged):
    return roles.read(merged).teachers[0].inputs


def refusal(student, teacher, **options):
    with pytest.raises(UserError) as caught:
        merge(student, teacher, ["l2:y=y"], **options)
    return str(caught.value)


# ---------------------------------------------------------------------------- pairing


def test_same_names_are_one_input():
    assert feeds(merge(two(), two(), ["l2:y=y"])) == {"ids": "ids", "mask": "mask"}


def test_the_only_one_left_that_fits_is_taken():
    teacher = two(b="int64[B,T] attention", a="int64[B,T] ids")
    assert feeds(merge(two(), teacher, ["l2:y=y"])) == {"ids": "ids", "attention": "mask"}


def test_types_decide_as_well():
    student, teacher = two(b="float[N,S] mask"), two("int64[N,S] a", "float[N,S] b")
    assert feeds(merge(student, teacher, ["l2:y=y"])) == {"a": "ids", "b": "mask"}


def test_several_that_fit_need_a_map():
    teacher = two("int64[N,S] a", "int64[N,S] b")
    message = refusal(two(), teacher)
    assert "the teacher's input 'a' int64[teacher_N,teacher_S] fits several" in message
    assert "--map" in message
    merged = merge(two(), teacher, ["l2:y=y"], inputs_map={"a": "mask", "b": "ids"})
    assert feeds(merged) == {"a": "mask", "b": "ids"}
    verify_merge(merged, two(), teacher)


def test_one_student_input_may_feed_two_of_the_teachers():
    teacher = two("int64[N,S] a", "int64[N,S] b")
    merged = merge(two(), teacher, ["l2:y=y"], inputs_map={"a": "ids", "b": "ids"})
    ids = np.array([[1, 2, 3]])
    got = run(merged, {"ids": ids, "mask": ids * 0})
    assert got["l2"] == 14**2


@pytest.mark.parametrize("spelled", ["image", "teacher_image"])
def test_a_loss_may_read_the_teachers_input(spelled):
    """As an autoencoder's: what feeds that input, adapters included, is compared."""
    student, teacher = net(), net(x="image", seed=1)
    adapters = {"image": Adapter(mean=(0.5, 0.5, 0.5))}
    merged = merge(student, teacher, [f"l2:x={spelled}"], adapters=adapters)
    verify_merge(merged, student, teacher)
    image = RNG.random((2, 3, 8, 8), np.float32)
    assert run(merged, {"x": image})["loss"] == pytest.approx(0.25)


def test_maps_to_nothing_are_refused():
    assert "the student has no input 'q'" in refusal(net(), net(), inputs_map={"x": "q"})
    assert "no teacher has an input of that name" in refusal(net(), net(), inputs_map={"q": "x"})


def test_a_teacher_input_that_nobody_gives():
    message = refusal(net(), two())
    assert "nothing feeds the teacher's input 'ids' int64[" in message


def test_contradicting_shapes_name_both_sides():
    message = refusal(net(batch=2), net(size=16))
    assert "the teacher's input 'x' is float[teacher_N,3,16,16]" in message
    assert "the student's 'x' is float[2,3,8,8]" in message


def test_contradicting_types_name_both_sides():
    message = refusal(two(), two(a="int32[N,S] ids"))
    assert "'ids' is int32[teacher_N,teacher_S] but the student's 'ids' is int64[N,S]" in message


def test_symbols_that_contradict_each_other_are_found():
    teacher = two(a="int64[N,4] ids", b="int64[N,5] mask")
    assert "float" not in refusal(two(), teacher)


# ----------------------------------------------------------------------------- dynamic


def shapes(model):
    return {v.name: [d if isinstance(d, int) else d.value for d in v.shape]
            for v in (*model.graph.inputs, *model.graph.outputs)}  # fmt: skip


def test_a_dynamic_teacher_takes_the_students_batch():
    merged = merge(net(), net(batch="M", seed=1), ["l2:y=y"])
    assert shapes(merged)["x"] == ["N", 3, 8, 8]
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)


def test_a_fixed_student_fixes_a_dynamic_teacher():
    merged = merge(net(batch=1), net(batch="M", seed=1), ["l2:y=y"])
    assert shapes(merged)["x"] == [1, 3, 8, 8]
    teacher = next(v for n in merged.graph for v in n.outputs if v.name == "teacher_r2")
    assert list(teacher.shape) == [1, 4, 4, 4]


def test_a_fixed_teacher_fixes_a_dynamic_student():
    merged = merge(net(), net(batch=1, seed=1), ["l2:y=y"])
    assert shapes(merged)["x"] == [1, 3, 8, 8]
    assert shapes(merged)["y"] == [1, 5]
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)


# ------------------------------------------------------------------------- free batch


def test_a_freed_batch_runs_at_any_size():
    fixed = net(batch=1)
    free = free_batch(fixed)
    assert shapes(free)["x"] == ["N", 3, 8, 8]
    x = RNG.standard_normal((4, 3, 8, 8)).astype(np.float32)
    alone = np.concatenate([run(fixed, {"x": row[None]})["y"] for row in x])
    assert run(free, {"x": x})["y"] == pytest.approx(alone, rel=1e-4, abs=1e-5)


def test_a_reshape_to_batch_one_is_freed():
    source = HEADER.format(opset=17) + (
        "r (float[1,3,8,8] x) => (float[1,5] y) <float[192,5] w, int64[2] to = {1,-1}>"
        " { f = Reshape(x, to)  y = MatMul(f, w) }"
    )
    assert shapes(free_batch(text(source)))["y"] == ["N", 5]


def test_a_model_that_mixes_samples_is_not_freed():
    source = HEADER.format(opset=17) + (
        "m (float[1,4] x) => (float[1,4] y) { s = ReduceMax<axes=[0], keepdims=1>(x)"
        "  y = Sub(x, s) }"
    )
    with pytest.raises(ProofError, match="output 'y' of a batch of two differs"):
        free_batch(text(source))


def test_a_number_for_all_samples_is_not_freed():
    body = "m (float[1,4] x) => (float y) { y = ReduceMean<keepdims=0>(x) }"
    with pytest.raises(ProofError, match="output 'y' of a batch of two differs"):
        free_batch(text(HEADER.format(opset=17) + body))


def test_only_a_fixed_batch_can_be_freed():
    assert has_fixed_batch(net(batch=1))
    assert not has_fixed_batch(net())
    with pytest.raises(UserError, match="no batch of 1"):
        free_batch(net())


# --------------------------------------------------------------------------- adapters


def nhwc_teacher(size=8):
    source = (
        HEADER.format(opset=17)
        + f"""
    t (float[N,{size},{size},3] x) => (float[N,5] y) <float[{3 * size * size},5] w> {{
      f = Flatten(x)  y = MatMul(f, w) }}"""
    )
    return text(source)


def teacher_input(merged, x):
    source = roles.read(merged).teachers[0].inputs["x"]
    value = next(v for n in merged.graph for v in n.outputs if v.name == source)
    merged.graph.outputs.append(value)
    return run(merged, {"x": x})[source]


def test_layout():
    teacher = nhwc_teacher()
    assert "but the student's" in refusal(net(batch=2), teacher)
    merged = merge(net(), teacher, ["l2:y=y"], adapters={"": Adapter(layout="NHWC")})
    verify_merge(merged, net(), teacher)
    x = RNG.standard_normal((2, 3, 8, 8)).astype(np.float32)
    assert np.array_equal(teacher_input(merged, x), x.transpose(0, 2, 3, 1))


def test_layout_the_other_way_round():
    merged = merge(nhwc_teacher(), net(), ["l2:y=y"], adapters={"x": Adapter(layout="NCHW")})
    verify_merge(merged, nhwc_teacher(), net())


def test_normalisation_size_and_layout_together():
    teacher = nhwc_teacher(size=16)
    adapter = Adapter(layout="NHWC", resize=(16, 16), mean=(0.5, 0.25, 0), std=(2,))
    merged = merge(net(), teacher, ["l2:y=y"], adapters={"x": adapter})
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)
    verify_merge(merged, net(), teacher)
    x = np.ones((2, 3, 8, 8), np.float32)
    wanted = np.broadcast_to(np.float32([0.25, 0.375, 0.5]), (2, 16, 16, 3))
    assert np.array_equal(teacher_input(merged, x), wanted)


def test_type():
    source = HEADER.format(opset=17) + (
        "h (float16[N,3,8,8] x) => (float16[N,1,1,1] y) { y = ReduceMean<axes=[1,2,3]>(x) }"
    )
    student = text(source.replace("float16", "float"))
    adapters = {"": Adapter(dtype="float16", mean=(1,))}
    merged = merge(student, text(source), ["l2:y=y"], adapters=adapters)
    verify_merge(merged, student, text(source))


def test_adapters_that_do_not_fit():
    teacher = nhwc_teacher(size=16)
    message = refusal(net(), teacher, adapters={"x": Adapter(resize=(16, 16))})
    assert (
        "adapted is float[N,3,16,16], but the teacher's 'x' is float[teacher_N,16,16,3]" in message
    )
    message = refusal(net(), net(), adapters={"x": Adapter(mean=(1, 2))})
    assert "2 numbers for the 3 channels" in message
    assert "no teacher has an input" in refusal(net(), net(), adapters={"q": Adapter()})
    assert "needs the name of the input" in refusal(two(), two(), adapters={"": Adapter()})
    assert "needs an input of 4 dimensions" in refusal(two(), two(), adapters={"ids": Adapter()})


@pytest.mark.parametrize(
    ("given", "name", "adapter"),
    [
        ("layout=NHWC", "", Adapter(layout="NHWC")),
        ("x:resize=224x112", "x", Adapter(resize=(224, 112))),
        ("a:0:mean=1,2,3,std=4", "a:0", Adapter(mean=(1, 2, 3), std=(4,))),
        ("dtype=float16,layout=nchw", "", Adapter(layout="NCHW", dtype="float16")),
    ],
)
def test_adapters_as_text(given, name, adapter):
    assert parse(given) == (name, adapter)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("layout", "expected key=value"),
        ("layout=CHWN", "must be NCHW or NHWC, got 'CHWN'"),
        ("size=3x3", "unknown key 'size'"),
        ("resize=3", "must be HEIGHTxWIDTH"),
        ("resize=axb", "invalid literal"),
        ("std=0", "must not be 0"),
        ("dtype=half", "no ONNX type"),
    ],
)
def test_adapters_that_are_no_adapters(given, message):
    with pytest.raises(UserError, match=message):
        parse(given)
