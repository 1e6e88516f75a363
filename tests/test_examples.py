"""The examples, on small data and for twelve steps; every loss in them goes down."""

from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from PIL import Image

from onnxslim_kd import pipeline, recipe
from onnxslim_kd.stages_graph import Merge
from onnxslim_kd.stages_train import Train
from tests.test_pipeline import EXAMPLES, losses_of

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
SMALL = ("stages.bench.rounds=5", "stages.bench.seconds=1", "workers=0", "preprocess=")


def steps(stage: str, epochs: int = 12, batch: int = 16) -> list[str]:
    """Every epoch is one step over all samples."""
    settings = {
        "epochs": epochs,
        "batch_size": batch,
        "optimizer": "{name: adam, lr: 0.001}",
        "schedule": "{kind: constant}",
        "eval_every": epochs,
        "save_eval_model": "false",
    }
    return [f"stages.{stage}.{key}={value}" for key, value in settings.items()]


def inputs(*stages: str, side: int = 32) -> list[str]:
    return [f"stages.{stage}.inputs.image=1x3x{side}x{side}" for stage in stages]


def noise(size: int = 16) -> list[str]:
    return [f"data=random?size={size}&classes=4", f"val_data=random?size={size}&classes=4"]


def masks(folder: Path) -> list[str]:
    """Write images of two colours, and the mask that tells them apart."""
    rng, lines = np.random.default_rng(0), []
    for i in range(4):
        mask = (rng.random((8, 8)) < 0.5).astype(np.uint8).repeat(8, 0).repeat(8, 1)
        image = mask[..., None] * np.array([200, 100, 50], np.uint8)
        Image.fromarray(image).save(folder / f"{i}.png")
        Image.fromarray(mask).save(folder / f"{i}_mask.png")
        lines.append(f"{i}.png {i}_mask.png\n")
    (folder / "list.txt").write_text("".join(lines))
    spec = f"imagelist:{folder}/list.txt?root={folder}&labels=mask"
    return [f"data={spec}", f"val_data={spec}"]


def overrides(name: str, folder: Path) -> list[str]:
    """Return what makes an example small."""
    both = ("teacher", "student")
    if name == "deeplabv3_distill":  # an untrained teacher contradicts the labels: as heavy as they
        small = [*SMALL, *masks(folder), *inputs(*both, side=64), *steps("distilled", batch=4)]
        return [*small, "stages.merged.losses.1.weight=1"]
    if name == "yolov3_distill_prune":
        return [*SMALL, *noise(4), *inputs(*both, side=64), *steps("distilled", batch=4)]
    if name == "mobilenet_v2_prune":
        return [*SMALL, *noise(), *inputs("original"), *steps("tuned")]
    return [*SMALL, *noise(), *inputs(*both), *steps("distilled")]


def test_there_is_one_example_per_tutorial():
    assert {"mobilenet_v2_distill", "mobilenet_v2_prune", "deeplabv3_distill"} < set(NAMES)
    assert {"ssld", "dml", "udml", "afd", "dkd", "dist", "mgd"} < set(NAMES)
    assert {"yolov3_distill_prune", "digits"} < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_examples_can_be_read(name):
    found = recipe.read(EXAMPLES / f"{name}.yaml")
    assert found.title and list(found.stages)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_examples_run_end_to_end(name, tmp_path):
    chosen = recipe.read(EXAMPLES / f"{name}.yaml", overrides(name, tmp_path))
    folder = tmp_path / "run"
    pipeline.run(chosen, folder)
    assert (folder / "shipped.onnx").is_file() and (folder / "report.html").is_file()
    (train,) = (n for n, stage in chosen.stages.items() if isinstance(stage, Train))
    losses = losses_of(folder / f"{train}.jsonl")
    terms = [len(s.losses) for s in chosen.stages.values() if isinstance(s, Merge)]
    assert len(losses) == 1 + sum(terms) or not terms
    assert all(falls(values) for values in losses.values()), losses


def falls(values: list[float]) -> bool:
    """Whether the last quarter lies below the first."""
    quarter = len(values) // 4
    return mean(values[-quarter:]) < mean(values[:quarter])
