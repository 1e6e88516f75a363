"""Make ONNX models smaller and faster without their source code.

The names below are the whole public surface. They are imported on first use, so that importing the
package costs nothing and never imports torch or onnxruntime.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxslim_kd.api import Pruned as Pruned
    from onnxslim_kd.api import Reading as Reading
    from onnxslim_kd.api import cut as cut
    from onnxslim_kd.api import inspect as inspect
    from onnxslim_kd.api import plan as plan
    from onnxslim_kd.api import prune as prune
    from onnxslim_kd.api import verify as verify
    from onnxslim_kd.model import load as load
    from onnxslim_kd.model import save as save
    from onnxslim_kd.passes.merge import merge as merge
    from onnxslim_kd.passes.prune import Choice as Choice
    from onnxslim_kd.passes.ratios import Amount as Amount
    from onnxslim_kd.passes.strip import Stripped as Stripped
    from onnxslim_kd.passes.strip import infer_prune as infer_prune
    from onnxslim_kd.plans import Plan as Plan

_HOME = {
    "Amount": "onnxslim_kd.passes.ratios",
    "Choice": "onnxslim_kd.passes.prune",
    "Plan": "onnxslim_kd.plans",
    "Pruned": "onnxslim_kd.api",
    "Reading": "onnxslim_kd.api",
    "Stripped": "onnxslim_kd.passes.strip",
    "cut": "onnxslim_kd.api",
    "infer_prune": "onnxslim_kd.passes.strip",
    "inspect": "onnxslim_kd.api",
    "load": "onnxslim_kd.model",
    "merge": "onnxslim_kd.passes.merge",
    "plan": "onnxslim_kd.api",
    "prune": "onnxslim_kd.api",
    "save": "onnxslim_kd.model",
    "verify": "onnxslim_kd.api",
}

__version__ = version("onnxslim-kd")
__all__ = [
    "Amount",
    "Choice",
    "Plan",
    "Pruned",
    "Reading",
    "Stripped",
    "cut",
    "infer_prune",
    "inspect",
    "load",
    "merge",
    "plan",
    "prune",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
