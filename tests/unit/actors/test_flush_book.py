"""One flush at a time; the same id at most once."""

from __future__ import annotations

import pytest

from actors.flush_book import REREAD_S, Begin, FlushBook, Join, Refuse, Reread
from tests.unit.actors.fakes import make_request


def test_a_second_flush_is_refused_while_one_is_pending() -> None:
    book = FlushBook()
    first = make_request("first")
    assert book.admit(first, 0) == Begin()
    assert book.admit(make_request("second"), 1) == Refuse("busy", "first")
    assert book.pending is first
    book.end(first, {"success": True}, 2)
    assert book.pending is None
    assert book.admit(make_request("second"), 3) == Begin()


def test_the_same_id_joins_and_then_reads() -> None:
    book = FlushBook()
    first = make_request("first")
    book.admit(first, 0)
    assert book.admit(make_request("first", caller="other"), 1) == Join()
    book.end(first, {"success": True}, 2)
    assert book.admit(make_request("first"), 3) == Reread({"success": True})


def test_an_ended_id_is_read_while_another_one_is_pending() -> None:
    book = FlushBook()
    first = make_request("first")
    book.admit(first, 0)
    book.end(first, {"success": True}, 1)
    book.admit(make_request("second"), 2)
    assert book.admit(make_request("first"), 3) == Reread({"success": True})


@pytest.mark.parametrize("is_ended", [False, True])
def test_other_arguments_are_a_conflict(is_ended: bool) -> None:
    book = FlushBook()
    first = make_request("first")
    book.admit(first, 0)
    if is_ended:
        book.end(first, {"success": True}, 1)
    assert book.admit(make_request("first", timeout_s=9), 2) == Refuse("conflict", "first")


def test_after_an_hour_the_id_is_free_again_and_still_readable() -> None:
    book = FlushBook()
    first = make_request("nightly")
    book.admit(first, 0)
    book.end(first, {"success": True}, 10)
    assert isinstance(book.admit(make_request("nightly"), 10 + REREAD_S - 1), Reread)
    assert book.read("nightly") == {"success": True, "late": []}
    again = make_request("nightly", timeout_s=5)
    assert book.admit(again, 10 + REREAD_S) == Begin()
    assert book.admit(make_request("other"), 10 + REREAD_S) == Refuse("busy", "nightly")


def test_an_old_answer_is_not_read_while_another_flush_is_pending() -> None:
    book = FlushBook()
    first = make_request("nightly")
    book.admit(first, 0)
    book.end(first, {"success": True}, 0)
    book.admit(make_request("other"), REREAD_S)
    assert book.admit(make_request("nightly"), REREAD_S) == Refuse("busy", "other")


def test_a_flush_that_was_never_begun_is_forgotten() -> None:
    book = FlushBook()
    first = make_request("first")
    book.admit(first, 0)
    book.drop(first)
    assert book.read("first") is None
    assert book.admit(make_request("first", timeout_s=4), 1) == Begin()


def test_late_verdicts_are_read_with_the_answer() -> None:
    book = FlushBook()
    first = make_request("first")
    book.admit(first, 0)
    book.end(first, {"success": False}, 1)
    book.keep_late("first", [{"rank": 0}])
    assert book.read("first") == {"success": False, "late": [{"rank": 0}]}
    assert book.admit(first, 2) == Reread({"success": False})


def test_the_book_is_bounded() -> None:
    book = FlushBook()
    for number in range(5000):
        request = make_request(f"f{number}")
        book.admit(request, 0)
        book.end(request, {}, 0)
    assert book.read("f0") is None
    assert book.read("f4999") is not None
