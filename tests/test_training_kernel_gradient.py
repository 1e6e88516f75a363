"""The gradient of large kernels over small images."""

import pytest
import torch
import torch.nn.functional as F

from onnxslim_kd.training import kernel_gradient
from onnxslim_kd.training.kernel_gradient import conv2d

CASES = {
    "same": ((2, 3, 4, 4), (5, 3, 3, 3), [1, 1], [1, 1]),
    "uneven": ((2, 3, 5, 6), (5, 3, 3, 2), [2, 1], [1, 0]),
    "rows that no window reaches": ((2, 3, 6, 7), (5, 3, 2, 2), [2, 3], [0, 0]),
    "one pixel": ((2, 3, 1, 1), (5, 3, 3, 3), [1, 1], [1, 1]),
    "1 x 1": ((2, 3, 4, 4), (5, 3, 1, 1), [1, 1], [0, 0]),
}


@pytest.fixture
def any_size_is_large(monkeypatch):
    monkeypatch.setattr(kernel_gradient, "LARGE", 1)


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(s, generator=generator, dtype=torch.double).requires_grad_() for s in shapes
    ]


@pytest.mark.usefixtures("any_size_is_large")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_torch(case, layout):
    image, kernel, strides, pads = CASES[case]
    x, w, b = tensors(image, kernel, kernel[:1])
    x, w = (t.detach().contiguous(memory_format=layout).requires_grad_() for t in (x, w))
    y, expected = conv2d(x, w, b, strides, pads), F.conv2d(x, w, b, strides, pads)
    assert "_ConvBackward" in type(y.grad_fn).__name__
    torch.testing.assert_close(y, expected)
    error = torch.randn(y.shape, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.autograd.grad(y, (x, w, b), error), torch.autograd.grad(expected, (x, w, b), error)
    )


@pytest.mark.usefixtures("any_size_is_large")
def test_gradients_are_finite_differences():
    x, w, b = tensors((1, 2, 3, 3), (2, 2, 3, 3), (2,))
    assert torch.autograd.gradcheck(lambda *t: conv2d(*t, [1, 1], [1, 1]), (x, w, b))


@pytest.mark.usefixtures("any_size_is_large")
def test_a_frozen_input_gets_no_gradient():
    x, w, _ = tensors((2, 3, 4, 4), (5, 3, 3, 3), (5,))
    conv2d(x.detach(), w, None, [1, 1], [1, 1]).sum().backward()
    assert x.grad is None
    assert w.grad is not None


@pytest.mark.parametrize(
    ("side", "frozen", "autocast"),
    [(5, False, False), (4, True, False), (4, False, True)],
    ids=["large image", "frozen kernel", "other precision"],
)
@pytest.mark.usefixtures("any_size_is_large")
def test_torch_computes_the_rest(side, frozen, autocast):
    x = torch.randn(2, 3, side, side, requires_grad=True)
    w = torch.randn(5, 3, 3, 3, requires_grad=not frozen)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = conv2d(x, w, None, [1, 1], [1, 1])
    assert "_ConvBackward" not in type(y.grad_fn).__name__


def test_small_kernels_are_left_to_torch():
    x, w, _ = tensors((2, 3, 4, 4), (5, 3, 3, 3), (5,))
    assert "_ConvBackward" not in type(conv2d(x, w, None, [1, 1], [1, 1]).grad_fn).__name__
