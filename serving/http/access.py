"""Keys on the HTTP side: nothing but health is answered without one.

What it is not: the rules (`serving/access.py`).
"""

from __future__ import annotations

import contextlib

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.access import Access
from serving.errors import Refusal
from serving.http import errors

_FREE = "/health"
"""Whoever probes has no key."""


class KeyMiddleware:
    """An ASGI application around another."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == _FREE:
            return await self._app(scope, receive, send)
        with contextlib.ExitStack() as calls:
            try:
                key = self._access.authenticate(Headers(scope=scope).get("authorization"))
                calls.enter_context(self._access.call(key))
            except Refusal as refusal:
                headers = {name.decode(): value.decode() for name, value in errors.headers(refusal)}
                answer = JSONResponse(errors.body(refusal), errors.status(refusal), headers)
                return await answer(scope, receive, send)
            await self._app(scope, receive, send)
