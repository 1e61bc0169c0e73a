"""Packing: nothing is lost, nothing leaks, and a position resumes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m1.training.losses import target_states
from m1.training.packing import BatchStream, Document, best_fit, pack
from tests.numerics import PACKED_EQUALS_ALONE
from tests.training import tiny


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60), st.integers(20, 40))
def test_best_fit_keeps_every_document_once_and_the_capacity(lengths, capacity):
    bins = best_fit(lengths, capacity)
    assert sorted(index for bin_ in bins for index in bin_) == list(range(len(lengths)))
    sums = [sum(lengths[index] for index in bin_) for bin_ in bins]
    assert max(sums) <= capacity
    # Best fit never leaves two bins that would fit into one.
    assert len(sums) < 2 or sum(sorted(sums)[:2]) > capacity


def test_best_fit_chooses_the_fullest_bin_that_has_room():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([3, 7, 2], 10) == [[1, 0], [2]]
    with pytest.raises(ValueError, match="11 tokens does not fit into batches of 10"):
        best_fit([3, 11], 10)


def test_pack_keeps_order_and_targets():
    batch = pack(
        [
            Document(np.array([5, 6, 7], np.int32), np.array([True, False, True])),
            Document(np.array([8], np.int32), np.array([True])),
            Document(np.array([9, 10], np.int32), np.array([True, True])),
        ]
    )
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.layout.cu_seqlens.tolist() == [0, 3, 4, 6]
    assert batch.layout.positions.tolist() == [0, 1, 2, 0, 0, 1]
    # First tokens are no targets, though the masks say so.
    assert batch.targets.tolist() == [7, 10]
    assert batch.target_positions.tolist() == [1, 4]
    assert (batch.num_tokens, batch.num_targets) == (6, 2)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_documents_do_not_leak_through_the_model(mixer):
    model = tiny.model(mixer)
    documents = tiny.documents(6)
    batch = pack(documents)
    with torch.no_grad():
        hidden, weight = target_states(model, batch)
        logits = hidden @ weight.T
        alone = []
        for document in documents:
            states, _ = target_states(model, pack([document]))
            alone.append(states @ weight.T)
        assert (logits - torch.cat(alone)).abs().max() < PACKED_EQUALS_ALONE
        # Another first document changes its own logits and no others.
        other = Document((documents[0].token_ids + 1) % 67, documents[0].is_target)
        changed, _ = target_states(model, pack([other, *documents[1:]]))
    first = documents[0].num_targets
    difference = (changed @ weight.T - logits).abs()
    assert difference[:first].max() > 0.1
    assert difference[first:].max() == 0


def ids(batches):
    return [batch.input_ids.tolist() for batch in batches]


def test_every_epoch_has_every_document_once_in_another_order():
    documents = tiny.documents(30)
    stream = BatchStream(documents, 40, seed=3)
    epochs = []
    for epoch in range(2):
        batches = []
        while stream.epoch == epoch and (not batches or stream.index < len(stream._bins)):
            batches.append(stream.next_batches(1)[0])
        found = sorted(
            batch.input_ids[start:end].tolist()
            for batch in batches
            for start, end in zip(batch.layout.cu_seqlens[:-1], batch.layout.cu_seqlens[1:])
        )
        assert found == sorted(document.token_ids.tolist() for document in documents)
        assert all(batch.num_tokens <= 40 for batch in batches)
        epochs.append(ids(batches))
        stream.next_batches(1)[0]
        stream.index -= 1
    assert epochs[0] != epochs[1]


def test_the_seed_fixes_the_order():
    documents = tiny.documents(30)
    streams = [BatchStream(documents, 40, seed) for seed in (3, 3, 4)]
    drawn = [ids(stream.next_batches(1)[0] for _ in range(25)) for stream in streams]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


@pytest.mark.parametrize("before", [0, 1, 7, 19])
def test_a_stream_resumes_by_position(before):
    documents = tiny.documents(20)
    stream = BatchStream(documents, 40, seed=0)
    for _ in range(before):
        stream.next_batches(1)[0]
    other = BatchStream(documents, 40, seed=0)
    other.load_state_dict(stream.state_dict())
    assert ids(other.next_batches(1)[0] for _ in range(10)) == ids(stream.next_batches(1)[0] for _ in range(10))


def test_a_position_in_other_documents_is_refused():
    state = BatchStream(tiny.documents(20), 40, seed=0).state_dict()
    with pytest.raises(ValueError, match="not the documents that this run began with"):
        BatchStream(tiny.documents(20, seed=1), 40, seed=0).load_state_dict(state)


def test_a_stream_without_targets_is_refused():
    with pytest.raises(ValueError, match="empty, or none"):
        BatchStream([], 40, seed=0)
    with pytest.raises(ValueError, match="empty, or none"):
        BatchStream([Document(np.array([1, 2], np.int32), np.array([True, False]))], 40, seed=0)


def test_a_step_is_as_many_batches_as_its_tokens_need():
    stream = BatchStream(tiny.documents(20), 40, seed=0)
    assert [len(stream.next_batches(tokens)) for tokens in (1, 40, 41, 100)] == [1, 1, 2, 3]
