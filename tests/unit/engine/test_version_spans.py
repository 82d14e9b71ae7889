"""Which weights computed which tokens of an answer."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from engine.version_spans import VersionSpans


def test_one_span_without_an_update() -> None:
    spans = VersionSpans("v0")
    for _ in range(3):
        spans.add_token("v0")
    assert spans.spans == (("v0", 0, 3),)


def test_two_updates_make_three_spans() -> None:
    spans = VersionSpans("v0")
    for version in ("v0", "v0", "v1", "v2", "v2"):
        spans.add_token(version)
    assert spans.spans == (("v0", 0, 2), ("v1", 2, 3), ("v2", 3, 5))
    assert spans.latest == "v2"


def test_an_answer_without_a_token_has_an_empty_span() -> None:
    assert VersionSpans("v0").spans == (("v0", 0, 0),)


def test_an_update_before_the_first_token_leaves_no_trace_of_the_old_weights() -> None:
    spans = VersionSpans("v0")
    spans.add_token("v1")
    assert spans.spans == (("v1", 0, 1),)


@given(st.lists(st.sampled_from(["a", "b", "c"])))
def test_spans_are_contiguous_and_neighbours_differ(versions: list[str]) -> None:
    spans = VersionSpans("a")
    for version in versions:
        spans.add_token(version)
    found = spans.spans
    assert (found[0].start, found[-1].end) == (0, len(versions))
    for one, other in pairwise(found):
        assert one.end == other.start
        assert one.version != other.version
    assert [span.version for span in found for _ in range(span.start, span.end)] == versions
