"""How much of the memory becomes slots and pages: the engine's sizes, from what the user fixed and what the machine has."""

from dataclasses import dataclass

import torch

from m1.modeling.configuration import M1Config
from m1.modeling.state import ModelState
from m1.storage import GIB, available_memory

DEFAULT_NUM_SEQS = {"cpu": 128, "cuda": 1024}
DEFAULT_NUM_TOKENS = {"cpu": 2048, "cuda": 8192}  # a step's: enough for prefill to be bound by arithmetic
DEFAULT_MEMORY_FRACTION = {"cpu": 0.4, "cuda": 0.9}
MAX_PREFIX_SLOTS = 64


@dataclass(frozen=True)
class Capacity:
    """num_slots: for max_num_seqs running sequences, the rest for cached prefixes. num_pages: 0 without attention layers."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    page_size: int
    num_slots: int
    num_pages: int

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.max_model_len // self.page_size)


def plan_capacity(
    config: M1Config,
    device: torch.device,
    dtype: torch.dtype,
    state_dtype: torch.dtype,
    *,
    max_num_seqs: int | None,
    max_num_batched_tokens: int | None,
    max_model_len: int | None,
    page_size: int,
    num_slots: int | None,
    num_pages: int | None,
    memory_fraction: float | None,
    keeps_prefixes: bool,
    kv_dtype: torch.dtype | None = None,
) -> Capacity:
    """Fill in what the user left open (None).

    Slots come first, but may take half of the memory at most by default; pages take what is left, as far as max_num_seqs
    sequences of max_model_len could use them. Raises ValueError for sizes that contradict each other, MemoryError if not even
    one sequence of max_model_len fits.
    """
    for name, value in (("page_size", page_size), ("max_num_seqs", max_num_seqs), ("max_model_len", max_model_len)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, given {value}")
    budget = _memory_budget(device, memory_fraction)
    has_state, has_pages = bool(config.mixer_layers), bool(config.attention_layers)
    length = max_model_len or config.max_position_embeddings
    slot_bytes = ModelState.bytes_per_slot(config, dtype, state_dtype)
    page_bytes = ModelState.bytes_per_page(config, page_size, kv_dtype or dtype)

    num_seqs = max_num_seqs
    if num_seqs is None:
        num_seqs = DEFAULT_NUM_SEQS[device.type] if num_slots is None else max(1, num_slots - 1)
        if slot_bytes and num_slots is None:
            num_seqs = max(1, min(num_seqs, int(budget / 2 / slot_bytes)))
    num_prefix_slots = min(MAX_PREFIX_SLOTS, max(2, num_seqs // 4)) if keeps_prefixes and has_state else 0
    if num_slots is None:
        num_slots = num_seqs + num_prefix_slots
    if num_slots < num_seqs + bool(num_prefix_slots):
        raise ValueError(
            f"num_slots: expected at least {num_seqs + bool(num_prefix_slots)} (max_num_seqs, and one for cached prefixes), "
            f"given {num_slots}"
        )
    budget -= num_slots * slot_bytes
    if budget < 0:
        raise MemoryError(
            f"{num_slots} slots of fixed-size state need {num_slots * slot_bytes / GIB:.2f} GiB, "
            f"{-budget / GIB:.2f} GiB more than there is; lower max_num_seqs"
        )

    pages_per_sequence = -(-length // page_size)
    if not has_pages:
        num_pages = 0
    elif num_pages is None:
        num_pages = min(max(0, int(budget // page_bytes)), num_seqs * pages_per_sequence)
        if num_pages < pages_per_sequence and max_model_len is None:  # rather a shorter limit than no engine
            length = num_pages * page_size
        if num_pages < pages_per_sequence and (max_model_len is not None or length < 2):
            raise MemoryError(
                f"one sequence of max_model_len {length} needs {pages_per_sequence * page_bytes / GIB:.2f} GiB of keys and "
                f"values, {max(0, budget) / GIB:.2f} GiB are left; lower max_model_len (--max-new-tokens) or max_num_seqs"
            )
    elif num_pages * page_size < length:
        if max_model_len is not None:
            raise ValueError(f"num_pages: {num_pages} pages of {page_size} tokens hold no sequence of max_model_len {length}")
        length = num_pages * page_size
    tokens = max_num_batched_tokens or max(DEFAULT_NUM_TOKENS[device.type], 2 * num_seqs)
    return Capacity(num_seqs, tokens, length, page_size, num_slots, num_pages)


def _memory_budget(device: torch.device, fraction: float | None) -> float:
    """Bytes that slots and pages may take: a share of what is free on the device once the weights are there."""
    fraction = DEFAULT_MEMORY_FRACTION[device.type] if fraction is None else fraction
    if not 0 < fraction <= 1:
        raise ValueError(f"memory_fraction: expected in (0, 1], given {fraction}")
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    return fraction * (4 * GIB if free is None else free)  # 4 GiB: a modest guess where the system does not say
