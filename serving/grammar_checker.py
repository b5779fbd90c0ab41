"""A program that compiles the forms of structured answers in a process of its own: `serving/structured.py` starts it,
by its path, with the folder of the packages as its argument.

A form comes from a client, and some of a few bytes take minutes or gigabytes to compile; the limits of this process end
that, where a thread of the server could not be ended. What it says is a grammar compiles again in about the same time.
What it is not: the choice of forms and their bounds, or of what to do when one is refused.

Protocol, on standard input and output: a line of JSON each. The first is {"tokenizer_json", "vocab_size", "eos_ids",
"cpu_s", "wall_s", "memory_bytes"}; each later one {"kind", "text"} is answered by {"grammar"} or {"error"}.
"""

import json
import resource
import signal
import sys
from typing import Any

WHITE_SPACE = r"[ \t\n\r]{1,40}"
"""Between the tokens of JSON: bounded, so that no answer is white space without end."""
_MAX_ERROR_CHARS = 300


def grammar_of(kind: str, text: str) -> str:
    """In llguidance's form, not yet compiled. Raises ValueError and what else a bad form makes of itself."""
    import llguidance

    if kind == "json_object":
        kind, text = "json_schema", '{"type": "object"}'
    if kind == "json_schema":
        schema = json.loads(text)
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise ValueError("is no JSON object")
        return llguidance.LLMatcher.grammar_from_json_schema(schema, defaults={"whitespace_pattern": WHITE_SPACE})
    return llguidance.grammar_from(kind, text)  # pyright: ignore[reportArgumentType]


def answer(tokenizer, message: dict[str, Any]) -> dict[str, Any]:
    from loong_jax.grammar import compiled

    try:
        grammar = grammar_of(message["kind"], message["text"])
        compiled(tokenizer, grammar).compute_bitmask()
        return {"grammar": grammar}
    except Exception as error:
        return {"error": " ".join(str(error).split())[:_MAX_ERROR_CHARS] or type(error).__name__}


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    from loong_jax.grammar import open_tokenizer

    first = json.loads(sys.stdin.readline())
    tokenizer = open_tokenizer(first["tokenizer_json"], first["vocab_size"], first["eos_ids"])
    resource.setrlimit(resource.RLIMIT_AS, (first["memory_bytes"], first["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # both end the process, whatever it inherited
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGPROF, signal.SIGALRM))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, first["cpu_s"])
        signal.setitimer(signal.ITIMER_REAL, first["wall_s"])
        answered = answer(tokenizer, json.loads(line))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps(answered) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
