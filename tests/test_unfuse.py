"""Every expansion against ONNX Runtime running the fused operator itself."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnxslim_kd import model
from onnxslim_kd.api import cut, prune
from onnxslim_kd.cli import main
from onnxslim_kd.compare import Reference
from onnxslim_kd.errors import ProofError
from onnxslim_kd.passes.prune import Choice
from onnxslim_kd.passes.ratios import Amount
from onnxslim_kd.passes.strip import infer_prune
from onnxslim_kd.passes.unfuse import EXPANSIONS, MICROSOFT, unfuse
from tests.models import Case, proto

TOKENS = "float[B,S,16] x"
SAME = "float[B,S,16] y"
PACKED = "float[16,48] w, float[48] wb"
QKV = "float[B,S,16] q, float[B,T,16] k, float[B,T,16] v"
CODES = "uint8[B,4,6,6] x"
SCALES = "float ws, uint8 wz, float wposs, uint8 wzy"
Q_IN = "c = QuantizeLinear(x, wposx, wzx)"
Q_OUT = "y = DequantizeLinear(d, wposy, wzy)"
Q = "float wposx, uint8 wzx, float wposy, uint8 wzy"
IMAGE, PIXELS = "float[B,4,6,6] x", "float[B,4,6,6] y"


def fused(body: str, weights: str = "float w_", inputs: str = TOKENS, outputs: str = SAME) -> Case:
    return Case(body.replace("ms.", "com.microsoft."), weights, inputs, outputs, opset=17)


def conv(activation: str) -> Case:
    return fused(
        f'y = ms.FusedConv<pads=[1,1,1,1], activation="{activation}">(x, w, wb)',
        "float[5,4,3,3] w, float[5] wb",
        IMAGE,
        "float[B,5,6,6] y",
    )


def rows(call: str, weights: str = "float[16,8] w, float[8] wb") -> Case:
    return fused(f"y = ms.{call}", weights, "float[B,16] x", "float[B,8] y")


def quantised(call: str, outputs: str = PIXELS) -> Case:
    return fused(f"{Q_IN} d = ms.{call} {Q_OUT}", Q, IMAGE, outputs)


CASES = {
    "conv": conv("Relu"),
    "conv tanh": conv("Tanh"),
    "conv leaky": fused(
        'y = ms.FusedConv<group=2, activation="LeakyRelu", activation_params=[0.2]>(x, w)',
        "float[6,2,3,3] w",
        IMAGE,
        "float[B,6,4,4] y",
    ),
    "conv clip": fused(
        'y = ms.FusedConv<activation="Clip", activation_params=[-0.1, 0.2]>(x, w)',
        "float[5,4,1,1] w",
        IMAGE,
        "float[B,5,6,6] y",
    ),
    "conv hard": fused(
        'y = ms.FusedConv<activation="HardSigmoid", activation_params=[0.3, 0.4]>(x, w)',
        "float[5,4,1,1] w",
        IMAGE,
        "float[B,5,6,6] y",
    ),
    "conv sum": fused(
        'y = ms.FusedConv<activation="Relu">(x, w, wb, x)',
        "float[4,4,1,1] w, float[4] wb",
        IMAGE,
        PIXELS,
    ),
    "gemm": rows('FusedGemm<activation="Relu", alpha=0.5>(x, w, wb)'),
    "gemm leaky": rows(
        'FusedGemm<transB=1, activation="LeakyRelu", activation_alpha=0.3>(x, w)', "float[8,16] w"
    ),
    "matmul": fused(
        "t = ms.FusedMatMul<transB=1, alpha=0.25>(x, x) y = ms.FusedMatMul<transA=1>(t, x)"
    ),
    "matmul weight": rows("FusedMatMul<transB=1>(x, w)", "float[8,16] w"),
    "matmul old": fused("y = ms.TransposeMatMul<transB=1>(x, w)", "float[16,16] w"),
    "gelu": fused("y = ms.Gelu(x)"),
    "gelu of the unknown": fused("a = ms.Gelu(x) b = Neg(a) y = ms.QuickGelu(b)"),
    "bias gelu": fused("y = ms.BiasGelu(x, w)", "float[16] w"),
    "fast gelu": fused("y = ms.FastGelu(x)"),
    "fast gelu bias": fused("y = ms.FastGelu(x, w)", "float[16] w"),
    "quick gelu": fused("y = ms.QuickGelu<alpha=1.5>(x)"),
    "skip norm": fused("y = ms.SkipLayerNormalization(x, x, w)", "float[16] w"),
    "skip norm all": fused(
        "y, u, v, z = ms.SkipLayerNormalization<epsilon=0.01>(x, s, w, wb, wc)",
        "float[16] w, float[16] wb, float[16] wc",
        TOKENS + ", float[B,S,16] s",
        SAME + ", float[B,S,16] z",
    ),
    "skip rms": fused(
        "y, u, v, z = ms.SkipSimplifiedLayerNormalization(x, x, w, wc)",
        "float[16] w, float[16] wc",
        outputs=SAME + ", float[B,S,16] z",
    ),
    "rms": fused("y = SimplifiedLayerNormalization<epsilon=0.01>(x, w)", "float[16] w"),
    "embed": fused(
        "y, u = ms.EmbedLayerNormalization(i, t, w1, w2, w3, w4, w5)",
        "float[9,16] w1, float[32,16] w2, float[2,16] w3, float[16] w4, float[16] w5",
        "int32[B,S] i, int32[B,S] t",
    ),
    "embed alone": fused(
        "y, u, z = ms.EmbedLayerNormalization(i, , w1, w2, , w4, w5, , p)",
        "float[9,16] w1, float[32,16] w2, float[16] w4, float[16] w5",
        "int32[B,S] i, int32[B,S] p",
        SAME + ", float[B,S,16] z",
    ),
    "embed and lengths": fused(
        "h, m = ms.EmbedLayerNormalization(i, t, w1, w2, w3, w4, w5, k)"
        " y = ms.Attention<num_heads=2>(h, w, wb, m)",
        "float[9,16] w1, float[32,16] w2, float[2,16] w3, float[16] w4, float[16] w5, " + PACKED,
        "int32[B,S] i, int32[B,S] t, int32[B,S] k",
    ),
    "attention": fused("y = ms.Attention<num_heads=4>(x, w, wb)", PACKED),
    "attention past": fused(
        "y, z = ms.Attention<num_heads=4, unidirectional=1>(x, w, wb, m, p)",
        PACKED,
        "float[B,3,16] x, int32[B,8] m, float[2,B,4,5,4] p",
        "float[B,3,16] y, float[2,B,4,8,4] z",
    ),
    "attention present": fused(
        "y, z = ms.Attention<num_heads=4>(x, w, wb)",
        PACKED,
        outputs=SAME + ", float[2,B,4,S,4] z",
    ),
    "attention mask": fused(
        "m = Greater(i, one) k = Cast<to=6>(m) y = ms.Attention<num_heads=4>(x, w, wb, k)",
        PACKED,
        TOKENS + ", int32[B,S] i, int32 one",
    ),
    "attention bias": fused(
        "y = ms.Attention<num_heads=4, scale=0.3>(x, w, wb, , , b)",
        PACKED,
        TOKENS + ", float[B,4,S,S] b",
    ),
    "attention widths": fused(
        "y = ms.Attention<num_heads=2, qkv_hidden_sizes=[8,8,16]>(x, w, wb)",
        "float[16,32] w, float[32] wb",
    ),
    "attention causal": fused("y = ms.Attention<num_heads=4, unidirectional=1>(x, w, wb)", PACKED),
    "heads": fused("y = ms.MultiHeadAttention<num_heads=4>(q, k, v)", "float w", QKV),
    "heads bias": fused("y = ms.MultiHeadAttention<num_heads=2>(q, k, v, w)", "float[48] w", QKV),
    "heads mask": fused(
        "m = Greater(i, one) j = Cast<to=6>(m)"
        " y = ms.MultiHeadAttention<num_heads=4, mask_filter_value=-50.0>(q, k, v, , j, b)",
        "float w",
        QKV + ", int32[B,T] i, int32 one, float[1,4,S,T] b",
    ),
    "heads apart": fused(
        "y = ms.MultiHeadAttention<num_heads=4>(q, k, v)",
        "float w",
        "float[B,S,16] q, float[B,4,T,4] k, float[B,4,T,4] v",
    ),
    "heads past": fused(
        "y, pk, pv = ms.MultiHeadAttention<num_heads=4, unidirectional=1>(q, k, v, , , , a, b)",
        "float w",
        "float[B,S,16] q, float[B,S,16] k, float[B,S,16] v, float[B,4,P,4] a, float[B,4,P,4] b",
        SAME + ", float[B,4,R,4] pk, float[B,4,R,4] pv",
    ),
    "rotary": fused(
        "y = ms.RotaryEmbedding(x, i, w1, w2)",
        "float[99,4] w1, float[99,4] w2",
        TOKENS + ", int64[B,S] i",
    ),
    "rotary heads": fused(
        "y = ms.RotaryEmbedding(x, i, w1, w2)",
        "float[99,4] w1, float[99,4] w2",
        "float[B,2,S,8] x, int64[B,S] i",
        "float[B,2,S,8] y",
    ),
    "qlinear add": quantised("QLinearAdd(c, wposx, wzx, c, wposx, wzx, wposy, wzy)"),
    "qlinear mul": quantised("QLinearMul(c, wposx, wzx, c, wposx, wzx, wposy, wzy)"),
    "qlinear sigmoid": quantised("QLinearSigmoid(c, wposx, wzx, wposy, wzy)"),
    "qlinear leaky": quantised("QLinearLeakyRelu<alpha=0.5>(c, wposx, wzx, wposy, wzy)"),
    "qlinear softmax": quantised("QLinearSoftmax<opset=17, axis=1>(c, wposx, wzx, wposy, wzy)"),
    "qlinear average": quantised(
        "QLinearAveragePool<kernel_shape=[2,2], strides=[2,2]>(c, wposx, wzx, wposy, wzy)",
        "float[B,4,3,3] y",
    ),
    "qlinear global": quantised(
        "QLinearGlobalAveragePool(c, wposx, wzx, wposy, wzy)", "float[B,4,1,1] y"
    ),
    "qlinear concat": quantised(
        "QLinearConcat<axis=1>(wposy, wzy, c, wposx, wzx, c, wposx, wzx)", "float[B,8,6,6] y"
    ),
    "qgemm": fused(
        f"{Q_IN} d = ms.QGemm<transB=1>(c, wposx, wzx, wq, wpos, wzi, wc, wposy, wzy) {Q_OUT}",
        Q + ", int8[8,16] wq, float[8] wpos, int8[8] wzi, int32[8] wc",
        "float[B,16] x",
        "float[B,8] y",
    ),
    "qgemm float": fused(
        f"{Q_IN} y = ms.QGemm(c, wposx, wzx, wq, wpos, wzi)",
        "float wposx, uint8 wzx, int8[16,8] wq, float wpos, int8 wzi",
        "float[B,16] x",
        "float[B,8] y",
    ),
    "integers": fused(
        f"{Q_IN} y = ms.MatMulIntegerToFloat(c, wq, wposx, wpos, wzx, wzi, wb)",
        "float wposx, uint8 wzx, int8[16,8] wq, float[8] wpos, int8[8] wzi, float[8] wb",
        "float[B,16] x",
        "float[B,8] y",
    ),
    "dynamic": fused(
        "y = ms.DynamicQuantizeMatMul(x, wq, wpos, wzi, wb)",
        "int8[16,8] wq, float[8] wpos, int8[8] wzi, float[8] wb",
        "float[B,16] x",
        "float[B,8] y",
    ),
}


def given(case: Case) -> onnx.ModelProto:
    made = proto(case)
    made.opset_import.add(domain=MICROSOFT, version=1)
    for tensor in made.graph.initializer:
        if tensor.name in ("wposx", "wposy"):  # steps of a hundredth, so that one more matters not
            array = onnx.numpy_helper.to_array(tensor) / np.float32(64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return made


def is_fused(node: ir.Node) -> bool:
    return node.domain == MICROSOFT or node.op_type == "SimplifiedLayerNormalization"


@pytest.mark.parametrize("name", CASES)
def test_equals_what_the_runtime_computes(name: str) -> None:
    made = given(CASES[name])
    spelled = model.load(made)
    number = sum(map(is_fused, spelled.graph))
    done = unfuse(spelled)
    assert sum(done.expanded.values()) == number > 0
    assert not any(map(is_fused, spelled.graph)), done.left
    assert not done.left
    with model.without_weights(spelled) as outline:
        onnx.checker.check_model(outline, full_check=True)
    reference = Reference.of(spelled, source=ir.serde.deserialize_model(made), variants=1)
    assert reference.worst(spelled) < (0.02 if name.startswith("q") else 1e-5)


def test_every_expansion_is_compared() -> None:
    used = {
        node.op_type for case in CASES.values() for node in given(case).graph.node if node.domain
    }
    assert used | {"SimplifiedLayerNormalization"} == set(EXPANSIONS)


REFUSED = {
    "output mean is used": (
        fused(
            "y, mean = ms.SkipLayerNormalization(x, x, w)",
            "float[16] w",
            outputs=SAME + ", float[B,S,1] mean",
        )
    ),
    "do_rotary is 1": fused("y = ms.Attention<num_heads=4, do_rotary=1>(x, w, wb)", PACKED),
    "input 6 (n) is given": fused(
        "y, z = ms.Attention<num_heads=4>(x, w, wb, , p, , n)",
        PACKED,
        TOKENS + ", float[2,B,4,P,4] p, int32 n",
    ),
    "a mask of 4 axes": fused(
        "y = ms.Attention<num_heads=4>(x, w, wb, m)", PACKED, TOKENS + ", int32[B,1,M,M] m"
    ),
    "a mask of one axis that may hold other things than lengths": fused(
        "y = ms.Attention<num_heads=4>(x, w, wb, m)", PACKED, TOKENS + ", int32[M] m"
    ),
    "queries, keys and values are packed into one": fused(
        "y = ms.MultiHeadAttention<num_heads=4>(x)", "float w", "float[B,S,4,3,4] x"
    ),
    "its bias is computed": fused(
        "y = ms.MultiHeadAttention<num_heads=4>(q, k, v, b)", "float w", QKV + ", float[48] b"
    ),
    "the type of what it computes with is not known": fused(
        "z = ms.Unheard(x) y = ms.Gelu(z)",
    ),
    "transBatchA is 1": fused("y = ms.FusedMatMul<transBatchA=1>(x, x)"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_other_forms_stay_and_say_why(reason: str) -> None:
    loaded = model.load(given(REFUSED[reason]))
    before = [node.op_type for node in loaded.graph], set(loaded.graph.initializers)
    done = unfuse(loaded)
    assert not done.expanded
    assert list(done.left.values()) == [reason]
    assert ([node.op_type for node in loaded.graph], set(loaded.graph.initializers)) == before


def test_standard_operators_of_the_same_name_stay() -> None:
    text = '<ir_version: 10, opset_import: ["": 23]> g (float[2,4,3,8] x) => (float[2,4,3,8] y)'
    loaded = model.load(ir.from_onnx_text(text + "{ z = Attention(x, x, x) y = Gelu(z) }"))
    done = unfuse(loaded)
    assert not done.expanded
    assert [node.op_type for node in loaded.graph] == ["Attention", "Gelu"]


NET = fused(
    'a = ms.FusedConv<pads=[1,1,1,1], activation="Relu">(x, w1)'
    ' b = ms.FusedConv<activation="Relu">(a, w2, , a)'
    " y = Conv(b, w3)",
    "float[8,4,3,3] w1, float[8,8,1,1] w2, float[5,8,1,1] w3",
    IMAGE,
    "float[B,5,6,6] y",
)


def test_a_fused_network_is_pruned(tmp_path: Path) -> None:
    path = tmp_path / "fused.onnx"
    onnx.save(given(NET), path)
    done = prune(path, Choice(".*", 0.5, amount=Amount(1)), tmp_path / "out.onnx")
    widths = {p: m.after for g in done.plan.groups for m in g.members if (p := m.parameter)}
    assert widths == {"w1": 4, "w2": 4, "w3": 4}
    assert done.plan.notes == (
        "2 FusedConv: written as standard operators, which ONNX Runtime fuses when it loads them",
    )
    assert done.proof is not None
    again = cut(path, done.plan)
    assert [n.op_type for n in again.graph] == ["Conv", "Relu", "Conv", "Add", "Relu", "Conv"]


def test_what_was_spelled_out_wrong_is_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EXPANSIONS, "FusedConv", lambda e: [e.op("Conv", *e.node.inputs[:2])])
    path = tmp_path / "fused.onnx"
    onnx.save(given(CASES["conv clip"]), path)
    with pytest.raises(ProofError, match="written as standard operators, the model is another"):
        prune(path, Choice(".*", 0.0), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_norms_that_the_runtime_writes_into_older_opsets() -> None:
    case = Case(
        "a = LayerNormalization(x, w1, w2) b = SimplifiedLayerNormalization(a, w1)"
        " c = Squeeze<axes=[0]>(b) y = Relu(c)",
        "float[16] w1, float[16] w2",
        inputs="float[1,S,16] x",
        outputs="float[S,16] y",
        opset=12,
    )
    loaded = model.load(proto(case))
    assert {node.domain for node in loaded.graph} == {""}
    assert set(loaded.graph.opset_imports) == {""}
    assert unfuse(loaded).expanded == {"SimplifiedLayerNormalization": 1}
    reference = Reference.of(loaded, source=ir.serde.deserialize_model(proto(case)))
    assert reference.worst(loaded) < 1e-5


def test_a_fused_network_is_trained(tmp_path: Path) -> None:
    case = fused(
        'a = ms.FusedConv<pads=[1,1,1,1], activation="Relu">(x, w1, wb1)'
        " p = GlobalAveragePool(a) f = Flatten(p) y = Gemm(f, w2)",
        "float[8,1,3,3] w1, float[8] wb1, float[8,10] w2",
        "float[B,1,8,8] x",
        "float[B,10] y",
    )
    onnx.save(given(case), tmp_path / "fused.onnx")
    arguments = ["train", "fused.onnx", "-o", "out.onnx", "--epochs", "1", "--threads", "1"]
    done = CliRunner().invoke(
        main, [str(tmp_path / a) if a.endswith("onnx") else a for a in arguments]
    )
    assert done.exit_code == 0, done.output
    assert "1 FusedConv: written as standard operators" in done.output
    trained = model.load(tmp_path / "out.onnx")
    assert {"w1", "wb1", "w2"} <= set(trained.graph.initializers)


def test_infer_prune_writes_out_what_is_not_onnx_and_leaves_the_rest() -> None:
    case = fused("a = ms.Gelu(x) y = SimplifiedLayerNormalization(a, w)", "float[16] w")
    done = infer_prune(given(case))
    kinds = {node.op_type for node in done.model.graph}
    assert kinds == {"Gelu", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"}
    assert done.proof is not None


def test_a_note_says_when_the_fused_file_does_not_run() -> None:
    """There is no kernel of FusedGemm for float64; those of Gemm and Relu are there."""
    case = fused(
        'a = ms.FusedGemm<activation="Relu">(x, w1, wb1) y = Gemm(a, w2)',
        "double[16,8] w1, double[8] wb1, double[8,10] w2",
        "double[B,16] x",
        "double[B,10] y",
    )
    done = prune(given(case), Choice(pattern="w1", ratio=0.5, amount=Amount(1)))
    assert done.proof is not None
    assert any("not compared with the file, which does not run" in n for n in done.plan.notes)
