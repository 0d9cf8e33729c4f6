"""Renders chat templates under limits; run as a script, JSON on stdin and stdout. Imports nothing of ours."""

import datetime
import json
import resource
import sys

from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_OUTPUT = 10_000_000


def refuse(message: str) -> None:
    raise ValueError(message)


def main() -> None:
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_CPU, (request["cpu_seconds"], request["cpu_seconds"]))
    resource.setrlimit(resource.RLIMIT_AS, (request["memory_bytes"], request["memory_bytes"]))
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.datetime.now().strftime(form))
    try:
        template = environment.from_string(request["template"])
        texts = []
        for messages in request["conversations"]:
            text = ""
            for piece in template.generate(messages=messages, add_generation_prompt=request["add_generation_prompt"], **request["special_tokens"]):
                text += piece
                if len(text) > MAX_OUTPUT:
                    raise ValueError(f"more than {MAX_OUTPUT} characters")
            texts.append(text)
        answer = {"texts": texts}
    except MemoryError:
        answer = {"error": "out of memory"}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"[:500]}
    json.dump(answer, sys.stdout)


main()
