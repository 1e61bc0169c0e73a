"""Rows of a decoding step: the Triton kernels against the torch reference."""

import pytest
import torch

from m1.kernels.decode_rows import advance_rows, gather_rows, reference

pytest.importorskip("triton")
from m1.kernels.decode_rows import triton_impl as kernel

NUM_SLOTS, NUM_PAGES, PAGE_SIZE = 23, 300, 16


def make_inputs(device: str, has_pages: bool = True) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    integers = torch.randint(-(2**62), 2**62, (4, NUM_SLOTS), generator=generator)
    integers[1] = torch.randint(0, NUM_PAGES * PAGE_SIZE, (NUM_SLOTS,), generator=generator)
    floats = torch.rand(3, NUM_SLOTS, generator=generator)
    tables = torch.randint(0, 10**6, (NUM_SLOTS, NUM_PAGES), generator=generator, dtype=torch.int32)
    slots = torch.randperm(NUM_SLOTS, generator=generator)[:11]
    inv_freq = 1 / 500000 ** (torch.arange(0, 24, 2) / 24)
    found = (integers, floats, tables if has_pages else None, slots, inv_freq)
    return tuple(None if t is None else t.to(device) for t in found)


@pytest.mark.parametrize(("has_pages", "width"), [(True, NUM_PAGES), (True, 280), (False, 1)])
def test_gathered_rows(has_pages, width, device):
    inputs = make_inputs(device, has_pages)
    inputs[0][1] %= width * PAGE_SIZE if has_pages else 5000
    options = {"scaling": 1.25, "width": width, "page_size": PAGE_SIZE}
    for name, mine, expected in zip(
        kernel.DecodeRows._fields,
        kernel.gather_rows(*inputs, **options),
        reference.gather_rows(*inputs, **options),
        strict=True,
    ):
        if name in ("cos", "sin"):
            torch.testing.assert_close(mine, expected, atol=1e-5, rtol=0)
        elif expected is None:
            assert mine is None
        else:
            assert mine.dtype == expected.dtype
            assert torch.equal(mine, expected), name


def test_rows_move_on_and_scratch_stays(device):
    integers, _, _, slots, _ = make_inputs(device)
    scratch = NUM_SLOTS - 1
    slots = torch.cat([slots[slots != scratch], slots.new_full((5,), scratch)])
    tokens = torch.arange(100, 100 + len(slots), device=device)
    before, mine, expected = integers.clone(), integers.clone(), integers
    kernel.advance_rows(mine, slots, tokens, scratch)
    reference.advance_rows(expected, slots, tokens, scratch)
    assert torch.equal(mine[1:], expected[1:])
    assert torch.equal(mine[0, :-1], expected[0, :-1])
    assert mine[1, scratch] == 0
    real = slots[:-5]
    assert torch.equal(mine[1, real], before[1, real] + 1)
    assert torch.equal(mine[0, real], tokens[:-5])


@pytest.mark.gpu
def test_on_a_gpu():
    for has_pages, width in ((True, NUM_PAGES), (True, 280), (False, 1)):
        test_gathered_rows(has_pages, width, "cuda")
    test_rows_move_on_and_scratch_stays("cuda")


def test_bad_arguments_are_named():
    integers, floats, tables, slots, inv_freq = make_inputs("cpu")
    options = {"scaling": 1.0, "width": 300, "page_size": PAGE_SIZE}
    with pytest.raises(ValueError, match="`integers`"):
        gather_rows(integers[:3], floats, tables, slots, inv_freq, **options)
    with pytest.raises(ValueError, match="`slots`"):
        gather_rows(integers, floats, tables, slots + NUM_SLOTS, inv_freq, **options)
    with pytest.raises(ValueError, match="`width`"):
        gather_rows(integers, floats, tables, slots, inv_freq, **{**options, "width": 301})
    with pytest.raises(ValueError, match="`tokens`"):
        advance_rows(integers, slots, slots[:3], 0)
