"""Protos and their generated stubs (`scripts/gen_proto.py`)."""
