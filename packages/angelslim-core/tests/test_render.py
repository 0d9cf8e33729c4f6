"""Chat templates: as transformers renders them, and harmless where they are hostile."""

import json
import os
import time
from types import SimpleNamespace

import pytest

from angelslim_core.calibration import render
from angelslim_core.calibration.render import render_chats, template_of
from angelslim_core.errors import ModelError

CHATML = """{{- bos_token }}
{%- set ns = namespace(count=0) %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}{% continue %}{% endif %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {% if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {{- call | tojson }}{{ call | tojson(indent=2) }}
        {%- endfor %}
    {% endif %}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{ message.content | trim }}{% endgeneration %}
    {%- else %}{{ message.content }}{% endif %}
    {{- '<|im_end|>' }}
{% endfor %}
{% if tools is none and documents is none %}{{ ns.count }}{% endif %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHATS = [
    [
        {"role": "system", "content": "Be <b>brief</b> & kind."},
        {"role": "user", "content": "naïve 日本 \U0001f600\n"},
        {"role": "assistant", "content": "  ok "},
    ],
    [
        {"role": "skip", "content": "x"},
        {"role": "user", "content": "{{ 7 * 7 }}", "tool_calls": [{"name": "f<>'é", "arguments": {"b": 1, "a": [None, 1.5]}}]},
    ],
]


@pytest.mark.parametrize("prompt", [False, True])
def test_agrees_with_transformers(prompt):
    from transformers.utils.chat_template_utils import render_jinja_template

    theirs, _ = render_jinja_template(conversations=CHATS, chat_template=CHATML, add_generation_prompt=prompt, bos_token="<s>")
    assert render_chats(CHATML, CHATS, {"bos_token": "<s>"}, prompt) == theirs
    assert "{{ 7 * 7 }}" in theirs[1] and "<b>" in theirs[0]


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 2000000000 }}",
        "{{ 'a' * 9000000000 }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% for k in range(100000) %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{{ 'a' * 100000 }}{% endfor %}",
        "{% set ns = namespace(s='a') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s }}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ '%099999999999d' % 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    ],
)
def test_cost_is_bounded(template, monkeypatch):
    monkeypatch.setattr(render, "CPU_SECONDS", 2)
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        render_chats(template, [[]], {})
    assert time.monotonic() - start < 15
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 and caught.value.hint


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__code__.co_code }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
        "{{ ('{0.__class__.__mro__}' | attr('format'))(1).x }}{{ '{0.__class__}'.format(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns }}",
        "{{ namespace(__html__=1) }}",
        "{% set x = messages.append(1) %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ dict.__base__ }}{{ dict().__class__.__base__.__subclasses__() }}",
    ],
)
def test_sandbox_holds(template, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="cannot be rendered"):
        render_chats(template, [[]], {})
    assert not list(tmp_path.iterdir())


def test_template_failure_is_one_line():
    with pytest.raises(ModelError, match=r"roles must alternate in turn$") as caught:
        render_chats("{{ raise_exception('roles must\nalternate in turn') }}", CHATS, {})
    assert caught.value.code == "AS-MOD-063"
    with pytest.raises(ModelError, match="TemplateSyntaxError"):
        render_chats("{% for %}", CHATS, {})


def test_messages_are_not_shadowed_and_nothing_leaks(monkeypatch):
    assert render_chats("{{ messages | length }}{{ missing }}", CHATS, {"messages": "mine"}) == ["3", "2"]
    monkeypatch.setitem(os.environ, "SECRET_TOKEN", "s3cret")
    monkeypatch.setitem(os.environ, "PYTHONSTARTUP", "/nonexistent")
    seen = {}
    run = render.subprocess.run

    def spy(command, **options):
        seen.update(options["env"])
        return run(command, **options)

    monkeypatch.setattr(render.subprocess, "run", spy)
    assert render_chats("{{ strftime_now('%Y') | length }}", [[]], {}) == ["4"]
    assert not set(seen) - {"LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ"}


def test_output_just_below_the_cap():
    (text,) = render_chats("{{ 'ab' * 5000000 }}", [[]], {})
    assert len(text) == 10_000_000
    with pytest.raises(ModelError, match="10000000 characters"):
        render_chats("{{ 'ab' * 5000000 }}c", [[]], {})


def test_one_child_for_all(monkeypatch):
    calls = []
    run = render.subprocess.run
    monkeypatch.setattr(render.subprocess, "run", lambda *a, **k: calls.append(json.loads(k["input"])) or run(*a, **k))
    assert render_chats("{{ messages[0].content }}", [[{"role": "user", "content": str(i)}] for i in range(50)], {}) == [str(i) for i in range(50)]
    assert len(calls) == 1
    assert render_chats("never rendered {{", [], {}) == [] and len(calls) == 1


def test_wall_clock(monkeypatch):
    monkeypatch.setattr(render, "WALL_SECONDS", 0.3)
    with pytest.raises(ModelError, match=r"within 0\.3 s"):
        render_chats("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", [[]], {})


def test_template_of():
    assert template_of(SimpleNamespace(chat_template="x")) == "x"
    assert template_of(SimpleNamespace(chat_template={"tool_use": "y", "default": "x"})) == "x"
    assert template_of(SimpleNamespace(chat_template={"tool_use": "y"})) is None
    assert template_of(SimpleNamespace(chat_template=None)) is None
    assert template_of(SimpleNamespace()) is None
