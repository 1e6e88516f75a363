import re
import subprocess
import sys

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
from onnxslim_kd.zoo import ZOO
from onnxslim_kd.zoo.blocks import onnx_names
from onnxslim_kd.zoo.export import KEY, export
from onnxslim_kd.zoo.inputs import Input
from onnxslim_kd.zoo.small import digits_cnn

HERE = "test_export"
SMALL = {"image": (1, 1, 8, 8)}


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


class Repeats(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = x * 2
        return y, y


def repeats() -> nn.Module:
    return Repeats()


class Unknown(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.linalg.eigvals(x).real


def unknown() -> nn.Module:
    return Unknown()


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
    model = export("resnet20", inputs={"image": (1, 1, 28, 28)}, arguments={"channels": 1})
    norms = [node for node in model.graph if node.op_type == "BatchNormalization"]
    assert len(norms) == 21
    assert all(node.attributes["training_mode"].as_int() == 0 for node in norms)
    assert {node.op_type for node in model.graph} == {
        *("Conv", "BatchNormalization", "Relu", "Add"),
        *("GlobalAveragePool", "Flatten", "Gemm"),
    }
    names = list(model.graph.initializers)
    assert names[:2] == ["conv1_weights", "bn_conv1_scale"]
    assert names[-2:] == ["fc_0.w_0", "fc_0.b_0"]
    assert {"res2a_branch2a_weights", "bn3a_branch1_variance"} <= set(names)
    assert not [name for name in names if "::" in name or name.endswith("num_batches_tracked")]
    assert list(model.graph.inputs[0].shape) == ["batch", 1, 28, 28]
    assert list(model.graph.outputs[0].shape) == ["batch", 10]
    assert '"seed": 0' in model.metadata_props[KEY]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_architecture_exports(name) -> None:
    channels, height, width = ZOO[name].shape[1:]
    size = (1, channels, min(height, 64), min(width, 64))
    model = export(name, inputs={"image": size})
    assert tuple(value.name for value in model.graph.outputs) == ZOO[name].outputs
    assert all(value.shape[0] == "batch" for value in model.graph.outputs)
    norms = [node for node in model.graph if node.op_type == "BatchNormalization"]
    convs = [node for node in model.graph if node.op_type == "Conv"]
    assert len(norms) > 0.8 * len(convs)


def test_observed_sizes_name_the_axes() -> None:
    inputs = {"image": Input((1, 3, 32, 32), dynamic=(0, 2, 3))}
    model = export("deeplabv3p_mobilenet_v2", inputs=inputs, arguments={"scale": 0.25})
    assert list(model.graph.outputs[0].shape) == ["batch", 19, "logits_2", "logits_3"]
    image = np.zeros((3, 3, 48, 80), np.float32)
    assert Session(model).run({"image": image})["logits"].shape == (3, 19, 48, 80)


def test_same_seed_same_model() -> None:
    first, again, other = (
        weights_of(export("digits_cnn", inputs=SMALL, seed=seed)) for seed in (1, 1, 2)
    )
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["conv2_weights"], other["conv2_weights"])


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
        ("digits_cnn", {"opset": 11}, UserError, "opset 11 is not one of 17 to 20"),
        ("digits_cnn", {"arguments": {"klasses": 3}}, UserError, "unexpected keyword argument"),
        (
            f"{HERE}:twins",
            {"inputs": {"ids": Input((1, 3), "floaty"), "scale": (1, 1, 4)}},
            UserError,
            "'floaty' is no type that torch and NumPy share; try float32 or int64",
        ),
        ("digits_cnn", {"inputs": {"a": (1, 1), "b": (1, 1)}}, UserError, "has one input, not 2"),
        ("digits_cnn", {"inputs": {"image": (1, 64)}}, UserError, "takes an image such as"),
        ("digits_cnn", {"inputs": {"image": (1, 3, 8, 8)}}, UserError, "on images of 1x3x8x8: Gi"),
        (f"{HERE}:twins", {}, UserError, "name its inputs, for example --input image="),
        (f"{HERE}:repeats", {"inputs": {"x": (1, 3)}}, OperationError, "return every tensor once"),
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


def test_an_unknown_operator_is_one_sentence(capfd) -> None:
    with pytest.raises(OperationError, match="cannot be exported: UnsupportedOperatorError"):
        export(f"{HERE}:unknown", inputs={"x": (1, 3, 3)})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", ["safetensors", "npz", "pt"])
def test_weights_by_either_name(tmp_path, suffix) -> None:
    other = export("digits_cnn", inputs=SMALL, seed=5)
    arrays = weights_of(other)
    path = tmp_path / f"weights.{suffix}"
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    if suffix == "safetensors":
        safetensors.torch.save_file(tensors, path)
    elif suffix == "npz":
        np.savez(path, **arrays)
    else:
        net = digits_cnn()
        torch_names = {name: torch_name for torch_name, name in onnx_names(net).items()}
        state = {torch_names[name]: tensor for name, tensor in tensors.items()}
        torch.save(state, path)
    loaded = weights_of(export("digits_cnn", inputs=SMALL, weights=path))
    assert loaded.keys() == arrays.keys()
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file"),
        (b"nonsense", "no weights file"),
        ({"fc4_weight9": np.zeros(1)}, "the module has no 'fc4_weight9'; near misses: fc4_weights"),
        (
            {"fc4_weights": np.zeros((2, 2))},
            "fc4_weights has shape [2, 2], the module's has [128, 10]",
        ),
        ({"fc4_offset": np.zeros(10)}, "parameters are not in it, the first is 'conv1_weights'"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, content, text) -> None:
    path = tmp_path / "weights.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.savez(path, **content)
    with pytest.raises(UserError, match=re.escape(text)):
        export("digits_cnn", inputs=SMALL, weights=path)


def test_a_pickle_is_never_run(tmp_path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"fc4_weights": Input((1,))}, path)
    with pytest.raises(UserError, match="no weights file"):
        export("digits_cnn", inputs=SMALL, weights=path)


def test_command(tmp_path) -> None:
    path = tmp_path / "model.onnx"
    arguments = ["mobilenet_small", "-o", str(path)]
    arguments += ["--arg", "classes=4", "--arg", "width=8"]
    result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "outputs equal to torch's" in result.output
    assert list(model_io.load(path).graph.outputs[0].shape) == ["batch", 4]
    with pytest.raises(UserError, match="exists; choose another name or pass --force"):
        CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_the_zoo_and_the_command_do_not_import_torch() -> None:
    code = "import sys, onnxslim_kd.zoo, onnxslim_kd.cli.export; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_command_lists_the_zoo() -> None:
    result = CliRunner().invoke(command, ["--list"])
    assert result.exit_code == 0
    assert re.search(r"mobilenet_v2 +1x3x224x224", result.output)


@pytest.mark.parametrize(
    "arguments", [["resnet18"], ["-o", "x.onnx"], ["a", "-o", "b", "--arg", "c"]]
)
def test_command_misused(arguments) -> None:
    assert CliRunner().invoke(command, arguments).exit_code == 2
