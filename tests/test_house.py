"""The house keeps its order: who imports whom, what stays light, what is declared, what the repository may name."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "pairtune"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Lowest first. A component imports components of lower layers and itself, nothing beside or above it.
LAYERS = [
    {"errors"},
    {"types", "maths", "config"},
    {"runs"},
    {"models", "algorithms", "data"},
    {"completion_data"},
    {"feedback"},
    {"experience"},
    {"evaluation"},
    {"stages", "chat"},
    {"evidence"},
    {"demo"},
    {"cli"},
    {"__main__"},
]
RANK = {component: rank for rank, layer in enumerate(LAYERS) for component in layer}
# Part of the interface of the package that brings them.
BROUGHT_BY = {"annotated-types": "pydantic", "markupsafe": "jinja2"}
MODULES = sorted(PACKAGE.rglob("*.py"))
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


@cache
def _imports(path: Path) -> list[tuple[str, int, bool]]:
    """(dotted name, line, whether it runs when the module is imported) of every import in a file, at any depth.

    `from a import b` counts as `a.b`, since b may be a module.
    """
    found = []

    def walk(node: ast.AST, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.extend((alias.name, child.lineno, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = "." * child.level + (child.module or "")
                found.extend((f"{base}.{alias.name}", child.lineno, at_import) for alias in child.names)
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            walk(child, at_import and not in_function and not for_types)

    walk(ast.parse(path.read_text()), True)
    return found


def _attributes(path: Path, name: str) -> set[str]:
    """The attributes of the global `name` that a file uses."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == name
    }


def _component(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _requirement_name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower().replace("_", "-")


@cache
def _distributions() -> dict[str, set[str]]:
    """Import name -> names of the installed distributions that hold it."""
    return {
        name: {distribution.lower().replace("_", "-") for distribution in distributions}
        for name, distributions in importlib.metadata.packages_distributions().items()
    }


def _third_party(path: Path) -> Iterator[tuple[str, int, bool]]:
    for name, line, at_import in _imports(path):
        root = name.split(".")[0]
        if root and root not in sys.stdlib_module_names and root not in ("pairtune", "__future__"):
            yield root, line, at_import


# Imports


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    component = _component(path)
    if component == "__init__":  # the face of the package: names are loaded when asked for, so nothing at import
        assert [name for name, _, at_import in _imports(path) if at_import and name.startswith("pairtune")] == []
        return
    assert component in RANK, f"{component} has no place in LAYERS"
    for name, line, _ in _imports(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {name}"
        assert not name.startswith("."), f"{where}: relative imports hide the direction"
        if name.split(".")[0] != "pairtune" or name == "pairtune.__version__":
            continue
        if name == "pairtune":  # for its version, which needs no module
            assert _attributes(path, "pairtune") == {"__version__"}, f"{where}: import the module that is meant"
            continue
        imported = name.split(".")[1]
        assert imported in RANK, f"{where}: import from the module, not from the face of the package"
        allowed = imported == component or RANK[imported] < RANK[component]
        assert allowed, f"{where}: {imported} does not stand below {component}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "maths").glob("*.py")), ids=lambda path: path.name)
def test_maths_knows_torch_and_nothing_else(path):
    assert {root for root, _, _ in _third_party(path)} <= {"torch"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_third_party_imports_are_declared_and_extras_are_lazy(path):
    core = {_requirement_name(requirement) for requirement in PROJECT["dependencies"]}
    extras = {
        _requirement_name(requirement)
        for extra in ("report", "demo")
        for requirement in PROJECT["optional-dependencies"][extra]
    }
    for root, line, at_import in _third_party(path):
        allowed = core if at_import else core | extras
        distributions = _distributions().get(root, {root})
        assert {BROUGHT_BY.get(name, name) for name in distributions} & allowed, (
            f"{path.relative_to(ROOT)}:{line} imports {root}, which pyproject.toml does not declare"
            + (" among the core dependencies (an extra is imported where it is used, in a function)" * at_import)
        )


def _python(script: str, **environment: str) -> str:
    command = [sys.executable, "-c", script]
    # Not what `import pairtune` has set here.
    given = {name: value for name, value in os.environ.items() if name != HUGE_PAGES} | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT / "src", env=given)
    assert done.returncode == 0, done.stderr
    return done.stdout


MATHS = [f"pairtune.maths.{path.stem}" for path in sorted((PACKAGE / "maths").glob("*.py")) if path.stem != "__init__"]


def test_maths_is_light():
    """pairtune.maths loads no library but torch and adds at most 0.3 s to it; one of three tries must show it."""
    script = f"""
import sys, time
import torch
before, start = set(sys.modules), time.perf_counter()
import pairtune.maths, {", ".join(MATHS)}
seconds = time.perf_counter() - start
heavy = {{"transformers", "accelerate", "datasets", "peft", "pydantic", "rich", "pairtune.config"}}
print(seconds, *(heavy & (set(sys.modules) - before)))
"""
    fastest = float("inf")
    for _ in range(3):  # another process may have held the machine up
        seconds, *loaded = _python(script).split()
        assert loaded == []
        fastest = min(fastest, float(seconds))
        if fastest < 0.3:
            return
    pytest.fail(f"importing pairtune.maths took {fastest:.2f} s on top of torch; at most 0.3 s is allowed")


@pytest.mark.parametrize("module", ["pairtune", "pairtune.config", "pairtune.cli"])
def test_the_command_line_starts_without_torch(module):
    loaded = _python(f"import sys, {module}; print(*{{'torch', 'transformers', 'datasets'}} & set(sys.modules))")
    assert loaded.split() == []


@pytest.mark.parametrize(("given", "found"), [({}, "1"), ({HUGE_PAGES: "0"}, "0")], ids=["unset", "set"])
def test_importing_asks_torch_for_huge_pages_unless_the_user_says_otherwise(given, found):
    assert _python(f"import os, pairtune; print(os.environ[{HUGE_PAGES!r}])", **given).strip() == found


# What is declared


def test_every_dependency_has_a_tested_version():
    """constraints.txt pins the direct dependencies, once each, and nothing else."""
    declared = set(PROJECT["dependencies"])
    for extra, requirements in PROJECT["optional-dependencies"].items():
        declared |= set(requirements) if extra != "bench" else set()  # pinned in the extra itself
    declared_names = {_requirement_name(requirement) for requirement in declared} - {"pairtune"}
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = [_requirement_name(line) for line in lines]
    assert sorted(pinned) == sorted(declared_names)


def test_version_is_one():
    import pairtune

    assert pairtune.__version__ == PROJECT["version"]


def test_make_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    listed = re.findall(r"^  make (\S+) +\S", shown, re.MULTILINE)
    assert sorted(listed) == sorted(targets)


# The repository


@cache
def _repository_files() -> list[Path]:
    """Tracked files, and new ones that git does not ignore."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            capture_output=True,
            cwd=ROOT,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


# Written so that they do not match themselves.
REGISTRY_HOST = re.compile(r"py[p]i[.]org|pytho[n]hosted|npm[j]s[.]org|debia[n][.]org|downloa[d][.]pytorch")
MACHINE_PATH = re.compile(r"(?:^|[^\w.~-])/(?:wor[k]|far[m]|roo[t]|hom[e]|User[s]|op[t])/", re.MULTILINE)


@pytest.mark.parametrize("text", ["see https://py" + "pi.org/x", "in /ro" + "ot/.cache/x", "'/ho" + "me/me/x'"])
def test_hygiene_would_see(text):
    assert REGISTRY_HOST.search(text) or MACHINE_PATH.search(text)


def test_no_registry_host_and_no_path_of_a_machine():
    found = []
    for path in _repository_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture, say
        for pattern in (REGISTRY_HOST, MACHINE_PATH):
            for match in pattern.finditer(text):
                found.append(
                    f"{path.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}: {match[0].strip()}"
                )
    assert not found, "\n".join(found)


def test_readme_opens_with_the_two_commands():
    readme = ROOT / "README.md"
    if not readme.exists():
        pytest.skip("no README.md yet")
    text = readme.read_text()
    assert "make demo" in text
    assert "make test" in text


def _anchors(markdown: str) -> set[str]:
    """The anchors of headings, as GitHub makes them."""
    headings = re.findall(
        r"^#+ +(.*?) *$", re.sub(r"^```.*?^```", "", markdown, flags=re.MULTILINE | re.DOTALL), re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_resolve():
    broken = []
    for path in _repository_files():
        if path.suffix != ".md":
            continue
        text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        links = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r"""(?:src|href)=["']([^"']+)["']""", text)
        for link in links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            file = (path.parent / target) if target else path
            if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file.read_text())):
                broken.append(f"{path.relative_to(ROOT)}: {link}")
    assert not broken, "\n".join(broken)
