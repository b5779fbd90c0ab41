"""Loong: elastic sequence parallelism for long-context LLM serving on TPUs and GPUs, in JAX and Pallas."""

__version__ = "0.1.0"
