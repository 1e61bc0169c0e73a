"""GRPO's loss: what each sampled token contributes, given its advantage. Sampling and advantages live in `grpo.py`.

Legend: N sampled tokens, V vocabulary, R rows of a block.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from m1.kernels import log_prob_gradient_, token_log_probs
from m1.training.packing import move


@dataclass(frozen=True)
class PolicyTokens:
    """What is known of N sampled tokens; every tensor [N].

    targets int64: the tokens. advantages: of their sample. sampler_log_probs: under the sampler's arithmetic, at the sampling
    temperature. old_log_probs: the same recomputed by the trainer before the first update; None: the policy has not been
    updated since sampling, so that its present log-probs are the old ones. reference_log_probs: of the model that the KL
    penalty holds on to.
    """

    targets: Tensor
    advantages: Tensor
    sampler_log_probs: Tensor
    old_log_probs: Tensor | None = None
    reference_log_probs: Tensor | None = None

    def to(self, device: torch.device) -> "PolicyTokens":
        moved = {name: move(tensor, device) for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **moved)


class PolicyLoss:
    """Clipped policy gradient with truncated importance sampling, summed over tokens (arXiv 2402.03300, 2503.14476).

    Per token: -w · min(r·A, clip(r, 1 - clip_low, 1 + clip_high)·A) - entropy_weight · H + kl_weight · k3, where
    r = p / p_old, w = min(p_old / p_sampler, importance_cap) corrects for the sampler's arithmetic without a gradient of its
    own, and k3 = p_ref / p - log(p_ref / p) - 1. Probabilities and entropy H are at the sampling temperature.
    Beside `loss` it sums `entropy`, `kl` (k3), `clipped` (tokens whose gradient the clip removed), `gap` (|log p_old -
    log p_sampler|) and `importance` (w).
    """

    names: tuple[str, ...] = ("loss", "entropy", "kl", "clipped", "gap", "importance")
    takes_any_dtype = True

    def __init__(
        self,
        tokens: PolicyTokens,
        *,
        clip_low: float,
        clip_high: float,
        importance_cap: float,
        temperature: float = 1.0,
        entropy_weight: float = 0.0,
        kl_weight: float = 0.0,
    ) -> None:
        if kl_weight and tokens.reference_log_probs is None:
            raise ValueError("reference_log_probs: needed with a kl_weight above 0")
        self.tokens, self.temperature = tokens, temperature
        self.clip_low, self.clip_high, self.importance_cap = clip_low, clip_high, importance_cap
        self.entropy_weight, self.kl_weight = entropy_weight, kl_weight

    def __call__(
        self, logits: Tensor, teacher: Tensor | None, rows: slice, wants_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """See `losses.TokenLoss`."""
        targets = self.tokens.targets[rows]
        of_rows = token_log_probs(logits, targets, temperature=self.temperature)
        sums, slope = self._of_tokens(of_rows[:, 0], of_rows[:, 1], rows)
        if not wants_gradient:
            return sums, None
        options = {"entropy_slope": -self.entropy_weight, "temperature": self.temperature}
        return sums, log_prob_gradient_(logits, targets, of_rows, slope, **options)

    def _of_tokens(self, log_probs: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """From log-probs and entropies [R]: the sums [6], and d loss / d log-prob [R], the entropy term aside."""
        advantages, sampled = self.tokens.advantages[rows], self.tokens.sampler_log_probs[rows]
        old = self.tokens.old_log_probs[rows] if self.tokens.old_log_probs is not None else log_probs
        weights = (old - sampled).exp().clamp_max(self.importance_cap)
        ratio = (log_probs - old).exp()
        free, clipped = ratio * advantages, ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        is_clipped = clipped < free
        slope = -weights * free.masked_fill(is_clipped, 0.0)
        loss = -weights * torch.minimum(free, clipped) - self.entropy_weight * entropy
        kl = torch.zeros_like(loss)
        if self.tokens.reference_log_probs is not None:
            difference = self.tokens.reference_log_probs[rows] - log_probs
            kl = difference.exp() - difference - 1
            loss = loss + self.kl_weight * kl
            slope = slope + self.kl_weight * (1 - difference.exp())
        quantities = (loss, entropy, kl, is_clipped, (old - sampled).abs(), weights)
        return torch.stack([quantity.sum(dtype=torch.float32) for quantity in quantities]), slope
