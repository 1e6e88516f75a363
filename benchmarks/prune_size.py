"""Parts (c) and (d) of `prune_speed`: how memory and time grow with the size of a model."""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import Claim
from onnx import TensorProto, helper, numpy_helper

from onnxslim_kd import model as model_io
from onnxslim_kd.passes import groups, prune
from onnxslim_kd.passes.ratios import Amount

CHOICE = prune.Choice(pattern=".*", ratio=0.5, amount=Amount(round_to=1))
LARGE = 42, 4096
"""Layers and width of the large model: 2.8e9 bytes."""
NODES = 1_000, 3_000, 10_000, 30_000, 50_000


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def decide_and_cut(model: Any) -> None:
    """What (b) and (d) time of us."""
    analysis = groups.analyse(model)
    decided = prune.plan(analysis, CHOICE)
    prune.apply(analysis, prune.removed_by(analysis, decided))


# ------------------------------------------------------------------------- (c): memory


def memory(folder: Path, claims: list[Claim], rows: list[dict[str, Any]]) -> None:
    source, target, copy_ = (folder / f"{name}.onnx" for name in ("large", "cut", "copy"))
    size = write_large(source)
    took, peak = command(source, target)
    for file in folder.glob("cut.onnx*"):
        file.unlink()
    outside: dict[str, Any] = {"save_as_external_data": True, "location": "copy.data"}
    copying = seconds(lambda: onnx.save(onnx.load(source), copy_, **outside))
    rows.append(
        {"part": "c", "bytes": size, "peak_bytes": peak, "seconds": took, "copy_s": copying}
    )
    print(rows[-1], flush=True)
    claims.append(
        Claim(
            "peak memory of cutting 2 of 42 layers of a 2.8 GB model, over its bytes",
            "<= 1.20",
            f"{peak / size:.2f} ({took / copying:.2f} of the time of onnx.load + onnx.save)",
            met=peak <= 1.2 * size,
        )
    )


def command(source: Path, target: Path) -> tuple[float, int]:
    """Cut the outputs of two layers with the command; return seconds and the peak bytes."""
    options = ("--pattern", r"layer[01]\.", "--ratio", "0.5", "--round-to", "1", "--no-verify")
    prune_it = (sys.executable, "-m", "onnxslim_kd", "prune", source, *options, "-o", target)
    start = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, prune_it)], check=True, stdout=subprocess.PIPE
    )
    return time.perf_counter() - start, int(found.stdout) * 1024


PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Runs a command from a process that is small itself: a child's peak begins with its parent's."""


def write_large(path: Path) -> int:
    """Write a chain of matrix products whose weights are external data; return their bytes."""
    layers, width = LARGE
    block = np.random.default_rng(0).standard_normal((width, width), np.float32).tobytes()
    ops, weights, value = [], [], "x"
    with path.with_suffix(".bin").open("wb") as file:
        for i in range(layers):
            tensor = TensorProto(name=f"layer{i}.weight", dims=(width, width), data_type=1)
            tensor.data_location = TensorProto.EXTERNAL
            entries = ("location", file_name(path)), ("offset", str(i * len(block)))
            for key, text in (*entries, ("length", str(len(block)))):
                tensor.external_data.add(key=key, value=text)
            weights.append(tensor)
            file.write(block)
            ops.append(helper.make_node("MatMul", [value, tensor.name], [f"m{i}"], f"layer{i}"))
            ops.append(helper.make_node("Relu", [f"m{i}"], [f"r{i}"], f"relu{i}"))
            value = f"r{i}"
    onnx.save(_model(ops, weights, [1, width], value, [1, width]), path)
    return layers * len(block)


def file_name(path: Path) -> str:
    return path.with_suffix(".bin").name


def _model(
    ops: list[Any], weights: list[TensorProto], x: list[int], output: str, y: list[int]
) -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    graph = helper.make_graph(ops, "g", [info("x", 1, x)], [info(output, 1, y)], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


# -------------------------------------------------------------------------- (d): nodes


def nodes(claims: list[Claim], rows: list[dict[str, Any]]) -> None:
    times = []
    for count in NODES:
        model = model_io.load(chain(count))
        copies = model.clone(), model.clone()  # a cut is in place; to copy is onnx-ir's own work
        times.append(min(seconds(partial(decide_and_cut, copy_)) for copy_ in copies))
        rows.append({"part": "d", "nodes": count, "seconds": times[-1]})
        print(rows[-1], flush=True)
    exponent = float(np.polyfit(np.log(NODES), np.log(times), 1)[0])
    claims.append(
        Claim(
            "time against nodes, 1k to 50k: exponent of a log-log fit (1 is linear)",
            "<= 1.10",
            f"{exponent:.2f} ({times[-1]:.1f} s for 50k)",
            met=math.isfinite(exponent) and exponent <= 1.1,
        )
    )


def chain(count: int) -> onnx.ModelProto:
    """A residual network of ``count`` nodes: Conv, Relu, Conv, Add."""
    rng = np.random.default_rng(0)
    ops, weights, value = [], [], "x"

    def conv(source: str, index: int, inputs: int = 8) -> str:
        array = rng.standard_normal((8, inputs, 1, 1), np.float32)
        weights.append(numpy_helper.from_array(array, f"w{index}"))
        ops.append(helper.make_node("Conv", [source, f"w{index}"], [f"c{index}"], f"conv{index}"))
        return f"c{index}"

    value = conv("x", 0, 3)
    for i in range(1, count // 2, 2):
        inner = conv(value, i)
        ops.append(helper.make_node("Relu", [inner], [f"r{i}"], f"relu{i}"))
        last = conv(f"r{i}", i + 1)
        ops.append(helper.make_node("Add", [last, value], [f"a{i}"], f"add{i}"))
        value = f"a{i}"
    value = conv(value, count)
    return _model(ops, weights, [1, 3, 4, 4], value, [1, 8, 4, 4])
