"""What happened in one run: a story for people, and a digest that tells two runs apart."""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Callable

#: lines shown of a run that has failed
NUM_LINES = 150


class Trace:
    """Every line counts for the digest; the last ones are kept, and written out only if somebody reads them."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._lines: deque[tuple[float, str, str]] = deque(maxlen=NUM_LINES)
        self._digest = hashlib.blake2b(digest_size=8)
        #: how often each kind of thing has happened
        self.seen: Counter[str] = Counter()

    def tell(self, who: str, what: str) -> None:
        now_s = self._now_s()
        self._lines.append((now_s, who, what))
        self._digest.update(f"{now_s!r}{who}{what}".encode())

    def count(self, what: str, number: int = 1) -> None:
        self.seen[what] += number

    @property
    def digest(self) -> str:
        return self._digest.hexdigest()

    def story(self) -> str:
        """The last lines, oldest first."""
        return "\n".join(f"{now_s:12.6f}  {who:<14} {what}" for now_s, who, what in self._lines)
