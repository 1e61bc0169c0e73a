"""Log-probabilities and entropies in torch: the truth in tests, and the CPU path. See the package for the contract."""

import torch
from torch import Tensor


def token_log_probs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> Tensor:
    """See m1.kernels.log_probs.token_log_probs."""
    scaled = logits.float() / temperature if temperature != 1.0 else logits.float()
    log_z = scaled.logsumexp(-1)
    log_probs = scaled - log_z[:, None]
    of_targets = log_probs.gather(1, targets[:, None]).squeeze(1)
    return torch.stack([of_targets, -torch.linalg.vecdot(log_probs.exp(), log_probs), log_z], 1)


def log_prob_gradient_(
    logits: Tensor, targets: Tensor, of_rows: Tensor, slope: Tensor, *, entropy_slope: float = 0.0, temperature: float = 1.0
) -> None:
    """See m1.kernels.log_probs.log_prob_gradient_. Memory of fp32 logits is used again."""
    _, entropy, log_z = of_rows.unbind(1)
    wide = logits.float()  # the logits themselves where they are fp32; the gradient ends up here
    if temperature != 1.0:
        wide = wide.div_(temperature)
    wide = wide.sub_(log_z[:, None])  # log-probabilities
    factors = -slope[:, None]
    if entropy_slope:
        factors = (wide + entropy[:, None]).mul_(-entropy_slope).sub_(slope[:, None])
    gradient = wide.exp_().mul_(factors).scatter_add_(1, targets[:, None], slope[:, None])
    if temperature != 1.0:
        gradient.div_(temperature)
    if gradient is not logits:
        logits.copy_(gradient)
