"""Leases as the controller counts them: never over too early, never given without right."""

from __future__ import annotations

import pytest

from actors.lease_book import DRIFT, LeaseBook


def _book(lease_s: float = 5.0, longest_s: float = 5.0, started_s: float = 100.0) -> LeaseBook:
    book = LeaseBook(lease_s, longest_s, started_s)
    book.log_checked(started_s)
    return book


def test_a_lease_is_over_a_little_more_than_a_lease_time_after_it_was_given() -> None:
    book = _book()
    book.log_checked(200.0)
    book.grant("n", 200.0)
    assert book.over_s("n") == 200.0 + 5.0 * DRIFT
    assert not book.is_over("n", 205.0)
    assert book.is_over("n", 205.05)


def test_a_new_controller_counts_no_lease_as_over_before_two_lease_times() -> None:
    book = _book()
    assert not book.is_over("never heard of", 110.0)
    assert book.is_over("never heard of", 110.1)
    book.grant("n", 104.0)
    assert book.over_s("n") == 100.0 + 2 * 5.0 * DRIFT


def test_leases_of_an_earlier_controller_may_have_been_longer() -> None:
    book = _book(lease_s=2.0, longest_s=30.0)
    assert not book.is_over("n", 160.0)
    assert book.is_over("n", 160.7)


def test_no_lease_without_a_look_at_the_log_in_the_last_lease_time() -> None:
    book = _book()
    assert book.why_not("n", 104.9) is None
    assert "log" in (book.why_not("n", 105.0) or "")
    book.log_checked(104.0)
    assert book.why_not("n", 105.0) is None
    # a check that was begun earlier says nothing new
    book.log_checked(101.0)
    assert book.why_not("n", 108.9) is None
    with pytest.raises(AssertionError):
        book.grant("n", 109.0)


def test_none_at_all_after_another_controller_has_taken_over() -> None:
    book = _book()
    book.forbid()
    assert "taken over" in (book.why_not("n", 101.0) or "")


def test_withheld_while_a_flush_counts_on_it() -> None:
    book = _book()
    book.withhold(["n", "m"])
    book.withhold(["n"])
    assert book.why_not("n", 101.0) is not None
    assert book.why_not("other", 101.0) is None
    book.release(["n"])
    assert book.why_not("n", 101.0) is not None
    book.release(["n", "m"])
    assert book.why_not("n", 101.0) is None
