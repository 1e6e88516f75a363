"""Many processes as one: each takes its part of the batch, gradients are added up.

A process counts by the samples of its part that can be read, and takes part with none as well.

Started by torchrun, which sets RANK, WORLD_SIZE and LOCAL_RANK; without them there is one process.
With the same whole batch the weights equal those of one process, up to the order of additions
(BatchNormalization in training mode counts its own part of the batch, unless sync_bn).
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from onnxslim_kd.errors import UserError


@dataclass(frozen=True)
class World:
    """This process among the others."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def shard(self) -> tuple[int, int]:
        """Return (rank, processes)."""
        return self.rank, self.size

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def add_up(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace the gradients by their sums over all processes, in one message a type.

        Args:
            parameters: The same ones in every process. One without gradient here gets that of the
                others, and stays without where no process has one.
        """
        if self.size == 1:
            return
        given = [float(parameter.grad is not None) for parameter in parameters]
        owners = torch.tensor(given, device=self.device)
        dist.all_reduce(owners)
        held = [each for each, count in zip(parameters, owners.tolist(), strict=True) if count]
        for parameter in held:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._add_up([each.grad for each in held if each.grad is not None])

    @staticmethod
    def _add_up(tensors: Sequence[Tensor]) -> None:
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            same = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in same])
            dist.all_reduce(flat)
            parts = torch.split(flat, [tensor.numel() for tensor in same])
            for tensor, part in zip(same, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the tensors of the first one."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def any(self, flag: bool) -> bool:  # noqa: FBT001  (the flag is the value, not a mode)
        """Tell whether ``flag`` is set in any process."""
        if self.size == 1:
            return flag
        tensor = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return bool(tensor)

    def gather(self, number: int) -> list[int]:
        """Return the number of every process, by rank."""
        if self.size == 1:
            return [number]
        numbers = torch.zeros(self.size, dtype=torch.int64, device=self.device)
        numbers[self.rank] = number
        dist.all_reduce(numbers)
        return [int(each) for each in numbers.tolist()]

    def wait(self) -> None:
        """Let every process come to this line."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(device: str) -> Iterator[World]:
    """Join the processes that torchrun started; leave them at the end of the block.

    Args:
        device: auto, cpu or cuda.

    Raises:
        UserError: cuda was asked for and is not here.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch finds no CUDA device here")
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    size = int(os.environ.get("WORLD_SIZE", "1"))
    place = _own_device() if kind == "cuda" else "cpu"
    if size == 1:
        yield World(device=place)
        return
    store, rank, size = next(rendezvous("env://"))
    # torchrun keeps its store when it restarts workers, with the addresses of those that are gone.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=size,
        device_id=torch.device(place) if kind == "cuda" else None,
    )
    yield World(rank, size, place)
    dist.destroy_process_group()  # not after an error: it would wait for a process that is gone


def _own_device() -> str:
    """Make the device of this process the current one; return its name."""
    number, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= count:
        raise UserError(
            f"process {number} of this machine has no CUDA device of its own, there are {count};"
            f" start {count} processes, or set device cpu"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"
