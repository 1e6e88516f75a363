"""Load a state dict into a torch module, by torch's names or by the ONNX ones."""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from onnxslim_kd.errors import UserError, near_misses
from onnxslim_kd.zoo.blocks import onnx_names


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Fill the parameters of ``module`` from a file; every one must be in it, and no other.

    Raises:
        UserError: The file cannot be read, or a name or a shape does not fit.
    """
    given = read(Path(path))
    names = onnx_names(module)
    by_onnx_name = {name: torch_name for torch_name, name in names.items()}
    state = module.state_dict()
    found = {}
    for name, tensor in given.items():
        torch_name = name if name in state else by_onnx_name.get(name)
        if torch_name is None:
            raise UserError(f"{path}: the module has no {name!r}{near_misses(name, by_onnx_name)}")
        if tensor.shape != state[torch_name].shape:
            raise UserError(
                f"{path}: {name} has shape {list(tensor.shape)},"
                f" the module's has {list(state[torch_name].shape)}"
            )
        found[torch_name] = tensor
    missing = [n for n in state if n not in found and not n.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} parameters are not in it, the first is {names[missing[0]]!r}"
        )
    module.load_state_dict(found, strict=False)


def read(path: Path) -> Mapping[str, Tensor]:
    """Read a .safetensors, .npz, or torch file; pickled code in a file is never run.

    Raises:
        UserError: There is no such file, or it is none of these.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        ValueError,
        RuntimeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        safetensors.SafetensorError,
    ) as error:
        raise UserError(
            f"{path}: no weights file ({str(error).splitlines()[0]});"
            f" give a .safetensors, .npz or a state dict saved by torch"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise UserError(f"{path}: holds no state dict (names and tensors)")
    return state
