"""Who owns which page and which slot: reference counts, forks, prefixes. Only numbers here; tensors are the runner's.

Decisions that move state (a reset, a copied slot or page) are queued in order as `Move`s; the runner carries them out before
it computes anything else, so a slot given away now may still be read by a move queued earlier.
"""

import bisect
from dataclasses import dataclass
from typing import Literal

from m1.engine.prefix_tree import Node, PrefixTree
from m1.engine.sequence import Sequence


@dataclass(frozen=True)
class Move:
    """kind "reset": zero slot `target`. "slot", "page": copy slot or page `source` to `target`."""

    kind: Literal["reset", "slot", "page"]
    source: int
    target: int


class PageAllocator:
    """Pages with reference counts. A page that only the prefix tree refers to is reclaimable."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages, self.num_reclaimable = num_pages, 0
        self._free = list(range(num_pages - 1, -1, -1))
        self.references = [0] * num_pages
        self._is_cached = [False] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        page = self._free.pop()
        self.references[page] = 1
        return page

    def is_reclaimable(self, page: int) -> bool:
        return self._is_cached[page] and self.references[page] == 1

    def share(self, page: int) -> None:
        assert self.references[page] > 0
        self.num_reclaimable -= self.is_reclaimable(page)
        self.references[page] += 1

    def release(self, page: int) -> None:
        assert self.references[page] > 0
        self.references[page] -= 1
        if self.references[page] == 0:
            self._free.append(page)
        self.num_reclaimable += self.is_reclaimable(page)

    def share_with_tree(self, page: int) -> None:
        assert not self._is_cached[page]
        self.share(page)
        self._is_cached[page] = True

    def release_by_tree(self, page: int) -> None:
        self.num_reclaimable -= self.is_reclaimable(page)
        self._is_cached[page] = False
        self.release(page)


class SlotAllocator:
    """Slots of fixed-size state: the lowest free ones for sequences, so that rows lie close; the highest for prefixes."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots))  # ascending

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take_low(self) -> int:
        return self._free.pop(0)

    def take_high(self) -> int:
        return self._free.pop()

    def release(self, slot: int) -> None:
        place = bisect.bisect_left(self._free, slot)
        assert place == len(self._free) or self._free[place] != slot
        self._free.insert(place, slot)


class StateCache:
    """State of all running sequences, and of prefixes for those to come.

    num_slots: at least one for each running sequence; what is over holds prefixes' states.
    needs_state: whether the model has mixers, so that a prefix is of use only where its fixed-size state was kept.
    needs_pages: whether it has attention.
    """

    def __init__(
        self,
        num_slots: int,
        num_pages: int,
        page_size: int,
        *,
        needs_state: bool = True,
        needs_pages: bool = True,
        keeps_prefixes: bool = True,
    ) -> None:
        self.page_size, self.needs_state, self.needs_pages = page_size, needs_state, needs_pages
        self.pages, self.slots = PageAllocator(num_pages if needs_pages else 0), SlotAllocator(num_slots)
        self.tree = PrefixTree(page_size) if keeps_prefixes else None
        self.max_nodes = self.pages.num_pages if needs_pages else 64 * num_slots
        self.num_prefix_tokens = 0  # prompt tokens that were found in the cache
        self._moves: list[Move] = []

    def take_moves(self) -> list[Move]:
        moves, self._moves = self._moves, []
        return moves

    @property
    def num_available_pages(self) -> int:
        return self.pages.num_free + self.pages.num_reclaimable

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size) if self.needs_pages else 0

    def start(self, sequence: Sequence, reserve: int) -> bool:
        """Give a waiting sequence a slot and the pages of its prefill, from a cached prefix on if there is one.

        False, and nothing done, unless `reserve` pages would remain available. The caller sees to it that slots suffice.
        """
        path = self._match(sequence)
        num_usable = self._num_usable(path)
        hit = path[:num_usable]
        shared = [node.page for node in hit if node.page is not None]
        missing = self.pages_for(sequence.num_prefill) - len(shared)
        available = self.num_available_pages - sum(map(self.pages.is_reclaimable, shared))
        if available < missing + reserve:
            return False
        for page in shared:
            self.pages.share(page)
        sequence.pages = shared + [self._take_page() for _ in range(missing)]
        sequence.slot = self._take_slot()
        sequence.num_computed = num_usable * self.page_size
        self.num_prefix_tokens += sequence.num_computed
        if self.needs_state:
            source = hit[-1].slot if hit else None
            self._moves.append(Move("reset", -1, sequence.slot) if source is None else Move("slot", source, sequence.slot))
            # Keep the state where this prompt leaves what others began with, and at its last page for a prompt that goes on.
            cuts = {len(path) * self.page_size, sequence.num_prefill // self.page_size * self.page_size}
            sequence.cuts = sorted(cut for cut in cuts if cut > sequence.num_computed) if self.tree else []
        return True

    def _match(self, sequence: Sequence) -> list[Node]:
        if self.tree is None:
            return []
        return self.tree.match(sequence.tokens, sequence.num_prefill // self.page_size)

    def _num_usable(self, path: list[Node]) -> int:
        if not self.needs_state:
            return len(path)
        return max((depth for depth, node in enumerate(path, 1) if node.slot is not None), default=0)

    def record(self, sequence: Sequence) -> None:
        """Make the whole pages that a sequence has prefilled known to later prompts, with its state if it stands at a cut."""
        num_pages = sequence.num_computed // self.page_size
        if self.tree is None or num_pages == 0:
            return
        pages: list[int | None] = list(sequence.pages[:num_pages]) if self.needs_pages else [None] * num_pages
        path, new = self.tree.insert(sequence.tokens, pages)
        for node in new:
            if node.page is not None:
                self.pages.share_with_tree(node.page)
        if self.needs_state and sequence.num_computed in sequence.cuts and path[-1].slot is None:
            slot = self.slots.take_high() if self.slots.num_free else self.tree.pop_state()
            if slot is not None:
                assert sequence.slot is not None
                self.tree.attach_state(path[-1], slot)
                self._moves.append(Move("slot", sequence.slot, slot))
        while self.tree.num_nodes > self.max_nodes:
            self._evict_leaf()

    def can_fork(self, leader: Sequence, reserve: int) -> bool:
        num_pages = self.pages_for(leader.num_computed) - leader.num_computed // self.page_size if self.needs_pages else 0
        return self.num_available_pages >= num_pages + reserve

    def fork(self, leader: Sequence, other: Sequence) -> None:
        """Give `other` the state that `leader` has: whole pages shared, the last one and the fixed-size state copied."""
        assert leader.slot is not None
        other.slot = self._take_slot()
        if self.needs_state:
            self._moves.append(Move("slot", leader.slot, other.slot))
        num_whole = leader.num_computed // self.page_size
        other.pages = leader.pages[:num_whole]
        for page in other.pages:
            self.pages.share(page)
        if self.pages_for(leader.num_computed) > num_whole:
            other.pages.append(self._take_page())
            self._moves.append(Move("page", leader.pages[num_whole], other.pages[-1]))

    def capacity_of(self, sequence: Sequence) -> int:
        """Tokens that its pages hold; without attention there is no limit."""
        return len(sequence.pages) * self.page_size if self.needs_pages else 2**62

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        """Make room for `num_tokens` tokens, at most one page more than there are; False if no page is left."""
        if self.pages_for(num_tokens) <= len(sequence.pages):
            return True
        if not self.num_available_pages:
            return False
        sequence.pages.append(self._take_page())
        return True

    def release(self, sequence: Sequence) -> None:
        """Give back what a sequence holds; what it recorded stays cached for as long as there is room."""
        assert sequence.slot is not None
        for page in sequence.pages:
            self.pages.release(page)
        self.slots.release(sequence.slot)
        sequence.pages, sequence.slot, sequence.cuts = [], None, []

    def forget_prefixes(self) -> None:
        """Drop all cached prefixes: the weights that made them have changed."""
        while self.tree is not None and self.tree.num_nodes:
            self._evict_leaf()

    def _take_page(self) -> int:
        while not self.pages.num_free:
            self._evict_leaf()
        return self.pages.take()

    def _take_slot(self) -> int:
        if not self.slots.num_free:
            slot = self.tree.pop_state() if self.tree else None
            assert slot is not None, "the scheduler runs no more sequences than there are slots"
            self.slots.release(slot)
        return self.slots.take_low()

    def _evict_leaf(self) -> None:
        node = self.tree.pop_leaf() if self.tree else None
        assert node is not None, "pages were counted before they were taken"
        if node.slot is not None:
            self.slots.release(node.slot)
            node.slot = None
        if node.page is not None:
            self.pages.release_by_tree(node.page)
