"""Programs that are clients of a server: how each is called, and what of its results says that it got on with it.

What it is: for each program a function that runs it, as its users do, and raises where it failed. The programs are in
environments of their own (`scripts/try_clients.py`), unchanged. What it is not: OpenAI's package or gRPC's, which are
libraries (`openai_client.py`, `grpc_client.py`).
"""

import base64
import json
import os
import random
import subprocess
from pathlib import Path
from typing import NamedTuple

TIMEOUT_S = 1800
NUM_DOCUMENTS = 8


class Server(NamedTuple):
    """`target`: host and port of gRPC; `url`: of HTTP; `model`: its checkpoint's folder, for tokenizers."""

    target: str
    url: str
    model: Path


def lm_eval(python: Path, server: Server, folder: Path) -> str:
    """`local-completions` with a task file of this machine: answers that are generated, and choices by their
    log-probabilities, from echoed prompts of token ids."""
    write_lm_eval_tasks(folder)
    arguments = {
        "model": served_name(python, server),
        "base_url": f"{server.url}/v1/completions",
        "tokenizer": server.model,
        "tokenizer_backend": "huggingface",
        "num_concurrent": 4,
        "max_length": 2048,
        "timeout": TIMEOUT_S,
    }
    run(
        [python.with_name("lm_eval"), "run", "--model", "local-completions", "--include_path", folder],
        ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())],
        ["--tasks", "loong_generated,loong_chosen", "--output_path", folder / "out", "--seed", "1"],
        folder,
    )
    (path,) = folder.glob("out/**/results_*.json")
    results = json.loads(path.read_text())["results"]
    exact, chosen = results["loong_generated"]["exact_match,none"], results["loong_chosen"]["acc,none"]
    assert min(exact, chosen) >= 0.75, (exact, chosen)
    return f"exact match {exact:.2f}, accuracy of choices {chosen:.2f}"


def write_lm_eval_tasks(folder: Path) -> None:
    rng = random.Random(0)
    documents = []
    for _ in range(NUM_DOCUMENTS):
        keys = [f" {rng.randrange(10_000, 100_000)}" for _ in range(3)]
        label = rng.randrange(3)
        text = (
            f"The sky is blue. The pass key is{keys[label]}. The sun is yellow.\nWhat is the pass key? The pass key is"
        )
        documents.append({"text": text, "choices": keys, "label": label, "answer": keys[label]})
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "target_delimiter": "",
    }
    generated = {
        "task": "loong_generated",
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    chosen = {
        "task": "loong_chosen",
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    for task in (generated, chosen):  # JSON is YAML
        (folder / f"{task['task']}.yaml").write_text(json.dumps(common | task))


def guidellm(python: Path, server: Server, folder: Path) -> str:
    """Synthetic prompts over streamed completions, several at a time."""
    run(
        [python.with_name("guidellm"), "run", "--disable-console-interactive"],
        ["--backend", f"kind=openai_http,target={server.url},request_format=/v1/completions"],
        ["--profile", "kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=12"],
        ["--tokenizer", f"kind=huggingface_auto,model={server.model}"],
        ["--data", "kind=synthetic_text,prompt_tokens=64,output_tokens=16"],
        ["--output", f"kind=json,path={folder / 'guidellm.json'}"],
        folder,
    )
    report = json.loads((folder / "guidellm.json").read_text())
    totals = report["benchmarks"][0]["metrics"]["request_totals"]
    assert totals["errored"] == 0, totals
    assert totals["successful"] >= 12, totals
    return f"{totals['successful']} requests, none failed"


def jetstream(python: Path, server: Server, folder: Path) -> str:
    """The benchmark of google-jetstream 0.2.2: token ids in, token ids out, over gRPC."""
    tokens = write_tiktoken(server.model, folder)
    conversations = [
        {
            "conversations": [
                {"from": "human", "value": f"The pass key is {key}. " * 4},
                {"from": "gpt", "value": "Yes. " * 8},
            ]
        }
        for key in range(10_000, 10_024)
    ]
    (folder / "sharegpt.json").write_text(json.dumps(conversations))
    host, port = server.target.rsplit(":", 1)
    script = next(python.parent.parent.glob("lib/python*/site-packages/benchmarks/benchmark_serving.py"))
    run(
        [python, script, "--server", host, "--port", port, "--model", "llama-3", "--tokenizer", tokens],
        ["--dataset", "sharegpt", "--dataset-path", folder / "sharegpt.json", "--num-prompts", "12"],
        ["--max-output-length", "16", "--disable-tqdm", "--save-result"],
        ["--additional-metadata-metrics-to-save", "{}"],
        folder,
    )
    (path,) = folder.glob("JetStream-*.json")
    metrics = json.loads(path.read_text())["metrics"]
    assert metrics["completed"] == 12, metrics
    assert metrics["total_output_tokens"] >= 12, metrics
    return f"{metrics['completed']} requests, {metrics['total_output_tokens']} tokens"


def write_tiktoken(model: Path, folder: Path) -> Path:
    """The checkpoint's byte-level tokenizer as a file of tiktoken's, which the benchmark reads for llama-3."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    special = {token["content"] for token in tokenizer["added_tokens"]}
    lines = [
        f"{base64.b64encode(bytes(byte_of[char] for char in text)).decode()} {rank}\n"
        for text, rank in sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
        if text not in special
    ]
    path = folder / "tokenizer.tiktoken"
    path.write_text("".join(lines))
    return path


def served_name(python: Path, server: Server) -> str:
    """What /v1/models says, as everything that is asked of it."""
    code = "import json, sys, urllib.request as u; print(json.load(u.urlopen(sys.argv[1]))['data'][0]['id'])"
    asked = [python, "-c", code, f"{server.url}/v1/models"]
    return subprocess.run(asked, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def run(*parts: list | Path) -> None:
    """Run the command of all lists in the last part, a folder. Raises CalledProcessError, TimeoutExpired."""
    *lists, folder = parts
    command = [str(word) for part in lists if isinstance(part, list) for word in part]
    home = {"HF_HOME": str(Path(str(folder)) / "hf"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    subprocess.run(command, cwd=str(folder), env={**os.environ, **home}, timeout=TIMEOUT_S, check=True)
