"""Where the key chains of a rank's pages begin: what is fixed for the rank, and how often each scope was flushed.

A scoped flush gives its scope a sub-epoch, which becomes part of the root of every chain in scope. So no page from
before is found again, wherever it lies or is on its way to (holes H5, H6). Two ranks at one epoch that know of the same
scoped flushes make the same keys; one that knows of fewer only misses.
"""

from __future__ import annotations

from typing import Final

from cache.keys import KeyRoot
from cache.types import Epoch, Namespace, TokenBytes

#: scopes remembered one by one; then the older half is kept as one that covers everything: more is dropped than asked
MAX_SCOPES: Final = 1024
#: roots remembered, 16 bytes each; one takes about 5 us to compute
_MAX_ROOTS: Final = 4096


class KeyRoots:
    """Roots by namespace, first page and epoch. Changed by the engine thread only."""

    def __init__(self, lineage: str, layout_digest: str, weights_digest: str) -> None:
        self.lineage = lineage
        self._layout_digest = layout_digest
        self._weights_digest = weights_digest
        #: scope -> sub-epoch, oldest first. Scopes: a namespace, or the beginning of a first page in every namespace
        self._sub_epochs: dict[Namespace | TokenBytes, int] = {}
        #: of everything
        self._least = 0
        self._roots: dict[tuple[Namespace, TokenBytes, Epoch], bytes] = {}

    def begin_lineage(self, lineage: str) -> bool:
        """Keys are made for this lineage from now on. True: it is another one."""
        is_other, self.lineage = lineage != self.lineage, lineage
        self._roots.clear()
        return is_other

    def raise_sub_epoch(self, scope: Namespace | TokenBytes | None, sub_epoch: int) -> bool:
        """Chains in scope begin anew; None: all. False, and nothing changes, if they have done so for this flush."""
        known = self._least if scope is None else max(self._least, self._sub_epochs.get(scope, 0))
        if sub_epoch <= known:
            return False
        self._roots.clear()
        if scope is None:
            self._least = sub_epoch
            return True
        self._sub_epochs.pop(scope, None)
        self._sub_epochs[scope] = sub_epoch
        if len(self._sub_epochs) > MAX_SCOPES:
            for older in list(self._sub_epochs)[: MAX_SCOPES // 2]:
                self._least = max(self._least, self._sub_epochs.pop(older))
        return True

    def forget_until(self, epoch: Epoch) -> None:
        """Scoped flushes recorded before the flush that began this epoch are part of it."""
        self._sub_epochs = {scope: number for scope, number in self._sub_epochs.items() if number > epoch}
        self._least = self._least if self._least > epoch else 0
        self._roots.clear()

    def root(self, namespace: Namespace, first_page: TokenBytes, epoch: Epoch) -> bytes:
        """Where the chain of a sequence with this first page begins. first_page: whole."""
        question = (namespace, first_page, epoch)
        root = self._roots.get(question)
        if root is None:
            if len(self._roots) >= _MAX_ROOTS:
                self._roots.clear()
            root = self._roots[question] = self._compute(namespace, first_page, epoch)
        return root

    def _compute(self, namespace: Namespace, first_page: TokenBytes, epoch: Epoch) -> bytes:
        of_namespace = max(self._least, self._sub_epochs.get(namespace, 0))
        of_prefixes = [
            number
            for scope, number in self._sub_epochs.items()
            if isinstance(scope, bytes) and first_page.startswith(scope)
        ]
        root = KeyRoot(
            self.lineage,
            self._layout_digest,
            self._weights_digest,
            namespace,
            epoch,
            of_namespace,
            max(of_prefixes, default=0),
        )
        return root.digest()
