import gzip
import json
import struct

import numpy as np
import pytest
import torch
from PIL import Image
from training_models import build

from onnxslim_kd.errors import UserError
from onnxslim_kd.training.data import Loader
from onnxslim_kd.training.datasets import open_source
from onnxslim_kd.training.feeds import Feeder
from onnxslim_kd.training.transforms import STEPS, Preprocess


def loader(source, line="", batch_size=4, **settings):
    return Loader(source, Preprocess(line), batch_size, **settings)


@pytest.fixture
def images(tmp_path):
    """Six 12x10 images in two folders, a list with classes, and one without."""
    rng = np.random.default_rng(0)
    lines = []
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for number in range(3):
            pixels = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
            lines.append(f"{name}/{number}.png {label}")
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "more.txt").write_text("cat/0.png\ndog/1.png 0\n")
    return tmp_path


# ------------------------------------------------------------------------------- sources


def test_digits_are_split_without_overlap():
    train, test, everything = (open_source(f"digits?split={s}") for s in ("train", "test", "all"))
    assert (len(train), len(test), len(everything)) == (1437, 360, 1797)
    sample = train.sample(0, [0])
    assert sample["image"].shape == (1, 8, 8) and 0 <= float(sample["image"].max()) <= 1
    with pytest.raises(UserError, match=r"digits\?split=val: give train, test or all"):
        open_source("digits?split=val")


def test_npz_takes_inputs_by_name_or_one_array_as_image(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((5, 3, 4, 4), np.float32), y=np.arange(5))
    source = open_source(f"npz:{path}", {"image": (3, 4, 4)})
    assert set(source.sample(2, [0])) == {"image", "label"} and source.labels[2] == 2
    np.savez(path, ids=np.zeros((5, 7), np.int64), mask=np.ones((5, 7)), y=np.arange(5))
    source = open_source(f"npz:{path}", {"ids": (7,), "mask": (7,)})
    assert set(source.sample(0, [0])) == {"ids", "mask", "label"}
    np.savez(path, x=np.zeros((5, 2)), y=np.arange(4))
    with pytest.raises(UserError, match="one row per sample each, got"):
        open_source(f"npz:{path}")
    path.write_bytes(b"no zip")
    with pytest.raises(UserError, match="is not an npz file, or cut short"):
        open_source(f"npz:{path}")


def test_idx_reads_plain_and_packed_and_refuses_cut_short(tmp_path):
    pixels = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    images = struct.pack(">4B3I", 0, 0, 8, 3, 3, 4, 4) + pixels.tobytes()
    labels = struct.pack(">4BI", 0, 0, 8, 1, 3) + bytes([7, 8, 9])
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels)
    source = open_source(f"idx:{tmp_path}?split=test")
    assert source.sample(1, [0])["image"].tolist() == pixels[1:2].tolist()
    assert source.labels.tolist() == [7, 8, 9]
    with pytest.raises(UserError, match="holds no train-images-idx3-ubyte"):
        open_source(f"idx:{tmp_path}")
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels[:-1])
    with pytest.raises(UserError, match="is cut short: 2 bytes"):
        open_source(f"idx:{tmp_path}?split=test")


def test_a_folder_has_a_class_per_sub_folder(images):
    source = open_source(f"folder:{images}")
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.sample(3, [0])["image"].shape == (3, 12, 10)
    with pytest.raises(UserError, match="holds no sub-folder per class"):
        open_source(f"folder:{images / 'cat'}")


def test_lists_and_unlabelled_lists(images):
    spec = f"imagelist:{images}/train.txt?root={images}&unlabelled={images}/more.txt"
    source = open_source(spec)
    assert source.labels.tolist() == [0, 0, 0, 1, 1, 1, -1, -1]
    with pytest.raises(UserError, match=r"line 1: the label must be a whole number, got ''"):
        open_source(f"imagelist:{images}/more.txt")


def test_list_names_may_hold_the_delimiter(images):
    (images / "cat" / "0.png").rename(images / "cat" / "a b.png")
    (images / "train.txt").write_text("cat/a b.png 1\n")
    assert open_source(f"imagelist:{images}/train.txt").sample(0, [0])["label"] == 1


def test_masks_as_labels_follow_the_image(images):
    for number in range(3):
        mask = np.zeros((12, 10), np.uint8)
        mask[:, :5], mask[0, 0] = 1, 255
        Image.fromarray(mask).save(images / f"mask{number}.png")
    rows = [f"cat/{number}.png mask{number}.png" for number in range(3)]
    (images / "seg.txt").write_text("\n".join(rows))
    source = open_source(f"imagelist:{images}/seg.txt?labels=mask")
    plain = Preprocess("resize=12x10")(source.sample(0, [0]))
    assert plain["mask"][0, 0] == -1 and plain["mask"][5].tolist() == [1] * 5 + [0] * 5
    flipped = Preprocess("flip=1")(source.sample(0, [0]), np.random.default_rng(0))
    assert torch.equal(flipped["mask"], plain["mask"].flip(-1))
    moved = Preprocess("crop=14x10")(source.sample(0, [0]))
    assert moved["mask"][0].tolist() == [-1] * 10 and moved["image"].shape == (3, 14, 10)


def test_coco_boxes_follow_the_image(images):
    annotations = {
        "images": [{"id": 4, "file_name": "cat/0.png"}, {"id": 9, "file_name": "cat/1.png"}],
        "categories": [{"id": 7}, {"id": 3}],
        "annotations": [{"image_id": 4, "category_id": 3, "bbox": [1, 2, 4, 6]}],
    }
    (images / "boxes.json").write_text(json.dumps(annotations))
    source = open_source(f"coco:{images}/boxes.json")
    sample = Preprocess("resize=24x20")(source.sample(0, [0]))
    assert sample["boxes"].tolist() == [[2, 4, 10, 16, 1]]
    flipped = Preprocess("flip=1")(source.sample(0, [0]), np.random.default_rng(0))
    assert flipped["boxes"].tolist() == [[5, 2, 9, 8, 1]]
    cropped = Preprocess("crop=4x10")(source.sample(0, [0]))
    assert cropped["boxes"].tolist() == [[1, 0, 5, 4, 1]]
    (batch,) = loader(source).evaluate()
    assert batch.entries["boxes"][1].tolist() == [[-1] * 5]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "the kind must be one of digits, .* near misses: digits"),
        ("digits?splt=train", "option 'splt' is not one of digits's: split"),
        ("nowhere.at_all:make", "nowhere.at_all:make: no module 'nowhere'"),
        ("folder:/no/such", "folder:/no/such: no such folder"),
        ("coco:/no/such.json", "coco:/no/such.json: cannot be read: No such file"),
        ("random", "the shape of image is dynamic; give random"),
        ("random?size=-1&shape=3", "give a whole number above 0"),
        ("npz:/no/such.npz", "npz:/no/such.npz: cannot be read"),
        ("imagelist:/no/such.txt", "/no/such.txt: cannot be read"),
    ],
)
def test_wrong_specs_are_one_sentence(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_a_users_dataset_is_seeded_per_sample(tmp_path, monkeypatch):
    code = """
import random, torch
class Noise(torch.utils.data.Dataset):
    def __init__(self, size="4"): self.size = int(size)
    def __len__(self): return self.size
    def __getitem__(self, index): return torch.rand(3), int(random.random() * 10)
"""
    (tmp_path / "my_noise.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    source = open_source("my_noise:Noise?size=8")
    assert len(source) == 8

    def epoch(number, workers=0):
        batches = loader(source, workers=workers).train(number)
        return torch.cat([batch.entries["image"] for batch in batches])

    assert torch.equal(epoch(0), epoch(0)) and not torch.equal(epoch(0), epoch(1))
    assert torch.equal(epoch(0), epoch(0, workers=2))


# -------------------------------------------------------------------------------- order


def test_the_order_is_a_function_of_seed_and_epoch():
    source = open_source("digits")

    def order(epoch, start=0, seed=0):
        return [
            batch.indices for batch in loader(source, batch_size=64, seed=seed).train(epoch, start)
        ]

    assert order(0) == order(0) and order(0) != order(1) and order(0) != order(0, seed=1)
    assert order(2, start=5) == order(2)[5:]
    assert len({index for batch in order(0) for index in batch}) == 22 * 64


def test_corrupt_files_are_counted_not_replaced(images):
    (images / "cat" / "1.png").write_bytes(b"not an image")
    (images / "dog" / "2.png").unlink()
    source = open_source(f"imagelist:{images}/train.txt")
    strict = loader(source, batch_size=6, max_bad=0)
    with pytest.raises(UserError, match=r"2 samples cannot be read, 0 are allowed .*the first: "):
        list(strict.evaluate())
    tolerant = loader(source, batch_size=6, max_bad=2)
    (batch,) = tolerant.train(0)
    assert sorted(batch.indices) == [0, 2, 3, 4] and set(tolerant.bad) == {1, 5}
    assert len(batch.entries["image"]) == 4
    list(tolerant.train(1))
    assert len(tolerant.bad) == 2  # the same files in the next epoch are the same files


def test_images_of_different_sizes_need_a_resize(images):
    Image.new("RGB", (20, 20)).save(images / "cat" / "0.png")
    source = open_source(f"folder:{images}")
    with pytest.raises(UserError, match=r"samples of 'image' differ in shape .*add resize=HxW"):
        list(loader(source, batch_size=6).evaluate())
    (batch,) = loader(source, "resize=8x8", batch_size=6).evaluate()
    assert batch.entries["image"].shape == (6, 3, 8, 8)


def test_errors_in_workers_stay_one_sentence(images):
    source = open_source(f"folder:{images}")
    with pytest.raises(UserError) as caught:
        list(loader(source, "normalize=0.5/0.5:1", batch_size=6, workers=1).evaluate())
    assert "\n" not in str(caught.value) and "has 2 channels, the image has 3" in str(caught.value)


def test_a_model_that_takes_bytes_gets_the_bytes_of_the_file(tmp_path):
    pixels = RNG(0).integers(0, 256, (6, 1, 2, 2), dtype=np.uint8)
    np.savez(tmp_path / "bytes.npz", x=pixels, y=np.arange(6))
    text = "y = Cast<to=1>(image)", "uint8[N,1,2,2] image", "float[N,1,2,2] y"
    feeder = Feeder(build(*text, {}))
    source = open_source(f"npz:{tmp_path / 'bytes.npz'}", feeder.shapes())
    (batch,) = loader(source, batch_size=6).evaluate()
    assert np.array_equal(feeder(batch)["image"].numpy(), pixels)


# --------------------------------------------------------------------------- transforms


RNG = np.random.default_rng
VALUES = {
    "resize": "6", "crop": "4", "random-crop": "5", "shift": "2", "flip": "", "colour": "0.4",
    "normalize": "imagenet", "gray": "", "rgb": "", "bgr": "", "nhwc": "",
}  # fmt: skip


@pytest.mark.parametrize("name", STEPS)
def test_every_step_is_deterministic_given_its_seed(name):
    image = torch.from_numpy(RNG(0).integers(0, 256, (3, 9, 8), dtype=np.uint8))
    step = Preprocess(f"{name}={VALUES[name]}" if VALUES[name] else name)
    one, two = (step({"image": image}, RNG(5))["image"] for _ in range(2))
    assert torch.equal(one, two) and one.dtype == torch.float32
    still = step({"image": image})["image"]
    different = [not torch.equal(still, step({"image": image}, RNG(s))["image"]) for s in range(9)]
    assert any(different) == step.is_random


def test_uint8_becomes_0_to_1_and_normalize_uses_that_scale():
    image = torch.full((3, 2, 2), 255, dtype=torch.uint8)
    assert float(Preprocess()({"image": image})["image"].max()) == 1
    found = Preprocess("normalize=imagenet")({"image": image})["image"][:, 0, 0]
    expected = (1 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    assert np.allclose(found.numpy(), expected, atol=1e-6)


def test_resize_agrees_with_pillow():
    pixels = RNG(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    ours = Preprocess("resize=20x10")({"image": image})["image"] * 255
    pillow = np.array(Image.fromarray(pixels).resize((10, 20), Image.Resampling.BILINEAR))
    assert np.abs(ours.permute(1, 2, 0).numpy() - pillow).max() <= 1.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("resise=4", "preprocess step 'resise' is not one of .* near misses: resize"),
        ("resize=0", "preprocess step 'resize=0': give a size"),
        ("crop=ax3", "preprocess step 'crop=ax3'"),
        ("normalize=0.5", "give imagenet, half or MEAN:STD"),
        ("normalize=0:0", "the deviations must be above 0"),
        ("normalize=0:nan", "the deviations must be above 0"),
        ("gray=3", "it takes no value"),
        ("colour=1", "give a strength from 0 to below 1"),
        ("nhwc, flip", "flip must come before nhwc"),
        ("normalize=imagenet,colour=0.4", "colour must come before normalize"),
    ],
)
def test_wrong_lines_are_refused_before_anything_runs(line, message):
    with pytest.raises(UserError, match=message):
        Preprocess(line)
