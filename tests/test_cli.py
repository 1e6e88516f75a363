"""What all commands have in common: every option explained, and one meaning for one name."""

import json
import re
from collections import defaultdict
from functools import reduce

import click
import pytest
from click.testing import CliRunner

from onnxslim_kd.cli import COMMANDS, main
from onnxslim_kd.training.config import TrainConfig

GROUP = click.Context(main)
OPTIONS = {
    name: [p for p in main.get_command(GROUP, name).params if isinstance(p, click.Option)]
    for name in COMMANDS
}
ALIKE = ("--provider", "--untrusted", "--preprocess")
"""Options that take the same everywhere."""
OWN_JSON = ("bench",)
"""Commands whose --json may name a file."""


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    silent = [option.opts[-1] for option in OPTIONS[command] if not option.help]
    assert not silent


@pytest.mark.parametrize("name", ALIKE)
def test_an_option_means_the_same_in_all_commands(name):
    seen = defaultdict(list)
    for command, options in OPTIONS.items():
        for option in options:
            if name in option.opts and command != "train":  # whose defaults stand in its YAML
                taken = getattr(option.type, "choices", option.type.name)
                seen[(tuple(taken), option.is_flag, option.default)].append(command)
    assert len(seen) == 1, dict(seen)


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"draw"}))
def test_every_command_that_finds_something_prints_json(command):
    flags = {o.opts[-1]: o for o in OPTIONS[command]}
    assert "--json" in flags and flags["--json"].is_flag == (command not in OWN_JSON)


def test_train_says_the_defaults_that_its_settings_have():
    found = {}
    for option in OPTIONS["train"]:
        if default := re.search(r"\[default: (.+)\]", option.help or ""):
            found[option.name] = default[1]
    assert found.pop("save_eval_model") == "save-eval-model" and TrainConfig().save_eval_model
    for name, default in found.items():
        value = reduce(getattr, name.split("__"), TrainConfig())
        assert default == (f"{value:g}" if isinstance(value, float) else str(value)), name
    assert len(found) > 14


def test_the_zoo_is_listed_as_json():
    listed = json.loads(run("export", "--list", "--json").output)
    assert listed["mobilenet_v2"] == {"image": "1x3x224x224", "what": "MobileNetV2"}
