"""What fashion_mnist.py does to a net: train it, cut it, and get the accuracy back."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fashion_peer as peer
import numpy as np
import torch
from fashion_table import BLOCKS, BY_HAND, FOLDED, KD, stage_of
from torch import Tensor

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import OperationError
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.passes.strip import infer_prune
from onnxslim_kd.prune_config import PruneConfig, prune
from onnxslim_kd.training import config
from onnxslim_kd.training.data import Batch, Loader
from onnxslim_kd.training.datasets import open_source
from onnxslim_kd.training.engine import train
from onnxslim_kd.training.schedules import Schedule
from onnxslim_kd.training.transforms import Preprocess
from onnxslim_kd.zoo.export import build, export

DATA = Path("/usr/share/datasets/fashion-mnist")
PREPROCESS = "shift=2,flip,normalize=0.286:0.353"
SHAPE = (1, 1, 28, 28)
BATCH, DECAY, TEMPERATURE = 128, 5e-4, 4.0
RATES = {"original": 0.1, "recover": 0.05}
NETS: dict[str, dict[str, int]] = {
    "resnet20": {"classes": 10, "channels": 1},
    "mobilenet_small": {"classes": 10, "channels": 1, "stride": 2},
}
"""The arguments of each net; the stride is MobileNetV2's own, at a third of the time."""


@dataclass(frozen=True)
class Scale:
    """How long to train; ``samples`` 0 is the whole data set."""

    original: int
    recover: int
    samples: int = 0


SCALES = {
    "smoke": Scale(1, 1, samples=384),
    "full": Scale(10, 3),  # three hours on two cores
    "gpu": Scale(60, 30),
}


CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "l1": ("original", {"round_to": 1}),
    "blocks": ("original", {}),
    "taylor": ("folded", {"round_to": 1, "criterion": "taylor"}),
}
"""Every cut: the net, and how its channels are chosen.

The norm of a filter that BatchNormalization was folded into holds its scale over its deviation,
and says little: chosen by l1, ResNet-20 with 75 % cut came back 0.7 points lower (so did the net
with live BatchNormalization when it was cut alike). Taylor scores do not see the folding.
"""


# ----------------------------------------------------------------------------- stages


@dataclass(frozen=True)
class Place:
    """One net with one seed in a run's folder."""

    folder: Path
    net: str
    seed: int
    scale: Scale

    def stage(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do ``work`` unless it was done before; return its record."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            started = time.perf_counter()
            record = {**work(), "seconds": time.perf_counter() - started}
            print(f"{self.net} seed {self.seed} {name}: {record}", flush=True)
            model_io.write_text(path, json.dumps(record))
        return dict(json.loads(path.read_text()))

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"

    def save(self, model: Any, name: str) -> None:
        model_io.save(model, self.file(name), overwrite=True)

    # -------------------------------------------------------------------- data

    def data(self, split: str) -> str:
        """Return the spec of the data, or of the first samples of it."""
        spec = f"idx:{DATA}?split={split}"
        if not self.scale.samples:
            return spec
        path = self.folder / f"{split}.npz"
        if not path.exists():
            arrays = open_source(spec, {"image": SHAPE[1:]}).arrays  # type: ignore[attr-defined]
            np.savez(path, **{k: a[: self.scale.samples] for k, a in arrays.items()})
        return f"npz:{path}"

    def loader(self, split: str) -> Loader:
        source = open_source(self.data(split), {"image": SHAPE[1:]})
        return Loader(source, Preprocess(PREPROCESS), BATCH, seed=self.seed)

    # ---------------------------------------------------------------- training

    def fit(self, name: str, model: Any, kind: str, **more: Any) -> dict[str, Any]:
        """Train ``model`` and save it as ``name``; return its accuracy."""
        epochs = self.scale.original if kind == "original" else self.scale.recover
        settings = config.parse(
            {
                "data": self.data("train"),
                "val_data": self.data("test"),
                "preprocess": PREPROCESS,
                "epochs": epochs,
                "eval_every": epochs,
                "batch_size": BATCH,
                "seed": self.seed,
                "optimizer": _optimizer(RATES[kind]),
                "schedule": _schedule(epochs),
                "labels": {"weight": 1.0},
                "checkpoint": self.folder / "checkpoints" / name,
                "save_eval_model": False,
                "keep": 1,
                **more,
            }
        )
        outcome = train(model, settings)
        if not outcome.finished:
            raise OperationError(f"{name} was interrupted; run the same command to go on")
        self.save(outcome.model, name)
        return {"top1": outcome.history[-1]["top1"], "epochs": epochs}


def _optimizer(rate: float) -> dict[str, Any]:
    return {"lr": rate, "nesterov": True, "weight_decay": DECAY}


def _schedule(epochs: int) -> dict[str, Any]:
    return {"kind": "cosine", "warmup": min(1.0, epochs / 8)}


def original(place: Place) -> dict[str, Any]:
    model = export(place.net, inputs={"image": SHAPE}, arguments=NETS[place.net], seed=place.seed)
    return place.fit("original", model, "original")


def folded(place: Place) -> dict[str, Any]:
    place.save(infer_prune(place.file("original")).model, "folded")
    return {}


def cut(place: Place, kind: str, share: float) -> dict[str, Any]:
    """Remove ``share`` of the MACs; write the plan beside the result."""
    source, chosen = CUTS[kind]
    config = PruneConfig(
        pattern=".*_weights",
        target_macs=share,
        data=place.data("train") if chosen.get("criterion") == "taylor" else None,
        preprocess=PREPROCESS,
        **chosen,
    )
    done, _ = prune(model_io.load(place.file(source)), config)
    place.save(done.model, f"{kind}-{share:g}")
    done.plan.save(place.folder / f"{kind}-{share:g}.plan.json", overwrite=True)
    return {"macs": 1 - done.after.macs / done.before.macs}


# --------------------------------------------------------------------- ways to recover


def fine_tune(place: Place, share: float, name: str) -> dict[str, Any]:
    return place.fit(name, model_io.load(place.file(f"l1-{share:g}")), "recover")


def distil(place: Place, share: float, name: str) -> dict[str, Any]:
    return place.fit(name, _merged(place, "l1", share), "recover")


def distil_blocks(place: Place, share: float, name: str) -> dict[str, Any]:
    cuts = [place.file(f"{kind}-{share:g}").read_bytes() for kind in ("blocks", "l1")]
    if cuts[0] != cuts[1]:
        return place.fit(name, _merged(place, "blocks", share), "recover")
    # any width came out in whole blocks: the same net, data and seed train to the same weights
    done = stage_of(KD, share)
    place.save(model_io.load(place.file(done)), name)
    return place.stage(done, lambda: distil(place, share, done))


def distil_folded(place: Place, share: float, name: str) -> dict[str, Any]:
    plan = place.folder / f"taylor-{share:g}.plan.json"
    model = _merged(place, "taylor", share)
    return place.fit(name, model, "recover", bn="reinsert", like=place.file("folded"), plan=plan)


def _merged(place: Place, kind: str, share: float) -> Any:
    loss = f"kl:logits=logits,temperature={TEMPERATURE}"
    return merge(place.file(f"{kind}-{share:g}"), place.file(CUTS[kind][0]), [loss])


def by_hand(place: Place, share: float, name: str) -> dict[str, Any]:
    """Torch-Pruning, and a loop in torch with the same data, schedule and losses."""
    weights = {
        key: value.const_value.numpy()  # type: ignore[union-attr]
        for key, value in model_io.load(place.file("original")).graph.initializers.items()
    }
    teacher = peer.module(build(place.net, NETS[place.net]), weights)
    student, gone = peer.prune(teacher, share, torch.randn(SHAPE))
    peer.distil(student, teacher, _steps(place), decay=DECAY, temperature=TEMPERATURE)
    peer.export(student, place.file(name), torch.randn(SHAPE))
    top1 = peer.top1(student, _pairs(place.loader("test").evaluate()))
    return {"top1": top1, "epochs": place.scale.recover, "macs": gone}


def _steps(place: Place) -> peer.Steps:
    """Give what the engine trains on, at its rates."""
    loader, epochs = place.loader("train"), place.scale.recover
    schedule = Schedule(**_schedule(epochs))
    for epoch in range(epochs):
        for number, pair in enumerate(_pairs(loader.train(epoch))):
            yield schedule.rate(RATES["recover"], epoch + number / loader.steps, epochs), *pair


def _pairs(batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    for batch in batches:
        yield batch.entries["image"], batch.entries["label"]


Way = Callable[[Place, float, str], dict[str, Any]]
WAYS: dict[str, tuple[Way, str]] = {
    "fine-tune": (fine_tune, "l1"),
    KD: (distil, "l1"),
    FOLDED: (distil_folded, "taylor"),
    BLOCKS: (distil_blocks, "blocks"),
    BY_HAND: (by_hand, "l1"),
}
"""Every way with the cut that it starts from; by hand makes its own."""
