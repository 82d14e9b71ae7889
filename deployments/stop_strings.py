"""Stop strings over a stream of text, whatever the token borders.

The stop string that is complete first wins; of two complete at the same character, the longer. That makes the result
independent of how the text was cut into pieces. One Knuth-Morris-Pratt automaton per stop string: the automaton's
state is the length of the longest suffix of the text so far that begins the stop string, which is exactly what has to
be held back.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Feed text with `push`; what it returns may be shown. After a match nothing more may be fed.

    stops: non-empty strings. keep: the matched string itself is shown (SGLang's `no_stop_trim`).
    """

    __slots__ = ("_held", "_keep", "_patterns", "_states", "matched")

    def __init__(self, stops: Sequence[str], keep: bool = False) -> None:
        self._patterns = [(stop, _failure(stop)) for stop in stops]
        self._states = [0] * len(stops)
        self._keep = keep
        #: text that could still turn out to begin a stop string, not shown yet
        self._held = ""
        #: the stop string that was found, None until then
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Take the next piece of text; return what may be shown now. O(len(text) * number of stops)."""
        if not self._patterns:
            return text
        known = len(self._held)
        text = self._held + text
        for position in range(known, len(text)):
            found = self._step(text[position])
            if found is not None:
                self.matched, self._held = found, ""
                return text[: position + 1] if self._keep else text[: position + 1 - len(found)]
        border = len(text) - max(self._states)
        self._held = text[border:]
        return text[:border]

    def finish(self) -> str:
        """The text has ended without a match: what was held back."""
        held, self._held = self._held, ""
        return held

    def _step(self, character: str) -> str | None:
        """Advance every automaton by one character; the longest stop string that is complete now, if any."""
        found: str | None = None
        for index, (stop, failure) in enumerate(self._patterns):
            state = self._states[index]
            while state and stop[state] != character:
                state = failure[state - 1]
            if stop[state] == character:
                state += 1
            if state == len(stop):
                if found is None or len(stop) > len(found):
                    found = stop
                state = failure[state - 1]
            self._states[index] = state
        return found


def _failure(pattern: str) -> list[int]:
    """failure[i] = length of the longest proper prefix of pattern[:i+1] that is also its suffix (Knuth et al. 1977)."""
    failure = [0] * len(pattern)
    length = 0
    for index in range(1, len(pattern)):
        while length and pattern[index] != pattern[length]:
            length = failure[length - 1]
        if pattern[index] == pattern[length]:
            length += 1
        failure[index] = length
    return failure
