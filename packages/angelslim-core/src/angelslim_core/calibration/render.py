"""Chat templates are hostile: the sandbox stops code, not cost, so they are rendered in a child with limits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError

CPU_SECONDS = 10
MEMORY_BYTES = 2 << 30
_WHERE = "chat template"


def template_of(tokenizer: Any) -> str | None:
    """The tokenizer's chat template ("default" where it has several), or None."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


def render_chats(
    template: str, conversations: Sequence[Sequence[Mapping[str, Any]]], special_tokens: Mapping[str, str], add_generation_prompt: bool = False
) -> list[str]:  # fmt: skip
    """Each conversation as text.

    Args:
        conversations: lists of `{role, content}`.
        special_tokens: variables such as `bos_token`.

    Raises:
        ModelError: the template fails, or takes too much time or memory.
    """
    request = {
        "template": template, "conversations": conversations, "special_tokens": special_tokens, "add_generation_prompt": add_generation_prompt,
        "cpu_seconds": CPU_SECONDS, "memory_bytes": MEMORY_BYTES,
    }  # fmt: skip
    try:
        child = subprocess.run(
            [sys.executable, "-I", str(Path(__file__).with_name("render_child.py"))],
            input=json.dumps(request), capture_output=True, text=True, timeout=3 * CPU_SECONDS, env={}, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(60, _WHERE, f"took longer than {3 * CPU_SECONDS} s") from None
    if child.returncode:
        raise ModelError(61, _WHERE, f"took more than {CPU_SECONDS} s or {MEMORY_BYTES >> 30} GiB (ended with {child.returncode})")
    answer = json.loads(child.stdout)
    if "error" in answer:
        raise ModelError(62, _WHERE, f"cannot be rendered: {answer['error']}")
    return list(answer["texts"])
