"""Sampling on CUDA: temperature by Gumbel noise in one pass over the logits; filters without sorting the vocabulary.

Legend: n rows, V tokens, a group is GROUP adjacent tokens. The filters and the random numbers are the reference's.

1. `_scan_kernel` reads every logit once. Per split of a row it leaves the maximum, the sum of exponentials and, for rows
   without filters, the best of logit + noise. A token can only win if its uniform number is below p(token)/p(best so far),
   so logarithms are taken in the few tiles where that happens. Rows with filters leave the maximum of each group instead.
2. `_finish_kernel` takes one row. Without filters it combines the splits. With filters it takes the CANDIDATES groups of
   highest maximum: they hold every logit above the next group's maximum (the level), so if the cut lies above the level,
   these groups decide it exactly. The cut is found by bisection on the logits' bits, in registers. So top_k up to
   CANDIDATES always ends here, top_p and min_p do unless more than CANDIDATES groups take part.
3. Otherwise, in the same kernel, whole passes over the row: the best of all tokens is drawn and kept if the filters keep
   it (as they do with probability top_p or more); if not, no token as unlikely can be kept, and the best of the more likely
   ones is next. Each pass both tests and draws. Only top_k > CANDIDATES together with top_p < 1 needs a bisection by
   passes (about 30) for the k-th logit first.

Bytes moved: n · V logits once (plus 1/GROUP of it in fp32 for filtered rows, and 16 KiB of candidates a row). Floors on an
H100 at 3.0 TB/s: 1,024 rows of 151,936 fp32 0.62 GB 0.207 ms, bf16 0.104 ms; 128 rows of 128,256 fp32 0.022 ms. A token
costs about 40 instructions, half of them the hash: 0.2 ms for these 1,024 rows at full issue rate, so that flat bf16 logits
are bound by instructions. Tiles whose maximum is 23 below the best so far, most tiles of a trained model, take no hash.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from m1.kernels.launch import chaining, num_multiprocessors, wait_for_previous, with_unit_stride
from m1.kernels.sampling.triton_filters import draw_filtered
from m1.kernels.sampling.triton_noise import best_of, gumbel, row_key, uniform


class SampleConfig(NamedTuple):
    """How the launches divide their work: tokens a tile and splits a row in the scan, tokens a group, groups kept."""

    tile: int = 1024
    num_splits: int = 1
    group: int = 32
    candidates: int = 128
    scan_warps: int = 4
    finish_warps: int = 4


MAX_SPLITS = 64  # one tile of `_finish_kernel` holds a row's splits, always this many: it takes seconds to compile


def choose_config(num_rows: int, num_tokens: int, multiprocessors: int) -> SampleConfig:
    """Enough splits that every multiprocessor holds about eight programs of the scan."""
    wanted = triton.next_power_of_2(triton.cdiv(8 * multiprocessors, max(num_rows, 1)))
    useful = triton.next_power_of_2(triton.cdiv(num_tokens, SampleConfig().tile))
    return SampleConfig(num_splits=min(wanted, useful, MAX_SPLITS))


@triton.jit
def _settings(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, V):
    """1/temperature (1 if greedy), whether greedy, whether filtered, and the three filters with `off` made harmless."""
    temperature = tl.load(temperature_ptr + row).to(tl.float32)
    is_greedy = temperature == 0
    top_k = tl.load(top_k_ptr + row)
    top_k = tl.where(top_k > 0, tl.minimum(top_k, V), V).to(tl.int32)
    top_p = tl.load(top_p_ptr + row).to(tl.float32)
    min_p = tl.load(min_p_ptr + row).to(tl.float32)
    is_filtered = ((top_k < V) | (top_p < 1) | (min_p > 0)) & (is_greedy == 0)
    return 1 / tl.where(is_greedy, 1.0, temperature), is_greedy, is_filtered, top_k, top_p, min_p


@triton.jit(do_not_specialize=["tiles_a_split"])
def _scan_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    moments_ptr, best_ptr, group_ptr, stride, V, tiles_a_split, num_groups,
    TILE: tl.constexpr, GROUP: tl.constexpr, IS_CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_previous(IS_CHAINED)
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    factor, is_greedy, is_filtered, _, _, _ = _settings(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, V)
    key = row_key(seed_ptr, position_ptr, row)
    groups = tl.arange(0, TILE // GROUP)
    inside = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    # Plain numbers that the branches below replace must have their types from the start.
    highest = tl.full([], -float("inf"), tl.float32)
    best = tl.full([], -float("inf"), tl.float32)
    best_token = tl.full([], 0, tl.int32)
    total = tl.zeros([TILE // GROUP, GROUP], tl.float32)
    begin = split * tiles_a_split * TILE
    end = tl.minimum(begin + tiles_a_split * TILE, V)
    logits = logits_ptr + row * stride + inside
    raw = tl.load(logits + begin, mask=begin + inside < end, other=-float("inf"))
    for start in range(begin, end, TILE):
        tokens = start + inside
        x = raw.to(tl.float32) * factor
        # The next tile is on its way while this one is worked on.
        raw = tl.load(logits + start + TILE, mask=tokens + TILE < end, other=-float("inf"))
        group_highest = tl.max(x, 1)
        tile_highest = tl.max(group_highest)
        new_highest = tl.maximum(highest, tile_highest)
        reference = tl.where(new_highest == -float("inf"), 0.0, new_highest)
        p = tl.exp(x - reference)
        total = total * tl.exp(highest - reference) + p
        highest = new_highest
        if is_filtered:
            slots = start // GROUP + groups
            tl.store(group_ptr + row * num_groups + slots, group_highest, mask=slots < num_groups)
        elif is_greedy:
            if tile_highest > best:
                best = tile_highest
                best_token = tl.min(tl.where(x == tile_highest, tokens, V))
        elif tile_highest + 23 > best:  # the noise is never above 22.9
            u = uniform(tokens, key)
            # noise <= -log(u), so that x + noise > best needs u < exp(x - best); 1.001 is for their rounding.
            if tl.max(p * tl.minimum(1.001 * tl.exp(reference - best), 1e30) - u) > 0:
                score, token = best_of(x + gumbel(u), tokens, V)
                if score > best:
                    best = score
                    best_token = token
    slot = row * tl.num_programs(1) + split
    tl.store(moments_ptr + 3 * slot, highest)
    tl.store(moments_ptr + 3 * slot + 1, tl.sum(total))
    tl.store(moments_ptr + 3 * slot + 2, best)
    tl.store(best_ptr + slot, best_token)


@triton.jit(do_not_specialize=["num_splits"])
def _finish_kernel(
    logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr,
    moments_ptr, best_ptr, group_ptr, scratch_ptr, token_ptr, logprob_ptr, stride, V, num_groups, num_splits,
    GROUP: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr, TILE: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):  # fmt: skip
    wait_for_previous(IS_CHAINED)
    row = tl.program_id(0).to(tl.int64)
    factor, _, is_filtered, top_k, top_p, min_p = _settings(temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, row, V)
    splits = tl.arange(0, BLOCK_S)
    is_split = splits < num_splits
    slots = row * num_splits + splits
    peaks = tl.load(moments_ptr + 3 * slots, mask=is_split, other=-float("inf"))
    sums = tl.load(moments_ptr + 3 * slots + 1, mask=is_split, other=0.0)
    highest = tl.max(peaks, 0)
    total = tl.sum(sums * tl.exp(peaks - highest), 0)
    logits = logits_ptr + row * stride
    token = tl.full([], 0, tl.int32)
    if is_filtered:
        token = draw_filtered(
            logits, group_ptr + row * num_groups, scratch_ptr + row * CANDIDATES, factor, top_k, top_p, min_p, highest,
            total, row_key(seed_ptr, position_ptr, row), V, num_groups, GROUP, CANDIDATES, BLOCK_G, TILE,
        )  # fmt: skip
    else:
        scores = tl.load(moments_ptr + 3 * slots + 2, mask=is_split, other=-float("inf"))
        tokens = tl.load(best_ptr + slots, mask=is_split, other=0)
        token = best_of(scores, tokens, V)[1]
    token = tl.minimum(token, V - 1)  # a row of NaN has no best token; what comes out must still index an embedding
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(logprob_ptr + row, tl.load(logits + token).to(tl.float32) * factor - highest - tl.log(total))


def sample(
    logits: Tensor,
    *,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    config: SampleConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of logits [n, V]; the public op's contract. Graph-capturable; `config` may be swept."""
    logits = with_unit_stride(logits)
    num_rows, num_tokens = logits.shape
    device = logits.device
    if config is None:
        config = choose_config(num_rows, num_tokens, num_multiprocessors(device))
    assert config.num_splits <= MAX_SPLITS
    num_groups = triton.cdiv(num_tokens, config.group)
    tiles_a_split = triton.cdiv(triton.cdiv(num_tokens, config.tile), config.num_splits)
    moments = torch.empty(num_rows, config.num_splits, 3, dtype=torch.float32, device=device)
    best = torch.empty(num_rows, config.num_splits, dtype=torch.int32, device=device)
    peaks = torch.empty(num_rows, num_groups, dtype=torch.float32, device=device)
    scratch = torch.empty(num_rows, config.candidates, dtype=torch.int32, device=device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    settings = [t.contiguous() for t in (temperature, top_k, top_p, min_p, seeds, positions)]
    with torch.cuda.device_of(logits):
        _scan_kernel[(num_rows, config.num_splits)](
            logits, *settings, moments, best, peaks, logits.stride(0), num_tokens, tiles_a_split, num_groups,
            TILE=config.tile, GROUP=config.group, num_warps=config.scan_warps, **chaining(device),
        )  # fmt: skip
        _finish_kernel[(num_rows,)](
            logits, *settings, moments, best, peaks, scratch, tokens, logprobs,
            logits.stride(0), num_tokens, num_groups, config.num_splits,
            GROUP=config.group, CANDIDATES=config.candidates, BLOCK_G=triton.next_power_of_2(num_groups),
            BLOCK_S=MAX_SPLITS, TILE=config.tile, num_warps=config.finish_warps, **chaining(device),
        )  # fmt: skip
    return tokens, logprobs
