"""Merges of real models: those that ship in packages, and real architectures untrained."""

import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxslim_kd import roles
from onnxslim_kd.model import load, raise_opset, save
from onnxslim_kd.passes.adapters import Adapter
from onnxslim_kd.passes.batch import free_batch
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.passes.suggest import suggest
from onnxslim_kd.runtime import Session, random_feeds
from onnxslim_kd.verify_merge import verify_merge
from tests.packages import folder

pytestmark = pytest.mark.real


def merged_and_proven(student, teacher, losses, shapes=(), **options):
    """Merge, check, prove, and compare the outputs with the files as ONNX Runtime runs them."""
    merged = merge(student, teacher, losses, **options)
    onnx.checker.check_model(ir.to_proto(merged), full_check=True)
    proof = verify_merge(merged, student, teacher, shapes=shapes)
    assert len(proof.sizes) == (len(shapes) or 2)
    feeds = random_feeds(merged, proof.sizes[-1])
    ours = Session(student, optimise=False)
    alone = ours.run({value.name: feeds[value.name] for value in ours.inputs})
    got = Session(merged, optimise=False).run(feeds)
    assert all(np.array_equal(got[name], alone[name]) for name in ours.outputs)
    return merged, proof


# ------------------------------------------------------------------------- PP-OCRv4 det


@pytest.fixture(scope="module")
def detector():
    return folder("rapidocr_onnxruntime") / "models" / "ch_PP-OCRv4_det_infer.onnx"


def test_a_text_detector_with_itself(detector):
    kinds = {s.kind: s.text for s in reversed(suggest(detector, detector))}
    losses = [kinds[kind] for kind in ("l2", "at", "cwd", "overhaul", "kl")]
    sizes = ({"x": (1, 3, 64, 64)}, {"x": (2, 3, 96, 160)})
    _, proof = merged_and_proven(detector, detector, losses, sizes)
    assert all(proof.losses[kind] == pytest.approx(0, abs=1e-5) for kind in ("l2", "at", "kl"))


# -------------------------------------------------------------------------------- BERT


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("berts")
    small = bert(folder / "small.onnx", hidden=32, layers=2, opset=17)
    return small, bert(folder / "large.onnx", hidden=64, layers=4, opset=18)


def bert(path, *, hidden, layers, opset):
    """Export a small BERT with hidden states as outputs, random weights, two dynamic axes."""
    torch = pytest.importorskip("torch")
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=2 * hidden, max_position_embeddings=64, num_labels=3,
        output_hidden_states=True, attn_implementation="eager",
    )  # fmt: skip

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = BertForSequenceClassification(config).eval()

        def forward(self, input_ids, attention_mask):
            result = self.bert(input_ids=input_ids, attention_mask=attention_mask)
            return result.logits, *result.hidden_states

    inputs = ["input_ids", "attention_mask"]
    outputs = ["logits", *(f"hidden_{i}" for i in range(layers + 1))]
    axes = {name: {0: "batch", 1: "length"} for name in (*inputs, *outputs[1:])}
    tokens = torch.ones(2, 16, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about tracing
        torch.onnx.export(
            Wrapped(), (tokens, tokens), path, dynamo=False, opset_version=opset,
            input_names=inputs, output_names=outputs, dynamic_axes={**axes, "logits": {0: "batch"}},
        )  # fmt: skip
    return path


def test_berts_of_different_width(berts):
    losses = [
        "kl:logits=logits,temperature=2",
        "l2:hidden_1+hidden_2=hidden_2+hidden_4,align=linear",
    ]
    merged, _ = merged_and_proven(*berts, losses)
    assert merged.graph.opset_imports[""] == 18
    assert [value.name for value in merged.graph.inputs] == ["input_ids", "attention_mask"]
    assert len(roles.read(merged).loss_parameters) >= 2


# ------------------------------------------------------------------------------ images


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    torch_export = pytest.importorskip("onnxslim_kd.zoo.export")
    folder = tmp_path_factory.mktemp("zoo")

    def path(name):
        file = folder / f"{name}.onnx"
        if not file.exists():
            save(torch_export.export(name), file)
        return file

    return path


def blocks(counts):
    return "+".join(
        f"/res{stage}/res{stage}{letter}/Relu_output_0"
        for stage, count in zip((2, 3, 4, 5), counts, strict=True)
        for letter in "abcdef"[:count]
    )


@pytest.mark.slow
def test_mobilenet_with_resnet50(zoo):
    """The first tutorial: l2 on the logits."""
    merged_and_proven(zoo("mobilenet_v2"), zoo("resnet50"), ["l2:logits=logits"])


@pytest.mark.slow
def test_resnet18_with_resnet34(zoo):
    losses = [
        f"afd:{blocks((2, 2, 2, 2))}={blocks((3, 4, 6, 3))}",
        "dkd:logits=logits",
        "dist:logits=logits",
        "mgd:/res5/res5b/Relu_output_0=/res5/res5c/Relu_output_0",
    ]
    merged, _ = merged_and_proven(zoo("resnet18"), zoo("resnet34"), losses)
    assert [value.name for value in merged.graph.inputs][:2] == ["image", "label"]


@pytest.mark.slow
def test_a_teacher_of_other_opset_batch_and_layout(zoo):
    """ResNet-18 as a teacher with opset 20, batch 1 and NHWC, for MobileNetV2."""
    teacher = channels_last(load(zoo("resnet18")))
    student = zoo("mobilenet_v2")
    fixed = merge(student, teacher, ["kl:logits=logits"], adapters={"": Adapter(layout="NHWC")})
    assert fixed.graph.inputs[0].shape[0] == 1
    free = free_batch(teacher)
    merged = merge(student, free, ["kl:logits=logits"], adapters={"": Adapter(layout="NHWC")})
    assert merged.graph.opset_imports[""] == 20
    verify_merge(merged, student, free)


def channels_last(model):
    """The model behind a Transpose, fixed to one sample, at opset 20."""
    raise_opset(model, 20)
    (image,) = model.graph.inputs
    outside = ir.val("pixels", dtype=ir.DataType.FLOAT, shape=[1, 224, 224, 3])
    node = ir.node("Transpose", [outside], {"perm": [0, 3, 1, 2]}, name="to_nchw")
    image.replace_all_uses_with(node.outputs[0])
    model.graph.inputs[0] = outside
    model.graph.insert_before(model.graph[0], node)
    return load(model)
