"""What every model of the registry shares: its configuration's base, its split, its checks.

Legend: B examples in a batch, d features, C channels, H and W pixels, T tokens, V vocabulary size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from hansa.core.errors import InputError

MOST = 10**6
"""Units of a layer."""


class ModelSpec(BaseModel, ABC):
    """Configuration of one model; it knows how to lay out its own module."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @abstractmethod
    def assemble(self, sample: Tensor, outputs: int) -> nn.Module:
        """Module for examples like ``sample`` (no batch axis); parameters come from torch's CPU generator.

        Raises
        ------
        InputError
            The model cannot take such examples.
        """


class SplitModel(nn.Module):
    """A feature extractor and its head: one linear layer from d features to the outputs.

    Personalisation by layers (FedPer, arXiv 1912.00818; FedRep, arXiv 2102.07078) and algorithms that
    exchange features or prototypes rely on this split and on the names ``extractor`` and ``head``.

    Parameters
    ----------
    extractor:
        x -> [B, d], or [B, T, d] where every token has its own prediction.
    features:
        d.
    outputs:
        Classes, vocabulary size, or regression targets.
    """

    def __init__(self, extractor: nn.Module, features: int, outputs: int) -> None:
        super().__init__()
        self.extractor = extractor
        self.head = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Predictions [B, outputs] or [B, T, outputs]."""
        predictions: Tensor = self.head(self.extractor(x))
        return predictions


def describe(sample: Tensor) -> str:
    """Shape and type of an example, for a sentence to the user."""
    return f"{list(sample.shape)} {str(sample.dtype).removeprefix('torch.')}"


def vector_size(name: str, sample: Tensor) -> int:
    """Length of the flattened example, for models that take any float example."""
    if not sample.is_floating_point():
        raise InputError(
            "model.name",
            name,
            f"needs float inputs, but an example is {describe(sample)}",
            "convert the inputs to float32, or use char_transformer for token sequences",
        )
    if sample.ndim == 0 or sample.numel() == 0:
        raise InputError(
            "model.name",
            name,
            f"needs at least one feature in an example, but an example is {describe(sample)}",
            "give each example as a vector, [1] if it is a single number",
        )
    return sample.numel()


def image_size(name: str, sample: Tensor, smallest: int) -> tuple[int, int, int]:
    """C, H, W of a float image whose sides are at least ``smallest`` pixels."""
    if sample.ndim != 3 or not sample.is_floating_point():
        raise InputError(
            "model.name",
            name,
            f"needs float images [channels, height, width], but an example is {describe(sample)}",
            "give the data as such images, or use logistic or mlp for float vectors",
        )
    channels, height, width = sample.shape
    if channels < 1 or min(height, width) < smallest:
        raise InputError(
            "model.name",
            name,
            f"needs a channel and {smallest}x{smallest} pixels or more, but an example is {describe(sample)}",
            "use larger images, or mlp",
        )
    return channels, height, width
