"""Certificates of authorities that tests make: files of a server, of clients, of a stranger."""

from pathlib import Path
from typing import NamedTuple

import trustme

from serving.access import AccessConfig
from serving.client import ClientIdentity


class Certificates(NamedTuple):
    """All paths are PEM files. `stranger` is signed by nobody that the server trusts."""

    ca: Path
    server_cert: Path
    server_key: Path
    client_cert: Path
    client_key: Path
    stranger_cert: Path
    stranger_key: Path

    def config(self, *, asks_clients: bool = False, keys: Path | None = None) -> AccessConfig:
        return AccessConfig(
            keys=keys,
            tls_cert=self.server_cert,
            tls_key=self.server_key,
            tls_client_ca=self.ca if asks_clients else None,
        )

    def identity(self, *, api_key: str | None = None, with_cert: bool = False) -> ClientIdentity:
        cert, key = (self.client_cert, self.client_key) if with_cert else (None, None)
        return ClientIdentity(api_key, tls_ca=self.ca, tls_cert=cert, tls_key=key)


def make_certificates(folder: Path, authority: trustme.CA | None = None) -> Certificates:
    """Files in `folder`; with `authority` they are signed anew by that one."""
    authority, others = authority or trustme.CA(), trustme.CA()
    made = Certificates(*(folder / f"{name}.pem" for name in Certificates._fields))
    authority.cert_pem.write_to_path(str(made.ca))
    for cert, cert_path, key_path in (
        (authority.issue_cert("localhost", "127.0.0.1", "::1"), made.server_cert, made.server_key),
        (authority.issue_cert("client"), made.client_cert, made.client_key),
        (others.issue_cert("stranger"), made.stranger_cert, made.stranger_key),
    ):
        cert_path.write_bytes(b"".join(blob.bytes() for blob in cert.cert_chain_pems))
        cert.private_key_pem.write_to_path(str(key_path))
    return made
