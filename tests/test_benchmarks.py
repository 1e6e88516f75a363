"""The helpers of the benchmark scripts, and the table they end in."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("common", "fashion_table", "table"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import common
    import table

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    yield common, table
    for name in ("common", "fashion_table", "table"):
        sys.modules.pop(name, None)


@dataclass(frozen=True)
class Pair:
    a: int
    b: float


def test_a_result_says_what_it_was_measured_on(scripts, capsys):
    common, _ = scripts
    claims = [
        common.Claim("never slower", "<= 1.00", "0.99", met=True),
        common.Claim("smaller", "<= 0.50", "0.61", met=False),
    ]
    rows = [{"model": "m", "pair": Pair(1, 0.5), "number": np.float32(2), "list": np.arange(2)}]
    path = common.write("strip", claims=claims, rows=rows, packages=["onnx", "no-such-package"])
    result = json.loads(path.read_text())
    assert result["command"] == "python benchmarks/strip.py"
    assert result["rows"] == [
        {"model": "m", "pair": {"a": 1, "b": 0.5}, "number": 2.0, "list": [0, 1]}
    ]
    assert result["environment"]["cores"] >= 1
    assert {"python", "onnxruntime-gpu", "torch"} <= result["environment"]["versions"].keys()
    assert "MISS smaller: 0.61 (target <= 0.50)" in capsys.readouterr().out
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        common.write("strip", claims=[], rows=[{"x": object()}])


def test_compare_names_its_timings(scripts):
    common, _ = scripts
    timings = common.compare({"a": lambda: None, "b": lambda: sum(range(3000))}, rounds=5)
    assert timings["b"].ratio_to(timings["a"]).median > 2


def test_the_complete_results_show_every_claim_and_misses_as_missed(scripts, tmp_path):
    common, table = scripts
    common.write("b", claims=[common.Claim("b | c", "1", "2", met=False)], rows=[])
    common.write("a", claims=[common.Claim("first", "1", "1", met=True)], rows=[])
    text = table.complete(table.read(tmp_path))
    assert "## a\n\n`python benchmarks/a.py` on " in text
    assert "| first | 1 | 1 | met |" in text
    assert "| b &#124; c | 1 | 2 | **missed** |" in text
    assert text.index("## a") < text.index("## b")


def test_tables_stand_above_the_claims(scripts, tmp_path):
    common, table = scripts
    shown = common.Table("speed", ["net", "ratio"], [["a", "0.5"]])
    common.write("b", claims=[], rows=[], tables=[shown])
    lines = table.complete(table.read(tmp_path)).splitlines()
    assert lines[4] == "**speed**"
    assert lines[6:9] == ["| net | ratio |", "| --- | --- |", "| a | 0.5 |"]
    assert lines[10].startswith("| What |")


def test_the_summary_counts_the_targets_and_says_when_the_first_is_missed(scripts, tmp_path):
    common, table = scripts
    first = common.Claim("fast", "<= 1", "2", met=False)
    common.write("b", claims=[first, common.Claim("small", "<= 1", "1", met=True)], rows=[])
    common.write("c", claims=[], rows=[])
    lines = table.summary(table.read(tmp_path)).splitlines()
    assert lines[-2] == "| [`b`](benchmarks/RESULTS.md#b) | fast: <= 1 | 2 **(missed)** | 1 of 2 |"
    assert lines[-1] == "| [`c`](benchmarks/RESULTS.md#c) | - | - | - |"


def test_the_summary_shows_trained_networks_with_the_cuts_that_prune_makes(scripts, tmp_path):
    common, table = scripts
    columns = ["", "Top-1", "Top-5", "Size", "MACs", "Points lost", "Latency"]
    rows = [["original", "91.6", "99.9", "1 kB", "1", "-", "1"],
            ["KD", "91.0", "99.8", "0.5 kB", "0.50", "0.6", "0.9"],
            [table.BLOCKS, "90.9", "99.7", "0.5 kB", "0.49", "0.7", "0.6"]]  # fmt: skip
    common.write("fashion-net", claims=[], rows=[], tables=[common.Table("t", columns, rows)])
    lines = table.summary(table.read(tmp_path)).splitlines()
    assert lines[:5] == [
        "|  | MACs | Latency | Size | Top-1 | Top-5 |",
        "| --- | --- | --- | --- | --- | --- |",
        "| [net](benchmarks/RESULTS.md#fashion-net) | 1 | 1 | 1 kB | 91.6 | 99.9 |",
        "| net, cut and distilled | 0.49 | 0.6 | 0.5 kB | 90.9 | 99.7 |",
        "",
    ]


def test_only_what_stands_between_the_markers_is_replaced(scripts, tmp_path, monkeypatch):
    _, table = scripts
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    new = table.replaced(text, "new")
    assert new == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    assert table.replaced(new, "new") == new
    for broken in ("none", table.BEGIN, f"{table.END} {table.BEGIN}", text + text):
        with pytest.raises(SystemExit, match=r"README.md needs one"):
            table.replaced(broken, "new")


def test_check_changes_nothing(scripts, tmp_path, monkeypatch):
    _, table = scripts
    files = [tmp_path / name for name in table.PLACES]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{table.BEGIN}\nleft from before\n{table.END}\n")
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
    with pytest.raises(SystemExit, match=r"run python benchmarks/table.py"):
        table.main()
    assert all("left from before" in file.read_text() for file in files)
    monkeypatch.setattr(sys, "argv", ["table.py"])
    table.main()
    assert not any("left from before" in file.read_text() for file in files)
    monkeypatch.setattr(sys, "argv", ["table.py", "--check"])
    table.main()
