"""Attention and rotary embeddings of opset 23 and later."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from onnxslim_kd.training.opnode import Kernel, OpNode


@dataclass(frozen=True)
class Options:
    """The attributes of one Attention node."""

    q_heads: int
    kv_heads: int
    scale: float | None
    causal: bool
    softcap: float
    mode: int
    """What the fourth output shows: 0 scores, 1 capped, 2 with mask, 3 probabilities."""


def attention(node: OpNode) -> Kernel:
    """Scaled dot-product attention, by torch's fused kernel where nobody looks inside."""
    if node.get("left_window_size", -1) >= 0 or node.get("right_window_size", -1) >= 0:
        raise node.refuse("windows are not supported")
    options = Options(
        q_heads=node.get("q_num_heads", 0),
        kv_heads=node.get("kv_num_heads", 0),
        scale=node.attributes.get("scale"),
        causal=bool(node.get("is_causal", 0)),
        softcap=node.get("softcap", 0.0),
        mode=node.get("qk_matmul_output_mode", 0),
    )
    inside = len(node.outputs) > 3 and node.outputs[3]

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *cache: Tensor | None,
    ) -> Any:
        flat = q.dim() == 3
        if flat:
            q = _heads(q, options.q_heads)
            k, v = _heads(k, options.kv_heads), _heads(v, options.kv_heads)
        past_k, past_v, lengths = (*cache, None, None, None)[:3]
        past = 0
        if past_k is not None and past_v is not None:
            past = past_k.shape[2]
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        bias = _bias(q, k, mask, options, past, lengths)
        times = q.shape[1] // k.shape[1]
        keys = k if times == 1 else k.repeat_interleave(times, 1)
        values = v if times == 1 else v.repeat_interleave(times, 1)
        y, shown = _attend(q, keys, values, bias, options, inside=inside)
        y = y.transpose(1, 2).flatten(2) if flat else y
        return (y, k, v, shown)[: len(node.outputs)] if len(node.outputs) > 1 else y

    return run


def _heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:-1], count, -1).transpose(1, 2)


def _bias(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    options: Options,
    past: int,
    lengths: Tensor | None,
) -> Tensor | None:
    """Return what is added to the scores: the mask, causality and lengths together."""
    rows, columns = q.shape[2], k.shape[2]
    bias = None
    if mask is not None:
        bias = _added(mask, q.dtype)
        if bias.shape[-1] < columns:
            bias = F.pad(bias, (0, columns - bias.shape[-1]), value=-torch.inf)
    if options.causal:
        before = past if lengths is None else lengths.reshape(-1, 1, 1, 1) - rows
        steps = torch.arange(rows, device=q.device).reshape(-1, 1)
        allowed = torch.arange(columns, device=q.device) <= steps + before
        causal = _added(allowed, q.dtype)
        bias = causal if bias is None else bias + causal
    if lengths is not None:
        inside = torch.arange(columns, device=q.device) < lengths.reshape(-1, 1, 1, 1)
        short = _added(inside, q.dtype)
        bias = short if bias is None else bias + short
    return bias


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, options: Options, *, inside: bool
) -> tuple[Tensor, Tensor | None]:
    if not inside and not options.softcap:
        return F.scaled_dot_product_attention(q, k, v, bias, scale=options.scale), None
    scale = options.scale if options.scale is not None else q.shape[-1] ** -0.5
    raw = torch.matmul(q * scale**0.5, (k * scale**0.5).transpose(-1, -2))
    capped = options.softcap * torch.tanh(raw / options.softcap) if options.softcap else raw
    masked = capped if bias is None else capped + bias
    weights = torch.softmax(masked, -1)
    weights = weights.masked_fill(torch.isneginf(masked).all(-1, keepdim=True), 0.0)
    shown = (raw, capped, masked, weights)[options.mode]
    return torch.matmul(weights, v), shown


def rotary(node: OpNode) -> Kernel:
    """Rotate pairs of features by the angle of their position."""
    heads, width = node.get("num_heads", 0), node.get("rotary_embedding_dim", 0)
    interleaved = node.get("interleaved", 0)

    def run(x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None = None) -> Tensor:
        whole = x if x.dim() == 4 else _heads(x, heads)
        if position is not None:
            cos, sin = cos[position], sin[position]
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        turning = width or whole.shape[-1]
        head, tail = whole[..., :turning], whole[..., turning:]
        a, b = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
        turned = (cos * a - sin * b, sin * a + cos * b)
        joined = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        result = torch.cat([joined, tail], -1)
        return result if x.dim() == 4 else result.transpose(1, 2).flatten(2)

    return run


ATTENTION = {"Attention": attention, "RotaryEmbedding": rotary}
