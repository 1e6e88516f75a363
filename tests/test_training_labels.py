"""Ground truth of every shape: which axis the classes are, and how many there are."""

import numpy as np
import onnx_ir as ir
import pytest
from training_models import build

from onnxslim_kd.errors import UserError
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.training import config as configs
from onnxslim_kd.training import engine

VOCABULARY, LENGTH, TAGS = 11, 5, 7


def tagger(seed: int = 0) -> ir.Model:
    """Ids [N, 5] to scores [N, 5, 7]."""
    return build(
        "e = Gather(table, ids) tags = MatMul(e, fc)",
        f"int64[N,{LENGTH}] ids",
        f"float[N,{LENGTH},{TAGS}] tags",
        {"table": (VOCABULARY, 6), "fc": (6, TAGS)},
        seed,
    )


def trained(model, folder, labels, **settings):
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (32, LENGTH))
    np.savez(folder / "data.npz", ids=ids, y=labels(ids))
    data = f"npz:{folder / 'data.npz'}"
    config = configs.parse(
        {"data": data, "val_data": data, "epochs": 20, "batch_size": 16, **settings}
    )
    return engine.train(model, config).history[-1]


def test_a_class_per_token_is_learned(tmp_path):
    settings = {"optimizer": {"name": "adam", "lr": 0.1}}
    assert trained(tagger(), tmp_path, lambda ids: ids % TAGS, **settings)["top1"] > 95


def test_a_label_beyond_the_tokens_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match="has label 10, the model has 7 classes"):
        trained(tagger(), tmp_path, lambda ids: np.full_like(ids, 10))


def test_classes_in_the_graph_are_counted_where_the_loss_reads_them(tmp_path):
    merged = merge(tagger(), tagger(seed=1), ["ce:tags", "kl:tags=tags"])
    last = trained(merged, tmp_path, lambda ids: ids % TAGS, epochs=1)  # 6 is more than 5 tokens
    assert set(last) >= {"top1"}
    with pytest.raises(UserError, match="has label 7, the model has 7 classes"):
        trained(merged, tmp_path, lambda ids: np.full_like(ids, TAGS))


def scorer(tail: str) -> ir.Model:
    """Numbers [N, 4] to one score, or its probability."""
    return build(
        f"h = MatMul(x, w1) r = Relu(h) s = MatMul(r, w2) y = {tail}(s)",
        "float[N,4] x",
        "float[N,1] y",
        {"w1": (4, 8), "w2": (8, 1)},
    )


def fit_scores(folder, labels, tail="Sigmoid", **own):
    x = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, y=labels(x))
    data = f"npz:{folder / 'data.npz'}"
    settings = {"data": data, "val_data": data, "epochs": 20, "batch_size": 16}
    settings |= {"optimizer": {"name": "adam", "lr": 0.05}, "labels": own}
    return engine.train(scorer(tail), configs.parse(settings)).history


@pytest.mark.parametrize("tail", ["Sigmoid", "Identity"])
@pytest.mark.parametrize("column", [True, False])
def test_one_score_learns_yes_and_no(tmp_path, tail, column):
    def labels(x):
        right = (x[:, 0] > 0).astype(np.int64)
        right[::8] = -1  # unlabelled
        return right[:, None] if column else right

    history = fit_scores(tmp_path, labels, tail, loss="bce")
    assert history[0]["val_loss"] > 0.3
    assert history[-1]["val_loss"] < 0.1


def test_numbers_are_measured_by_the_loss(tmp_path):
    history = fit_scores(tmp_path, lambda x: x[:, :1] / 9, "Identity", loss="mse")
    assert history[-1]["val_loss"] < history[0]["val_loss"]


@pytest.mark.parametrize(
    ("own", "labels", "message"),
    [
        ({}, lambda x: x[:, 0] > 0, "learns nothing from one score per sample ..y..; set labels"),
        ({"loss": "bce"}, lambda x: 3 * (x[:, 0] > 0), "from 0 to 1, the data has 3"),
        (
            {"loss": "bce"},
            lambda x: x[:, :2],
            r"of the scores \[16, 1\], the data gives float32 \[",
        ),
    ],
)
def test_labels_that_fit_no_score_are_refused(tmp_path, own, labels, message):
    with pytest.raises(UserError, match=message):
        fit_scores(tmp_path, lambda x: labels(x) * 1, **own)
