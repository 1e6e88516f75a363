"""Cases for convolutions, poolings, norms and resizing."""

import numpy as np
from lowering_case import IMAGE, Case, X, f, i, ints, n, pos


def resize(attributes, x, *, scales=None, sizes=None, **options):
    arrays = {"x": x}
    arrays["c"] = i(*sizes) if sizes else np.array(scales, np.float32)
    inputs = '"", "", c' if sizes else '"", c'
    return Case(f"y = Resize<{attributes}>(x, {inputs})", arrays, **options)


_MODES = ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel")
_IMAGE = f(1, 2, 5, 4)
RESIZE = [
    *(
        resize(f'mode="{m}", coordinate_transformation_mode="{c}"', _IMAGE, scales=(1, 1, s, s))
        for m in ("nearest", "linear", "cubic")
        for c in _MODES
        for s in (2.0, 0.6)
    ),
    *(
        resize(
            f'nearest_mode="{r}", coordinate_transformation_mode="{c}"', _IMAGE, sizes=(1, 2, 7, 9)
        )
        for r in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
        for c in ("half_pixel", "asymmetric")
    ),
    resize(
        'mode="linear", coordinate_transformation_mode="half_pixel_symmetric"',
        _IMAGE,
        scales=(1, 1, 1.7, 2.3),
        opset=19,
    ),
    resize('mode="linear"', _IMAGE, sizes=(1, 2, 1, 9)),
    *(
        resize(
            f'mode="{m}", coordinate_transformation_mode="pytorch_half_pixel"',
            _IMAGE,
            sizes=(1, 2, 1, 9),
        )
        for m in ("linear", "cubic")
    ),
    resize('nearest_mode="floor"', f(1, 2, 3, 6), scales=(1, 1, 0.6, 0.6)),  # 1.5 / 0.6f is 2.5
    resize('mode="cubic", cubic_coeff_a=-0.5', _IMAGE, sizes=(1, 2, 9, 7)),
    resize('mode="cubic", exclude_outside=1', _IMAGE, sizes=(1, 2, 9, 7)),
    resize('mode="linear"', f(1, 2, 5), scales=(1, 1, 2.0)),
    resize('mode="linear"', f(1, 2, 3, 4, 2), scales=(1, 1, 2.0, 1.5, 2)),
    resize('mode="linear", axes=[3,2]', _IMAGE, sizes=(8, 10), opset=18),
    resize('mode="linear", antialias=1', _IMAGE, sizes=(1, 2, 2, 3), opset=18),
    resize('mode="cubic", antialias=1', f(1, 2, 9, 8), sizes=(1, 2, 4, 3), opset=18),
    resize('keep_aspect_ratio_policy="not_larger", axes=[2,3]', _IMAGE, sizes=(8, 8), opset=18),
    resize('keep_aspect_ratio_policy="not_smaller", axes=[2,3]', _IMAGE, sizes=(8, 8), opset=18),
    Case(
        """s = Shape(x) h = Slice(s, c0, c1) k = Concat<axis=0>(h, c2)
        y = Resize<mode="linear">(x, "", "", k)""",
        {"x": _IMAGE, "c0": i(0), "c1": i(2), "c2": i(10, 8)},
    ),
    *(
        Case(
            f'y = GridSample<mode="{m}", padding_mode="{p}", align_corners={a}>(x, g)',
            {"x": _IMAGE, "g": f(1, 3, 4, 2, low=-1.3, high=1.3)},
        )
        for m, p, a in (
            ("linear", "zeros", 0),
            ("nearest", "border", 1),
            ("cubic", "reflection", 0),
        )
    ),
    Case("y = Upsample(x, c)", {"x": _IMAGE, "c": np.float32([1, 1, 2, 3])}, opset=9),
    Case(
        'y = Upsample<mode="linear">(x, c)', {"x": _IMAGE, "c": np.float32([1, 1, 2, 3])}, opset=9
    ),
    Case("y = AffineGrid(x, c)", {"x": f(2, 2, 3), "c": i(2, 3, 4, 5)}),
]

_CONV = {"x": f(2, 4, 7, 6), "w": f(6, 4, 3, 2), "wb": f(6)}
_UP = {"x": f(2, 4, 5, 4), "w": f(4, 3, 3, 2), "wb": f(3)}
LINEAR = [
    Case("y = Conv(x, w)", _CONV),
    Case("y = Conv<pads=[1,0,1,0], strides=[2,1], dilations=[1,2]>(x, w, wb)", _CONV),
    Case("y = Conv<pads=[1,0,2,1]>(x, w, wb)", _CONV),
    *(
        Case(f'y = Conv<auto_pad="{a}", strides=[2,2]>(x, w, wb)', _CONV)
        for a in ("SAME_UPPER", "SAME_LOWER", "VALID")
    ),
    Case("y = Conv<group=2>(x, w)", {"x": f(1, 4, 7, 6), "w": f(6, 2, 3, 3)}),
    Case("y = Conv<group=4>(x, w, wb)", {"x": f(1, 4, 5, 5), "w": f(8, 1, 3, 3), "wb": f(8)}),
    Case("y = Conv<pads=[1,2]>(x, w)", {"x": f(1, 3, 9), "w": f(2, 3, 3)}),
    Case("y = Conv<kernel_shape=[2,2,2]>(x, w)", {"x": f(1, 2, 3, 4, 3), "w": f(3, 2, 2, 2, 2)}),
    Case("y = Conv<kernel_shape=[3,2]>(x, k)", {"x": f(1, 2, 5, 5), "k": f(3, 2, 3, 2)}),
    Case("y = ConvTranspose(x, w, wb)", _UP),
    Case("y = ConvTranspose<strides=[2,3], pads=[1,0,1,0], output_padding=[1,2]>(x, w, wb)", _UP),
    Case("y = ConvTranspose<strides=[2,2], pads=[1,0,0,1]>(x, w, wb)", _UP),
    Case("y = ConvTranspose<strides=[2,2], output_shape=[10,9]>(x, w, wb)", _UP),
    *(
        Case(f'y = ConvTranspose<auto_pad="{a}", strides=[2,3]>(x, w, wb)', _UP)
        for a in ("SAME_UPPER", "SAME_LOWER")
    ),
    Case(
        "y = ConvTranspose<group=2, dilations=[2,1]>(x, w)",
        {"x": f(1, 4, 4, 4), "w": f(4, 3, 2, 2)},
    ),
    Case("y = ConvTranspose<strides=[2]>(x, w)", {"x": f(1, 2, 5), "w": f(2, 3, 4)}),
    Case("y = Col2Im(x, c0, c1)", {"x": f(1, 8, 12), "c0": i(4, 5), "c1": i(2, 2)}),
    Case(
        "y = Col2Im<pads=[1,0,1,1], strides=[2,1]>(x, c0, c1)",
        {"x": f(1, 8, 15), "c0": i(4, 5), "c1": i(2, 2)},
    ),
    Case("y = Gemm<transB=1>(x, w, wb)", {"x": f(2, 3), "w": f(4, 3), "wb": f(4)}),
    Case("y = Gemm(x, w, wb)", {"x": f(2, 3), "w": f(3, 4), "wb": f(4)}),
    Case(
        "y = Gemm<alpha=0.5, beta=2.0, transA=1>(x, w, wb)",
        {"x": f(3, 2), "w": f(3, 4), "wb": f(2, 1)},
    ),
    Case("y = Gemm<alpha=0.5>(x, w)", {"x": f(2, 3), "w": f(3, 4)}),
    Case("y = MatMul(x, w)", {"x": f(2, 3, 4), "w": f(4, 5)}),
    Case("y = MatMul(x, z)", {"x": f(4), "z": f(2, 4, 5)}),
    Case('y = Einsum<equation="bij, bjk -> bik">(x, z)', {"x": f(2, 3, 4), "z": f(2, 4, 5)}),
    Case('y = Einsum<equation="...i->...">(x)', X),
    Case(
        "y = MatMulInteger(x, z, c0, c1)",
        {
            "x": ints(3, 4, low=0, dtype=np.uint8),
            "z": ints(4, 2, low=0, dtype=np.uint8),
            "c0": n(3, np.uint8),
            "c1": ints(2, low=0, dtype=np.uint8),
        },
    ),
    Case(
        "y = MatMulInteger(x, z)", {"x": ints(3, 4, dtype=np.int8), "z": ints(4, 2, dtype=np.int8)}
    ),
    Case(
        "y = ConvInteger<pads=[1,1,1,1]>(x, z, c)",
        {
            "x": ints(1, 2, 4, 4, low=0, dtype=np.uint8),
            "z": ints(3, 2, 3, 3, low=0, dtype=np.uint8),
            "c": n(3, np.uint8),
        },
    ),
]

_POOLS = (
    "kernel_shape=[2,2]",
    "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1]",
    "kernel_shape=[3,2], strides=[2,2], ceil_mode=1",
    "kernel_shape=[3,3], strides=[2,2], pads=[1,1,1,1], ceil_mode=1",
    "kernel_shape=[2,2], strides=[2,3], pads=[0,1,1,0]",
    "kernel_shape=[3,3], strides=[3,3], pads=[2,0,2,2], ceil_mode=1",
    'kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_UPPER"',
    'kernel_shape=[3,2], strides=[2,2], auto_pad="SAME_LOWER"',
    "kernel_shape=[2,2], dilations=[2,2]",
)
_REGIONS = np.float32([[2, 1, 12, 13], [0.3, 0.9, 5.2, 9.1], [-4, 3, 30, 3]])
POOL = [
    *(Case(f"y = MaxPool<{p}>(x)", IMAGE) for p in _POOLS),
    *(Case(f"y, k = MaxPool<{p}>(x)", IMAGE, outputs=("y", "k")) for p in _POOLS),
    *(Case(f"y = AveragePool<{p}>(x)", IMAGE) for p in _POOLS),
    *(Case(f"y = AveragePool<{p}, count_include_pad=1>(x)", IMAGE) for p in _POOLS),
    *(Case(f"y = LpPool<{p}>(x)", IMAGE) for p in _POOLS),
    Case("y = LpPool<kernel_shape=[2,2], p=3>(x)", IMAGE),
    Case("y = MaxPool<kernel_shape=[2], strides=[2]>(x)", {"x": f(1, 2, 7)}),
    Case("y = AveragePool<kernel_shape=[2,2,2]>(x)", {"x": f(1, 2, 3, 4, 3)}),
    Case("y = MaxPool<kernel_shape=[2,2]>(x)", {"x": ints(1, 2, 4, 4, dtype=np.int8)}),
    *(Case(f"y = {op}(x)", IMAGE) for op in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")),
    Case("y = GlobalLpPool<p=3>(x)", IMAGE),
    Case(
        "y = MaxRoiPool<pooled_shape=[2,3], spatial_scale=0.5>(x, c)",
        {"x": f(2, 3, 8, 9), "c": np.float32([[0, 2, 1, 12, 13], [1, 0, 0, 5, 9]])},
    ),
    Case(
        "y = MaxRoiPool<pooled_shape=[2,3]>(x, c)",  # past the border, and wholly beyond it
        {"x": f(2, 3, 8, 9), "c": np.float32([[0, 2, 1, 12, 13], [1, 20, -9, 30, 2]])},
    ),
    *(
        Case(
            f"y = RoiAlign<output_height=2, output_width=3, spatial_scale=0.5{rest}>(x, c, ci)",
            {"x": f(2, 3, 8, 9), "c": _REGIONS, "ci": i(0, 1, 1)},
            opset=opset,
        )
        for rest, opset in (
            ("", 16),
            (", sampling_ratio=2", 20),
            ("", 10),
            (', coordinate_transformation_mode="output_half_pixel"', 20),
            (', mode="max", sampling_ratio=2', 16),
            (', mode="max"', 10),
        )
    ),
    Case(
        "y = RoiAlign<output_height=2, output_width=2, sampling_ratio=3>(x, r, ci)",
        {"x": f(1, 2, 8, 9), "r": np.float32([[1.2, 0.6, 6.5, 7.2]]), "ci": i(0)},
    ),
    Case(
        "y = RoiAlign<output_height=2, output_width=2>(x, c, ci)",
        {"x": f(1, 2, 8, 9), "c": np.zeros((0, 4), np.float32), "ci": i()},
    ),
    Case(
        "a, k = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x)"
        " y = MaxUnpool<kernel_shape=[2,2], strides=[2,2]>(a, k)",
        {"x": f(2, 2, 6, 4)},
    ),
]

_NORM = {"x": f(2, 4, 3, 5), "w": f(4), "wb": f(4)}
NORM = [
    Case(
        "y = BatchNormalization<epsilon=0.01>(x, w, wb, cm, cv)",
        {**_NORM, "cm": f(4), "cv": pos(4)},
    ),
    Case(
        "y = BatchNormalization(x, w, wb, cm, cv)",
        {**_NORM, "x": f(3, 4), "cm": f(4), "cv": pos(4)},
    ),
    Case("y = InstanceNormalization<epsilon=0.01>(x, w, wb)", _NORM),
    Case("y = InstanceNormalization(x, w, wb)", {**_NORM, "x": f(1, 4, 1, 1)}, tolerance=1e-4),
    Case("y = GroupNormalization<num_groups=2>(x, w, wb)", {**_NORM, "w": f(2), "wb": f(2)}),
    Case("y = GroupNormalization<num_groups=2>(x, w, wb)", _NORM, opset=21),
    Case("y = LayerNormalization(x, w, wb)", {"x": f(2, 3, 4), "w": f(4), "wb": f(4)}),
    Case("y = LayerNormalization<axis=1>(x, w)", {"x": f(2, 3, 4), "w": f(3, 4)}),
    Case("y = LayerNormalization<axis=1>(x, w)", {"x": f(2, 3, 4), "w": f(4)}),
    Case(
        "y, m, s = LayerNormalization(x, w, wb)",
        {"x": f(2, 3, 4), "w": f(4), "wb": f(4)},
        outputs=("y", "m", "s"),
    ),
    Case("y = RMSNormalization(x, w)", {"x": f(2, 3, 4), "w": f(4)}, opset=23),
    Case(
        "y = RMSNormalization<axis=1, epsilon=0.1>(x, w)", {"x": f(2, 3, 4), "w": f(3, 4)}, opset=23
    ),
    Case("y = LRN<size=3>(x)", IMAGE),
    Case("y = LRN<size=5, alpha=0.5, beta=0.6, bias=2.0>(x)", {"x": f(1, 9, 2, 2)}),
    Case("y = LpNormalization(x)", X),
    Case("y = LpNormalization<axis=1, p=1>(x)", X),
    Case("y = MeanVarianceNormalization(x)", IMAGE),
    Case("y = MeanVarianceNormalization<axes=[1]>(x)", IMAGE),
    *(Case(f"y = {op}<axis=1>(x)", X) for op in ("Softmax", "LogSoftmax")),
    Case("y = Softmax(x)", X),
    Case("y = Hardmax<axis=1>(x)", X, grad=False),
    Case("y = Dropout(x)", X),
    Case("y, m = Dropout(x, c)", {**X, "c": n(0.3, np.float32)}, outputs=("y", "m")),
]
