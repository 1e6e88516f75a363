"""docs/losses.md has every loss with its options and defaults; run this file to write its table."""

import re
from pathlib import Path

from onnxslim_kd.passes.losses import LOSSES, options_of

PAGE = Path(__file__).parent.parent / "docs" / "losses.md"
MARKS = re.compile(r"(<!-- table: .*? -->\n).*?(<!-- end -->)", re.DOTALL)


def table() -> str:
    lines = ["| loss | what it computes | options and defaults |", "| --- | --- | --- |"]
    for kind, loss in LOSSES.items():
        summary = " ".join(loss.build.__doc__.split("\n\n")[0].split()).replace("|", "\\|")
        options = [
            f"`{name}={'none' if option.default is None else option.default}`"
            for name, option in options_of(kind).items()
            if name != "align"
        ]
        lines.append(f"| `{kind}` | {summary.replace('``', '`')} | {', '.join(options)} |")
    return "\n".join(lines).replace("=False", "=false") + "\n"


def test_table_is_current():
    found = MARKS.search(PAGE.read_text())
    assert found
    assert found.group(0) == found.group(1) + table() + found.group(2)


def test_every_docstring_says_shapes_and_every_published_loss_its_paper():
    plain = {"l1", "l2", "smooth_l1", "cosine", "ce", "custom"}
    for kind, loss in LOSSES.items():
        assert "Shapes:" in loss.build.__doc__, kind
        assert "Paper:" in loss.build.__doc__ or kind in plain, kind


if __name__ == "__main__":
    PAGE.write_text(MARKS.sub(lambda m: m.group(1) + table() + m.group(2), PAGE.read_text()))
