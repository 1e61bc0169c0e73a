"""Log-probabilities, entropies and their gradient: the reference against autograd, the kernels against the reference."""

import pytest
import torch
import torch.nn.functional as F

from m1.kernels import log_prob_gradient_, token_log_probs
from m1.kernels.log_probs import reference
from tests.kernels.test_triton_divergence import make
from tests.numerics import REL_RMS, REL_RMS_KERNEL_FP32, rel_rms

CASES = [{"temperature": temperature, "entropy_slope": slope} for temperature in (1.0, 0.7, 2.5) for slope in (0.0, -0.05)]


def make_slopes(rows, device="cpu"):
    return torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(device)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_autograds(case):
    logits, _, targets = make(7, 53)
    slope, leaf = make_slopes(7), logits.clone().requires_grad_()
    log_probs = F.log_softmax(leaf / case["temperature"], -1)
    of_targets, entropy = log_probs.gather(1, targets[:, None]).squeeze(1), -(log_probs.exp() * log_probs).sum(-1)
    (slope * of_targets + case["entropy_slope"] * entropy).sum().backward()
    before = logits.clone()
    of_rows = token_log_probs(logits, targets, temperature=case["temperature"])
    assert torch.equal(logits, before)
    expected = torch.stack([of_targets, entropy, (logits / case["temperature"]).logsumexp(-1)], 1)
    torch.testing.assert_close(of_rows, expected, rtol=1e-5, atol=1e-5)
    assert log_prob_gradient_(logits, targets, of_rows, slope, **case) is logits
    assert rel_rms(logits, leaf.grad) < REL_RMS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_are_the_reference(case, dtype, device, monkeypatch):
    triton_impl = pytest.importorskip("m1.kernels.log_probs.triton_impl")
    if device == "cpu":
        monkeypatch.setattr(triton_impl, "BLOCK", 64)
    sizes = ((1, 1), (3, 64), (4, 331)) if device == "cpu" else ((1, 1), (5, 4096), (67, 49152), (9, 151936))
    for rows, columns in sizes:
        logits, _, targets = make(rows, columns, dtype, device)
        slope, wide = make_slopes(rows, device), logits.float().clone()
        expected = reference.token_log_probs(wide, targets, temperature=case["temperature"])
        actual = triton_impl.token_log_probs(logits, targets, temperature=case["temperature"])
        torch.testing.assert_close(actual, expected, rtol=REL_RMS_KERNEL_FP32, atol=2e-5)
        reference.log_prob_gradient_(wide, targets, expected, slope, **case)
        triton_impl.log_prob_gradient_(logits, targets, expected, slope, **case)
        if columns > 1:
            assert rel_rms(logits, wide) < {torch.float32: REL_RMS_KERNEL_FP32}.get(dtype, REL_RMS[dtype])


def test_rows_of_a_wider_tensor_leave_their_neighbours_alone(device):
    triton_impl = pytest.importorskip("m1.kernels.log_probs.triton_impl")
    logits, _, targets = make(4, 80, device=device)
    targets, slope, part = targets % 50, make_slopes(4, device), logits[:, :50]
    before, wanted = logits.clone(), part.clone()
    of_rows = triton_impl.token_log_probs(part, targets)
    torch.testing.assert_close(of_rows, reference.token_log_probs(wanted, targets), rtol=REL_RMS_KERNEL_FP32, atol=2e-5)
    triton_impl.log_prob_gradient_(part, targets, of_rows, slope)
    reference.log_prob_gradient_(wanted, targets, of_rows, slope)
    assert rel_rms(part, wanted) < REL_RMS_KERNEL_FP32
    assert torch.equal(logits[:, 50:], before[:, 50:])


def test_mistakes_are_named():
    logits, _, targets = make(3, 9)
    of_rows, slope = torch.rand(3, 3), torch.rand(3)
    for message, call in (
        ("`temperature` must be more than 0", lambda: token_log_probs(logits, targets, temperature=0.0)),
        (r"`targets` must be a int64 tensor \[C=3\]", lambda: token_log_probs(logits, targets[:2])),
        ("`logits` must be rows that are contiguous", lambda: token_log_probs(logits.T, targets)),
        (r"`of_rows` must be a float32 tensor \[C=3, 3=3\]", lambda: log_prob_gradient_(logits, targets, of_rows[:2], slope)),
        (r"`slope` must be a float32 tensor \[C=3\]", lambda: log_prob_gradient_(logits, targets, of_rows, slope[:2])),
    ):
        with pytest.raises(ValueError, match=message):
            call()
