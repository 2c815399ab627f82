"""The docs say what the code does: hooks, settings, errors, commands, modules, links; what they show really happens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiirwkv
import aiirwkv.types
import click
import msgspec
import pytest
from aiirwkv import errors, plugins, scaffold
from aiirwkv.cli.common import cli
from aiirwkv.config import BusConfig, Use, Web, default_workers, parse
from aiirwkv.hooks import Hooks
from aiirwkv.types import REQUESTS, Piece, Reply, Request, StreamRequest

from .tables import rows

if TYPE_CHECKING:
    from ..conftest import Up

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
}
CONFIGURATION, BUS, HOOKS = PAGES["docs/configuration.md"], PAGES["docs/bus.md"], PAGES["docs/hooks.md"]
OURS = sorted(path.parent.name for path in ROOT.glob("plugins/*/pyproject.toml"))
STRUCTURES = {
    name: cls
    for name in aiirwkv.types.__all__
    if isinstance(cls := getattr(aiirwkv.types, name), type)
    and issubclass(cls, msgspec.Struct)
    and cls not in (Reply, Request, StreamRequest, Piece)
    and name != "Service"  # what discovery says, as Python sees it; never sent
}
RAGQ = set(
    re.findall(
        r"\S+",
        """
        llm.enabled index.enabled tuning.enabled service_module front_end.protocol front_end.host front_end.port
        back_end.protocol back_end.host back_end.port num_workers spawn_method llm.base_model_path llm.base_model_file
        llm.embedding_path llm.bgem3_path llm.reranker_path llm.rerank_path llm.state_path llm.device index.chroma_path
        index.chroma_port index.chroma_host index.sqlite_db_path index.llm_front_end_url index.knowledge_base_path
        tuning.jsonl_path tuning.output_path tuning.n_epoch tuning.model_path tuning.project_dir tuning.data_file
        vectordb_name vectordb_path vectordb_port vectordb_host strategy rwkv_version base_model_path embedding_path
        reranker_path knowledge_base_path
        """,
    )
)
"""Every key of ragq.yml, in all versions."""


def section(page: str, heading: str) -> str:
    """What stands below a heading, up to the next one of its level or above."""
    lines = PAGES[page].splitlines()
    assert heading in lines, f"{page} has no heading {heading!r}"
    level = heading.partition(" ")[0]
    start = lines.index(heading) + 1
    ends = (i for i in range(start, len(lines)) if re.match(rf"#{{1,{len(level)}}} ", lines[i]))
    return "\n".join(lines[start : next(ends, len(lines))])


def table(text: str) -> list[str]:
    """The rows of a section's first table."""
    found = re.search(r"^\|.*\n\|[-|]+\n((?:\|.*\n?)*)", text, re.M)
    return found[1].splitlines() if found else []


def check_table(text: str, cls: type[msgspec.Struct], *, defaults: bool = True) -> None:
    """Each field has its row with the type and default it really has, and a meaning; no row is about something else."""
    expected, found = list(rows(cls, defaults=defaults)), table(text)
    assert len(found) == len(expected), cls
    for row, start in zip(found, expected, strict=True):
        assert row.startswith(start) and len(row) > len(start) + 3, cls


# Hooks


def test_every_hook_has_its_section_and_nothing_else() -> None:
    named = {name for name in vars(Hooks) if hasattr(getattr(Hooks, name), f"{plugins.GROUP}_spec")}
    assert named == set(REQUESTS) == set(re.findall(r"^## `(\w+)`$", HOOKS, re.M))


@pytest.mark.parametrize("hook", REQUESTS)
def test_a_hooks_fields(hook: str) -> None:
    request = REQUESTS[hook]
    asked, _, replied = section("docs/hooks.md", f"## `{hook}`").partition("\nReply:\n")
    check_table(asked, request)
    check_table(replied, request.reply, defaults=False)
    assert ("It streams." in asked) == issubclass(request, StreamRequest)


@pytest.mark.parametrize("hook", sorted(REQUESTS.keys() - {"jobs"}))
def test_who_serves_a_hook(hook: str) -> None:
    [said] = re.findall(r"Served by: (.*)\.$", section("docs/hooks.md", f"## `{hook}`"), re.M)
    serving = {name for name in OURS if hook in plugins.hooks(plugins.load_class(name))}
    assert set(re.findall(r"`(\w+)`", said)) == serving and (said == "nobody yet") == (not serving)


def test_every_structure_is_described() -> None:
    asked_or_replied = {cls for request in REQUESTS.values() for cls in (request, request.reply)}
    for name, cls in STRUCTURES.items():
        if cls not in asked_or_replied:
            check_table(section("docs/hooks.md", f"### {name}"), cls, defaults=not issubclass(cls, Reply))


def test_a_plugin_authors_signatures() -> None:
    described = section("docs/plugins.md", "## Hooks")
    for hook, request in REQUESTS.items():
        reply = request.reply.__name__
        if issubclass(request, StreamRequest):
            reply = f"AsyncIterator[{request.chunk.__name__}]"
        assert f"`async def {hook}(self, request: {request.__name__}, ctx: Context) -> {reply}`" in described


# Errors


def test_errors() -> None:
    said = {int(code): name for code, name in re.findall(r"^\| (\d+) \| `(\w+)` \|", BUS, re.M)}
    assert said == {code: cls.__name__ for code, cls in errors.BY_CODE.items()}
    for name in errors.__all__:
        assert f"`{name}`" in BUS or name == "AiirwkvError", name


# Settings


@pytest.mark.parametrize(("heading", "cls"), [("## `[use]`", Use), ("## `[bus]`", BusConfig), ("## `[web]`", Web)])
def test_the_keys_of_the_configuration(heading: str, cls: type[msgspec.Struct]) -> None:
    check_table(section("docs/configuration.md", heading), cls)


def test_the_tables_of_the_configuration() -> None:
    for table_name in parse({}).__struct_fields__:
        assert f"## `[{table_name}]`" in CONFIGURATION or (table_name == "plugins" and "## Plugins" in CONFIGURATION)
    [default] = re.findall(r"```toml\n(.*?)```", section("docs/configuration.md", "## `[workers]`"), re.S)
    assert toml(default) == {"workers": default_workers()}


def test_the_file_in_the_repository_says_the_defaults() -> None:
    found = parse(toml((ROOT / "config.toml").read_text()))
    found.use.convert = found.use.convert[0] if len(found.use.convert) == 1 else found.use.convert
    for name, given in found.plugins.items():
        known = plugins.settings(plugins.load_class(name))
        assert given == {key: known[key] for key in given}
    found.plugins = {}
    assert found == parse({})


@pytest.mark.parametrize("name", OURS)
def test_a_plugins_settings(name: str) -> None:
    text = section("docs/configuration.md", f"### `[plugins.{name}]`")
    cls = plugins.load_class(name)
    if plugins.settings(cls):
        check_table(text, cls)
    else:
        assert "No settings." in text


def test_environment_variables() -> None:
    said = set(re.findall(r"AIIRWKV_[A-Z_]+", "".join(PAGES.values())))
    for path in (file for part in ("core", "webui", "plugins", "knowledge") for file in (ROOT / part).rglob("*.py")):
        for name in re.findall(r"AIIRWKV_[A-Z]\w+", path.read_text(encoding="utf-8")):
            assert name in said, f"{path} uses {name}, which the docs do not name"


def test_every_key_of_the_reference_system_is_mapped() -> None:
    mapped = [row.split("|")[1] for row in table(section("docs/configuration.md", "## Coming from RWKV_RAG"))]
    named = set(re.findall(r"`([\w.]+)`", " ".join(mapped)))
    assert named == RAGQ


def toml(text: str) -> dict[str, Any]:
    import tomllib

    return tomllib.loads(text)


@pytest.mark.parametrize("page", PAGES)
def test_examples_of_configuration_are_valid(page: str) -> None:
    for example in re.findall(r"^ *```toml\n(.*?)```", PAGES[page], re.S | re.M):
        given = toml(example.replace('{ env = "BUS_PASSWORD" }', '"secret"'))
        if "project" in given:
            continue
        for name, settings in parse(given).plugins.items():
            if name in OURS:
                plugins.load(name, settings)


# Commands


def commands(command: click.Command, path: str = "aiirwkv") -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, f"{path} {name}")


COMMANDS = dict(commands(cli))


@pytest.mark.parametrize("path", sorted(COMMANDS.keys() - {"aiirwkv plugin"}))
def test_a_command_and_its_options(path: str) -> None:
    """It has a section, or a row in the section of its group, and that names each option and argument."""
    page = "docs/commands.md"
    headings = {heading.strip("# "): heading for heading in re.findall(r"^##+ aiirwkv.*$", PAGES[page], re.M)}
    if path in headings:
        text = section(page, headings[path])
    else:
        group = path.rpartition(" ")[0]
        text = section(page, headings[group])
        assert f"`{path}" in text
    for parameter in COMMANDS[path].params:
        if isinstance(parameter, click.Argument):
            assert (parameter.name or "").upper() in text or isinstance(parameter.type, click.Choice), parameter.name
        elif isinstance(parameter, click.Option) and not parameter.hidden:
            for name in [*parameter.opts, *parameter.secondary_opts]:
                assert f"`{name}`" in text, name


def test_no_command_or_option_is_made_up() -> None:
    named = re.findall(r"^##+ (aiirwkv(?: \w+)*)$", PAGES["docs/commands.md"], re.M)
    assert set(named) <= set(COMMANDS)
    known = {
        name
        for command in COMMANDS.values()
        for parameter in command.params
        for name in [*parameter.opts, *parameter.secondary_opts]
    }
    assert set(re.findall(r"`(--[\w-]+)`", PAGES["docs/commands.md"])) <= known | {"--help"}


def lines(page: str) -> Iterator[tuple[str, bool]]:
    """Every command line of ours in a page, and whether it must be whole: in the text it need not be."""
    text = PAGES[page].replace("\\\n", " ")
    for block in re.findall(r"^ *```(?:console|shell|bash)\n(.*?)```", text, re.S | re.M):
        for line in re.findall(r"^ *\$ (.*)$", block, re.M):
            yield from ((part, True) for part in line.split(" && ") if re.match(r"(\S*/)?aiirwkv ", part))
    yield from ((line, False) for line in re.findall(r"`(aiirwkv [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S)))


def understand(command: click.Command, arguments: list[str], parent: click.Context | None = None) -> None:
    """Parse a command line as click would, without running it."""
    with command.make_context(command.name, list(arguments), parent=parent) as context:
        if isinstance(command, click.Group):
            rest = [*context._protected_args, *context.args]
            if rest:
                _, child, rest = command.resolve_command(context, rest)
                assert child
                understand(child, rest, context)


@pytest.mark.parametrize("page", PAGES)
def test_command_lines_are_understood(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click.termui, "visible_prompt_func", lambda _: "y")
    for command in COMMANDS.values():
        for parameter in command.params:
            if isinstance(parameter.type, click.Path):
                monkeypatch.setattr(parameter.type, "exists", False)
    for line, whole in lines(page):
        words = shlex.split(line, comments=True)[1:]
        if words[0] == "COMMAND":
            continue
        try:
            understand(cli, words)
        except click.exceptions.Exit:
            pass  # --help
        except click.MissingParameter as exc:
            assert not whole, f"{page}: {line}: {exc.format_message()}"
        except click.ClickException as exc:
            pytest.fail(f"{page}: {line}: {exc.format_message()}")


@pytest.mark.parametrize("page", PAGES)
def test_requests_are_valid(page: str) -> None:
    text = PAGES[page].replace("\\\n", " ")
    sent = re.findall(r"aiirwkv call (\w+) '(\{.*?\})'", text)
    sent += re.findall(r"req aiirwkv\.(?:job\.)?(\w+) (?:--\S+ (?:\d+s )?)*\s*'(\{.*?\})'", text)
    assert len(sent) == len(re.findall(r"aiirwkv call \w+ '|req aiirwkv\.", text))
    for hook, body in sent:
        msgspec.json.decode(body.encode(), type=REQUESTS[hook])


# The pages


def test_the_two_commands() -> None:
    for command in (
        "python3 -m venv .venv && .venv/bin/pip install -c constraints-cpu.txt . && .venv/bin/aiirwkv up",
        "python3 -m venv .venv && .venv/bin/pip install -c constraints-cpu.txt '.[dev]' && .venv/bin/pytest",
    ):
        assert f"\n$ {command}\n" in PAGES["README.md"]
    held = (ROOT / "constraints-cpu.txt").read_text().split()
    assert set(re.findall(r"torch==[\d.]+", PAGES["README.md"])) <= set(held)


def test_every_module_of_the_core_is_explained() -> None:
    said = section("docs/architecture.md", "## The core")
    core = ROOT / "core" / "aiirwkv"
    there = {path.relative_to(core) for path in core.rglob("*.py") if not path.name.startswith("__")}
    for path in there:
        assert f"`{path.name}`" in said and (len(path.parts) == 1 or f"`{path.parts[0]}/`" in said), path
    named = set(re.findall(r"`(\w+\.py)`", said))
    assert named == {path.name for path in there}


def anchors(page: str) -> set[str]:
    """The places in a page that a link may name, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.M)
    }


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = re.sub(r"```.*?```", "", PAGES[page], flags=re.S)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.resolve().exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in anchors(str(path.resolve().relative_to(ROOT))), f"{page} links to {target}"


def test_the_scaffold_is_what_the_guide_shows(tmp_path: Path) -> None:
    files = scaffold.write("my_embedder", tmp_path)
    guide = PAGES["docs/plugins.md"]
    for path in files:
        text = path.read_text().partition('"""\n\n')[2] or path.read_text()
        if path.suffix == ".py":
            assert f"```python\n{text}```" in guide, path.name
        else:
            assert 'my_embedder = "aiirwkv_my_embedder:MyEmbedder"' in text and "entry-points.aiirwkv" in text
        assert str(path.relative_to(tmp_path)) in guide


# What is shown really happens


def test_the_client_without_a_library(up: Up) -> None:
    [client] = [block for block in re.findall(r"```python\n(.*?)```", BUS, re.S) if "socket" in block]
    assert len(client.strip().splitlines()) <= 12
    environment = {**os.environ, "AIIRWKV_DATA": str(up.data)}
    done = subprocess.run([sys.executable, "-c", client], env=environment, capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    reply = msgspec.json.decode(done.stdout)
    assert reply["dim"] == len(reply["vectors"][0]) == 384 and reply["model"] in BUS


def test_the_first_five_minutes(up: Up) -> None:
    """The commands of the README print what it says they print, but for times and what it leaves out with …"""
    text = PAGES["README.md"].partition("**In the terminal.**")[2]
    [block] = re.findall(r"```console\n(.*?)```", text, re.S)[:1]
    for line, shown in re.findall(r"^\$ aiirwkv (.*)\n((?:(?!\$ ).*\n)+)", block, re.M):
        done = up.cli(*shlex.split(line), cwd=ROOT)
        said = re.sub(r"\d+\.\d s", "TIME", done.stdout + done.stderr)
        for expected in re.sub(r"\d+\.\d s", "TIME", shown).splitlines():
            assert expected.removesuffix(" …") in said, f"{line}\n{said}"
