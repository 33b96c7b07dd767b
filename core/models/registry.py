"""From a recipe's ``[model]`` table to a module."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from hansa.core.errors import InputError
from hansa.core.models.cnn import DigitsCNNConfig, LeafCNNConfig
from hansa.core.models.linear import LogisticConfig, MLPConfig
from hansa.core.models.resnet import ResNet18Config
from hansa.core.models.transformer import CharTransformerConfig
from hansa.core.randomness import ALONE, torch_generator
from hansa.core.trees import nbytes

ModelConfig: TypeAlias = Annotated[
    LogisticConfig | MLPConfig | LeafCNNConfig | DigitsCNNConfig | ResNet18Config | CharTransformerConfig,
    Field(discriminator="name"),
]


def build(
    config: ModelConfig, *, sample: Tensor, outputs: int, seed: int, largest: int | None = None
) -> nn.Module:
    """Build the configured model on the CPU, in training mode, with parameters named by the seed.

    The same seed gives the same parameters bit for bit; torch's global generators are left as they were.

    Parameters
    ----------
    config:
        Which model, and its options.
    sample:
        One example x without a batch axis: a float tensor of any shape for ``logistic`` and ``mlp``, an
        image [C, H, W] for the CNNs, int64 tokens [T] for ``char_transformer``.
    outputs:
        Classes, vocabulary size, or regression targets.
    seed:
        The run's seed.
    largest:
        Bytes of parameters, as float32, beyond which a model is refused before any memory is taken.

    Raises
    ------
    InputError
        The model cannot take such examples, or is too large, or ``outputs`` is not positive.
    """
    if outputs < 1:
        raise InputError("outputs", outputs, "a model needs at least one output", "set it to 1 or more")
    # Only the CPU generator is seeded and restored; torch.manual_seed would touch every device's.
    with ALONE, torch.random.fork_rng(devices=()), torch.device("cpu"):
        if largest is not None:
            with torch.device("meta"):  # shapes alone
                size = nbytes(config.assemble(sample, outputs).state_dict())
            if size > largest:
                raise InputError(
                    "model.name",
                    config.name,
                    f"it has {size:.3g} bytes, more than {largest}",
                    "make it smaller",
                )
        torch.default_generator.manual_seed(torch_generator(seed, "model").initial_seed())
        return config.assemble(sample, outputs)
