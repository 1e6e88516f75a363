import onnx_ir as ir
from test_compare import RELU, load

from onnxslim_kd.passes.gate import Step, apply, size
from tests.same import outputs_differ


def shorten(model: ir.Model) -> None:
    """A right step: nothing reads the second node."""
    model.graph.remove(next(n for n in model.graph if n.op_type == "Neg"), safe=True)


def spoil(model: ir.Model) -> None:
    next(n for n in model.graph if n.op_type == "Relu").op_type = "Abs"


def crash(model: ir.Model) -> None:
    spoil(model)
    raise KeyError("a bug in a library")


def net() -> ir.Model:
    return load(RELU.replace("y = Relu(x)", "y = Relu(x) unused = Neg(x)"))


def test_right_steps_are_compared_once() -> None:
    seen: list[int] = []
    steps = [Step("short", shorten), Step("none", lambda m: None)]
    done = apply(net(), steps, seen_by(seen), again=net)
    assert (size(done.model), done.removed, done.notes) == (1, {"short": 1, "none": 0}, [])
    assert seen == [1]


def seen_by(seen: list[int]):
    def differs(model: ir.Model) -> None:
        seen.append(size(model))

    return differs


def test_wrong_and_crashing_steps_are_left_out_by_name() -> None:
    original = net()
    steps = [Step("spoil", spoil), Step("short", shorten), Step("crash", crash)]
    done = apply(net(), steps, lambda model: outputs_differ(original, model), again=net)
    assert [node.op_type for node in done.model.graph] == ["Relu"]
    assert done.removed == {"spoil": 0, "short": 1, "crash": 0}
    assert done.notes[0].startswith("spoil: left out, outputs differ by")
    assert done.notes[1] == "crash: left out, it failed: 'a bug in a library'"
