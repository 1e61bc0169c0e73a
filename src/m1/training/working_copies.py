"""The matrices in the type that a step computes in: copied by a few launches a step, not cast one by one in every forward.

Autocast casts each weight when its layer runs and each gradient when it comes back: at 135M that is every seventh launch of a
step, and launches are what small batches wait for. The numbers are the same. A divided model has no use for this: it gathers
its matrices in that type (`sharding.py`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from m1.modeling import M1ForCausalLM
from m1.training.sharding import NEVER_CALLED, is_divided

ALIGNMENT = 128  # elements at which a copy begins: what matrix products and the copying kernel like


class WorkingCopies:
    """bfloat16 copies of the linear layers of a model's blocks; none for another precision, or of a divided model.

    They take memory (2 bytes a parameter) only while a step's gradients are computed.
    """

    def __init__(self, model: M1ForCausalLM, precision: str) -> None:
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []  # module, name, master, copy
        if precision != "bfloat16" or is_divided(model):
            return
        found = [
            (module, key, master)
            for name, module in model.model.layers.named_modules()
            if isinstance(module, nn.Linear)
            for key, master in module.named_parameters(recurse=False)
            if key == "weight" or not name.endswith(NEVER_CALLED)  # that one's bias is taken in float32
        ]
        sizes = [-(-master.numel() // ALIGNMENT) * ALIGNMENT for *_, master in found]
        memory = torch.empty(sum(sizes), dtype=torch.bfloat16, device=model.device)
        for (module, key, master), part in zip(found, memory.split(sizes), strict=True):
            copy = nn.Parameter(part[: master.numel()].view(master.shape), requires_grad=master.requires_grad)
            self._places.append((module, key, master, copy))
        self._memory, self._num_bytes = memory.untyped_storage(), memory.nbytes
        self._memory.resize_(0)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within: the copies, as the masters are now, stand in the modules; `collect` what a backward pass left on them."""
        if not self._places:
            yield
            return
        self._memory.resize_(self._num_bytes)
        with torch.no_grad():
            torch._foreach_copy_([copy for *_, copy in self._places], [master for *_, master, _ in self._places])
        try:
            for module, key, _, copy in self._places:
                module._parameters[key] = copy
            yield
        finally:
            for module, key, master, copy in self._places:
                module._parameters[key] = master
                copy.grad = None
            self._memory.resize_(0)

    @torch.no_grad()
    def collect(self) -> None:
        """Add the copies' gradients to the masters', in float32, and forget them."""
        first: tuple[list[Tensor], list[Tensor]] = ([], [])
        later: tuple[list[Tensor], list[Tensor]] = ([], [])
        for *_, master, copy in self._places:
            if copy.grad is None:
                continue
            sums, gradients = first if master.grad is None else later
            if master.grad is None:
                master.grad = torch.empty_like(master)
            sums.append(master.grad)
            gradients.append(copy.grad)
            copy.grad = None
        if first[0]:
            torch._foreach_copy_(*first)
        if later[0]:
            torch._foreach_add_(*later)
