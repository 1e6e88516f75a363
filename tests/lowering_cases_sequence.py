"""Cases for recurrences and attention."""

import numpy as np
from lowering_case import Case, f, ints


def cell(op, gates, attributes="", *, d=1, extra=None, **options):
    arrays = {
        "x": f(5, 2, 3),
        "w": f(d, gates * 4, 3, low=-1, high=1),
        "wr": f(d, gates * 4, 4, low=-1, high=1),
        "wb": f(d, gates * 8, low=-1, high=1),
        **(extra or {}),
    }
    known = [name for name in ("k", "h", "s", "wp") if name in arrays]
    inputs = ["x", "w", "wr", "wb", *(n if n in known else '""' for n in ("k", "h", "s", "wp"))]
    inputs = inputs[: {"LSTM": 8}.get(op, 6)]
    while inputs[-1] == '""':
        inputs.pop()
    outputs = ("a", "y", "c") if op == "LSTM" else ("a", "y")
    text = f"{', '.join(outputs)} = {op}<hidden_size=4{attributes}>({', '.join(inputs)})"
    return Case(text, arrays, outputs=outputs, **options)


RECURRENT = [
    *(
        cell(op, g, f', direction="{d}"{more}', d=2 if d == "bidirectional" else 1)
        for op, g in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
        for d in ("forward", "reverse", "bidirectional")
        for more in (("", ", linear_before_reset=1") if op == "GRU" else ("",))
    ),
    *(
        cell(
            op,
            g,
            d=2,
            attributes=', direction="bidirectional"',
            extra={"k": np.array([5, 2], np.int32), "h": f(2, 2, 4)},
        )
        for op, g in (("LSTM", 4), ("GRU", 3), ("RNN", 1))
    ),
    cell("LSTM", 4, extra={"h": f(1, 2, 4), "s": f(1, 2, 4)}),
    cell("LSTM", 4, extra={"wp": f(1, 12)}),
    cell("LSTM", 4, ", clip=0.5"),
    cell("LSTM", 4, ", input_forget=1"),
    cell("GRU", 3, ', activations=["HardSigmoid", "Relu"]'),
    cell("RNN", 1, ', activations=["Relu"]'),
    cell("RNN", 1, ', activations=["ScaledTanh"], activation_alpha=[0.5], activation_beta=[1.5]'),
    Case(
        "a, y = GRU<hidden_size=4>(x, w, wr)",
        {"x": f(5, 2, 3), "w": f(1, 12, 3), "wr": f(1, 12, 4)},
    ),
    Case(
        "y = LSTM<hidden_size=4>(x, w, wr)", {"x": f(5, 2, 3), "w": f(1, 16, 3), "wr": f(1, 16, 4)}
    ),
]

_QKV = {"q": f(2, 4, 3, 8), "k": f(2, 4, 5, 8), "v": f(2, 4, 5, 6)}
_FLAT = {"q": f(2, 3, 32), "k": f(2, 5, 16), "v": f(2, 5, 16)}
_HEADS = "q_num_heads=4, kv_num_heads=2"
ATTENTION = [
    Case("y = Attention(q, k, v)", _QKV, opset=23),
    Case("y = Attention<is_causal=1, scale=0.3>(q, k, v)", {**_QKV, "q": f(2, 4, 5, 8)}, opset=23),
    Case("y = Attention<softcap=2.0>(q, k, v, m)", {**_QKV, "m": f(3, 5)}, opset=23),
    Case("y = Attention(q, k, v, m)", {**_QKV, "m": np.tri(3, 5, 1, dtype=bool)}, opset=23),
    Case(f"y = Attention<{_HEADS}>(q, k, v)", _FLAT, opset=23),
    Case(
        'y = Attention<is_causal=1>(q, k, v, "", "", "", s)',
        {**_QKV, "s": ints(2, low=3, high=6)},
        opset=24,
    ),
    Case(
        f'y, pk, pv = Attention<{_HEADS}, is_causal=1>(q, k, v, "", a, b)',
        {**_FLAT, "k": f(2, 3, 16), "v": f(2, 3, 16), "a": f(2, 2, 2, 8), "b": f(2, 2, 2, 8)},
        outputs=("y", "pk", "pv"),
        opset=23,
    ),
    *(
        Case(
            f"y, pk, pv, s = Attention<qk_matmul_output_mode={mode}>(q, k, v, m)",
            {**_QKV, "m": f(3, 5)},
            outputs=("y", "s"),
            opset=23,
        )
        for mode in range(4)
    ),
    Case(
        "y = RotaryEmbedding(x, c0, c1)",
        {"x": f(2, 4, 3, 8), "c0": f(2, 3, 4), "c1": f(2, 3, 4)},
        opset=23,
    ),
    Case(
        "y = RotaryEmbedding<interleaved=1, num_heads=4, rotary_embedding_dim=4>(x, c0, c1, k)",
        {"x": f(2, 3, 32), "c0": f(6, 2), "c1": f(6, 2), "k": ints(2, 3, low=0, high=6)},
        opset=23,
    ),
]
