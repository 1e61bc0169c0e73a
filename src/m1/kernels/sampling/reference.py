"""Sampling in torch: the truth for the kernel, and the CPU path.

Filters are thresholds on logits, so ties never depend on an order. Penalties and masks are not here: they change the
logits before they come.

The random number of (seed, position, token), to be reproduced bit for bit in uint32 arithmetic (wrap-around products):

    mix(h):  h ^= h >> 16;  h *= 0x85EBCA6B;  h ^= h >> 13;  h *= 0xC2B2AE35;  h ^= h >> 16   (MurmurHash3's finaliser)
    key  = mix(mix(mix(lo(seed) ^ 0x9E3779B9) ^ hi(seed)) ^ lo(position)),  lo, hi: the halves of the 64 bits
    key2 = mix(key ^ 0x7F4A7C15)
    bits = mix(mix((token * 0x9E3779B1) ^ key) ^ key2)
    u    = min((float32(bits) + 0.5) * 2^-32, 1 - 2^-24)
    e    = -log1p(-u)                    (standard exponential)
    noise = -log(e)                      (standard Gumbel)

Small e decide who wins: -log(1 - u) would leave them 24 bits below 1. Where log1p is missing,
u * (1 + u * (1/2 + u * (1/3 + u/4))) is as exact below 2^-6.
"""

import torch
from torch import Tensor

MASK = 0xFFFFFFFF


BLOCK = 2**18  # logits that are worked on at once on a CPU: a few rows, which stay in a core's cache
FIRST_DEPTH = 256  # how deep a row is sorted at first for top_p


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
    parameters = (temperature.float(), top_k, top_p.float(), min_p.float(), seeds, positions)
    num_rows = max(1, BLOCK // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    blocks = zip(logits.split(num_rows), *(values.split(num_rows) for values in parameters), strict=True)
    tokens, logprobs = zip(*(_draw(*block) for block in blocks), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seeds: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """argmax of scaled + Gumbel noise, found as argmax of exp(scaled - max) / e without the noise's second logarithm."""
    is_greedy = temperature == 0
    scaled = logits.float() / torch.where(is_greedy, 1.0, temperature)[:, None]  # [n, V]
    highest, token = scaled.max(-1)
    weight = (scaled - highest[:, None]).exp_()
    logprob = -weight.sum(-1).log()
    if scaled.device.type != "cpu" or not is_greedy.all():
        race = weight.div_(exponential_noise(seeds, positions, logits.shape[1]))
        if scaled.device.type != "cpu" or ((top_k > 0) | (top_p < 1) | (min_p > 0)).any():
            race *= scaled >= cutoff(scaled, top_k, top_p, min_p)[:, None]
        token = torch.where(is_greedy, token, race.max(-1).indices)
    return token, logprob + scaled.gather(1, token[:, None])[:, 0] - highest


def cutoff(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """The smallest logit each row keeps, [n] from scaled logits [n, V]; tokens equal to it are kept."""
    num_tokens = scaled.shape[1]
    lowest = scaled.amax(-1) + min_p.log()  # p >= min_p · max p, in logits; log 0 = -inf keeps all
    rank = torch.where(top_k > 0, top_k.clamp(max=num_tokens), num_tokens).long()  # [n]
    has_rank, has_nucleus = rank < num_tokens, top_p < 1
    if scaled.device.type != "cpu":
        return _cutoff_at(num_tokens, scaled, lowest, rank, top_p)[0]
    if not (has_rank | has_nucleus).any():
        return lowest
    # Sort no deeper than a row needs: as deep as its top_k, or until the nucleus is found.
    depth = max(int(torch.where(has_rank, rank, 1).max()), min(FIRST_DEPTH, num_tokens))
    while True:
        bound, is_found = _cutoff_at(depth, scaled, lowest, rank, top_p)
        if depth == num_tokens or bool(is_found.all()):
            return bound
        depth = min(16 * depth, num_tokens)


def _cutoff_at(depth: int, scaled: Tensor, lowest: Tensor, rank: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """(cutoff [n], whether `depth` sorted logits sufficed to know it [n]), from the min_p bound `lowest`."""
    ordered = scaled.topk(depth, sorted=True).values  # [n, depth], descending
    kth = ordered.gather(1, rank.clamp(max=depth)[:, None] - 1)[:, 0]
    lowest = torch.where(rank < scaled.shape[1], torch.maximum(lowest, kth), lowest)

    is_left = ordered >= lowest[:, None]
    total = scaled.masked_fill(scaled < lowest[:, None], -torch.inf).logsumexp(-1)
    mass = (ordered - total[:, None]).exp().cumsum(-1)
    # the first place where the cumulative mass reaches top_p; where rounding or ties never reach it, the last left
    place = torch.minimum((mass < top_p[:, None]).sum(-1), is_left.sum(-1) - 1)
    nucleus = ordered.gather(1, place[:, None])[:, 0]
    is_found = (top_p >= 1) | (rank <= depth) | (mass[:, -1] >= top_p) | ~is_left[:, -1]
    return torch.where(top_p < 1, torch.maximum(lowest, nucleus), lowest), is_found


def gumbel_noise(seeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """Standard Gumbel noise [n, num_tokens] fp32 of each (seed, position, token id)."""
    return -exponential_noise(seeds, positions, num_tokens).log()


def exponential_noise(seeds: Tensor, positions: Tensor, num_tokens: int) -> Tensor:
    """The e of each (seed, position, token id), [n, num_tokens] fp32."""
    key = _mix((seeds & MASK) ^ 0x9E3779B9)
    key = _mix(key ^ ((seeds >> 32) & MASK))
    key = _mix(key ^ (positions & MASK))[:, None]
    token = torch.arange(num_tokens, device=seeds.device, dtype=torch.int32) * _signed(0x9E3779B1)
    bits = _mix_in_place(token ^ _wrapped(key)).bitwise_xor_(_wrapped(_mix(key ^ 0x7F4A7C15)))
    uniform = _mix_in_place(bits).view(torch.uint32).float()
    uniform.add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_()


def _mix(hashed: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser on int64 values below 2^32 (int64 products wrap; the mask keeps 32 bits)."""
    hashed = ((hashed ^ (hashed >> 16)) * 0x85EBCA6B) & MASK
    hashed = ((hashed ^ (hashed >> 13)) * 0xC2B2AE35) & MASK
    return hashed ^ (hashed >> 16)


def _mix_in_place(hashed: Tensor) -> Tensor:
    """The same on int32 values, which stand for the unsigned ones of the same bits: a quarter of the passes over memory."""
    shifted = torch.empty_like(hashed)

    def fold(bits: int) -> None:  # h ^= h >> bits, where the sign must not be shifted in
        torch.bitwise_right_shift(hashed, bits, out=shifted)
        hashed.bitwise_xor_(shifted.bitwise_and_(MASK >> bits))

    fold(16)
    hashed.mul_(_signed(0x85EBCA6B))
    fold(13)
    hashed.mul_(_signed(0xC2B2AE35))
    fold(16)
    return hashed


def _signed(constant: int) -> int:
    return constant - 2**32 if constant >= 2**31 else constant


def _wrapped(values: Tensor) -> Tensor:
    """int64 values below 2^32 as the int32 of the same bits."""
    return torch.where(values >= 2**31, values - 2**32, values).to(torch.int32)
