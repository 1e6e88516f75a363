"""How far outputs lie apart."""

import numpy as np
import pytest

from onnxslim_kd.difference import Difference, difference

LOGITS = np.array([[1.0, 4.0, 2.0], [3.0, 0.0, 1.0]], np.float32)


def test_equal_outputs_are_the_same():
    found = difference([{"y": LOGITS}], [{"y": LOGITS.copy()}])
    assert found == Difference(agreement=1.0, largest=0.0, relative=0.0)
    assert found.same


def test_agreement_counts_positions_over_all_samples():
    other = LOGITS.copy()
    other[0] = [5, 4, 2]
    found = difference([{"y": LOGITS}] * 2, [{"y": LOGITS}, {"y": other}])
    assert found.agreement == pytest.approx(0.75)
    assert (found.largest, found.relative) == (4.0, 1.0)
    assert not found.same
    assert str(found) == "top-1 agreement 75.0%, largest difference 4 (100.00% of the range)"


def test_segmentation_agrees_by_pixel_and_sequences_have_no_classes():
    image = np.zeros((1, 2, 3, 3), np.float32)
    image[:, 1] = 1
    other = image.copy()
    other[0, 0, 0, 0] = 2
    assert difference([{"y": image}], [{"y": other}]).agreement == pytest.approx(8 / 9)
    boxes = np.ones((1, 84, 5), np.float32)
    assert difference([{"y": boxes}], [{"y": boxes}]).agreement is None


def test_what_cannot_be_compared_is_said():
    def problem(wanted, got):
        found = difference([{"y": wanted}], [{"y": got}])
        assert not found.same
        return str(found)

    assert problem(LOGITS, LOGITS[:1]) == "output y has shape (1, 3) instead of (2, 3)"
    assert problem(LOGITS, LOGITS * np.nan) == "output y holds values that are not finite"
    assert problem([{1: 2.0}], [{1: 2.0}]) == "output y is no tensor of numbers: not compared"
    words = np.array(["a"], object)
    assert "no tensor of numbers" in problem(words, words)


def test_integers_and_empty_outputs():
    ids = np.array([[1, 2], [3, 4]])
    assert difference([{"y": ids}], [{"y": ids}]).agreement is None
    assert difference([{"y": np.zeros((0, 4), np.float32)}], [{"y": np.zeros((0, 4))}]).same
    assert difference([{"y": ids > 1}], [{"y": ids > 2}]).largest == 1.0
