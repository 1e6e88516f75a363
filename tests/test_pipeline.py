import json
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from onnxslim_kd import model as model_io
from onnxslim_kd import pipeline, recipe
from onnxslim_kd.cli import main
from onnxslim_kd.errors import NotFoundError, OperationError, UserError
from onnxslim_kd.plans import Plan
from onnxslim_kd.prune_config import PruneConfig
from onnxslim_kd.stages import STAGES
from onnxslim_kd.stages_graph import Export, InferPrune, Merge, Prune
from onnxslim_kd.stages_measure import Bench, Eval, Search, Sensitivity
from onnxslim_kd.stages_train import Calibrate, Train
from onnxslim_kd.stamps import Stamps, stamp
from onnxslim_kd.training.config import TrainConfig

EXAMPLES = Path(__file__).parents[1] / "examples"
SHORT = """
data: digits
stages:
  net: {do: export, arch: digits_cnn, arguments: {width: 8}}
  pruned: {do: prune, pattern: conv.*_weights, round_to: 1}
  shipped: {do: infer_prune}
"""


def written(folder: Path, text: str = SHORT, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def called(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in ("run", *arguments)])


def events(config: Path, folder: Path, *overrides: str, resume: bool = False) -> dict[str, object]:
    """Run, and return why each stage ran; None for those that did not."""
    found = {}

    def listen(event):
        if event["event"] == "stage" and "kept" in event:
            found[event["name"]] = event["reason"]

    pipeline.run(recipe.read(config, overrides), folder, resume=resume, listen=listen)
    return found


# ------------------------------------------------------------------------- the whole run


def test_digits_runs_end_to_end(tmp_path):
    few = ("stages.original.epochs=8", "stages.distilled.epochs=3", "stages.bench.rounds=5")
    small = (
        "stages.untrained.arguments.width=16",
        "stages.bench.seconds=1",
        "data=digits?split=test",
    )
    options = [f"-o{override}" for override in (*few, *small)]
    done = called(EXAMPLES / "digits.yaml", *options, "--dir", tmp_path / "run")
    assert done.exit_code == 0, done.output
    for text in ("Latency", "Size", "MACs", "Top-1", "report.html"):
        assert text in done.output.split("[9/9]")[1]
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"report.html", "report.md", "config.yaml", "stages.json", "bench.json"}
    assert names >= {f"{name}.onnx" for name in ("original", "pruned", "distilled", "shipped")}
    page = (tmp_path / "run" / "report.html").read_text()
    for text in ("distilled: Losses", "conv2_weights", "width: 16", "data:image/svg+xml"):
        assert text in page
    losses = losses_of(tmp_path / "run" / "distilled.jsonl")
    assert all(values[-1] < values[0] for values in losses.values()), losses


def losses_of(log: Path) -> dict[str, list[float]]:
    steps = [e for e in map(json.loads, log.read_text().splitlines()) if e["event"] == "step"]
    known = {"event", "epoch", "step", "steps", "lr", "samples_per_second"}
    return {name: [step[name] for step in steps] for name in steps[0].keys() - known}


# ------------------------------------------------------------------------- up to date


def test_only_what_changed_runs_again(tmp_path):
    config, folder = written(tmp_path), tmp_path / "run"
    assert set(events(config, folder).values()) == {"it is new"}
    assert set(events(config, folder).values()) == {None}
    found = events(config, folder, "stages.pruned.ratio=0.25")
    assert found == {
        "net": None,
        "pruned": "its settings changed",
        "shipped": "pruned.onnx changed",
    }
    (folder / "shipped.onnx").unlink()
    assert events(config, folder, "stages.pruned.ratio=0.25") == {
        "net": None,
        "pruned": None,
        "shipped": "shipped.onnx is gone",
    }
    with (folder / "net.onnx").open("ab") as file:
        file.write(b" ")
    assert events(config, folder, "stages.pruned.ratio=0.25")["net"] == "net.onnx changed"


def test_another_version_runs_everything_again(tmp_path):
    config, folder = written(tmp_path), tmp_path / "run"
    events(config, folder)
    text = (folder / "stages.json").read_text()
    stamps = Stamps.model_validate_json(text)
    old = stamps.stages["net"].model_copy(update={"version": "0.0.1"})
    Stamps(stages=stamps.stages | {"net": old}).save(folder)
    assert events(config, folder)["net"] == "it was made by version 0.0.1"


def test_files_of_one_name_are_told_apart(tmp_path):
    files = [tmp_path / folder / "labels.npz" for folder in ("one", "two")]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(b"before")
    before = stamp("", files, [])
    files[0].write_bytes(b"after")
    assert before.inputs.keys() == stamp("", files, []).inputs.keys() == {"labels.npz"}
    assert before != stamp("", files, [])


def test_a_stage_that_failed_runs_again(tmp_path):
    config, folder = written(tmp_path), tmp_path / "run"
    with pytest.raises(UserError, match=r"stage 'pruned': .*nothing_like_it"):
        events(config, folder, "stages.pruned.pattern=nothing_like_it")
    found = events(config, folder, "stages.pruned.ratio=0.5")
    assert found["net"] is None
    assert found["pruned"] == "it was not finished"


def test_a_list_of_data_that_changed_trains_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def data(seed):
        rng = np.random.default_rng(seed)
        images = rng.random((8, 1, 8, 8), dtype=np.float32)
        np.savez("data.npz", image=images, label=np.arange(8) % 10)

    text = """
stages:
  net: {do: export, arch: digits_cnn, arguments: {width: 8}}
  train: {data: "npz:data.npz", epochs: 1, batch_size: 8}
"""
    config, folder = written(tmp_path, text), tmp_path / "run"
    data(0)
    events(config, folder)
    data(0)
    assert events(config, folder)["train"] is None
    data(1)
    assert events(config, folder)["train"] == "npz:data.npz changed"


def test_resume_goes_on_and_without_it_training_starts_afresh(tmp_path):
    text = """
data: digits?split=test
stages:
  net: {do: export, arch: digits_cnn, arguments: {width: 8}}
  train: {epochs: 1}
"""
    config, folder = written(tmp_path, text), tmp_path / "run"

    def started(resume):
        heard = []
        chosen = recipe.read(config, ["stages.train.epochs=2"])
        pipeline.run(chosen, folder, resume=resume, listen=lambda e: heard.append(e["event"]))
        return heard

    events(config, folder)
    assert "resume" in started(True)
    (folder / "train.onnx").unlink()
    assert "resume" not in started(False)
    assert "resume" not in started(True)  # nothing to do


def test_a_dry_run_says_what_would_run_and_writes_nothing(tmp_path):
    config, folder = written(tmp_path), tmp_path / "run"
    done = called(config, "--dir", folder, "--dry-run")
    assert done.output == (
        "[1/3] net: it is new\n[2/3] pruned: net comes first\n[3/3] shipped: pruned comes first\n"
    )
    assert not folder.exists()
    events(config, folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    found = called(config, "--dir", folder, "--dry-run", "-o", "stages.pruned.ratio=0.25", "--json")
    assert json.loads(found.output) == {
        "net": None, "pruned": "its settings changed", "shipped": "pruned comes first",
    }  # fmt: skip
    assert before == {path: path.read_bytes() for path in folder.iterdir()}


def test_search_and_calibrate_are_stages(tmp_path):
    text = """
data: digits?split=test
stages:
  net: {do: export, arch: digits_cnn, arguments: {width: 8}}
  search: {target_macs: 0.4, pattern: conv.*_weights, trials: 3, samples: 64, round_to: 1}
  pruned: {do: prune, plan: search}
  calibrated: {do: calibrate, batches: 2}
"""
    config, folder = written(tmp_path, text), tmp_path / "run"
    assert set(events(config, folder).values()) == {"it is new"}
    assert set(events(config, folder).values()) == {None}
    plan = Plan.load(folder / "search.plan.json")
    assert plan.macs_after <= 0.6 * plan.macs_before and "3 trials" in plan.notes[0]
    cut, done = (model_io.load(folder / f"{name}.onnx") for name in ("pruned", "calibrated"))
    before, after = (model.graph.initializers["conv1_bn_mean"].const_value for model in (cut, done))
    assert before.shape == after.shape and not np.allclose(before.numpy(), after.numpy())
    found = events(config, folder, "stages.search.trials=4", resume=True)
    assert found["search"] == "its settings changed"
    assert "4 trials" in Plan.load(folder / "search.plan.json").notes[0]
    found = events(config, folder, "stages.search.trials=4", "stages.calibrated.batches=3")
    assert found == {
        "net": None,
        "search": None,
        "pruned": None,
        "calibrated": "its settings changed",
    }


# ------------------------------------------------------------------------- reading


def test_overrides_and_includes(tmp_path):
    written(tmp_path, "title: below\nstages: {net: {do: export, arch: digits_cnn}}", "base.yaml")
    config = written(
        tmp_path, "include: [base.yaml]\ntitle: above\nstages: {shipped: {do: infer-prune}}"
    )
    found = recipe.read(config, ["stages.net.arguments.width=8", "stages.net.seed=3"])
    assert found.title == "above" and list(found.stages) == ["net", "shipped"]
    assert found.stages["net"].arguments == {"width": 8} and found.stages["net"].seed == 3


def test_an_override_reaches_into_lists_and_may_hold_equal_signs(tmp_path):
    text = """
stages:
  net: {do: export, arch: digits_cnn}
  merge: {teacher: net, losses: [{kind: kl, student: logits, teacher: logits}]}
  train: {data: digits}
"""
    config = written(tmp_path, text)
    found = recipe.read(
        config,
        ["stages.merge.losses.0.temperature=2", "stages.train.data=npz:http://a/b?x=1&y=2"],
    )
    merge, train = found.stages["merge"], found.stages["train"]
    assert isinstance(merge, Merge) and merge.losses[0]["temperature"] == 2
    assert isinstance(train, Train) and train.data == "npz:http://a/b?x=1&y=2"
    with pytest.raises(UserError, match="does not fit the settings"):
        recipe.read(config, ["stages.merge.losses.3.temperature=2"])
    with pytest.raises(UserError, match=r"expected key\.path=value"):
        recipe.read(config, ["stages.merge"])


def test_a_pattern_is_a_fine_value(tmp_path):
    found = recipe.read(written(tmp_path), ["stages.pruned.pattern=.*[r|d]_weights"])
    assert isinstance(found.stages["pruned"], Prune)
    assert found.stages["pruned"].pattern == ".*[r|d]_weights"
    starred = recipe.read(written(tmp_path), ["stages.pruned.pattern=*bad yaml"])
    assert starred.stages["pruned"].pattern == "*bad yaml"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pruned: {do: prune, ratoi: 0.5}", "'stages.pruned.ratoi' is not known.*: ratio"),
        ("train: {data: digits, optimizer: {momentun: 1}}", "near misses: momentum"),
        ("pruned: {do: prnue}", "do: prnue is none of export, .*; near misses: prune"),
        ("train: {data: digits, checkpoint: here}", "checkpoint has its place in the run's folder"),
        ("search: {trials: 3}", "'stages.search': give either target_macs or target_latency"),
        ("search: {target_macs: 0.5, trails: 3}", "near misses: trials"),
        ("calibrate: {batches: 0, data: digits}", "'stages.calibrate.batches'"),
        ("calibrate: {}", "'stages.calibrate.data' is missing"),
        ("sheep: {}", "its name is none of export, .*; say what"),
        ("merge: {losses: []}", "'stages.merge.teacher' is missing"),
        ("merge: {teacher: nett, losses: ['kl:a=b']}", "reads 'nett', which is neither"),
        ("train: {epochs: 1}", "stage 'train': give data"),
        ("eval: {models: [net], data: digits, batch_size: 0}", "'stages.eval.batch_size'"),
        ("a b: {do: prune}", "stages.a b"),
        ("bench: {models: [net, later]}", "'later'"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path, line, message):
    text = f"stages:\n  net: {{do: export, arch: digits_cnn}}\n  {line}\n"
    with pytest.raises(UserError, match=message):
        recipe.read(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stagse: {}", "near misses: stages"),
        ("stages: {}", "'stages'"),
        ("stages: {prune: {pattern: a}}", "no stage before it makes a model"),
        ("include: nothing.yaml", "must be a list of files"),
        ("include: [run.yaml]", "includes itself"),
        ("include: [nothing.yaml]", "nothing.yaml"),
        ("- a", "must hold settings"),
        ("data: imagelist:a.txt\nstages: {eval: {models: [a.onnx]}}", "val_data"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        recipe.read(written(tmp_path, text))


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "letter.txt").write_text("dear")
    done = called(written(tmp_path), "--dir", tmp_path / "run")
    assert done.exit_code == 2 and "holds files but no run" in done.output
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["letter.txt"]


def test_damaged_stamps_and_several_processes(tmp_path, monkeypatch):
    config, folder = written(tmp_path), tmp_path / "run"
    folder.mkdir()
    (folder / "stages.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        events(config, folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="torchrun"):
        events(config, tmp_path / "other")
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(OperationError, match="cannot be made"):
        events(config, config / "inside")


# ------------------------------------------------------------------------- the tables


def test_the_stages_take_all_settings_of_their_commands():
    assert set(TrainConfig.model_fields) < set(Train.model_fields)
    assert set(PruneConfig.model_fields) < set(Prune.model_fields)


# command -> its stage, options that a run answers itself, and options with another name there
NOT_HERE = {"output", "force", "as_json", "untrusted"}
COMMANDS = {
    "prune": (Prune, {"dry_run", "save_plan", "pruned_params", "pruned_ratios"}, {}),
    "bench": (Bench, {"json_file", "markdown", "html", "inputs"}, {"shapes": "inputs"}),
    "eval": (Eval, set(), {"model": "models"}),
    "sensitivity": (Sensitivity, set(), {"models": "model"}),
    "search": (Search, {"save_plan"}, {}),
    "calibrate": (Calibrate, set(), {}),
    "infer_prune": (
        InferPrune, set(), {"softmax": "activation", "sigmoid": "activation", "form": "format"},
    ),
    "merge": (
        Merge, {"suggest", "external_data", "prefix"},
        {"teachers": "teacher", "mapped": "inputs_map", "adapted": "adapt", "shapes": "inputs"},
    ),
    "export": (Export, {"list_"}, {"spec": "arch"}),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_a_setting_of_its_stage(name):
    kind, own, spelled = COMMANDS[name]
    command = main.get_command(click.Context(main), name.replace("_", "-"))
    options = {param.name for param in command.params} - NOT_HERE - own - {"help"}
    assert {spelled.get(option, option) for option in options} <= set(kind.model_fields)


def test_every_stage_is_refused_by_name_and_not_by_accident():
    for verb, kind in STAGES.items():
        assert verb.replace("_", "") == kind.__name__.lower()
        assert "do" not in kind.model_fields


def test_json_lines(tmp_path):
    done = called(written(tmp_path), "--dir", tmp_path / "run", "--json")
    found = [json.loads(line) for line in done.output.splitlines()]
    assert [e["name"] for e in found if "kept" in e] == ["net", "pruned", "shipped"]
    assert found[-1]["event"] == "report"


def test_unknown_names_list_near_misses(tmp_path):
    with pytest.raises(NotFoundError, match="near misses: net"):
        recipe.read(written(tmp_path), ["stages.pruned.model=nett"])
