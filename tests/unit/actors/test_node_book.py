"""What the controller knows of nodes: clocks from below, floors of one file, leases to who may have one."""

from __future__ import annotations

import math
from dataclasses import replace

from actors.lease_book import LeaseBook
from actors.messages import NodeRenewal, PagePlace
from actors.node_book import NodeBook
from actors.node_clock import NodeClock
from tests.unit.actors.fakes import rank_record

PAGE = PagePlace("/memory", "n", nonce=7)


def _book(is_one_machine: bool = True) -> NodeBook:
    leases = LeaseBook(5.0, 5.0, 100.0)
    leases.log_checked(100.0)
    return NodeBook(leases, "own", "boot", is_one_machine)


def _renewal(sent_s: float, page: PagePlace | None = PAGE, floor: int = 0, boot_id: str = "boot") -> NodeRenewal:
    return NodeRenewal("n", boot_id, sent_s, page, floor)


def test_another_clock_is_known_from_below() -> None:
    clock = NodeClock()
    assert clock.reads_at_least(10.0) is None
    clock.heard(1000.0, 10.0)  # sent at 1000 of theirs; the way took something
    assert clock.reads_at_least(10.0) == 1000.0
    later = clock.reads_at_least(20.0)
    assert later is not None
    assert 1009.98 < later < 1010.0
    # a message that was on its way for long says less than is known already
    clock.heard(1005.0, 20.0)
    assert clock.reads_at_least(20.0) == later
    clock.heard(1010.5, 20.0)
    assert clock.reads_at_least(20.0) == 1010.5


def test_a_slow_clock_is_never_taken_for_later_than_it_is() -> None:
    clock = NodeClock()
    rate = 1 - 5e-4  # theirs runs slower than ours
    for now_s in range(0, 5000, 10):
        theirs_s = 300.0 + rate * now_s
        known_s = clock.reads_at_least(now_s)
        assert known_s is None or known_s <= theirs_s
        if now_s < 1000:
            clock.heard(theirs_s - 0.2, now_s)


def test_a_node_has_a_lease_from_its_renewal_on() -> None:
    book = _book()
    assert book.renew(_renewal(50.0), 102.0) is None
    assert book.lease_over_s("n") == book.leases.over_s("n")
    assert book.page("n") == PAGE
    assert book.boot_s("n", 102.0) == 50.0
    assert book.boot_s("own", 102.0) == 102.0
    assert book.boot_s("other", 102.0) is None
    assert book.silent_s("n", 103.0) == 1.0
    assert book.silent_s("other", 103.0) == math.inf


def test_no_lease_without_a_page_and_none_for_an_older_renewal() -> None:
    book = _book()
    assert "no control page" in (book.renew(_renewal(50.0, page=None), 102.0) or "")
    assert book.refusal("n")
    assert book.renew(_renewal(51.0), 102.0) is None
    assert "newer" in (book.renew(_renewal(50.5), 102.1) or "")
    # the refusal of an old message does not take away what the newer one has
    assert book.refusal("n") == ""


def test_a_log_of_one_machine_serves_no_other() -> None:
    assert "another machine" in (_book().renew(_renewal(50.0, boot_id="elsewhere"), 102.0) or "")
    assert _book(is_one_machine=False).renew(_renewal(50.0, boot_id="elsewhere"), 102.0) is None


def test_a_rank_is_fenced_by_the_floor_of_the_file_it_reads() -> None:
    book = _book()
    record = replace(rank_record(0, node_id="n"), page_nonce=7)
    assert not book.is_fenced(record, 5)
    book.renew(_renewal(50.0, floor=4), 102.0)
    assert book.is_fenced(record, 4)
    assert not book.is_fenced(record, 5)
    book.floor_raised("n", 7, 5)
    assert book.is_fenced(record, 5)
    # an older renewal of the same file takes nothing back
    book.renew(_renewal(51.0, floor=4), 103.0)
    assert book.is_fenced(record, 5)
    assert not book.is_fenced(replace(record, page_nonce=0), 5)
    assert not book.is_fenced(replace(record, page_nonce=8), 5)


def test_another_file_has_its_own_floor() -> None:
    book = _book()
    book.renew(_renewal(50.0, floor=9), 102.0)
    book.renew(_renewal(51.0, PagePlace("/memory", "n", nonce=8), floor=2), 103.0)
    assert not book.is_fenced(replace(rank_record(0, node_id="n"), page_nonce=7), 2)
    record = replace(rank_record(0, node_id="n"), page_nonce=8)
    assert book.is_fenced(record, 2)
    book.floor_raised("n", 7, 9)
    assert not book.is_fenced(record, 9)


def test_a_node_as_plain_data() -> None:
    book = _book()
    assert book.row("n", 101.0) == {
        "node": "n", "floor": 0, "has_lease": False, "silent_s": None, "message": "its agent has not been heard of",
    }  # fmt: skip
    book.renew(_renewal(50.0, floor=3), 102.0)
    assert book.row("n", 102.5) == {"node": "n", "floor": 3, "has_lease": True, "silent_s": 0.5, "message": ""}
    assert not book.row("n", 120.0)["has_lease"]
