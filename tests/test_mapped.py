"""Big files read without copying: the same models as protobuf reads, and the same refusals."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_kd import mapped
from onnxslim_kd.errors import ModelError
from onnxslim_kd.model import load, save

RNG = np.random.default_rng(0)
TYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT64", "INT8", "BOOL", "FLOAT8E4M3FN")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(mapped, "LARGE", 0)
    monkeypatch.setattr(mapped, "LEAST", 16)


def tensor(name, shape=(8, 8), dtype="FLOAT"):
    array = (RNG.standard_normal(shape) * 5).astype(ir.DataType[dtype].numpy())
    return ir.serde.serialize_tensor(ir.Tensor(array, name=name, dtype=ir.DataType[dtype]))


def model(*initializers, nodes=()):
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 8])
    nodes = [*nodes, helper.make_node("MatMul", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", [x], [y], list(initializers))
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def written(tmp_path, proto):
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    return path


def tensors(found):
    return {name: value.const_value for name, value in found.graph.initializers.items()}


def test_tensors_of_all_types_are_those_of_the_file(tmp_path):
    proto = model(tensor("w"), *(tensor(f"a{t}", (3, 7), t) for t in TYPES))
    found = tensors(load(written(tmp_path, proto), normalise=False))
    for wanted in proto.graph.initializer:
        got = found[wanted.name]
        assert got.dtype == wanted.data_type
        assert got.numpy().tobytes() == numpy_helper.to_array(wanted).tobytes()
        assert isinstance(got.numpy().base, np.ndarray)  # a view


def test_weights_below_a_byte(tmp_path):
    proto = model(tensor("w"))
    packed = TensorProto(name="q", data_type=TensorProto.INT4, dims=[64])
    packed.raw_data = bytes(range(32))
    proto.graph.initializer.append(packed)
    got = tensors(load(written(tmp_path, proto), normalise=False))["q"]
    assert got.tobytes() == packed.raw_data
    assert np.array_equal(got.numpy(), numpy_helper.to_array(packed))


def test_constants_and_bodies_are_mapped_as_well(tmp_path):
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=tensor("c"))], "b", [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [8, 8])],
    )  # fmt: skip
    yes = numpy_helper.from_array(np.array(True), "yes")
    node = helper.make_node("If", ["yes"], ["w"], then_branch=branch, else_branch=branch)
    path = written(tmp_path, model(yes, nodes=[node]))
    light, _ = mapped.read(path)
    assert light.ByteSize() < path.stat().st_size
    again = ir.to_proto(load(path, normalise=False))
    constants = [a.g.node[0].attribute[0].t for a in again.graph.node[0].attribute]
    wanted = [a.g.node[0].attribute[0].t for a in onnx.load(path).graph.node[0].attribute]
    for one, other in zip(constants, wanted, strict=True):
        assert np.array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


def test_the_rest_of_the_model_is_unchanged(tmp_path):
    proto = model(tensor("w"), helper.make_tensor("typed", TensorProto.FLOAT, [9], range(9)))
    proto.metadata_props.add(key="k", value="v" * 50)
    proto.graph.doc_string = "d" * 50
    path = written(tmp_path, proto)
    again = ir.to_proto(load(path, normalise=False))
    assert again.metadata_props == proto.metadata_props
    assert again.graph.doc_string == proto.graph.doc_string
    assert again.graph.node == proto.graph.node
    assert list(numpy_helper.to_array(again.graph.initializer[1])) == list(range(9))


def test_a_model_may_replace_its_own_file(tmp_path):
    path = written(tmp_path, model(tensor("w")))
    found = load(path)
    before = tensors(found)["w"].numpy().copy()
    save(found, path, overwrite=True)
    save(load(path), path, overwrite=True, external_data=True)
    assert np.array_equal(tensors(found)["w"].numpy(), before)
    assert np.array_equal(tensors(load(path))["w"].numpy(), before)


@pytest.mark.parametrize("kept", [0.5, 0.9, 0.999])
def test_files_that_are_cut_short(tmp_path, kept):
    path = written(tmp_path, model(tensor("w")))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ModelError, match=str(path)):
        load(path)


def test_files_that_are_no_protobuf(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(range(256)) * 99)
    with pytest.raises(ModelError, match=str(path)):
        load(path)


def test_tensors_whose_bytes_are_not_their_shape(tmp_path):
    proto = model(tensor("w"))
    proto.graph.initializer[0].dims[0] = 9
    with pytest.raises(ModelError, match=r"tensor w holds 256 bytes, its shape \[9, 8\] needs 288"):
        load(written(tmp_path, proto))


def test_a_file_that_pretends_to_be_marked(tmp_path):
    proto = model(tensor("w"))
    weight = proto.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", mapped.MARK), ("offset", "9999"), ("length", "256")):
        weight.external_data.add(key=key, value=value)
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="tensor w"):
        load(path)


def test_a_location_that_is_written_out(tmp_path):
    """As onnx writes it for a tensor that was external: behind the weights."""
    weight = tensor("w")
    weight.data_location = TensorProto.DEFAULT
    loaded = load(written(tmp_path, model(weight)))
    held = loaded.graph.initializers["w"].const_value
    assert held is not None
    np.testing.assert_array_equal(held.numpy(), numpy_helper.to_array(weight))


def test_a_number_without_an_end_is_refused_at_once(tmp_path) -> None:
    path = tmp_path / "noise.onnx"
    path.write_bytes(b"\x0a" + b"\xff" * 2_000_000)
    with pytest.raises(ModelError, match="a number of more than 10 bytes"):
        load(path)
