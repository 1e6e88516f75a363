"""Transformers of every family, tiny, with random weights, exported from `transformers`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
import transformers as hf
from torch import Tensor, nn

TINY: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
LAYERS: dict[str, Any] = {"num_hidden_layers": 2}


class Exported(NamedTuple):
    """What an exporter needs."""

    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]


class Output(nn.Module):
    """One tensor of a model's output, inputs by position, no cache."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], take: str, **fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.take, self.fixed = model, names, take, fixed

    def forward(self, *values: Tensor) -> Tensor:
        output = self.model(**dict(zip(self.names, values, strict=True)), **self.fixed)
        return getattr(output, self.take)


def _of(model: nn.Module, take: str, inputs: dict[str, Tensor], **fixed: Any) -> Exported:
    module = Output(model.eval(), tuple(inputs), take, **fixed)
    axes = {
        name: {0: "batch"}
        | ({1: f"{'target' if 'decoder' in name else 'length'}"} if x.ndim == 2 else {})
        for name, x in inputs.items()
    }
    return Exported(module, inputs, axes)


def _tokens(*names: str) -> dict[str, Tensor]:
    shapes = {name: (2, 7 if "decoder" in name else 9) for name in names}
    return {
        name: torch.ones(shape, dtype=torch.int64)
        if "mask" in name
        else torch.randint(0, 50, shape)
        for name, shape in shapes.items()
    }


def _images(size: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def vit(attention: str = "eager") -> Exported:
    config = hf.ViTConfig(
        **TINY, **LAYERS, image_size=32, patch_size=8, num_labels=10, attn_implementation=attention
    )
    return _of(hf.ViTForImageClassification(config), "logits", _images())


def bert(attention: str = "eager") -> Exported:
    config = hf.BertConfig(**TINY, **LAYERS, vocab_size=50, attn_implementation=attention)
    return _of(hf.BertModel(config), "last_hidden_state", _tokens("input_ids", "attention_mask"))


def bert_lm(attention: str = "eager") -> Exported:
    """The embedding table is the language model's head, transposed."""
    config = hf.BertConfig(**TINY, **LAYERS, vocab_size=50, attn_implementation=attention)
    return _of(hf.BertForMaskedLM(config), "logits", _tokens("input_ids", "attention_mask"))


def gpt2(attention: str = "eager") -> Exported:
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=50, attn_implementation=attention
    )
    return _of(
        hf.GPT2LMHeadModel(config),
        "logits",
        _tokens("input_ids", "attention_mask"),
        use_cache=False,
    )


def llama(attention: str = "eager") -> Exported:
    """Grouped queries, rotary embedding, RMS norms, gated MLP."""
    config = hf.LlamaConfig(
        **TINY,
        **LAYERS,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=64,
        attn_implementation=attention,
    )
    return _of(
        hf.LlamaForCausalLM(config),
        "logits",
        _tokens("input_ids", "attention_mask"),
        use_cache=False,
    )


def convnext(attention: str = "") -> Exported:
    config = hf.ConvNextConfig(
        hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1], num_labels=10, image_size=32
    )
    model = hf.ConvNextForImageClassification(config)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            nn.init.normal_(parameter)
    return _of(model, "logits", _images(64))


def swin(attention: str = "") -> Exported:
    config = hf.SwinConfig(
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=10,
    )
    return _of(hf.SwinForImageClassification(config), "logits", _images())


def whisper(attention: str = "eager") -> Exported:
    """Encoder with convolutions over time, decoder with cross-attention."""
    config = hf.WhisperConfig(
        vocab_size=50,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=20,
        max_target_positions=20,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        attn_implementation=attention,
    )
    inputs = {
        "input_features": torch.randn(2, 8, 40),
        **_tokens("decoder_input_ids", "decoder_attention_mask"),
    }
    return _of(hf.WhisperForConditionalGeneration(config), "logits", inputs, use_cache=False)


def t5(attention: str = "") -> Exported:
    """Relative position bias from a table, RMS norms, cross-attention."""
    config = hf.T5Config(
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=0,
    )
    inputs = _tokens("input_ids", "decoder_input_ids")
    return _of(hf.T5ForConditionalGeneration(config), "logits", inputs, use_cache=False)


MODELS: dict[str, Callable[..., Exported]] = {
    "vit": vit,
    "bert": bert,
    "bert_lm": bert_lm,
    "gpt2": gpt2,
    "llama": llama,
    "convnext": convnext,
    "swin": swin,
    "whisper": whisper,
    "t5": t5,
}


def export(
    name: str, path: Path, *, dynamo: bool = False, opset: int | None = None, **options: Any
) -> Path:
    """Export MODELS[name] to ``path``."""
    torch.manual_seed(0)
    made = MODELS[name](**options)
    for parameter in made.module.parameters():
        if parameter.ndim == 1 or not parameter.any():
            nn.init.normal_(parameter, 1.0, 0.3)  # zeros and equal scales hide errors
    kind: dict[str, Any] = (
        {"dynamic_shapes": (tuple(_dims(made).values()),), "dynamo": True, "opset_version": opset}
        if dynamo
        else {"dynamic_axes": made.dynamic, "dynamo": False, "opset_version": opset or 17}
    )
    torch.onnx.export(
        made.module,
        tuple(made.inputs.values()),
        path,
        input_names=list(made.inputs),
        output_names=["output"],
        **kind,
    )
    onnx.checker.check_model(path)
    return path


def _dims(made: Exported) -> dict[str, dict[int, Any]]:
    symbols: dict[str, Any] = {}
    return {
        name: {axis: symbols.setdefault(dim, torch.export.Dim(dim)) for axis, dim in axes.items()}
        for name, axes in made.dynamic.items()
    }
