"""Stop strings: the first one that is complete ends the text, however the text was cut into pieces."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given
from hypothesis import strategies as st

from deployments.stop_strings import StopStrings

texts = st.text(alphabet="ab€", max_size=24)
stop_lists = st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), max_size=4)


def expected(text: str, stops: list[str], keep: bool) -> tuple[str, str | None]:
    """Character by character: is some stop string a suffix now? The longest of those wins."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            stop = max(complete, key=len)
            return text[: end if keep else end - len(stop)], stop
    return text, None


def shown(pieces: list[str], stops: list[str], keep: bool) -> tuple[str, str | None]:
    matcher = StopStrings(stops, keep)
    text = ""
    for piece in pieces:
        text += matcher.push(piece)
        if matcher.matched is not None:
            return text, matcher.matched
    return text + matcher.finish(), None


@given(texts, stop_lists, st.booleans(), st.lists(st.integers(0, 24), max_size=6))
@example("aab", ["aaa", "ab"], False, [1, 2])
@example("abab€", ["abab€", "bab"], True, [3])
def test_any_cut_of_the_text_gives_what_reading_it_by_characters_gives(
    text: str, stops: list[str], keep: bool, cuts: list[int]
) -> None:
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert shown(pieces, stops, keep) == expected(text, stops, keep)


def test_only_what_could_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStrings(["STOP"])
    assert matcher.push("go ST") == "go "
    assert matcher.push("ILL") == "STILL"
    assert matcher.push("STO") == ""
    assert matcher.finish() == "STO"


def test_of_two_that_end_together_the_longer_is_cut() -> None:
    assert shown(["xEND"], ["D", "END"], False) == ("x", "END")


def test_without_stop_strings_everything_passes_at_once() -> None:
    assert StopStrings([]).push("anything") == "anything"
