"""What a recipe says about data: its source, and how it is divided among clients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Column = str | int
Transform = Literal["identity", "invert", "rotate", "blur", "noise", "contrast", "affine"]


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Source(_Config):
    test_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of the examples held out as the test set, where none is given.",
    )
    limit: int | None = Field(
        default=None,
        gt=0,
        description="Keep only this many train examples, drawn by the seed, class by class.",
    )
    class_names: tuple[str, ...] | None = Field(
        default=None,
        description="Classes in the order of their numbers, present or not; by default those that occur.",
    )

    @property
    def numbers(self) -> int:
        """How many numbers are made up, where they are."""
        return 0

    FILES: ClassVar[tuple[str, ...]] = ()
    """Fields that name files, folders, or data sets of a hub."""

    def files(self) -> Iterator[tuple[str, str]]:
        """(field, name) of all that would be read from disk, or from a hub."""
        for field in self.FILES:
            found = getattr(self, field)
            for each in (found,) if isinstance(found, str) else found or ():
                yield field, each


class DigitsData(_Source):
    """scikit-learn's bundled handwritten digits: 1,797 images of 8x8, ten classes; no download."""

    source: Literal["digits"] = Field(default="digits", description="The bundled digits.")


class IdxData(_Source):
    """Images and labels in the idx format of MNIST, compressed by gzip or not."""

    FILES = ("train_images", "train_labels", "test_images", "test_labels")
    source: Literal["idx"] = Field(default="idx", description="idx files, as MNIST and its kin come in.")
    train_images: str = Field(description="Path of the images [N, H, W].")
    train_labels: str = Field(description="Path of the labels [N].")
    test_images: str | None = Field(default=None, description="Path of the test images, if there are any.")
    test_labels: str | None = Field(default=None, description="Path of the test labels, if there are any.")

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if (self.test_images is None) != (self.test_labels is None):
            raise ValueError("test_images and test_labels go together: give both or neither")
        return self


class CsvData(_Source):
    """A table in one text file, or in several that have the same columns."""

    FILES = ("path", "test_path")
    source: Literal["csv"] = Field(default="csv", description="A table of numbers in a text file.")
    path: str | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        description="Path of the file. Of several files each is a group, unless `group` names a column."
    )
    test_path: str | tuple[str, ...] | None = Field(
        default=None, description="The same, for the test examples."
    )
    target: Column = Field(
        description="Column to predict: its name, or its position (from 0; -1 is the last)."
    )
    group: Column | None = Field(default=None, description="Column that says where a row comes from.")
    ignore: tuple[Column, ...] = Field(default=(), description="Columns to leave out, such as row ids.")
    categorical: tuple[Column, ...] = Field(
        default=(), description="Columns whose values are names: one 0/1 feature is made for each value."
    )
    task: Literal["classification", "regression"] = Field(
        default="classification", description="Whether the target is a class or a number."
    )
    missing: Literal["error", "mean"] = Field(
        default="error",
        description="Features that are empty, ? or NaN: refuse them, or put the train mean in their place.",
    )
    delimiter: str = Field(default=",", pattern=r'^[^\r\n"]$', description="Character between two fields.")
    has_header: bool = Field(default=True, description="Whether the first line names the columns.")
    feature_names: tuple[str, ...] | None = Field(
        default=None,
        description="Features in their order, COLUMN=VALUE for each value of a categorical column, present "
        "or not; by default those that occur.",
    )


class ImagesData(_Source):
    """A folder of images, a sub-folder for each class."""

    FILES = ("path", "test_path")
    source: Literal["images"] = Field(default="images", description="A folder of image files.")
    path: str = Field(description="Path of the folder.")
    test_path: str | None = Field(default=None, description="Folder of the test images, if there is one.")
    layout: Literal["class", "domain/class"] = Field(
        default="class", description="What the levels of sub-folders mean; a domain becomes the group."
    )
    size: int | None = Field(
        default=None,
        gt=0,
        description="Resize every image to this many pixels a side; without it all must be alike.",
    )
    grayscale: bool = Field(default=False, description="One channel of grey instead of red, green and blue.")


class NpyData(_Source):
    """Arrays in .npy files; whole-number y are classes, floating y regression targets."""

    FILES = ("x", "y", "group", "test_x", "test_y", "test_group")
    source: Literal["npy"] = Field(default="npy", description="NumPy arrays in .npy files.")
    x: str = Field(description="Path of the features [N, ...]; images as [N, C, H, W].")
    y: str = Field(description="Path of the labels [N], or of the floating targets [N] or [N, k].")
    group: str | None = Field(default=None, description="Path of the group of each example [N].")
    test_x: str | None = Field(default=None, description="Path of the test features, if there are any.")
    test_y: str | None = Field(default=None, description="Path of the test labels, if there are any.")
    test_group: str | None = Field(default=None, description="Path of the group of each test example.")
    scale: float = Field(default=1.0, gt=0, description="x is divided by this (255 for bytes).")

    @model_validator(mode="after")
    def _paired(self) -> Self:
        if (self.test_x is None) != (self.test_y is None):
            raise ValueError("test_x and test_y go together: give both or neither")
        if self.test_x is not None and (self.group is None) != (self.test_group is None):
            raise ValueError("group and test_group go together: give both or neither")
        return self


class TextData(_Source):
    """A text, cut into pieces; at every character the next one is to be told."""

    FILES = ("path",)
    source: Literal["text"] = Field(default="text", description="Characters of a text file.")
    path: str = Field(description="Path of the UTF-8 text.")
    length: int = Field(default=80, gt=0, description="Characters in an example.")
    by_speaker: bool = Field(
        default=False,
        description='Group by speaker: the text is a play, speeches headed "NAME:" after a blank line.',
    )


class HuggingFaceData(_Source):
    """A data set read by Hugging Face `datasets`, from its hub or from disk."""

    FILES = ("path",)
    source: Literal["huggingface"] = Field(default="huggingface", description="Hugging Face `datasets`.")
    path: str = Field(
        description="Name on the hub, or path of a folder (saved by `save_to_disk`, or of data files)."
    )
    name: str | None = Field(default=None, description="Configuration of the data set, where it has several.")
    split: str = Field(default="train", description="Split to train on.")
    test_split: str | None = Field(default=None, description="Split to test on, if there is one.")
    image: str | None = Field(default=None, description="Column of images.")
    features: tuple[str, ...] = Field(
        default=(), description="Columns of numbers, instead of an image column."
    )
    label: str = Field(default="label", description="Column to predict.")
    group: str | None = Field(default=None, description="Column that says where an example comes from.")
    task: Literal["classification", "regression"] = Field(
        default="classification", description="Whether the label is a class or a number."
    )
    size: int | None = Field(
        default=None,
        gt=0,
        description="Resize every image to this many pixels a side; without it all must be alike.",
    )
    grayscale: bool = Field(default=False, description="One channel of grey instead of red, green and blue.")

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.image is None) == (not self.features):
            raise ValueError("give either image or features: the columns to learn from")
        return self


class _Synthetic(_Source):
    classes: int = Field(default=4, ge=2, description="Number of classes, each a Gaussian cluster.")
    features: int = Field(default=16, gt=0, description="Number of features.")
    noise: float = Field(
        default=1.0, ge=0, description="Standard deviation within a cluster; the centres have 1."
    )


class SyntheticFeatureShift(_Synthetic):
    """The same clusters in every domain, but each domain rotates, stretches and moves them its own way."""

    source: Literal["synthetic_feature_shift"] = Field(
        default="synthetic_feature_shift", description="Domains that differ in their features."
    )
    domains: int = Field(default=4, gt=0, description="Number of domains; they are the groups.")
    examples: int = Field(default=500, gt=0, description="Examples of each domain.")
    strength: float = Field(
        default=1.0, ge=0, description="How far the domains lie apart; 0 makes them alike."
    )

    @property
    def numbers(self) -> int:
        """Those of the examples, and of what they are drawn from."""
        return (self.domains * self.examples + self.classes + self.features) * self.features


class SyntheticLabelShift(_Synthetic):
    """The same clusters in every group, but each group has its own mixture of classes, Dirichlet(alpha)."""

    source: Literal["synthetic_label_shift"] = Field(
        default="synthetic_label_shift", description="Groups that differ in their classes."
    )
    groups: int = Field(default=4, gt=0, description="Number of groups.")
    examples: int = Field(default=500, gt=0, description="Examples of each group.")
    alpha: float = Field(
        default=0.5, gt=0, le=1e100, description="Concentration: the smaller, the less alike the groups."
    )

    @property
    def numbers(self) -> int:
        """Those of the examples, and of what they are drawn from."""
        return (self.groups * self.examples + self.classes) * self.features + self.groups * self.classes


DataConfig = Annotated[
    DigitsData
    | IdxData
    | CsvData
    | ImagesData
    | NpyData
    | TextData
    | HuggingFaceData
    | SyntheticFeatureShift
    | SyntheticLabelShift,
    Field(discriminator="source"),
]


class _Partition(_Config):
    clients: int = Field(default=10, gt=0, description="Number of clients.")


class IidPartition(_Partition):
    """Shuffle and deal: sizes differ by one at most."""

    kind: Literal["iid"] = Field(default="iid", description="Alike in everything.")


class DirichletPartition(_Partition):
    """Every class is shared out in proportions drawn from a Dirichlet distribution."""

    kind: Literal["dirichlet"] = Field(default="dirichlet", description="Skewed classes and sizes.")
    alpha: float = Field(
        default=0.5, gt=0, le=1e100, description="Concentration: the smaller, the fewer hold a class."
    )
    min_size: int = Field(default=1, gt=0, description="Redraw until every client has this many examples.")


class ClassesPartition(_Partition):
    """Every client has examples of the same number of classes."""

    kind: Literal["classes"] = Field(default="classes", description="A few classes each.")
    classes_per_client: int = Field(default=2, gt=0, description="Number of classes of a client.")


class ShardsPartition(_Partition):
    """Sort by label, cut into equal shards, deal every client some."""

    kind: Literal["shards"] = Field(default="shards", description="Pieces of the examples sorted by label.")
    shards_per_client: int = Field(default=2, gt=0, description="Number of shards of a client.")


class QuantityPartition(_Partition):
    """Classes alike, sizes not."""

    kind: Literal["quantity"] = Field(default="quantity", description="Skewed sizes only.")
    distribution: Literal["lognormal", "powerlaw"] = Field(
        default="lognormal", description="What the sizes are in proportion to."
    )
    sigma: float = Field(
        default=1.0,
        gt=0,
        description="Spread: standard deviation of the logarithm of the sizes. "
        "The power law has the exponent 1 + 1/sigma.",
    )
    min_size: int = Field(
        default=1, gt=0, description="Examples given to every client before the rest is shared."
    )


class NaturalPartition(_Config):
    """The groups the data came with: a client each, or several clients to a group."""

    kind: Literal["natural"] = Field(default="natural", description="By the natural column.")
    clients: int | None = Field(
        default=None,
        gt=0,
        description="Number of clients; without it one for each group, with it no fewer than that.",
    )


class FeatureShiftPartition(_Partition):
    """Clients see the world through their own transform, in training and in test."""

    kind: Literal["feature_shift"] = Field(default="feature_shift", description="Skewed features.")
    alpha: float | None = Field(
        default=None, gt=0, le=1e100, description="Divide by Dirichlet(alpha) over classes; without it iid."
    )
    transforms: tuple[Transform, ...] | None = Field(
        default=None,
        min_length=1,
        description="Transforms dealt to the clients in turn, each client drawing its own parameter. "
        "Without it: for images identity, invert, rotate, blur, noise and contrast, for vectors affine.",
    )


PartitionConfig = Annotated[
    IidPartition
    | DirichletPartition
    | ClassesPartition
    | ShardsPartition
    | QuantityPartition
    | NaturalPartition
    | FeatureShiftPartition,
    Field(discriminator="kind"),
]
