"""The losses of a PaddleClas file: ``Loss.Train``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from onnxslim_kd.convert_common import Converted, Old, leaves
from onnxslim_kd.convert_nets import Net

Build = Callable[[Old, Sequence[Net]], list[Old]]


def losses(loss: Old, nets: Sequence[Net], new: Converted) -> tuple[list[Old], Old]:
    """Return the terms of the merged graph, and the settings of the loss on labels alone.

    What cannot be converted is noted.
    """
    loss.pop("Eval", None)
    terms: list[Old] = []
    labels: dict[str, Any] = {}
    for entry in loss.pop("Train", None) or []:
        ((kind, options),) = entry.items()
        options = dict(options or {})
        inner = options.pop("base_loss_name", None) if kind == "DistillationPairLoss" else None
        if kind in ON_LABELS:
            weight, smoothing = options.pop("weight", 1), options.pop("epsilon", None) or 0
            labels = {"weight": weight, "smoothing": smoothing}
        elif (inner or kind) in LOSSES:
            terms += LOSSES[inner or kind](options, nets)
        else:
            new.notes.append(f"not carried over: Loss.Train.{kind} is no loss of ours")
        new.notes += [f"not carried over: Loss.Train.{kind}.{left}" for left in leaves(options)]
    return terms, labels


def _ground_truth(options: Old, nets: Sequence[Net]) -> list[Old]:
    term = {"kind": "ce", "weight": options.pop("weight", 1)}
    if epsilon := options.pop("epsilon", None):
        term["epsilon"] = epsilon
    key = options.pop("key", None)
    asked = options.pop("model_names", [nets[0].name])
    return [
        {**term, "student": f"{_prefix(net, nets)}{net.value(key)}", "name": f"{prefix}ce"}
        for net in nets
        if net.name in asked
        for prefix in (_prefix(net, nets),)
    ]


def _prefix(net: Net, nets: Sequence[Net]) -> str:
    """Return what the names of a network begin with in the merged graph."""
    if net is nets[0]:
        return ""
    return "teacher_" if len(nets) == 2 else f"{net.stage}_"


def _pair(*kinds: str, keep: Sequence[str] = (), drop: Sequence[str] = ()) -> Build:
    """Convert a loss between two networks.

    Args:
        kinds: Ours; several are summed.
        keep: Options that are called the same.
        drop: Options that we read from the graph.
    """

    def build(options: Old, nets: Sequence[Net]) -> list[Old]:
        ours, theirs = _keys(options)
        common = {"weight": options.pop("weight", 1)}
        common |= {name: options.pop(name) for name in keep if options.get(name) is not None}
        for name in ("name", *drop):
            options.pop(name, None)
        return [
            {
                "kind": options_kind,
                "student": _values(nets[0], ours),
                "teacher": _values(other, theirs, _several(other, nets)),
                **common,
            }
            for other in _others(options, nets)
            for options_kind in kinds
        ]

    return build


def _keys(options: Old) -> tuple[Any, Any]:
    """Take out which values are compared, the student's and the teacher's."""
    key = options.pop("key", None)
    ours, theirs = key, key
    for one, other in (("s_key", "t_key"), ("s_keys", "t_keys"),
                       ("student_keepkeys", "teacher_keepkeys")):  # fmt: skip
        ours, theirs = options.pop(one, ours), options.pop(other, theirs)
    return ours, theirs


def _values(net: Net, keys: Any, prefix: str = "") -> str | list[str]:
    names = [keys] if keys is None or isinstance(keys, str) else list(keys)
    found = [f"{prefix}{net.value(name)}" for name in names]
    return found[0] if len(found) == 1 else found


def _several(other: Net, nets: Sequence[Net]) -> str:
    return f"{other.stage}_" if len(nets) > 2 else ""


def _others(options: Old, nets: Sequence[Net]) -> list[Net]:
    """Take out the pairs, and return the networks that the first one is compared with.

    Pairs without the first network stay in the options, which are noted.
    """
    pairs = options.pop("model_name_pairs", None) or []
    pairs += [pair] if (pair := options.pop("model_name_pair", None)) else []
    strange = [pair for pair in pairs if nets[0].name not in pair]
    if strange:
        options["model_name_pairs"] = strange
    named = {name for pair in pairs if pair not in strange for name in pair}
    return [net for net in nets[1:] if net.name in named] if pairs else list(nets[1:2])


def _distance(options: Old, nets: Sequence[Net]) -> list[Old]:
    kind = options.pop("mode", "l2")
    return _pair(kind, keep=("act",))(options, nets)


def _attention(options: Old, nets: Sequence[Net]) -> list[Old]:
    """AFD: its maps are those that the transforms behind the networks read."""
    for name in ("student_keys", "teacher_keys", "s_shapes", "t_shapes", "name"):
        options.pop(name, None)
    found = []
    for other in _others(options, nets):
        student = _values(nets[0], nets[0].keys)
        teacher = _values(other, other.keys, _several(other, nets))
        found.append({"kind": "afd", "student": student, "teacher": teacher})
        found[-1] |= {"weight": options.get("weight", 1)}
    options.pop("weight", None)
    return found


ON_LABELS = ("CELoss", "MixCELoss")
LOSSES: Mapping[str, Build] = {
    "DistillationGTCELoss": _ground_truth,
    "DistillationCELoss": _pair("soft_label"),
    "DistillationKLDivLoss": _pair("kl", keep=("temperature",)),
    "DistillationDMLLoss": _pair("dml", keep=("act", "sum_across_class_dim", "weight_ratio")),
    "DistillationDistanceLoss": _distance,
    "DistillationDKDLoss": _pair("dkd", keep=("temperature", "alpha", "beta", "use_target_as_gt")),
    "DistillationDISTLoss": _pair("dist", keep=("beta", "gamma")),
    "DistillationRKDLoss": _pair("rkd_distance", "rkd_angle", keep=("target_size",)),
    "DistillationSKDLoss": _pair("skd", keep=("temperature", "multiplier", "alpha")),
    "DistillationWSLLoss": _pair("wsl", keep=("temperature",)),
    "MGDLoss": _pair(
        "mgd", keep=("alpha_mgd", "lambda_mgd"), drop=("student_channels", "teacher_channels")
    ),
    "PEFDLoss": _pair(
        "pefd", keep=("num_projectors", "mode"), drop=("student_channel", "teacher_channel")
    ),
    "AFDLoss": _attention,
}
