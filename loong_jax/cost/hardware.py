"""Published peak figures of accelerators: what the roofline divides by.

A record is one *device* as JAX counts devices and as `tp` does: a GPU, a TPU chip, and for tpu7x one of the two cores
of a chip. Rates are in one direction. Sources:

* A100, H100, H200: NVIDIA's data sheets of the SXM parts, dense bf16 (half of the figure with sparsity); NVLink 600,
  900 and 900 GB/s in both directions together. A800: an A100-80G SXM with NVLink cut to 400 GB/s (LoongServe 7).
* TPU v5e, v5p, v6e: "How to Scale Your Model", chapter on TPUs (jax-ml/scaling-book): one ICI link, one way.
* tpu7x: the TPU7x page of Google Cloud's documentation, per chip 2307 TFLOP/s, 192 GiB at 7380 GB/s, 1200 GB/s of ICI
  both ways over six links; a device has half of the compute and memory.
* Latencies: the smallest messages of the send/recv profiles in vidur (data/profiling/network, A100 and H100 DGX);
  about 1 us a hop on ICI, by the scaling book.

What it is not: what software reaches (`roofline.Efficiency`), or links as measured (`links.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec


class Hardware(msgspec.Struct, frozen=True):
    """Peaks of one device. `link_bytes_per_s`: to a neighbour in a ring of devices, one way, inside a node (switch) or
    slice (torus). `link_latency_s`: of the smallest message. `node_devices`: devices that share such links."""

    name: str
    flops: float  # dense bf16 FLOP/s
    hbm_bytes_per_s: float
    hbm_bytes: float
    link_bytes_per_s: float
    link_latency_s: float
    node_devices: int
    topology: str  # "switch": any pair at full rate; "torus": neighbours


_GIB = float(1 << 30)

_RECORDS = (
    Hardware("A800", 312e12, 2.039e12, 80e9, 200e9, 8e-6, 8, "switch"),
    Hardware("A100", 312e12, 2.039e12, 80e9, 300e9, 8e-6, 8, "switch"),
    Hardware("H100", 989e12, 3.35e12, 80e9, 450e9, 5e-6, 8, "switch"),
    Hardware("H200", 989e12, 4.8e12, 141e9, 450e9, 5e-6, 8, "switch"),
    Hardware("v5e", 197e12, 0.81e12, 16e9, 45e9, 1e-6, 256, "torus"),
    Hardware("v5p", 459e12, 2.8e12, 96e9, 90e9, 1e-6, 8960, "torus"),
    Hardware("v6e", 920e12, 1.6e12, 32e9, 90e9, 1e-6, 256, "torus"),
    Hardware("tpu7x", 2307e12 / 2, 7.38e12 / 2, 96 * _GIB, 100e9, 1e-6, 18432, "torus"),
)

HARDWARE: Mapping[str, Hardware] = MappingProxyType({record.name: record for record in _RECORDS})


def hardware(name: str) -> Hardware:
    """Raises ValueError that lists the names there are."""
    if name not in HARDWARE:
        raise ValueError(f"hardware: {name!r} is none of {', '.join(HARDWARE)}")
    return HARDWARE[name]
