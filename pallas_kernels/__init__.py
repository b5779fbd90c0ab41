"""Attention over part of a context, and the pages it is read from. DESIGN section 6.

One folder per op: `__init__.py` (the public function), `reference.py` (same signature, readable), `blockwise.py` (pure
JAX, fast on CPU, right everywhere). `partial.py` is the merge law, `storage.py` the layout of KV pages, `dispatch.py`
chooses an implementation. Imports jax alone and knows nothing of `loong_jax`. Import the ops from their modules.
"""
