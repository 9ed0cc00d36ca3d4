"""Small images as arrays of numbers, and numbers as images again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hfshrink.errors import SettingError
from hfshrink.selection.contents import IMAGE_COLUMNS
from hfshrink.selection.random_networks import LEAST_SIDE

if TYPE_CHECKING:
    from datasets import Dataset

MOST_SIDE = 64  # pixels: of larger images the learning takes hours on a processor
MOST_CHANNELS = 4
BLOCK = 256  # rows read at once
GREY, COLOUR = ("L", "1"), ("RGB", "RGBA", "RGBX", "P", "PA", "LA", "La", "RGBa", "CMYK", "YCbCr", "HSV", "LAB")
CURE = "Resize the images (such as to 28 × 28), or pass model= for the nearest real images to learned embeddings."


@dataclass(frozen=True, eq=False)
class Images:
    """The images of some rows, channels first.

    Attributes:
        column: Their column.
        feature: Its feature, as the data set has it.
        pixels: (n, channels, height, width) float32 as stored: 0..255 of image files.
        form: "image" of files, else where an array has its channels: "first", "last" or "none".
        mean: (channels, 1, 1) of all pixels.
        deviation: The same of their standard deviation.
    """

    column: str
    feature: Any
    pixels: NDArray[np.float32]
    form: str
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]

    @property
    def bounds(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(channels, 1, 1) smallest and largest value of a normalized pixel: of files 0 and 255, else of the data."""
        low, high = (part(axis=(0, 2, 3))[:, None, None] for part in (self.pixels.min, self.pixels.max))
        if self.form == "image":
            low, high = np.zeros_like(low), np.full_like(high, 255)
        return (low - self.mean) / self.deviation, (high - self.mean) / self.deviation

    def normalized(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """(m, channels, height, width) pixels with mean 0 and deviation 1 in each channel."""
        found: NDArray[np.float32] = (self.pixels[positions] - self.mean) / self.deviation
        return found

    def values(self, normalized: NDArray[np.float32]) -> list[Any]:
        """Images of these numbers, as the column holds them."""
        from PIL import Image

        pixels = normalized * self.deviation + self.mean
        if self.form == "image":
            whole = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
            return [Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)) for image in whole]
        if np.dtype(self.feature_dtype).kind in "biu":
            pixels = np.rint(pixels).astype(self.feature_dtype)
        arrays = {"first": pixels, "last": pixels.transpose(0, 2, 3, 1), "none": pixels[:, 0]}[self.form]
        return arrays.tolist()

    @property
    def feature_dtype(self) -> str:
        """Numpy's name of what the column's arrays hold."""
        inner = self.feature
        while getattr(inner, "feature", None) is not None:
            inner = inner.feature
        return str(inner.dtype)


def find_image_column(rows: Dataset) -> str | None:
    """The column of images: files, or arrays under a usual name; None without."""
    import datasets

    files = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    arrays = [name for name in (*IMAGE_COLUMNS, "pixel_values") if name in rows.column_names]
    return next(iter((*files, *arrays)), None)


def read_images(rows: Dataset, column: str) -> Images:
    """The images of a data set, all of one shape.

    Args:
        rows: The data set.
        column: Of image files, or of arrays (height, width), (channels, height, width) or (height, width, channels).

    Raises:
        SettingError: No arrays of numbers, different shapes, too large or too small, more than 8 bits, None, NaN.
    """
    import datasets

    feature: Any = rows.features[column]
    plain = rows.select_columns([column]).with_format(None)
    is_file = isinstance(feature, datasets.Image)
    plain = plain.cast_column(column, datasets.Image()) if is_file else plain  # a column may be left undecoded
    blocks, shape, is_grey = [], None, is_file
    for start in range(0, len(plain), BLOCK):
        values = plain[start : start + BLOCK][column]
        if is_file:
            is_grey = is_grey and all(image is not None and image.mode in GREY for image in values)
            values = [_converted(image, start + row) for row, image in enumerate(values)]
        arrays = [_array(value, start + row) for row, value in enumerate(values)]
        shape = shape or arrays[0].shape
        _check_shapes(arrays, shape, start)
        blocks.append(np.stack(arrays))
    stacked = np.concatenate(blocks)
    stacked = stacked[..., 0] if is_grey else stacked
    form = "image" if is_file else _form(stacked.shape[1:])
    if stacked.ndim == 3:
        stacked = stacked[:, None]
    elif is_file or form == "last":
        stacked = stacked.transpose(0, 3, 1, 2)
    pixels = np.ascontiguousarray(stacked, dtype=np.float32)
    if not np.isfinite(pixels).all():
        row = int(np.flatnonzero(~np.isfinite(pixels).all(axis=(1, 2, 3)))[0])
        raise SettingError(f"Image {row} in {column!r} holds NaN or infinity. Leave it out.")
    return Images(column, feature, pixels, form, *_mean_and_deviation(pixels))


def _mean_and_deviation(pixels: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(channels, 1, 1) each; the deviation of a channel that never changes is 1. No second copy of the pixels."""
    count = pixels[:, 0].size
    mean = pixels.sum(axis=(0, 2, 3), dtype=np.float64) / count
    squares = sum(((image - mean[:, None, None]) ** 2).sum(axis=(1, 2)) for image in pixels)
    deviation = np.sqrt(squares / count)
    deviation[deviation < 1e-6 * np.abs(mean)] = 1  # rounding
    deviation[deviation == 0] = 1
    return mean[:, None, None].astype(np.float32), deviation[:, None, None].astype(np.float32)


def _converted(image: Any, row: int) -> Any:
    """An image of a file in RGB; a grey one has three equal channels."""
    if image is None:
        raise SettingError(f"Image {row} is None. Filter such rows out first.")
    if image.mode not in (*GREY, *COLOUR):
        raise SettingError(
            f"Image {row} has more than 8 bits a pixel (mode {image.mode!r}). Give such images as arrays of numbers, "
            "datasets.Array2D."
        )
    return image.convert("RGB")


def _array(value: Any, row: int) -> NDArray[Any]:
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf":
        raise SettingError(
            f"Image {row} must be an image or an array (height, width) or (channels, height, width) of numbers, got "
            f"{array.dtype} of shape {array.shape}."
        )
    return array.astype(np.float32) if array.dtype.kind in "bf" else array


def _check_shapes(arrays: list[NDArray[Any]], shape: tuple[int, ...], start: int) -> None:
    wrong = next((row for row, array in enumerate(arrays) if array.shape != shape), None)
    if wrong is not None:
        raise SettingError(
            f"Images must have one shape to be learned: image 0 has {shape}, image {start + wrong} "
            f"{arrays[wrong].shape}. {CURE}"
        )
    sides = sorted(shape)[-2:]
    if sides[1] > MOST_SIDE:
        raise SettingError(f"Images of at most {MOST_SIDE} × {MOST_SIDE} pixels can be learned, got {shape}. {CURE}")
    if sides[0] < LEAST_SIDE or (len(shape) == 3 and min(shape) > MOST_CHANNELS):
        raise SettingError(
            f"Images must have 1 to {MOST_CHANNELS} channels and sides of at least {LEAST_SIDE} pixels, got {shape}. "
            "Pass embeddings= for rows of other kinds."
        )


def _form(shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return "none"
    return "first" if shape[0] <= MOST_CHANNELS and shape[0] <= shape[2] else "last"
