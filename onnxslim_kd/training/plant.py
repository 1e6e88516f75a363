"""Everything a run needs, in one place: module, teacher, data, optimiser, and their state."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxslim_kd import model as model_io
from onnxslim_kd.errors import OperationError, UserError
from onnxslim_kd.roles import Roles
from onnxslim_kd.training import metrics, optim
from onnxslim_kd.training.config import TrainConfig
from onnxslim_kd.training.data import Batch, Loader, check_batch
from onnxslim_kd.training.distributed import World
from onnxslim_kd.training.feeds import Feeder
from onnxslim_kd.training.lowering import Lowered
from onnxslim_kd.training.objective import Mix, Objective
from onnxslim_kd.training.teacher import Teacher
from onnxslim_kd.training.tidy import extract
from onnxslim_kd.training.weights import statistics_of

if TYPE_CHECKING:
    from onnxslim_kd.training.shrink import GroupSparsity

Values = Mapping[str, Tensor]
NO_SAMPLES = "the evaluation data has no samples"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Piece:
    """A piece of a batch that is computed at once."""

    feeds: Mapping[str, Tensor]
    entries: Mapping[str, Tensor]
    mix: Mix | None = None
    share: float = 1.0
    """How much of the batch it is."""


@dataclass
class Plant:
    """The parts of a run. The engine says when; this does."""

    model: ir.Model
    roles: Roles | None
    config: TrainConfig
    world: World
    lowered: Lowered
    objective: Objective
    feeder: Feeder
    loader: Loader
    val_loader: Loader | None
    teacher: Teacher | None
    optimizer: torch.optim.Optimizer
    sparsity: "GroupSparsity | None" = None
    ema: optim.Ema | None = field(init=False, default=None)
    scaler: Any = field(init=False)

    def __post_init__(self) -> None:
        self.statistics = statistics_of(self.model) & self.lowered.buffers_by_name.keys()
        self._forward: Any = torch.compile(self.lowered) if self.config.compile else self.lowered
        kind = self.world.device.partition(":")[0]
        self.scaler = torch.amp.GradScaler(kind, enabled=self.config.amp == "fp16")
        if self.config.ema is not None:
            self.ema = optim.Ema(self.config.ema, self.tensors())

    # ------------------------------------------------------------------------- steps

    def pieces(self, batch: Batch, number: int) -> Iterator[Piece]:
        """Give the batch of step ``number`` in ``accumulate`` pieces, ready to be computed.

        Unreadable samples are missing; where all are, there is no piece.

        Raises:
            OperationError: There are too few, and sync_bn waits for this process's part.
        """
        self._check_enough(batch)
        if len(batch) == 0:
            return
        check_batch(batch, self.objective.classes)
        batch, mix = self.objective.mixed(batch, [self.config.seed, number, self.world.rank])
        feeds = self._arranged(self.feeder(batch, number))
        entries = {name: tensor.to(self.world.device) for name, tensor in batch.entries.items()}
        count = min(self.config.accumulate, len(batch))
        for numbers in np.array_split(np.arange(len(batch)), count):
            rows = slice(int(numbers[0]), int(numbers[-1]) + 1)
            held = {name: tensor[rows] for name, tensor in feeds.items()}
            if self.teacher is not None:
                held |= self._taught(held, batch.indices[rows])
            own = {name: tensor[rows] for name, tensor in entries.items()}
            yield Piece(held, own, mix, len(numbers) / len(batch))

    def _check_enough(self, batch: Batch) -> None:
        """Refuse fewer samples than pieces: the other processes would wait for sums over all."""
        needed = min(self.config.accumulate, self.config.batch_size // self.world.size)
        if self.config.sync_bn and self.world.size > 1 and len(batch) < needed:
            raise OperationError(
                f"process {self.world.rank} can read {len(batch)} samples of a batch, and sync_bn"
                f" needs {needed}; mend the data (the first: {batch.bad[0][1]}) or make batch_size"
                f" larger"
            )

    def _taught(self, feeds: Values, indices: Sequence[int] | None = None) -> dict[str, Tensor]:
        """Return what the teacher gives, computed in the precision of the run."""
        assert self.teacher is not None
        with self._precision():
            given = self.teacher.compute(feeds) if indices is None else self.teacher(feeds, indices)
        return self._arranged(given)

    def _arranged(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self.config.channels_last:
            return dict(feeds)
        return {
            name: tensor.contiguous(memory_format=torch.channels_last)
            if tensor.ndim == 4 and tensor.is_floating_point()
            else tensor
            for name, tensor in feeds.items()
        }

    def loss(self, piece: Piece, epoch: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a piece, and its terms."""
        with self._precision():
            values = self._run(self._forward, piece.feeds, self.objective.outputs(epoch))
            return self.objective(values, piece.entries, epoch, piece.mix)

    @staticmethod
    def _run(forward: Any, feeds: Mapping[str, Tensor], outputs: tuple[str, ...]) -> Values:
        try:
            values: Values = forward(feeds, outputs)
        except (RuntimeError, ValueError) as error:  # shapes, memory; statistics of one number
            reason = str(error).partition("\n")[0]
            raise OperationError(f"the graph does not run on this batch: {reason}") from error
        return values

    def _precision(self) -> Any:
        if self.config.amp == "none":
            return nullcontext()
        return torch.autocast(self.world.device.partition(":")[0], DTYPES[self.config.amp])

    def update(self, number: int) -> None:
        """Turn the gradients into step ``number``."""
        parameters = list(self.lowered.parameters_by_name.values())
        self.scaler.unscale_(self.optimizer)
        if self.sparsity is not None:
            self.sparsity.apply()
        if self.config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
        with optim.gradients_as_stored(self.optimizer):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema is not None:
            self.ema.update(self.tensors(), number)

    # ------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def measure(self, epoch: int, samples: int | None = None) -> tuple[dict[str, float], bool]:
        """Return the numbers on the evaluation data, and whether lower is better.

        Args:
            epoch: Whose loss terms count.
            samples: How many to measure on; None for all.
        """
        assert self.val_loader is not None
        self.lowered.eval()
        if self.config.metric == "loss" or self._has_no_classes():
            return {"val_loss": self._mean_loss(epoch, samples)}, True
        metric: metrics.Metric | None = None
        for batch in self.val_loader.evaluate(samples):
            metric = metric or metrics.make(self.config.metric, batch.entries)
            feeds = self._arranged(self.feeder(batch, skip=self.feeder.extras()))
            values = self._run(self.lowered, feeds, self.objective.student)
            outputs = {name: value.float().cpu().numpy() for name, value in values.items()}
            metric.update(outputs, {key: value.numpy() for key, value in batch.entries.items()})
        if metric is None:
            raise UserError(NO_SAMPLES)
        return metric.result(), metric.lower_is_better

    def _has_no_classes(self) -> bool:
        """Tell whether labels are numbers, for which the loss is the natural measure."""
        own = self.objective.own.weight != 0 and self.config.labels.loss in ("bce", "mse")
        return self.config.metric == "auto" and own

    def _mean_loss(self, epoch: int, samples: int | None) -> float:
        assert self.val_loader is not None
        total, count = 0.0, 0
        for batch in self.val_loader.evaluate(samples):
            feeds = self._arranged(self.feeder(batch))
            if self.teacher is not None:
                feeds |= self._taught(feeds)
            entries = {name: t.to(self.world.device) for name, t in batch.entries.items()}
            loss, _ = self.loss(Piece(feeds, entries), epoch)
            total, count = total + loss.item() * len(batch), count + len(batch)
        if count == 0:
            raise UserError(NO_SAMPLES)
        return total / count

    def export(self, path: Path) -> None:
        """Write the student with the weights as they are now."""
        self.lowered.write_back(self.model)
        student = self.model
        if self.roles is not None:
            student = extract(self.model, self.roles.student_outputs, self.roles.student_inputs)
        model_io.save(student, path, overwrite=True)

    # ------------------------------------------------------------------------ state

    def tensors(self) -> dict[str, Tensor]:
        """Return what training changes in the model: parameters and running statistics."""
        buffers = self.lowered.buffers_by_name
        return {
            **self.lowered.parameters_by_name,
            **{name: buffers[name] for name in sorted(self.statistics)},
        }

    def state(self) -> dict[str, Tensor]:
        """Return all tensors of a checkpoint."""
        state = {f"weight/{name}": tensor.detach() for name, tensor in self.tensors().items()}
        held = optim.state_of(self.optimizer)
        state |= {f"optimizer/{name}": tensor for name, tensor in held.items()}
        if self.ema is not None:
            state |= {f"ema/{name}": tensor for name, tensor in self.ema.shadow.items()}
        return state

    @torch.no_grad()
    def restore(self, state: Mapping[str, Tensor], *, optimizer: bool) -> None:
        """Put back what `state` gave; the optimiser's part only where it is the same one."""
        kinds: dict[str, dict[str, Tensor]] = {"weight": {}, "optimizer": {}, "ema": {}}
        for name, tensor in state.items():
            kind, _, rest = name.partition("/")
            kinds[kind][rest] = tensor
        tensors = self.tensors()
        for name in kinds["weight"].keys() & tensors.keys():
            tensors[name].copy_(kinds["weight"][name])
        if optimizer:
            optim.restore(self.optimizer, kinds["optimizer"])
        if self.ema is not None:
            for name, shadow in self.ema.shadow.items():
                shadow.copy_(kinds["ema"].get(name, tensors[name]))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model have its moving average for the time of the block, if there is one."""
        if self.ema is None:
            yield
            return
        tensors = self.tensors()
        held = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        try:
            self._assign(tensors, self.ema.shadow)
            yield
        finally:
            self._assign(tensors, held)

    @staticmethod
    @torch.no_grad()
    def _assign(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(sources[name])
