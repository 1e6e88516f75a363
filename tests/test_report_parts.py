"""What a plan and a training log give to the report."""

import json

import pytest

from onnxslim_kd.errors import UserError
from onnxslim_kd.plans import Group, Member, Plan
from onnxslim_kd.plans import Refusal as Refused
from onnxslim_kd.report import Layer, Refusal, ReportData, render
from onnxslim_kd.report_parts import POINTS, curves, plan_parts


def member(parameter, node, kept, axis=0):
    after = 8 if kept is None else len(kept)
    return Member(parameter=parameter, axis=axis, node=node, before=16, after=after, kept=kept)


def test_a_plan_gives_layers_and_refusals():
    half = tuple(range(8))
    group = Group(
        asked_by=("a.weight",), ratio=0.5, units=16, removed=8, importance=(1.0,) * 16,
        members=(
            member("a.weight", "conv_a", half), member("a.bias", "conv_a", half),
            member("b.weight", "conv_b", None, axis=1), member("c.weight", "conv_c", half),
        ),
    )  # fmt: skip
    refused = (Refused(parameter="fc.weight", reason="graph output y"),)
    parts = plan_parts(Plan(criterion="l1", groups=(group,), refused=refused, notes=("note",)))
    assert parts["layers"] == (
        Layer(name="a.weight", before=16, after=8), Layer(name="c.weight", before=16, after=8),
    )  # fmt: skip
    assert parts["refusals"] == (Refusal(name="fc.weight", reason="graph output y"),)
    assert "graph output y" in render(ReportData().model_copy(update=parts))


def write(path, events):
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def step(epoch, number, loss, steps=2):
    return {"event": "step", "epoch": epoch, "step": number, "steps": steps, "loss": loss,
            "l2": loss / 2, "lr": 0.1, "samples_per_second": 9.0}  # fmt: skip


def test_a_log_gives_losses_together_and_metrics_apart(tmp_path):
    log = write(tmp_path / "log.jsonl", [
        {"event": "start"}, step(0, 1, 4.0), step(0, 2, 3.0),
        {"event": "epoch", "epoch": 1, "seconds": 1.5, "top1": 0.5, "top5": 0.9,
         "miou": 0.25},
        {"event": "checkpoint", "path": "x"}, step(1, 1, 2.0), {"event": "end"},
    ])  # fmt: skip
    losses, accuracy, other = curves(log)
    assert [curve.name for curve in losses.curves] == ["loss", "l2"]
    assert losses.curves[0].points == ((0.5, 4.0), (1.0, 3.0), (1.5, 2.0))
    assert (accuracy.title, accuracy.curves[0].points) == ("top1, top5", ((1.0, 0.5),))
    assert other.title == "miou"


def test_a_term_that_is_all_of_the_loss_is_drawn_once(tmp_path):
    events = [step(0, n, float(n)) | {"l2": float(n)} for n in (1, 2)]
    (losses,) = curves(write(tmp_path / "log.jsonl", events))
    assert [curve.name for curve in losses.curves] == ["loss"]


def test_a_resumed_run_counts_once_and_a_new_run_alone(tmp_path):
    events = [
        {"event": "start"}, step(0, 1, 4.0), step(0, 2, 3.0),
        {"event": "start"}, {"event": "resume", "epoch": 0, "step": 1}, step(0, 2, 3.5),
    ]  # fmt: skip
    (losses,) = curves(write(tmp_path / "resumed.jsonl", events))
    assert losses.curves[0].points == ((0.5, 4.0), (1.0, 3.5))
    events += [{"event": "start"}, step(0, 1, 9.0)]
    (losses,) = curves(write(tmp_path / "again.jsonl", events))
    assert losses.curves[0].points == ((0.5, 9.0),)


def test_long_runs_are_thinned_to_their_averages(tmp_path):
    events = [step(0, n, float(n), steps=3000) for n in range(1, 3001)]
    (losses,) = curves(write(tmp_path / "long.jsonl", events))
    points = losses.curves[0].points
    assert len(points) == POINTS and points[0][1] == pytest.approx(5.5)
    assert sum(y for _, y in points) / POINTS == pytest.approx(1500.5)


def test_a_log_without_steps_has_no_curves(tmp_path):
    assert curves(write(tmp_path / "log.jsonl", [{"event": "start"}])) == ()


@pytest.mark.parametrize("text", ["not json", "[1]", '{"loss": 1}', "\xff"])
def test_what_is_no_log_is_refused(tmp_path, text):
    (tmp_path / "log").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"log: not a training log: "):
        curves(tmp_path / "log")
    with pytest.raises(UserError, match=r"none: not a training log: .*No such file"):
        curves(tmp_path / "none")
