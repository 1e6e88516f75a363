"""The training loop: fine-tune and distil an ONNX graph, checkpoint, resume, evaluate.

Every number drawn by chance is a function of (seed, epoch, step, sample), never of what ran
before; so the state of a run is its weights, its optimiser and where it stands, and a resumed run
ends with the same bits as one that was not disturbed.
"""

import signal
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxslim_kd.errors import OperationError
from onnxslim_kd.plans import Plan
from onnxslim_kd.training import checkpoint as checkpoints
from onnxslim_kd.training import optim
from onnxslim_kd.training.assemble import assemble
from onnxslim_kd.training.config import TrainConfig
from onnxslim_kd.training.data import Batch
from onnxslim_kd.training.distributed import World, join
from onnxslim_kd.training.heap import keep_freed_memory
from onnxslim_kd.training.interrupts import SIGNALS, interrupts
from onnxslim_kd.training.objective import OWN
from onnxslim_kd.training.plant import Plant

Event = Mapping[str, Any]
"""What happened, as JSON: ``event`` says what, the other keys how much."""
Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """What a run ends with."""

    model: ir.Model
    """The model given, with the trained weights."""
    history: list[dict[str, Any]]
    """The numbers of every epoch."""
    finished: bool = True
    """False where Ctrl-C ended it early; the checkpoint goes on from there."""
    leads: bool = True
    """Whether this process is the one that writes."""


def train(model: ir.Model, config: TrainConfig, listen: Listener = lambda event: None) -> Outcome:
    """Train ``model``.

    Args:
        model: A loaded model, plain or merged; it is changed.
        config: All settings.
        listen: Called with every event, in the leading process only.

    Raises:
        UserError: The settings, the data or a checkpoint do not fit.
        OperationError: The loss is not finite, or a checkpoint cannot be written.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with join(config.device) as world, interrupts(_signals(world)) as interrupted:
        speak = listen if world.leads else lambda event: None
        run = Run(assemble(model, config, world, speak), config, world, speak)
        keep_freed_memory()
        run.resume()
        run.rehearse()
        finished = run.fit(interrupted)
        run.finish()
        return Outcome(run.plant.model, run.history, finished, world.leads)


def _signals(world: World) -> tuple[signal.Signals, ...]:
    """Return what a run ends for; among several, torchrun's SIGTERM says that a peer is gone."""
    return SIGNALS if world.size == 1 else SIGNALS[:1]


@dataclass
class Run:
    """One training run between two steps."""

    plant: Plant
    config: TrainConfig
    world: World
    listen: Listener
    epoch: int = 0
    """Epochs that are over."""
    step: int = 0
    """Steps done in the epoch that is not."""
    history: list[dict[str, Any]] = field(default_factory=list)
    best: float | None = None
    plans: list[Plan] = field(default_factory=list)
    """The cuts made so far."""
    _fresh: bool = True

    def __post_init__(self) -> None:
        self.graph = checkpoints.fingerprint(self.plant.model)

    # ------------------------------------------------------------------------- loop

    def fit(self, interrupted: threading.Event) -> bool:
        """Train to the end; False where Ctrl-C came before it."""
        while self.epoch < self.config.epochs:
            self._shrink()
            started, seen = time.perf_counter(), 0
            self.plant.lowered.train()
            for batch in self.plant.loader.train(self.epoch, self.step):
                rate = self._rate()
                record = self._step(batch)
                self.step += 1
                seen += len(batch) * self.world.size
                self._log(record, rate, seen / (time.perf_counter() - started))
                if self.world.any(interrupted.is_set()):
                    self._save()
                    return False
                if self.config.checkpoint_steps and self.step % self.config.checkpoint_steps == 0:
                    self._save()
            self._end_epoch(time.perf_counter() - started)
        return True

    def _shrink(self) -> None:
        """Make the cuts that are due before this epoch; momentum and averages are cut along."""
        if not self.config.cuts:
            return
        from onnxslim_kd.training import shrink  # it and prune bring scipy: 50 MB for cuts alone

        for cut in shrink.due(self.config.cuts, self.epoch, len(self.plans)):
            with self.plant.averaged():
                self.plant.lowered.write_back(self.plant.model)
            plan = shrink.decide(self.plant.model, cut)
            self._replant(plan, self.plant.state())
            self.best = None  # a wider model is no measure for what comes now

    def _replant(self, plan: Plan, state: Mapping[str, Tensor] | None = None) -> None:
        """Go on with the model that ``plan`` makes of the present one."""
        from onnxslim_kd.passes import prune
        from onnxslim_kd.training import shrink

        old = self.plant.model
        settings = self.config.model_copy(update=shrink.ALREADY)
        self.plant = assemble(prune.cut(old, plan), settings, self.world, self.listen)
        if state is not None:
            self.plant.restore(shrink.sliced(old, state, plan), optimizer=True)
        self.plans.append(plan)

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """Train on ``batch``; return the loss and its terms, nothing where no sample is left."""
        plant, number = self.plant, self._number()
        seeds = np.random.SeedSequence([self.config.seed, number, self.world.rank])
        torch.manual_seed(int(seeds.generate_state(1)[0]))  # dropout, and nothing else
        optim.set_rate(plant.optimizer, self._rate())
        plant.optimizer.zero_grad()
        sums: dict[str, Any] = {}
        total = sum(self.world.gather(len(batch)))
        for piece in plant.pieces(batch, number):
            loss, terms = plant.loss(piece, self.epoch)
            if not bool(loss.isfinite()):
                raise OperationError(self._diagnosis(loss, piece.feeds))
            # Weighted before gradients cross processes, as they do inside of sync_bn.
            plant.scaler.scale(loss * piece.share * (len(batch) / total)).backward()
            for name, term in {"loss": loss.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + term * piece.share
        if total:
            self.world.add_up(list(plant.lowered.parameters_by_name.values()))
            self._report_unreached()
            plant.update(number)
        return sums

    def _number(self) -> int:
        """Return how many steps the run has done."""
        return self.epoch * self.plant.loader.steps + self.step

    def _rate(self) -> float:
        """Return the learning rate of the step that comes next."""
        place = self.epoch + self.step / self.plant.loader.steps
        return self.config.schedule.rate(self.config.optimizer.lr, place, self.config.epochs)

    def _report_unreached(self) -> None:
        """Say, before the first step of a run, which parameters get no gradient."""
        if self._fresh:
            self._fresh = False
            named = self.plant.lowered.parameters_by_name.items()
            names = [name for name, parameter in named if parameter.grad is None]
            self.listen({"event": "unreached", "names": names})

    def _diagnosis(self, loss: Tensor, feeds: Mapping[str, Tensor]) -> str:
        where = f"the loss is {loss.item()} at epoch {self.epoch + 1}, step {self.step + 1}"
        for name, parameter in self.plant.lowered.parameters_by_name.items():
            if not bool(parameter.isfinite().all()):
                return f"{where}: weight {name!r} is not finite; lower lr or clip gradients"
        outputs = self.plant.objective.outputs(self.epoch)
        found = self.plant.lowered.first_nonfinite(feeds, outputs) or OWN
        return f"{where}: the first value that is not finite is {found!r}; lower lr, or check data"

    def _log(self, record: Mapping[str, Tensor], rate: float, speed: float) -> None:
        steps = self.plant.loader.steps
        place = {"epoch": self.epoch, "step": self.step, "steps": steps}
        if not record or (self.step % self.config.log_steps and self.step != steps):
            self.listen({"event": "tick", **place})
            return
        self.listen(
            {
                "event": "step",
                **place,
                **{name: float(value) for name, value in record.items()},
                "lr": rate,
                "samples_per_second": speed,
            }
        )

    def _end_epoch(self, seconds: float) -> None:
        self.epoch, self.step = self.epoch + 1, 0
        record: dict[str, Any] = {"epoch": self.epoch, "seconds": seconds}
        if self.epoch % self.config.eval_every == 0 or self.epoch == self.config.epochs:
            record |= self.evaluate()
        if self.plant.loader.bad:
            record["bad_samples"] = len(self.plant.loader.bad)
        self.history.append(record)
        self.listen({"event": "epoch", **record})
        self._save()

    # ------------------------------------------------------------------- evaluation

    def rehearse(self) -> None:
        """Evaluate one batch: what does not fit must not wait for the end of the first epoch."""
        if self.plant.val_loader is not None and self.epoch < self.config.epochs:
            self.plant.measure(self.epoch, self.config.batch_size)

    def evaluate(self) -> dict[str, float]:
        """Measure the student (its moving average, if there is one); keep the best model."""
        if self.plant.val_loader is None:
            return {}
        with self.plant.averaged():
            result, lower = self.plant.measure(self.epoch - 1)
            value = next(iter(result.values()))
            if self.best is None or (value < self.best if lower else value > self.best):
                self.best = value
                if self.config.checkpoint is not None and self.world.leads:
                    self.plant.export(self.config.checkpoint / "best.onnx")
        return result

    # ------------------------------------------------------------------- checkpoints

    def _save(self) -> None:
        if self.config.checkpoint is None:
            return
        if self.world.leads:
            moment = checkpoints.Checkpoint(
                self.epoch,
                self.step,
                self.graph,
                self.plant.state(),
                {
                    "optimizer": self.config.optimizer.name,
                    "batch_size": self.config.batch_size,
                    "best": self.best,
                    "history": self.history,
                    "plans": [plan.model_dump(mode="json") for plan in self.plans],
                    "scaler": self.plant.scaler.state_dict(),
                },
            )
            extras: dict[str, Callable[[Path], object]] = {}
            if self.config.save_eval_model and self.step == 0:
                extras["eval_model.onnx"] = self._export_average
            place = checkpoints.save(
                self.config.checkpoint, moment, extras=extras, keep=self.config.keep
            )
            self.listen({"event": "checkpoint", "path": str(place)})
        self.world.wait()

    def _export_average(self, path: Path) -> None:
        with self.plant.averaged():
            self.plant.export(path)

    def resume(self) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            UserError: It is of another graph, or damaged.
            OperationError: The folder cannot be made.
        """
        if self.config.checkpoint is None:
            return
        if self.world.leads:
            checkpoints.make(self.config.checkpoint)
        held = checkpoints.newest(self.config.checkpoint, self.graph)
        if held is None:
            return
        for plan in held.notes["plans"]:
            self._replant(Plan.model_validate(plan))
        same = held.notes["optimizer"] == self.config.optimizer.name
        self.plant.restore(held.tensors, optimizer=same)
        seen = held.step * held.notes["batch_size"]  # it may be another one now
        self.epoch, self.step = held.epoch, seen // self.config.batch_size
        self.best, self.history = held.notes["best"], list(held.notes["history"])
        if held.notes["scaler"]:  # empty where the run had no scaling
            self.plant.scaler.load_state_dict(held.notes["scaler"])
        self.listen({"event": "resume", "epoch": self.epoch, "step": self.step})

    def finish(self) -> None:
        """Put the weights (their moving average, if there is one) into the model."""
        with self.plant.averaged():
            self.plant.lowered.write_back(self.plant.model)
        self.listen({"event": "end", "epoch": self.epoch, "step": self.step})
