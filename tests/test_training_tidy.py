"""Sizes folded and rows picked early: fewer nodes, the same numbers and gradients."""

import re

import numpy as np
import onnx_ir as ir
import pytest
import torch

from onnxslim_kd import model as model_io
from onnxslim_kd.training.lowering import lower
from onnxslim_kd.training.optim import restore, state_of
from onnxslim_kd.training.rows import pick_early
from onnxslim_kd.training.sizes import fold_sizes
from onnxslim_kd.training.tidy import tidied

RNG = np.random.default_rng(0)
NUMBERS = {
    "w": RNG.standard_normal((8, 8)),
    "b": RNG.standard_normal(8),
    "each": RNG.standard_normal((1, 5, 8)),
    "one": np.array(1.0),
    "two": np.array([2.0]),
    "first": np.array(0),
    "some": np.array([0, -1]),
    "axis1": np.array([1]),
    "axis2": np.array([2]),
    "end": np.array([9]),
    "four": np.array([4]),
    "minus1": np.array([-1]),
    "none": np.array([0]),
    "fives": np.array([5]),
    "two_by_four": np.array([2, 4]),
    "last": np.array(2),
}


def declared(name: str) -> str:
    array = NUMBERS[name]
    sides = ",".join(map(str, array.shape))
    return f"{'int64' if array.dtype.kind == 'i' else 'float'}[{sides}] {name}"


def parse(body: str) -> ir.Model:
    """Parse a graph from x of [batch, 5, 8] to y, with those of `NUMBERS` that it reads."""
    read = set(re.findall(r"(?<=[(, ])\w+(?=[,)])", body))
    held = "".join(f", {declared(name)}" for name in NUMBERS if name in read)
    head = f"g (float[N,5,8] x{held}) => (float y)"
    text = f'<ir_version: 8, opset_import: ["" : 17]> {head} {{{body}}}'
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs):
        if value.name in NUMBERS:
            array = NUMBERS[value.name]
            array = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
            model.graph.inputs.remove(value)
            value.const_value = ir.Tensor(array, name=value.name)
            value.shape = ir.Shape(array.shape)
            model.graph.initializers[value.name] = value
    model.graph.outputs[0].shape = None
    model_io.infer_shapes(model)
    return model


def assert_same(before: ir.Model, after: ir.Model) -> None:
    for batch in (1, 3):
        x = torch.from_numpy(RNG.standard_normal((batch, 5, 8)).astype(np.float32))
        results = []
        for model in (before, after):
            lowered = lower(model)
            y = lowered({"x": x})["y"]
            weights = lowered.parameters_by_name
            grads = torch.autograd.grad(y.sum(), list(weights.values())) if weights else ()
            results.append((y, dict(zip(weights, grads, strict=True))))
        torch.testing.assert_close(results[0], results[1])


SIZES = {
    "an element": ("s = Shape(x) n = Gather(s, last) f = Cast<to=1>(n) y = Mul(x, f)", 0),
    "a part": ("s = Shape<start=1>(x) t = Cast<to=1>(s) m = ReduceProd(t) y = Mul(x, m)", 0),
    "a target": (
        "s = Shape(x) n = Slice(s, axis1, axis2) t = Concat<axis=0>(minus1, n, two_by_four)"
        " y = Reshape(x, t)",
        0,
    ),
    "the logarithm of 0": (  # positions relative to each other, as T5 and WavLM sort them
        "s = Shape(x) n = Gather(s, last) o = Sub(n, n) f = Cast<to=1>(o) l = Log(f)"
        " e = Exp(l) y = Add(x, e)",
        0,
    ),
    "not the batch": ("s = Shape(x) n = Gather(s, first) f = Cast<to=1>(n) y = Mul(x, f)", 1),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_are_known_are_folded(case):
    body, left = SIZES[case]
    model = parse(body)
    after = tidied(model, ["y"])
    assert [n.op_type for n in after.graph].count("Shape") == left
    assert_same(model, after)


def test_a_shape_with_one_unknown_side_is_constant():
    model = parse(
        "s = Shape(x) n = Slice(s, none, axis1) c = Slice(s, axis2, end) q = Div(c, four)"
        " t = Concat<axis=0>(n, fives, q, four) y = Reshape(x, t)"
    )
    after = tidied(model, ["y"])
    assert [n.op_type for n in after.graph] == ["Reshape"]
    assert after.graph.node(0).inputs[1].const_value.numpy().tolist() == [-1, 5, 2, 4]
    assert_same(model, after)


def test_sides_that_stand_in_the_file_are_folded_along():
    model = parse(
        "s = Shape(x) n = Gather(s, first) m = Unsqueeze(n, none) u = Unsqueeze(last, none)"
        " t = Concat<axis=0>(m, fives, u, four) y = Reshape(x, t)"
    )
    after = tidied(model, ["y"])
    assert [n.op_type for n in after.graph] == ["Reshape"]
    assert after.graph.node(0).inputs[1].const_value.numpy().tolist() == [-1, 5, 2, 4]
    assert_same(model, after)


def test_what_trains_is_never_folded():
    model = parse("s = Shape<start=1, end=2>(x) t = Cast<to=1>(s) m = Add(t, two) y = Mul(x, m)")
    after = tidied(model, ["y"], keep=["two"])
    assert "two" in after.graph.initializers
    assert "two" not in tidied(model, ["y"]).graph.initializers


BLOCK = "h = MatMul(x, w) r = Relu(h) d = Add(r, b) z = Add(d, x) n = LayerNormalization(z, b, b)"
ROWS = {
    "one row": (f"{BLOCK} y = Gather<axis=1>(n, first)", {"LayerNormalization", "MatMul"}),
    "some rows": (f"{BLOCK} y0 = Gather<axis=1>(n, some) y = Relu(y0)", {"MatMul"}),
    "softmax of rows": ("s = Softmax(x) y = Gather<axis=1>(s, first)", {"Softmax"}),
    "a number for all": ("d = Add(x, one) y = Gather<axis=1>(d, first)", {"Add"}),
}
WHOLE = {
    "another reader": "h = MatMul(x, w) g = Gather<axis=1>(h, first) r = ReduceSum(h)"
    " y = Add(g, r)",
    "another row": "h = Relu(x) g = Gather<axis=1>(h, first) r = Gather<axis=1>(h, last)"
    " y = Add(g, r)",
    "its own axis": "h = Softmax(x) y = Gather<axis=2>(h, first)",
    "columns of a product": "h = MatMul(x, w) y = Gather<axis=2>(h, first)",
    "a weight for each row": "h = Add(x, each) y = Gather<axis=1>(h, first)",
    "a norm over rows": "h = LayerNormalization<axis=1>(x, each) y = Gather<axis=1>(h, first)",
}


@pytest.mark.parametrize("case", ROWS)
def test_only_rows_that_are_read_are_computed(case):
    body, operators = ROWS[case]
    model = parse(body)
    after = tidied(model, ["y"])
    rows = {n.op_type: n.outputs[0].shape[1] for n in after.graph if n.op_type in operators}
    assert rows == dict.fromkeys(operators, 2 if case == "some rows" else 1)
    assert_same(model, after)


@pytest.mark.parametrize("case", WHOLE)
def test_rows_that_somebody_reads_stay(case):
    model = parse(WHOLE[case])
    assert pick_early(model.clone()) == 0
    assert_same(model, tidied(model, ["y"]))


def test_an_output_keeps_its_rows():
    model = parse("h = Relu(x) y = Gather<axis=1>(h, some)")
    after = tidied(model, ["h", "y"])
    assert [list(v.shape)[1] for v in after.graph.outputs] == [5, 2]


def test_the_model_itself_stays():
    model = parse(ROWS["one row"][0])
    before = [n.op_type for n in model.graph]
    tidied(model, ["y"])
    assert [n.op_type for n in model.graph] == before
    assert fold_sizes(model) == 0


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_restored_optimiser_goes_on_with_the_same_bits_in_every_memory_format(kind):
    def start():
        torch.manual_seed(0)
        weight = torch.randn(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        parameter = torch.nn.Parameter(weight)
        extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
        groups = [{"params": [parameter], "names": ["w"]}]
        return parameter, kind(groups, 0.1, fused=True, **extra)

    def step(parameter, optimiser):
        parameter.grad = torch.sin(parameter.detach())
        optimiser.step()

    one, first = start()
    step(one, first)
    two, second = start()
    two.data.copy_(one.data)
    restore(second, {k: t.contiguous().clone() for k, t in state_of(first).items()})
    for _ in range(3):
        step(one, first)
        step(two, second)
    assert torch.equal(one, two)
