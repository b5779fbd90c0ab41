"""Keys and TLS over HTTP: everything but /health asks for a key; certificates both ways."""

import asyncio
import ssl

import httpx
import pytest

from serving.access import AccessConfig
from serving.keys import KeyLimits
from tests.support.certificates import Certificates, make_certificates
from tests.support.live_http import live_http

ALICE = "alice-0123456789"
SHOWN = {"authorization": f"Bearer {ALICE}"}
BODY = {"prompt": "hey", "max_tokens": 2}


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys"
    path.write_text(f"alice {ALICE}\n")
    return path


def test_everything_but_health_needs_a_key(keys):
    async def run():
        async with live_http(access=AccessConfig(keys=keys)) as live:
            assert (await live.http.get("/health")).status_code == 200
            paths = ("/v1/models", "/v1/completions", "/tokenize", "/metrics", "/version", "/nothing", "/health/x", "/")
            for path in paths:
                for headers in ({}, {"authorization": ALICE}, {"authorization": "Bearer wrong-0123456789"}):
                    answer = await live.http.get(path, headers=headers)
                    assert answer.status_code == 401, path
                    assert answer.headers["www-authenticate"] == "Bearer"
                    assert answer.json()["error"]["code"] == "invalid_api_key"
            answer = await live.http.post("/v1/completions", json=BODY, headers=SHOWN)
            assert answer.json()["usage"]["completion_tokens"] == 2
            assert (await live.http.get("/metrics", headers=SHOWN)).status_code == 200

    asyncio.run(run())


def test_the_rate_of_a_key_is_a_429_with_a_hint(keys):
    async def run():
        config = AccessConfig(keys=keys, limits=KeyLimits(requests_per_s=0.5))
        async with live_http(access=config) as live:
            answers = [await live.http.get("/version", headers=SHOWN) for _ in range(3)]
            assert [answer.status_code for answer in answers] == [200, 429, 429]
            assert answers[1].json()["error"]["code"] == "key_limit"
            assert answers[1].headers["retry-after"] == "2"

    asyncio.run(run())


def test_open_calls_of_a_key(keys):
    async def run():
        config = AccessConfig(keys=keys, limits=KeyLimits(streams=1))
        async with live_http(access=config, step_s=0.002) as live:
            body = {"prompt": "hey", "max_tokens": 2000, "stream": True}
            async with live.http.stream("POST", "/v1/completions", json=body, headers=SHOWN) as response:
                await anext(response.aiter_lines())
                assert (await live.http.get("/version", headers=SHOWN)).status_code == 429
            for _ in range(200):
                if (await live.http.get("/version", headers=SHOWN)).status_code == 200:
                    return
                await asyncio.sleep(0.01)
            raise AssertionError("the place was not given back")

    asyncio.run(run())


def client_context(made: Certificates, *, with_cert: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(made.ca))
    if with_cert:
        context.load_cert_chain(made.client_cert, made.client_key)
    return context


async def version(url: str, context: ssl.SSLContext) -> int:
    async with httpx.AsyncClient(base_url=url, verify=context, timeout=60) as client:
        return (await client.get("/version")).status_code


def test_tls_renewed_certificates_and_those_of_clients(tmp_path):
    made = make_certificates(tmp_path)
    other = make_certificates((tmp_path / "other").mkdir() or tmp_path / "other")

    async def run():
        async with live_http(access=made.config(asks_clients=True), identity=made.identity(with_cert=True)) as live:
            assert await version(live.url, client_context(made, with_cert=True)) == 200
            with pytest.raises(httpx.TransportError):
                await version(live.url, client_context(made))
        async with live_http(access=made.config(), identity=made.identity()) as live:
            assert await version(live.url, client_context(made)) == 200
            for source, target in ((other.server_cert, made.server_cert), (other.server_key, made.server_key)):
                target.write_bytes(source.read_bytes())
            assert await version(live.url, client_context(other)) == 200
            with pytest.raises(httpx.ConnectError):
                await version(live.url, client_context(made))

    asyncio.run(run())
