"""Rules for recurrent layers."""

import onnx_ir as ir

from onnxslim_kd.passes.channels import Block, Channels, Ids, Operand, Unsupported


def rnn(t: Channels, node: ir.Node) -> None:
    """LSTM, GRU, RNN: hidden unit j of every gate and direction goes together.

    Shapes (ONNX LSTM-14): W [dirs, gates*H, I], R [dirs, gates*H, H], B [dirs, 2*gates*H],
    initial states [dirs, B, H], peepholes [dirs, 3*H]; Y [T, dirs, B, H] (layout 0).
    """
    if node.attributes.get_int("layout", 0):
        raise Unsupported("batch-first layout")
    x, w, r = t.need(0), t.need(1), t.need(2)
    t.same(t.ids(x, 2), t.ids(w, 2), f"feeds {w.name}, which sees every feature")
    t.consume((0, 2), (1, 2))
    hidden = t.ids(r, 2)
    if hidden is None:
        return
    t.produce(t.ids(w, 1))
    t.produce(hidden)
    t.consume((2, 2))
    stacked = [(w, 1), (r, 1), (t.operand(3), 1), (t.operand(7), 1)]
    stacked += [(t.operand(5), 2), (t.operand(6), 2)]
    for operand, axis in stacked:
        if operand is not None:
            _tie_stacked(t, operand, axis, hidden)
    t.set(0, [Block((3,), hidden)])
    t.set(1, [Block((2,), hidden)])
    t.set(2, [Block((2,), hidden)])


def _tie_stacked(t: Channels, operand: Operand, axis: int, hidden: Ids) -> None:
    """Tie an axis that stacks several runs of the hidden units."""
    ids = t.ids(operand, axis)
    if ids is None:
        t.freeze([Block((0,), hidden)], f"meets {operand.name}, which has no channels to remove")
    else:
        t.tie(ids.reshape(-1, len(hidden)), hidden[None, :])
