"""infer-prune against the other clean-up tools: right, small, not slower, and in what time.

    pip install -r benchmarks/requirements.txt
    taskset -c 1 python benchmarks/strip.py [--models FOLDER] [--run FOLDER] [--only PART]

Models: those inside of installed packages (the weights of onnx's "light" ones are made up first),
transformers with random weights by both of torch's exporters, and every .onnx file of --models.
Each tool runs in a process of its own, with a time limit. Times are the processor's, so let one
core do it all. A row is kept in --run as soon as it is complete; the same command goes on where it
stopped. With --peers, the --run of an earlier time, what it knows of the other tools is taken over
(their times too), and infer-prune alone is measured.
"""

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import strip_models
from common import THREADS, Claim, Table, compare, write
from strip_tools import OURS, PEERS, Worker

from onnxslim_kd import compare as numbers
from onnxslim_kd import model as model_io
from onnxslim_kd.passes.gate import size
from onnxslim_kd.runtime import Session

TOLERANCE = 1e-3
"""Ten times what infer-prune allows itself: tools are judged by gross errors."""
SLOW = 0.1
"""Seconds of a run from which only infer-prune and the original are timed."""
Row = dict[str, Any]


# ----------------------------------------------------------------------------- measure


def measure(
    source: Path, folder: Path, workers: dict[str, Worker], seconds: float, known: Row
) -> Row:
    """Measure the tools that ``known``, an earlier row, does not know."""
    reference = numbers.Reference.of(model_io.load(source), source=source)
    row: Row = {
        "model": source.stem,
        "nodes": size(model_io.load(source, normalise=False)),
        "bytes": stored(source),
        "tools": {},
    }
    for name, worker in workers.items():
        if name in known.get("tools", {}):
            continue
        target = written(folder, source, name)
        taken = worker.run(source, target)
        if name in (OURS, *PEERS):
            row["tools"][name] = judged(taken, target, reference)
        else:
            row[name] = taken
    row["latency"] = {
        level: latencies(source, folder, row, reference.feeds[0], level, seconds)
        for level in ("all", "none")
    }
    for name in workers:
        clear(written(folder, source, name))
    row["tools"] |= known.get("tools", {})
    for level, ratios in known.get("latency", {}).items():
        row["latency"][level] = ratios | row["latency"][level]
    return row


def written(folder: Path, source: Path, tool: str) -> Path:
    return folder / f"{source.stem}.{tool.replace(' ', '_')}.onnx"


def beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def stored(path: Path) -> int:
    """Bytes of a model and of the weights beside it."""
    return sum(file.stat().st_size for file in (path, beside(path)) if file.exists())


def clear(path: Path) -> None:
    for file in (path, beside(path)):
        file.unlink(missing_ok=True)


def judged(taken: float | str, target: Path, reference: numbers.Reference) -> Row:
    """What one tool did with one model."""
    if isinstance(taken, str):
        return {"problem": taken}
    row: Row = {"problem": problem(target, reference), "seconds": taken}
    if row["problem"] is not None:
        return row
    return row | {"nodes": size(model_io.load(target, normalise=False)), "bytes": stored(target)}


def problem(target: Path, reference: numbers.Reference) -> str | None:
    try:
        session = Session(target, optimise=False)
    except Exception as error:  # refused by the runtime
        return f"does not load: {error}"[:200]
    fed = set(reference.feeds[0])
    extra = [value.name for value in session.inputs if value.name not in fed]
    if extra:
        return f"{len(extra)} more inputs"
    wrong = reference.differs(session, tolerance=TOLERANCE)
    if wrong is not None:
        return wrong[:200]
    try:
        onnx.checker.check_model(str(target), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return f"onnx.checker refuses it: {error}"[:200]
    return None


def latencies(
    source: Path, folder: Path, row: Row, feeds: numbers.Feeds, level: str, seconds: float
) -> Row:
    """Ratios to the original of what is right."""
    paths = {"original": source}
    paths |= {name: written(folder, source, name) for name in row["tools"] if right(row, name)}
    calls = {name: Plain(path, feeds, level) for name, path in paths.items()}
    calls["original"]()
    start = time.perf_counter()
    calls["original"]()
    if time.perf_counter() - start > SLOW:
        calls = {name: call for name, call in calls.items() if name not in PEERS}
    timings = compare(calls, seconds=seconds)
    if OURS in timings and timings[OURS].ratio_to(timings["original"]).low > 1.0:
        # of so many intervals of 95 % some lie above 1 by chance: then a second, longer look counts
        timings = compare(calls, seconds=2 * seconds)
    return {
        name: timing.ratio_to(timings["original"])
        for name, timing in timings.items()
        if name != "original"
    }


class Plain:
    """Runs a file in ONNX Runtime with all optimisations or with none, and nothing else changed."""

    def __init__(self, path: Path, feeds: numbers.Feeds, level: str) -> None:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = THREADS
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if level == "none":
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.feeds = dict(feeds)

    def __call__(self) -> None:
        self.session.run(None, self.feeds)


# ------------------------------------------------------------------------------ claims


def right(row: Row, tool: str) -> bool:
    return row["tools"][tool]["problem"] is None


def claims(rows: Sequence[Row]) -> list[Claim]:
    total = len(rows)
    correct = {name: sum(right(row, name) for row in rows) for name in (OURS, *PEERS)}
    best = max(PEERS, key=lambda name: correct[name])
    found = [
        Claim(
            f"infer-prune is right on every model (best peer: {best}, {correct[best]})",
            f"{total} of {total}",
            f"{correct[OURS]} of {total}",
            met=correct[OURS] == total,
        )
    ]
    for what in ("nodes", "bytes"):
        least = sum(is_least(row, what) for row in rows)
        text = f"no more {what} than the best correct peer"
        found.append(Claim(text, f"{total} of {total}", f"{least} of {total}", met=least == total))
    return [*found, *(latency_claim(rows, level) for level in ("all", "none")), time_claim(rows)]


def is_least(row: Row, what: str) -> bool:
    others = [row["tools"][name][what] for name in PEERS if right(row, name)]
    return right(row, OURS) and row["tools"][OURS][what] <= min(others, default=row[what])


def latency_claim(rows: Sequence[Row], level: str) -> Claim:
    ratios = [row["latency"][level][OURS] for row in rows if OURS in row["latency"][level]]
    slower = sum(ratio["low"] > 1.0 for ratio in ratios)
    mean = statistics.geometric_mean(ratio["median"] for ratio in ratios) if ratios else 1.0
    text = f"never slower in ONNX Runtime beyond noise ({level} of its optimisations)"
    measured = f"{slower} slower of {len(ratios)}; mean ratio {mean:.3f}"
    return Claim(text, "0 slower", measured, met=slower == 0)


def time_claim(rows: Sequence[Row]) -> Claim:
    proven = [row["tools"][OURS]["seconds"] / budget(row) for row in rows if right(row, OURS)]
    bare = [row["unproven"] / budget(row) for row in rows if isinstance(row["unproven"], float)]
    within = sum(share <= 1.0 for share in proven)
    measured = (
        f"{within} of {len(proven)} within, median {median(proven):.2f}x;"
        f" without the proof {sum(share <= 1.0 for share in bare)}, median {median(bare):.2f}x"
    )
    text = "CPU time, proof included, against 2 x (onnx.load + onnx.save) + opening one session"
    return Claim(text, "<= 1.00x on every model", measured, met=within == len(proven))


def budget(row: Row) -> float:
    return float(2 * row["load and save"] + row["session"])


def median(values: Sequence[float]) -> float:
    return statistics.median(values) if values else float("nan")


def table(rows: Sequence[Row]) -> Table:
    """Each tool over all models."""
    lines = []
    for name in (OURS, *PEERS):
        good = [row for row in rows if right(row, name)]
        shares = {
            what: statistics.geometric_mean(row["tools"][name][what] / row[what] for row in good)
            for what in ("nodes", "bytes")
        }
        seconds = median([row["tools"][name]["seconds"] for row in good])
        lines.append(
            (name, f"{len(good)} of {len(rows)}", f"{shares['nodes']:.2f}x",
             f"{shares['bytes']:.3f}x", f"{seconds:.2f} s")
        )  # fmt: skip
    columns = ("tool", "right", "nodes", "bytes", "median CPU time")
    return Table("Clean-up tools, means over the models that each one gets right", columns, lines)


# -------------------------------------------------------------------------------- rows


def rows_of(sources: Sequence[Path], folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Measure what ``folder`` does not know yet."""
    names = (OURS, *PEERS, "unproven", "load and save", "session")
    workers = {name: Worker(name, options.limit) for name in names}
    for source in sources:
        kept = folder / f"{source.stem}.json"
        if not kept.exists():
            whole = strip_models.whole(source, folder)
            row = measure(whole, folder, workers, options.seconds, of_peers(options.peers, source))
            kept.write_text(json.dumps(row, default=vars))
        row = json.loads(kept.read_text())
        show(row)
        yield row
    for worker in workers.values():
        worker.stop()


def of_peers(folder: Path | None, source: Path) -> Row:
    """What an earlier run knows of a model and the other tools."""
    kept = folder / f"{source.stem}.json" if folder is not None else None
    if kept is None or not kept.exists():
        return {}
    row = json.loads(kept.read_text())
    levels = {level: dict(ratios) for level, ratios in row["latency"].items()}
    for known in (row["tools"], *levels.values()):
        known.pop(OURS, None)
    return {"tools": row["tools"], "latency": levels}


def show(row: Row) -> None:
    print(f"{row['model']}: {row['nodes']} nodes, {row['bytes']} bytes, budget {budget(row):.2f} s")
    for name, done in row["tools"].items():
        if "nodes" not in done:
            print(f"  {name:12} {done['problem']}", flush=True)
            continue
        ratios = [row["latency"][level].get(name, {}).get("median") for level in ("all", "none")]
        shown = "  ".join("-" if ratio is None else f"{ratio:.3f}" for ratio in ratios)
        print(
            f"  {name:12} {done['nodes']:5} nodes {done['bytes']:10} bytes"
            f" {done['seconds']:6.2f} s  latency {shown}  {done['problem'] or ''}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, help="a folder of more .onnx files")
    parser.add_argument("--run", type=Path, help="where rows are kept, to go on later")
    parser.add_argument("--peers", type=Path, help="an earlier --run, to measure ours alone")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing, for each level")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a tool and a model")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as spare:
        folder = options.run or Path(spare)
        folder.mkdir(parents=True, exist_ok=True)
        sources = [*strip_models.shipped(), *strip_models.exported(folder)]
        sources += sorted(options.models.glob("*.onnx")) if options.models else []
        sources = [path for path in sources if options.only in path.name]
        rows: list[Row] = []
        for row in rows_of(sources, folder, options):
            rows.append(row)
            if not options.only and (len(rows) % 10 == 0 or len(rows) == len(sources)):
                write(
                    "strip", claims=claims(rows), rows=rows, tables=[table(rows)],
                    arguments=[
                        *["--models FOLDER"] * bool(options.models),
                        *["--peers FOLDER"] * bool(options.peers),
                    ],
                    packages=("onnxslim", "onnxsim", "onnxscript", "transformers"),
                )  # fmt: skip


if __name__ == "__main__":
    main()
