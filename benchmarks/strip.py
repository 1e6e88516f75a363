"""infer-prune against the other clean-up tools: right, small, not slower, and in what time.

    pip install -r benchmarks/requirements.txt
    python benchmarks/strip.py [MORE.onnx ...] [--only PART] [--seconds 5]

Models: those that ship inside of installed packages; the weights of onnx's "light" ones are made
up first. The tools run in a process of their own, so that a crash counts as one.
"""

import argparse
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import Claim, compare, session_call, write
from onnx import numpy_helper

from onnxslim_kd import compare as numbers
from onnxslim_kd import model as model_io
from onnxslim_kd.passes.gate import size
from onnxslim_kd.passes.strip import infer_prune
from onnxslim_kd.runtime import Session, write_optimised

OURS = "onnxslim-kd"
FOLDERS = ("rapidocr_onnxruntime:models", "silero_vad:data", "onnx:backend/test/data/light")
LONG = 5.0
"""Seconds of a run in which imports do not count."""
TOLERANCE = 1e-3
"""Ten times what infer-prune allows itself: tools are judged by gross errors."""


# ----------------------------------------------------------------------------- tools


def ours(source: Path, target: Path) -> None:
    model_io.save(infer_prune(source).model, target)


def onnxslim(source: Path, target: Path) -> None:
    import onnxslim

    onnx.save(onnxslim.slim(str(source)), target)


def onnxsim(source: Path, target: Path) -> None:
    import onnxsim

    onnx.save(onnxsim.simplify(onnx.load(source))[0], target)


def onnxscript(source: Path, target: Path) -> None:
    import onnxscript.optimizer

    onnx.save(onnxscript.optimizer.optimize(onnx.load(source)), target)


def ort_basic(source: Path, target: Path) -> None:
    write_optimised(source, target)


TOOLS: dict[str, Callable[[Path, Path], None]] = {
    OURS: ours,
    "onnxslim": onnxslim,
    "onnxsim": onnxsim,
    "onnxscript": onnxscript,
    "ort basic": ort_basic,
}


def timed(name: str, source: Path, target: Path) -> float:
    """Run a tool; of short ones the second run counts, for the first one imports."""
    seconds = _once(name, source, target)
    return seconds if seconds > LONG else _once(name, source, target)


def _once(name: str, source: Path, target: Path) -> float:
    target.unlink(missing_ok=True)
    start = time.perf_counter()
    TOOLS[name](source, target)
    return time.perf_counter() - start


# ---------------------------------------------------------------------------- models


def shipped() -> list[Path]:
    found = []
    for entry in FOLDERS:
        package, folder = entry.split(":")
        found += sorted(Path(str(files(package).joinpath(folder))).glob("*.onnx"))
    return found


def materialised(source: Path, folder: Path) -> Path:
    """Turn every ConstantOfShape that stands for a weight into seeded random numbers."""
    model = onnx.load(source)
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type == "ConstantOfShape" and n.input[0] in shapes]
    if not nodes:
        return source
    rng = np.random.default_rng(0)
    for node in nodes:
        shape = tuple(int(size) for size in shapes[node.input[0]])
        fan_in = math.prod(shape[1:] or (1,))
        array = rng.standard_normal(shape, np.float32) * math.sqrt(0.5 / fan_in)
        if len(shape) == 1:
            array = rng.uniform(0.7, 1.1, shape).astype(np.float32)  # a scale, variance or bias
        model.graph.initializer.append(numpy_helper.from_array(array, node.output[0]))
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, shape)
        )
        model.graph.node.remove(node)
    target = folder / source.name
    onnx.save(model, target)
    return target


# ----------------------------------------------------------------------------- judge


@dataclass
class Result:
    """What one tool did with one model."""

    problem: str | None
    valid: bool = False
    nodes: int = 0
    bytes: int = 0
    seconds: float = 0.0
    latency: Any = None
    latency_plain: Any = None

    @property
    def right(self) -> bool:
        return self.problem is None and self.valid


def judged(target: Path, seconds: float, reference: numbers.Reference) -> Result:
    try:
        session = Session(target, optimise=False)
    except Exception as error:  # refused by the runtime
        return Result(f"does not load: {error}"[:200])
    fed = set(reference.feeds[0])
    extra = [value.name for value in session.inputs if value.name not in fed]
    if extra:
        return Result(f"{len(extra)} more inputs")
    problem = reference.differs(session, tolerance=TOLERANCE)
    try:
        onnx.checker.check_model(str(target), full_check=True)
        valid = True
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        valid = False
    nodes = size(model_io.load(target, normalise=False))
    return Result(problem, valid, nodes, target.stat().st_size, seconds)


def run_tools(source: Path, folder: Path, reference: numbers.Reference) -> dict[str, Result]:
    results = {}
    for name in TOOLS:
        target = folder / f"{source.stem}.{name.replace(' ', '_')}.onnx"
        with ProcessPoolExecutor(1) as pool:  # its own process: some of them crash
            try:
                seconds = pool.submit(timed, name, source, target).result(timeout=600)
            except (Exception, BrokenProcessPool) as error:
                results[name] = Result(f"fails: {type(error).__name__}: {error}"[:200])
                continue
        results[name] = judged(target, seconds, reference)
    return results


def latencies(
    source: Path, folder: Path, results: dict[str, Result], feeds: Any, seconds: float
) -> None:
    right = [name for name in results if results[name].right]
    paths = {name: folder / f"{source.stem}.{name.replace(' ', '_')}.onnx" for name in right}
    for field, optimise in (("latency", True), ("latency_plain", False)):
        calls = {"original": session_call(source, feeds, optimise=optimise)}
        calls |= {n: session_call(path, feeds, optimise=optimise) for n, path in paths.items()}
        timings = compare(calls, seconds=seconds)
        for name in right:
            setattr(results[name], field, timings[name].ratio_to(timings["original"]))


def floor_seconds(source: Path, folder: Path) -> tuple[float, float]:
    """Time of load + save, and of one session."""
    start = time.perf_counter()
    model_io.save(model_io.load(source), folder / "floor.onnx", overwrite=True)
    middle = time.perf_counter()
    Session(source)
    return middle - start, time.perf_counter() - middle


def one(source: Path, folder: Path, seconds: float) -> dict[str, Any]:
    path = materialised(source, folder)
    loaded = model_io.load(path)
    reference = numbers.Reference.of(loaded, source=path)
    results = run_tools(path, folder, reference)
    latencies(path, folder, results, reference.feeds[0], seconds)
    load_save, session = floor_seconds(path, folder)
    row = {
        "model": source.name,
        "nodes": size(model_io.load(path, normalise=False)),
        "bytes": path.stat().st_size,
        "load_save_seconds": load_save,
        "session_seconds": session,
        "tools": results,
    }
    show(row)
    return row


def show(row: dict[str, Any]) -> None:
    print(f"{row['model']}: {row['nodes']} nodes, {row['bytes']} bytes")
    for name, result in row["tools"].items():
        said = result.problem or ("" if result.valid else "checker refuses")
        print(
            f"  {name:12} {result.nodes:5} nodes {result.bytes:10} bytes {result.seconds:6.2f} s"
            f"  all {result.latency}  none {result.latency_plain}  {said}",
            flush=True,
        )


# ---------------------------------------------------------------------------- claims


def claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    total = len(rows)
    right = {name: sum(row["tools"][name].right for row in rows) for name in TOOLS}
    peers = [name for name in TOOLS if name != OURS]
    best = max(peers, key=lambda name: right[name])
    found = [
        Claim(
            f"infer-prune is right on every model (best peer: {best}, {right[best]})",
            f"{total} of {total}",
            f"{right[OURS]} of {total}",
            met=right[OURS] == total,
        )
    ]
    for what in ("nodes", "bytes"):
        least = sum(_is_least(row, what, peers) for row in rows)
        text = f"no more {what} than the best correct peer"
        found.append(Claim(text, f"{total} of {total}", f"{least} of {total}", met=least == total))
    return [*found, _latency_claim(rows), _time_claim(rows)]


def _is_least(row: dict[str, Any], what: str, peers: Sequence[str]) -> bool:
    others = [getattr(row["tools"][name], what) for name in peers if row["tools"][name].right]
    return row["tools"][OURS].right and getattr(row["tools"][OURS], what) <= min(others, default=0)


def _latency_claim(rows: Sequence[dict[str, Any]]) -> Claim:
    ratios = [row["tools"][OURS].latency for row in rows if row["tools"][OURS].latency]
    slower = sum(ratio.low > 1.0 for ratio in ratios)
    middle = statistics.geometric_mean(ratio.median for ratio in ratios)
    text = "never slower in ONNX Runtime beyond noise (all optimisations on)"
    measured = f"{slower} slower of {len(ratios)}; mean ratio {middle:.3f}"
    return Claim(text, "0 slower", measured, met=slower == 0)


def _time_claim(rows: Sequence[dict[str, Any]]) -> Claim:
    shares = [
        row["tools"][OURS].seconds / (2 * row["load_save_seconds"] + row["session_seconds"])
        for row in rows
        if row["tools"][OURS].right
    ]
    within = sum(share <= 1.0 for share in shares)
    measured = f"{within} of {len(shares)} within; median {statistics.median(shares):.2f}x"
    text = "time, proof included, against 2 x (load + save) + one session"
    return Claim(text, "<= 1.00x on every model", measured, met=within == len(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("more", nargs="*", type=Path, help="more models, for example exports")
    parser.add_argument("--only", default="", help="only models whose name contains this")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing, for each level")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # the peers' remarks on every initializer
    sources = [path for path in [*shipped(), *arguments.more] if arguments.only in path.name]
    with tempfile.TemporaryDirectory() as folder:
        rows = [one(source, Path(folder), arguments.seconds) for source in sources]
    write("strip", claims=claims(rows), rows=rows, packages=("onnxslim", "onnxsim", "onnxscript"))


if __name__ == "__main__":
    main()
