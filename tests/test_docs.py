"""The docs are true: their commands and programs run, their links lead somewhere, options exist.

A block that cannot run has `<!-- not run: reason -->` on the line before it.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
import pytest

from onnxslim_kd.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
PAGES = {page.name: page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
FENCE = re.compile(
    r"^(?P<not_run>[ \t]*<!-- not run: .+ -->\n)?"
    r"(?P<indent>[ \t]*)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
LONG = ("README.md", "criteria.md", "export.md", "latency.md", "lowering.md", "prune.md", "run.md",
        "sensitivity.md", "train.md")  # fmt: skip
"""Pages whose commands take more than seconds together."""
LINK = re.compile(r"\[[^]]*\]\(([^)\s]+)\)")
RESULTS = r"<!-- results:begin -->.*<!-- results:end -->"
"""The table that benchmarks write names their own options."""
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*")


class Block(NamedTuple):
    language: str
    code: str
    runs: bool


def blocks(text: str) -> Iterator[Block]:
    for found in FENCE.finditer(text):
        runs = found["language"] in ("bash", "sh", "python") and found["not_run"] is None
        yield Block(found["language"], found["code"], runs)


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of every command line in the code of a page, comments left out."""
    for block in blocks(text):
        for line in block.code.replace("\\\n", " ").splitlines():
            words = line.partition(" #")[0].removeprefix("$ ").split()
            if words[:1] == ["onnxslim-kd"]:
                yield words


# ---------------------------------------------------------------------------- running


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages take for granted, small."""
    import onnxslim_kd as kd
    from onnxslim_kd.passes.merge import merge
    from onnxslim_kd.passes.strip import infer_prune
    from onnxslim_kd.zoo.export import export

    folder = tmp_path_factory.mktemp("shelf")
    kd.save(export("digits_cnn", arguments={"width": 8}), folder / "student.onnx")
    kd.save(export("digits_cnn", arguments={"width": 16}), folder / "teacher.onnx")
    kd.save(export("mobilenet_small", arguments={"width": 8}), folder / "model.onnx")
    merged = merge(folder / "student.onnx", folder / "teacher.onnx", ["kl:logits=logits"])
    kd.save(merged, folder / "merged.onnx")
    kd.save(infer_prune(folder / "student.onnx").model, folder / "folded.onnx")
    for copy, source in (("original", "folded"), ("trained", "student"), ("resnet50", "teacher")):
        shutil.copy(folder / f"{source}.onnx", folder / f"{copy}.onnx")
    choice = kd.Choice(pattern="conv", ratio=0.5)
    pruned = kd.prune(folder / "original.onnx", choice, folder / "pruned.onnx")
    pruned.plan.save(folder / "plan.json")
    (folder / "config.yaml").write_text("title: a run\n")
    lines = (f'{{"event": "epoch", "epoch": {i}, "loss": {1 / (i + 1)}}}\n' for i in range(3))
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "compress.yaml").write_text(COMPRESSOR)
    shutil.copytree(ROOT / "examples", folder / "examples")
    _images(folder / "images")
    return folder


def _images(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p in LONG else []) for p in sorted(PAGES)],
)
def test_blocks_run(page: str, shelf: Path, tmp_path: Path) -> None:
    """One folder for a page, its blocks one after the other, as a reader would."""
    for name in SHELF.get(page, ()):
        source = shelf / name
        copy = shutil.copytree if source.is_dir() else shutil.copy
        copy(source, tmp_path / name)
    for block in blocks(PAGES[page].read_text()):
        if block.runs:
            _run(block, page, tmp_path)


def _run(block: Block, page: str, folder: Path) -> None:
    code = block.code
    for before, after in SMALLER.get(page, {}).items():
        code = code.replace(before, after)
    bin_folder = Path(sys.executable).parent
    environment = os.environ | {
        "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    program = ["bash", "-e", "-c"] if block.language in ("bash", "sh") else [sys.executable, "-c"]
    done = subprocess.run(
        [*program, code], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{page}:\n{code}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


# ---------------------------------------------------------------------------- reading


def test_every_command_is_documented() -> None:
    text = "\n".join(page.read_text() for page in PAGES.values())
    shown = set(re.findall(r"onnxslim-kd ([a-z][a-z-]+)", text))
    assert not set(COMMANDS) - shown, "show these commands in docs/"
    assert not {words[1] for words in commands_of(text)} - set(COMMANDS)


@pytest.mark.parametrize("page", sorted(PAGES))
def test_options_exist(page: str) -> None:
    text = re.sub(RESULTS, "", PAGES[page].read_text(), flags=re.DOTALL)
    for words in commands_of(text):
        known = _options(words[1])
        wrong = [o for word in words for o in OPTION.findall(word)[:1] if o not in known]
        assert not wrong, f"{' '.join(words)}: {wrong}"
    anywhere = {"--help", "--debug"}.union(*map(_options, COMMANDS)) | OTHERS
    assert not set(OPTION.findall(text)) - anywhere


def _options(command: str) -> set[str]:
    found = main.get_command(click.Context(main), command)
    assert found is not None
    params = (p for p in found.params if isinstance(p, click.Option))
    return {name for p in params for name in (*p.opts, *p.secondary_opts)}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall(PAGES[page].read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = PAGES[page].parent / path if path else PAGES[page]
        assert file.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in _anchors(file.read_text()), f"{page}: {target}"


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_api_page_is_current() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    assert PAGES["api.md"].read_text() == script["page"](), "run: python docs/make_api.py"


def test_the_readme_names_every_page() -> None:
    named = set(LINK.findall(PAGES["README.md"].read_text()))
    assert not {f"docs/{name}" for name in PAGES if name != "README.md"} - named


COMPRESSOR = """\
version: 1.0
pruners:
    pruner_1: {class: StructurePruner, pruning_axis: {'*': 0}, criterions: {'*': l1_norm}}
strategies:
    pruning:
        class: UniformPruneStrategy
        pruner: pruner_1
        start_epoch: 0
        target_ratio: 0.5
        pruned_params: '.*_sep_weights'
compressor: {epoch: 2, checkpoint_path: ./checkpoints, strategies: [pruning]}
"""
# page -> the files it takes for granted
SHELF = {
    "README.md": ("model.onnx", "images"),
    "bench.md": ("original.onnx", "pruned.onnx"),
    "convert-config.md": ("compress.yaml", "student.onnx"),
    "criteria.md": ("model.onnx", "images"),
    "evaluate.md": ("student.onnx", "images", "pruned.onnx", "original.onnx", "plan.json"),
    "infer-prune.md": ("merged.onnx", "folded.onnx"),
    "losses.md": ("student.onnx", "teacher.onnx"),
    "inspect.md": ("model.onnx", "student.onnx", "teacher.onnx"),
    "lowering.md": ("student.onnx",),
    "merge.md": ("student.onnx", "teacher.onnx", "resnet50.onnx"),
    "report.md": ("original.onnx", "student.onnx", "plan.json", "train.jsonl", "config.yaml"),
    "run.md": ("examples", "images"),
    "safety.md": ("model.onnx",),
    "sensitivity.md": ("model.onnx", "images"),
    "train.md": ("student.onnx", "merged.onnx", "original.onnx", "pruned.onnx", "plan.json"),
}
_SMALL_EXPORT = {"mobilenet_v2 -o": "mobilenet_v2 --arg scale=0.25 --input image=1x3x64x64 -o"}
# page -> what is written -> what is run instead, to be quick
SMALLER = {
    "README.md": {"images -o": "images --epochs 1 --batch-size 4 -o"},
    "export.md": _SMALL_EXPORT,
    "latency.md": _SMALL_EXPORT,
    "prune.md": _SMALL_EXPORT,
    "run.md": {
        "run examples/digits.yaml": "run examples/digits.yaml -o stages.original.epochs=1"
        " -o stages.distilled.epochs=1 -o stages.bench.seconds=1 -o stages.bench.rounds=5",
    },
    "sensitivity.md": {
        "-o sens.json\nonnxslim-kd prune": "-o sens.json --ratios 0.5\nonnxslim-kd prune",
        "--trials 200": "--trials 2",
    },
    "train.md": {
        "--epochs 10": "--epochs 1",
        "-o recovered.onnx": "-o recovered.onnx --epochs 1",
        "--batch-size 128": "--batch-size 128 --epochs 1",
    },
}
# options of other programs
OTHERS = {
    *("--max-restarts", "--nproc-per-node"),
    *("--pretrained_model", "--print_params", "--pruned_params", "--pruned_ratios"),
    "--teacher_pretrained",
}
