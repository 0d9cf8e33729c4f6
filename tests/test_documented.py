"""The docs say what the code does: generated parts, hooks, passes, recipes, command lines and the example plugin."""

import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType

import click
import pytest

from angelslim_core import compress, load_recipe
from angelslim_core.cli.main import cli
from angelslim_core.plugins import OFFICIAL
from angelslim_core.recipe import bind_options

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))
WRITTEN = [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "template/README.md", *sorted(ROOT.glob("packages/*/README.md"))]
EXAMPLE = "zebra"


@pytest.fixture(scope="module")
def docs():
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools/docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def host(docs):
    return docs.official_host()


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)


def test_generated_parts_are_up_to_date(docs, host):
    changes = docs.outdated(ROOT / "docs", host)
    assert not changes, f"run python tools/docs.py: {[p.name for p in changes]}"


def test_every_pass_has_a_page_with_its_options(host):
    for pass_id, pass_ in host.registry.passes.items():
        text = (ROOT / f"docs/algorithms/{pass_id}.md").read_text()
        assert all(f"| `{option}` |" in text for option in pass_.Config.model_fields), pass_id


def test_every_hook_is_described(docs):
    text = (ROOT / "docs/hooks.md").read_text()
    assert docs.hook_names() and all(re.search(rf"^## {name}$", text, re.MULTILINE) for name in docs.hook_names())


def test_the_tool_rewrites_generated_parts_and_begins_pages_only(docs, host, tmp_path):
    page = tmp_path / "algorithms/quant.int4_rtn.md"
    page.parent.mkdir()
    page.write_text("# mine\n\n<!-- generated: pass quant.int4_rtn -->\nold\n<!-- end -->\n\nby hand\n")
    changes = docs.outdated(tmp_path, host)
    assert set(changes) == {tmp_path / f"algorithms/{i}.md" for i in host.registry.passes}
    assert changes[page].startswith("# mine\n") and changes[page].endswith("\nby hand\n") and "old" not in changes[page]
    assert "`group_size`" in changes[page] and "INT8" in changes[tmp_path / "algorithms/quant.int8_dynamic.md"]
    for path, text in changes.items():
        path.write_text(text)
    assert not docs.outdated(tmp_path, host)
    for wrong in ("<!-- generated: nonsense -->\n<!-- end -->", "<!-- generated: recipe -->\n"):
        (tmp_path / "wrong.md").write_text(wrong)
        with pytest.raises(ValueError, match=r"wrong\.md"):
            docs.outdated(tmp_path, host)


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.stem)
def test_recipes_in_the_docs_are_recipes(path, host, tmp_path):
    for text in blocks(path, "yaml"):
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        found = load_recipe(file)
        for index, step in enumerate(found.steps):
            if step.use.partition(".")[0] in OFFICIAL:
                bind_options(index, found, host.registry.find_pass(step.use))


def command_lines(text):
    """Command lines in code blocks and between backticks."""
    code = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    code += re.findall(r"(?:^ {4}.*\n)+", text, re.MULTILINE)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    code += re.findall(r"`([^`\n]+)`", text)
    return [m for part in code for m in re.findall(r"(?:^|&& )\s*(angelslim .+?)\s*(?:&&.*|[|>;].*)?$", part, re.MULTILINE)]


def complaint(line):
    """What is wrong with a command line, or None; arguments may be missing."""
    words = [w for w in shlex.split(line, comments=True)[1:] if w != "..."]
    command, context = cli, click.Context(cli, info_name="angelslim")
    while True:
        try:
            _, rest, _ = command.make_parser(context).parse_args(list(words))
        except click.UsageError as error:
            return error.format_message()
        if not isinstance(command, click.Group) or not rest:
            return None
        if command is cli and rest[0] in (EXAMPLE, "PLUGIN"):
            return None
        found = command.get_command(context, rest[0])
        if found is None:
            return f"no command {rest[0]!r}"
        command, context, words = found, click.Context(found, info_name=rest[0], parent=context), rest[1:]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_command_lines_exist(path):
    wrong = {line: why for line in command_lines(path.read_text()) if (why := complaint(line))}
    assert not wrong


def test_a_wrong_command_line_would_be_found():
    text = "`angelslim rum x`\n\n    angelslim run --modell m   # why\n\n```sh\nangelslim recipe chek f\nangelslim run int8 --model m | cat\n```\n"
    assert [bool(complaint(line)) for line in command_lines(text)] == [True, False, True, True]


@pytest.mark.parametrize("path", WRITTEN, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\((?!http)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), target


def module_of(page):
    """The Python blocks of a page, run in order as one module."""
    module = ModuleType(f"example_{page}".replace("-", "_"))
    for block in blocks(ROOT / f"docs/{page}.md", "python"):
        exec(block, module.__dict__)
    return module


def test_the_example_plugin_works(docs, tiny, tmp_path):
    plugin = module_of("writing-a-plugin")
    for name in ("rows", "clipped", "learnt"):
        (tmp_path / name).mkdir()
    plugin.check_everything(plugin, tmp_path)
    import torch

    weight = torch.randn(3, 5)
    assert torch.equal(plugin.ABSMAX(weight), plugin.ABSMAX(weight, executor="reference"))
    host = docs.PluginHost()
    host.register_module(EXAMPLE, plugin)
    result = compress(tiny(), ["zebra.rows_own_layout"], tmp_path / "own", plugins=[EXAMPLE], host=host)
    assert result.plan["export"] == EXAMPLE and result.metrics["sqnr_db_min"] > 35


def test_the_example_hooks_are_called(docs, tiny, tmp_path, capsys):
    plugin = module_of("hooks")
    host = docs.PluginHost()
    host.register_module(EXAMPLE, plugin)
    documented = {name for name in vars(plugin) if name.startswith("angelslim_")}
    assert documented == set(docs.hook_names())
    steps = host.default_steps([EXAMPLE], "cpu")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 20)
    recipe = {"calibration": {"data": str(text), "samples": 2, "tokens": 16}, "steps": [*steps, {"use": "quant.fp8_static", "targets": ["attention"]}]}
    host.load(["quant"])
    result = compress(tiny(), recipe=recipe, out=tmp_path / "out", plugins=[EXAMPLE, "quant"], host=host)
    assert any("quant.fp8_static took" in line for line in result.warnings) and "bytes" in capsys.readouterr().out
