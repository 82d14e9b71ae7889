"""Who may call what."""

from __future__ import annotations

import httpx
import pytest
from starlette.routing import Route

from configs.errors import Forbidden, Unauthorized
from deployments.auth import Access, Keys
from tests.unit.deployments.api_server import Demo, scenario, serving

NONE = Keys()
INFERENCE = Keys(api_key="user-key")
ADMIN = Keys(admin_key="top-key")
BOTH = Keys(api_key="user-key", admin_key="top-key")
OPEN_PORT = Keys(api_key="user-key", host="0.0.0.0")
OPEN_PORT_ADMIN = Keys(api_key="user-key", admin_key="top-key", host="0.0.0.0")

CASES: list[tuple[Keys, Access, str | None, type[Exception] | None]] = [
    (NONE, "inference", None, None),
    (NONE, "admin", None, None),
    (INFERENCE, "inference", None, Unauthorized),
    (INFERENCE, "inference", "user-key", None),
    (INFERENCE, "admin", None, Unauthorized),
    (INFERENCE, "admin", "user-key", None),
    (ADMIN, "inference", None, None),
    (ADMIN, "admin", None, Unauthorized),
    (ADMIN, "admin", "top-key", None),
    (BOTH, "inference", "top-key", None),
    (BOTH, "inference", "wrong", Unauthorized),
    (BOTH, "admin", "user-key", Forbidden),
    (BOTH, "admin", "wrong", Unauthorized),
    (BOTH, "admin", "top-key", None),
    (OPEN_PORT, "admin", "user-key", Forbidden),
    (OPEN_PORT, "admin", None, Forbidden),
    (OPEN_PORT, "inference", "user-key", None),
    (OPEN_PORT_ADMIN, "admin", "top-key", None),
    (Keys(host="::"), "admin", None, Forbidden),
    (BOTH, "open", None, None),
]


@pytest.mark.parametrize(("keys", "access", "given", "refusal"), CASES)
def test_keys(keys: Keys, access: Access, given: str | None, refusal: type[Exception] | None) -> None:
    headers = {} if given is None else {"authorization": f"Bearer {given}"}
    if refusal is None:
        keys.check(access, headers)
    else:
        with pytest.raises(refusal):
            keys.check(access, headers)


@pytest.mark.parametrize(
    "header",
    [
        "top-key",
        "Basic top-key",
        "Bearer",
        "Bearer ",
        "Bearer top-key2",
        "bearer  top-ke",
        "Bearer TOP-KEY",
        "Bearer töp-key",
    ],
)
def test_only_the_exact_key_in_the_bearer_scheme_counts(header: str) -> None:
    with pytest.raises(Unauthorized):
        ADMIN.check("admin", {"authorization": header})
    ADMIN.check("admin", {"authorization": "bearer top-key"})


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_page_of_another_site_may_not_administer(site: str) -> None:
    with pytest.raises(Forbidden):
        NONE.check("admin", {"sec-fetch-site": site})
    NONE.check("admin", {"sec-fetch-site": "none"})
    NONE.check("inference", {"sec-fetch-site": site})


@pytest.mark.parametrize("peer", ["10.0.0.7", "192.0.2.1", "2001:db8::1", "::", "somewhere", ""])
def test_without_an_admin_key_only_callers_of_this_machine_may_administer(peer: str) -> None:
    for keys, given in ((NONE, "none"), (INFERENCE, "user-key")):
        headers = {"authorization": f"Bearer {given}"}
        with pytest.raises(Forbidden):
            keys.check("admin", headers, peer)
        keys.check("admin", headers, "127.0.0.1")
        keys.check("admin", headers, "::1")
    NONE.check("inference", {}, peer)
    BOTH.check("admin", {"authorization": "Bearer top-key"}, peer)


@scenario
async def test_a_proxy_that_listens_beyond_loopback_opens_no_admin_route(demo: Demo) -> None:
    """Serve's http_options.host is 0.0.0.0 unless told otherwise, and api.host does not know."""
    async with serving(demo) as server:
        elsewhere = httpx.ASGITransport(server.app, client=("192.0.2.1", 4711))
        async with httpx.AsyncClient(transport=elsewhere, base_url="http://api") as stranger:
            for path in ("/flush_cache?timeout=1", "/v1/cache/flush", "/abort_request"):
                assert (await stranger.post(path, json={})).status_code == 403, path
            assert (await stranger.get("/v1/cache")).status_code == 403
            assert (await stranger.get("/v1/models")).status_code == 200
        assert (await server.client.post("/flush_cache?timeout=10")).status_code == 200


def test_keys_never_show_themselves() -> None:
    assert "top-key" not in repr(BOTH)
    assert "user-key" not in repr(BOTH)


@scenario
async def test_every_route_but_health_asks_for_its_key(demo: Demo) -> None:
    async with serving(demo, keys=BOTH) as server:
        routes = [route for route in server.app.routes if isinstance(route, Route)]
        statuses: dict[str, set[int]] = {}
        for route in routes:
            path = route.path.replace("{flush_id}", "x").replace("{model:path}", "tiny")
            for method in (route.methods or set()) - {"HEAD"}:
                response = await server.client.request(method, path)
                statuses.setdefault(path, set()).add(response.status_code)
                assert "top-key" not in response.text
        assert statuses.pop("/health") == {200}
        assert set().union(*statuses.values()) == {401}
        as_user = {"authorization": "Bearer user-key"}
        info = [
            (await server.client.get(path, headers=as_user)).text
            for path in ("/server_info", "/model_info", "/v1/loads")
        ]
        assert not any("top-key" in text or "user-key" in text for text in info)
        assert (await server.client.get("/flush_cache", headers=as_user)).status_code == 403
        assert (
            await server.client.get("/flush_cache?timeout=10", headers={"authorization": "Bearer top-key"})
        ).status_code == 200
