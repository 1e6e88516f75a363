"""Whole nets: forward as ONNX Runtime, training as the torch module they came from."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from lowering_run import feeds_of, run_ort

from onnxslim_kd import model as model_io
from onnxslim_kd.training.lowering import lower
from onnxslim_kd.zoo.export import build, export
from tests.packages import folder

RNG = np.random.default_rng(0)
HIDDEN, HEADS, LENGTH = 16, 4, 5


def assert_equal_to_ort(model, feeds, tolerance=1e-4):
    names = [value.name for value in model.graph.outputs]
    with torch.no_grad():
        found = lower(model)(feeds_of(feeds))
    with model_io.embedded(model):
        expected = run_ort(model, feeds, names)
    for name, want in zip(names, expected, strict=True):
        scale = max(np.abs(want).max(initial=0), 1e-2)
        np.testing.assert_allclose(found[name].numpy(), want, rtol=0, atol=tolerance * scale)


# --------------------------------------------------------------- against torch modules


@pytest.mark.parametrize("name", ["resnet20", "mobilenet_small"])
def test_training_a_graph_is_training_its_module(name):
    model = export(name, inputs={"image": (2, 3, 16, 16)}, arguments={"width": 8}, seed=0)
    lowered = lower(model).train()
    torch.manual_seed(0)
    native = build(name, {"width": 8})
    native.train()
    data, labels = torch.randn(8, 3, 16, 16), torch.arange(8)
    ours = torch.optim.SGD(lowered.parameters(), 0.05, momentum=0.9)
    theirs = torch.optim.SGD(native.parameters(), 0.05, momentum=0.9)
    for _ in range(5):
        (logits,) = lowered({"image": data}).values()
        loss, expected = F.cross_entropy(logits, labels), F.cross_entropy(native(data), labels)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        for optimizer, value in ((ours, loss), (theirs, expected)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    assert len(lowered.parameters_by_name) == len(list(native.parameters()))


# ------------------------------------------------------------------------- small nets


def parse(body, inputs, outputs, **arrays):
    text = f'<ir_version: 9, opset_import: ["":20]> net ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, array in arrays.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    return model_io.load(proto)


def normal(*shape):
    return (RNG.standard_normal(shape) * 0.3).astype(np.float32)


def transformer():
    """One encoder layer over embedded tokens, with shapes computed as exporters do."""
    body = """
    e = Gather(emb, ids) x0 = Add(e, position) x = LayerNormalization(x0, g0, b0)
    s = Shape(x) n = Gather(s, zero) nu = Unsqueeze(n, zero1) heads = Concat<axis=0>(nu, split)
    q0 = MatMul(x, wq) k0 = MatMul(x, wk) v0 = MatMul(x, wv)
    q1 = Reshape(q0, heads) k1 = Reshape(k0, heads) v1 = Reshape(v0, heads)
    q = Transpose<perm=[0,2,1,3]>(q1) k = Transpose<perm=[0,2,3,1]>(k1)
    v = Transpose<perm=[0,2,1,3]>(v1)
    width = Gather(s, last) wf = Cast<to=1>(width) root = Sqrt(wf)
    raw = MatMul(q, k) scores = Div(raw, root) p = Softmax(scores) mix = MatMul(p, v)
    m = Transpose<perm=[0,2,1,3]>(mix) joined = Concat<axis=0>(nu, join) c = Reshape(m, joined)
    o = MatMul(c, wo) r = Add(x, o) f = LayerNormalization(r, g1, b1)
    h = MatMul(f, w1) a = Gelu(h) d = MatMul(a, w2) y = Add(f, d)"""
    square = {name: normal(HIDDEN, HIDDEN) for name in ("wq", "wk", "wv", "wo")}
    vectors = {name: normal(HIDDEN) + 1 for name in ("g0", "b0", "g1", "b1")}
    return parse(
        body,
        f"int64[N,{LENGTH}] ids",
        f"float[N,{LENGTH},{HIDDEN}] y",
        emb=normal(11, HIDDEN),
        position=normal(LENGTH, HIDDEN),
        w1=normal(HIDDEN, 32),
        w2=normal(32, HIDDEN),
        zero=0,
        last=-1,
        zero1=[0],
        split=[LENGTH, HEADS, HIDDEN // HEADS],
        join=[LENGTH, HIDDEN],
        **square,
        **vectors,
    )


def test_a_transformer_layer():
    model = transformer()
    assert_equal_to_ort(model, {"ids": RNG.integers(0, 11, (3, LENGTH))}, 1e-5)
    trained = lower(model).parameters_by_name
    floats = {k for k, v in model.graph.initializers.items() if v.dtype == ir.DataType.FLOAT}
    assert set(trained) == floats


def test_a_recurrent_net():
    body = """
    t = Transpose<perm=[2,0,1]>(x)
    a, h, c = LSTM<hidden_size=6, direction="bidirectional">(t, w, r, b)
    s = Squeeze(a, axes0) m = ReduceMean<keepdims=0>(a, axes0) l = Transpose<perm=[1,0,2]>(h)
    f = Flatten(l) y = Gemm<transB=1>(f, fc, fb)"""
    model = parse(
        body.replace("s = Squeeze(a, axes0) ", ""),
        "float[N,3,T] x",
        "float[N,4] y, float[2,N,6] m",
        w=normal(2, 24, 3),
        r=normal(2, 24, 6),
        b=normal(2, 48),
        fc=normal(4, 12),
        fb=normal(4),
        axes0=[0],
    )
    assert_equal_to_ort(model, {"x": normal(5, 3, 7)}, 1e-5)
    assert set(lower(model).parameters_by_name) == {"w", "r", "b", "fc", "fb"}


# ------------------------------------------------------------------------- real files


OCR = folder("rapidocr_onnxruntime") / "models"
VAD = folder("silero_vad") / "data"
_AUDIO = {"input": (1, 576), "state": (2, 1, 128), "h": (2, 1, 64), "c": (2, 1, 64), "sr": ()}
_SEQUENCE = {"input": (1, 576), "h": (1, 1, 128), "c": (1, 1, 128)}
REAL = {
    OCR / "ch_PP-OCRv4_det_infer.onnx": {"x": (1, 3, 64, 96)},
    OCR / "ch_PP-OCRv4_rec_infer.onnx": {"x": (2, 3, 48, 160)},
    OCR / "ch_ppocr_mobile_v2.0_cls_infer.onnx": {"x": (2, 3, 48, 192)},
    VAD / "silero_vad.onnx": _AUDIO,
    VAD / "silero_vad_16k_op15.onnx": _AUDIO,
    VAD / "silero_vad_half.onnx": _AUDIO,
    VAD / "silero_vad_op18_ifless.onnx": _AUDIO,
    VAD / "silero_vad_openvino_16k.onnx": _AUDIO,
}


@pytest.mark.real
@pytest.mark.parametrize("path", REAL, ids=[path.stem for path in REAL])
def test_real_models(path):
    if not path.is_file():
        pytest.skip("the package is not installed")
    model = model_io.load(path)
    feeds = {}
    for value in model.graph.inputs:
        array = RNG.standard_normal(REAL[path][value.name])
        feeds[value.name] = np.array(16000 if value.name == "sr" else array, value.dtype.numpy())
    assert_equal_to_ort(model, feeds)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dynamo"), [("Bert", True), ("ViT", True), ("ViT", False), ("GPT2", True)]
)
@pytest.mark.filterwarnings("ignore")
def test_transformers(kind, dynamo, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "Bert": {**sizes, "intermediate_size": 64, "vocab_size": 50},
        "ViT": {**sizes, "intermediate_size": 64, "image_size": 32, "patch_size": 8},
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 16},
    }[kind]
    module = getattr(transformers, f"{kind}Model")(
        getattr(transformers, f"{kind}Config")(**config, return_dict=False)
    )
    if kind == "GPT2":
        module.config.use_cache = False
    sample = torch.randn(2, 3, 32, 32) if kind == "ViT" else torch.randint(0, 50, (2, 7))
    path = tmp_path / "model.onnx"
    torch.onnx.export(
        module.eval(), (sample,), path, dynamo=dynamo, opset_version=18, input_names=["sample"]
    )
    assert_equal_to_ort(model_io.load(path), {"sample": sample.numpy()})


# ---------------------------------------------------------------------- transformers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what torch says about tracing
@pytest.mark.parametrize("dynamo", [False, True])
def test_convnext_of_both_exporters_trains(tmp_path, dynamo):
    pytest.importorskip("transformers")
    from tests.transformer_models import export as export_transformer

    model = model_io.load(export_transformer("convnext", tmp_path / "net.onnx", dynamo=dynamo))
    feeds = {"pixel_values": RNG.standard_normal((2, 3, 64, 64)).astype(np.float32)}
    assert_equal_to_ort(model, feeds)
    lowered = lower(model).train()
    optimizer = torch.optim.SGD(lowered.parameters(), 1e-3)
    losses = []
    for _ in range(2):
        (logits,) = lowered(feeds_of(feeds)).values()
        losses.append(F.cross_entropy(logits, torch.tensor([3, 7])))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[1] < losses[0]
    assert len(lowered.parameters_by_name) >= 60
    assert all(parameter.grad is not None for parameter in lowered.parameters())
