"""ResNet-18 for small images.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016 (arXiv 1512.03385), with the stem
of its section 4.2 (one 3x3 convolution, no pool). Group normalisation (Wu and He, arXiv 1803.08494) is
the default because batch statistics of unlike clients do not average well (Hsieh et al., "The Non-IID
Data Quagmire of Decentralized Machine Learning", ICML 2020, arXiv 1910.00189).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hansa.core.models.base import MOST, ModelSpec, SplitModel, image_size

Norm = Literal["group", "batch"]


def _norm(kind: Norm, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if kind == "batch" else nn.GroupNorm(math.gcd(32, channels), channels)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    made = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return made


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: [B, C, H, W] -> [B, C', H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = _convolution(inputs, outputs, 3, stride)
        self.norm1 = _norm(norm, outputs)
        self.conv2 = _convolution(outputs, outputs, 3)
        self.norm2 = _norm(norm, outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                OrderedDict(conv=_convolution(inputs, outputs, 1, stride), norm=_norm(norm, outputs))
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = torch.relu(self.norm1(self.conv1(x)))
        residual = self.norm2(self.conv2(residual))
        return torch.relu(residual + self.shortcut(x))


class ResNet18Config(ModelSpec):
    """ResNet-18 with a 3x3 stem; four stages of width, 2, 4 and 8 times width."""

    name: Literal["resnet18"] = "resnet18"
    norm: Norm = Field(
        default="group",
        description="Normalisation: by groups (as many of 32 as divide the channels) or by batch.",
    )
    width: int = Field(
        # With fewer than 16 a group of the last stage has one or two channels, at 8x8 images one or two
        # values: normalised, they are 0 or ±1 whatever the image.
        default=64,
        ge=16,
        le=MOST,
        description="Channels of the first stage; 64 is the published model.",
    )

    def assemble(self, sample: Tensor, outputs: int) -> nn.Module:
        """Images [B, C, H, W] of at least 8x8 pixels, halved three times -> [B, outputs]."""
        channels, _, _ = image_size(self.name, sample, smallest=8)
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv=_convolution(channels, self.width, 3), norm=_norm(self.norm, self.width), relu=nn.ReLU()
        )
        inputs = self.width
        for stage in range(4):
            width = self.width << stage
            layers[f"stage{stage + 1}"] = nn.Sequential(
                _BasicBlock(inputs, width, stride=1 if stage == 0 else 2, norm=self.norm),
                _BasicBlock(width, width, stride=1, norm=self.norm),
            )
            inputs = width
        layers["pool"] = nn.AdaptiveAvgPool2d(1)
        layers["flatten"] = nn.Flatten()
        return SplitModel(nn.Sequential(layers), inputs, outputs)
