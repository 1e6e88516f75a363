"""Cases for reductions, shapes, indices and padding."""

import numpy as np
from lowering_case import IMAGE, Case, X, f, i, ints, n, pos

REDUCE = [
    *(Case(f"y = {op}(x, c)", {**X, "c": i(1)}, opset=18) for op in ("ReduceL1", "ReduceL2")),
    *(
        Case(f"y = {op}<keepdims=0>(x, c)", {**X, "c": i(0, -1)}, opset=18)
        for op in (
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
            "ReduceLogSumExp",
        )
    ),
    *(
        Case(f"y = {op}(x)", X, opset=18)
        for op in (
            "ReduceMax",
            "ReduceMean",
            "ReduceMin",
            "ReduceProd",
            "ReduceSum",
            "ReduceSumSquare",
            "ReduceLogSumExp",
            "ReduceL1",
            "ReduceL2",
        )
    ),
    Case("y = ReduceMean<axes=[1], keepdims=0>(x)", X, opset=17),
    Case("y = ReduceL2<axes=[1,2]>(x)", X, opset=17),
    Case("y = ReduceLogSum(x, c)", {"x": pos(2, 3), "c": i(1)}, opset=18),
    *(
        Case(f"y = {op}<noop_with_empty_axes=1>(x{axes})", {**X, "c": i()}, opset=18)
        for op in ("ReduceL1", "ReduceL2", "ReduceSum", "ReduceSumSquare", "ReduceLogSumExp")
        for axes in ("", ", c")
    ),
    Case("y = ReduceL1<keepdims=0>(x)", {"x": n(-2.0, np.float32)}, opset=18),
    Case("y = ReduceSum(x, axes)", {**X, "axes": i(1, 2)}),
    Case("y = ReduceMean(x, c)", {"x": ints(3, 4, dtype=np.int32), "c": i(1)}, grad=False),
    Case("y = ReduceMax(x, c)", {"x": ints(3, 4), "c": i(1)}, grad=False),
    *(Case(f"y = {op}<axis=1>(x)", X, grad=False) for op in ("ArgMax", "ArgMin")),
    Case("y = ArgMax<axis=-1, keepdims=0>(x)", X, grad=False),
    Case("y = ArgMax<axis=1, select_last_index=1>(x)", {"x": ints(3, 9, low=0, high=3)}),
    Case("y = ArgMin<axis=1>(x)", {"x": ints(3, 9, low=0, high=3)}),
    Case("y, k = TopK<axis=1>(x, c)", {**X, "c": i(2)}, outputs=("y", "k")),
    Case("y, k = TopK<largest=0>(x, c)", {**X, "c": i(2)}, outputs=("y", "k")),
    Case("y, k = TopK(x, c)", {"x": ints(3, 9, low=0, high=3), "c": i(4)}, outputs=("y", "k")),
    Case("y, k = TopK(x, count)", {**X, "count": i(2)}, outputs=("y", "k")),
    *(
        Case(f"y = CumSum<{a}>(x, c)", {**X, "c": n(1)})
        for a in ("exclusive=0", "exclusive=1", "reverse=1", "exclusive=1, reverse=1")
    ),
    Case("y = CumProd<exclusive=1, reverse=1>(x, c)", {**X, "c": n(1)}, opset=26),
]

SHAPE = [
    Case("y = Concat<axis=1>(x, z)", {"x": f(2, 3), "z": f(2, 1)}),
    Case("y = Concat<axis=-1>(x, w)", {"x": f(2, 3), "w": f(2, 1)}),
    Case("y = Flatten(x)", X),
    Case("y = Flatten<axis=0>(x)", X),
    Case("y = Flatten<axis=-1>(x)", X),
    Case("y = Reshape(x, c)", {**X, "c": i(0, -1)}),
    Case("y = Reshape(x, c)", {**X, "c": i(4, 6)}),
    Case("y = Reshape<allowzero=1>(x, c)", {"x": f(0, 3), "c": i(3, 0)}, grad=False),
    Case("y = Reshape(x, s)", {**X, "s": i(6, -1)}),
    Case("y = Squeeze(x)", {"x": f(2, 1, 3, 1)}),
    Case("y = Squeeze(x, c)", {"x": f(2, 1, 3, 1), "c": i(-1)}),
    Case("y = Unsqueeze(x, c)", {**X, "c": i(1)}),
    Case("y = Unsqueeze(x, c)", {**X, "c": i(-1, 0)}),
    Case("y = Transpose(x)", X),
    Case("y = Transpose<perm=[1,0,2]>(x)", X),
    Case("y = Expand(x, c)", {"x": f(3, 1), "c": i(2, 1, 4)}),
    Case("y = Tile(x, c)", {"x": f(3, 2), "c": i(2, 3)}),
    Case("s = Shape(x) y = Identity(s)", X, grad=False),
    Case("y = Shape<start=1, end=-1>(x)", X, grad=False),
    Case("y = Size(x)", X, grad=False),
    Case("y = Constant<value_floats=[1.0, 2.0]>()", {}, grad=False),
    Case("y = Constant<value_int=3>()", {}, grad=False),
    Case("k = Constant<value = float[2] {1.0, 2.0}>() y = Add(x, k)", {"x": f(2)}),
    Case("y = ConstantOfShape<value = float[1] {2.0}>(c)", {"c": i(2, 3)}, grad=False),
    Case("s = Shape(x) y = ConstantOfShape(s)", X, grad=False),
    Case("y = Range(s, e, d)", {"s": n(1), "e": n(9), "d": n(3)}, grad=False),
    Case("y = Range(c0, c1, c2)", {"c0": n(3), "c1": n(0), "c2": n(-1)}, grad=False),
    Case("y = Range(s, c1, c2)", {"s": n(3), "c1": n(1), "c2": n(1)}, grad=False),
    Case("y = EyeLike(x)", {"x": f(3, 4)}, grad=False),
    Case("y = EyeLike<k=1, dtype=7>(x)", {"x": f(3, 4)}, grad=False),
    Case("y = EyeLike<k=-1>(x)", {"x": f(3, 4)}, grad=False),
    Case("y = Trilu(x)", X),
    Case("y = Trilu<upper=0>(x, c)", {**X, "c": n(-1)}),
    Case("y = DepthToSpace<blocksize=2>(x)", {"x": f(1, 8, 2, 3)}),
    Case('y = DepthToSpace<blocksize=2, mode="CRD">(x)', {"x": f(1, 8, 2, 3)}),
    Case("y = SpaceToDepth<blocksize=2>(x)", {"x": f(1, 2, 4, 6)}),
    Case("a, y = Split<axis=2>(x)", X, opset=17, outputs=("a", "y")),
    Case("a, y = Split<axis=1>(x, c)", {**X, "c": i(1, 2)}, outputs=("a", "y")),
    Case("a, y = Split<axis=1, num_outputs=2>(x)", X, outputs=("a", "y")),
    Case("y = Split<num_outputs=1>(x)", X),
    Case("y = Slice(x, c0, c1)", {**X, "c0": i(0, 1), "c1": i(1, 9)}),
    Case("y = Slice(x, c0, c1, c2)", {**X, "c0": i(-2), "c1": i(2**62), "c2": i(-1)}),
    Case("y = Slice(x, c0, c1, c2, c3)", {**X, "c0": i(0), "c1": i(4), "c2": i(2), "c3": i(2)}),
    Case(
        "y = Slice(x, c0, c1, c2, c3)",
        {**X, "c0": i(-1), "c1": i(-(2**62)), "c2": i(2), "c3": i(-2)},
    ),
    *(
        Case("y = Slice(x, c0, c1, c2, c3)", {**X, "c0": i(b), "c1": i(e), "c2": i(2), "c3": i(-1)})
        for b, e in ((3, 0), (-9, -9))
    ),
    Case("y = Slice(x, s, e)", {**X, "s": i(0, 1), "e": i(1, 3)}),
    Case(
        """s = Shape(x) a = Gather(s, c0) b = Unsqueeze(a, c1) t = Concat<axis=0>(b, c2)
        y = Reshape(x, t)""",
        {**X, "c0": n(0), "c1": i(0), "c2": i(-1)},
    ),
]

INDEX = [
    Case("y = Gather<axis=1>(x, c)", {**X, "c": n(-1)}),
    Case("y = Gather<axis=1>(x, c)", {**X, "c": i(0, 2, 0)}),
    Case("y = Gather<axis=-1>(x, k)", {**X, "k": np.array([[0, -1], [1, 1]])}),
    Case("y = Gather(w, k)", {"w": f(5, 3), "k": ints(2, 4, low=0, high=5)}),
    Case("y = Gather(w, k)", {"w": f(5, 3), "k": n(3, np.int32)}),
    Case("y = GatherElements<axis=1>(x, k)", {"x": f(3, 4), "k": ints(3, 2, low=-4, high=4)}),
    Case("y = GatherND(x, k)", {"x": f(2, 3, 4), "k": np.array([[0, 1], [1, -1]])}),
    Case("y = GatherND<batch_dims=1>(x, k)", {"x": f(2, 3, 4), "k": np.array([[1], [2]])}),
    Case("y = GatherND(x, k)", {"x": f(2, 3), "k": np.array([[[0, 1]], [[1, 2]]])}),
    *(
        Case(
            f'y = ScatterElements<axis=1, reduction="{r}">(x, k, u)',
            {"x": f(3, 4), "k": np.array([[1, -1], [0, 2], [3, 1]]), "u": f(3, 2)},
            opset=18,
        )
        for r in ("none", "add", "mul", "max", "min")
    ),
    *(
        Case(
            f'y = ScatterND<reduction="{r}">(x, k, u)',
            {"x": f(4, 3), "k": np.array([[1], [-1]]), "u": f(2, 3)},
            opset=18,
        )
        for r in ("none", "add", "mul", "max", "min")
    ),
    Case("y = ScatterND(x, k, u)", {"x": f(3, 4), "k": np.array([[1, 2], [0, 0]]), "u": f(2)}),
    Case("y = NonZero(x)", {"x": ints(3, 4, low=0, high=2)}),
    Case("y = OneHot(k, c0, c1)", {"k": ints(2, 3, low=-4, high=6), "c0": n(4), "c1": f(2)}),
    Case("y = OneHot<axis=0>(k, c0, z)", {"k": i(0, 3, 1), "c0": i(4), "z": f(2)}),
    Case("y = OneHot<axis=1>(k, c0, c1)", {"k": ints(2, 3, low=0), "c0": n(4), "c1": ints(2)}),
    Case("y = Compress<axis=1>(x, b)", {"x": f(2, 3), "b": np.array([True, False, True])}),
    Case("y = Compress(x, b)", {"x": f(2, 3), "b": np.array([True, False, True])}),
    Case("y = ReverseSequence(x, k)", {"x": f(4, 3, 2), "k": i(1, 4, 2)}),
    Case("y = ReverseSequence<batch_axis=0, time_axis=1>(x, k)", {"x": f(3, 4), "k": i(1, 4, 2)}),
    Case(
        "y, a, b, k = Unique(x)",
        {"x": ints(3, 4, low=0, high=4)},
        outputs=("y", "a", "b", "k"),
    ),
    Case(
        "y, a, b, k = Unique<axis=0>(x)",
        {"x": ints(6, 2, low=0, high=2)},
        outputs=("y", "a", "b", "k"),
    ),
]

PADS = {"constant": (1, 0, 2, 1), "reflect": (1, 2, 2, 1), "edge": (1, 0, 5, 1)}
PAD = [
    *(Case(f'y = Pad<mode="{m}">(x, c)', {"x": f(3, 4), "c": i(*p)}) for m, p in PADS.items()),
    Case('y = Pad<mode="wrap">(x, c)', {"x": f(3, 4), "c": i(1, 2, 2, 1)}),
    Case('y = Pad<mode="wrap">(x, c)', {"x": f(3, 4), "c": i(-1, 2, 1, -1)}),
    Case(
        "y = Pad(x, c0, c1)", {**IMAGE, "c0": i(0, 0, 1, -1, 0, 0, 2, 3), "c1": n(1.5, np.float32)}
    ),
    Case('y = Pad(x, c0, "", c1)', {**IMAGE, "c0": i(1, 2, 3, 4), "c1": i(2, -1)}, opset=18),
    Case('y = Pad<mode="reflect">(x, c)', {**IMAGE, "c": i(0, 0, 2, 1, 0, 0, 1, 2)}),
    Case("y = Pad(x, p)", {"x": f(3, 4), "p": i(1, 0, 2, 1)}),
    Case("y = CenterCropPad<axes=[2,3]>(x, c)", {**IMAGE, "c": i(4, 9)}),
    Case("y = CenterCropPad(x, c)", {"x": f(5, 4), "c": i(2, 7)}),
]
