"""Drawing a token under top_k, top_p and min_p, as Triton functions that one program runs for one row.

The cut of a row is the lowest logit that its filters keep. Cuts are found by bisection on `order`, an int32 that sorts as
the fp32 logit does; a cut may lie between two logits, for only the set above it matters. The plan is in triton_impl.py;
the meaning of the filters is in reference.py. Arguments of all functions: `logits` points to the row; `factor` is
1/temperature; `reference` is the highest scaled logit, the zero of all exponentials; filters that are off hold top_k = V,
top_p = 1, min_p = 0.
"""

import triton
import triton.language as tl

from m1.kernels.sampling.triton_noise import best_of, gumbel, uniform


@triton.jit
def _order(x):
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(ordered):
    """The fp32 number whose order is `ordered`."""
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """Their mean rounded up, without overflow."""
    return ((low.to(tl.int64) + high.to(tl.int64) + 1) >> 1).to(tl.int32)


@triton.jit
def _narrow_to_count(low, high, middle, count, top_k):
    """A step of the bisection for the cut that keeps top_k: where exactly so many are above the middle, it is one."""
    new_low = tl.where(count >= top_k, middle, low)
    return new_low, tl.where(count > top_k, high, tl.where(count == top_k, middle, middle - 1))


@triton.jit
def _load(logits, factor, tokens, mask):
    return tl.load(logits + tokens, mask=mask, other=-float("inf")).to(tl.float32) * factor


@triton.jit
def _pass(logits, factor, pivot, lowest, reference, key, V, TILE: tl.constexpr):
    """One pass over a row: the count and mass of logits above `pivot`, and of those the best of logit + noise.

    The best is sought among logits of at least `lowest`.
    """
    count = tl.full([], 0, tl.int32)
    mass = tl.full([], 0, tl.float32)
    best = tl.full([], -float("inf"), tl.float32)
    best_token = tl.full([], 0, tl.int32)
    for start in range(0, V, TILE):
        tokens = start + tl.arange(0, TILE)
        x = _load(logits, factor, tokens, tokens < V)
        is_above = x > pivot
        count += tl.sum(is_above.to(tl.int32))
        mass += tl.sum(tl.where(is_above, tl.exp(x - reference), 0.0))
        scores = tl.where(is_above & (x >= lowest), x + gumbel(uniform(tokens, key)), -float("inf"))
        score, token = best_of(scores, tokens, V)
        best_token = tl.where(score > best, token, best_token)
        best = tl.maximum(best, score)
    return count, mass, best_token


@triton.jit
def _count_from(logits, factor, cut, V, TILE: tl.constexpr):
    count = tl.full([], 0, tl.int32)
    for start in range(0, V, TILE):
        tokens = start + tl.arange(0, TILE)
        x = _load(logits, factor, tokens, tokens < V)
        count += tl.sum(((_order(x) >= cut) & (tokens < V)).to(tl.int32))
    return count


@triton.jit
def _mass_from(logits, factor, lowest, reference, V, TILE: tl.constexpr):
    mass = tl.full([], 0, tl.float32)
    for start in range(0, V, TILE):
        tokens = start + tl.arange(0, TILE)
        x = _load(logits, factor, tokens, tokens < V)
        mass += tl.sum(tl.where(x >= lowest, tl.exp(x - reference), 0.0))
    return mass


@triton.jit
def _draw_by_passes(
    logits, factor, top_k, top_p, lowest, reference, total, is_cut, level, key, V, TILE: tl.constexpr
):  # fmt: skip
    """Draw where the cut may lie anywhere: propose the best token, keep it if the filters do, else look above it.

    A token that the filters drop rules out all that are no likelier, so every proposal is the best of what is left.
    lowest: the cut of min_p; is_cut: whether min_p is on; level: an order above the cut of top_k.
    """
    if (top_k < V) & (top_p < 1):
        # top_p is a share of what top_k keeps, so that cut must be known first.
        low, high = _order(tl.full([], -float("inf"), tl.float32)), level
        while low < high:
            middle = _middle(low, high)
            low, high = _narrow_to_count(low, high, middle, _count_from(logits, factor, middle, V, TILE), top_k)
        lowest = tl.maximum(lowest, _value(low))
    if is_cut | (top_k < V):
        total = _mass_from(logits, factor, lowest, reference, V, TILE)
    count, mass, token = _pass(logits, factor, -float("inf"), lowest, reference, key, V, TILE)
    is_kept = tl.full([], 0, tl.int32)
    while is_kept == 0:
        token = tl.minimum(token, V - 1)
        pivot = tl.load(logits + token).to(tl.float32) * factor
        count, mass, better = _pass(logits, factor, pivot, lowest, reference, key, V, TILE)
        is_in_nucleus = (mass < top_p * total) | (top_p >= 1)
        # With nothing above it a token is kept whatever the filters say: so a row of NaN ends too.
        is_kept = (((count < top_k) & is_in_nucleus) | (count == 0)).to(tl.int32)
        token = tl.where(is_kept != 0, token, better)
    return token


@triton.jit
def _choose_groups(
    group_row, scratch_row, reference, num_groups, CANDIDATES: tl.constexpr, BLOCK_G: tl.constexpr
):  # fmt: skip
    """The groups whose maxima reach the level, and the level: the lowest order that at most CANDIDATES of them reach.

    Returns ([CANDIDATES] group numbers, how many of them are real, the level).
    """
    groups = tl.arange(0, BLOCK_G)
    in_row = groups < num_groups
    peaks = _order(tl.load(group_row + groups, mask=in_row, other=-float("inf")))
    low, high = _order(tl.full([], -float("inf"), tl.float32)), _order(reference) + 1
    while low < high:
        middle = _middle(low, high - 1)
        if tl.sum((in_row & (peaks >= middle)).to(tl.int32)) <= CANDIDATES:
            high = middle
        else:
            low = middle + 1
    is_chosen = in_row & (peaks >= low)
    places = tl.cumsum(is_chosen.to(tl.int32), 0) - 1
    tl.store(scratch_row + places, groups, mask=is_chosen & (places < CANDIDATES))  # more only among NaN
    tl.debug_barrier()  # other threads of this program read what was just stored
    candidates = tl.arange(0, CANDIDATES)
    num_chosen = tl.minimum(tl.sum(is_chosen.to(tl.int32)), CANDIDATES)
    return tl.load(scratch_row + candidates, mask=candidates < num_chosen, other=0), num_chosen, low


@triton.jit
def draw_filtered(
    logits, group_row, scratch_row, factor, top_k, top_p, min_p, reference, total, key, V, num_groups,
    GROUP: tl.constexpr, CANDIDATES: tl.constexpr, BLOCK_G: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token of a filtered row. group_row: the maxima of its groups; scratch_row: CANDIDATES int32; total: its mass."""
    chosen, num_chosen, level = _choose_groups(group_row, scratch_row, reference, num_groups, CANDIDATES, BLOCK_G)
    tokens = chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    is_known = (tl.arange(0, CANDIDATES) < num_chosen)[:, None] & (tokens < V)
    x = _load(logits, factor, tokens, is_known)
    ordered = _order(x)
    is_known = is_known & (ordered >= level)  # below the level there are logits of other groups too
    mass = tl.where(is_known, tl.exp(x - reference), 0.0)

    # Decided: the cut is at the level or above, so that all it keeps is known. An order of -inf leaves nothing out.
    lowest = reference + tl.log(min_p)  # log 0 = -inf
    is_decided = _order(lowest) >= level
    cut = tl.maximum(level, _order(lowest))
    num_known = tl.sum(is_known.to(tl.int32))
    if (top_k < V) & (num_known >= top_k):
        low, high = level, _order(reference)
        while low < high:
            middle = _middle(low, high)
            count = tl.sum((is_known & (ordered >= middle)).to(tl.int32))
            low, high = _narrow_to_count(low, high, middle, count, top_k)
        cut = tl.maximum(cut, low)
    is_decided = is_decided | ((top_k < V) & (num_known >= top_k))
    if top_p < 1:
        # top_p is a share of what the other filters keep: of the whole row if they are off.
        is_whole = (top_k >= V) & (min_p == 0)
        kept = tl.sum(tl.where(ordered >= cut, mass, 0.0))
        wanted = top_p * tl.where(is_whole, total, kept)
        is_decided = (is_decided | is_whole) & (kept >= wanted)
        if is_decided:
            low, high = cut, _order(reference)
            while low < high:
                middle = _middle(low, high)
                if tl.sum(tl.where(ordered >= middle, mass, 0.0)) >= wanted:
                    low = middle
                else:
                    high = middle - 1
            cut = low
    token = tl.full([], 0, tl.int32)
    if is_decided:
        scores = tl.where(is_known & (ordered >= cut), x + gumbel(uniform(tokens, key)), -float("inf"))
        token = best_of(scores, tokens, V)[1]
    else:
        token = _draw_by_passes(
            logits, factor, top_k, top_p, lowest, reference, total, min_p > 0, level, key, V, TILE
        )  # fmt: skip
    return token
