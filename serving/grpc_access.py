"""Keys and TLS on the gRPC side: an interceptor that lets nobody in without a key, and the server's credentials.

What it is not: the rules (`serving/access.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc_health.v1 import health

from serving.access import Access, TlsFiles
from serving.errors import Refusal, end_call
from serving.keys import Key

_FREE = (f"/{health.SERVICE_NAME}/", "/jetstream_proto.Orchestrator/HealthCheck")
"""Whoever probes has no key."""


class KeyInterceptor(grpc.aio.ServerInterceptor):
    """`operator_methods`: full names, as in "/loong.v1.Loong/Drain", of those that need an operator's key."""

    def __init__(self, access: Access, operator_methods: frozenset[str]) -> None:
        self._access = access
        self._operator_methods = operator_methods

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: Any,
    ) -> Any:
        method = handler_call_details.method
        if method.startswith(_FREE):
            return await continuation(handler_call_details)
        authorization = dict(handler_call_details.invocation_metadata).get("authorization")
        try:
            key = self._access.authenticate(_text(authorization), operator=method in self._operator_methods)
        except Refusal as refusal:
            return _refusing(refusal)
        handler = await continuation(handler_call_details)
        return None if handler is None else _metered(handler, self._access, key)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Renewed certificates are taken by the next connection."""

    def configuration(pems: list[bytes]) -> grpc.ServerCertificateConfiguration:
        cert, key, *client_ca = pems
        return grpc.ssl_server_certificate_configuration([(key, cert)], client_ca[0] if client_ca else None)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        nonlocal taken
        pems = files.pems()
        if pems is taken:
            return None
        taken = pems
        return configuration(pems)

    taken = files.pems()
    # None is what it takes for "as before"; its stub does not know.
    return grpc.dynamic_ssl_server_credentials(configuration(taken), renewed, files.asks_clients)  # pyright: ignore[reportArgumentType]


def _text(value: str | bytes | None) -> str | None:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else value


def _refusing(refusal: Refusal) -> Any:
    """Of any kind of method: it ends the call and reads nothing of it."""

    async def refuse(requests: object, context: grpc.aio.ServicerContext) -> None:
        await end_call(context, refusal)

    return grpc.stream_stream_rpc_method_handler(refuse)  # pyright: ignore[reportArgumentType]


def _metered(handler: Any, access: Access, key: Key) -> Any:
    """The same method, counted as one of the key's open calls while it runs."""
    kind = {
        (False, False): ("unary_unary", grpc.unary_unary_rpc_method_handler),
        (False, True): ("unary_stream", grpc.unary_stream_rpc_method_handler),
        (True, False): ("stream_unary", grpc.stream_unary_rpc_method_handler),
        (True, True): ("stream_stream", grpc.stream_stream_rpc_method_handler),
    }[handler.request_streaming, handler.response_streaming]
    method = getattr(handler, kind[0])

    async def metered(request: object, context: grpc.aio.ServicerContext) -> Any:
        try:
            with access.call(key):
                answer = method(request, context)
                if not inspect.isasyncgen(answer):
                    return await answer
                async for message in answer:
                    await context.write(message)
        except Refusal as refusal:
            await end_call(context, refusal)

    return kind[1](metered, handler.request_deserializer, handler.response_serializer)
