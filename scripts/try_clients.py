"""Unmodified clients against a server of this checkout, each from an environment of its own, and what failed.

    python scripts/try_clients.py                      # starts a server with the default model on CPU; all of them
    python scripts/try_clients.py openai grpc          # these
    python scripts/try_clients.py --url http://HOST:8000 --target HOST:50051 --model FOLDER

openai: OpenAI's Python package; grpc: a health probe and a listing by reflection; lm-eval: local-completions with a
local task file; guidellm; jetstream: the benchmark in google-jetstream. The packages are installed with uv, else with
pip, into .cache/clients/NAME, so nothing of them is mixed with what the server needs. What it is not: a test of the
shapes (tests/serving).
"""

import argparse
import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

from clients import tools
from server_process import ROOT, server

from loong_jax.default_model import DEFAULT_MODEL

ENVIRONMENTS = ROOT / ".cache" / "clients"
PACKAGES = {
    "openai": (["openai>=2"],),
    "grpc": (["grpcio>=1.85.1", "grpcio-health-checking>=1.85.1", "grpcio-reflection>=1.85.1"],),
    "lm-eval": (["lm-eval[api]==0.4.13", "transformers>=5"],),
    "guidellm": (["torch==2.13.0"], ["guidellm==0.8.1"]),  # torch by itself: a build for CPU, where there is one
    # Without its dependencies, of which the benchmark imports these. The package also needs seqio, and with it all of
    # TensorFlow, for a tokenizer that is not used here: an empty one takes its place (`_stand_in`).
    "jetstream": (
        ["grpcio", "protobuf<7", "jax", "flax", "tiktoken", "blobfile", "numpy", "pandas", "tqdm", "nltk", "evaluate"],
        ["--no-deps", "google-jetstream==0.2.2"],
    ),
}
"""By client: what is installed, call by call."""

TEMPLATE = "{% for message in messages %}{{ message.content }}{% if not loop.last %}\n{% endif %}{% endfor %}"
"""The default model continues text and has no chat template: with this one a conversation is its texts."""
PROGRAMS = Path(__file__).with_name("clients")
TIMEOUT_S = 1800


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=f"of {', '.join(PACKAGES)}; none: all")
    parser.add_argument("--url", help="a server's HTTP address; absent: a server is started")
    parser.add_argument("--target", help="with --url: host and port of its gRPC")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="with --url: its checkpoint's folder")
    args = parser.parse_args()
    unknown = set(args.clients) - set(PACKAGES)
    if unknown or bool(args.url) != bool(args.target):
        parser.error(f"no client: {', '.join(unknown)}" if unknown else "--url and --target go together")
    clients = args.clients or list(PACKAGES)
    pythons = {client: environment(client) for client in clients}
    if args.url:
        return try_all(pythons, tools.Server(args.target, args.url, args.model))
    with started() as running:
        return try_all(pythons, running)


@contextlib.contextmanager
def started() -> Iterator[tools.Server]:
    """A server with the default model, and programs of one size each: it is the shell that is tried here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ladder = {"--instances": "1", "--prefill-buckets": "512", "--decode-buckets": "8"}
    flags = {"--platform": "cpu", **ladder, "--http-port": str(port)}
    with tempfile.TemporaryDirectory() as folder:
        model = shutil.copytree(DEFAULT_MODEL, Path(folder) / "needle")
        (model / "chat_template.jinja").write_text(TEMPLATE)
        with server(model, flags, Path(folder) / "server.log", print) as target:
            yield tools.Server(target, f"http://127.0.0.1:{port}", model)


def environment(client: str) -> Path:
    """The interpreter of an environment with the client's packages."""
    folder = ENVIRONMENTS / client
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder)
    found = os.environ.get("PIP_FIND_LINKS")  # pip sees it by itself
    links = ["--find-links", found] if found else []
    for packages in PACKAGES[client]:  # by the tools of this environment: some for each take a while to make
        if not _installed(packages, "uv", "pip", "install", "--quiet", "--python", python, *links):
            _installed(packages, "pip", "--python", python, "install", "--quiet", check=True)
    if client == "jetstream":
        _stand_in(next(folder.glob("lib/python*/site-packages")))
    return python


def _installed(packages: list[str], *words: str | Path, check: bool = False) -> bool:
    return subprocess.run([sys.executable, "-m", *words, *packages], check=check).returncode == 0


def _stand_in(site_packages: Path) -> None:
    """The two names of seqio that google-jetstream imports."""
    (site_packages / "seqio").mkdir(exist_ok=True)
    (site_packages / "seqio" / "__init__.py").touch()
    names = "class Vocabulary: ...\nclass SentencePieceVocabulary(Vocabulary): ...\n"
    (site_packages / "seqio" / "vocabularies.py").write_text(names)


def try_all(pythons: dict[str, Path], running: tools.Server) -> int:
    """Runs them one after the other; the exit status."""
    results = {client: try_one(client, python, running) for client, python in pythons.items()}
    print(
        *(f"{'ok     ' if ok else 'FAILED '} {client:10} {words}" for client, (ok, words) in results.items()), sep="\n"
    )
    return 0 if all(ok for ok, _ in results.values()) else 1


def try_one(client: str, python: Path, running: tools.Server) -> tuple[bool, str]:
    """Whether it got on with the server, and in words."""
    print(f"---- {client}", flush=True)
    start_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            words = TRIED[client](python, running, Path(folder))
        except Exception as error:
            traceback.print_exc()
            return False, f"{type(error).__name__}: {error}"[:300]
    return True, f"{words} ({time.monotonic() - start_s:.0f} s)"


def _openai(python: Path, running: tools.Server, folder: Path) -> str:
    subprocess.run([python, PROGRAMS / "openai_client.py", running.url], timeout=TIMEOUT_S, check=True)
    return "all cases"


def _grpc(python: Path, running: tools.Server, folder: Path) -> str:
    subprocess.run([python, PROGRAMS / "grpc_client.py", running.target], timeout=TIMEOUT_S, check=True)
    return "all cases"


TRIED: dict[str, Callable[[Path, tools.Server, Path], str]] = {
    "openai": _openai,
    "grpc": _grpc,
    "lm-eval": tools.lm_eval,
    "guidellm": tools.guidellm,
    "jetstream": tools.jetstream,
}


if __name__ == "__main__":
    sys.exit(main())
