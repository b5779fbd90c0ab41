"""Unmodified clients against a server of this checkout: OpenAI's Python package, from an environment of its own.

    python scripts/try_clients.py                      # starts a server with the default model, two instances on CPU
    python scripts/try_clients.py --url http://HOST:8000

The package is installed with pip into .cache/clients, so nothing of it is mixed with what the server needs. What it is
not: a test of the shapes (tests/serving/http).
"""

import argparse
import shutil
import socket
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from server_process import ROOT, server

from loong_jax.default_model import DEFAULT_MODEL

ENVIRONMENT = ROOT / ".cache" / "clients"
PACKAGES = ("openai>=2",)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
"""The default model continues text and has no chat template: with this one a conversation is its texts."""
CLIENT = Path(__file__).with_name("clients") / "openai_client.py"
TIMEOUT_S = 600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a server's HTTP address; absent: one is started")
    parser.add_argument("--instances", default="2", help="of the server that is started")
    args = parser.parse_args()
    python = environment()
    if args.url:
        return run(python, args.url)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = {"--platform": "cpu", "--instances": args.instances, "--http-port": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        model = shutil.copytree(DEFAULT_MODEL, Path(folder) / "needle")
        (model / "chat_template.jinja").write_text(TEMPLATE)
        with server(model, flags, Path(folder) / "server.log", print):
            return run(python, f"http://127.0.0.1:{port}")


def environment() -> Path:
    """The interpreter of an environment with the clients' packages."""
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    return python


def run(python: Path, url: str) -> int:
    return subprocess.run([python, CLIENT, url], timeout=TIMEOUT_S, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
