"""The flags about who may call: of the server, and of clients that show who they are.

What it is not: the rules behind them (`serving/access.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from serving.access import AccessConfig, check_exposure
from serving.keys import KeyLimits

# Who may call
ApiKeys = Annotated[
    Path | None,
    typer.Option(
        help="File of keys, 'NAME KEY' or 'NAME KEY operator' a line, read again when it changes. Calls but those for "
        "health need one, as 'authorization: Bearer KEY'. Default: none are asked for."
    ),
]
KeyRequestsPerS = Annotated[
    float, typer.Option(min=0, help="Requests that each key may send, per second; 0: any number.")
]
KeyStreams = Annotated[int, typer.Option(min=0, help="Calls that each key may have open at once; 0: any number.")]
TlsCert = Annotated[Path | None, typer.Option(help="Certificate chain of both ports, PEM. Default: plain text.")]
TlsKey = Annotated[Path | None, typer.Option(help="Private key of --tls-cert, PEM. Default: none.")]
TlsClientCa = Annotated[
    Path | None,
    typer.Option(help="Only take clients whose certificate one of these signed, PEM. Default: any client."),
]
AllowAnyone = Annotated[
    bool,
    typer.Option("--allow-anyone", help="This flag lets --host go beyond loopback without keys and certificates."),
]

# Of clients
ApiKey = Annotated[str | None, typer.Option(envvar="LOONG_API_KEY", help="Key to show to the server. Default: none.")]
Tls = Annotated[bool, typer.Option("--tls", help="This flag talks TLS, trusting the authorities of this machine.")]
TlsCa = Annotated[Path | None, typer.Option(help="Talk TLS, trusting these authorities, PEM. Default: none.")]
ClientCert = Annotated[
    Path | None, typer.Option("--tls-cert", help="This client's certificate chain, PEM. Default: none.")
]
ClientKey = Annotated[Path | None, typer.Option("--tls-key", help="Private key of it, PEM. Default: none.")]


def access_config(
    *,
    host: str,
    api_keys: Path | None,
    key_requests_per_s: float,
    key_streams: int,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_client_ca: Path | None,
    allow_anyone: bool,
) -> AccessConfig:
    """Raises ConfigError."""
    limits = KeyLimits(key_requests_per_s, key_streams)
    config = AccessConfig(api_keys, limits, tls_cert, tls_key, tls_client_ca, allow_anyone)
    check_exposure(host, config)
    return config
