"""Generate the Python stubs of serving/proto; `--check` only tells whether they are up to date.

The stubs are checked in, so that using Loong needs no compiler. Needs `grpcio-tools`.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO_ROOT = ROOT / "serving" / "proto"
PROTOS = ("loong/v1/loong.proto", "loong/control/v1/control.proto", "jetstream/jetstream.proto")


def generate(out: Path) -> list[Path]:
    """Write the stubs of all protos below `out`, and return their paths relative to it."""
    from grpc_tools import protoc

    status = protoc.main(
        [
            "protoc",
            f"-I{PROTO_ROOT}",
            f"--python_out={out}",
            f"--pyi_out={out}",
            f"--grpc_python_out={out}",
            *PROTOS,
        ]
    )
    if status != 0:
        raise SystemExit(f"protoc ended with status {status}")
    stubs = []
    for proto in PROTOS:
        stem = Path(proto).with_suffix("")
        package = ".".join(stem.parent.parts)
        grpc_stub = out / f"{stem}_pb2_grpc.py"
        # protoc knows packages by the path below its root; ours live below serving.proto.
        text = grpc_stub.read_text()
        grpc_stub.write_text(text.replace(f"from {package} import", f"from serving.proto.{package} import"))
        stubs += [Path(f"{stem}{suffix}") for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py")]
    return stubs


def main() -> None:
    if sys.argv[1:] not in ([], ["--check"]):
        raise SystemExit("usage: gen_proto.py [--check]")
    if not sys.argv[1:]:
        generate(PROTO_ROOT)
        return
    with tempfile.TemporaryDirectory() as directory:
        stale = [
            stub
            for stub in generate(Path(directory))
            if not (PROTO_ROOT / stub).exists()
            or (PROTO_ROOT / stub).read_text() != (Path(directory) / stub).read_text()
        ]
    if stale:
        raise SystemExit("stale, run scripts/gen_proto.py: " + ", ".join(map(str, stale)))


if __name__ == "__main__":
    main()
