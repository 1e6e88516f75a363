"""RNN, GRU and LSTM.

Torch's own fused kernels run the usual case; whatever they cannot express (other activations,
peepholes, clipping, sequence lengths, GRU's other reset) is stepped through.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import _VF, Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode

Activation: TypeAlias = Callable[[Tensor], Tensor]
State: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class Cell:
    """What one of the three operators is."""

    gates: int
    states: int
    activations: tuple[str, ...]
    order: tuple[int, ...]
    """Torch's gates, as positions among ONNX's."""
    fused: Callable[..., Any]
    step: Callable[..., State]


@dataclass(frozen=True)
class Direction:
    """The weights of one direction."""

    w: Tensor
    r: Tensor
    wb: Tensor
    rb: Tensor
    peephole: Tensor | None
    activations: Sequence[Activation]


@dataclass(frozen=True)
class Options:
    """The attributes of one node."""

    hidden: int
    direction: str
    layout: int
    clip: float | None
    linear_before_reset: bool
    input_forget: bool
    activations: list[Activation]
    usual: bool
    """Whether torch's kernel computes the same, given no lengths and no peepholes."""

    @property
    def reversed(self) -> list[bool]:
        """By direction, whether it runs backwards."""
        return {"forward": [False], "reverse": [True]}.get(self.direction, [False, True])


def recurrent(cell: Cell) -> Callable[[OpNode], Kernel]:
    """Return the lowering of a recurrent operator."""

    def lower(node: OpNode) -> Kernel:
        options = _options(node, cell)

        def run(
            x: Tensor,
            w: Tensor,
            r: Tensor,
            b: Tensor | None = None,
            lengths: Tensor | None = None,
            *rest: Tensor | None,
        ) -> Any:
            x = x.transpose(0, 1) if options.layout else x
            states = _initial(x, options, cell, rest)
            peephole = rest[2] if len(rest) > 2 else None
            if options.usual and lengths is None and peephole is None:
                y, final = _fused(x, (w, r, b), states, options, cell)
            else:
                directions = _directions((w, r, b, peephole), options, cell)
                y, final = _stepped(x, directions, states, options, cell, lengths)
            if options.layout:
                return y.permute(2, 0, 1, 3), *(s.transpose(0, 1) for s in final)
            return y, *final

        several = len(node.outputs) > 1
        return run if several else lambda *args: run(*args)[0]

    return lower


def _options(node: OpNode, cell: Cell) -> Options:
    direction = node.get("direction", "forward")
    count = len(cell.activations) * (2 if direction == "bidirectional" else 1)
    default = (cell.activations * 2)[:count]
    names = tuple(node.get("activations", ())) or default
    linear = bool(node.get("linear_before_reset", 0))
    plain = node.attributes.get("clip") is None and not node.get("input_forget", 0)
    return Options(
        hidden=node.get("hidden_size", 0),
        direction=direction,
        layout=node.get("layout", 0),
        clip=node.attributes.get("clip"),
        linear_before_reset=linear,
        input_forget=bool(node.get("input_forget", 0)),
        activations=_activations(node, names),
        usual=_lowered(names) == _lowered(default)
        and plain
        and (linear or cell.fused is not _VF.gru),
    )


def _lowered(names: Sequence[str]) -> list[str]:
    return [name.lower() for name in names]


def _activations(node: OpNode, names: Sequence[str]) -> list[Activation]:
    alphas: list[float] = list(node.get("activation_alpha", ()))
    betas: list[float] = list(node.get("activation_beta", ()))
    found: list[Activation] = []
    for name in names:
        make = _ACTIVATIONS.get(name.lower())
        if make is None:
            raise node.refuse(f"activation {name} is not supported")
        defaults = _DEFAULTS.get(name.lower(), ())
        alpha = (alphas.pop(0) if alphas else defaults[0]) if defaults else 0.0
        beta = (betas.pop(0) if betas else defaults[1]) if len(defaults) > 1 else 0.0
        found.append(make(alpha, beta))
    return found


def _initial(
    x: Tensor, options: Options, cell: Cell, rest: Sequence[Tensor | None]
) -> list[Tensor]:
    states = []
    for i in range(cell.states):
        given = rest[i] if i < len(rest) else None
        if given is None:
            given = x.new_zeros(len(options.reversed), x.shape[1], options.hidden)
        elif options.layout:
            given = given.transpose(0, 1)
        states.append(given.contiguous())
    return states


# ---------------------------------------------------------------------- torch's kernel


def _fused(
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None],
    states: list[Tensor],
    options: Options,
    cell: Cell,
) -> tuple[Tensor, list[Tensor]]:
    w, r, b = (None if t is None else _reordered(t, cell) for t in weights)
    assert w is not None and r is not None
    flat: list[Tensor] = []
    for d in range(len(options.reversed)):
        flat += [w[d], r[d], *(b[d].chunk(2) if b is not None else ())]
    backwards = options.direction == "reverse"
    both = options.direction == "bidirectional"
    x = x.flip(0) if backwards else x
    hidden: Any = tuple(states) if len(states) > 1 else states[0]
    out, *final = cell.fused(x, hidden, flat, b is not None, 1, 0.0, False, both, False)  # noqa: FBT003
    out = out.flip(0) if backwards else out
    steps, batch = x.shape[:2]
    y = out.reshape(steps, batch, len(options.reversed), -1).transpose(1, 2)
    return y, final


def _reordered(tensor: Tensor, cell: Cell) -> Tensor:
    """Bring gates into torch's order; a bias has them twice."""
    times = 2 if tensor.dim() == 2 else 1
    parts = tensor.chunk(cell.gates * times, 1)
    order = [g + cell.gates * t for t in range(times) for g in cell.order]
    return torch.cat([parts[i] for i in order], 1)


# -------------------------------------------------------------------------- stepping


def _directions(
    weights: tuple[Tensor, Tensor, Tensor | None, Tensor | None], options: Options, cell: Cell
) -> list[Direction]:
    w, r, b, peephole = weights
    count = len(cell.activations)
    result = []
    for d in range(len(options.reversed)):
        bias = w.new_zeros(2 * w.shape[1]) if b is None else b[d]
        wb, rb = bias.chunk(2)
        acts = options.activations[d * count : (d + 1) * count]
        result.append(
            Direction(w[d], r[d], wb, rb, None if peephole is None else peephole[d], acts)
        )
    return result


def _stepped(
    x: Tensor,
    directions: list[Direction],
    states: list[Tensor],
    options: Options,
    cell: Cell,
    lengths: Tensor | None,
) -> tuple[Tensor, list[Tensor]]:
    outs, finals = [], []
    for d, direction in enumerate(directions):
        state: State = tuple(s[d] for s in states)
        steps = range(x.shape[0])
        rows: dict[int, Tensor] = {}
        for t in reversed(steps) if options.reversed[d] else steps:
            fresh = cell.step(x[t], state, direction, options)
            if lengths is None:
                state, rows[t] = fresh, fresh[0]
                continue
            inside = (t < lengths).reshape(-1, 1)
            state = tuple(torch.where(inside, n, o) for n, o in zip(fresh, state, strict=True))
            rows[t] = torch.where(inside, fresh[0], 0.0).to(x.dtype)
        outs.append(torch.stack([rows[t] for t in steps]))
        finals.append(state)
    return torch.stack(outs, 1), [torch.stack(s) for s in zip(*finals, strict=True)]


def _clipped(x: Tensor, options: Options) -> Tensor:
    return x if options.clip is None else x.clamp(-options.clip, options.clip)


def _rnn_step(x: Tensor, state: State, d: Direction, options: Options) -> State:
    total = F.linear(x, d.w, d.wb) + F.linear(state[0], d.r, d.rb)
    return (d.activations[0](_clipped(total, options)),)


def _gru_step(x: Tensor, state: State, d: Direction, options: Options) -> State:
    (h,) = state
    f, g = d.activations
    xz, xr, xh = F.linear(x, d.w, d.wb).chunk(3, -1)
    rz, rr, rh = d.r.chunk(3)
    bz, br, bh = d.rb.chunk(3)
    z = f(_clipped(xz + F.linear(h, rz, bz), options))
    r = f(_clipped(xr + F.linear(h, rr, br), options))
    past = r * F.linear(h, rh, bh) if options.linear_before_reset else F.linear(r * h, rh, bh)
    fresh = g(_clipped(xh + past, options))
    return ((1 - z) * fresh + z * h,)


def _lstm_step(x: Tensor, state: State, d: Direction, options: Options) -> State:
    h, c = state
    f, g, last = d.activations
    i, o, forget, fresh = (F.linear(x, d.w, d.wb) + F.linear(h, d.r, d.rb)).chunk(4, -1)
    pi, po, pf = d.peephole.chunk(3) if d.peephole is not None else (0.0, 0.0, 0.0)
    i = f(_clipped(i + pi * c, options))
    forget = 1 - i if options.input_forget else f(_clipped(forget + pf * c, options))
    c = forget * c + i * g(_clipped(fresh, options))
    return f(_clipped(o + po * c, options)) * last(c), c


_DEFAULTS: dict[str, tuple[float, ...]] = {
    "affine": (1.0, 0.0),
    "elu": (1.0,),
    "hardsigmoid": (0.2, 0.5),
    "leakyrelu": (0.01,),
    "scaledtanh": (1.0, 1.0),
    "thresholdedrelu": (1.0,),
}
_ACTIVATIONS: dict[str, Callable[[float, float], Activation]] = {
    "affine": lambda a, b: lambda x: a * x + b,
    "elu": lambda a, b: lambda x: F.elu(x, a),
    "hardsigmoid": lambda a, b: lambda x: torch.clamp(a * x + b, 0, 1),
    "leakyrelu": lambda a, b: lambda x: F.leaky_relu(x, a),
    "relu": lambda a, b: torch.relu,
    "scaledtanh": lambda a, b: lambda x: a * torch.tanh(b * x),
    "sigmoid": lambda a, b: torch.sigmoid,
    "softplus": lambda a, b: F.softplus,
    "softsign": lambda a, b: F.softsign,
    "tanh": lambda a, b: torch.tanh,
    "thresholdedrelu": lambda a, b: lambda x: torch.where(x > a, x, 0.0).to(x.dtype),
}
RECURRENT = {
    "GRU": recurrent(Cell(3, 1, ("Sigmoid", "Tanh"), (1, 0, 2), _VF.gru, _gru_step)),
    "LSTM": recurrent(Cell(4, 2, ("Sigmoid", "Tanh", "Tanh"), (0, 2, 3, 1), _VF.lstm, _lstm_step)),
    "RNN": recurrent(Cell(1, 1, ("Tanh",), (0,), _VF.rnn_tanh, _rnn_step)),
}
