"""Record what `transformers` makes of the conversations in tests/fixtures/chat, with each template there.

Runs where `transformers` is installed, as record_transformers.py does, and imports nothing of the project. Writes
tests/fixtures/chat/recorded.json: template -> one text per conversation, or {"error": words} where it refuses.
"""

import json
from pathlib import Path

from transformers.utils import chat_template_utils  # pyright: ignore[reportMissingImports]

FOLDER = Path(__file__).parents[1] / "tests/fixtures/chat"
NOW_S = 1_750_000_000
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


class FixedTime(chat_template_utils.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(NOW_S)


def render(template: str, conversation: list[list[str]]) -> str | dict[str, str]:
    messages = [{"role": role, "content": content} for role, content in conversation]
    try:
        rendered = chat_template_utils.render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **TOKENS
        )
    except Exception as error:
        return {"error": str(error)}
    return rendered[0][0]


def main() -> None:
    chat_template_utils.datetime = FixedTime
    conversations = json.loads((FOLDER / "conversations.json").read_text(encoding="utf-8"))
    recorded = {
        path.stem: [render(path.read_text(encoding="utf-8"), conversation) for conversation in conversations]
        for path in sorted(FOLDER.glob("*.jinja"))
    }
    text = json.dumps(recorded, ensure_ascii=False, indent=1) + "\n"
    (FOLDER / "recorded.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
