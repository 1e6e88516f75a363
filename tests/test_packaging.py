"""What is published is whole, and says what it is."""

import tomllib
from pathlib import Path

import onnxslim_kd

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_every_folder_with_code_is_packaged() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    homes = {"onnxslim_kd": "onnxslim_kd", "passes": "onnxslim_kd.passes", "cli": "onnxslim_kd.cli"}
    found = set()
    for top, package in homes.items():
        for init in (ROOT / top).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / top).parts
            if parts[:1] not in (("passes",), ("cli",)):
                found.add(".".join((package, *parts)))
    assert found == listed, "list new packages in pyproject.toml"


def test_the_links_for_type_checkers_are_relative() -> None:
    for name in ("passes", "cli"):
        assert (ROOT / "onnxslim_kd" / name).readlink() == Path("..") / name


def test_the_public_names() -> None:
    assert onnxslim_kd.__all__ == sorted(onnxslim_kd.__all__)
    for name in onnxslim_kd.__all__:
        assert getattr(onnxslim_kd, name).__doc__
    assert set(onnxslim_kd.__all__) == set(onnxslim_kd._HOME)


def test_the_changelog_knows_the_version() -> None:
    assert f"## {PROJECT['project']['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_command_can_be_imported_and_has_help() -> None:
    from click.testing import CliRunner

    from onnxslim_kd.cli import COMMANDS, main

    modules = {p.stem for p in (ROOT / "cli").glob("*.py")} - {"__init__", "options"}
    assert {name.replace("-", "_") for name in COMMANDS} <= modules
    for name in COMMANDS:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0, result.output
