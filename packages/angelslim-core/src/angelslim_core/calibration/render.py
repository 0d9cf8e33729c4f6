"""Chat templates are hostile: the sandbox stops code, not cost, so they are rendered in a child with limits."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import ModelError

CPU_SECONDS = 10
MEMORY_BYTES = 2 << 30
# a loaded machine gives a child less than one core
WALL_SECONDS = 60
_WHERE = "chat template"
_HINT = "repair the template, or set calibration.template to none"
# what a Python may need to start and to tell the time; nothing else of the environment is passed on
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


def template_of(tokenizer: Any) -> str | None:
    """The tokenizer's chat template (the one named "default" where it has several), or None."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, Mapping):
        template = template.get("default")
    return template if isinstance(template, str) and template else None


def special_tokens_of(tokenizer: Any) -> dict[str, str]:
    """`bos_token`, `eos_token`... as a chat template sees them."""
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items() if not isinstance(token, (list, tuple, dict))}


def render_chats(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool = False,
) -> list[str]:
    """Each conversation as text, all rendered by one child process with limits on time, memory and output.

    Args:
        template: Jinja source.
        conversations: lists of messages, each with at least `role` and `content`; JSON only.
        special_tokens: variables such as `bos_token`.
        add_generation_prompt: end with what makes the assistant speak.

    Returns:
        one text per conversation, at most 10 million characters long.

    Raises:
        ModelError: the template fails, or exceeds a limit.
    """
    if not conversations:
        return []
    request = {
        "template": template,
        "conversations": conversations,
        "special_tokens": dict(special_tokens),
        "add_generation_prompt": add_generation_prompt,
    }
    child = Path(__file__).with_name("render_child.py")
    command = [sys.executable, "-I", str(child), str(CPU_SECONDS), str(MEMORY_BYTES), *_folders("jinja2", "markupsafe")]
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    try:
        done = subprocess.run(command, input=json.dumps(request).encode(), capture_output=True, timeout=WALL_SECONDS, env=environment, check=False)
    except subprocess.TimeoutExpired:
        raise ModelError(60, _WHERE, f"was not rendered within {WALL_SECONDS} s", _HINT) from None
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ModelError(61, _WHERE, f"was stopped: it needs more than {CPU_SECONDS} s of processor time", _HINT)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2][:300]
        raise ModelError(62, _WHERE, f"ended its renderer with status {done.returncode}{': ' if last else ''}{last}", _HINT)
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ModelError(63, _WHERE, f"cannot be rendered: {answer['error']}", _HINT)
    return list(answer["texts"])


def _folders(*packages: str) -> list[str]:
    """Where packages lie: an isolated Python does not look at PYTHONPATH or the user's own folder."""
    found = []
    for package in packages:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin:
            found.append(str(Path(spec.origin).parent.parent))
    return list(dict.fromkeys(found))
