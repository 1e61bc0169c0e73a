"""What the torch references do in blocks, in place, or only as deep as needed must not change what they compute."""

import pytest
import torch

from m1.kernels import causal_conv1d_update, paged_attention, sample, selective_state_update, ssd_state_update
from m1.kernels import state_rows as rows_module
from m1.kernels.attention import reference as attention_reference
from m1.kernels.sampling import reference as sampling_reference
from m1.kernels.state_rows import rows_of
from tests.kernels.compare import assert_close
from tests.numerics import REL_RMS

SLOTS = {"run": [2, 3, 4, 5, 6], "scattered": [6, 0, 3, 1, 5], "backwards": [4, 3, 2, 1, 0], "hole": [0, 1, 2, 4, 5]}


def test_only_a_run_of_slots_is_a_slice():
    assert rows_of(torch.tensor(SLOTS["run"]), 5) == slice(2, 7)
    assert rows_of(None, 5) == slice(0, 5)
    for name in ("scattered", "backwards", "hole"):
        assert torch.is_tensor(rows_of(torch.tensor(SLOTS[name]), 5))
    assert torch.is_tensor(rows_of(torch.tensor([0, 2, 2, 3]), 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", SLOTS.values(), ids=SLOTS)
@pytest.mark.parametrize("op", ["mamba1", "mamba2", "conv", "conv-transposed"])
def test_a_batch_of_steps_is_its_sequences_one_by_one(op, slots, dtype, monkeypatch):
    """Rows in a run, scattered, or with holes; two sequences a block; other slots untouched."""
    torch.manual_seed(0)
    n, H, G, P, N = 5, 6, 2, 4, 8
    states = torch.randn(8, H, P, N).to(dtype)
    shared = {"x": torch.randn(n, G, P), "B": torch.randn(n, G, N), "C": torch.randn(n, H, N)}
    if op == "mamba1":
        update, inputs = selective_state_update, shared | {"dt": torch.randn(n, H, P), "z": torch.randn(n, H, P)}
        constants = {"A": -torch.rand(H, P, N), "D": torch.randn(H, P)}
    elif op == "mamba2":
        update, inputs = ssd_state_update, shared | {"dt": torch.randn(n, H)}
        constants = {"A": -torch.rand(H), "D": torch.randn(H)}
    else:
        update, inputs = causal_conv1d_update, {"x": torch.randn(n, 10)}
        constants = {"weight": torch.randn(10, 4), "bias": torch.randn(10), "activation": "silu"}
        states = torch.randn(8, 10, 3).to(dtype)
        if op == "conv-transposed":
            states = states.transpose(1, 2).contiguous().transpose(1, 2)
    expected_states, expected = states.clone(), []
    for row, slot in enumerate(slots):
        one = {name: values[row : row + 1] for name, values in inputs.items()}
        state = expected_states[slot : slot + 1].clone()
        expected.append(update(**one, **constants, **{"conv_state" if "conv" in op else "ssm_state": state}))
        expected_states[slot] = state[0]
    monkeypatch.setattr(rows_module, "BLOCK_BYTES", 2 * 4 * H * P * N)
    name = "conv_state" if "conv" in op else "ssm_state"
    y = update(**inputs, **constants, **{name: states}, slots=torch.tensor(slots))
    assert_close({"y": y, "states": states}, {"y": torch.cat(expected), "states": expected_states}, REL_RMS[torch.float32])


@pytest.mark.parametrize("window", [None, 3])
def test_decoding_in_small_blocks_is_decoding_at_once(window, monkeypatch):
    torch.manual_seed(0)
    lengths = torch.tensor([9, 1, 4, 16, 5, 12], dtype=torch.int32)
    keys, values = torch.randn(2, 30, 4, 2, 8)
    tables = torch.randperm(30)[:24].view(6, 4).int()
    q = torch.randn(6, 6, 8)
    arguments = {"block_tables": tables, "context_lens": lengths, "cu_seqlens": torch.arange(7).int(), "max_seqlen": 1}
    together = paged_attention(q, keys, values, **arguments, window=window)
    expected = []
    for row in range(6):
        length, first = int(lengths[row]), 0 if window is None else max(0, int(lengths[row]) - window)
        own_keys, own_values = (
            t[tables[row].long()].flatten(0, 1)[first:length].repeat_interleave(3, 1) for t in (keys, values)
        )
        weights = (torch.einsum("hk,lhk->hl", q[row], own_keys) * 8**-0.5).softmax(-1)
        expected.append(torch.einsum("hl,lhk->hk", weights, own_values))
    assert_close({"together": together}, {"together": torch.stack(expected)}, REL_RMS[torch.float32])
    monkeypatch.setattr(attention_reference, "DECODE_BYTES", 2 * 16 * 2 * 2 * 8 * 4)
    blocks = paged_attention(q, keys, values, **arguments, window=window)
    assert_close({"blocks": blocks}, {"blocks": together}, REL_RMS[torch.float32])


def test_rows_drawn_in_blocks_are_the_rows_drawn_at_once(monkeypatch):
    """Each row with filters of its own; greedy ones take the first of equal logits."""
    torch.manual_seed(0)
    logits = (torch.randn(12, 3000) * 2).bfloat16()
    rows = {
        "temperature": torch.tensor([0.0, 0.7, 1.3]).repeat(4),
        "top_k": torch.tensor([0, 0, 5, 400]).repeat(3),
        "top_p": torch.tensor([1.0, 0.9, 0.99, 1.0, 0.5, 1.0]).repeat(2),
        "min_p": torch.tensor([0.0, 0.05, 0.0]).repeat(4),
        "seeds": torch.arange(12),
        "positions": torch.arange(12) * 7,
    }
    blocks = sample(logits, **rows)
    monkeypatch.setattr(sampling_reference, "BLOCK", 12 * 3000)
    together = sample(logits, **rows)
    assert torch.equal(blocks[0], together[0])
    assert_close({"logprob": blocks[1]}, {"logprob": together[1]}, REL_RMS[torch.float32])
    assert torch.equal(together[0][::3], logits[::3].argmax(-1))


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.5, 4.0])
def test_a_nucleus_deeper_than_the_first_sort_is_found(spread, top_p):
    """Among 5,000 tokens: the smallest set of most likely ones that reaches top_p, by a full sort in float64."""
    torch.manual_seed(0)
    scaled = torch.randn(3, 5000) * spread + torch.linspace(0, 1e-3, 5000)  # never equal
    bound = sampling_reference.cutoff(scaled, torch.zeros(3, dtype=torch.long), torch.full((3,), top_p), torch.zeros(3))
    mass = scaled.double().sort(descending=True).values.softmax(-1).cumsum(-1)
    kept = (scaled >= bound[:, None]).sum(-1, keepdim=True)
    assert (mass.gather(1, kept - 1) > top_p - 1e-5).all()
    assert (torch.where(kept > 1, mass.gather(1, (kept - 2).clamp_min(0)), 0) < top_p + 1e-5).all()
