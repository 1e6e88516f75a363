import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from torch import nn

from onnxslim_kd import model as model_io
from onnxslim_kd.cli.export import export as command
from onnxslim_kd.errors import NotFoundError, OperationError, UserError
from onnxslim_kd.runtime import Session
from onnxslim_kd.zoo.export import KEY, Input, export

HERE = "test_export"
SMALL = {"image": (1, 3, 32, 32)}


@pytest.fixture(autouse=True)
def _own_builders_importable(monkeypatch, request) -> None:
    monkeypatch.syspath_prepend(request.path.parent)


class Twins(nn.Module):
    """Equal layers, which exporters share; tied ones; a dropout; two inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.second(self.first(self.embed(ids)) * scale)
        x = nn.functional.dropout(x, training=self.training)
        return {"hidden": x, "logits": self.head(x)}


def twins() -> nn.Module:
    return Twins()


class FixedBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(int(x.shape[0]), -1) if x.shape[0] == 1 else x.flatten(1)[:1] * 2


def fixed_batch() -> nn.Module:
    return FixedBatch()


class Fails(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("not today")


def fails() -> nn.Module:
    return Fails()


def no_module() -> int:
    return 3


def raises() -> nn.Module:
    raise RuntimeError("boom")


def weights_of(model: ir.Model) -> dict[str, np.ndarray]:
    return {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}


def test_batchnorm_stays_live_and_names_survive() -> None:
    model = export("resnet18", inputs=SMALL)
    norms = [node for node in model.graph if node.op_type == "BatchNormalization"]
    assert len(norms) == 21
    assert all(node.attributes["training_mode"].as_int() == 0 for node in norms)
    assert {node.op_type for node in model.graph} == {
        *("Conv", "BatchNormalization", "Relu", "MaxPool", "Add"),
        *("GlobalAveragePool", "Flatten", "Gemm"),
    }
    names = set(model.graph.initializers)
    assert {"res2a_branch2a_weights", "bn2a_branch2a_scale", "bn5b_branch2b_variance"} <= names
    assert not [name for name in names if "::" in name or name.endswith("num_batches_tracked")]
    assert list(model.graph.inputs[0].shape) == ["batch", 3, 32, 32]
    assert list(model.graph.outputs[0].shape) == ["batch", 1000]
    assert '"seed": 0' in model.metadata_props[KEY]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_same_seed_same_model() -> None:
    first, again, other = (
        weights_of(export("resnet18", inputs=SMALL, seed=seed)) for seed in (1, 1, 2)
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["conv1_weights"], other["conv1_weights"])


def test_own_module_with_tied_and_equal_weights_and_a_dict_of_outputs() -> None:
    inputs = {"scale": Input((1, 1, 4)), "ids": Input((1, 5), "int64", (0, 1))}
    model = export(f"{HERE}:twins", inputs=inputs)
    names = set(model.graph.initializers)
    norms = {f"{norm}.{part}" for norm in ("first", "second") for part in ("weight", "bias")}
    assert norms | {"embed.weight"} <= names  # the tied head.weight is embed.weight
    assert "head.weight" not in names
    assert [value.name for value in model.graph.inputs] == ["ids", "scale"]  # as forward has them
    feeds = {"ids": np.ones((3, 9), np.int64), "scale": np.ones((3, 1, 4), np.float32)}
    outputs = Session(model).run(feeds)
    assert [array.shape for array in outputs.values()] == [(3, 9, 4), (3, 9, 7)]


def test_fixed_sizes() -> None:
    model = export(f"{HERE}:fixed_batch", inputs={"x": Input.parse("1!x3x4")})
    assert list(model.graph.inputs[0].shape) == [1, 3, 4]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1x3x224x224", Input((1, 3, 224, 224))),
        ("1x77:int64", Input((1, 77), "int64")),
        ("1?x3x64?x64?", Input((1, 3, 64, 64), dynamic=(0, 2, 3))),
        ("2!x8", Input((2, 8), dynamic=())),
    ],
)
def test_parse_input(text, expected) -> None:
    assert Input.parse(text) == expected


@pytest.mark.parametrize("text", ["", "1x", "1xNx3", "0x3", "-1x3", "1,3", "1x3?!", "1 x 3"])
def test_parse_input_refuses(text) -> None:
    with pytest.raises(UserError, match="is no shape; write it like"):
        Input.parse(text)


@pytest.mark.parametrize(
    ("spec", "options", "kind", "text"),
    [
        ("resnet81", {}, NotFoundError, "no architecture of the zoo; near misses: resnet18"),
        ("resnet18", {"opset": 11}, UserError, "opset 11 is not one of 17 to 20"),
        ("resnet18", {"arguments": {"klasses": 3}}, UserError, "unexpected keyword argument"),
        ("resnet18", {"inputs": {"x": Input((1, 3), "floaty")}}, UserError, "no torch dtype"),
        (f"{HERE}:twins", {}, UserError, "name its inputs, for example --input image="),
        (f"{HERE}:no_module", {}, UserError, "returns a int, not a torch module"),
        (f"{HERE}:raises", {}, OperationError, "raises fails: RuntimeError: boom"),
        (f"{HERE}:fails", {"inputs": {"x": (1, 2)}}, OperationError, "ValueError: not today"),
        (
            f"{HERE}:fixed_batch",
            {"inputs": {"x": (1, 3, 4)}},
            OperationError,
            "at x=2x3x4: output output differs from torch's; export with fixed sizes",
        ),
    ],
)
def test_refusals(spec, options, kind, text) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        export(spec, **options)


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt"])
def test_weights_by_either_name(tmp_path, suffix) -> None:
    other = export("resnet18", inputs=SMALL, seed=5)
    arrays = weights_of(other)
    path = tmp_path / f"weights.{suffix}"
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    if suffix == "safetensors":
        safetensors.torch.save_file(tensors, path)
    elif suffix == "npz":
        np.savez(path, **arrays)
    else:
        torch.manual_seed(5)
        from onnxslim_kd.zoo.resnet import resnet18

        torch.save(resnet18().state_dict(), path)
    loaded = weights_of(export("resnet18", inputs=SMALL, weights=path))
    assert loaded.keys() == arrays.keys()
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file"),
        (b"nonsense", "no weights file"),
        ({"fc_0.w_9": np.zeros(1)}, "the module has no 'fc_0.w_9'; near misses: fc_0.w_0"),
        ({"fc_0.w_0": np.zeros((2, 2))}, "fc_0.w_0 has shape [2, 2], the module's has [512, 1000]"),
        ({"fc_0.b_0": np.zeros(1000)}, "parameters are not in it, the first is 'conv1_weights'"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, content, text) -> None:
    path = tmp_path / "weights.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(UserError, match=re.escape(text)):
        export("resnet18", inputs=SMALL, weights=path)


def test_a_pickle_is_never_run(tmp_path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"fc_0.w_0": Input((1,))}, path)
    with pytest.raises(UserError, match="no weights file"):
        export("resnet18", inputs=SMALL, weights=path)


def test_command(tmp_path) -> None:
    path = tmp_path / "model.onnx"
    arguments = ["mobilenet_v1", "-o", str(path), "--input", "image=1x3x32x32"]
    arguments += ["--arg", "classes=4", "--arg", "scale=0.25"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "outputs equal to torch's" in result.output
    assert list(model_io.load(path).graph.outputs[0].shape) == ["batch", 4]
    with pytest.raises(UserError, match="exists; choose another name or pass --force"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_command_lists_the_zoo() -> None:
    result = CliRunner().invoke(command, ["--list"])
    assert result.exit_code == 0
    assert re.search(r"mobilenet_v2 +1x3x224x224", result.output)


@pytest.mark.parametrize(
    "arguments", [["resnet18"], ["-o", "x.onnx"], ["a", "-o", "b", "--arg", "c"]]
)
def test_command_misused(arguments) -> None:
    assert CliRunner().invoke(command, arguments).exit_code == 2
