"""Loading and saving: what is refused, by name, and what is brought into one form."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxslim_kd import load, save
from onnxslim_kd.errors import ModelError, UserError
from tests.models import MODELS, Case, proto
from tests.same import outputs_differ

SMALL = Case(
    "a = MatMul(x, w1) y = Relu(a)", "float[6,8] w1", "float[N,6] x", "float[N,8] y", opset=17
)


def written(tmp_path: Path, model: onnx.ModelProto) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def external(tmp_path: Path, **changes: str) -> Path:
    model = proto(SMALL)
    weight = model.graph.initializer[0]
    data = onnx.numpy_helper.to_array(weight).tobytes()
    (tmp_path / "weights.bin").write_bytes(data)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": "weights.bin", "offset": "0", "length": str(len(data))} | changes
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)
    return written(tmp_path, model)


def refuses(path: Path, text: str) -> None:
    with pytest.raises(ModelError, match=text) as caught:
        load(path)
    assert "\n" not in str(caught.value).strip()


def test_files_that_are_no_models(tmp_path: Path) -> None:
    refuses(tmp_path / "none.onnx", "no such file")
    refuses(tmp_path, "is a folder, not a model")
    path = tmp_path / "text.onnx"
    path.write_text("certainly not a protobuf")
    refuses(path, "not an ONNX")
    whole = proto(SMALL).SerializeToString()
    path.write_bytes(whole[: len(whole) // 2])
    refuses(path, "cut short|not an ONNX|malformed|holds")
    path.write_bytes(b"")
    refuses(path, "not an ONNX model")


def test_models_that_are_not_supported(tmp_path: Path) -> None:
    model = proto(SMALL)
    del model.graph.node[:]
    refuses(written(tmp_path, model), "is empty: it has no nodes")
    model = proto(SMALL)
    model.ir_version = 99
    refuses(written(tmp_path, model), "ir_version 99 is newer")
    model = proto(SMALL)
    model.opset_import[0].version = 999
    refuses(written(tmp_path, model), "opset 999 is not one this onnx knows")
    model = proto(SMALL)
    model.training_info.add()
    refuses(written(tmp_path, model), "training_info")
    model = proto(SMALL)
    model.graph.initializer[0].dims[0] = 7
    refuses(written(tmp_path, model), r"tensor w1 holds 192 bytes, its shape \[7, 8\] needs 224")


def test_nodes_are_put_in_order(tmp_path: Path) -> None:
    model = proto(SMALL)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.name = ""  # neither runtimes nor their users mind
    for source in (model, written(tmp_path, model)):
        loaded = load(source)
        assert [node.op_type for node in loaded.graph] == ["MatMul", "Relu"]
        save(loaded, tmp_path / "sorted.onnx", overwrite=True)
        onnx.checker.check_model(tmp_path / "sorted.onnx", full_check=True)
    nodes[1].input[0] = "y"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    refuses(written(tmp_path, model), "contains a cycle")


def test_a_weight_may_be_an_output(tmp_path: Path) -> None:
    model = proto(SMALL)
    info = onnx.helper.make_tensor_value_info("w1", onnx.TensorProto.FLOAT, [6, 8])
    model.graph.output.append(info)
    save(load(model), tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx").graph.output[1] == info
    onnx.checker.check_model(tmp_path / "out.onnx", full_check=True)


def test_external_data(tmp_path: Path) -> None:
    assert load(external(tmp_path)).graph.initializers["w1"].const_value is not None
    (tmp_path / "weights.bin").unlink()
    refuses(tmp_path / "model.onnx", "weights.bin does not exist beside the model")
    refuses(external(tmp_path, location="../weights.bin"), "outside of the model's folder")
    refuses(external(tmp_path, location="/etc/hostname"), "outside of the model's folder")
    refuses(external(tmp_path, length="100"), "holds 100 bytes at 0, its shape needs 192")
    refuses(external(tmp_path, offset="8"), "cut short: 192 bytes, 200 needed")


def test_small_external_tensors_are_held_in_memory(tmp_path: Path) -> None:
    tensor = load(external(tmp_path)).graph.initializers["w1"].const_value
    assert isinstance(tensor, ir.Tensor)  # shape inference and the checker see no files


def test_external_data_behind_links(tmp_path: Path) -> None:
    path = external(tmp_path)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    os.rename(tmp_path / "weights.bin", outside / "weights.bin")
    (tmp_path / "weights.bin").symlink_to(outside / "weights.bin")
    refuses(path, "is a link; copy the file itself beside the model")
    (tmp_path / "weights.bin").unlink()
    os.link(outside / "weights.bin", tmp_path / "weights.bin")
    refuses(path, "is a hard link")


def test_one_form() -> None:
    """Old files: weights as inputs and constants, an old opset, auto_pad, no node names."""
    model = proto(
        Case(
            'c = Constant<value=float[1] {2.0}>() h = Conv<auto_pad="SAME_UPPER">(x, w1)'
            " m = Mul(h, c) y = ReduceMean<axes=[2,3]>(m)",
            "float[8,3,3,3] w1",
            "float[1,3,8,8] x",
            "float[1,8,1,1] y",
            opset=11,
        )
    )
    model.ir_version = 3
    for weight in model.graph.initializer:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
        )
    loaded = load(model)
    assert [v.name for v in loaded.graph.inputs] == ["x"]
    assert loaded.graph.opset_imports[""] == 17
    assert loaded.ir_version == 8
    assert {"w1", "c"} <= set(loaded.graph.initializers)
    conv = next(n for n in loaded.graph if n.op_type == "Conv")
    assert list(conv.attributes.get_ints("pads")) == [1, 1, 1, 1]
    assert "auto_pad" not in conv.attributes
    assert len({n.name for n in loaded.graph}) == len(list(loaded.graph))
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    model.ir_version = 8
    del model.graph.input[1:]
    assert outputs_differ(ir.from_proto(model), loaded, [feeds]) is None


OLD = """<ir_version: 7, opset_import: ["" : 12]>
g (float[N,6] x, bool c) => (float[N,8] y) <float[6,8] w, float[8] scale, float[1,1] one> {
  [product] a = MatMul(x, w)
  s = LayerNormalization <axis = -1> (a, scale)
  [choice] b = If(c) <
    then_branch = t () => (float[N,8] u) { k = Constant <value = float {2}> () u = Mul(s, k) },
    else_branch = e () => (float[N,8] v) { v = Identity(s) }>
  i = Constant <value = int64[1] {0}> ()
  z = Squeeze <axes = [0]> (one)
  y = Mul(b, z)
}"""


def test_a_file_comes_into_the_same_form_as_its_message(tmp_path: Path) -> None:
    """A file is raised and freed as a message, a message as a graph."""
    model = onnx.parser.parse_model(OLD)
    for name, shape in {"w": (6, 8), "scale": (8,), "one": (1, 1)}.items():
        weight = onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)
        model.graph.initializer.append(weight)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    noted = model.graph, model.graph.input[0], model.graph.node[0], model.graph.initializer[0]
    for message in noted:
        message.metadata_props.add(key="from", value="here")
    note = model.graph.quantization_annotation.add(tensor_name="a")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="one")
    file, given = load(written(tmp_path, model)), load(model)
    assert ir.to_proto(file) == ir.to_proto(given)
    assert file.graph.metadata_props == {"from": "here"}
    assert file.graph.inputs[0].metadata_props == {"from": "here"}
    assert file.graph.node(0).metadata_props == {"from": "here"}
    assert len(ir.to_proto(file).graph.quantization_annotation) == 1
    assert file.graph.inputs[0].shape == ir.Shape([None, 6])
    assert {node.domain for node in file.graph.all_nodes()} == {""}


def test_what_is_not_defined_anew_is_not_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
        raise RuntimeError("converted")

    monkeypatch.setattr(onnx.version_converter, "convert_version", refuse)
    text = (
        '<ir_version: 8, opset_import: ["" : {}]> g (float[N] x) => (float[N] y) {{ y = Relu(x) }}'
    )
    assert load(onnx.parser.parse_model(text.format(16))).graph.opset_imports[""] == 17
    with pytest.raises(ModelError, match="opset 13 cannot be raised to 17: converted"):
        load(onnx.parser.parse_model(text.format(13)))


def test_constants_of_a_file_become_weights_and_the_other_nodes_keep_their_order(
    tmp_path: Path,
) -> None:
    model = proto(
        Case(
            "a = Relu(x) c = Constant<value=float[1] {2.0}>() b = Mul(a, c)"
            " d = Constant<value=float[1] {3.0}>() e = Add(b, d) y = Sub(e, w)",
            "float[3] w",
            "float[1,3] x",
            "float[1,3] y",
        )
    )
    loaded = load(written(tmp_path, model))
    assert [node.op_type for node in loaded.graph] == ["Relu", "Mul", "Add", "Sub"]
    assert list(loaded.graph.initializers) == ["w", "c", "d"]
    assert loaded.graph.initializers["d"].const_value.numpy().tolist() == [3.0]


def test_save_is_whole_or_not_at_all(tmp_path: Path) -> None:
    model = load(proto(SMALL))
    path = tmp_path / "out.onnx"
    save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    with pytest.raises(UserError, match="exists; choose another name"):
        save(model, path)
    save(model, path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
    big = load(proto(MODELS["residual"]))
    save(big, tmp_path / "big.onnx", external_data=True)
    assert (tmp_path / "big.onnx.data").stat().st_size >= 8 * 8 * 9 * 4
    again = load(tmp_path / "big.onnx")
    for name, value in big.graph.initializers.items():
        assert np.array_equal(
            value.const_value.numpy(), again.graph.initializers[name].const_value.numpy()
        )


@pytest.mark.parametrize("form", ["path", "proto", "ir", "gs"])
def test_every_form_of_model_is_taken(form: str, tmp_path: Path) -> None:
    import onnx_graphsurgeon as gs

    given = proto(MODELS["residual"])
    sources = {
        "path": lambda: written(tmp_path, given),
        "proto": lambda: given,
        "ir": lambda: ir.from_proto(given),
        "gs": lambda: gs.import_onnx(given),
    }
    loaded = load(sources[form]())
    assert set(loaded.graph.initializers) == {"w1", "w2", "w3"}
    with pytest.raises(UserError, match="a model must be a path, a ModelProto"):
        load(3)  # type: ignore[arg-type]
