import logging
from importlib.resources import files
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from merge_models import net
from test_fold import filled

from onnxslim_kd import model, roles
from onnxslim_kd.compare import Reference
from onnxslim_kd.errors import ModelError, NotFoundError, OperationError, UserError
from onnxslim_kd.passes.gate import size
from onnxslim_kd.passes.half import to_half
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.passes.strip import Stripped, infer_prune
from tests.packages import folder

BN = "float[4] scale, float[4] bias, float[4] mean, float[4] var"
MERGED = f"""g (float[N,3,8,8] x, int64[N] label, float[4,3,3,3] w, {BN}, float[4,5] fc,
               float[6,3,3,3] t_w, float[6,5] t_fc)
    => (float[N,5] y, float loss, float kl) <float two = {{2.0}}> {{
        c = Conv(x, w)
        n, m1, v1 = BatchNormalization <training_mode = 1> (c, scale, bias, mean, var)
        r = Relu(n)
        p = GlobalAveragePool(r)  f = Flatten(p)  y = MatMul(f, fc)
        t_c = Conv(x, t_w)  t_p = GlobalAveragePool(t_c)  t_f = Flatten(t_p)
        t_y = MatMul(t_f, t_fc)
        d = Sub(y, t_y)  s = Mul(d, d)  kl = ReduceMean <keepdims = 0> (s)
        hard = SoftmaxCrossEntropyLoss(y, label)
        a = Mul(kl, two)  loss = Add(a, hard)
    }}"""
ROLES = roles.Roles(
    student_inputs=("x",),
    student_outputs=("y",),
    teachers=(roles.Teacher(name="t", prefix="t_", outputs=("t_y",)),),
    loss="loss",
    terms=(roles.Term(name="kl", kind="l2", output="kl", weight=2.0),),
    labels=(roles.Label(input="label"),),
)
SMALL_ONES = ("densenet121", "inception_v1", "shufflenet", "squeezenet")
LIGHT = sorted(Path(str(files("onnx") / "backend/test/data/light")).glob("*.onnx"))


def merged() -> ir.Model:
    made = filled(MERGED)
    roles.write(made, ROLES)
    made.metadata_props["labels"] = "cat,dog"
    return made


def interface(of: ir.Model) -> tuple[list[str | None], list[str | None]]:
    return [v.name for v in of.graph.inputs], [v.name for v in of.graph.outputs]


def check(done: Stripped) -> None:
    onnx.checker.check_model(ir.serde.serialize_model(done.model), full_check=True)


# --------------------------------------------------------------------- merged models


def test_the_student_alone_in_inference_form() -> None:
    done = infer_prune(merged())
    assert [n.op_type for n in done.model.graph] == [
        "Conv", "Relu", "GlobalAveragePool", "Flatten", "MatMul",
    ]  # fmt: skip
    assert interface(done.model) == (["x"], ["y"])
    assert done.notes == ("1 nodes switched from training to inference",)
    assert done.counts["BatchNormalization"] == (1, 0)
    assert done.counts["Conv"] == (2, 1)
    assert done.model.metadata_props == {"labels": "cat,dog"}
    assert done.proof is not None
    assert done.proof.worst < 1e-5
    assert [shape["x"][0] for shape in done.proof.shapes] == [2, 3]
    check(done)


def test_the_student_equals_the_one_that_was_merged() -> None:
    training = "n, m1, v1 = BatchNormalization <training_mode = 1> ("
    alone = filled(MERGED.replace(training, "n = BatchNormalization ("))
    done = infer_prune(merged()).model
    assert Reference.of(alone, outputs=["y"]).differs(done) is None


def test_what_merge_writes_gives_back_student_and_teacher() -> None:
    student, teacher = net(width=4), net(width=6, seed=1)
    joined = merge(student, teacher, ["l2:y=y,weight=0.5", "kl:y=y"])
    for keep, original in (("student", student), ("teacher", teacher)):
        done = infer_prune(joined, keep=keep)
        assert interface(done.model) == (["x"], ["y"])
        assert Reference.of(model.load(original)).differs(done.model) is None
        assert len(done.model.graph) == 7
        assert done.model.metadata_props.keys() <= {"onnxslim_kd.tool"}


def test_a_student_merged_with_a_teacher_of_one_size_is_dynamic_again() -> None:
    student, teacher = net(width=4), net(width=6, seed=1)
    fixed = model.load(teacher)
    for value in fixed.graph.inputs:
        value.shape = ir.Shape([1 if not isinstance(d, int) else d for d in value.shape or ()])
    joined = merge(student, fixed, ["l2:y=y"])
    assert joined.graph.inputs[0].shape is not None and joined.graph.inputs[0].shape.is_static()
    done = infer_prune(joined)
    alone = model.load(student)
    assert done.proof is not None
    assert len(done.proof.shapes) == 2
    for now, before in zip(
        (*done.model.graph.inputs, *done.model.graph.outputs),
        (*alone.graph.inputs, *alone.graph.outputs),
        strict=True,
    ):
        assert now.shape == before.shape
    assert Reference.of(alone).differs(done.model) is None


@pytest.mark.parametrize("keep", ["teacher", "t"])
def test_the_teacher_under_its_own_names(keep: str) -> None:
    done = infer_prune(merged(), keep=keep)
    assert interface(done.model) == (["x"], ["y"])
    assert "w" not in done.model.graph.initializers


def test_a_role_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="--keep u: the roles of this model are student, t"):
        infer_prune(merged(), keep="u")
    with pytest.raises(UserError, match="--keep teacher: this model was not made by merge"):
        infer_prune(filled(MERGED), keep="teacher")


def test_a_damaged_record_is_refused() -> None:
    broken = merged()
    broken.metadata_props[roles.KEY] = "{}"
    with pytest.raises(ModelError, match=r"onnxslim_kd\.roles is damaged"):
        infer_prune(broken)


def test_named_outputs_and_only_the_inputs_they_need() -> None:
    done = infer_prune(merged(), outputs=["f"])
    assert interface(done.model) == (["x"], ["f"])
    with pytest.raises(
        NotFoundError, match=r"'t_x' is not a value of the graph; near misses: .*t_c"
    ):
        infer_prune(merged(), outputs=["t_x"])
    with pytest.raises(NotFoundError, match="'x' is an input or a weight"):
        infer_prune(merged(), outputs=["x"])


# ------------------------------------------------------------------------- any model


def test_softmax_takes_the_name_of_the_output() -> None:
    done = infer_prune(merged(), activation="softmax")
    assert done.model.graph.node(-1).op_type == "Softmax"
    assert interface(done.model) == (["x"], ["y"])
    with pytest.raises(UserError, match="output 'y' already comes from Softmax"):
        infer_prune(done.model, activation="softmax")


def test_an_unused_input_of_a_plain_model_stays() -> None:
    net = filled("g (float[N,3] x, bool on) => (float[N,3] y) { y = Relu(x) }")
    assert interface(infer_prune(net).model) == (["x", "on"], ["y"])


def test_random_outputs_are_not_compared_and_it_is_said() -> None:
    net = filled("g (float[2,3] x) => (float[2,3] y) { r = RandomNormalLike(x) y = Add(x, r) }")
    done = infer_prune(net)
    assert done.proof is None
    assert "outputs are random (RandomNormalLike" in done.notes[0]


def test_a_fold_that_changes_what_rounding_decides_is_kept() -> None:
    ranked = filled(
        f"""g (float[N,3,24,24] x, float[4,3,3,3] w, {BN}, float[4,3,3,3] w2) => (float[N,1936] y)
        <float big = {{3000.0}}, int64[2] flat = {{0, -1}}, int64[1] k = {{1936}}> {{
            b = Add(x, big)  c = Conv(b, w)
            n = BatchNormalization(c, scale, bias, mean, var)  score = Reshape(n, flat)
            best, which = TopK(score, k)
            f = Conv(x, w2)  feature = Reshape(f, flat)
            y = GatherElements <axis = 1> (feature, which)
        }}"""
    )
    done = infer_prune(ranked)
    assert done.proof.same_decisions and done.proof.worst < 1e-4
    assert done.removed["batch norm"] == 1 and not done.notes
    assert [value.name for value in done.model.graph.inputs] == ["x"]


def test_without_verification_there_is_no_proof() -> None:
    done = infer_prune(merged(), verify=False)
    assert done.proof is None
    assert len(done.model.graph) == 5


def test_a_given_message_stays_as_it_is() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,3] x) => (float[N,3] y, int64[2] z) <int64[1] one = {1}>
    { y = Relu(x) z = Concat<axis = 0>(one, one) }"""
    given = onnx.parser.parse_model(text)
    before = given.SerializeToString()
    infer_prune(given)
    assert given.SerializeToString() == before


@pytest.mark.parametrize("output", ["float[N,3] x", "float s"])
def test_what_holds_no_classes_gets_no_softmax(output: str) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 17]>
    g (float[N,3] x) => ({output}) {{ y = Relu(x) s = ReduceMax<keepdims = 0>(y) }}"""
    with pytest.raises(UserError, match="holds no scores of classes: leave out softmax"):
        infer_prune(ir.from_onnx_text(text), activation="softmax")


def test_what_the_converter_to_half_breaks_is_said() -> None:
    given = model.load(
        ir.from_onnx_text(
            '<ir_version: 8, opset_import: ["" : 17]>'
            " g (float[N,3] x) => (float[N,3] y, float[N,3] x) { y = Relu(x) }"
        )
    )
    with pytest.raises(OperationError, match="--fp16: the converter fails on this model"):
        to_half(given)


def test_half_precision_keeps_the_interface() -> None:
    student = infer_prune(merged()).model
    half, worst = to_half(student)
    assert 0 < worst < 1e-2
    assert [v.dtype for v in half.graph.outputs] == [ir.DataType.FLOAT]
    assert model.weight_bytes(half) < 0.6 * model.weight_bytes(student)


def test_a_model_in_half_precision_may_round_otherwise() -> None:
    net = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]> net (float16[N,4] x) => (float16[N,4] y)
        <float16[4] w = {1, 2, 3, 4}> { a = Mul(x, w) dead = Relu(a) y = Identity(a) }"""
    )
    proof = infer_prune(net).proof
    assert proof is not None
    assert proof.tolerance == 2e-2


def test_half_precision_of_a_constant_that_two_resizes_share() -> None:
    net = filled("""g (float[1,3,8,8] x, float[3,3,1,1] w) => (float[1,3,32,32] y)
        <float[4] scales = {1, 1, 2, 2}> {
        a = Resize(x, , scales) c = Conv(a, w) y = Resize(c, , scales) }""")
    half, worst = to_half(infer_prune(net).model)
    assert worst < 1e-2
    assert [v.dtype for v in half.graph.outputs] == [ir.DataType.FLOAT]


@pytest.mark.parametrize("opset", range(9, 25))
def test_every_opset(opset: int) -> None:
    net = filled(f"""g (float[N,3,8,8] x, float[4,3,3,3] w, {BN}, float[4,5] fc, float[5] b)
        => (float[N,5] y) {{
            c = Conv(x, w)  n = BatchNormalization(c, scale, bias, mean, var)  r = Relu(n)
            i = Identity(r)  p = GlobalAveragePool(i)  f = Flatten(p)  g = Gemm(f, fc, b)
            y = Softmax <axis = 1> (g) }}""")
    text = ir.serde.serialize_model(net)
    text.opset_import[0].version = opset
    text.ir_version = 3 if opset == 9 else 8
    if opset == 9:  # IR 3 lists weights among the inputs
        for tensor in text.graph.initializer:
            kind = onnx.TensorProto.FLOAT
            text.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, kind, tensor.dims)
            )
    del text.graph.value_info[:]
    done = infer_prune(text)
    assert size(done.model) == 6
    assert interface(done.model) == (["x"], ["y"])
    check(done)


def test_weights_beside_the_file(tmp_path: Path) -> None:
    """Of all uses: layers' weights, tables that are added, parameters of BatchNormalization."""
    net = filled(f"""g (float[N,64,8,8] x, float[64,64,3,3] w, {BN.replace("4", "64")},
                   float[1,64,6,6] table, float[1,64,1,1] factor) => (float[N,64,6,6] y) {{
        c = Conv(x, w)  n = BatchNormalization(c, scale, bias, mean, var)  a = Add(n, table)
        m = Mul(factor, factor)  r = Mul(a, m)  y = Identity(r) }}""")
    path = tmp_path / "net.onnx"
    ir.save(net, path, external_data="net.data", size_threshold_bytes=0)
    done = infer_prune(path)
    assert [node.op_type for node in done.model.graph] == ["Conv", "Add", "Mul"]
    assert done.notes == ()
    assert done.proof is not None


@pytest.mark.slow
def test_above_two_gigabytes(tmp_path: Path) -> None:
    """A sparse file: the weights are zeros that take no room on the disk."""
    rows, width = 600_000, 1024
    with (tmp_path / "big.data").open("wb") as file:
        file.truncate(rows * width * 4)
    net = ir.serde.serialize_model(
        filled(
            "g (float[N,4] x, int64[N] ids) => (float[N,1024] y)"
            "{ e = Gather(x, ids) y = Identity(e) }"
        )
    )
    table = net.graph.initializer.add(
        name="table", data_type=onnx.TensorProto.FLOAT, dims=[rows, width], data_location=1
    )
    table.external_data.add(key="location", value="big.data")
    net.graph.node[0].input[0] = "table"
    del net.graph.value_info[:], net.graph.input[0]
    (tmp_path / "big.onnx").write_bytes(net.SerializeToString())
    done = infer_prune(tmp_path / "big.onnx")
    assert [node.op_type for node in done.model.graph] == ["Gather"]
    assert done.proof is not None


# ----------------------------------------------------------------------- real models


def real(pattern: str) -> list[Path]:
    package, rest = pattern.split("/", 1)
    return sorted(folder(package).glob(rest))


@pytest.mark.real
@pytest.mark.parametrize(
    "path",
    [*real("rapidocr_onnxruntime/models/*.onnx"), *real("silero_vad/data/*.onnx")],
    ids=lambda path: path.stem,
)
def test_models_that_ship_inside_packages(path: Path, tmp_path: Path) -> None:
    done = infer_prune(path)
    assert done.notes == ()
    assert done.proof is not None
    before, after = (sum(pair[i] for pair in done.counts.values()) for i in (0, 1))
    assert after < before or "ifless" in path.stem
    model.save(done.model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size < path.stat().st_size
    onnx.checker.check_model(str(tmp_path / "out.onnx"), full_check=True)
    given = model.load(path, normalise=False)
    assert interface(done.model) == interface(given)


@pytest.mark.real
@pytest.mark.parametrize(
    "path", [p for p in LIGHT if p.stem[6:] in SMALL_ONES], ids=lambda path: path.stem
)
def test_made_up_weights_are_not_written_out(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    done = infer_prune(path)
    assert done.notes == ()
    model.save(done.model, tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").stat().st_size < 200_000
