"""Sampling: the hash against plain integers, filters against sets, draws against the distribution they should follow."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from m1.kernels import sample
from m1.kernels.sampling.reference import cutoff, gumbel_noise
from tests.kernels.compare import assert_close
from tests.numerics import REL_RMS


def parameters(num_rows: int, **changed: Any) -> dict[str, Tensor]:
    """Every parameter off and temperature 1, with the changed ones as tensors [num_rows]."""
    values: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seeds": 7} | changed
    tensors = {name: torch.as_tensor(value).expand(num_rows).clone() for name, value in values.items()}
    return {"positions": torch.arange(num_rows)} | tensors


def integer_mix(h: int) -> int:
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
    return h ^ (h >> 16)


def integer_noise(seed: int, position: int, token: int) -> float:
    seed %= 2**64
    key = integer_mix((seed % 2**32) ^ 0x9E3779B9)
    key = integer_mix(key ^ (seed >> 32))
    key = integer_mix(key ^ (position % 2**32))
    bits = integer_mix(integer_mix((token * 0x9E3779B1) % 2**32 ^ key) ^ integer_mix(key ^ 0x7F4A7C15))
    return -math.log(-math.log1p(-min((bits + 0.5) * 2.0**-32, 1 - 2.0**-24)))


def test_noise_is_the_documented_hash() -> None:
    seeds = torch.tensor([0, 1, -1, 2**62 + 12345, -(2**63), 99])
    positions = torch.tensor([0, 5, 2**31, 77, 1, 131071])
    actual = gumbel_noise(seeds, positions, 5000)
    tokens = [0, 1, 2, 3, 1000, 4999]
    expected = [[integer_noise(int(s), int(p), t) for t in tokens] for s, p in zip(seeds, positions, strict=True)]
    assert_close({"noise": actual[:, tokens]}, {"noise": torch.tensor(expected)}, REL_RMS[torch.float32])


def test_the_largest_noise_which_decides_draws_is_exact() -> None:
    noise = gumbel_noise(torch.tensor([3]), torch.tensor([4]), 200_000)[0]
    tokens = noise.topk(5).indices.tolist()
    assert noise[tokens].min() > 10
    expected = torch.tensor([integer_noise(3, 4, token) for token in tokens])
    assert_close({"noise": noise[tokens]}, {"noise": expected}, REL_RMS[torch.float32] / 10)


def test_noise_is_gumbel_and_independent() -> None:
    seeds = torch.arange(-2, 2).repeat_interleave(4)
    noise = gumbel_noise(seeds, torch.arange(4).repeat(4), 100_000).double()  # neighbouring seeds and positions
    assert noise.isfinite().all()
    count = noise.shape[1]
    assert (noise.mean(1) - 0.57722).abs().max() < 5 * (math.pi**2 / 6 / count) ** 0.5
    assert (noise.var(1) - math.pi**2 / 6).abs().max() < 0.06
    uniform = torch.exp(-torch.exp(-noise))
    for bounds in ((0.0, 0.001), (0.25, 0.5), (0.999, 1.0), (0.99999, 1.0)):
        expected = (bounds[1] - bounds[0]) * noise.numel()
        seen = ((uniform >= bounds[0]) & (uniform < bounds[1])).sum()
        assert abs(seen - expected) < 5 * expected**0.5, bounds
    correlation = torch.corrcoef(torch.cat([noise, noise[:4].roll(1, 1), noise[:4].flip(1)])) - torch.eye(24)
    assert correlation.abs().max() < 5 * count**-0.5


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    count = 20_000
    token, logprob = sample(logits.expand(count, -1), **parameters(count, temperature=temperature))
    expected = (logits / temperature).softmax(-1) * count
    chi_square = ((token.bincount(minlength=6) - expected).square() / expected).sum()
    assert chi_square < 20.5  # 5 degrees of freedom: exceeded once in a thousand; the draw is deterministic
    assert_close({"logprob": logprob}, {"logprob": (logits / temperature).log_softmax(-1)[token]}, REL_RMS[torch.float32])


def test_filtered_draws_follow_the_renormalised_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    count = 20_000
    token, logprob = sample(logits.expand(count, -1), **parameters(count, top_k=3))
    expected = logits[:3].softmax(-1) * count
    assert ((token.bincount(minlength=3) - expected).square() / expected).sum() < 13.8  # 2 degrees of freedom
    # the logprob is of the distribution before the filters
    assert_close({"logprob": logprob}, {"logprob": logits.log_softmax(-1)[token]}, REL_RMS[torch.float32])


def test_a_draw_depends_on_seed_position_and_token_only() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 1000, generator=generator)
    seeds, positions = torch.randint(2**40, (12,), generator=generator), torch.arange(12) * 3
    options = {"top_k": 50, "top_p": 0.9, "min_p": 0.001, "temperature": 0.8}
    token, logprob = sample(logits, **parameters(12, seeds=seeds, positions=positions, **options))
    order = torch.randperm(12, generator=generator)
    shuffled = sample(logits[order], **parameters(12, seeds=seeds[order], positions=positions[order], **options))
    assert torch.equal(shuffled[0], token[order])
    assert torch.equal(shuffled[1], logprob[order])
    for row in range(12):
        alone = sample(logits[row : row + 1], **parameters(1, seeds=seeds[row], positions=positions[row : row + 1], **options))
        assert alone[0] == token[row]
    mixed = parameters(12, seeds=seeds, positions=positions, **options)
    mixed["temperature"][::2] = 0  # greedy and unfiltered neighbours change nothing
    mixed["top_k"][::2], mixed["top_p"][::2] = 0, 1
    assert torch.equal(sample(logits, **mixed)[0][1::2], token[1::2])
    assert not torch.equal(sample(logits, **parameters(12, seeds=seeds + 1, positions=positions, **options))[0], token)
    assert not torch.equal(sample(logits, **parameters(12, seeds=seeds, positions=positions + 1, **options))[0], token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_temperature_zero_is_greedy_under_the_plain_distribution(dtype: torch.dtype) -> None:
    logits = torch.randn(6, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    for temperature in (0.0, torch.tensor([0.0, 0.7] * 3)):
        token, logprob = sample(logits, **parameters(6, temperature=temperature, top_k=5))
        assert torch.equal(token[::2], logits.argmax(-1)[::2])
        assert logprob.dtype == torch.float32
        expected = logits.float().log_softmax(-1).gather(1, token[:, None])[:, 0]
        assert_close({"logprob": logprob[::2]}, {"logprob": expected[::2]}, REL_RMS[torch.float32])


def kept_tokens(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """What the filters leave, by their definition: min_p, then top_k, then top_p over what is left; ties stay together."""
    largest = max(logits)
    weights = {token: math.exp(logit - largest) for token, logit in enumerate(logits)}
    kept = {token for token, weight in weights.items() if weight >= min_p}
    if 0 < top_k < len(logits):
        kth = sorted(logits, reverse=True)[top_k - 1]
        kept = {token for token in kept if logits[token] >= kth}
    if top_p < 1:
        total, mass, lowest = sum(weights[token] for token in kept), 0.0, largest
        for token in sorted(kept, key=lambda token: -logits[token]):
            if mass >= top_p * total:
                break
            mass, lowest = mass + weights[token], logits[token]
        kept = {token for token in kept if logits[token] >= lowest}
    return kept


@pytest.mark.parametrize("top_k", [0, 1, 3, 20, 100])
def test_filters_keep_what_their_definition_says(top_k: int) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits = torch.randn(40, 20, generator=generator) * 2
    logits[::4] = logits[::4].round()  # ties
    logits[1::4, ::3] = -torch.inf
    top_p = torch.rand(40, generator=generator).clamp(min=0.05)
    top_p[::3] = 1
    min_p = torch.rand(40, generator=generator) ** 4
    min_p[::5] = 0
    ranks = torch.full((40,), top_k)
    ranks[7] = 2
    actual = logits >= cutoff(logits, ranks, top_p, min_p)[:, None]
    for row in range(40):
        expected = kept_tokens(logits[row].tolist(), int(ranks[row]), float(top_p[row]), float(min_p[row]))
        assert set(actual[row].nonzero()[:, 0].tolist()) == {t for t in expected if logits[row, t] > -torch.inf}, row


def test_forbidden_tokens_are_never_drawn() -> None:
    logits = torch.zeros(500, 50)
    logits[:, 3:] = -torch.inf
    token, logprob = sample(logits, **parameters(500))
    assert set(token.tolist()) == {0, 1, 2}
    assert logprob.isfinite().all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logits", torch.ones(4, 9, dtype=torch.int64)),
        ("logits", torch.ones(9)),
        ("logits", torch.ones(4, 0)),
        ("temperature", torch.tensor([1, 1, 1, 1])),
        ("temperature", torch.tensor([1.0, 1.0, -0.1, 1.0])),
        ("temperature", torch.tensor([1.0, torch.nan, 0.1, 1.0])),
        ("top_k", torch.tensor([1.0, 1, 1, 1])),
        ("top_k", torch.tensor([1, 1, 1, -1])),
        ("top_p", torch.tensor([1.0, 0.0, 1, 1])),
        ("top_p", torch.tensor([1.0, 1.1, 1, 1])),
        ("min_p", torch.tensor([0.0, 1.1, 1, 1])),
        ("seeds", torch.tensor([0, 1, 2])),
        ("positions", torch.tensor([0, 1, 2, 3], dtype=torch.int32)),
        ("positions", torch.zeros(4, dtype=torch.int64, device="meta")),
    ],
)
def test_bad_inputs_are_named(name: str, value: Tensor) -> None:
    arguments = {"logits": torch.randn(4, 9)} | parameters(4) | {name: value}
    with pytest.raises(ValueError, match=rf"`{name}` must be .*given: "):
        sample(**arguments)
