"""Real models, as packages ship them and as exporters write them: everything prunable goes.

Every cut is proven by `api.prune` (the silenced original in ONNX Runtime, on two input shapes). The
proof cannot see channels that are tied too widely, so the MACs left and the refusals are bounded
too: a rule that pins everything fails here.
"""

import re
import warnings
from functools import cache
from pathlib import Path

import pytest

from onnxslim_kd import api
from onnxslim_kd.passes.prune import Choice
from onnxslim_kd.passes.ratios import Amount
from tests.packages import folder

pytestmark = pytest.mark.real


def prune_all(
    source: Path, ratio: float = 0.5, criterion: str = "l1", **reading: str
) -> api.Pruned:
    choice = Choice(pattern=".*", ratio=ratio, criterion=criterion, amount=Amount(round_to=1))
    return api.prune(source, choice, reading=api.Reading(**reading))  # type: ignore[arg-type]


def left(done: api.Pruned) -> float:
    """The share of the MACs that is left."""
    return done.plan.macs_after / done.plan.macs_before


def reasons(done: api.Pruned) -> set[str]:
    return {refusal.reason for refusal in done.plan.refused}


# ---------------------------------------------------------------- what packages ship


@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_every_layer_of_a_text_detector_goes(ratio: float) -> None:
    done = prune_all(ocr("ch_PP-OCRv4_det_infer"), ratio)
    nodes = {m.node for group in done.plan.groups for m in group.members}
    layers = [n for n in done.model.graph if n.op_type in ("Conv", "ConvTranspose")]
    kinds = [n.op_type for n in layers]
    assert (kinds.count("Conv"), kinds.count("ConvTranspose")) == (62, 2)
    assert {n.name for n in layers} <= nodes
    assert not done.plan.refused
    assert left(done) <= (1 - ratio) ** 2 + 0.04


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize(
    ("name", "output", "slack"),
    [
        ("ch_PP-OCRv4_rec_infer", "softmax_11.tmp_0", 0.05),
        ("ch_ppocr_mobile_v2.0_cls_infer", "save_infer_model/scale_0.tmp_1", 0.10),
    ],
)
def test_text_readers_keep_their_classes_alone(
    name: str, output: str, slack: float, ratio: float
) -> None:
    done = prune_all(ocr(name), ratio)
    assert reasons(done) == {f"graph output {output}"}
    assert len(done.plan.refused) == 2  # weight and bias of the head
    assert left(done) <= (1 - ratio) ** 2 + slack


def ocr(name: str) -> Path:
    return folder("rapidocr_onnxruntime") / "models" / f"{name}.onnx"


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "silero_vad_16k_op15",
            r"captured by the body of If /model/decoder/If"
            r"|(LSTM|Conv) /model/decoder/.*: the shape of an input is not known",
        ),
        (
            "silero_vad_half",
            r"captured by the body of If /decoder/If"
            r"|(LSTM|Conv) /decoder/.*: the shape of an input is not known",
        ),
        ("silero_vad_16k_sequence", r"meets h, which has no channels to remove"),
        ("silero_vad_openvino_16k", r"meets .*Unsqueeze.*, which has no channels to remove"),
    ],
)
def test_speech_detectors_keep_what_meets_their_state(name: str, reason: str, ratio: float) -> None:
    done = prune_all(vad(name), ratio)
    assert len(done.plan.refused) >= 2
    assert all(re.fullmatch(reason, found) for found in reasons(done))
    assert left(done) <= (0.47 if ratio == 0.5 else 0.69)


@pytest.mark.parametrize("name", ["silero_vad", "silero_vad_op18_ifless"])
def test_layers_inside_of_bodies_are_left_whole(name: str) -> None:
    done = prune_all(vad(name))
    assert not any(group.removed for group in done.plan.groups)
    assert any(r.parameter.endswith("decoder.rnn.weight_ih") for r in done.plan.refused)
    assert all(re.match("(inside|captured by) the body of If", found) for found in reasons(done))


def vad(name: str) -> Path:
    return folder("silero_vad") / "data" / f"{name}.onnx"


LIGHT = {  # the head, by what it is output as; MACs left at 0.5
    "squeezenet": ("softmaxout_1", 0.33),
    "shufflenet": ("gpu_0/softmax_1", 0.36),
    "resnet50": ("gpu_0/softmax_1", 0.26),
    "inception_v1": ("prob_1", 0.28),
}
LARGE = {
    "inception_v2": ("prob_1", 0.27),
    "densenet121": ("fc6_1", 0.27),
    "zfnet512": ("gpu_0/softmax_1", 0.29),
    "bvlc_alexnet": ("prob_1", 0.30),
    "vgg19": ("prob_1", 0.26),
}


@pytest.mark.parametrize(
    "name", [*LIGHT, *[pytest.param(name, marks=pytest.mark.slow) for name in LARGE]]
)
def test_networks_whose_weights_are_computed(name: str) -> None:
    """IR 3, weights from ConstantOfShape: there is nothing to score, so that they go at random."""
    output, most = (LIGHT | LARGE)[name]
    path = folder("onnx") / "backend/test/data/light" / f"light_{name}.onnx"
    done = prune_all(path, criterion="random")
    assert f"graph output {output}" in reasons(done)
    # shufflenet: 3 groups of 40 channels shuffled into 3 groups, which ties them all
    narrow = 8 if name == "shufflenet" else 0
    assert len(done.plan.refused) == 1 + narrow
    assert left(done) <= most


# -------------------------------------------------------------------- transformers


HEADS = {  # MACs left at 0.3 and 0.5 with whole heads; parameters refused
    "vit": (0.58, 0.34, 2),
    "bert": (0.74, 0.51, 21),  # the hidden size is the output
    "bert_lm": (0.56, 0.30, 2),
    "gpt2": (0.54, 0.29, 1),
    "llama": (0.56, 0.30, 1),
    "convnext": (0.54, 0.31, 2),
    "swin": (0.57, 0.29, 2),
    "whisper": (0.56, 0.30, 1),
    "t5": (0.56, 0.30, 1),
}


@cache
def exported(
    name: str,
    folder: Path,
    *,
    dynamo: bool = False,
    attention: str = "eager",
    opset: int | None = None,
) -> Path:
    from tests.transformer_models import export

    path = folder / f"{name}_{attention}{'_dynamo' if dynamo else ''}.onnx"
    with warnings.catch_warnings():  # what torch says about tracing
        warnings.simplefilter("ignore")
        return export(name, path, dynamo=dynamo, opset=opset, attention=attention)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


def check(name: str, done: api.Pruned, most: float, refused: int) -> None:
    """Only the output's layer stays, and what rotary tables are made of."""
    kept = [r for r in done.plan.refused if "rotary" not in r.parameter]
    assert {r.reason for r in kept} == {"graph output output"}
    assert len(kept) == refused
    assert left(done) <= most
    assert done.plan.approximate == (name != "bert")  # only there no norm runs over what goes


@pytest.mark.parametrize("ratio", [0.3, 0.5])
@pytest.mark.parametrize("name", HEADS)
def test_transformers_lose_whole_heads(name: str, ratio: float, exports: Path) -> None:
    done = prune_all(exported(name, exports), ratio)
    check(name, done, HEADS[name][0 if ratio == 0.3 else 1], HEADS[name][2])


@pytest.mark.parametrize("name", [n for n in HEADS if n not in ("convnext", "t5")])
def test_transformers_lose_dims_of_every_head(name: str, exports: Path) -> None:
    done = prune_all(exported(name, exports), 0.5, attention="dims")
    check(name, done, HEADS[name][1], HEADS[name][2])


def test_a_table_of_biases_per_head_stays_when_dims_go(exports: Path) -> None:
    done = prune_all(exported("t5", exports), 0.5, attention="dims")
    tables = {r.parameter for r in done.plan.refused if r.reason != "graph output output"}
    assert tables == {
        f"model.{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        for side in ("encoder", "decoder")
    }
    assert left(done) <= HEADS["t5"][1]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("name", [n for n in HEADS if n not in ("swin", "t5")])
def test_transformers_from_the_dynamo_exporter(name: str, attention: str, exports: Path) -> None:
    """torch 2.13 cannot export swin and t5 this way."""
    done = prune_all(exported(name, exports, dynamo=True), 0.5, attention=attention)
    kept = {r.reason for r in done.plan.refused if "rotary" not in r.parameter}
    assert kept == {"graph output output"}
    assert left(done) <= HEADS[name][1]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["heads", "dims"])
@pytest.mark.parametrize("name", ["vit", "gpt2", "llama", "whisper"])
def test_transformers_with_attention_as_one_operator(
    name: str, attention: str, exports: Path
) -> None:
    """Opset 23 has Attention, RotaryEmbedding and RMSNormalization."""
    path = exported(name, exports, dynamo=True, attention="sdpa", opset=23)
    done = prune_all(path, 0.5, attention=attention)
    assert any(n.op_type == "Attention" for n in done.model.graph)
    kept = {r.reason for r in done.plan.refused if "rotary" not in r.parameter}
    assert kept == {"graph output output"}
    assert left(done) <= HEADS[name][1]
