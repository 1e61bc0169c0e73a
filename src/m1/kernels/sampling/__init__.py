"""Drawing one token a row from logits: checks and dispatch; the filters and the random draw are in reference.py."""

import torch
from torch import Tensor

from m1.kernels.dispatch import implementation_for, require, require_rank, require_tensor

INTEGERS = (torch.int32, torch.int64)


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """Draw a token from each row, after temperature, min_p, top_k and top_p in this order (as vLLM does).

    The draw is Gumbel-max: argmax over the tokens that the filters left of logits/temperature + noise, where the noise
    is a hash of (seed, position, token id) only. So a request draws the same tokens in any batch and any row.

    Args:
        logits: [n, V], any floating dtype.
        temperature: [n] floating, >= 0; 0 takes the most likely token.
        top_k: [n] int32 or int64, keep the k most likely; 0 is off. Tokens equal to the k-th are all kept.
        top_p: [n] floating in (0, 1], keep the fewest most likely tokens whose probability (among those top_k left)
            reaches top_p; 1 is off. min_p: [n] floating in [0, 1], keep tokens of at least min_p times the highest
            probability; 0 is off.
        seeds, positions: [n] int64, what the random draw depends on.
    Returns:
        (token [n] int64, logprob [n] fp32). The logprob is of the drawn token under log_softmax(logits/temperature)
        before the filters; at temperature 0 under log_softmax(logits).
    Raises:
        ValueError: for a wrong shape, dtype, device or (on the CPU) a parameter out of its range.
    """
    require_rank("logits", logits, "n V")
    rows = logits.shape[:1]
    require(logits.shape[1] > 0, "logits", "of at least one token V", list(logits.shape))
    require_tensor("temperature", temperature, "n", rows, logits)
    require_tensor("top_k", top_k, "n", rows, logits, INTEGERS)
    require_tensor("top_p", top_p, "n", rows, logits)
    require_tensor("min_p", min_p, "n", rows, logits)
    require_tensor("seeds", seeds, "n", rows, logits, (torch.int64,))
    require_tensor("positions", positions, "n", rows, logits, (torch.int64,))
    if logits.device.type == "cpu":
        _check_ranges(temperature, top_k, top_p, min_p)
    implementation = implementation_for(logits, __name__)
    return implementation.sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        positions=positions,
    )


def _check_ranges(temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> None:
    require(bool((temperature >= 0).all()), "temperature", "at least 0", temperature.tolist())
    require(bool((top_k >= 0).all()), "top_k", "at least 0 (0 is off)", top_k.tolist())
    require(bool(((top_p > 0) & (top_p <= 1)).all()), "top_p", "in (0, 1] (1 is off)", top_p.tolist())
    require(bool(((min_p >= 0) & (min_p <= 1)).all()), "min_p", "in [0, 1] (0 is off)", min_p.tolist())
