"""What a user reads is true: examples in docstrings and the README run, commands exist."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

import npdrt
from npdrt.cli import COMMANDS, cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES = sorted(
    m.name
    for m in pkgutil.walk_packages(npdrt.__path__, "npdrt.")
    if not m.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_there_are_doctests() -> None:
    """The walk above finds modules in all three linked folders, and examples in them."""
    assert {"npdrt.models.mlp", "npdrt.train.loop", "npdrt.data.dataset"} <= set(MODULES)
    finder = doctest.DocTestFinder()
    found = (finder.find(importlib.import_module(name)) for name in MODULES)
    assert sum(len(test.examples) for tests in found for test in tests) > 15


@pytest.mark.parametrize("name", ["README.md", "docs/training.md"])
def test_python_in_pages(name: str) -> None:
    results = doctest.testfile(str(ROOT / name), module_relative=False)
    assert results.attempted >= 4
    assert results.failed == 0


def commands(text: str) -> list[list[str]]:
    """Every `npdrt ...` command in a page, as arguments without the program's name."""
    blocks = "".join(re.findall(r"```sh\n(.*?)```", text, re.S))
    lines = re.findall(r"^(?:.*&& )?(npdrt [^#\n|]+)", blocks, re.M)
    lines += re.findall(r"`(npdrt [^`|]+)`", text)
    return [shlex.split(line)[1:] for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_pages_exist(page: Path) -> None:
    """Every command and option that a page names is one the command line has."""
    for words in commands(page.read_text()):
        group: click.Command = cli
        options = [word for word in words if word.startswith("--")]
        for word in words:
            if not isinstance(group, click.Group) or word.startswith("-"):
                break
            found = group.get_command(click.Context(group), word)
            assert found is not None, f"{page.name}: npdrt {' '.join(words)}"
            group = found
        known = {name for parameter in group.params for name in parameter.opts}
        known |= {name for parameter in group.params for name in parameter.secondary_opts}
        assert set(options) <= known | {"--help"}, f"{page.name}: npdrt {' '.join(words)}"


def test_every_command_is_listed() -> None:
    text = (ROOT / "docs/commands.md").read_text()
    assert all(f"`npdrt {name}`" in text for name in COMMANDS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


def test_readme_walk(tmp_path: Path) -> None:
    """The README's first command and its walk through a run, as written, in an empty folder."""

    def npdrt_command(*words: str) -> str:
        command = [sys.executable, "-m", "npdrt", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = (ROOT / "README.md").read_text()
    walk = re.search(r"## Train\n\n(```sh\n.*?```)", text, re.S)
    assert walk is not None
    outputs = [npdrt_command(*words) for words in commands(walk[1])]
    assert len(outputs) == 6  # train, show, eval, export, resume, help
    accuracy = re.search(r"train  accuracy (\S+)", outputs[0])
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.97
    assert outputs[1].startswith("first/checkpoint.h5: checkpoint")
    assert (tmp_path / "first.csv").read_text().count("\n") == 41
