"""What makes a step quick, and must not change it."""

import resource
import subprocess
import sys

import pytest
import torch

from onnxslim_kd.training import optim
from onnxslim_kd.training.config import TrainConfig

STEPS = 3


def trained(settings, *, as_stored):
    """Take steps with a channels-last kernel; return it with the optimiser's state."""
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(4, 3, 2, 2, generator=generator).contiguous(
        memory_format=torch.channels_last
    )
    weight = torch.nn.Parameter(kernel)
    optimizer = optim.build({"weight": weight}, TrainConfig(optimizer=settings))
    for _ in range(STEPS):
        gradient = torch.randn(4, 3, 2, 2, generator=generator)
        weight.grad = gradient.contiguous(memory_format=torch.channels_last)
        if as_stored:
            with optim.gradients_as_stored(optimizer):
                optimizer.step()
        else:
            optimizer.step()
        assert torch.equal(weight.grad, gradient)
    return {"weight": weight.detach(), **optim.state_of(optimizer)}


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        {"name": "sgd", "lr": 0.1, "momentum": 0.0},
        {"name": "adam", "lr": 0.1},
        {"name": "adamw", "lr": 0.1, "weight_decay": 0.01},
    ],
)
def test_steps_along_memory_are_the_same_steps(settings):
    plain, quick = (trained(settings, as_stored=flag) for flag in (False, True))
    assert plain.keys() == quick.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, quick[name]), name


def test_gradients_look_contiguous_inside_alone():
    weight = torch.nn.Parameter(
        torch.zeros(4, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    )
    optimizer = torch.optim.SGD([weight], 0.1, momentum=0.9)
    weight.grad = torch.ones_like(weight)
    with optim.gradients_as_stored(optimizer):
        assert not weight.grad.is_contiguous()  # the state is still to be made like it
    optimizer.step()
    with optim.gradients_as_stored(optimizer):
        assert weight.grad.is_contiguous()
    assert weight.grad.stride() == weight.stride()


CHURN = """
import resource
import numpy as np
from onnxslim_kd.training.heap import keep_freed_memory

def churn():
    held = [np.ones(500_000) for _ in range(16)]  # 64 MB

if {keep}: keep_freed_memory()
churn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
churn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_freed_memory_is_kept():
    new = {
        keep: int(
            subprocess.run(
                [sys.executable, "-c", CHURN.format(keep=keep)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for keep in (False, True)
    }
    pages = 16 * 4_000_000 // resource.getpagesize()
    assert new[True] < pages / 10 < new[False]
