"""Compiles step programs ahead of time for TPU v5e:2x4 and prints their memory and kernels, one JSON object each.

    python -m tests.loong_jax.esp.tpu_memory prefill,3,64 decode,8,128,reference   (phase, DoP, head_dim, attention)

Run as a program by `test_steps.py`: libtpu reads its settings once per process and ends it on some errors. It needs no
TPU.
"""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import msgspec
from jax.experimental import topologies

from loong_jax.config import ClusterConfig, LadderConfig, ModelConfig
from loong_jax.types import Phase, Program
from tests.support.collectives import permute_overlaps
from tests.support.compiled import compile_step, kernels_of, memory_in

MODEL = ModelConfig(
    family="llama",
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=1024,
    num_layers=2,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    max_position=8192,
    dtype="bfloat16",
)
# 256 MiB of pool on each device.
CLUSTER = ClusterConfig(
    num_instances=8, pages_per_instance=4096, slots=64, ladder=LadderConfig(prefill_tokens=(512,), decode_rows=(8,))
)
BUCKET = {Phase.PREFILL: 512, Phase.DECODE: 8}


def main(wanted: list[str]) -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    for words in wanted:
        phase, dop, head_dim, *attention = words.split(",")
        cluster = msgspec.structs.replace(CLUSTER, attention=attention[0]) if attention else CLUSTER
        model = msgspec.structs.replace(MODEL, head_dim=int(head_dim))
        program = Program(Phase(phase), int(dop), BUCKET[Phase(phase)])
        compiled = compile_step(model, cluster, program, list(devices), "tpu")
        memory = memory_in(compiled, model, cluster, program, "tpu")
        overlaps, num_sync = permute_overlaps(compiled.as_text())
        report = {
            "program": words,
            "memory": memory,
            "kernels": kernels_of(compiled),
            "permute_overlaps": overlaps,
            "num_sync_permutes": num_sync,
        }
        print(msgspec.json.encode(report).decode(), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
