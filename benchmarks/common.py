"""What every benchmark shares: interleaved timing, and the result file.

from common import Claim, compare, session_call, write

timings = compare({"original": session_call(a, feeds), "ours": session_call(b, feeds)})
ratio = timings["ours"].ratio_to(timings["original"])        # Ratio(median, low, high)
write("strip", claims=[Claim("never slower", "<= 1.00", str(ratio), met=ratio.low <= 1)],
      rows=[{"model": "resnet50", "latency": ratio, ...}])
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxslim_kd import machine, runtime, timing
from onnxslim_kd.timing import Timing

RESULTS = Path(__file__).parent / "results"
THREADS = machine.cores()


@dataclass(frozen=True)
class Claim:
    """What was promised and measured; a line in RESULTS.md, and the first of each in README.md."""

    what: str
    target: str
    measured: str
    met: bool


@dataclass(frozen=True)
class Table:
    """A table of RESULTS.md: what its numbers are, the columns, and text for each cell."""

    title: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


def compare(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 30, seconds: float = 30.0
) -> dict[str, Timing]:
    """Time callables interleaved (A B B A ...); the noise of the machine goes to stderr."""
    load = machine.load_average()
    timings = timing.interleave(list(calls.values()), rounds=rounds, seconds=seconds)
    for sentence in timing.noise(timings[0], load=load):
        print(f"note: {sentence}", file=sys.stderr)
    return dict(zip(calls, timings, strict=True))


def session_call(
    model: str | os.PathLike[str] | ir.Model, feeds: Mapping[str, np.ndarray], **options: Any
) -> Callable[[], object]:
    """Return a call that runs ``model`` once; ``options`` go to `runtime.Session`."""
    session = runtime.Session(model, **{"threads": THREADS, "spin": False} | options)
    return lambda: session.run(feeds)


def write(
    name: str,
    *,
    claims: Sequence[Claim],
    rows: Sequence[Mapping[str, Any]],
    tables: Sequence[Table] = (),
    arguments: Sequence[str] = (),
    packages: Sequence[str] = (),
) -> Path:
    """Write ``results/<name>.json`` and print its claims.

    Args:
        name: Of the script, without ``.py``; behind a hyphen the part that it measured.
        claims: What was promised and measured, the foremost first.
        rows: The measurements behind them: JSON values, dataclasses, numpy numbers.
        tables: What RESULTS.md shows above the claims.
        arguments: What the script was called with, as another machine would say it.
        packages: Peers whose versions belong to the numbers.
    """
    result = {
        "command": " ".join(["python", f"benchmarks/{name.partition('-')[0]}.py", *arguments]),
        "environment": machine.environment(("torch", *packages)),
        "claims": [dataclasses.asdict(claim) for claim in claims],
        "tables": [dataclasses.asdict(table) for table in tables],
        "rows": list(rows),
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1, default=_plain) + "\n")
    for claim in claims:
        mark = "ok  " if claim.met else "MISS"
        print(f"{mark} {claim.what}: {claim.measured} (target {claim.target})")
    return path


def _plain(value: Any) -> Any:
    """Turn what measurements are made of into JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
