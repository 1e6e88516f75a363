import numpy as np
import pytest
import torch
from lowering_case import Case
from lowering_cases import CASES
from lowering_run import feeds_of, run_ort

from onnxslim_kd.passes.ties import RULES
from onnxslim_kd.training.lowering import OPS, lower
from onnxslim_kd.training.translate import STRUCTURAL

IDS = [f"{index}-{case.ops[-1]}" for index, case in enumerate(CASES)]
DIFFERENTIABLE = [
    case
    for case in CASES
    if case.grad
    and any(array.dtype.kind == "f" for name, array in case.arrays.items() if name[0] != "c")
]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_forward_equals_onnxruntime(case):
    model = case.model()
    expected = run_ort(model, case.feeds, case.outputs)
    lowered = lower(model, trainable=case.weights)
    with torch.no_grad():
        found = lowered(feeds_of(case.feeds), case.outputs)
    for name, want in zip(case.outputs, expected, strict=True):
        got = found[name].numpy()
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=case.tolerance, atol=case.tolerance)


@pytest.mark.parametrize(
    "case", DIFFERENTIABLE, ids=[f"{i}-{c.ops[-1]}" for i, c in enumerate(DIFFERENTIABLE)]
)
def test_gradient_equals_finite_differences(case):
    lowered = lower(case.model(double=True), trainable=case.weights)
    keys = {
        name: key
        for key, p in lowered.named_parameters()
        for name, q in lowered.parameters_by_name.items()
        if p is q
    }
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in case.arrays.items()}
    varied = [name for name in (*case.feeds, *keys) if tensors[name].is_floating_point()]

    def run(*values):
        given = {**tensors, **dict(zip(varied, values, strict=True))}
        weights = {keys[name]: given[name] for name in keys}
        feeds = {name: given[name] for name in case.feeds}
        results = torch.func.functional_call(lowered, weights, (feeds,))
        return tuple(r for r in results.values() if r.is_floating_point())

    inputs = [tensors[name].double().requires_grad_() for name in varied]
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True, atol=1e-4)


def test_every_operator_has_a_case():
    covered = {op for case in CASES for op in case.ops}
    assert OPS.keys() <= covered, f"no case for {sorted(OPS.keys() - covered)}"


@pytest.mark.parametrize(
    ("node", "mean", "deviation"),
    [
        ("y = RandomNormalLike<mean=3.0, scale=0.5>(x)", 3.0, 0.5),
        ("y = RandomUniformLike<low=-1.0, high=2.0>(x)", 0.5, 3 / 12**0.5),
        ("r = RandomNormal<shape=[5000]>() y = Add(x, r)", 0.0, 1.0),
    ],
)
def test_drawn_numbers_differ_in_each_run_and_follow_the_seed(node, mean, deviation):
    x = np.zeros(5000, np.float32)
    lowered = lower(Case(node, {"x": x}).model())
    draws = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        draws.append(lowered({"x": torch.from_numpy(x)})["y"])
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    assert float(draws[0].mean()) == pytest.approx(mean, abs=0.05)
    assert float(draws[0].std()) == pytest.approx(deviation, abs=0.05)


def test_every_operator_that_can_be_pruned_can_be_trained():
    known = OPS.keys() | STRUCTURAL
    assert known >= RULES.keys(), f"no lowering for {sorted(RULES.keys() - known)}"
