"""What the project promises as a package: imports point down and are light, versions and files agree."""

import ast
import json
import os
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

import kernels_pallas

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FLOORS = ("kernels_pallas", "gdn_jax", "train")
# A kernel is read as one piece, however long.
KERNEL = re.compile(r"mosaic_\w+_kernel\.py")
MAX_LINES = 400


def requirements(*extras):
    """What pyproject.toml declares: the core, or the named extras."""
    declared = PROJECT["project"]["optional-dependencies"]
    groups = [declared[extra] for extra in extras] or [PROJECT["project"]["dependencies"]]
    return [Requirement(text) for group in groups for text in group]


def modules(*extras):
    """Top-level module names of ``requirements``."""
    named = {requirement.name for requirement in requirements(*extras)}
    return {"orbax" if name == "orbax-checkpoint" else name.replace("-", "_") for name in named}


# What a floor may import from elsewhere, besides Python itself.
THIRD_PARTY = {
    "kernels_pallas": modules() - {"flax", "optax"},
    "gdn_jax": modules(),
    "train": modules() | modules("train"),
}
# The benchmark measures beside other people's code where that is installed.
BESIDES = {"kernels_pallas/gated_delta_rule/bench_torch.py": {"torch", "transformers"}}


# They load what the user has installed besides, by names of their own.
BY_NAME = {"train/corpus_formats.py", "train/trackers.py"}
# A module whose name cannot be read off the file.
UNKNOWN = "something"
LOADERS = {"import_module", "resolve_name", "run_module", "run_path"}


def imports(path, root):
    """``(line, module, names)`` of each import in a file, lazy ones and ``importlib.import_module("...")`` too."""
    package = path.relative_to(root).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import():
                for alias in node.names:
                    yield node.lineno, alias.name, ()
            case ast.ImportFrom(module="importlib" | "pkgutil" | "runpy", names=names) if any(
                alias.name in LOADERS for alias in names
            ):
                yield node.lineno, UNKNOWN, ()
            case ast.ImportFrom():
                above = package[: len(package) - node.level + 1] if node.level else ()
                module = ".".join((*above, *filter(None, [node.module])))
                yield node.lineno, module, tuple(alias.name for alias in node.names)
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="__import__")):
                match node.args:
                    case [ast.Constant(value=str(module))] if not module.startswith("."):
                        yield node.lineno, module, ()
                    case _:
                        yield node.lineno, UNKNOWN, ()
            case ast.Attribute(attr=attribute) if attribute in LOADERS - {"import_module"}:
                yield node.lineno, UNKNOWN, ()


def violations(root):
    """Every import under ``root`` that points up, into the op's insides, or to an undeclared package."""
    found = []
    for height, floor in enumerate(FLOORS):
        for path in sorted((root / floor).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            for line, module, names in imports(path, root):
                top = module.partition(".")[0] or names[0]
                if module == UNKNOWN:
                    wrong = name not in BY_NAME
                elif top in FLOORS:
                    wrong = FLOORS.index(top) > height
                    if floor == "gdn_jax" and top == "kernels_pallas":
                        wrong = "." in module or not set(names) <= set(kernels_pallas.__all__)
                else:
                    allowed = sys.stdlib_module_names | THIRD_PARTY[floor] | BESIDES.get(name, set())
                    wrong = top not in allowed
                if wrong:
                    found.append(f"{name}:{line} imports {module or '.'} {' '.join(names)}".rstrip())
    return found


def test_imports_point_down():
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("kernels_pallas/gated_delta_rule/a.py", "from gdn_jax.config import GDNConfig"),
        ("kernels_pallas/a.py", "import flax.nnx as nnx"),
        ("kernels_pallas/a.py", "def lazy():\n    from optax import adamw"),
        ("kernels_pallas/a.py", "import torch"),
        ("gdn_jax/mup/a.py", "import train"),
        ("gdn_jax/a.py", "from train.config import ModelOptions"),
        ("gdn_jax/mup/a.py", "from ...train import config"),
        ("gdn_jax/a.py", 'import importlib\nimportlib.import_module("train.config")'),
        ("gdn_jax/a.py", "from importlib import import_module as load"),
        ("gdn_jax/a.py", 'import importlib\nimportlib.import_module(name="train.config")'),
        ("gdn_jax/a.py", 'import importlib\nimportlib.import_module(".config", "train")'),
        ("gdn_jax/a.py", 'import importlib\nimportlib.import_module(f"train.config")'),
        ("gdn_jax/a.py", 'import pkgutil\npkgutil.resolve_name("train.config")'),
        ("gdn_jax/a.py", '__import__("tr" + "ain")'),
        ("gdn_jax/a.py", "from kernels_pallas.gated_delta_rule.api import gated_delta_rule"),
        ("gdn_jax/a.py", "import kernels_pallas.gated_delta_rule.chunked"),
        ("gdn_jax/a.py", "from kernels_pallas import pallas_internals"),
        ("gdn_jax/a.py", "import orbax.checkpoint"),
        ("train/a.py", "import hypothesis"),
    ],
)
def test_a_planted_import_is_found(tmp_path, path, text):
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    allowed = "import math\nimport jax\nfrom kernels_pallas import gated_delta_rule\n"
    planted.write_text(allowed)
    assert violations(tmp_path) == []
    planted.write_text(allowed + text + "\n")
    (found,) = violations(tmp_path)
    assert found.startswith(f"{path}:{4 + text.count('\n')} imports ")


# Flax loads some packages of the train extra by itself (rich): those are not our doing.
LOADED = """
import json, sys
import jax, jaxtyping, optax, flax.nnx
before = set(sys.modules)
{statement}
from jax._src import xla_bridge
tops = lambda names: sorted({{name.partition(".")[0] for name in names}})
print(json.dumps([tops(sys.modules), tops(set(sys.modules) - before), sorted(xla_bridge._backends)]))
"""


def loaded(statement):
    """All top-level modules after a statement, those it brought, and the backends it started."""
    # With a platform that does not exist, touching a device is an error besides.
    environment = os.environ | {"JAX_PLATFORMS": "none_such"}
    run = subprocess.run(
        [sys.executable, "-c", LOADED.format(statement=statement)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("package", ["kernels_pallas", "gdn_jax"])
def test_importing_is_light(package):
    everything, brought, backends = loaded(f"import {package}")
    assert package in brought
    assert {"grain", "orbax"}.isdisjoint(everything)
    assert (modules("train", "dev") | {"train", "pandas", "tqdm"}).isdisjoint(brought)
    assert backends == []


def test_a_heavy_import_is_found():
    _, brought, _ = loaded("import tyro, grain")
    assert {"tyro", "grain"} <= set(brought)


def test_touching_a_device_on_import_is_found():
    with pytest.raises(AssertionError, match="none_such"):
        loaded("jax.numpy.zeros(())")


def tracked_files():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: cannot tell which files belong to the project")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


# Hosts of package registries, paths of one machine. Written so that they do not find themselves.
LEAK = re.compile(
    rb"pypi[.]|pythonhosted[.]|npmjs[.]|registry[.]npm|anaconda[.]org|index[-]url|find[-]links|file:[/]{2}"
    rb"|(?<![\w./~$})>-])/(?:home|root|Users|work|opt|mnt|private)/\w"
)


def leaks(content):
    """Places in a file's bytes that name a package host or an absolute path of a machine."""
    return [match.group().decode() for match in LEAK.finditer(content)]


def test_no_tracked_file_names_a_package_host_or_a_machine_path():
    found = {path.relative_to(ROOT).as_posix(): leaks(path.read_bytes()) for path in tracked_files()}
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("https://pypi", ".org/simple"),
        ("--index", "-url x"),
        ("open('/", "home/me/x')"),
        ("cd /", "root/x"),
        ("/", "work/main"),
    ],
)
def test_a_planted_leak_is_found(before, after):
    # In two pieces, or this file would be found.
    assert len(leaks(f"{before}{after}".encode())) == 1


def test_every_package_folder_is_packaged():
    folders = {path.parent.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == set(PROJECT["tool"]["setuptools"]["packages"])
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_files_are_short():
    sources = [path for part in (*FLOORS, "tests") for path in (ROOT / part).rglob("*.py")]
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in sources}
    long = {
        name: n for name, n in lengths.items() if n > MAX_LINES and not KERNEL.fullmatch(name.split("/")[-1])
    }
    assert long == {}, f"files of more than {MAX_LINES} lines are two files"


def test_the_changelog_begins_with_this_version():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["project"]["version"]


def test_constraints_pin_what_is_required():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines), "name==version and nothing else"
    pins = {name.lower().replace("_", "-"): version for name, version in (line.split("==") for line in lines)}
    assert len(pins) == len(lines)
    for requirement in requirements() + requirements("train", "dev"):
        assert requirement.specifier.contains(pins[requirement.name.lower().replace("_", "-")]), requirement


def test_tools_are_pinned_exactly():
    # An isolated build ignores constraints, and another linter's opinion must not fail a build.
    build = [Requirement(text) for text in PROJECT["build-system"]["requires"]]
    for requirement in build + requirements("dev"):
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement
