"""One step of distillation against a hand-written loop of torch: time, loss curve, memory.

    python benchmarks/train_step.py [--seconds 90] [--only PAIR] [--busy]

Both do the same to the same batches in memory: the teacher without gradient, the student in
training mode, the KL loss, backward, SGD with momentum. The native loop is what one writes: modules
in their default layout, the teacher in eval mode under no_grad. Ours is the engine's own step on
the merged ONNX graph with default settings, its checks for finite losses included. Each has a
process of its own, so that neither heap is shaped by the other; they take turns. Memory is the peak
of the same processes, all of it, what they import included. For the curve the speed options are
off. ``--busy`` is for a machine with other work: one thread, and the processor's time instead of
the clock's.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:  # the native loop's process must hold none of ours
    from common import Claim

BATCH, STEPS, LR, DECAY, TEMPERATURE = 8, 20, 0.01, 1e-4, 4.0
TIME, CURVE, MEMORY = 0.8, 1e-4, 1.1
"""The targets."""
PLAIN = {"channels_last": False, "teacher_runtime": "torch"}
"""The speed options off."""
Step = Callable[[int], float]
"""From the number of a batch to its loss."""


@dataclass(frozen=True)
class Pair:
    """A student, its teacher, and the side of the images."""

    student: str
    teacher: str
    side: int = 112
    arguments: dict[str, object] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def images(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return torch.randn(BATCH, 3, self.side, self.side, generator=generator)


_VIT = {"arguments": {"side": 112}, "settings": {"bn": "none"}}  # it never had any
PAIRS = {
    "MobileNetV2 <- ResNet-50": Pair("mobilenet_v2", "resnet50"),
    "ResNet-18 <- ResNet-34": Pair("resnet18", "resnet34"),
    "ViT-tiny <- ViT-small": Pair("vit:student", "vit:teacher", **_VIT),  # type: ignore[arg-type]
}


# ----------------------------------------------------------------------------- files


def prepare(pair: Pair, folder: Path) -> None:
    """Write both nets, and the merged graph."""
    from onnxslim_kd import model as model_io
    from onnxslim_kd.passes.merge import merge
    from onnxslim_kd.zoo.export import export

    for seed, side in enumerate(("student", "teacher")):
        model = export(
            getattr(pair, side),
            inputs={"image": (1, 3, pair.side, pair.side)},
            arguments=pair.arguments,
            seed=seed,
        )
        model_io.save(model, folder / f"{side}.onnx")
    student, teacher = folder / "student.onnx", folder / "teacher.onnx"
    outputs = [model_io.load(path).graph.outputs[0].name for path in (student, teacher)]
    merged = merge(student, teacher, [f"kl:{'='.join(map(str, outputs))}"])
    model_io.save(merged, folder / "merged.onnx")
    torch.save(_state(pair.student, pair, student), folder / "student.pt")
    torch.save(_state(pair.teacher, pair, teacher), folder / "teacher.pt")


def _state(spec: str, pair: Pair, path: Path) -> dict[str, Tensor]:
    """The weights of an exported net, under the names of its module."""
    from onnxslim_kd import model as model_io
    from onnxslim_kd.zoo.blocks import onnx_names
    from onnxslim_kd.zoo.export import build

    held = model_io.load(path).graph.initializers
    names = onnx_names(build(spec, pair.arguments))
    return {
        name: torch.tensor(held[own].const_value.numpy())  # type: ignore[union-attr]
        for name, own in names.items()
        if not name.endswith("num_batches_tracked")
    }


# ----------------------------------------------------------------------------- steps


def native(pair: Pair, folder: Path) -> Step:
    student, teacher = (_module(pair, side, folder) for side in ("student", "teacher"))
    student.train()
    teacher.eval()
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": vectors},
    ]
    optimizer = torch.optim.SGD(groups, LR, momentum=0.9)

    def step(number: int) -> float:
        images = pair.images(number)
        with torch.no_grad():
            target = F.log_softmax(teacher(images) / TEMPERATURE, 1)
        logs = F.log_softmax(student(images) / TEMPERATURE, 1)
        loss = F.kl_div(logs, target, reduction="batchmean", log_target=True) * TEMPERATURE**2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


def _module(pair: Pair, side: str, folder: Path) -> nn.Module:
    from importlib import import_module

    from onnxslim_kd.zoo import ZOO

    name = getattr(pair, side)
    module, _, function = (ZOO[name].spec if name in ZOO else name).partition(":")
    net: nn.Module = getattr(import_module(module), function)(**pair.arguments)
    net.load_state_dict(torch.load(folder / f"{side}.pt"), strict=False)
    return net


def ours(pair: Pair, folder: Path, options: dict[str, Any] | None = None) -> Step:
    from onnxslim_kd import model as model_io
    from onnxslim_kd.training import config
    from onnxslim_kd.training.assemble import assemble
    from onnxslim_kd.training.data import Batch
    from onnxslim_kd.training.distributed import World
    from onnxslim_kd.training.engine import Run
    from onnxslim_kd.training.heap import keep_freed_memory

    settings = config.parse(
        {
            "data": f"random?size={BATCH}",
            "batch_size": BATCH,
            "epochs": 1,
            "optimizer": {"lr": LR, "weight_decay": DECAY},
            **pair.settings,
            **(options or {}),
        }
    )
    world = World(device="cpu")
    plant = assemble(model_io.load(folder / "merged.onnx"), settings, world, lambda event: None)
    plant.lowered.train()
    run = Run(plant, settings, world, lambda event: None)
    keep_freed_memory()

    def step(number: int) -> float:
        batch = Batch({"image": pair.images(number)}, list(range(BATCH)))
        return float(run._step(batch)["loss"])  # all that the engine does between two batches

    return step


STEPPERS: dict[str, Callable[[Pair, Path], Step]] = {"native": native, "ours": ours}


# --------------------------------------------------------------------------- measures


def curve(pair: Pair, folder: Path) -> dict[str, Any]:
    """Run the first steps of both, speed options off; return how far the losses lie apart."""
    steps = native(pair, folder), ours(pair, folder, PLAIN)
    losses = [[step(number) for number in range(STEPS)] for step in steps]
    apart = max(abs(a - b) for a, b in zip(*losses, strict=True))
    return {"native": losses[0], "ours": losses[1], "apart": apart}


class Worker:
    """A loop in a process of its own; a call lets it take one step."""

    def __init__(self, kind: str, name: str, folder: Path) -> None:
        threads = str(torch.get_num_threads())
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", kind, name, str(folder), threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.spent = 0.0
        """Seconds of the processor so far."""
        self.peak = 0
        """Bytes."""

    def __call__(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(file=self._process.stdin, flush=True)
        self.spent, self.peak = json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def times_and_memory(name: str, folder: Path, seconds: float, *, busy: bool) -> dict[str, Any]:
    from common import compare

    from onnxslim_kd import timing

    workers = {kind: Worker(kind, name, folder) for kind in STEPPERS}
    if busy:
        clock = lambda: sum(worker.spent for worker in workers.values())  # noqa: E731
        measured = timing.interleave(list(workers.values()), seconds=seconds, clock=clock)
        timings = dict(zip(workers, measured, strict=True))
    else:
        timings = compare(workers, seconds=seconds)
    for worker in workers.values():
        worker.close()
    peaks = {kind: worker.peak for kind, worker in workers.items()}
    return {
        "time": {
            "milliseconds": {n: float(t.latency.median) for n, t in timings.items()},
            "ratio": timings["ours"].ratio_to(timings["native"]),
        },
        "memory": {"peaks": peaks, "ratio": peaks["ours"] / peaks["native"]},
    }


def child(kind: str, name: str, folder: str, threads: str) -> None:
    """Take a step for every line that comes in; answer with `Worker.spent` and its peak."""
    torch.set_num_threads(int(threads))
    step = STEPPERS[kind](PAIRS[name], Path(folder))
    for _ in sys.stdin:
        step(0)
        print(json.dumps([time.process_time(), _peak()]), flush=True)


def _peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


# ------------------------------------------------------------------------------- main


def measure(name: str, seconds: float, *, busy: bool) -> dict[str, Any]:
    pair = PAIRS[name]
    with tempfile.TemporaryDirectory() as folder:
        prepare(pair, Path(folder))
        row = {
            "pair": name,
            "batch": BATCH,
            "side": pair.side,
            "threads": torch.get_num_threads(),
            "clock": "process_time" if busy else "perf_counter",
            **times_and_memory(name, Path(folder), seconds, busy=busy),
            "curve": curve(pair, Path(folder)),
        }
    print(name, row["time"], f"apart {row['curve']['apart']:.2g}", row["memory"], flush=True)
    return row


def claims(rows: list[dict[str, Any]]) -> "list[Claim]":
    from common import Claim

    found = []
    for row in rows:
        ratio, pair = row["time"]["ratio"], row["pair"]
        how = "" if row["clock"] == "perf_counter" else " (processor time, one thread)"
        what = f"a distillation step over a native torch loop's, {pair}{how}"
        found.append(Claim(what, f"<= {TIME}", str(ratio), met=ratio.median <= TIME))
    apart = max(row["curve"]["apart"] for row in rows)
    what = f"losses of the first {STEPS} steps, apart from the native loop's"
    found.append(Claim(what, f"<= {CURVE:g}", f"{apart:.1g}", met=apart <= CURVE))
    worst = max(row["memory"]["ratio"] for row in rows)
    what = "peak memory of a training process over the native loop's"
    found.append(Claim(what, f"<= {MEMORY}", f"{worst:.2f}", met=worst <= MEMORY))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=90.0, help="of timing, for each pair")
    parser.add_argument("--only", help="one pair; nothing is written")
    parser.add_argument("--busy", action="store_true", help="one thread, processor time")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    from common import THREADS, write

    torch.set_num_threads(1 if arguments.busy else THREADS)
    names = [name for name in PAIRS if arguments.only in (None, name)]
    rows = [measure(name, arguments.seconds, busy=arguments.busy) for name in names]
    if arguments.only is None:
        given = [f"--seconds {arguments.seconds:g}", *(["--busy"] if arguments.busy else [])]
        write("train_step", claims=claims(rows), rows=rows, arguments=given)


if __name__ == "__main__":
    main()
