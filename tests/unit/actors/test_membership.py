"""The book of ranks."""

from __future__ import annotations

from actors.membership import MembershipBook
from actors.messages import RankRecord
from tests.unit.actors.fakes import rank_record


def _book() -> MembershipBook:
    return MembershipBook(term=3, epoch=2, floor=1)


def _register(book: MembershipBook, record: RankRecord) -> bool:
    """Register and be answered."""
    is_news = book.register(record)
    book.answered(record.incarnation)
    return is_news


def test_a_rank_takes_requests_when_its_registration_is_answered() -> None:
    book = _book()
    book.register(rank_record(0))
    assert book.is_joining("incarnation-0")
    assert book.view().members == ()
    assert not book.found("incarnation-0")
    assert book.view().members == ()
    version = book.version
    book.answered("incarnation-0")
    assert not book.is_joining("incarnation-0")
    assert len(book.view().members) == 1
    assert book.version > version
    # a repeat of the first registration does not make it new again
    book.register(rank_record(0))
    assert not book.is_joining("incarnation-0")
    book.register(rank_record(1, lineage="lineage", epoch=4))
    assert not book.is_joining("incarnation-1")


def test_a_registered_rank_takes_requests_until_it_is_lost() -> None:
    book = _book()
    before = book.version
    assert _register(book, rank_record(1, tcp_key="key"))
    assert book.version != before
    view = book.view()
    assert [(member.rank, member.incarnation, member.tcp_key) for member in view.members] == [
        (1, "incarnation-1", "key")
    ]
    assert (view.epoch, view.floor) == (2, 1)
    assert book.lost("incarnation-1")
    assert book.view().members == ()
    assert book.view().version != view.version
    assert [record.rank for record in book.records()] == [1]


def test_a_lost_rank_comes_back_and_a_gone_one_does_not() -> None:
    book = _book()
    _register(book, rank_record(0))
    book.lost("incarnation-0")
    assert book.found("incarnation-0")
    assert len(book.view().members) == 1
    assert book.gone("incarnation-0") is not None
    assert not book.found("incarnation-0")
    assert book.gone("incarnation-0") is None
    assert book.records() == []


def test_only_news_changes_the_version() -> None:
    book = _book()
    assert _register(book, rank_record(0))
    version = book.version
    assert not _register(book, rank_record(0))
    assert not book.found("incarnation-0")
    assert not book.lost("nobody")
    book.advance(2, 1)
    assert book.version == version
    book.advance(5, 1)
    assert book.version != version
    assert book.view().epoch == 5


def test_a_rank_with_another_number_is_news() -> None:
    book = _book()
    _register(book, rank_record(0, "one"))
    version = book.version
    assert _register(book, rank_record(3, "one"))
    assert book.version != version
    assert [(member.rank, member.incarnation) for member in book.view().members] == [(3, "one")]


def test_a_restored_rank_takes_no_request_until_it_answers() -> None:
    book = _book()
    book.restore(rank_record(0))
    assert book.view().members == ()
    assert book.state("incarnation-0") == "lost"
    assert book.found("incarnation-0")
    assert len(book.view().members) == 1


def test_two_incarnations_of_one_rank_number_are_two() -> None:
    book = _book()
    _register(book, rank_record(0, "old"))
    _register(book, rank_record(0, "new"))
    assert [member.incarnation for member in book.view().members] == ["old", "new"]


def test_versions_of_a_later_controller_are_above_those_of_an_earlier_one() -> None:
    early = MembershipBook(term=1, epoch=0, floor=0)
    for number in range(100):
        early.register(rank_record(0, f"i{number}"))
    assert MembershipBook(term=2, epoch=0, floor=0).version > early.version
