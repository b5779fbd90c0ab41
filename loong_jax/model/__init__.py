"""Decoder models, their checkpoints, sampling, and the single-device oracle (DESIGN 5). Floor 4."""
