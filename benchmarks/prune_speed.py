"""Speed of pruning, without the proof: against a copy of the file, Torch-Pruning, memory, size.

    python benchmarks/prune_speed.py [--quick] [--models FOLDER]

(a) `api.prune` from file to file, which is what the command runs, but for the proof, against
    onnx.load + onnx.save of the same file; --models adds the files of a folder,
(b) analyse + plan + cut against Torch-Pruning's pruner construction + step on the same network,
(c) peak memory of the command that cuts two layers of a 2.8 GB model, against the model's bytes,
(d) time against the number of nodes, 1k to 50k.

A round runs both sides once; ratios are medians over rounds, with the smallest and the largest.
"""

import argparse
import copy
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from common import Claim, write
from densenet import densenet121
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from yolo import Yolov8n

from onnxslim_kd import api, proof
from onnxslim_kd import model as model_io
from onnxslim_kd.passes import groups, prune
from onnxslim_kd.passes.ratios import Amount
from onnxslim_kd.zoo.export import build

ROUNDS = 5
CHOICE = prune.Choice(pattern=".*", ratio=0.5, amount=Amount(round_to=1))
LARGE = 42, 4096
"""Layers and width of the large model: 2.8e9 bytes."""
NODES = 1_000, 3_000, 10_000, 30_000, 50_000
Timed = Callable[[], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two networks, one round")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="more .onnx files for (a)")
    options = parser.parse_args()
    claims: list[Claim] = []
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        networks(Path(folder), claims, rows, options)
        memory(Path(folder), claims, rows)
        nodes(claims, rows)
    if not options.quick:
        write("prune_speed", claims=claims, rows=rows, packages=("onnx", "torch-pruning"))
    for claim in claims if options.quick else ():
        print(claim)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def paired(calls: Mapping[str, Timed], rounds: int) -> dict[str, Any]:
    """Time two calls in turns; return medians and the ratio of the first to the second."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in list(calls.items())[:: 1 if index % 2 else -1]:
            took = call()
            if index:  # the first round warms up
                found[name].append(took)
    ours, theirs = found.values()
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return {f"{name}_s": statistics.median(times) for name, times in found.items()} | {
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


# --------------------------------------------------------------------- (a), (b): networks


def modules(*, quick: bool) -> dict[str, nn.Module]:
    found = {name: build(name, {}) for name in ("resnet18", "mobilenet_v2")}
    if not quick:
        found |= {name: build(name, {}) for name in ("resnet34", "resnet50", "resnet152")}
        found |= {"densenet121": densenet121(), "vit_b_16": vit_b(), "yolov8n": Yolov8n()}
    return {name: module.eval() for name, module in found.items()}


def vit_b() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(num_labels=1000, attn_implementation="eager")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = transformers.ViTForImageClassification(config)

        def forward(self, x: Tensor) -> Tensor:
            return self.vit(x).logits

    return Logits()


def networks(
    folder: Path, claims: list[Claim], rows: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    rounds = 1 if options.quick else ROUNDS
    files, peers = [], []
    for name, module in modules(quick=options.quick).items():
        path = folder / f"{name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, (torch.zeros(1, 3, 224, 224),), path, dynamo=False)
        files.append(against_copy(path, folder, rounds))
        peers.append({"part": "b", "model": name} | against_peer(path, module, rounds))
        print(files[-1], peers[-1], sep="\n", flush=True)
        path.unlink()
    for path in sorted(options.models.glob("*.onnx")) if options.models else ():
        files.append(against_copy(path, folder, rounds))
        print(files[-1], flush=True)
    rows += files + peers
    claims += [_file_claim(files), _peer_claim([row for row in peers if "ratio" in row])]


def _file_claim(files: list[dict[str, Any]]) -> Claim:
    worst = max(files, key=lambda row: row["ratio"])
    return Claim(
        "prune a file (load, analyse, plan, cut, save) against onnx.load + onnx.save",
        "<= 1.50 on each network",
        f"{_spread(files)}, most on {worst['model']}",
        met=worst["ratio"] <= 1.5,
    )


def _peer_claim(peers: list[dict[str, Any]]) -> Claim:
    slowest = max(peers, key=lambda row: row["ratio"])
    return Claim(
        "analyse, plan and cut against Torch-Pruning's pruner and step",
        "<= 0.10 on each network",
        f"{_spread(peers)}, most on {slowest['model']}",
        met=slowest["ratio"] <= 0.1,
    )


def against_copy(path: Path, folder: Path, rounds: int) -> dict[str, Any]:
    size = path.stat().st_size
    calls = {"ours": lambda: whole(path, folder), "copy": lambda: copied(path, folder)}
    row = {"part": "a", "model": path.stem, "bytes": size} | paired(calls, rounds)
    return row | {"proof_s": proof_time(path)}


def against_peer(path: Path, module: nn.Module, rounds: int) -> dict[str, Any]:
    try:
        torch_pruning(module)
    except (IndexError, RuntimeError, ZeroDivisionError) as error:  # what it raises on a graph
        ours = statistics.median(in_memory(path) for _ in range(rounds))  # that it misreads
        return {"ours_s": ours, "torch_pruning": f"{type(error).__name__}: {error}"}
    calls = {"ours": lambda: in_memory(path), "torch_pruning": lambda: torch_pruning(module)}
    return paired(calls, rounds)


def _spread(rows: list[dict[str, Any]]) -> str:
    ratios = sorted(row["ratio"] for row in rows)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def whole(path: Path, folder: Path) -> float:
    target = folder / "pruned.onnx"
    target.unlink(missing_ok=True)
    return seconds(lambda: api.prune(path, CHOICE, target, verify=False))


def copied(path: Path, folder: Path) -> float:
    target = folder / "copy.onnx"
    target.unlink(missing_ok=True)
    return seconds(lambda: onnx.save(onnx.load(path), target))


def in_memory(path: Path) -> float:
    model = model_io.load(path)
    return seconds(lambda: _decide_and_cut(model))


def _decide_and_cut(model: Any) -> None:
    analysis = groups.analyse(model)
    decided = prune.plan(analysis, CHOICE)
    prune.apply(analysis, prune.removed_by(analysis, decided))


def torch_pruning(module: nn.Module) -> float:
    import torch_pruning as tp

    module = copy.deepcopy(module)
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    heads = {
        m: 12 for name, m in module.named_modules() if name.endswith(("query", "key", "value"))
    }
    heads |= {
        m: 12 for n, m in module.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))
    }

    def run() -> None:
        pruner = tp.pruner.MagnitudePruner(
            module,
            torch.zeros(1, 3, 224, 224),
            importance=tp.importance.MagnitudeImportance(p=1),
            pruning_ratio=0.5,
            ignored_layers=linear[-1:],
            num_heads=heads,
            prune_num_heads=True,
            head_pruning_ratio=0.5,
        )
        pruner.step()

    return seconds(run)


def proof_time(path: Path) -> float:
    """Seconds to silence the original, run both and compare."""
    analysis = groups.analyse(model_io.load(path))
    removed = prune.removed_by(analysis, prune.plan(analysis, CHOICE))
    start = time.perf_counter()
    silenced = proof.silence(analysis, removed)
    silencing = time.perf_counter() - start
    prune.apply(analysis, removed)
    return silencing + seconds(lambda: proof.prove(silenced, analysis.model))


# ------------------------------------------------------------------------- (c): memory


def memory(folder: Path, claims: list[Claim], rows: list[dict[str, Any]]) -> None:
    source, target, copy_ = (folder / f"{name}.onnx" for name in ("large", "cut", "copy"))
    size = write_large(source)
    took, peak = command(source, target)
    for file in folder.glob("cut.onnx*"):
        file.unlink()
    outside = {"save_as_external_data": True, "location": "copy.data"}
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
        times.append(min(seconds(lambda m=model: _decide_and_cut(m.clone())) for _ in range(2)))
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


if __name__ == "__main__":
    main()
