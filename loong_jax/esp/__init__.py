"""Elastic sequence parallelism on devices: groups, prefill, decode, transfers."""
