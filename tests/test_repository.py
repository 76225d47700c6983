"""What holds the repository together: README's map, the width and the number of lines."""
import ast
import re

import pytest
import rectify

SCRIPTS = [rectify.HERE / name for name in ("rectify.py", "distill.py", "export.py")]
TESTS = sorted((rectify.HERE / "tests").glob("*.py"))
README = (rectify.HERE / "README.md").read_text("utf-8")

def lines(path):
    return path.read_text("utf-8").splitlines()

def test_readme_maps_equations_to_functions_that_exist():
    """The table "From the paper to the code": every name is in the script under which it stands,
    and they come in the order of the code."""
    table = README.split("## From the paper to the code")[1].split("\n## ")[0]
    script, places, known = 0, [], {}
    for line in table.splitlines():
        if title := re.search(r"\*\*(\w+\.py)\*\*", line):
            script += 1
            tree = ast.parse((rectify.HERE / title[1]).read_text("utf-8"))
            known = {node.name: node.lineno for node in reversed([*ast.walk(tree)])
                     if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        elif script and "|" in line:
            names = re.findall(r"`(\w+)`", line.split("|")[2])
            places += [(script, known[name]) for name in names]
    assert script == 3 and len(places) > 20 and places == sorted(places)

def test_numbers_are_those_that_were_measured():
    """README's table is the main table of RESULTS.md; every mIoU that README and the scripts' heads
    tell stands in RESULTS.md."""
    results = (rectify.HERE / "tests/RESULTS.md").read_text("utf-8")
    main = re.search("<!-- main -->(.*)<!-- /main -->", results, re.DOTALL)[1]
    measured = re.findall(r"^\| ([^|]+?) \| ([\d.]+)", main, re.MULTILINE)
    told = re.findall(r"^\| ([^|]+?)(?: \([^|]*\))? \| (\d+\.\d) \|", README, re.MULTILINE)
    assert told == measured and len(told) == 4
    heads = [ast.get_docstring(ast.parse(path.read_text("utf-8"))) for path in SCRIPTS]
    for text in [README, *heads]:
        numbers = re.findall(r"(?<![\d.])\d\d\.\d\b(?: ± \d\.\d)?", text)
        assert not [number for number in numbers if number not in results]

def test_rectify_imports_nothing_of_ours():
    """It can be taken alone."""
    nodes = [*ast.walk(ast.parse(SCRIPTS[0].read_text("utf-8")))]
    imported = {alias.name for node in nodes if isinstance(node, ast.Import)
                for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    ours = {path.stem for path in SCRIPTS + TESTS}
    assert "torch" in imported and not {name.split(".")[0] for name in imported} & ours

@pytest.mark.parametrize("path", SCRIPTS + TESTS, ids=lambda path: path.name)
def test_no_line_is_wider_than_100_columns(path):
    wide = [number for number, line in enumerate(lines(path), 1) if len(line) > 100]
    assert lines(path) and not wide

def test_the_scripts_stay_small():
    """The caps of the lean edition. Who needs a line more takes one out."""
    ruler, = (n for n, line in enumerate(lines(SCRIPTS[0]), 1) if "The method ends here" in line)
    assert ruler <= 620
    assert [most for most, path in zip((1450, 540, 430), SCRIPTS) if len(lines(path)) > most] == []
    assert len(README.encode()) <= 12288
    counted = [path for path in TESTS if path.name.startswith(("test_", "conftest"))]
    assert sum(len(lines(path)) for path in counted) <= 3600

def test_ci_runs_readmes_test_command():
    """The first line of README with pytest in it is what .ci/run takes."""
    command = next(line for line in README.splitlines() if "-m pytest" in line)
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -r requirements.txt")
    assert command.endswith(" && .venv/bin/python -m pytest -q tests")
    assert "grep -m 1 -e '-m pytest' README.md" in (rectify.HERE / ".ci/run").read_text()

def test_no_registry_is_named():
    """pip and npm know their own; a mirror's address would work in one place alone."""
    hosts = r"pypi\.org|pythonhosted|registry\.npmjs|index-url|artifactory|extra-index"
    for path in [*SCRIPTS, *(rectify.HERE / "tests").rglob("*.py"), rectify.HERE / "README.md",
                 *rectify.HERE.glob("**/requirements.txt"), rectify.HERE / ".ci/run"]:
        if path.resolve() != rectify.Path(__file__).resolve() and ".venv" not in path.parts:
            assert not re.search(hosts, path.read_text("utf-8")), path
