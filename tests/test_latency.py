"""Pruning to a latency: the walk, the table, the correction; measuring itself is put in."""

import dataclasses
import itertools
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

from onnxslim_kd import Choice, api, staircase
from onnxslim_kd import shapes as shape_sampling
from onnxslim_kd.cli import main
from onnxslim_kd.errors import OperationError, UserError
from onnxslim_kd.model import dims
from onnxslim_kd.passes import latency, latency_measure, prune
from onnxslim_kd.passes.groups import analyse
from onnxslim_kd.passes.latency_layers import WHOLE, Survey
from onnxslim_kd.passes.latency_measure import Clock
from onnxslim_kd.passes.latency_path import Menu, descend, kept_importance, menu, settle
from onnxslim_kd.passes.targets import Device, LatencyTarget, Target
from onnxslim_kd.profile import Operator
from onnxslim_kd.staircase import Meter, Origin, Probe, Table
from onnxslim_kd.statistics import Ratio
from tests.models import MODELS, Case, build, proto

WIDE = Case(
    "a = Conv<pads=[1,1,1,1]>(x, w1) b = Relu(a) c = Conv<pads=[1,1,1,1]>(b, w2) d = Relu(c)"
    " e = Conv<pads=[1,1,1,1]>(d, w3) f = Relu(e) y = Conv(f, w4)",
    "float[128,3,3,3] w1, float[256,128,3,3] w2, float[128,256,3,3] w3, float[4,128,1,1] w4",
)
HERE = Origin("this cpu", "1.0", "cpu", 1)


# ---------------------------------------------------------------------- a fake machine


class Machine:
    """Computes channels in blocks; convolutions take time, and ``elsewhere`` does not shrink."""

    def __init__(self, folder: Path, *, block: int = 16, elsewhere: float = 0.0) -> None:
        self.block, self.elsewhere = block, elsewhere
        self.calls: list[int] = []
        self.clock = Clock(self.trace, self.ratio, Table(self.layers, HERE, folder))

    def convolution(self, weight: tuple[int, ...]) -> float:
        out, inside = (math.ceil(size / self.block) for size in weight[:2])
        return 1e-4 * out * inside * math.prod(weight[2:])

    def layers(self, probes: list[Probe]) -> list[float]:
        self.calls.append(len(probes))
        return [self.convolution(p.operands[1][1]) for p in probes]

    def trace(self, model: ir.Model, shapes: object) -> dict[str, float]:
        convs = [node for node in model.graph if node.op_type == "Conv"]
        return {n.name: self.convolution(dims(n.inputs[1])) for n in convs}

    def ratio(self, original: ir.Model, pruned: ir.Model, shapes: object) -> float:
        before, after = (sum(self.trace(m, {}).values()) for m in (original, pruned))
        return (after + self.elsewhere * before) / (before + self.elsewhere * before)


def decided(folder: Path, target: float, pattern: str = ".*", **machine: float):
    made = Machine(folder, **machine)
    analysis = analyse(build(WIDE))
    plan = latency.plan(analysis, Choice(pattern=pattern, target=LatencyTarget(target)), made.clock)
    widths = {m.parameter: m.after for g in plan.groups for m in g.members if m.kept is not None}
    return plan, widths, made


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7, 0.88])
def test_the_measured_ratio_holds(tmp_path: Path, target: float) -> None:
    plan, _, machine = decided(tmp_path, target)
    measured = machine.ratio(build(WIDE), prune.cut(build(WIDE), plan), {})
    assert measured == pytest.approx(target, rel=0.03)


@pytest.mark.parametrize("block", [4, 8, 16, 32])
def test_widths_land_on_the_edges_of_the_staircase(tmp_path: Path, block: int) -> None:
    _, widths, machine = decided(tmp_path, 0.5, block=block)
    assert staircase.block(machine.clock.table) == block
    assert any(width < 128 for width in widths.values())
    assert all(width % block == 0 for width in widths.values())


def test_a_wrong_prediction_is_corrected(tmp_path: Path) -> None:
    """A quarter of the time is in no trace and never shrinks."""
    plan, _, machine = decided(tmp_path, 0.6, elsewhere=0.34)
    measured = machine.ratio(build(WIDE), prune.cut(build(WIDE), plan), {})
    assert measured == pytest.approx(0.6, rel=0.03)
    assert "after 1 tries" not in plan.notes[0]


def test_where_a_trace_tells_nothing_layers_count_by_themselves(tmp_path: Path) -> None:
    """As on a GPU: only the time of the whole model is known, more than that of its layers."""
    machine = Machine(tmp_path)
    whole = 1.5 * sum(machine.trace(build(WIDE), {}).values())
    clock = dataclasses.replace(machine.clock, trace=lambda *_: {WHOLE: whole})
    analysis = analyse(build(WIDE))
    plan = latency.plan(analysis, Choice(pattern=".*", target=LatencyTarget(0.5)), clock)
    measured = machine.ratio(build(WIDE), prune.cut(build(WIDE), plan), {})
    assert measured == pytest.approx(0.5, rel=0.03)


def test_an_unreachable_budget_ends_with_the_best_and_what_blocks(tmp_path: Path) -> None:
    plan, widths, _ = decided(tmp_path, 0.1, pattern="w1")
    assert widths["w1"] == 32  # a quarter, the floor
    assert "0.1 was asked for and not reached within 2%" in plan.notes[1]
    assert "every group is at its floor, and what no group touches takes" in plan.notes[1]
    assert "most of it Conv" in plan.notes[1] or "most of it node" in plan.notes[1]


def test_nothing_to_cut_is_said_and_not_measured(tmp_path: Path) -> None:
    plan, _, machine = decided(tmp_path, 0.5, pattern="w4")
    assert plan.groups == ()
    assert plan.refused[0].reason.startswith("graph output")
    assert plan.notes == ("nothing of what was chosen can go: the target is not reached",)
    assert machine.calls == []


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_latency_chooses_the_widths_for_macs_as_well(tmp_path: Path, share: float) -> None:
    machine = Machine(tmp_path)
    choice = Choice(pattern=".*", target=Target("macs", share), allocation="latency")
    plan = latency.plan(analyse(build(WIDE)), choice, machine.clock)
    assert 1 - plan.macs_after / plan.macs_before == pytest.approx(share, abs=0.04)
    widths = [m.after for g in plan.groups for m in g.members if m.kept is not None]
    assert all(width % machine.block == 0 for width in widths)
    measured = machine.ratio(build(WIDE), prune.cut(build(WIDE), plan), {})
    said = f"of the macs is gone, {measured:.2f} of the latency is expected (cpu, threads:"
    assert said in plan.notes[0]


def test_macs_out_of_reach_by_latency_are_said(tmp_path: Path) -> None:
    choice = Choice(pattern="w1", target=Target("macs", 0.9), allocation="latency")
    plan = latency.plan(analyse(build(WIDE)), choice, Machine(tmp_path).clock)
    assert plan.groups[0].removed == 96
    assert "90.0% was asked for, and every group is at its floor" in plan.notes[0]


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_a_share_outside_of_its_range(share: float) -> None:
    with pytest.raises(UserError, match=r"--target-latency: the share to keep must be in \(0, 1\)"):
        LatencyTarget(share)


# ---------------------------------------------------------------------------- the walk


class Product:
    """A layer between two groups: its time is the product of their widths."""

    def __init__(self, groups: tuple[int, ...], kept: list[tuple[int, ...]], each: float) -> None:
        self.groups, self._kept, self._each = frozenset(groups), kept, each

    def at(self, levels) -> float:
        return self._each * math.prod(self._kept[g][levels[g]] for g in self.groups)


def random_problem(seed: int):
    rng = np.random.default_rng(seed)
    menus, kept = [], []
    for _ in range(5):
        size = int(rng.integers(3, 9))
        lost = np.concatenate([[0], np.cumsum(np.sort(rng.uniform(0.2, 1.8, size - 1)))])
        kept.append(tuple(range(size, 0, -1)))
        removed = tuple(np.arange(k) for k in range(size))
        menus.append(Menu(kept[-1], removed, tuple(lost.tolist()), float(lost[-1]) + 1.8))
    layers = [Product((g, g + 1), kept, rng.uniform(0.5, 4)) for g in range(4)]
    return menus, [*layers, Product((0,), kept, 2.0)]


@pytest.mark.parametrize("seed", range(8))
def test_the_walk_keeps_nearly_what_the_best_choice_keeps(seed: int) -> None:
    menus, layers = random_problem(seed)
    total = sum(m.total for m in menus)
    everything = [
        (
            sum(x.at(levels) for x in layers),
            sum(m.lost[i] for m, i in zip(menus, levels, strict=True)),
        )
        for levels in itertools.product(*(range(len(m.removed)) for m in menus))
    ]
    stops = descend(menus, layers)
    assert len(stops) > 5
    for stop in stops:
        best = min(lost for seconds, lost in everything if seconds <= stop.seconds * (1 + 1e-9))
        assert (total - stop.lost) >= 0.88 * (total - best)
    middle = [s for s in stops if 0.4 < s.seconds / stops[0].seconds < 0.8]
    shares = [
        (total - s.lost)
        / (total - min(lost for sec, lost in everything if sec <= s.seconds * (1 + 1e-9)))
        for s in middle
    ]
    assert np.mean(shares) >= 0.97


@pytest.mark.parametrize("seed", range(3))
def test_seconds_fall_and_are_those_of_the_levels(seed: int) -> None:
    menus, layers = random_problem(seed)
    stops = descend(menus, layers)
    assert all(b.seconds < a.seconds and b.lost > a.lost for a, b in itertools.pairwise(stops))
    for stop in stops:
        assert stop.seconds == pytest.approx(sum(x.at(stop.levels) for x in layers))
        lost = sum(m.lost[i] for m, i in zip(menus, stop.levels, strict=True))
        assert stop.lost == pytest.approx(lost)
    finer = descend(menus, layers, start=stops[2].levels, most=stops[0].seconds / 50)
    assert finer[0].levels == stops[2].levels
    assert all(a.seconds - b.seconds <= stops[0].seconds / 50 for a, b in itertools.pairwise(finer))


def test_a_menu_keeps_whole_blocks_and_a_floor() -> None:
    analysis = analyse(build(WIDE))
    ranked, _, _ = prune.rank(analysis, Choice(pattern="w1|w2"))
    narrow, wide = (menu(c, 16) for c in ranked)
    assert narrow.kept == (128, 112, 96, 80, 64, 48, 32)
    assert wide.kept == tuple(range(256, 63, -16))
    assert narrow.total == pytest.approx(128)  # every score by the mean of its group
    mask = prune.mark(analysis, [narrow.removed[2], wide.removed[0]])
    left = 1 - narrow.lost[2] / (narrow.total + wide.total)
    assert kept_importance(ranked, mask) == pytest.approx(left)
    assert narrow.lost[1] < 16  # the weakest go first
    few = menu(ranked[0], 32)
    assert few.kept == (128, 112, 96, 80, 64, 48, 32)  # four blocks: between them as well


def test_settling_moves_along_by_what_was_measured() -> None:
    predicted = [1 - i / 100 for i in range(90)]
    asked = []

    def measure(index: int) -> float:
        asked.append(index)
        return 0.3 + 0.7 * predicted[index]

    found = settle(predicted, measure, 0.5, tolerance=0.01, tries=10)
    assert found.held and found.ratio == pytest.approx(0.5, rel=0.01)
    assert len(asked) == len(set(asked)) == found.tries <= 6


def test_settling_ends_when_the_machine_is_noise() -> None:
    rng = np.random.default_rng(0)
    predicted = [1 - i / 100 for i in range(90)]
    found = settle(predicted, lambda i: float(rng.uniform(0.2, 2)), 0.5, tolerance=1e-9, tries=10)
    assert not found.held and found.tries <= 10
    floor = settle(predicted, lambda i: 0.9, 0.5, tolerance=0.03, tries=10)
    assert not floor.held and floor.bracket == (89, 90)


# ------------------------------------------------------------------------- the layers


def simple(case: Case) -> bool:
    return any(units > 3 for units in case.units.values())


@pytest.mark.parametrize("name", [n for n, c in MODELS.items() if simple(c)])
def test_shapes_of_levels_are_those_of_the_cut_model(name: str) -> None:
    analysis = analyse(build(MODELS[name]))
    ranked, _, _ = prune.rank(analysis, Choice(pattern=".*"))
    menus = [menu(c, 1) for c in ranked]
    levels = [min(2, len(m.removed) - 1) for m in menus]
    survey = Survey(analysis, menus, shape_sampling.sample(analysis.model))
    expected = {}
    for node in analysis.model.graph:
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and len(dims(value)) > 1:
                operand = survey.operand(node, index)
                expected[value.name] = operand.at(levels)[1]
    mask = prune.mark(analysis, [m.removed[i] for m, i in zip(menus, levels, strict=True)])
    new = analysis.new_shapes(mask)
    for value in analysis.channels.layout:
        widths = survey.value_widths(value)
        have = analysis.shapes.shape[value]
        after = tuple(widths[a].at(levels) if a in widths else n for a, n in enumerate(have))
        assert after == new.get(value, have), value.name
    prune.apply(analysis, mask)
    weights = analysis.model.graph.initializers
    seen = {n: dims(weights[n]) for n in expected if n in weights}
    assert seen
    assert seen == {n: expected[n] for n in seen}


def test_depthwise_groups_follow_the_width(tmp_path: Path) -> None:
    case = Case(
        "a = Conv(x, w1) b = Conv<group=64, pads=[1,1,1,1]>(a, w2) y = Conv(b, w3)",
        "float[64,3,1,1] w1, float[64,1,3,3] w2, float[4,64,1,1] w3",
    )
    seen: list[Probe] = []

    def measure(probes):
        seen.extend(probes)
        return [1e-3 * p.operands[1][1][0] for p in probes]

    analysis = analyse(build(case))
    ranked, _, _ = prune.rank(analysis, Choice(pattern=".*"))
    survey = Survey(analysis, [menu(c, 16) for c in ranked], analysis.shapes)
    seconds = {node.name: 1e-3 for node in analysis.model.graph}
    layers = survey.layers(seconds, Table(measure, HERE, tmp_path))
    assert [layer.at([0]) for layer in layers] == [1e-3] * 3
    deep = [p for p in seen if dict(p.attributes).get("group", 1) > 1]
    assert {dict(p.attributes)["group"] for p in deep} == {64, 56, 48, 40, 32, 24, 16}
    assert all(p.operands[0][1][1] == dict(p.attributes)["group"] for p in deep)


def test_a_layer_of_one_operand_is_measured(tmp_path: Path) -> None:
    case = Case(
        'a = Conv(x, w1) b = Einsum<equation="nchw->nhwc">(a) y = MatMul(b, w2)',
        "float[32,3,3,3] w1, float[32,4] w2",
        outputs="float[N,6,6,4] y",
    )
    analysis = analyse(build(case))
    ranked, _, _ = prune.rank(analysis, Choice(pattern="w1"))
    survey = Survey(analysis, [menu(c, 16) for c in ranked], analysis.shapes)
    table = Table(lambda probes: [1e-3] * len(probes), HERE, tmp_path)
    assert len(survey.layers({WHOLE: 1.0}, table)) == 3


# -------------------------------------------------------------------------- the table


def conv(width: int) -> Probe:
    x, w = ("FLOAT", (1, 8, 6, 6), False), ("FLOAT", (width, 8, 3, 3), True)
    return Probe("Conv", 17, (("kernel_shape", (3, 3)),), (x, w), "FLOAT")


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    asked: list[int] = []

    def measure(probes):
        asked.extend(p.operands[1][1][0] for p in probes)
        return [float(p.operands[1][1][0]) for p in probes]

    table = Table(measure, HERE, tmp_path)
    assert table.seconds([conv(4), conv(8), conv(4)]) == [4, 8, 4]
    assert table.seconds([conv(16)]) == [16]
    assert asked == [4, 8, 16]
    whole = table.path.read_bytes()
    for length in range(len(whole) + 1):  # killed while writing, anywhere
        table.path.write_bytes(whole[:length])
        again = Table(measure, HERE, tmp_path)
        assert again.seconds([conv(4), conv(8), conv(16)]) == [4, 8, 16]
        assert again.measured <= 3
        assert Table(measure, HERE, tmp_path).seconds([conv(16)]) == [16]
    asked.clear()
    Table(measure, HERE, tmp_path).seconds([conv(4), conv(8), conv(16)])
    assert asked == []


def test_a_table_from_elsewhere_is_measured_again_and_that_is_said(tmp_path: Path) -> None:
    other = Origin("another cpu", "1.0", "cpu", 1)
    Table(lambda probes: [9.0] * len(probes), other, tmp_path).seconds([conv(4)])
    threads = Origin("this cpu", "1.0", "cpu", 2)
    Table(lambda probes: [7.0] * len(probes), threads, tmp_path).seconds([conv(4)])
    table = Table(lambda probes: [1.0] * len(probes), HERE, tmp_path)
    assert table.seconds([conv(4)]) == [1.0]
    assert table.foreign == {"another cpu, ONNX Runtime 1.0"}
    plan, _, _ = decided(tmp_path, 0.5)
    assert plan.notes[-1] == (
        "times in staircase.jsonl from elsewhere were not used: another cpu, ONNX Runtime 1.0"
    )


def test_a_second_run_measures_no_layer(tmp_path: Path) -> None:
    first, widths, machine = decided(tmp_path, 0.5)
    assert machine.calls and "measured 0 layers" not in first.notes[0]
    _, again, machine = decided(tmp_path, 0.5)
    assert machine.calls == [] and again == widths


def test_a_damaged_table_is_measured_again(tmp_path: Path) -> None:
    table = Table(lambda probes: [1.0] * len(probes), HERE, tmp_path)
    table.seconds([conv(4)])
    line = table.path.read_text()
    for bad in (line.replace("1.0}", "NaN}"), line.replace("1.0}", "-1}"), "[]", "null"):
        table.path.write_text(bad)
        assert Table(lambda probes: [2.0], HERE, tmp_path).seconds([conv(4)]) == [2.0]
    table.path.write_bytes(bytes(range(256)))
    assert Table(lambda probes: [2.0], HERE, tmp_path).seconds([conv(4)]) == [2.0]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--cache .*file: "):
        Table(lambda probes: [], HERE, tmp_path / "file")


def test_where_the_table_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(staircase.platform, "system", lambda: "Linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert staircase.cache_folder() == tmp_path / "onnxslim-kd"
    monkeypatch.setattr(staircase.platform, "system", lambda: "Darwin")
    assert staircase.cache_folder() == Path.home() / "Library" / "Caches" / "onnxslim-kd"


def test_layers_are_measured_side_by_side_or_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staircase, "SECONDS", 0.01)
    probes = [conv(8), conv(64)]
    gemm = Probe(
        "Gemm",
        17,
        (("transB", 1),),
        (("FLOAT", (1, 64), False), ("FLOAT", (10, 64), True), None),
        "FLOAT",
    )
    assert all(s > 0 for s in Meter("cpu", 1)([*probes, gemm]))
    assert all(s > 0 for s in Meter("cpu", 1)._in_turn(probes))


def test_fused_layers_go_by_the_node_that_multiplies() -> None:
    case = Case(
        "a = Conv(x, w1) b = BatchNormalization(a, wpos, wb, wm, wposv) y = Conv(b, w2)",
        "float[8,3,3,3] w1, float[8] wpos, float[8] wb, float[8] wm, float[8] wposv,"
        " float[4,8,1,1] w2",
    )
    model = build(case)
    first, norm, last = model.graph
    ran = [
        Operator(norm.name, "Conv", "CPUExecutionProvider", 2.0),
        Operator(last.name, "FusedConv", "CPUExecutionProvider", 1.0),
        Operator("ReorderOutput", "ReorderOutput", "CPUExecutionProvider", 0.5),
    ]
    assert latency_measure.by_layer(model, ran) == {
        first.name: 0.002,
        last.name: 0.001,
        "ReorderOutput": 0.0005,
    }


# ----------------------------------------------------------------------- the command


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(proto(MODELS["residual"]), path)
    return path


def run(*arguments: object):
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (("--target-latency", 0.5, "--target-macs", 0.5), "not --target-macs and --target-latency"),
        (("--target-latency", 1.5), "the share to keep must be in (0, 1), got 1.5"),
        (("--target-latency", 0.5, "--round-to", 16), "by itself: leave out --round-to"),
        (
            ("--target-latency", 0.5, "--allocation", "global"),
            "decides itself: leave out --allocation global",
        ),
        (("--allocation", "latency"), "needs to know how far: give --target-latency, or"),
        (
            ("--allocation", "latency", "--target-macs", 0.5, "--steps", 2),
            "--steps goes neither with",
        ),
        (
            ("--allocation", "sensitivity", "--target-macs", 0.5),
            "--allocation sensitivity needs what was measured: --sensitivity FILE",
        ),
        (("--target-latency", 0.5), "input x is free in size; give every ? of --input x=1x3x?x?"),
    ],
)
def test_bad_latency_targets(model: Path, tmp_path: Path, given: tuple, text: str) -> None:
    onnx.save(proto(Case("y = Conv(x, w)", "float[4,3,1,1] w", "float[N,3,H,W] x")), model)
    result = run("prune", model, "--pattern", "w", "--dry-run", "--cache", tmp_path, *given)
    assert result.exit_code == 2, result.output
    assert text in result.stderr


def test_a_slower_cut_is_refused_unless_forced(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = [Ratio(1.3, 1.2, 1.4)]
    monkeypatch.setattr(latency_measure, "compare", lambda *_: measured[0])
    out = tmp_path / "out.onnx"
    command = ("prune", model, "--pattern", "w", "--round-to", "1", "-o", out, "--bench")
    result = run(*command)
    assert result.exit_code == 1
    assert "the cut measures 1.300 [1.200, 1.400] of the original's latency: it is slower" in (
        result.stderr
    )
    assert not out.exists()
    result = run(*command, "--force-slower")
    assert result.exit_code == 0 and out.exists()
    assert "Latency: 1.300 [1.200, 1.400] of the original's (cpu)." in result.stdout
    measured[0] = Ratio(1.02, 0.98, 1.06)  # may as well be noise
    assert run(*command, "--force").exit_code == 0


def test_not_slower_measures(model: Path) -> None:
    ratio = latency_measure.not_slower(
        model, build(MODELS["residual"]), setting=latency_measure.quick(threads=1), force=True
    )
    assert 0.3 < ratio.median < 3
    with pytest.raises(OperationError, match="was not written"):
        latency_measure.not_slower(
            build(Case("y = Conv(x, w)", "float[4,3,1,1] w", "float[1,3,64,64] x")),
            build(
                Case(
                    "h = Conv(x, w) y = Conv<pads=[2,2,2,2]>(h, wb)",
                    "float[64,3,1,1] w, float[4,64,5,5] wb",
                    "float[1,3,64,64] x",
                )
            ),
            setting=latency_measure.quick(threads=1),
        )


@pytest.mark.slow
def test_this_machine_measures_what_was_asked(tmp_path: Path) -> None:
    from onnxslim_kd.zoo.export import export

    model = export("mobilenet_v1")
    device = Device(threads=1, cache=tmp_path)
    choice = Choice(pattern=".*", target=LatencyTarget(0.6), device=device)
    result = api.prune(model, choice)
    sizes = {"image": (1, 3, 224, 224)}
    ratio = latency_measure.compare(model, result.model, sizes, device.setting)
    assert ratio.median == pytest.approx(0.6, rel=0.05)
