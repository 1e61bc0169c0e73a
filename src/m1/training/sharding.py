"""FSDP2: the weights, gradients and optimizer states of a model divided among the ranks (arXiv 2304.11277).

Each parameter is a DTensor of which a rank holds some rows; a block's are gathered when it runs. The arithmetic is that of
one process under autocast: matrices are gathered in the compute type, everything else (norms, embeddings, and the dynamics
of the mixers, which bf16 would round) in float32, and gradients are summed in float32.
A model that is not divided is replicated: its gradients are added over the ranks once a step (`add_gradients`). That needs
no gathering, and so few launches that the host never delays the GPU: it is the default for models that leave room (`divides`).
"""

import os
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from m1.config import TrainConfig
from m1.distributed import add_over_ranks, is_any, is_distributed, num_local_ranks, num_ranks, rank
from m1.modeling import M1ForCausalLM

# Linear layers whose weight a mixer takes without calling them: gathered with the block, in float32.
NEVER_CALLED = ("dt_proj",)
PIECE = 2**26  # numbers of gradients that are added over the ranks at once: 256 MiB
STATE_BYTES = 16  # a parameter: fp32 weight, gradient and AdamW's two averages
ROOMY = 0.25  # the share of a rank's memory that these may take for a model to be replicated; activations need the rest


def divides(config: TrainConfig, num_parameters: int, device: torch.device) -> bool:
    """Whether the ranks divide a model of so many parameters among them, rather than each holding it whole.

    As `config.replicate` says; "auto" leaves it whole where it takes at most a quarter of every rank's memory, and without
    other ranks. All ranks must ask together, and get the same answer. Raises ValueError for another word.
    """
    if config.replicate not in ("auto", "always", "never"):
        raise ValueError(f"replicate: expected 'auto', 'always' or 'never', got {config.replicate!r}")
    if not is_distributed() or config.replicate != "auto":
        return is_distributed() and config.replicate == "never"
    return num_ranks() > 1 and is_any(STATE_BYTES * num_parameters > ROOMY * _memory_of_rank(device))


def _memory_of_rank(device: torch.device) -> float:
    """Bytes of the device's memory, free or not; of main memory, the share of one of the host's ranks."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / num_local_ranks()


def shard_model(
    model: M1ForCausalLM, *, precision: str, reshard_after_forward: bool = True, mixers_alone: bool = False
) -> None:
    """Divide `model`, in place, among the ranks; nothing happens without a process group, or if it is divided already.

    precision: "bfloat16" gathers matrices so, "float32" leaves them. reshard_after_forward: free a block's gathered weights
    after its forward and gather them again in the backward pass: less memory, more traffic. mixers_alone: the mixers are called
    by themselves, never as parts of the model (alignment). Every rank must hold the same weights before.
    """
    if not is_distributed() or isinstance(model, FSDPModule):
        return
    mesh = init_device_mesh(model.device.type, (num_ranks(),))  # named, so that a CPU run on a host with GPUs stays there
    in_compute_dtype = MixedPrecisionPolicy()
    if precision == "bfloat16":
        in_compute_dtype = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    in_float32 = MixedPrecisionPolicy(cast_forward_inputs=False)
    if mixers_alone:
        reshard_after_forward = False  # a mixer's backward pass follows its forward at once
    for block in model.model.layers:
        for part in [block.token_mixer, block] if mixers_alone else [block]:
            if matrices := _unsharded_matrices(part):
                fully_shard(matrices, mesh=mesh, mp_policy=in_compute_dtype, reshard_after_forward=reshard_after_forward)
            fully_shard(part, mesh=mesh, mp_policy=in_float32, reshard_after_forward=reshard_after_forward)
    # The root keeps embeddings and head gathered until the backward pass: the loss takes the head's weight after the forward.
    fully_shard(model, mesh=mesh, mp_policy=in_float32, reshard_after_forward=False)
    register_fsdp_forward_method(model, "packed_states")
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)  # losses are divided by the targets of all ranks: their gradients add up
        module.set_force_sum_reduction_for_comms(True)


def is_divided(model: nn.Module) -> bool:
    """Whether `shard_model` has divided it."""
    return isinstance(model, FSDPModule)


@torch.no_grad()
def add_gradients(model: nn.Module) -> None:
    """Sum the gradients of a replicated model over the ranks, a few large pieces after each other.

    Nothing is left to do for a divided one, whose backward passes sum, and without other ranks.
    """
    if num_ranks() == 1 or is_divided(model):
        return
    pieces: list[list[Tensor]] = [[]]
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if sum(gradient.numel() for gradient in pieces[-1]) + parameter.numel() > PIECE and pieces[-1]:
            pieces.append([])
        pieces[-1].append(parameter.grad)
    for piece in pieces:
        flat = add_over_ranks(torch.cat([gradient.flatten() for gradient in piece]))
        parts = flat.split([gradient.numel() for gradient in piece])
        torch._foreach_copy_(piece, [part.view_as(gradient) for part, gradient in zip(parts, piece, strict=True)])


def synchronize_gradients(model: nn.Module, is_on: bool) -> None:
    """Whether the next backward passes add their gradients over the ranks, or keep them for a later one that does."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_on)


def forget_gathered(model: nn.Module) -> None:
    """Free gathered weights, which an update is about to make stale: forward passes without a backward leave the root's."""
    for module in _sharded_modules(model):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds, sharing its memory; all of them where it isn't divided."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """The number of the first row that this rank holds."""
    if not isinstance(tensor, DTensor):
        return 0
    rows = -(-tensor.shape[0] // tensor.device_mesh.size())  # as torch.chunk cuts, which FSDP2 follows
    return min(rows * tensor.device_mesh.get_local_rank(), tensor.shape[0])


def rows_to_write(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of a tensor that this rank puts into a checkpoint, and the number of the first.

    Those that it holds; of what every rank holds whole, its share.
    """
    if isinstance(tensor, DTensor) or not tensor.ndim or num_ranks() == 1:
        return local(tensor), first_row(tensor)
    rows = -(-tensor.shape[0] // num_ranks())
    first = min(rows * rank(), tensor.shape[0])
    return tensor[first : first + rows], first


def full(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all ranks, which must all ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor) of each parameter, one after the other; all ranks must go through it together."""
    for name, parameter in model.named_parameters():
        yield name, full(parameter.detach())


def _unsharded_matrices(module: nn.Module) -> list[nn.Module]:
    """The linear layers in `module`, in the order of their forward, that no unit has yet."""
    return [
        child
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and not name.endswith(NEVER_CALLED) and not isinstance(child.weight, DTensor)
    ]


def _sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [cast(FSDPModule, module) for module in model.modules() if isinstance(module, FSDPModule)]
