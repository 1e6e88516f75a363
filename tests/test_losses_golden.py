"""Every loss against numbers that PaddleSlim, PaddleClas and PaddleDetection computed.

Values in ONNX Runtime within 1e-5; gradients by `onnx_torch`, an independent interpreter, within
1e-4 of the largest. Each golden file matches exactly one line of `CASES`.
"""

import re

import numpy as np
import pytest
from losses_models import GOLDEN, free_batch, loss_model, value
from onnx_torch import gradients

from onnxslim_kd.passes import losses

CASES = {
    r"clas_kldiv_T4_.*": "kl:s=t",
    r"clas_kldiv_T1_.*": "kl:s=t,temperature=1",
    r"slim_dy_kl_(batchmean|mean)_.*": "kl:s=t,temperature=1,reduction={0}",
    r"clas_dml_softmax_(sac0.*|peaky.*)": "dml:s=t",
    r"clas_dml_softmax_sac1_.*": "dml:s=t,sum_across_class_dim=true",
    r"clas_dml_sigmoid_sac([01])_.*": "dml:s=t,act=sigmoid,sum_across_class_dim={0}",
    r"clas_dml_sigmoid_weight_ratio.*": (
        "dml:s=t,act=sigmoid,sum_across_class_dim=true,weight_ratio=true"
    ),
    r"clas_dml_actnone_.*": "dml:s=t,act=none",
    r"slim_dy_dml_softmax_.*": "dml:s=t,detach=true",
    r"clas_distance_(l1|l2|smooth_l1)_\d.*": "{0}:s=t",
    r"clas_distance_smooth_l1_delta0.5": "smooth_l1:s=t,delta=0.5",
    r"clas_distillation_distance_l2_act_sigmoid": "l2:s=t,act=sigmoid",
    r"slim_l2_.*|slim_loss_user_defined": "l2:s=t",
    r"clas_gtce_epsNone_.*": "ce:s",
    r"clas_gtce_eps0.1_.*": "ce:s,epsilon=0.1",
    r"clas_ce_soft_.*|slim_dy_ce_soft_.*": "ce:s=t",
    r"clas_softtarget_ce_.*": "ce:s,soft=true",
    r"clas_dkd_T(\d)_a(\d)_b(\d)_(label|teacher_argmax)_.*": (
        "dkd:s=t,temperature={0},alpha={1},beta={2},target={3}"
    ),
    r"clas_dkd_use_target_as_gt.*": "dkd:s=t,temperature=4,beta=2,use_target_as_gt=true",
    r"clas_dist_b(.*)_g(.*)_\d+x\d+": "dist:s=t,beta={0},gamma={1}",
    r"clas_rkd_(distance|angle)_ts1_.*": "rkd_{0}:s=t,target_size=1",
    r"clas_rkd_(distance|angle)_tsNone_.*": "rkd_{0}:s=t,target_size=none",
    r"clas_rkd_wrapper": "rkd_distance:s=t,target_size=1;rkd_angle:s=t,target_size=1",
    r"slim_dy_rkd_.*": "rkd_distance:s=t;rkd_angle:s=t",
    r"clas_skd_T(\d)_.*": "skd:s=t,temperature={0},multiplier=2,alpha=0.9",
    r"slim_skd_mNone_.*": "skd:s=t",
    r"slim_skd_m2.0_.*": "skd:s=t,multiplier=2",
    r"clas_wsl_T(\d)_.*": "wsl:s=t,temperature={0}",
    r"clas_mgd_align": "mgd:s=t",
    r"clas_mgd_lambda50_alpha1": "mgd:s=t,alpha_mgd=1,lambda_mgd=0.5",
    r"clas_pefd_flatten": "pefd:s=t",
    r"clas_afd_(eval|train)": "afd:s0+s1+s2=t0+t1+t2+t3,qk_dim=16",
    r"slim_fsp_.*": "fsp:s1+s2=t1+t2",
    r"slim_soft_label_4d": "soft_label:s=t",
    r"slim_soft_label_tT(\d)_sT(\d)_.*": (
        "soft_label:s=t,teacher_temperature={0},student_temperature={1}"
    ),
    r"det_yolov3_.*": "yolov3:s0_raw+s1_raw+s2_raw=t0_raw+t1_raw+t2_raw,classes=20",
    r"clas_combined_two": "ce:s;kl:s=t,weight=0.9",
    r"clas_combined_single_ignores_weight": "dml:s=t",  # upstream ignores a single loss's weight
    r"clas_combined_single_two_models.*": "ce:s",  # upstream trains the first of several alone
    r"slim_DML3_loss0_.*": (
        "ce:s;kl:s=t,temperature=1,weight=0.5,name=one;kl:s=s2,temperature=1,weight=0.5,name=two"
    ),
    r"slim_DML3_loss1_.*": (
        "ce:t;kl:t=s,temperature=1,weight=0.5,name=one;kl:t=s2,temperature=1,weight=0.5,name=two"
    ),
}
FILES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
LOOSE = {"clas_kldiv_T4_large_logits": 2e-4}
"""Paddle's softmax clips logits at -64 below the largest; these values show it."""


def spec_of(stem: str) -> str:
    found = [(m, text) for key, text in CASES.items() if (m := re.fullmatch(key, stem))]
    assert len(found) == 1, f"{stem} matches {len(found)} lines of CASES"
    match, text = found[0]
    return text.format(*match.groups())


def load(stem: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{stem}.npz") as held:
        return {name: held[name] for name in held.files}


def prepared(stem: str):
    """Return the model with the golden's parameters, the feeds, and the golden."""
    golden, text = load(stem), spec_of(stem)
    model = loss_model(text, free_batch(golden))
    prefix = f"loss_{text.split(':')[0]}_"
    for name, array in golden.items():
        if name.startswith("aux_"):
            held = model.graph.initializers[prefix + name.removeprefix("aux_")]
            assert tuple(held.shape) == array.shape, name
            held.const_value = ir_tensor(array)
    feeds = {n: golden[n] for n in (v.name for v in model.graph.inputs) if n in golden}
    if "label" in golden:
        feeds["label"] = golden["label"][:, 0]
    if "softtarget" in stem:
        feeds["label_soft"] = golden["t"]
    if "gt" in golden:
        feeds["label_ratios"] = golden["gt"]
    if "mask" in golden:
        feeds[f"{prefix}mask"] = golden["mask"]
    return model, feeds, golden, prefix


def ir_tensor(array: np.ndarray):
    import onnx_ir as ir

    return ir.Tensor(np.ascontiguousarray(array))


@pytest.mark.parametrize("stem", [f for f in FILES if f != "clas_afd_train"])
def test_value_in_onnx_runtime(stem):
    model, feeds, golden, _ = prepared(stem)
    found = value(model, feeds)
    for key in {"loss", "loss_f64"} & golden.keys():
        expected = float(golden[key])
        assert found == pytest.approx(expected, rel=LOOSE.get(stem, 1e-5), abs=1e-6), key


@pytest.mark.parametrize("stem", FILES)
def test_gradient(stem):
    model, feeds, golden, prefix = prepared(stem)
    names = {
        key: prefix + key.removeprefix("grad_aux_")
        if key.startswith("grad_aux_")
        else key.removeprefix("grad_")
        for key in golden
        if key.startswith("grad_")
    }
    assert names
    loss, found = gradients(model, feeds, list(names.values()), training=stem == "clas_afd_train")
    assert loss == pytest.approx(float(golden["loss"]), rel=LOOSE.get(stem, 1e-5), abs=1e-6)
    for key, name in names.items():
        largest = np.abs(golden[key]).max()
        error = np.abs(found[name] - golden[key]).max()
        assert error <= LOOSE.get(stem, 1e-4) * largest + 1e-7, (key, error, largest)


def test_every_line_of_cases_has_a_golden():
    used = {key for key in CASES for stem in FILES if re.fullmatch(key, stem)}
    assert used == CASES.keys()


def kinds() -> set[str]:
    """The losses that have goldens."""
    return {losses.parse(p).kind for stem in FILES for p in spec_of(stem).split(";")}
