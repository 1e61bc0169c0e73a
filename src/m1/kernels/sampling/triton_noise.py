"""The reference's random numbers as Triton functions: a hash of (seed, position, token) and the Gumbel noise made of it.

The formulas are in reference.py's docstring. Nothing here is a kernel.
"""

import triton
import triton.language as tl


@triton.jit
def _mix(hashed):
    hashed = (hashed ^ (hashed >> 16)) * 0x85EBCA6B
    hashed = (hashed ^ (hashed >> 13)) * 0xC2B2AE35
    return hashed ^ (hashed >> 16)


@triton.jit
def row_key(seed_ptr, position_ptr, row):
    """What a row's hashes share (uint32), from its int64 seed and position."""
    seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + row)
    key = _mix(seed.to(tl.uint32) ^ 0x9E3779B9)
    key = _mix(key ^ (seed >> 32).to(tl.uint32))
    return _mix(key ^ position.to(tl.uint32))


@triton.jit
def uniform(tokens, key):
    """A number in (0, 1) for each int32 token id."""
    bits = _mix(_mix((tokens.to(tl.uint32) * 0x9E3779B1) ^ key) ^ _mix(key ^ 0x7F4A7C15))
    return tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)


@triton.jit
def gumbel(u):
    """Standard Gumbel noise from uniform numbers; at most 33 ln 2 = 22.9, at least -2.9."""
    series = u * (1 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    return -tl.log(tl.where(u < 0.015625, series, -tl.log(1 - u)))


@triton.jit
def best_of(scores, tokens, V):
    """Highest score of a tile and the lowest token that has it."""
    highest = tl.max(scores)
    return highest, tl.min(tl.where(scores == highest, tokens, V))
