"""Chunked losses against naive versions on full logits: values and gradients."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from m1.training import losses
from m1.training.losses import CrossEntropy, Divergence, TokenLogProbs, head_loss
from m1.training.policy_loss import PolicyLoss, PolicyTokens
from tests.numerics import CHUNKED_LOSS, rel_rms

N, D, V = 37, 24, 53


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Chunks of 16 and blocks of 5 tokens, neither of which divides N."""
    monkeypatch.setattr(losses, "CHUNK_LOGITS", {"cpu": 16 * V + 1, "cuda": 16 * V})
    monkeypatch.setattr(losses, "BLOCK_LOGITS_ON_CPU", 5 * V)


def heads(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, requires_grad=True)
    weight = torch.randn(V, D, generator=generator).mul_(0.5).requires_grad_()
    teacher = (torch.randn(N, D + 8, generator=generator), torch.randn(V, D + 8, generator=generator) * 0.4)
    targets = torch.randint(0, V, (N,), generator=generator)
    return hidden, weight, teacher, targets


def assert_same(sums, expected, hidden, weight):
    """`sums["loss"]` and `expected` have the same value and the same gradients."""
    torch.testing.assert_close(sums["loss"], expected, rtol=CHUNKED_LOSS, atol=CHUNKED_LOSS * N)  # signed terms cancel
    wanted = torch.autograd.grad(expected / 7, (hidden, weight))
    actual = torch.autograd.grad(sums["loss"] / 7, (hidden, weight))
    for mine, theirs in zip(actual, wanted):
        assert rel_rms(mine, theirs) < CHUNKED_LOSS


def test_cross_entropy():
    hidden, weight, _, targets = heads()
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    assert_same(head_loss(CrossEntropy(targets), (hidden, weight)), expected, hidden, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_ce", [True, False])
def test_logits_overwritten_as_they_are_give_the_same(is_ce, dtype, monkeypatch):
    """As on a GPU, where the loss works on the chunk's logits themselves, whatever their type."""
    hidden, weight, teacher, targets = heads()
    loss = CrossEntropy(targets) if is_ce else Divergence(targets, ce_weight=0.3, counts_agreement=True)
    found = []
    for is_in_place in (False, True):
        monkeypatch.setattr(losses, "_has_kernel", lambda logits, answer=is_in_place: answer)
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            sums = head_loss(loss, (hidden, weight), None if is_ce else teacher)
        found.append((sums, torch.autograd.grad(sums["loss"], (hidden, weight))))
    (copied, wanted), (overwritten, actual) = found
    for name, value in copied.items():
        torch.testing.assert_close(overwritten[name], value)
    for mine, theirs in zip(actual, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("is_on", [True, False])
def test_products_with_the_head_run_in_the_autocast_type(is_on):
    """fp32 states and weights: the logits are bf16's under autocast, of student and teacher."""
    hidden, weight, teacher, targets = heads()
    seen = []

    class Looking(Divergence):
        def __call__(self, logits, teacher, rows, wants_gradient):
            seen.extend([logits.clone(), teacher.clone()])
            return super().__call__(logits, teacher, rows, wants_gradient)

    with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
        head_loss(Looking(targets), (hidden, weight), teacher)
    assert len(seen) > 2
    assert all(torch.equal(logits, logits.bfloat16().float()) == is_on for logits in seen)


@pytest.mark.parametrize("ce_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", ["forward", "reverse"])
def test_divergence(kind, temperature, ce_weight):
    hidden, weight, teacher, targets = heads()
    mine, theirs = hidden @ weight.T, teacher[0] @ teacher[1].T
    p, q = F.log_softmax(theirs / temperature, -1), F.log_softmax(mine / temperature, -1)
    kl = (p.exp() * (p - q)).sum() if kind == "forward" else (q.exp() * (q - p)).sum()
    ce = F.cross_entropy(mine, targets, reduction="sum")
    expected = (1 - ce_weight) * kl + ce_weight * ce
    loss = Divergence(targets, kind=kind, temperature=temperature, ce_weight=ce_weight, counts_agreement=True)
    sums = head_loss(loss, (hidden, weight), teacher)
    torch.testing.assert_close(sums["kl"], kl, rtol=CHUNKED_LOSS, atol=0)
    torch.testing.assert_close(sums["ce"], ce, rtol=CHUNKED_LOSS, atol=0)
    assert sums["agreement"] == (mine.argmax(-1) == theirs.argmax(-1)).sum()
    assert_same(sums, expected, hidden, weight)


def test_divergence_of_equals_is_zero():
    hidden, weight, _, _ = heads()
    for kind in ("forward", "reverse"):
        sums = head_loss(Divergence(kind=kind), (hidden, weight), (hidden.detach(), weight.detach()))
        assert abs(sums["loss"]) < CHUNKED_LOSS * N


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_log_probs(temperature):
    hidden, weight, _, targets = heads()
    scores = TokenLogProbs(targets, temperature)
    with torch.no_grad():
        sums = head_loss(scores, (hidden, weight))
    expected = F.log_softmax(hidden @ weight.T / temperature, -1)
    torch.testing.assert_close(scores.log_probs, expected.gather(1, targets[:, None]).squeeze(1).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.entropy, -(expected.exp() * expected).sum(-1).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums["entropy"], scores.entropy.sum())


def naive_policy_loss(logits, tokens, low, high, cap, temperature, entropy_weight, kl_weight):
    log_p = F.log_softmax(logits / temperature, -1)
    new = log_p.gather(1, tokens.targets[:, None]).squeeze(1)
    old = new.detach() if tokens.old_log_probs is None else tokens.old_log_probs
    ratio = (new - old).exp()
    surrogate = torch.minimum(ratio * tokens.advantages, ratio.clamp(1 - low, 1 + high) * tokens.advantages)
    weight = (old - tokens.sampler_log_probs).exp().clamp(max=cap)
    entropy = -(log_p.exp() * log_p).sum(-1)
    reference = tokens.reference_log_probs
    k3 = (reference - new).exp() - (reference - new) - 1
    return (-weight * surrogate - entropy_weight * entropy + kl_weight * k3).sum(), surrogate != ratio * tokens.advantages


@pytest.mark.parametrize("is_first_update", [True, False])
@pytest.mark.parametrize(("entropy_weight", "kl_weight", "temperature"), [(0.0, 0.0, 1.0), (0.05, 0.0, 0.8), (0.01, 0.1, 1.3)])
def test_policy_loss(is_first_update, entropy_weight, kl_weight, temperature):
    hidden, weight, _, targets = heads()
    logits = hidden @ weight.T
    new = F.log_softmax(logits.detach() / temperature, -1).gather(1, targets[:, None]).squeeze(1)
    old = new + 0.3 * torch.randn(N)
    tokens = PolicyTokens(
        targets,
        advantages=torch.randn(N),
        sampler_log_probs=(new if is_first_update else old) + 0.5 * torch.randn(N),
        old_log_probs=None if is_first_update else old,
        reference_log_probs=new + 0.2 * torch.randn(N),
    )
    options = {"temperature": temperature, "entropy_weight": entropy_weight, "kl_weight": kl_weight}
    expected, is_clipped = naive_policy_loss(logits, tokens, 0.2, 0.28, 1.2, **options)
    loss = PolicyLoss(tokens, clip_low=0.2, clip_high=0.28, importance_cap=1.2, **options)
    sums = head_loss(loss, (hidden, weight))
    assert sums["clipped"] == is_clipped.sum()
    assert (sums["clipped"] > 0) == (not is_first_update)
    assert_same(sums, expected, hidden, weight)


@pytest.mark.parametrize(
    ("old", "new", "advantage", "loss", "slope"),
    [
        (0.50, 0.60, 2.0, -2.4, -2.4),  # ratio 1.2, inside: -r A, slope -r A
        (0.50, 0.70, 2.0, -2.56, 0.0),  # ratio 1.4, held at 1.28
        (0.50, 0.70, -2.0, 2.8, 2.8),  # the clip never hides a loss
        (0.50, 0.30, -2.0, 1.6, 0.0),  # ratio 0.6, held at 0.8
        (0.50, 0.30, 2.0, -1.2, -1.2),
    ],
)
@pytest.mark.parametrize(("sampled", "weight"), [(0.5, 1.0), (0.4, 1.25), (0.1, 2.0), (0.8, 0.625)])
def test_clipping_by_hand(old, new, advantage, loss, slope, sampled, weight):
    """Two tokens in the vocabulary, the first was drawn; importance weights p_old / p_sampler are capped at 2."""
    logits = torch.tensor([[new, 1 - new]]).log()
    tokens = PolicyTokens(*map(torch.tensor, ([0], [advantage], [sampled], [old])))
    tokens = replace(tokens, sampler_log_probs=tokens.sampler_log_probs.log(), old_log_probs=tokens.old_log_probs.log())
    sums, gradient = PolicyLoss(tokens, clip_low=0.2, clip_high=0.28, importance_cap=2.0)(logits, None, slice(0, 1), True)
    assert sums[0].item() == pytest.approx(weight * loss, rel=1e-5)
    # d log p / d logits = (1 - p, -(1 - p))
    expected = [weight * slope * (1 - new), -weight * slope * (1 - new)]
    assert gradient[0].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_only_what_needs_a_gradient_gets_one():
    hidden, weight, _, targets = heads()
    head_loss(CrossEntropy(targets), (hidden, weight.detach()))["loss"].backward()
    assert hidden.grad is not None
    head_loss(CrossEntropy(targets), (hidden.detach(), weight))["loss"].backward()
    assert weight.grad is not None
    with torch.no_grad():
        assert not head_loss(CrossEntropy(targets), (hidden, weight))["loss"].requires_grad


def test_bfloat16_products_under_autocast():
    hidden, weight, _, targets = heads()
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    with torch.autocast("cpu", torch.bfloat16):
        sums = head_loss(CrossEntropy(targets), (hidden, weight))
    gradient = torch.autograd.grad(sums["loss"], weight)[0]
    assert sums["loss"].dtype == gradient.dtype == torch.float32
    assert 0 < rel_rms(gradient, torch.autograd.grad(expected, weight)[0]) < 0.02


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ce", "policy"])
def test_the_gradient_of_the_head_on_a_gpu(kind):
    """Summed over chunks in fp32 from bf16 products."""
    hidden, weight, _, targets = heads()
    tokens = PolicyTokens(targets, torch.randn(N), -torch.rand(N) * 5)
    gradients = []
    for device in ("cpu", "cuda"):
        states, matrix = (t.detach().to(device).requires_grad_() for t in (hidden, weight))
        loss = CrossEntropy(targets.to(device))
        if kind == "policy":
            options = {"clip_low": 0.2, "clip_high": 0.28, "importance_cap": 2.0, "entropy_weight": 0.01, "temperature": 0.7}
            loss = PolicyLoss(tokens.to(torch.device(device)), **options)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            sums = head_loss(loss, (states, matrix))
        gradients.append([g.cpu() for g in torch.autograd.grad(sums["loss"], (states, matrix))])
    for mine, theirs in zip(gradients[1], gradients[0], strict=True):
        assert mine.dtype == torch.float32
        assert rel_rms(mine, theirs) < 0.02


def test_mistakes_are_named():
    hidden, weight, teacher, targets = heads()
    with pytest.raises(ValueError, match=r"vocabulary of 53.*got 52"):
        head_loss(Divergence(), (hidden, weight), (teacher[0], teacher[1][1:]))
    for options, name in (({"kind": "jsd"}, "kl"), ({"temperature": 0.0}, "temperature"), ({"ce_weight": 2.0}, "ce_weight")):
        with pytest.raises(ValueError, match=name):
            Divergence(targets, **options)
    tokens = PolicyTokens(targets, torch.ones(N), torch.ones(N))
    with pytest.raises(ValueError, match="reference_log_probs"):
        PolicyLoss(tokens, clip_low=0.2, clip_high=0.2, importance_cap=2.0, kl_weight=0.1)
