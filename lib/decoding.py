"""One image file as pixels: BreaKHis's brought to one field of view, images of another source cut to its shape."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from lib import data

FIELD_OF_VIEW = (700, 460)  # width and height in pixels of an image as published


def decode(path, image_size):
    """One image as uint8 (image_size, width, 3), width keeping the published 700 x 460 field of view.

    Some copies of BreaKHis hold it squeezed to another shape; resizing to one shape undoes that. Images of another source are cut
    to that shape (`fit`).
    Raises ValueError, naming the file, where it is no image or ends early.
    """
    if data.FILE_NAME.fullmatch(Path(path).name) is None:
        return fit(path, image_size, path)
    size = (field_width(image_size), image_size)
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))
    except (OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
        raise ValueError(f"{path}: not a readable image ({error})") from error


def fit(file, image_size, name):
    """An image of another source as uint8 (image_size, width, 3), cut to BreaKHis's shape, 700 x 460, around its center.

    file: a path, or an open file. Raises ValueError, saying `name`, where it is no image, not RGB, too small, or a whole slide.
    """
    width = field_width(image_size)
    try:
        with Image.open(file) as image:
            image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is a whole slide ({error}): cut fields of view from it first.") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{name} is not a readable image: {error}") from error
    if image.mode not in ("RGB", "RGBA"):
        raise ValueError(f"{name} is not an RGB image (its mode is {image.mode}): convert it first.")
    if image.width < width or image.height < image_size:
        raise ValueError(
            f"{name} is {image.width} x {image.height} pixels: at least {width} x {image_size} are needed."
        )
    return np.asarray(ImageOps.fit(image.convert("RGB"), (width, image_size), Image.Resampling.LANCZOS))


def field_width(image_size):
    """The width of a whole field of view that is `image_size` pixels high."""
    return round(image_size * FIELD_OF_VIEW[0] / FIELD_OF_VIEW[1])
