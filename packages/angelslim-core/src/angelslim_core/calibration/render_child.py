"""Renders chat templates under limits; run as a script, JSON on stdin and stdout. Imports nothing of ours.

Arguments: CPU seconds, bytes of address space, then folders to look for jinja2 in.
"""

from __future__ import annotations

import datetime
import json
import resource
import sys
from typing import Any

MAX_SAMPLE_CHARS = 10_000_000
MAX_TOTAL_CHARS = 256_000_000


def limit(cpu_seconds: int, memory_bytes: int) -> None:
    """Bound what this process may use from here on; no files, no processes of its own."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if sys.platform != "darwin":  # macOS refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))


def make_environment() -> Any:
    """A sandbox with the names that chat templates count on."""
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the assistant wrote; here it only stands for its content."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class PublicNamespace(Namespace):
        """A namespace that takes no underscored names: they would shadow Python's own."""

        def __init__(self, **values: Any) -> None:
            super().__init__()
            for name, value in values.items():
                self[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace may not hold {name!r}")
            super().__setitem__(name, value)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation])
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=refuse,
        strftime_now=lambda form: datetime.datetime.now().strftime(form),
        namespace=PublicNamespace,
        dict=lambda **values: values,
    )
    return environment


def render(request: dict[str, Any]) -> list[str]:
    """Each conversation of the request as text."""
    template = make_environment().from_string(request["template"])
    texts, total = [], 0
    for messages in request["conversations"]:
        given = {"tools": None, "documents": None, **request["special_tokens"]}
        given.update(messages=messages, add_generation_prompt=request["add_generation_prompt"])
        pieces, size = [], 0
        for piece in template.generate(given):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_SAMPLE_CHARS:
                raise ValueError(f"writes more than {MAX_SAMPLE_CHARS} characters")
        texts.append("".join(pieces))
        total += size
        if total > MAX_TOTAL_CHARS:
            raise ValueError(f"writes more than {MAX_TOTAL_CHARS} characters for all conversations together")
    return texts


def main() -> None:
    """Answer one request: {"texts": [...]} or {"error": one line}."""
    cpu_seconds, memory_bytes, *folders = sys.argv[1:]
    sys.path += folders
    limit(int(cpu_seconds), int(memory_bytes))
    request = json.load(sys.stdin.buffer)
    answer: dict[str, Any]
    try:
        answer = {"texts": render(request)}
    except MemoryError:
        answer = {"error": "needs too much memory"}
    except Exception as error:  # whatever a template raises is the template's failure, told to the parent
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
