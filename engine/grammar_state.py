"""Where one sequence stands in the grammar that its output must follow. No library: the scheduler only carries it."""

from __future__ import annotations

from engine.request import Grammar


class GrammarState:
    """A function of the grammar and the output tokens, kept so that each token is looked at once.

    The sequence owns it, so it lives through retractions and flushes. Only the sampler reads and writes it.
    """

    __slots__ = ("grammar", "matcher", "num_taken")

    def __init__(self, grammar: Grammar) -> None:
        self.grammar = grammar
        #: the library's own state; None: not begun
        self.matcher: object | None = None
        #: output tokens that the matcher has taken in
        self.num_taken = 0
