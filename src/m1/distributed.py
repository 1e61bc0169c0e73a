"""Ranks: one process, or the many that `torchrun` starts; what they tell each other, and whose part of the work is whose.

Without a process group every function here is that of a single rank, so callers need no second path. How a model's weights
are divided among the ranks is in `training/sharding.py`.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from m1.modeling.loading import choose_device

T = TypeVar("T")
# Words in the messages of gloo and NCCL when another rank is gone; they raise plain RuntimeErrors.
_SIGNS_OF_A_LOST_RANK = ("connection closed", "connection reset", "timed out", "timeout", "broken pipe", "socket", "nccl")


class LostRankError(ConnectionError):
    """Another rank ended or did not answer in time. What a run had saved before stands."""


@contextmanager
def ranks(device_name: str, timeout: float) -> Iterator[torch.device]:
    """Within: the process group of `torchrun`'s environment, or none in a process started otherwise; yields the device.

    On GPUs rank i of a host takes GPU i (`LOCAL_RANK`); NCCL moves GPU tensors, gloo the rest. `timeout`, in seconds, is how
    long a rank waits for the others. Raises LostRankError when one of them is gone, ValueError for too few GPUs.
    """
    device = local_device(device_name)
    if "RANK" not in os.environ or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    if not is_first():
        transformers.utils.logging.disable_progress_bar()
    try:
        yield device
    except RuntimeError as error:
        if is_lost_rank(error):
            raise LostRankError(
                f"rank {rank()}: another rank ended, or did not answer for {timeout:.0f} s ({_first_sentence(error)}). The "
                "newest checkpoint stands: start the same command again to go on from it"
            ) from error
        raise
    # Not after an error: the others may be gone, and waiting for them would hide it.
    dist.destroy_process_group()


def is_lost_rank(error: RuntimeError) -> bool:
    """Whether the error is a collective's that another rank left."""
    text = str(error).lower()
    return num_ranks() > 1 and (isinstance(error, dist.DistError) or any(sign in text for sign in _SIGNS_OF_A_LOST_RANK))


def _first_sentence(error: RuntimeError) -> str:
    return str(error).splitlines()[0].split(". ")[0]


def local_device(name: str) -> torch.device:
    """The device that a config names ("auto", "cpu", "cuda") for this rank; under `torchrun`, the GPU of its local number."""
    device = choose_device(name)
    if device.type == "cpu" or "LOCAL_RANK" not in os.environ:
        return device
    number = int(os.environ["LOCAL_RANK"])
    if number >= torch.cuda.device_count():
        raise ValueError(
            f"--nproc-per-node: local rank {number} has no GPU of its own, torch sees {torch.cuda.device_count()}; "
            "start one process a GPU, or use --device cpu"
        )
    return torch.device("cuda", number)


def is_distributed() -> bool:
    """Whether there is a process group, be it of one rank."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if is_distributed() else 0


def num_ranks() -> int:
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """The number of this rank among those of its host."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_distributed() else 0


def num_local_ranks() -> int:
    """How many ranks this host has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_distributed() else 1


def is_first() -> bool:
    """Whether this rank speaks and writes what is the same on all."""
    return rank() == 0


def say(*words: object) -> None:
    """Print, once."""
    if is_first():
        print(*words, flush=True)


def barrier() -> None:
    """Wait until every rank is here."""
    sum_over_ranks([0])


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sums of host numbers over all ranks, in float64: counts stay exact up to 2**53."""
    if num_ranks() == 1:
        return list(values)
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.tolist()


def is_any(flag: bool) -> bool:
    """Whether the flag is true on some rank."""
    return sum_over_ranks([flag])[0] > 0


def add_over_ranks(tensor: Tensor) -> Tensor:
    """The sum over all ranks of a tensor on the device, in place."""
    if num_ranks() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_first(value: T) -> T:
    """The first rank's `value`, on every rank."""
    if num_ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def gather(value: T, group: Any = None) -> list[T]:
    """Every rank's `value`, by rank, on every rank."""
    if num_ranks() == 1:
        return [value]
    values: list[Any] = [None] * num_ranks()
    dist.all_gather_object(values, value, group=group)
    return values


def on_first(act: Callable[[], object], *, of_host: bool = False) -> None:
    """Do `act` on the first rank (of each host) while others wait; what it raises is raised on all, as OSError on others.

    They wait for up to a day, whatever the timeout of other collectives: a corpus is tokenised so, and a large model written.
    """
    patient = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if num_ranks() > 1 else None
    failure: Exception | None = None
    if local_rank() == 0 if of_host else is_first():
        try:
            act()
        except Exception as error:  # raised below, once the others know
            failure = error
    messages = gather(failure and str(failure), patient)
    if patient is not None:
        dist.destroy_process_group(patient)
    if failure is not None:
        raise failure
    if message := next(filter(None, messages), None):
        raise OSError(f"the first rank failed: {message}")


def share(items: Sequence[T]) -> list[tuple[T, bool]]:
    """This rank's part of `items`, which all ranks hold alike: each item is one rank's, and with it whether it counts.

    Item i belongs to rank i modulo their number. Ranks must do as many passes through a sharded model as the others, so where
    the items don't divide evenly, the rest get the first item once more, which does not count.
    """
    mine = []
    for start in range(0, len(items), num_ranks()):
        index = start + rank()
        mine.append((items[index], True) if index < len(items) else (items[0], False))
    return mine
