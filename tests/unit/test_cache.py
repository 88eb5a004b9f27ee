"""Page pool and block tables."""

from __future__ import annotations

import pytest

from nmoe_backend.cache import BlockTable, PagePool


def test_pages_are_handed_out_once_and_come_back() -> None:
    pool = PagePool(num_pages=6, page_size=4)
    first, second = BlockTable(pool, owner=1), BlockTable(pool, owner=2)
    assert len(first.extend(2)) == 2 and len(second.extend(3)) == 3
    assert not set(first.pages) & set(second.pages)
    assert pool.num_free == 1 and pool.num_used == 5
    pool.check_invariants([first, second])
    first.release()
    assert pool.num_free == 3 and pool.num_used == 3
    pool.check_invariants([first, second])


def test_extend_returns_the_pages_in_table_order() -> None:
    pool = PagePool(num_pages=8, page_size=4)
    table = BlockTable(pool, owner=1)
    assert table.extend(3) + table.extend(1) == table.pages


@pytest.mark.parametrize(("num_tokens", "num_pages"), [(0, 0), (1, 1), (4, 1), (5, 2), (16, 4)])
def test_num_missing_counts_started_pages(num_tokens: int, num_pages: int) -> None:
    pool = PagePool(num_pages=8, page_size=4)
    table = BlockTable(pool, owner=1)
    assert table.num_missing(num_tokens) == num_pages
    table.extend(2)
    assert table.num_missing(num_tokens) == max(0, num_pages - 2)


def test_taking_more_than_is_free_is_our_own_bug() -> None:
    with pytest.raises(AssertionError, match="3 pages wanted, 2 free"):
        PagePool(num_pages=2, page_size=4).allocate(3, owner=1)


def test_freeing_twice_is_noticed() -> None:
    pool = PagePool(num_pages=2, page_size=4)
    pages = pool.allocate(1, owner=1)
    pool.release(pages, owner=1)
    with pytest.raises(AssertionError, match="released by 1, but its owner is -1"):
        pool.release(pages, owner=1)


def test_freeing_somebody_elses_page_is_noticed() -> None:
    pool = PagePool(num_pages=2, page_size=4)
    with pytest.raises(AssertionError, match="released by 2, but its owner is 1"):
        pool.release(pool.allocate(1, owner=1), owner=2)


def test_check_invariants_finds_leaks_and_sharing() -> None:
    pool = PagePool(num_pages=4, page_size=4)
    table = BlockTable(pool, owner=1)
    table.extend(2)
    with pytest.raises(AssertionError, match="2 of 4 pages are neither free nor in a table"):
        pool.check_invariants([])
    thief = BlockTable(pool, owner=2)
    thief.pages = [table.pages[0]]
    with pytest.raises(AssertionError, match="is also of 1"):
        pool.check_invariants([table, thief])


def test_a_pool_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_pages=0"):
        PagePool(num_pages=0, page_size=4)
