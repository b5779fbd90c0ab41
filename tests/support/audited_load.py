"""A program: load checkpoint folders under an audit hook, and print what the interpreter did, as JSON.

    python -m tests.support.audited_load GOOD FOLDER...

GOOD is loaded first, unwatched, so that what is imported or compiled once is. Then for each FOLDER, a line with
{"outcome": "loaded" or the refusal, "placed": leaves placed, "events": [[name, first argument], ...]}.
"""

import json
import sys
from pathlib import Path

WATCHED = (
    "open",
    "os.",
    "exec",
    "compile",
    "import",
    "pickle.",
    "marshal.",
    "socket.",
    "subprocess.",
    "ctypes.",
    "shutil.",
    "urllib.",
    "glob.",
    "mmap.",
)


def load(folder: Path, placed: list) -> str:
    import jax

    from loong_jax.config import ConfigError
    from loong_jax.model.checkpoint import load_checkpoint
    from loong_jax.model.hf_config import read_config
    from loong_jax.model.untrusted import CheckpointError
    from serving.tokenizer import Tokenizer, TokenizerError

    try:
        config = read_config(folder)
        Tokenizer.load(folder)
        load_checkpoint(
            folder,
            config,
            tp=1,
            devices=[jax.devices()[:1]],
            stacked=False,
            progress=lambda *call: placed.append(call),
        )
    except (CheckpointError, ConfigError, TokenizerError) as refusal:
        return str(refusal)
    return "loaded"


def main() -> None:
    good, *folders = map(Path, sys.argv[1:])
    assert load(good, []) == "loaded"
    events: list[list[str]] = []
    watching = False

    def hook(event: str, args: tuple) -> None:
        if watching and event.startswith(WATCHED):
            events.append([event, str(args[0]) if args else ""])

    sys.addaudithook(hook)
    for folder in folders:
        events.clear()
        placed: list = []
        watching = True
        outcome = load(folder, placed)
        watching = False
        print(json.dumps({"outcome": outcome, "placed": len(placed), "events": events}), flush=True)


if __name__ == "__main__":
    main()
