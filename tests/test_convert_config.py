from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from onnxslim_kd import recipe
from onnxslim_kd.cli import main
from onnxslim_kd.config_convert import Converted, convert
from onnxslim_kd.errors import UserError
from onnxslim_kd.stages_graph import Export, InferPrune, Merge, Prune
from onnxslim_kd.stages_measure import Sensitivity
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


def test_a_cut_comes_before_distilling(tmp_path):
    strategies = "{d: {class: DistillationStrategy, distillers: l2}, p: {class: %s, pruner: x}}"
    text = f"""
include: [base.yaml]
strategies: {strategies % "UniformPruneStrategy"}
compress_pass: {{epoch: 3, strategies: [d, p]}}
"""
    (tmp_path / "base.yaml").write_text(
        "distillers: {l2: {class: L2Distiller, teacher_feature_map: t, student_feature_map: s}}\n"
    )
    _, read = converted(tmp_path, text)
    assert list(read.stages)[:3] == ["pruned", "merged", "trained"]
    merged = read.stages["merged"]
    assert isinstance(merged, Merge)
    assert merged.reads(read.place(tmp_path, "merged"))[0] == tmp_path / "pruned.onnx"


def test_sensitive_pruning_measures_first(tmp_path):
    text = PRUNE.replace(
        "UniformPruneStrategy'", "SensitivePruneStrategy'\n        delta_rate: 0.2"
    )
    _, read = converted(tmp_path, text)
    measured, pruned = read.stages["sensitivity"], read.stages["pruned"]
    assert isinstance(measured, Sensitivity) and isinstance(pruned, Prune)
    assert measured.ratios == (0.2, 0.4, 0.6, 0.8)
    assert (
        pruned.reads(read.place(tmp_path, "pruned"))[1] == tmp_path / "sensitivity.sensitivity.json"
    )


def test_automatic_pruning_names_the_search(tmp_path):
    text = PRUNE.replace("UniformPruneStrategy'", "AutoPruneStrategy'\n        max_ratio: 0.5")
    found, read = converted(tmp_path, text.replace("target_ratio", "min_ratio"))
    assert isinstance(read.stages["pruned"], Prune) and read.stages["pruned"].target_macs == 0.5
    assert any("onnxslim-kd search" in note for note in found.notes)


def test_strange_distillers_are_noted(tmp_path):
    found, read = converted(tmp_path, DISTIL.replace("'L2Distiller'", "'L3Distiller'"))
    merged = read.stages["merged"]
    assert isinstance(merged, Merge) and [spec.kind for spec in merged._specs()] == [
        "fsp", "soft_label",
    ]  # fmt: skip
    assert "not carried over: distillers.l2_distiller.class: L3Distiller" in found.notes


def clas_with(**sections):
    """The PaddleClas file with other sections, by their YAML."""
    settings = yaml.safe_load(CLAS) | {name: yaml.safe_load(t) for name, t in sections.items()}
    return yaml.safe_dump(settings, sort_keys=False)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("DistillationPairLoss: {base_loss_name: MGDLoss, s_keys: ['blocks[7]'], t_keys: "
         "['blocks[15]'], student_channels: 512, teacher_channels: 512}",
         [("mgd", "~/res5/res5b$", "~/res5/res5c$")]),
        ("DistillationPairLoss: {base_loss_name: PEFDLoss, s_key: avg_pool, t_key: avg_pool}",
         [("pefd", "~/fc/fc.0$", "~/fc/fc.0$")]),
        ("DistillationRKDLoss: {student_keepkeys: ['blocks[3]'], teacher_keepkeys: ['blocks[6]']}",
         [("rkd_distance", "~/res3/res3b$", "~/res3/res3d$"),
          ("rkd_angle", "~/res3/res3b$", "~/res3/res3d$")]),
        ("DistillationDistanceLoss: {mode: l1, key: 'blocks[0]'}",
         [("l1", "~/res2/res2a$", "~/res2/res2a$")]),
        ("DistillationSKDLoss: {temperature: 1.0, multiplier: 2.0, alpha: 0.9}",
         [("skd", "logits", "logits")]),
    ],
)  # fmt: skip
def test_losses_of_paddleclas(tmp_path, loss, expected):
    found, read = converted(tmp_path, clas_with(Loss=f"Train: [{{{loss}}}]"))
    merged = read.stages["merged"]
    assert isinstance(merged, Merge)
    specs = [(spec.kind, spec.student[0], spec.teacher[0]) for spec in merged._specs()]
    assert specs == expected
    assert not [note for note in found.notes if "Loss" in note]


AFD = """
name: DistillationModel
freeze_params_list:
models:
  - Teacher:
      name: AttentionModel
      freeze_params_list: [True, False]
      models:
        - R: {name: ResNet34, pretrained: True, return_patterns: &t ["blocks[0]", "blocks[3]"]}
        - LinearTransformTeacher: {name: LinearTransformTeacher, qk_dim: 128, keys: *t}
  - Student:
      name: AttentionModel
      models:
        - ResNet18: {name: ResNet18, dropout: 0.1, return_patterns: &s ["blocks[0]"]}
        - LinearTransformStudent: {name: LinearTransformStudent, qk_dim: 128, keys: *s}
"""


def test_networks_with_transforms_behind_them(tmp_path):
    loss = "Train: [{AFDLoss: {weight: 50.0, model_name_pair: [Student, Teacher]}}]"
    found, read = converted(tmp_path, clas_with(Arch=AFD, Loss=loss))
    merged, train = read.stages["merged"], read.stages["trained"]
    assert isinstance(merged, Merge) and isinstance(train, Train) and not train.mutual
    (afd,) = merged._specs()
    assert (afd.kind, afd.weight, afd.student) == ("afd", 50, ("~/res2/res2a$",))
    assert afd.teacher == ("~/res2/res2a$", "~/res3/res3a$")
    assert "not carried over: Arch.Student.dropout: 0.1" in found.notes


def test_how_paddleclas_trains(tmp_path):
    optimizer = """
name: AdamW
beta1: 0.8
beta2: 0.95
weight_decay: 1e-4
lr: {name: MultiStepDecay, learning_rate: 0.5, milestones: [3, 6], step_each_epoch: 1, gamma: 0.2}
"""
    amp = "{use_amp: False, scale_loss: 128.0}"
    _, read = converted(tmp_path, clas_with(Optimizer=optimizer, AMP=amp))
    train = read.stages["trained"]
    assert isinstance(train, Train)
    assert (train.optimizer.name, train.optimizer.betas) == ("adamw", (0.8, 0.95))
    assert (train.optimizer.weight_decay, train.amp) == (1e-4, "none")
    assert train.schedule.boundaries == (3, 6) and train.schedule.values == (0.5, 0.1, 0.02)
    strange = "[{RMSProp: {scope: all, lr: {name: Cyclic, learning_rate: 0.1, max_lr: 1}}}]"
    found, _ = converted(tmp_path, clas_with(Optimizer=strange))
    text = "\n".join(found.notes)
    for part in ("RMSProp is not here", "Cyclic is not here", "Optimizer.lr.max_lr: 1", "several"):
        assert part in text


def test_data_of_paddleclas(tmp_path):
    loader = """
Train:
  dataset:
    cls_label_path: a.txt
    delimiter: ','
    transform_ops:
      - ResizeImage: {size: 64}
      - RandCropImage: {size: [32, 32], interpolation: bicubic}
      - NormalizeImage: {mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2], scale: 1.0/255.0}
    batch_transform_ops: [{MixupOperator: {alpha: 0.2}}]
"""
    one = {"Arch": "{name: ResNet18}", "Loss": "{Train: [{CELoss: {weight: 1}}]}"}
    found, read = converted(tmp_path, clas_with(DataLoader=loader, **one))
    train = read.stages["trained"]
    assert isinstance(train, Train) and train.labels.mixup == 0.2
    assert train.preprocess == "resize=64x64,random-crop=32x32,normalize=0.5/0.5/0.5:0.2/0.2/0.2"
    assert "eval" not in read.stages
    text = "\n".join(found.notes)
    assert "delimiter" in text and "bicubic" in text
    without, read = converted(tmp_path, clas_with(DataLoader="{}", **one))
    assert any("set data" in note for note in without.notes) and "trained" in read.stages


def test_of_three_networks_the_pairs_that_fit_are_kept(tmp_path):
    arch = """
models: [{Big: {name: ResNet50}}, {Teacher: {name: ResNet34}}, {Student: {name: ResNet18}}]
freeze_params_list: [True, True, False]
infer_model_name: Teacher
"""
    pairs = "[[Student, Teacher], [Student, Big], [Teacher, Big]]"
    loss = f"Train: [{{DistillationKLDivLoss: {{model_name_pairs: {pairs}}}}}]"
    found, read = converted(tmp_path, clas_with(Arch=arch, Loss=loss))
    merged, shipped = read.stages["merged"], read.stages["shipped"]
    assert isinstance(merged, Merge) and isinstance(shipped, InferPrune)
    assert [spec.teacher for spec in merged._specs()] == [("big_logits",), ("teacher_logits",)]
    assert shipped.keep == "teacher"
    assert any("model_name_pairs: [['Teacher', 'Big']]" in note for note in found.notes)


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
    teacher, student = read.stages["teacher"], read.stages["student"]
    assert isinstance(teacher, Export) and isinstance(student, Export)
    assert teacher.seed != student.seed, "equal networks have nothing to say to each other"
    assert [spec.student for spec in merged._specs()][:2] == [("logits",), ("teacher_logits",)]


def test_one_model_of_paddleclas(tmp_path):
    settings = yaml.safe_load(CLAS)
    settings["Arch"] = {"name": "MobileNetV1", "class_num": 12}
    settings["Loss"] = {"Train": [{"CELoss": {"weight": 1.0, "epsilon": 0.1}}]}
    settings["Slim"] = {"prune": {"name": "fpgm", "pruned_ratio": 0.3}}
    _, read = converted(tmp_path, yaml.safe_dump(settings, sort_keys=False))
    assert list(read.stages)[:4] == ["student", "pruned", "trained", "shipped"]
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
        (DISTIL.replace("['fsp_distiller'", "['fsp_distil'"), "near misses: fsp_distiller"),
        ("compressor: [1]", "is not built as such files are"),
        ("Arch: {models: [a]}", "is not built as such files are"),
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
