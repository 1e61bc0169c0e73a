"""Every tolerance of the test suite, in one place, with its reason.

A tolerance here is the largest error that correct arithmetic in the given precision explains. If a test needs a looser
one, the code is wrong or the reason must be written here.
"""

import torch

# Relative RMS error against a float64 or float32 reference, by the dtype of the inputs.
REL_RMS = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
}

# Triton kernels in fp32 against the fp32 reference: other summation orders, exp2 approximations.
REL_RMS_KERNEL_FP32 = 1e-4

# A number rounded to e4m3: three bits of mantissa, at most 1/16 off, in the mean of many a bit over a third of that.
FP8_QUANTIZED = 0.04

# Packed documents against the same documents alone, fp32, absolute on logits.
PACKED_EQUALS_ALONE = 1e-5

# M1 with no layer converted against the transformers model it came from, fp32, absolute on logits.
DENSE_EQUALS_ORIGINAL = 1e-4

# Cached decoding against the plain forward, fp32, absolute on logits.
CACHED_EQUALS_PLAIN = 1e-4

# Losses computed in chunks of tokens against full logits, fp32, relative: other summation orders alone.
CHUNKED_LOSS = 1e-6

# Weights after a few AdamW steps on two ranks against one, relative RMS: gradients are summed in another order, and AdamW's
# first steps divide them by their own size, so that the least of them may turn a weight's small step around.
RANKS_EQUAL_ONE = {torch.float32: 1e-4, torch.bfloat16: 2e-3}

# Losses of short runs against those recorded, relative: other versions of torch and other processors add in other orders.
GOLDEN_LOSS = 5e-3

# The engine's log-probs against a fresh forward's, absolute: fp32, and the mean over tokens of a bf16 copy of an fp32 model.
ENGINE_LOGPROBS = 1e-3
ENGINE_LOGPROBS_BF16 = 0.02

# The sampled token's log-prob, fp32, absolute: a sum of up to 150,000 exponentials in another order, and its logarithm.
SAMPLE_LOGPROB = 1e-4

# Differences of fp32 numbers that would be 0 in exact arithmetic, absolute: a few units in the last place of log-probs near 4.
ROUNDING = 2e-6


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Root-mean-square error of `actual` over the root-mean-square of `expected`; NaN anywhere gives NaN (never passes `<`)."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt().clamp_min(1e-30)).item()
