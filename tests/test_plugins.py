import re
import sys

import pytest

from onnxslim_kd import plugins
from onnxslim_kd.errors import NotFoundError, OperationError, UserError


def test_finds_functions_and_methods() -> None:
    assert plugins.find("os.path:join") is __import__("os").path.join
    assert plugins.find("fractions:Fraction.limit_denominator")


def test_finds_modules_of_the_working_directory(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_plugin_module.py").write_text("def twice(x):\n    return 2 * x\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    before = list(sys.path)
    assert plugins.find("my_plugin_module:twice")(21) == 42
    assert sys.path == before


@pytest.mark.parametrize(
    ("spec", "kind", "text"),
    [
        ("join", UserError, "'join' is not of the form package.module:function"),
        (":join", UserError, "is not of the form"),
        ("no_such_module:f", NotFoundError, "no module 'no_such_module'"),
        ("os.no_such:f", NotFoundError, "no module 'os.no_such'"),
        ("os.path:joyn", NotFoundError, "no 'joyn' in there; near misses: join"),
        ("os:sep", UserError, "os:sep is a str, not a function"),
    ],
)
def test_refusals(spec, kind, text) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        plugins.find(spec)


def test_a_module_that_fails_is_not_a_missing_one(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_broken_module.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "my_raising_module.py").write_text("raise RuntimeError('boom')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OperationError, match="No module named 'not_installed_anywhere'"):
        plugins.find("my_broken_module:f")
    with pytest.raises(OperationError, match="RuntimeError: boom"):
        plugins.find("my_raising_module:f")
