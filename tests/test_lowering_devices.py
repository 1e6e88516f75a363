"""Where values live, without a GPU: the meta device refuses tensors of the CPU, as CUDA does."""

import re

import pytest
import torch
from lowering_cases import CASES
from lowering_run import feeds_of

from onnxslim_kd.training.lowering import lower

NEEDS_NUMBERS = "[mM]eta tensor|register_meta"
"""What torch says where a shape or a way depends on numbers, which the meta device has not."""


def moved(lowered, case):
    feeds = {name: tensor.to("meta") for name, tensor in feeds_of(case.feeds).items()}
    with torch.no_grad():
        return lowered.to("meta")(feeds, case.outputs)


@pytest.mark.parametrize(
    "case", CASES, ids=[f"{index}-{case.ops[-1]}" for index, case in enumerate(CASES)]
)
def test_no_operator_mixes_devices(case):
    lowered = lower(case.model(), trainable=case.weights)
    try:
        found = moved(lowered, case)
    except (RuntimeError, NotImplementedError) as error:
        assert "expected device" not in str(error) and "same device" not in str(error)
        assert re.search(NEEDS_NUMBERS, str(error)), error
        return
    where = {tensor.device.type for tensor in found.values()}
    assert where == {"meta"} or set(case.ops) & {"ConstantOfShape", "Shape", "Size"}
