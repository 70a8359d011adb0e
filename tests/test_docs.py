"""The examples of docs run, what they assert is so, and the pages on recipes say what the recipes are."""

import importlib.metadata
import re
from pathlib import Path

import pytest

from docs.tables import OPTIMIZERS, PAGES, STATES, families, page_tables, with_tables
from lowprec.analysis.product_errors import errors_table

DOCS = Path(__file__).parents[1] / "docs"
ROOT = DOCS.parent
ALL_PAGES = sorted(DOCS.rglob("*.md"))


def examples():
    """The code of each block, by its heading."""
    for page in ALL_PAGES:
        heading = ""
        for match in re.finditer(r"^#+ ([^\n]*)$|^```python\n(.*?)^```$", page.read_text(), flags=re.M | re.S):
            if match[2] is None:
                heading = match[1]
            else:
                yield pytest.param(match[2], id=heading)


def is_installed(name, version):
    try:
        return f"{importlib.metadata.version(name)}.".startswith(f"{version}.")
    except importlib.metadata.PackageNotFoundError:
        return False


@pytest.mark.parametrize("code", examples())
def test_an_example_holds(code):
    needed = re.match(r"# needs: (\S+) (\S+)\n", code)
    if needed and not is_installed(*needed.groups()):
        pytest.skip(" ".join(needed.groups()))
    assert "assert" in code
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_a_recipe_of_ones_own_takes_ten_lines():
    example = next(example.values[0] for example in examples() if "10 lines" in example.id)
    lines = [line for line in example.splitlines() if line and not line.startswith(("import", "from", "assert"))]
    assert len(lines) <= 10


def test_every_family_of_recipes_has_a_page_and_a_line_in_the_index():
    assert {page.stem for page in PAGES.glob("*.md")} == {*families(), "README"}
    index = (PAGES / "README.md").read_text()
    assert set(re.findall(r"^\| \[(\w+)\]\(\1\.md\)", index, flags=re.M)) == set(families())


@pytest.mark.parametrize("family", families())
def test_the_tables_of_a_page_are_current(family):
    text = (PAGES / f"{family}.md").read_text()
    assert with_tables(text, page_tables(families()[family], measure=False)) == text, "run python -m docs.tables"


def test_the_bytes_of_optimizer_states_are_those_measured():
    text = OPTIMIZERS.read_text()
    assert with_tables(text, STATES) == text, "run python -m docs.tables"


@pytest.mark.parametrize("family", families())
def test_a_page_has_the_errors_of_every_recipe(family):
    assert [row[0] for row in rows_of_errors(family)] == [recipe.name for recipe in families()[family]]


@pytest.mark.parametrize("family", ["baselines", pytest.param("fp4", marks=pytest.mark.slow)])
def test_the_errors_of_a_page_are_those_measured(family):
    """To the two digits shown, or one unit of the last: sums of float32 depend on the machine."""
    written = rows_of_errors(family)
    measured = rows(errors_table([row[0] for row in written]))
    for old, new in zip(written, measured, strict=True):
        for a, b in zip(old[1:], new[1:], strict=True):
            assert a == b or float(a) == pytest.approx(float(b), rel=0.1)


@pytest.mark.parametrize("family", families())
def test_a_page_speaks_of_every_recipe(family):
    """By its name, or as one of a family: quest_<b>, paretoq_<b>."""
    prose = re.sub(r"<!-- \w+ -->.*?<!-- end -->", "", page_text(family), flags=re.S)
    patterns = [re.escape(name).replace("<b>", r"\d+") for name in re.findall(r"`([\w<>]+)`", prose)]
    for recipe in families()[family]:
        assert any(re.fullmatch(pattern, recipe.name) for pattern in patterns), recipe.name


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        target, _, anchor = link.partition("#")
        file = page.parent / target if target else page
        assert file.exists(), link
        headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)
        assert not anchor or anchor in [heading.lower().replace(" ", "-") for heading in headings], link


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_files_it_names_exist(page):
    for name in re.findall(r"(?:configs|experiments|lowprec|notebooks|tests)/[\w/]+(?:\.py)?", page.read_text()):
        assert (ROOT / name).exists(), name


def page_text(family):
    return (PAGES / f"{family}.md").read_text()


def rows(table):
    return [re.split(r"\s*\|\s*", line)[1:-1] for line in table.splitlines() if line.startswith("|")][2:]


def rows_of_errors(family):
    return rows(re.search(r"<!-- errors -->\n(.*?)<!-- end -->", page_text(family), flags=re.S)[1])
