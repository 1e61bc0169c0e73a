"""`PrefixTree`: which token prefixes, in whole pages, are in the cache, and which were used least recently.

A node is one page of tokens after its parent's. It names the page that holds its keys and values, and maybe a slot with the
fixed-size state after it. The tree only knows; pages and slots are taken and given back by its owner (cache.py).
"""

import heapq
import itertools
from collections import OrderedDict


class Node:
    """One page of tokens in the context of all before it. `page` is None in models without attention."""

    __slots__ = ("children", "key", "last_used", "page", "parent", "slot")

    def __init__(self, parent: "Node | None", key: tuple[int, ...], page: int | None) -> None:
        self.parent, self.key, self.page = parent, key, page
        self.slot: int | None = None
        self.children: dict[tuple[int, ...], Node] = {}
        self.last_used = 0


class PrefixTree:
    """Pages of tokens, found by content (compared token by token: no two prefixes are ever taken for one another)."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.num_nodes = 0
        self._root = Node(None, (), None)
        self._states: OrderedDict[Node, None] = OrderedDict()  # nodes with a slot, least recently used first
        self._leaves: list[tuple[int, int, Node]] = []  # heap of (last_used, tie, node); outdated entries are skipped
        self._clock = 0
        self._ties = itertools.count()

    def _keys(self, tokens: list[int], num_pages: int) -> list[tuple[int, ...]]:
        size = self.page_size
        return [tuple(tokens[i * size : (i + 1) * size]) for i in range(num_pages)]

    def match(self, tokens: list[int], num_pages: int) -> list[Node]:
        """The longest cached run of the first `num_pages` pages of `tokens`, now the most recently used."""
        path: list[Node] = []
        node: Node | None = self._root
        for key in self._keys(tokens, num_pages):
            node = node.children.get(key) if node else None
            if node is None:
                break
            path.append(node)
        self._touch(path)
        return path

    def insert(self, tokens: list[int], pages: list[int | None]) -> tuple[list[Node], list[Node]]:
        """Make the first len(pages) pages of `tokens` known; those that were keep the page they have.

        Returns (all nodes of the run, the new ones among them).
        """
        path, new, node = [], [], self._root
        for key, page in zip(self._keys(tokens, len(pages)), pages, strict=True):
            child = node.children.get(key)
            if child is None:
                child = node.children[key] = Node(node, key, page)
                new.append(child)
            path.append(child)
            node = child
        self.num_nodes += len(new)
        self._touch(path)
        return path, new

    def _touch(self, path: list[Node]) -> None:
        self._clock += 1
        for node in path:
            node.last_used = self._clock
            if node.slot is not None:
                self._states.move_to_end(node)
        if path and not path[-1].children:
            self._push_leaf(path[-1])

    def _push_leaf(self, node: Node) -> None:
        heapq.heappush(self._leaves, (node.last_used, next(self._ties), node))
        if len(self._leaves) > 2 * self.num_nodes + 64:
            self._leaves = [entry for entry in self._leaves if self._is_current(entry)]
            heapq.heapify(self._leaves)

    @staticmethod
    def _is_current(entry: tuple[int, int, Node]) -> bool:
        last_used, _, node = entry
        return not node.children and node.last_used == last_used

    def attach_state(self, node: Node, slot: int) -> None:
        assert node.slot is None
        node.slot = slot
        self._states[node] = None

    def pop_state(self) -> int | None:
        """Forget the least recently used state and return its slot; None if there is none."""
        if not self._states:
            return None
        node, _ = self._states.popitem(last=False)
        slot, node.slot = node.slot, None
        return slot

    def pop_leaf(self) -> Node | None:
        """Forget the least recently used node that nothing builds on; None if the tree is empty."""
        while self._leaves:
            entry = heapq.heappop(self._leaves)
            if self._is_current(entry):
                return self._remove(entry[2])
        return None

    def _remove(self, node: Node) -> Node:
        self.num_nodes -= 1
        self._states.pop(node, None)
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        if parent is not self._root and not parent.children:
            self._push_leaf(parent)
        return node
