from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from onnxslim_kd import recipe
from onnxslim_kd.cli import main
from onnxslim_kd.config_convert import Converted, convert
from onnxslim_kd.errors import UserError
from onnxslim_kd.stages_graph import Export, InferPrune, Merge, Prune
from onnxslim_kd.stages_train import Train

PRUNE = """
version: 1.0
pruners:
    pruner_1:
        class: 'StructurePruner'
        pruning_axis: {'*': 0}
        criterions: {'*': 'l1_norm', conv9_weights: 'geometry_median'}
strategies:
    uniform_pruning_strategy:
        class: 'UniformPruneStrategy'
        pruner: 'pruner_1'
        start_epoch: 0
        target_ratio: 0.5
        pruned_params: '.*[r|d]_weights'
        metric_name: 'acc_top1'
compressor:
    epoch: 200
    checkpoint_path: './checkpoints/'
    strategies: [uniform_pruning_strategy]
"""
DISTIL = """
version: 1.0
distillers:
    fsp_distiller:
        class: 'FSPDistiller'
        teacher_pairs: [['res50_res2a_branch2a.conv2d.output.1.tmp_0', 'res50_res3a.tmp_1']]
        student_pairs: [['depthwise_conv2d_1.tmp_0', 'conv2d_3.tmp_0']]
        distillation_loss_weight: 1
    l2_distiller:
        class: 'L2Distiller'
        teacher_feature_map: 'res50_fc_0.tmp_1'
        student_feature_map: 'fc_0.tmp_1'
        distillation_loss_weight: 2
    soft:
        class: 'SoftLabelDistiller'
        teacher_feature_map: 't'
        student_feature_map: 's'
        teacher_temperature: 4
        distillation_loss_weight: 1
strategies:
    distillation_strategy:
        class: 'DistillationStrategy'
        distillers: ['fsp_distiller', 'l2_distiller', 'soft']
        start_epoch: 0
        end_epoch: 130
    quantization: {class: 'QuantizationStrategy', start_epoch: 20, weight_bits: 8}
compressor:
    epoch: 150
    checkpoint_path: './checkpoints/'
    strategies: [distillation_strategy, quantization]
"""
CLAS = """
Global:
  device: gpu
  output_dir: ./output/
  eval_interval: 2
  epochs: 100
  image_shape: [3, 64, 64]
Arch:
  name: DistillationModel
  class_num: 12
  freeze_params_list: [True, False]
  infer_model_name: Student
  models:
    - Teacher: {name: ResNet34, pretrained: True}
    - Student: {name: ResNet18, pretrained: False}
Loss:
  Train:
    - DistillationGTCELoss: {weight: 1.0, model_names: [Student]}
    - DistillationDKDLoss:
        weight: 1.0
        model_name_pairs: [[Student, Teacher]]
        temperature: 1
        alpha: 1.0
        beta: 2.0
    - MyLoss: {weight: 3}
  Eval:
    - CELoss: {weight: 1.0}
Optimizer:
  name: Momentum
  momentum: 0.9
  lr: {name: Cosine, learning_rate: 0.2, warmup_epoch: 5}
  regularizer: {name: L2, coeff: 0.00004}
DataLoader:
  Train:
    dataset:
      name: ImageNetDataset
      image_root: data/images
      cls_label_path: data/train.txt
      transform_ops:
        - DecodeImage: {to_rgb: True}
        - RandCropImage: {size: 64}
        - RandFlipImage: {flip_code: 1}
        - AutoAugment:
        - NormalizeImage: {scale: 1.0/255.0, mean: [0.485, 0.456, 0.406]}
    sampler: {name: DistributedBatchSampler, batch_size: 128, shuffle: True, drop_last: False}
    loader: {num_workers: 8}
  Eval:
    dataset: {name: ImageNetDataset, image_root: data/images, cls_label_path: data/val.txt}
Metric:
  Eval: [{DistillationTopkAcc: {model_key: Student, topk: [1, 5]}}]
"""


def converted(folder: Path, text: str) -> tuple[Converted, recipe.Recipe]:
    """Convert, write, and read the result as `run` does."""
    old, new = folder / "old.yaml", folder / "new.yaml"
    old.write_text(text)
    found = convert(old)
    new.write_text(yaml.safe_dump(found.settings, sort_keys=False))
    return found, recipe.read(new)


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("student", "teacher"):
        Path(f"{name}.onnx").touch()


def test_pruning_of_the_compressor(tmp_path):
    found, read = converted(tmp_path, PRUNE)
    pruned, trained = read.stages["pruned"], read.stages["trained"]
    assert isinstance(pruned, Prune) and isinstance(trained, Train)
    assert pruned.pattern == ".*[r|d]_weights"
    assert pruned.target_macs == 0.5 and pruned.criterion == "l1"
    assert trained.epochs == 200
    text = "\n".join(found.notes)
    assert "not carried over: strategies.uniform_pruning_strategy.metric_name: acc_top1" in text
    assert "criterions.conv9_weights: geometry_median" in text
    assert "checkpoint_path" not in text and "pruning_axis" not in text


def test_distillation_of_the_compressor(tmp_path):
    found, read = converted(tmp_path, DISTIL)
    merged, trained = read.stages["merged"], read.stages["trained"]
    assert isinstance(merged, Merge) and isinstance(trained, Train)
    fsp, l2, soft = merged._specs()
    assert (fsp.kind, len(fsp.student), len(fsp.teacher)) == ("fsp", 2, 2)
    assert (l2.kind, l2.student, l2.weight, l2.end_epoch) == ("l2", ("fc_0.tmp_1",), 2, 130)
    assert (soft.kind, soft.options["teacher_temperature"]) == ("soft_label", 4)
    assert (trained.epochs, trained.labels.weight) == (150, 1)
    text = "\n".join(found.notes)
    for left in ("quantization.class: QuantizationStrategy", "quantization.weight_bits: 8"):
        assert f"not carried over: strategies.{left}" in text


def test_paddleclas(tmp_path):
    found, read = converted(tmp_path, CLAS)
    teacher, student = read.stages["teacher"], read.stages["student"]
    assert isinstance(teacher, Export) and isinstance(student, Export)
    assert (teacher.arch, student.arch) == ("resnet34", "resnet18")
    assert student.inputs == {"image": "1x3x64x64"} and student.arguments == {"classes": 12}
    merged = read.stages["merged"]
    assert isinstance(merged, Merge)
    ce, dkd = merged._specs()
    assert (ce.kind, ce.student, ce.teacher) == ("ce", ("logits",), ())
    assert (dkd.kind, dkd.options["beta"]) == ("dkd", 2.0)
    train = read.stages["trained"]
    assert isinstance(train, Train)
    assert train.data == "imagelist:data/train.txt?root=data/images"
    assert train.preprocess == "random-crop=64,flip,normalize=imagenet"
    assert (train.epochs, train.batch_size, train.eval_every, train.workers) == (100, 128, 2, 8)
    assert (train.optimizer.lr, train.optimizer.weight_decay) == (0.2, 4e-5)
    assert (train.schedule.kind, train.schedule.warmup, train.mutual) == ("cosine", 5, False)
    shipped = read.stages["shipped"]
    assert isinstance(shipped, InferPrune)
    assert (shipped.keep, shipped.activation) == ("student", "softmax")
    text = "\n".join(found.notes)
    for left in ("MyLoss", "AutoAugment", "Teacher's pretrained weights (True) are Paddle's"):
        assert left in text
    assert "device" not in text and "Topk" not in text


def test_mutual_learning_of_paddleclas(tmp_path):
    text = CLAS.replace("[True, False]", "[False, False]").replace(
        "[Student]", "[Student, Teacher]"
    )
    _, read = converted(tmp_path, text)
    train, merged = read.stages["trained"], read.stages["merged"]
    assert isinstance(train, Train) and isinstance(merged, Merge)
    assert train.mutual
    assert [spec.student for spec in merged._specs()][:2] == [("logits",), ("teacher_logits",)]


def test_one_model_of_paddleclas(tmp_path):
    settings = yaml.safe_load(CLAS)
    settings["Arch"] = {"name": "MobileNetV1", "class_num": 12}
    settings["Loss"] = {"Train": [{"CELoss": {"weight": 1.0, "epsilon": 0.1}}]}
    settings["Slim"] = {"prune": {"name": "fpgm", "pruned_ratio": 0.3}}
    _, read = converted(tmp_path, yaml.safe_dump(settings, sort_keys=False))
    assert list(read.stages) == ["student", "pruned", "trained", "shipped"]
    pruned, train = read.stages["pruned"], read.stages["trained"]
    assert isinstance(pruned, Prune) and isinstance(train, Train)
    assert (pruned.criterion, pruned.ratio) == ("geometric-median", 0.3)
    assert train.labels.smoothing == 0.1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1", "neither a Compressor file .* it has a"),
        ("{}", "it has nothing"),
        (
            PRUNE.replace("[uniform_pruning_strategy]", "[uniform_strategy]"),
            "near misses: uniform_pruning",
        ),
        (DISTIL.replace("'L2Distiller'", "'L3Distiller'"), "distiller 'l2_distiller' is not one"),
        ("Arch: {name: ResNet50}", "nothing to train on"),
        ("compressor: [1]", "is not built as such files are"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        converted(tmp_path, text)


def test_the_command(tmp_path):
    Path("old.yaml").write_text(CLAS)
    arguments = ["convert-config", "old.yaml", "-o", "new.yaml"]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0 and "Wrote new.yaml" in done.output
    assert "not carried over: Loss.Train" in done.output
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2 and "exists" in again.output
