"""The divergence kernel against its torch reference, and the reference against autograd."""

import pytest
import torch
import torch.nn.functional as F

from m1.kernels import divergence_
from m1.kernels.divergence import reference
from tests.numerics import REL_RMS, REL_RMS_KERNEL_FP32, rel_rms

CASES = [
    {"kind": kind, "temperature": temperature, "ce_weight": ce_weight}
    for kind in ("forward", "reverse")
    for temperature in (1.0, 2.5)
    for ce_weight in (0.0, 0.3, 1.0)
]


def make(rows, columns, dtype=torch.float32, device="cpu", seed=0):
    """Logits as a model's: the teacher near the student, one token standing out; one row far from the teacher's."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=generator) * 3
    logits[torch.arange(rows), torch.randint(0, columns, (rows,), generator=generator)] += 9
    teacher = logits + torch.randn(rows, columns, generator=generator) * 0.5
    teacher[0] = torch.randn(columns, generator=generator) * 30
    targets = torch.randint(0, columns, (rows,), generator=generator)
    return logits.to(device, dtype), teacher.to(device, dtype), targets.to(device)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_is_autograds(case):
    logits, teacher, targets = make(7, 53)
    leaf = logits.clone().requires_grad_()
    p, q = F.log_softmax(teacher / case["temperature"], -1), F.log_softmax(leaf / case["temperature"], -1)
    kl = (p.exp() * (p - q)).sum(-1) if case["kind"] == "forward" else (q.exp() * (q - p)).sum(-1)
    ce = F.cross_entropy(leaf, targets, reduction="none")
    ((1 - case["ce_weight"]) * kl + case["ce_weight"] * ce).sum().backward()
    agrees = logits.argmax(-1) == teacher.argmax(-1)
    sums = divergence_(logits, teacher, targets, **case, counts_agreement=True)
    torch.testing.assert_close(sums, torch.stack([kl, ce, agrees.float()], 1), rtol=1e-5, atol=1e-5)
    assert rel_rms(logits, leaf.grad) < REL_RMS[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_is_the_reference(case, dtype, device, monkeypatch):
    triton_impl = pytest.importorskip("m1.kernels.divergence.triton_impl")
    monkeypatch.setattr(triton_impl, "BLOCK", 64)
    for rows, columns in ((1, 1), (3, 64), (4, 331)):
        logits, teacher, targets = make(rows, columns, dtype, device)
        wide, wide_teacher = logits.float().clone(), teacher.float().clone()
        options = {**case, "wants_gradient": True, "counts_agreement": True}
        expected = reference.divergence_(wide, wide_teacher, targets, **options)
        actual = triton_impl.divergence_(logits, teacher, targets, **options)
        torch.testing.assert_close(actual, expected, rtol=REL_RMS_KERNEL_FP32, atol=2e-5)
        if columns > 1:
            assert rel_rms(logits, wide) < {torch.float32: REL_RMS_KERNEL_FP32}.get(dtype, REL_RMS[dtype])


@pytest.mark.parametrize("has_teacher", [True, False])
def test_the_kernel_without_gradient_teacher_or_targets(has_teacher, device):
    triton_impl = pytest.importorskip("m1.kernels.divergence.triton_impl")
    logits, teacher, targets = make(3, 90, device=device)
    before = logits.clone()
    options = {"kind": "forward", "temperature": 1.0, "wants_gradient": False, "counts_agreement": has_teacher}
    given = (teacher, None, 0.0) if has_teacher else (None, targets, 1.0)
    actual = triton_impl.divergence_(logits, *given[:2], ce_weight=given[2], **options)
    assert torch.equal(logits, before)
    expected = reference.divergence_(logits.clone(), given[0], given[1], ce_weight=given[2], **options)
    torch.testing.assert_close(actual, expected, rtol=REL_RMS_KERNEL_FP32, atol=2e-5)
    triton_impl.divergence_(logits, *given[:2], ce_weight=given[2], **options | {"wants_gradient": True})
    wanted = before.clone()
    reference.divergence_(wanted, given[0], given[1], ce_weight=given[2], **options | {"wants_gradient": True})
    assert rel_rms(logits, wanted) < REL_RMS_KERNEL_FP32


def test_mistakes_are_named():
    logits, teacher, targets = make(3, 9)
    for message, arguments, options in (
        ("`kind` must be 'forward' or 'reverse'", (teacher,), {"kind": "sideways"}),
        ("`temperature` must be more than 0", (teacher,), {"temperature": 0.0}),
        ("`ce_weight` must be 0 to 1", (teacher, targets), {"ce_weight": 2.0}),
        ("`targets` must be given with a ce_weight above 0", (teacher,), {"ce_weight": 0.5}),
        ("`ce_weight` must be 1 without a teacher", (None, targets), {"ce_weight": 0.5}),
        (r"`teacher` must be a floating tensor \[C=3, V=9\]", (teacher[:2],), {}),
        (r"`targets` must be a int64 tensor \[C=3\]", (teacher, targets[:2]), {}),
    ):
        with pytest.raises(ValueError, match=message):
            divergence_(logits, *arguments, **options)
