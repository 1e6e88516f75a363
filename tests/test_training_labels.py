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
