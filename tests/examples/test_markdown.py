"""Every Markdown file: its Python runs, its output is shown, its links lead somewhere.

The snippets of a file are one program, run from the first to the last.  Where a block
of text comes right after a snippet, the snippet prints each of its lines; "..." stands
for what is left out, within a line or for whole lines, and source lines may differ.
"""

import contextlib
import dataclasses
import importlib
import io
import pathlib
import re
import sys
import traceback
import types

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PATTERNS = ("README.md", ".github/*.md", "examples/**/*.md", "tests/**/*.md")
FILES = sorted(p.relative_to(ROOT).as_posix() for x in PATTERNS for p in ROOT.glob(x))
FENCE = re.compile(
    r"^( *)(```+|~~~+) *(\S*).*?\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE
)
# Pages that need the extra third-party; the warnings of its packages are theirs.
PAGES = ("equinox", "kauldron", "keras", "tunix")
THIRD_PARTY = {f"examples/howto/{page}.md" for page in PAGES}
MARKS = [pytest.mark.third_party, pytest.mark.filterwarnings("ignore")]
# Pages that need the extra of their name: their own tests run them, by hand.
BY_HAND = {"examples/howto/maxtext.md"}
# What is not Python of flora's; a block with none of these is a mistake.
OTHERS = {"sh", "text", "toml", "json", "diff"}


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and its first and last line."""

    language: str
    text: str
    begins: int
    ends: int


def blocks(text):
    for match in FENCE.finditer(text):
        begins, ends = (text.count("\n", 0, match.start(n)) for n in (4, 0))
        yield Block(match[3], match[4], begins, ends + match[0].count("\n"))


def run(path, text):
    """The names that the snippets of a file define; raises where one does not hold."""
    module = types.ModuleType(f"markdown_{abs(hash(str(path)))}")
    sys.modules[module.__name__] = module  # where dataclasses look themselves up
    found, printed, after = [*blocks(text)], "", -1
    lines = text.splitlines()
    try:
        for block in found:
            near = not any(line.strip() for line in lines[after + 1 : block.begins - 1])
            if block.language == "text" and after >= 0 and near:
                missing = [x for x in block.text.splitlines() if not shown(x, printed)]
                assert not missing, f"{path}:{block.begins} is not printed: {missing}"
            after = -1
            if block.language == "python":
                code = compile(
                    "\n" * block.begins + block.text,
                    str(path),
                    "exec",
                    dont_inherit=True,
                )
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, module.__dict__)
                printed, after = plain(out.getvalue()), block.ends
    finally:
        del sys.modules[module.__name__]
    return module.__dict__


def plain(text):
    """One space between words; source lines without file and number."""
    return re.sub(r"[ \t]+", " ", re.sub(r"[\w./-]+\.(?:py|md):\d+", "SOURCE", text))


def shown(line, printed):
    parts = [re.escape(part.strip()) for part in plain(line).split("...")]
    return re.search(r"[^\n]*".join(parts), printed) is not None


# qwix asks Flax for a name that it has deprecated.
@pytest.mark.filterwarnings("ignore:'VariableState' was removed:DeprecationWarning")
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(f, marks=MARKS if f in THIRD_PARTY else ())
        for f in FILES
        if f not in BY_HAND
    ],
)
def test_snippets_run(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(ROOT / file, (ROOT / file).read_text())


def test_pages_that_need_other_packages_exist():
    assert not THIRD_PARTY - {*FILES}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n", AssertionError),
        ("```python\nimport flora\nflora.nothing\n```\n", AttributeError),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", AssertionError),
        ("```python\nprint('a b c')\n```\n\n```text\na ... d\n```\n", AssertionError),
    ],
)
def test_a_wrong_snippet_is_found(text, error):
    with pytest.raises(error):
        run("page.md", text)


def test_a_wrong_snippet_is_named_by_file_and_line():
    try:
        run("page.md", "words\n\n```python\nx = 1\nx.y\n```\n")
    except AttributeError as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        assert (last.filename, last.lineno) == ("page.md", 5)
    else:
        pytest.fail("The wrong snippet ran.")


def test_right_snippets_run_as_one_program():
    text = (
        "```python\nx = 1\n```\n\nand\n\n"
        "```python\nprint('so', x)\n```\n\n```text\nso 1\n```\n"
    )
    assert run("page.md", text)["x"] == 1


@pytest.mark.parametrize("file", FILES)
def test_every_block_says_what_it_is(file):
    text = (ROOT / file).read_text()
    found = [*blocks(text)]
    assert text.count("```") == 2 * len(found)
    assert {b.language for b in found} <= OTHERS | {"python"}
    # Indented Python would not run.
    rest = FENCE.sub("", text)
    assert not re.search(
        r"^(?:    .*)?>>> |^    (?:import|from) \w+", rest, re.MULTILINE
    )


@pytest.mark.parametrize("file", FILES)
def test_links_lead_somewhere(file):
    text = FENCE.sub("", (ROOT / file).read_text())
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / file).parent / name if name else ROOT / file
        assert path.exists(), f"{file}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text()), f"{file}: {target}"


def anchors(text):
    """What GitHub calls the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles]


@pytest.mark.parametrize("file", FILES)
def test_commands_name_scripts_and_options_that_exist(file):
    """Wherever a command is written, in a block or in a sentence."""
    text = (ROOT / file).read_text()
    for script, options in re.findall(r"python ((?:\w+/)+\w+\.py)([^`#|\n]*)", text):
        source = (ROOT / script).read_text()
        for option in re.findall(r"--[a-z][\w-]*", options):
            # Some scripts make their options of the fields of a dataclass.
            fields = 'f"--{' in source and re.search(rf"\b{option[2:]}\b", source)
            assert f'"{option}"' in source or fields, f"{file}: {script} {option}"


@pytest.mark.parametrize("file", FILES)
def test_names_of_flora_exist(file):
    """`flora.a.b`, wherever it is written."""
    for module in (ROOT / "flora").glob("[a-z]*.py"):
        importlib.import_module(f"flora.{module.stem}")
    text = (ROOT / file).read_text()
    for name in set(re.findall(r"(?<![\w/.-])flora((?:\.[A-Za-z]\w*)+)", text)):
        value = importlib.import_module("flora")
        for part in name[1:].split("."):
            value = getattr(value, part)
    for path in re.findall(r"`((?:flora|tests|examples)/[\w./]+)`", text):
        assert (ROOT / path).exists(), f"{file}: {path}"


def test_the_reference_has_every_public_module():
    (command,) = re.findall(r"pdoc .*", (ROOT / "tests/README.md").read_text())[-1:]
    modules = {path.stem for path in (ROOT / "flora").glob("[a-z]*.py")}
    modules |= {
        path.parent.name for path in (ROOT / "flora").glob("[a-z]*/__init__.py")
    }
    named = set(re.search(r"flora\.\{(.*)\}", command)[1].split(","))
    assert named == modules - set(importlib.import_module("flora").__all__)
