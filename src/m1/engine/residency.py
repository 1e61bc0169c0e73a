"""`Residency`: whether an engine's states and graphs may stay on a GPU while a trainer uses it.

What the trainer needs is not known before it has trained. So the engine gives its memory up at first, sees what the peak of the
others was when it comes back, and stays from then on if both fit.
"""

import torch

MARGIN = 0.1  # of the GPU's memory: what captured graphs hold, what lies in pieces too small, what the next batch needs more


class Residency:
    """Peaks of allocated memory on one GPU between `leave` and `back`. Resets torch's statistics of peaks at `leave`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._peak_of_others: int | None = None  # the highest so far, in bytes
        self._own_bytes = 0  # of the engine's that stayed; 0 if nothing did
        self._is_away = False

    def leave(self, own_bytes: int) -> bool:
        """The others are about to work: whether `own_bytes` of states may stay beside what they have been seen to need."""
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.reset_peak_memory_stats(self._device)
        may_stay = self.fits(own_bytes, total)
        self._own_bytes, self._is_away = own_bytes if may_stay else 0, True
        return may_stay

    def back(self) -> None:
        """The engine goes on."""
        if self._is_away:
            self._is_away = False
            self.saw(torch.cuda.max_memory_allocated(self._device) - self._own_bytes)

    def saw(self, peak: int) -> None:
        """The others have needed `peak` bytes."""
        self._peak_of_others = max(peak, self._peak_of_others or 0)

    def fits(self, own_bytes: int, total: int) -> bool:
        """Whether both fit into `total` bytes; not before the others have been seen."""
        return self._peak_of_others is not None and self._peak_of_others + own_bytes < (1 - MARGIN) * total
