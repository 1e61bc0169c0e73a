"""Numbers between host and device without waiting: one copy up a step, results read when they are needed.

Pinned memory comes from torch's caching host allocator, which does not reuse a block before the copies queued on it are done.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16  # bytes; more than any element has


def upload(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on `device`, queued as one copy. On a CPU they share the arrays' memory."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    offsets, size = {}, 0
    for name, array in arrays.items():
        offsets[name] = size
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    buffer = pinned.numpy()
    for name, array in arrays.items():
        buffer[offsets[name] : offsets[name] + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    sent = pinned.to(device, non_blocking=True)
    tensors = {}
    for name, array in arrays.items():
        part = sent[offsets[name] : offsets[name] + array.nbytes]
        tensors[name] = part.view(torch.from_numpy(array[:0]).dtype).view(array.shape)
    return tensors


class Download:
    """Tensors on their way to the host. On a CPU they are there."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        self._tensors = tensors
        if tensors and tensors[0].is_cuda:
            self._tensors = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
            for target, source in zip(self._tensors, tensors, strict=True):
                target.copy_(source, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[np.ndarray]:
        """Their values, once the device has got there."""
        if self._event is not None:
            self._event.synchronize()
        return [t.numpy() for t in self._tensors]
