"""Sampling in torch: the truth for the kernel, and the CPU path.

Filters are thresholds on logits, so ties never depend on an order. Penalties and masks are not here: they change the
logits before they come.

The random number of (seed, position, token), to be reproduced bit for bit in uint32 arithmetic (wrap-around products):

    mix(h):  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16   (MurmurHash3's finaliser)
    key  = mix(mix(mix(lo(seed) ^ 0x9E3779B9) ^ hi(seed)) ^ lo(position)),  lo, hi: the halves of the 64 bits
    key2 = mix(key ^ 0x7F4A7C15)
    bits = mix(mix((token * 0x9E3779B1) ^ key) ^ key2)
    u    = min((float32(bits) + 0.5) * 2^-32, 1 - 2^-24)
    e    = u * (1 + u * (1/2 + u * (1/3 + u/4)))  if u < 2^-6 else -log(1 - u)     (standard exponential, exact near 0)
    noise = -log(e)                                                                 (standard Gumbel)

Small e decide who wins, hence the series: -log(1 - u) alone would leave them 24 bits below 1.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


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
    """See m1.kernels.sampling.sample."""
    is_greedy = temperature == 0
    scaled = logits.float() / torch.where(is_greedy, 1.0, temperature.float())[:, None]  # [n, V]
    best = logits.argmax(-1)
    if scaled.device.type == "cpu" and bool(is_greedy.all()):
        token = best
    else:
        noise = gumbel_noise(seeds, positions, logits.shape[1])
        kept = scaled >= cutoff(scaled, top_k, top_p.float(), min_p.float())[:, None]
        drawn = (scaled + noise).masked_fill(~kept, -torch.inf).argmax(-1)
        token = torch.where(is_greedy, best, drawn)
    logprob = scaled.gather(1, token[:, None])[:, 0] - scaled.logsumexp(-1)
    return token, logprob


def cutoff(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit each row keeps, [n] from scaled logits [n, V]; tokens equal to it are kept."""
    lowest = scaled.amax(-1) + min_p.log()  # p >= min_p · max p, in logits; log 0 = -inf keeps all
    num_tokens = scaled.shape[1]
    rank = torch.where(top_k > 0, top_k.clamp(max=num_tokens), num_tokens).long()  # [n]
    depth = num_tokens
    if scaled.device.type == "cpu":  # sort no deeper than a row needs
        needs_rank = (rank < num_tokens) | (top_p < 1)
        depth = int(torch.where(needs_rank, rank, 0).max())
        if depth == 0:
            return lowest
    ordered = scaled.topk(depth, sorted=True).values  # [n, depth], descending
    kth = ordered.gather(1, rank.clamp(max=depth)[:, None] - 1)[:, 0]
    lowest = torch.where(rank < num_tokens, torch.maximum(lowest, kth), lowest)

    is_left = ordered >= lowest[:, None]
    total = scaled.masked_fill(scaled < lowest[:, None], -torch.inf).logsumexp(-1)
    mass = (ordered - total[:, None]).exp().cumsum(-1)
    # the first place where the cumulative mass reaches top_p; where rounding or ties never reach it, the last left
    place = torch.minimum((mass < top_p[:, None]).sum(-1), is_left.sum(-1) - 1)
    nucleus = ordered.gather(1, place[:, None])[:, 0]
    return torch.where(top_p < 1, torch.maximum(lowest, nucleus), lowest)


def gumbel_noise(seeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """Standard Gumbel noise [n, num_tokens] fp32 of each (seed, position, token id)."""
    key = _mix((seeds & MASK) ^ 0x9E3779B9)
    key = _mix(key ^ ((seeds >> 32) & MASK))
    key = _mix(key ^ (positions & MASK))[:, None]
    tokens = torch.arange(num_tokens, device=seeds.device)[None]
    bits = _mix(_mix(((tokens * 0x9E3779B1) & MASK) ^ key) ^ _mix(key ^ 0x7F4A7C15))
    uniform = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)
    series = uniform * (1 + uniform * (1 / 2 + uniform * (1 / 3 + uniform / 4)))
    exponential = torch.where(uniform < 2.0**-6, series, -torch.log(1 - uniform))
    return -exponential.log()


def _mix(hashed: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64 values below 2^32 (int64 products wrap; the mask keeps 32 bits)."""
    hashed = ((hashed ^ (hashed >> 16)) * 0x85EBCA6B) & MASK
    hashed = ((hashed ^ (hashed >> 13)) * 0xC2B2AE35) & MASK
    return hashed ^ (hashed >> 16)
