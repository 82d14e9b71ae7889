"""Who may call what. Two keys: one for inference, one for administration; compared in constant time.

Without an admin key the admin routes are open on a loopback address only (to holders of the inference key, when one is
set). As soon as the server listens beyond loopback they are closed until an admin key is configured. Serve's own
setting says where its proxy listens, and another file may hold it: so a caller of another machine is refused as well,
whatever `host` says.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from configs.errors import Forbidden, Unauthorized
from configs.resolve import is_loopback

#: open: anybody. inference: users. admin: whoever may change the server's state.
Access = Literal["open", "inference", "admin"]


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one deployment. None: not set."""

    api_key: str | None = field(default=None, repr=False)
    admin_key: str | None = field(default=None, repr=False)
    #: the address that the server listens on
    host: str = "127.0.0.1"

    def check(self, access: Access, headers: Mapping[str, str], peer: str | None = None) -> None:
        """Raise Unauthorized (no valid key) or Forbidden (a valid one without the right).

        headers: of an HTTP request or gRPC metadata, names in lower case. peer: address of the caller, "" if the
        transport does not tell; None where the door itself has bound `host`.
        """
        if access == "open":
            return
        given = _bearer(headers.get("authorization", ""))
        if access == "admin":
            _refuse_foreign_pages(headers)
            self._check_admin(given, peer)
        elif self.api_key is not None and not (_same(given, self.api_key) or _same(given, self.admin_key)):
            raise Unauthorized("this route needs a key: Authorization: Bearer <key>")

    def _check_admin(self, given: str, peer: str | None) -> None:
        if self.admin_key is not None:
            if _same(given, self.admin_key):
                return
            if _same(given, self.api_key):
                raise Forbidden("this route needs the admin key; the inference key is not enough")
            raise Unauthorized("this route needs the admin key: Authorization: Bearer <key>")
        if not is_loopback(self.host):
            raise Forbidden(
                f"the server listens on {self.host}, beyond loopback, and has no admin key; "
                "admin routes are closed until one is set (configs: api.admin_key)"
            )
        if peer is not None and not is_loopback(peer):
            raise Forbidden(
                "the server has no admin key, so admin routes answer callers of its own machine only "
                "(configs: api.admin_key)"
            )
        if self.api_key is not None and not _same(given, self.api_key):
            raise Unauthorized("this route needs a key: Authorization: Bearer <key>")


def _refuse_foreign_pages(headers: Mapping[str, str]) -> None:
    """A page of another site, open in a browser on this machine, reaches loopback; it must not flush a cache."""
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Forbidden("admin routes refuse requests that a page of another site has sent")


def _bearer(header: str) -> str:
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _same(given: str, key: str | None) -> bool:
    return key is not None and hmac.compare_digest(given.encode(), key.encode())
