"""A rank's answers to flush commands, on its control loop: deadlines are timers here, and never wait for the engine."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from configs.errors import ConfigError
from engine.flush import FlushCommand, FlushKey, FlushScope, FlushVerdict
from engine.host_calls import SubEpochs
from engine.loop import EngineLoop


class RankFlushes:
    """Stands between the controller's commands and the engine's gate."""

    def __init__(
        self,
        engine: EngineLoop,
        boot_s: Callable[[], float],
        told_epoch: Callable[[int], None],
        refused: Callable[[FlushCommand, FlushVerdict], None],
    ) -> None:
        """boot_s: CLOCK_BOOTTIME of this machine in seconds.  told_epoch: the rank must not serve under a lower one.
        refused: told of each verdict that was given without taking the flush in.
        """
        self._engine = engine
        self._boot_s = boot_s
        self._told_epoch = told_epoch
        self._refused = refused
        self._is_serving = False
        #: lineage of the controller that told this rank to flush before it served
        self._told_by = ""
        #: scopes that were flushed before this rank served, with their sub-epochs
        self._early_scopes: list[tuple[FlushScope | None, int]] = []

    def serve(self, lineage: str = "") -> None:
        """The engine begins to serve: from now on it may hold something.

        Raises ConfigError if the rank was told an epoch of another lineage, whose log was lost before it joined: no
        epoch of the one it joins could be compared with it.
        """
        if self._told_by not in ("", lineage):
            raise ConfigError("a controller of another lineage has told this rank to flush; only a new one may join")
        self._is_serving = True

    async def flush(self, command: FlushCommand) -> FlushVerdict:
        """Flush at the next instant that the mode allows, or say why not, at the latest when the budget is used up.

        A repeat of a flush joins the first or reads its verdict again; no flush is executed twice, and none after its
        `valid_until_s`.
        """
        engine = self._engine
        offered = engine.offer_flush(command, self._in_engine_time(command.valid_until_s))
        if isinstance(offered, FlushVerdict):
            self._refused(command, offered)
            return offered
        if not self._is_serving:
            self._remember(command)
            engine.end_unstarted_flush(offered)
        left_s = offered.deadline_s - engine.now_s()
        deadline = asyncio.get_running_loop().call_later(max(0.0, left_s), engine.expire_flush, offered)
        ended = asyncio.wrap_future(offered.ended)
        ended.add_done_callback(lambda _: deadline.cancel())
        # A caller that is cancelled takes neither the flush nor its deadline along: a drain would hold requests on.
        return await asyncio.shield(ended)

    @property
    def early_sub_epochs(self) -> SubEpochs:
        """Of the scoped flushes that this rank answered before it served: the answer to its registration may be older
        than they are, and what it then finds in a host tier must not be."""
        return tuple(self._early_scopes)

    async def close(self, key: FlushKey, term: int) -> FlushVerdict:
        """What became of a flush. If it has not begun it never will, even if its command is still on its way."""
        self._engine.see_term(term)
        withdrawn = self._engine.withdraw_flush(key)
        if isinstance(withdrawn, FlushVerdict):
            return withdrawn
        return await asyncio.shield(asyncio.wrap_future(withdrawn.ended))

    def is_late(self, valid_until_s: float) -> bool:
        """A command that was valid until then must not be carried out any more."""
        return self._boot_s() >= valid_until_s

    def _remember(self, command: FlushCommand) -> None:
        """It holds nothing yet; what it is told counts for what it may find once it serves."""
        self._told_by = command.lineage
        self._told_epoch(command.epoch)
        if command.sub_epoch and not command.dry_run:
            self._early_scopes.append((command.scope, command.sub_epoch))

    def _in_engine_time(self, valid_until_s: float) -> float:
        """The two clocks differ by the time the machine was suspended, in which nothing ran."""
        return math.inf if valid_until_s == math.inf else self._engine.now_s() + valid_until_s - self._boot_s()
