"""Multinomial logistic regression and the multi-layer perceptron."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from hansa.core.models.base import MOST, ModelSpec, SplitModel, vector_size

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
_NORMS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class LogisticConfig(ModelSpec):
    """Multinomial logistic regression; with a squared loss, linear regression.

    Convex, so theory applies to it. It has no extractor and therefore no ``head``.
    """

    name: Literal["logistic"] = "logistic"

    def assemble(self, sample: Tensor, outputs: int) -> nn.Module:
        """Flatten and one linear layer: x -> [B, outputs]."""
        linear = nn.Linear(vector_size(self.name, sample), outputs)
        return nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=linear))


class MLPConfig(ModelSpec):
    """Multi-layer perceptron on the flattened example.

    With ``norm = "batch"`` a training batch needs at least two examples.
    """

    name: Literal["mlp"] = "mlp"
    hidden: tuple[Annotated[int, Field(ge=1, le=MOST)], ...] = Field(
        default=(64,),
        min_length=1,
        max_length=1000,
        description="Width of each hidden layer; the last feeds the head.",
    )
    activation: Literal["relu", "tanh", "gelu"] = Field(
        default="relu", description="Non-linearity after each hidden layer."
    )
    norm: Literal["none", "batch", "layer"] = Field(
        default="none", description="Normalisation between a hidden layer and its non-linearity."
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Probability that a hidden unit is zeroed in training."
    )

    def assemble(self, sample: Tensor, outputs: int) -> nn.Module:
        """Hidden layers and head: x -> [B, outputs]."""
        layers: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
        inputs = vector_size(self.name, sample)
        for i, width in enumerate(self.hidden, start=1):
            layers[f"linear{i}"] = nn.Linear(inputs, width)
            if self.norm != "none":
                layers[f"norm{i}"] = _NORMS[self.norm](width)
            layers[f"activation{i}"] = _ACTIVATIONS[self.activation]()
            if self.dropout:
                layers[f"dropout{i}"] = nn.Dropout(self.dropout)
            inputs = width
        return SplitModel(nn.Sequential(layers), inputs, outputs)
