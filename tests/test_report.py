"""The report: every part optional, nothing from the network, fit for phones and dark rooms."""

import html
import json
import re
import shutil
import subprocess

import pytest
from pydantic import ValidationError

from onnxslim_kd import bench, machine
from onnxslim_kd.difference import Difference
from onnxslim_kd.profile import Operator
from onnxslim_kd.report import (
    Curve,
    Latencies,
    Layer,
    Metric,
    ModelRow,
    OperatorTime,
    Plot,
    Refusal,
    ReportData,
    Timing,
    render,
)
from onnxslim_kd.report_markdown import render_markdown
from onnxslim_kd.report_parts import from_bench
from onnxslim_kd.statistics import Latency, Ratio

LONG = "backbone/stage4/block11/conv_depthwise_separable/" * 3 + "weight"
TIMES = tuple(10 + i % 7 / 10 for i in range(100))
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="1400" height="90"><rect width="9"/></svg>'


def timing(model, ratio, verdict=""):
    return Timing(
        model=model, median=10 * ratio, p90=11, p99=12, ratio=ratio, verdict=verdict,
        interval=(ratio - 0.01, ratio + 0.01), milliseconds=tuple(t * ratio for t in TIMES),
    )  # fmt: skip


def plot(title, count):
    curves = [Curve(name=f"{LONG}{i}", points=((0, i), (1, 2 * i))) for i in range(count)]
    return Plot(title=title, x_label="ratio", y_label="lost", curves=tuple(curves))


FULL = ReportData(
    title="mobilenet_v2: prune, distil, strip",
    summary="CPUExecutionProvider, 2 threads",
    notes=("The student was not evaluated.",),
    metrics=(
        Metric(name="Latency", before=12.1, after=7.2, unit="ms", ratio=0.6, interval=(0.59, 0.61)),
        Metric(name="Top-1", before=74.1, after=72.12, unit="%", better="higher"),
        Metric(name="Parameters", before=3504872, after=1304872),
    ),
    models=(
        ModelRow(name="a", values={"M MACs": 313.6, "Top-1 %": 74.1}),
        ModelRow(name=LONG, values={"M MACs": 150.2, "ms": 7.2}),
    ),
    latencies=(
        Latencies(
            title="x 1x3x224x224",
            rows=(timing("a.onnx", 1.0), timing(LONG, 0.6, "faster, but top-1 agreement 90.0%")),
            notes=("noisy machine: rounds of the same work lie 18% apart",),
        ),
    ),
    layers=tuple(Layer(name=f"{LONG}{i}", before=64 + i, after=32) for i in range(60)),
    refusals=tuple(Refusal(name=f"{LONG}{i}", reason="its channels reach y") for i in range(9)),
    sensitivity=plot("Sensitivity", 20),
    learning=(plot("Loss terms", 4), plot("Top-1", 1)),
    plan_notes=("strength 0.5 removes 49.9% of the macs",),
    operators=(OperatorTime(name="Conv", milliseconds=(9.1, 0.0), count=(52, 0)),),
    nodes=(OperatorTime(name=LONG, milliseconds=(3.1, 0.7), count=(1, 1)),),
    operator_models=("a.onnx", LONG),
    graph_svg=SVG,
    configuration="prune:\n  pattern: '.*[r|d]_weights' # " + "x" * 200,
    versions={"python": "3.11.7", "onnxruntime": "1.31.1"},
)


def test_an_empty_report_is_a_page():
    page = render(ReportData())
    assert "<h1>onnxslim-kd report</h1>" in page and "<section" not in page


def test_every_part_is_shown():
    page = html.unescape(render(FULL))
    for text in (
        "0.60\N{MULTIPLICATION SIGN}", "95 %: 0.590 to 0.610", "Latency, ms", "12.1 → 7.2",
        "3,504,872 → 1,304,872", "Top-1, %", "74.1 → 72.12", "-1.98", "313.6", "strength 0.5",
        "Nodes that changed most", "-2.400",
        "noisy machine", "faster, but top-1 agreement", "Where the time goes", "9.100",
        "96 → 32", "its channels reach y", "(9)", "Sensitivity", "13 more", "Loss terms",
        "data:image/svg+xml;base64,", "'.*[r|d]_weights'", "onnxruntime 1.31.1",
    ):  # fmt: skip
        assert text in page, text


@pytest.mark.parametrize("field", sorted(set(ReportData.model_fields) - {"title"}))
def test_each_part_can_be_left_out(field):
    default = ReportData.model_fields[field].default
    assert render(FULL.model_copy(update={field: default}))
    assert render_markdown(FULL.model_copy(update={field: default}))


def test_nothing_comes_from_the_network_and_nothing_runs():
    page = render(FULL)
    assert not re.findall(r"https?://|<script|<link(?! rel=\"icon\")|@import|url\(", page)
    assert "default-src 'none'" in page


def test_names_are_escaped():
    evil = "<script>alert(1)</script>"
    data = FULL.model_copy(update={
        "title": evil, "notes": (evil,), "configuration": evil, "versions": {evil: evil},
        "layers": (Layer(name=evil, before=2, after=1),),
        "refusals": (Refusal(name=evil, reason=evil),), "operator_models": (evil, evil),
        "latencies": (Latencies(title=evil, rows=(timing(evil, 1.0, evil),), notes=(evil,)),),
        "sensitivity": Plot(title=evil, x_label=evil, y_label=evil,
                            curves=(Curve(name=evil, points=((0, 1), (1, 2))),)),
    })  # fmt: skip
    page = render(data)
    assert "<script" not in page and page.count("&lt;script&gt;") > 10


def test_what_got_better():
    assert Metric(name="m", before=2, after=1).improved is True
    assert Metric(name="m", before=2, after=1, better="higher").improved is False
    assert Metric(name="m", before=2, after=2).improved is None
    assert Metric(name="m", before=2, after=1, interval=(0.4, 1.1)).improved is None
    assert Metric(name="m", before=0, after=1).improved is None


def test_misspelt_parts_are_refused():
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        ReportData(layer=())


def test_data_survives_json():
    assert ReportData.model_validate_json(FULL.model_dump_json()) == FULL


def test_markdown():
    text = render_markdown(FULL)
    assert "| Latency | 12.1 ms | 7.2 ms | 0.600x [0.590, 0.610] |" in text
    assert "| Top-1 | 74.1 % | 72.12 % | -1.98 |" in text
    assert "| a | 313.6 | 74.1 |  |" in text and "| M MACs | Top-1 % | ms |" in text
    assert "| a.onnx | 10.000 | 11.000 | 12.000 | 1.000 [0.990, 1.010] |  |" in text
    assert "> noisy machine" in text and "| Conv | 9.100 (52) | none | -9.100 |" in text
    assert "- its channels reach y: " in text
    assert render_markdown(ReportData(layers=(Layer(name="a|b", before=2, after=1),))).endswith(
        "| a&#124;b | 2 | 1 | 50% |\n"
    )


def test_a_bench_becomes_a_report():
    def row(name, ratio, macs):
        operators = (Operator("conv", "Conv", "CPUExecutionProvider", ratio),)
        return bench.Row(
            name, Latency(10 * ratio, 11, 12, 100), Ratio(ratio, ratio - 0.1, ratio + 0.1), macs,
            Difference(None, 3.0, 0.5), TIMES, operators,
        )  # fmt: skip

    rows = (row("a.onnx", 1.0, 4_000_000), row("b.onnx", 0.6, 1_000_000))
    subjects = (bench.Subject("a.onnx", 100, 2_000_000), bench.Subject("b.onnx", 50, 1_000_000))
    cases = (bench.Case({"x": (1, 3)}, rows, ("drift",)),)
    found = bench.Report(
        subjects, cases, bench.Setting(threads=2), "CPUExecutionProvider", machine.environment()
    )
    data = from_bench(found)
    assert [(m.name, round(m.change, 2)) for m in data.metrics] == [
        ("Latency", 0.6), ("Size", 0.5), ("MACs", 0.25), ("Parameters", 0.5),
    ]  # fmt: skip
    assert data.latencies[0].rows[1].verdict.startswith("faster, but largest difference 3")
    assert data.latencies[0].notes == ("drift",) and data.latencies[0].title == "x 1x3"
    assert data.operators == (OperatorTime(name="Conv", milliseconds=(1, 0.6), count=(1, 1)),)
    assert data.nodes == (OperatorTime(name="conv", milliseconds=(1, 0.6), count=(1, 1)),)
    assert data.nodes[0].change == pytest.approx(-0.4)
    single = from_bench(
        bench.Report(subjects[:1], (bench.Case({}, rows[:1], ()),), *[getattr(found, n) for n in (
            "setting", "ran_on", "environment")])
    )  # fmt: skip
    assert single.metrics == () and render(single)


# ------------------------------------------------------------------------------ browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
WIDTHS = (1280, 390)
MEASURE = """
function channels(text) { return text.match(/[\\d.]+/g).map(Number); }
function luminance(c) {
  const [r, g, b] = c.slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function behind(element, view) {
  for (; element; element = element.parentElement) {
    const c = channels(view.getComputedStyle(element).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c;
  }
  return [255, 255, 255];
}
function contrast(element, view) {
  const style = view.getComputedStyle(element);
  const svg = element.namespaceURI.endsWith('svg');
  const pair = [channels(svg ? style.fill : style.color), behind(element, view)].map(luminance);
  return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
}
window.onload = () => {
  const found = [...document.querySelectorAll('iframe')].map(frame => {
    const view = frame.contentWindow, page = frame.contentDocument;
    const texts = [...page.body.querySelectorAll('*')].filter(e => e.checkVisibility() &&
      e.localName !== 'title' && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()));
    const low = texts.filter(e => contrast(e, view) < 4.5);
    return {width: view.innerWidth, content: page.documentElement.scrollWidth,
      texts: texts.length, low: low.map(e => e.outerHTML.slice(0, 80)),
      images: [...page.images].filter(i => i.complete && i.naturalWidth).length,
      ground: view.getComputedStyle(page.body).backgroundColor};
  });
  document.body.innerHTML = '';
  document.body.append(JSON.stringify(found));
};
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; install it to test the page")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(tmp_path, scheme):
    """No console message, no overflow, every text readable, in both schemes and widths."""
    page = html.escape(render(FULL).replace("<details>", "<details open>"), quote=True)
    frames = "".join(f'<iframe width="{w}" height="900" srcdoc="{page}"></iframe>' for w in WIDTHS)
    (tmp_path / "page.html").write_text(
        f"<!doctype html><meta charset=utf-8><style>:root {{ color-scheme: light dark }}"
        f" iframe {{ border: 0 }}</style><body>{frames}<script>{MEASURE}</script>"
    )
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--hide-scrollbars", "--window-size=1400,1000",
         f"--user-data-dir={tmp_path / 'profile'}",
         f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
         "--enable-logging=stderr", "--dump-dom", f"file://{tmp_path / 'page.html'}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(re.search(r"<body>(\[.*\])", done.stdout, re.DOTALL)[1]))
    for frame, width in zip(found, WIDTHS, strict=True):
        assert (frame["width"], frame["content"]) == (width, width)
        assert frame["texts"] > 100 and frame["images"] == 1
        assert frame["low"] == []
        assert (frame["ground"] == "rgb(23, 23, 22)") == (scheme == "dark")
