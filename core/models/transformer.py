"""A small decoder-only transformer that predicts the next character.

Vaswani et al., "Attention Is All You Need", NeurIPS 2017 (arXiv 1706.03762), with the changes of
Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, section 2.3: learned
positions, normalisation before each sub-layer and after the last block, residual projections
initialised smaller by the square root of their number.
"""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from hansa.core.errors import InputError
from hansa.core.models.base import MOST, ModelSpec, SplitModel, describe

_INITIAL_DEVIATION = 0.02


class _Block(nn.Module):
    """Causal self-attention, then a perceptron of four times the width: [B, T, d] -> [B, T, d]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def _attend(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        # Heads join the batch axis: with three axes torch takes its plain kernel, which vmap can batch;
        # the fused CPU kernel it takes with four has no batching rule and makes vmap fall back, with a
        # warning, to a loop over the clients.
        q, k, v = qkv.permute(2, 0, 3, 1, 4).flatten(1, 2)  # each [B * heads, T, d / heads]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.view(batch, self.heads, tokens, -1).transpose(1, 2)  # [B, T, heads, d / heads]
        out: Tensor = self.attention_out(mixed.flatten(2))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend(self.norm1(x))
        out: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x))))
        return out


class _Decoder(nn.Module):
    """Tokens [B, T] -> features [B, T, d], T at most ``context``."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        # Positions are looked up for every example: an engine that folds clients into the batch axis
        # must see that axis wherever a parameter is used.
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        x = self.tokens(tokens) + self.positions(positions)  # [B, T, d]
        features: Tensor = self.norm(self.blocks(x))
        return features


class CharTransformerConfig(ModelSpec):
    """Decoder-only transformer over characters; the length of an example is its context."""

    name: Literal["char_transformer"] = "char_transformer"
    layers: int = Field(default=2, ge=1, le=1000, description="Transformer blocks.")
    heads: int = Field(default=4, ge=1, description="Attention heads; they divide the width.")
    width: int = Field(default=64, ge=1, le=MOST, description="Features of a token, d.")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.width % self.heads:
            raise InputError(
                "model.heads",
                self.heads,
                f"does not divide model.width = {self.width}",
                "choose a width that is a multiple of the heads",
            )
        return self

    def assemble(self, sample: Tensor, outputs: int) -> nn.Module:
        """Tokens [B, T] int64, T at most the sample's -> scores [B, T, V] of the next token, V = outputs."""
        if sample.ndim != 1 or sample.dtype != torch.int64 or not len(sample):
            raise InputError(
                "model.name",
                self.name,
                f"needs int64 token sequences [T], but an example is {describe(sample)}",
                "use text data, or another model for float inputs",
            )
        if not 0 <= int(sample.min()) <= int(sample.max()) < outputs:
            raise InputError(
                "outputs",
                outputs,
                f"an example holds tokens from {int(sample.min())} to {int(sample.max())}",
                "set the outputs to the vocabulary size and number the tokens from 0",
            )
        model = SplitModel(
            _Decoder(outputs, len(sample), self.width, self.heads, self.layers), self.width, outputs
        )
        residual_deviation = _INITIAL_DEVIATION / math.sqrt(2 * self.layers)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith("_out.weight")
                nn.init.normal_(parameter, std=residual_deviation if residual else _INITIAL_DEVIATION)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        return model
