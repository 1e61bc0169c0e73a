"""The sampler's weights: the trainer's own tensors, or a copy in another dtype that follows them. No loading from disk here."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from m1.modeling.hybrid import M1ForCausalLM

# Few numbers with exponentials behind them: rounding them would change the dynamics, and the kernels take them in fp32.
FLOAT32_PARAMETERS = ("A_log", "dt_bias", "dt_proj.bias", "mixer.D")


def sampling_copy(model: M1ForCausalLM, dtype: torch.dtype) -> M1ForCausalLM:
    """A model in eval mode with its own weights in `dtype` (the mixers' dynamics stay fp32) and the same ties between them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    copies = {
        id(parameter): nn.Parameter(
            parameter.detach().to(_copy_dtype(names[id(parameter)], dtype), copy=True), requires_grad=False
        )
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, copies).eval()


def _copy_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith(FLOAT32_PARAMETERS) else dtype


@torch.no_grad()
def copy_weights(source: Iterable[tuple[str, Tensor]], target: M1ForCausalLM) -> None:
    """Overwrite every parameter of `target` with the one of its name in `source`.

    Raises ValueError for an unknown name, another shape, or a parameter that `source` leaves out; a tied parameter may come
    under either of its names.
    """
    parameters = dict(target.named_parameters(remove_duplicate=False))
    missing = {id(parameter): name for name, parameter in parameters.items()}
    for name, tensor in source:
        if name not in parameters:
            raise ValueError(f"update_weights: the model has no parameter {name!r}; is it another model's?")
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"update_weights: {name!r} expected shape {list(parameters[name].shape)}, given {list(tensor.shape)}"
            )
        parameters[name].copy_(tensor)
        missing.pop(id(parameters[name]), None)
    if missing:
        raise ValueError(f"update_weights: {len(missing)} parameters were not given, such as {min(missing.values())!r}")
