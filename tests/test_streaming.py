"""Files written piece by piece hold what protobuf would have written in one."""

import gc
import mmap

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxslim_kd import mapped, memory, wire
from onnxslim_kd.errors import UserError
from onnxslim_kd.inference import inferred, outline, types
from onnxslim_kd.model import load, save

RNG = np.random.default_rng(0)
TYPES = ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT64", "INT8", "BOOL", "INT4", "UINT4")


def tensor(name, shape, dtype="FLOAT"):
    array = (RNG.standard_normal(shape) * 3).astype(ir.DataType[dtype].numpy())
    return ir.serde.serialize_tensor(ir.Tensor(array, name=name, dtype=ir.DataType[dtype]))


def model(*extra):
    """Two layers, with weights above and below the size from which they are streamed."""
    info = helper.make_tensor_value_info
    weights = [tensor("w1", (64, 64)), tensor("w2", (64, 8)), tensor("bias", (8,)), *extra]
    weights[0].doc_string = "the first"
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"]),
        helper.make_node("MatMul", ["h", "w2"], ["m"]),
        helper.make_node("Add", ["m", "bias"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [info("x", 1, ["N", 64])], [info("y", 1, ["N", 8])])
    graph.initializer.extend(weights)
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    proto.metadata_props.add(key="k", value="v")
    return proto


def same_tensors(found, wanted):
    assert [t.name for t in found] == [t.name for t in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert (one.data_type, one.dims, one.doc_string) == (
            other.data_type,
            other.dims,
            other.doc_string,
        )
        assert np.array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other))


@pytest.mark.parametrize("external_data", [False, True])
def test_a_written_file_is_the_model(tmp_path, external_data):
    proto = model(*(tensor(f"t{t}", (65, 64), t) for t in TYPES))
    strings = helper.make_tensor("s", TensorProto.STRING, [2000], [b"abc"] * 2000)
    proto.graph.initializer.append(strings)
    target = tmp_path / "model.onnx"
    save(load(proto), target, external_data=external_data)
    onnx.checker.check_model(target, full_check=True)
    found = onnx.load(target)
    same_tensors(found.graph.initializer, proto.graph.initializer)
    assert found.metadata_props == proto.metadata_props
    assert {v.name: len(v.type.tensor_type.shape.dim) for v in found.graph.value_info} == {
        "h": 2,
        "m": 2,
    }
    assert (tmp_path / "model.onnx.data").exists() == external_data


def test_weights_go_from_file_to_file(tmp_path):
    first, second, third = (tmp_path / f"{name}.onnx" for name in ("a", "b", "c"))
    save(load(model()), first)
    save(load(first), second, external_data=True)
    save(load(second), third)
    assert third.read_bytes() == first.read_bytes()


@pytest.mark.parametrize("external_data", [False, True])
def test_a_weight_that_is_a_view_is_written_in_its_own_order(tmp_path, external_data):
    found, target = load(model()), tmp_path / "model.onnx"
    turned = RNG.standard_normal((64, 64)).astype(np.float32).T
    found.graph.initializers["w1"].const_value = ir.Tensor(turned, name="w1")
    save(found, target, external_data=external_data)
    assert np.array_equal(load(target).graph.initializers["w1"].const_value.numpy(), turned)


def test_weights_of_another_model_are_not_replaced(tmp_path):
    (tmp_path / "a.onnx.data").write_text("another's")
    proto = model()
    with pytest.raises(UserError, match=r"a\.onnx\.data: exists"):
        save(load(proto), tmp_path / "a.onnx", external_data=True)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx.data"]
    save(load(proto), tmp_path / "a.onnx", external_data=True, overwrite=True)
    same_tensors(onnx.load(tmp_path / "a.onnx").graph.initializer, proto.graph.initializer)


def test_a_model_is_left_as_it_was(tmp_path):
    found = load(model())
    held = {name: value.const_value for name, value in found.graph.initializers.items()}
    shapes = [str(output.shape) for node in found.graph for output in node.outputs]
    save(found, tmp_path / "a.onnx")
    save(found, tmp_path / "b.onnx", external_data=True)
    assert all(found.graph.initializers[name].const_value is held[name] for name in held)
    assert [str(output.shape) for node in found.graph for output in node.outputs] == shapes


def test_a_mapped_weight_can_be_read_after_its_memory_was_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "LARGE", 0)
    path = tmp_path / "model.onnx"
    save(load(model(tensor("big", (1000, 1000)))), path)
    array = load(path).graph.initializers["big"].const_value.numpy()
    before = array.copy()
    memory.release(array)
    assert np.array_equal(array, before)
    memory.release(before)  # not mapped: nothing to give back


@pytest.mark.parametrize("value", [0, 1, 127, 128, 300, 2**31, 2**35 + 7])
def test_numbers_are_written_as_protobuf_reads_them(value):
    data = wire.head(5, value) + b"x"
    number, body, stop = wire.field(memoryview(data), 0)
    assert (number, body, stop - body) == (5, len(data) - 1, value)


def test_fields_of_fixed_length():
    proto = onnx.AttributeProto(name="a", f=1.5, type=onnx.AttributeProto.FLOAT)
    data = memoryview(proto.SerializeToString())
    position, numbers = 0, []
    while position < len(data):
        number, _, position = wire.field(data, position)
        numbers.append(number)
    assert sorted(numbers) == sorted(field.number for field, _ in proto.ListFields())


def test_an_outline_infers_what_the_model_does():
    found = load(model())
    proto = outline(found)
    assert len(proto.SerializeToString()) < 1000
    wanted, got = types(inferred(ir.to_proto(found))), types(inferred(proto))
    assert got["y"] == wanted["y"]
    assert {name: got[name] for name in "hm"} == {name: wanted[name] for name in "hm"}


def test_the_collector_works_again_after_an_error():
    assert gc.isenabled()
    with pytest.raises(KeyError), memory.collection_paused(), memory.collection_paused():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled()


def test_views_of_a_map_are_found(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(3 * mmap.PAGESIZE))
    with path.open("rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    view = np.frombuffer(data, np.uint8, 100, mmap.PAGESIZE + 3).reshape(10, 10)
    memory.release(view)
    assert not view.any()
