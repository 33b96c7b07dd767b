"""Images in folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from hansa.core.data.config import ImagesData
from hansa.core.data.raw import Loaded, Raw, encode, resolve
from hansa.core.errors import DataError

_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def pixels(image: Image.Image, size: int | None, *, grayscale: bool) -> npt.NDArray[np.uint8]:
    """``[C, H, W]`` bytes of an image, resized to size x size unless that is None.

    Raises
    ------
    DataError
        If its greys have 32 bits, or are fractions, so that nobody knows which is white.
    """
    # Pillow's own conversion would cut greys off at 255. It reads those of 16 bits in a PGM file as 32.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F") and not np.isin(np.asarray(image), np.arange(256)).all():
        raise DataError(
            "data.path",
            getattr(image, "filename", "") or f"an image of mode {image.mode}",
            "its greys are not from 0 to 255, and which is white is not known",
            "save it with 8 or 16 bits a pixel",
        )
    image = image.convert("L" if grayscale else "RGB")
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    made = np.asarray(image)
    return made[None] if grayscale else made.transpose(2, 0, 1)


def stacked(images: Iterator[tuple[str, npt.NDArray[np.uint8]]], field: str) -> npt.NDArray[np.float32]:
    """``[N, C, H, W]`` in [0, 1] of named images, which must be of one size."""
    made: list[npt.NDArray[np.uint8]] = []
    for name, image in images:
        made.append(image)
        if image.shape != made[0].shape:
            (_, high, wide), (_, first_high, first_wide) = image.shape, made[0].shape
            raise DataError(
                field,
                name,
                f"it is {wide}x{high} pixels, the first {first_wide}x{first_high}",
                "set data.size to bring all to one size",
            )
    return np.divide(made, 255, dtype=np.float32)


def _folders(path: Path) -> list[Path]:
    return sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))


def read(config: ImagesData) -> Loaded:
    """Images ``[N, C, H, W]`` in [0, 1] of a folder, in the order of their paths."""

    def decoded(file: Path, field: str) -> npt.NDArray[np.uint8]:
        try:
            with Image.open(file) as image:
                return pixels(image, config.size, grayscale=config.grayscale)
        # What Pillow raises on damaged files, depending on the format.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                field, str(file), f"the image cannot be read: {error}", "replace or remove the file"
            ) from error

    def read_folder(path: str, field: str) -> Raw:
        folder = resolve(path, field, folder=True)
        nested = config.layout == "domain/class"
        kinds = [kind for domain in (_folders(folder) if nested else [folder]) for kind in _folders(domain)]
        files = [
            file for kind in kinds for file in sorted(kind.iterdir()) if file.suffix.lower() in _SUFFIXES
        ]
        if not files:
            raise DataError(
                field,
                str(folder),
                f"there are no images in its {config.layout} sub-folders",
                "put them there, or set data.layout",
            )
        return Raw(
            x=stacked(((str(file), decoded(file, field)) for file in files), field),
            y=np.array([file.parent.name for file in files]),
            group=np.array([file.parent.parent.name for file in files]) if nested else None,
        )

    test = None if config.test_path is None else read_folder(config.test_path, "data.test_path")
    return encode(read_folder(config.path, "data.path"), test, regression=False)
