"""The small model that comes with Loong: it finds pass keys, key-value pairs and marked lines in long contexts.

The files beside it are a Hugging Face checkpoint; README.md is its model card. What it is not: a model that chats.
"""

from pathlib import Path

DEFAULT_MODEL = Path(__file__).resolve().parent
"""The checkpoint's folder."""
