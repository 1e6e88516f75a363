"""The table of benchmarks/fashion_mnist.py, without training."""

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
NAMES = ("common", "fashion_mnist", "fashion_peer", "fashion_table", "fashion_ways")


@pytest.fixture
def fashion(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import fashion_mnist

    yield fashion_mnist
    for name in NAMES:
        sys.modules.pop(name, None)


def record(way, seed, top1, original=92.0):
    return {
        "net": "resnet20",
        "share": 0.5,
        "way": way,
        "macs_removed": 0.5,
        "original": {"top1": original, "top5": 99.0, "bytes": 800_000},
        "top1": top1,
        "top5": 99.0,
        "bytes": 400_000,
        "epochs": [10, 3],
        "seed": seed,
    }


def test_a_row_joins_its_seeds(fashion):
    found = [record("KD", 0, 91.5), record("fine-tune", 0, 91.0), record("KD", 1, 92.1)]
    row, _ = fashion.table(found)
    assert row["way"] == "KD" and row["seeds"] == [0, 1]
    assert row["lost"] == pytest.approx(0.2) and row["spread"] == pytest.approx([-0.1, 0.5])


def test_claims_say_what_was_lost_and_after_how_long(fashion):
    way = "KD, from a folded file cut by Taylor, BN re-inserted"
    found = [record("KD", 0, 91.5), record(way, 0, 91.4)]
    real, kd, folded = fashion.claims(fashion.table(found))
    assert real.measured == "92.00 %" and not real.met
    assert kd.measured == "0.50" and not kd.met and "3 epochs, 1 seed" in kd.what
    assert folded.measured == "0.10" and folded.met


def test_the_table_shows_what_ships(fashion):
    rows = fashion.table([record("fine-tune", 0, 91.5), record("fine-tune", 1, 91.0)])
    latencies = {"KD-0.5": {"median": 0.61}}
    table = fashion.shown(rows, latencies)
    assert table.title.endswith("10 epochs, cut, 3 epochs, mean of 2 seed(s)")
    assert table.lines == [
        ["original", "92.00", "99.00", "800 kB", "1", "-", "1"],
        ["fine-tune", "91.25", "99.00", "400 kB", "0.50", "0.75 (0.50 to 1.00)", "0.61"],
    ]


def test_a_stage_runs_once(fashion, tmp_path):
    place = fashion.Place(tmp_path, "resnet20", 0, fashion.SCALES["smoke"])
    done = []
    work = lambda: done.append(1) or {"top1": 1.0}  # noqa: E731
    assert place.stage("cut", work) == place.stage("cut", work)
    assert len(done) == 1


def test_a_stage_that_fails_leaves_no_record(fashion, tmp_path):
    place = fashion.Place(tmp_path, "resnet20", 0, fashion.SCALES["smoke"])

    def fail():
        raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        place.stage("original", fail)
    assert list(tmp_path.iterdir()) == []
