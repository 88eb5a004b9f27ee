"""KV pages as plain integers: one PagePool a rank, one BlockTable a sequence.

Owns which page belongs to whom. Never touches the memory behind a page: the rank learns of a table's growth from
`RankPlan.new_pages`. One thread (the engine's) uses it.

Invariants (check_invariants):
* a page is either free or in exactly one block table, and the pool's owner map says the same;
* entry i of a table holds the tokens [i * page_size, (i + 1) * page_size) of its sequence.

A released page may be handed out in the next plan although steps that still use it are under way: a rank runs its plans
in order, so whoever gets the page writes to it after the old owner's last step.
"""

from __future__ import annotations

from collections.abc import Iterable

FREE = -1  # in the owner map; owners are >= 0


class PagePool:
    """The pages of one rank: a free list and an owner map; allocating and releasing a page is O(1)."""

    __slots__ = ("_free", "_owners", "num_pages", "page_size")

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"got num_pages={num_pages}, page_size={page_size}; both must be >= 1")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: the page released last is the warmest
        self._owners = [FREE] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_pages - len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.page_size)

    def allocate(self, num_pages: int, owner: int) -> list[int]:
        """Take `num_pages` pages. The caller has made sure that they are there (num_free)."""
        free = self._free
        assert num_pages <= len(free), f"{num_pages} pages wanted, {len(free)} free: check num_free before allocating"
        if num_pages == 1:  # a decode row that crosses a page boundary: the common case
            taken = [free.pop()]
        else:
            split = len(free) - num_pages
            taken = free[split:]
            taken.reverse()
            del free[split:]
        for page in taken:
            self._owners[page] = owner
        return taken

    def release(self, pages: Iterable[int], owner: int) -> None:
        """Give pages back; each must belong to `owner`."""
        owners = self._owners
        for page in pages:
            assert owners[page] == owner, f"page {page} released by {owner}, but its owner is {owners[page]}"
            owners[page] = FREE
            self._free.append(page)

    def check_invariants(self, tables: Iterable[BlockTable]) -> None:
        """Assert that free list, owner map and the given tables (all that exist on this pool) partition the pages."""
        seen: dict[int, int] = {}
        for page in self._free:
            assert page not in seen, f"page {page} is twice in the free list"
            assert self._owners[page] == FREE, f"page {page} is free, but its owner is {self._owners[page]}"
            seen[page] = FREE
        for table in tables:
            assert table.pool is self, f"the table of {table.owner} belongs to another pool"
            for page in table.pages:
                other = seen.get(page)
                assert other is None, (
                    f"page {page} of {table.owner} is also {'free' if other == FREE else f'of {other}'}"
                )
                assert self._owners[page] == table.owner, (
                    f"page {page} is in the table of {table.owner}, but its owner is {self._owners[page]}"
                )
                seen[page] = table.owner
        leaked = self.num_pages - len(seen)
        assert leaked == 0, f"{leaked} of {self.num_pages} pages are neither free nor in a table"


class BlockTable:
    """The pages of one sequence, in position order. Grows at its end and is released as a whole."""

    __slots__ = ("owner", "pages", "pool")

    def __init__(self, pool: PagePool, owner: int) -> None:
        self.pool = pool
        self.owner = owner
        self.pages: list[int] = []

    def num_missing(self, num_tokens: int) -> int:
        """Pages to add before the table holds `num_tokens` tokens."""
        return max(0, self.pool.pages_for(num_tokens) - len(self.pages))

    def extend(self, num_pages: int) -> list[int]:
        """Add pages at the end and return them; the first has index len(pages) before the call."""
        taken = self.pool.allocate(num_pages, self.owner)
        self.pages += taken
        return taken

    def release(self) -> None:
        """Give all pages back; the table is empty afterwards."""
        self.pool.release(self.pages, self.owner)
        self.pages = []
