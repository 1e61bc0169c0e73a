"""An exponential moving average of the trainable weights: steadier than the last step's, and what is exported if it is kept."""

import torch
from torch import Tensor, nn

from m1.training.sharding import local


class WeightAverage:
    """average <- decay · average + (1 - decay) · weight after every step, in the weights' float32, divided as they are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema_decay: expected a number between 0 and 1, such as 0.999, got {decay}")
        self.model, self.decay = model, decay
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        torch._foreach_lerp_(*self._pairs(), 1 - self.decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with their average; a second call puts them back."""
        for average, weight in zip(*self._pairs(), strict=True):
            held = weight.clone()
            weight.copy_(average)
            average.copy_(held)

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's rows of the averages and of the weights."""
        parameters = dict(self.model.named_parameters())
        return [local(average) for average in self.weights.values()], [
            local(parameters[name].detach()) for name in self.weights
        ]
