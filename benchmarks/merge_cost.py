"""What merging costs: memory for two models of 1.5 GB, time for ResNet-50 into MobileNetV2.

    python benchmarks/merge_cost.py [--folder DIR] [--seconds 60]

Memory is the peak of a fresh process that merges, proves and saves (all pages it ever held,
mapped files included), over the bytes of both models' weights. Time is merge and save, interleaved
with loading and saving the three files: student, teacher and merged.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
from common import Claim, compare, write

from onnxslim_kd import model as model_io
from onnxslim_kd.passes.merge import merge
from onnxslim_kd.verify_merge import verify_merge
from onnxslim_kd.zoo.export import export

LAYERS, WIDTH = 15, 5000
WEIGHTS = 2 * LAYERS * WIDTH * WIDTH * 4
MEMORY, TIME = 1.3, 1.5
"""The targets: peak over weights, and merge over loading and saving."""
PAIRS = {"embedded": False, "external": True}


def wide(path: Path, seed: int, *, external: bool) -> None:
    """Write a stack of square layers, 100 MB each."""
    rng = np.random.default_rng(seed)
    inputs = [ir.val("x", dtype=ir.DataType.FLOAT, shape=["N", WIDTH])]
    value, nodes, weights = inputs[0], [], []
    for i in range(LAYERS):
        array = rng.standard_normal((WIDTH, WIDTH), np.float32) / np.float32(WIDTH**0.5)
        weights.append(ir.val(f"w{i}", const_value=ir.tensor(array, name=f"w{i}")))
        for op, operands in (("MatMul", [value, weights[-1]]), ("Relu", [])):
            nodes.append(ir.node(op, operands or [value], name=f"{op}{i}"))
            value = nodes[-1].outputs[0]
            value.name = f"{op}{i}_output"
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(["N", WIDTH])
    graph = ir.Graph(
        inputs, [value], nodes=nodes, initializers=weights, opset_imports={"": 17}, name="wide"
    )
    model_io.save(ir.Model(graph, ir_version=8), path, external_data=external)


def merge_and_save(student: Path, teacher: Path, output: Path, loss: str) -> None:
    model_io.save(merge(student, teacher, [loss]), output, overwrite=True)


def child(student: str, teacher: str, output: str) -> None:
    """Merge, prove and save in this process; print its peak after each step in bytes."""
    before = _peak()
    merged = merge(student, teacher, [f"l2:Relu{LAYERS - 1}_output=Relu{LAYERS - 1}_output"])
    peaks = {"start": before, "merge": _peak()}
    verify_merge(merged, student, teacher)
    peaks["prove"] = _peak()
    model_io.save(merged, output)
    print(json.dumps(peaks | {"save": _peak()}))


def _peak() -> int:
    """The most that this program held; `ru_maxrss` would count what started it as well."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def memory(folder: Path) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, external in PAIRS.items():
        paths = [folder / f"{name}_{side}.onnx" for side in ("student", "teacher")]
        for seed, path in enumerate(paths):
            wide(path, seed, external=external)
        output = folder / f"{name}_merged.onnx"
        command = [sys.executable, __file__, "--child", *map(str, (*paths, output))]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks = json.loads(printed)
        ratios = {f"{step}_over_weights": peak / WEIGHTS for step, peak in peaks.items()}
        rows.append({"weights": name, "weight_bytes": WEIGHTS, "peak_bytes": peaks, **ratios})
        for path in folder.glob(f"{name}_*"):
            path.unlink()
    return rows


def duration(folder: Path, seconds: float) -> dict[str, object]:
    student, teacher = folder / "mobilenet_v2.onnx", folder / "resnet50.onnx"
    merged, copy = folder / "merged.onnx", folder / "copy.onnx"
    for path in (student, teacher):
        model_io.save(export(path.stem), path)
    merge_and_save(student, teacher, merged, "l2:logits=logits")

    def load_and_save() -> None:
        for path in (student, teacher, merged):
            model_io.save(model_io.load(path), copy, overwrite=True)

    timings = compare(
        {
            "load and save three files": load_and_save,
            "merge and save": lambda: merge_and_save(student, teacher, copy, "l2:logits=logits"),
        },
        seconds=seconds,
    )
    reference = timings["load and save three files"]
    ratio = timings["merge and save"].ratio_to(reference)
    return {"pair": "mobilenet_v2 with resnet50", "ratio": ratio, "timings": timings}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, help="For 9 GB of files.")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        time_row = duration(Path(folder), arguments.seconds)
        memory_rows = memory(Path(folder))
    ratio = time_row["ratio"]
    worst = max(float(str(row["save_over_weights"])) for row in memory_rows)
    claims = [
        Claim(
            "peak memory of merging 2 x 1.5 GB, proof and file included, over the weights",
            f"<= {MEMORY}", f"{worst:.2f}", met=worst <= MEMORY,
        ),
        Claim(
            "merging ResNet-50 into MobileNetV2, over loading and saving the three files",
            f"<= {TIME}", str(ratio), met=ratio.median <= TIME,  # type: ignore[attr-defined]
        ),
    ]  # fmt: skip
    write("merge_cost", claims=claims, rows=[time_row, *memory_rows])


if __name__ == "__main__":
    main()
