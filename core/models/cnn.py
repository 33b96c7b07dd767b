"""The two small CNNs of the federated literature.

* ``leaf_cnn``: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
  Data", AISTATS 2017, section 3 (arXiv 1602.05629); with 2048 hidden units, Caldas et al., "LEAF: A
  Benchmark for Federated Settings", 2018 (arXiv 1812.01097), FEMNIST.
* ``digits_cnn``: Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch
  Normalization", ICLR 2021 (arXiv 2102.07623), the model of the digits benchmark.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from hansa.core.models.base import MOST, ModelSpec, SplitModel, image_size

_Width = Annotated[int, Field(ge=1, le=MOST)]


def _stage(inputs: int, width: int, *, norm: bool = False, pool: bool = True) -> nn.Sequential:
    """5x5 convolution, ReLU, 2x2 max pool: [B, inputs, H, W] -> [B, width, H // 2, W // 2]."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=nn.Conv2d(inputs, width, 5, padding=2))
    if norm:
        layers["norm"] = nn.BatchNorm2d(width)
    if pool:
        layers["pool"] = nn.MaxPool2d(2)
    # ReLU is monotone, so it commutes with max pooling and costs a quarter behind it.
    layers["relu"] = nn.ReLU()
    return nn.Sequential(layers)


class LeafCNNConfig(ModelSpec):
    """CNN of McMahan et al. and LEAF: two 5x5 convolutions (32, 64) with pools, one hidden layer."""

    name: Literal["leaf_cnn"] = "leaf_cnn"
    hidden: _Width = Field(
        default=512, description="Units of the hidden layer: 512 in McMahan et al., 2048 in LEAF's FEMNIST."
    )

    def assemble(self, sample: Tensor, outputs: int) -> nn.Module:
        """Images [B, C, H, W] of at least 4x4 pixels -> [B, outputs]."""
        channels, height, width = image_size(self.name, sample, smallest=4)
        extractor = nn.Sequential(
            OrderedDict(
                stage1=_stage(channels, 32),
                stage2=_stage(32, 64),
                flatten=nn.Flatten(),
                linear=nn.Linear(64 * (height // 4) * (width // 4), self.hidden),
                relu=nn.ReLU(),
            )
        )
        return SplitModel(extractor, self.hidden, outputs)


class DigitsCNNConfig(ModelSpec):
    """CNN of FedBN's digits benchmark: batch normalisation after every layer but the head.

    The official widths are ``channels = [64, 64, 128]`` and ``hidden = [2048, 512]`` (14 million
    parameters at 28x28); the default is a quarter of the channels and far fewer hidden units, for
    CPUs. A training batch needs at least two examples.
    """

    name: Literal["digits_cnn"] = "digits_cnn"
    channels: tuple[_Width, _Width, _Width] = Field(
        default=(16, 16, 32), description="Channels of the three 5x5 convolutions; officially [64, 64, 128]."
    )
    hidden: tuple[_Width, _Width] = Field(
        default=(128, 64), description="Units of the two hidden layers; officially [2048, 512]."
    )

    def assemble(self, sample: Tensor, outputs: int) -> nn.Module:
        """Images [B, C, H, W] of at least 4x4 pixels -> [B, outputs]."""
        channels, height, width = image_size(self.name, sample, smallest=4)
        c1, c2, c3 = self.channels
        h1, h2 = self.hidden
        extractor = nn.Sequential(
            OrderedDict(
                stage1=_stage(channels, c1, norm=True),
                stage2=_stage(c1, c2, norm=True),
                stage3=_stage(c2, c3, norm=True, pool=False),
                flatten=nn.Flatten(),
                linear1=nn.Linear(c3 * (height // 4) * (width // 4), h1),
                norm1=nn.BatchNorm1d(h1),
                relu1=nn.ReLU(),
                linear2=nn.Linear(h1, h2),
                norm2=nn.BatchNorm1d(h2),
                relu2=nn.ReLU(),
            )
        )
        return SplitModel(extractor, h2, outputs)
