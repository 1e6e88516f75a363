"""Read samples of a data specification into memory."""

import onnx_ir as ir

from onnxslim_kd import roles as roles_io
from onnxslim_kd.errors import UserError
from onnxslim_kd.runtime import Array
from onnxslim_kd.samples import Samples
from onnxslim_kd.training.data import Batch, Loader
from onnxslim_kd.training.datasets import LABEL_KEYS, open_source
from onnxslim_kd.training.evaluate import fixed_batch
from onnxslim_kd.training.feeds import Feeder
from onnxslim_kd.training.transforms import Preprocess

BATCH = 32


def read(model: ir.Model, data: str, *, preprocess: str = "", samples: int = 512) -> Samples:
    """Read up to ``samples`` samples from all over ``data``, always the same ones.

    Args:
        model: Whose inputs they must fit.
        data: As for training.
        preprocess: The line applied to each sample.
        samples: How many at most.

    Raises:
        UserError: The data has no samples, or they do not fit the model's inputs.
    """
    if samples < 1:
        raise UserError(f"--samples must be 1 or more, got {samples}")
    feeder = Feeder(model, roles_io.read(model))
    fixed = fixed_batch(model)
    size = fixed or min(BATCH, samples)
    source = open_source(data, feeder.shapes())
    loader = Loader(source, Preprocess(preprocess), size)
    found = [b for b in loader.some(-(-samples // size)) if len(b) == size or not fixed]
    if not found:
        raise UserError(f"data {data!r} has no samples, or fewer than the model's batch of {size}")
    held = sum(len(batch) for batch in found)
    name = f"{held} samples of {' '.join(filter(None, (data, preprocess)))}"
    feeds = [{k: t.numpy() for k, t in feeder(batch).items()} for batch in found]
    return Samples(name, tuple(feeds), tuple(_labels(batch) for batch in found))


def _labels(batch: Batch) -> dict[str, Array]:
    return {k: t.numpy() for k, t in batch.entries.items() if k in LABEL_KEYS}
