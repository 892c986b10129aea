"""One image file as pixels: BreaKHis's brought to one field of view, images of another source cut to its shape."""

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps
from tqdm import tqdm

from lib import data

FIELD_OF_VIEW = (700, 460)  # width and height in pixels of an image as published
FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # by content; others, such as EPS, would start other programs
MODES = ("RGB", "RGBA", "P")  # P: RGB colors by their number in a list


def decode(path, image_size, page=""):
    """One image as uint8 (image_size, width, 3), width keeping the published 700 x 460 field of view.

    Some copies of BreaKHis hold it squeezed to another shape; resizing to one shape undoes that. Images of another source, which
    are those with another kind of name, are cut to that shape (`fit`). page: of a file of several, counted from 1, as a number or text.
    Raises ValueError, naming the file, where it cannot be read or not be meant (`read_rgb`).
    """
    if data.FILE_NAME.fullmatch(Path(path).name) is None:
        return fit(path, image_size, path, page)
    size = (field_width(image_size), image_size)
    return np.asarray(read_rgb(path, path, page)[0].resize(size, Image.Resampling.LANCZOS))


def fit(file, image_size, name, page=""):
    """An image of another source as uint8 (image_size, width, 3), cut to BreaKHis's shape, 700 x 460, around its center.

    file: a path, or an open file. Raises ValueError, saying `name`, where it cannot be read (`read_rgb`), or is too small.
    """
    width = field_width(image_size)
    image, _ = read_rgb(file, name, page)
    if image.width < width or image.height < image_size:
        raise ValueError(
            f"{name} is {image.width} x {image.height} pixels: at least {width} x {image_size} are needed."
        )
    return np.asarray(ImageOps.fit(image, (width, image_size), Image.Resampling.LANCZOS))


def read_rgb(file, name, page=""):
    """A file's picture as it is meant to be seen, an RGB image of PIL, and whether it was laid on white.

    It is turned as its EXIF data say, and what is transparent in it becomes white. Raises ValueError, saying `name`, where the file
    is damaged or of none of `FORMATS`, a whole slide, not RGB, holds more than 8 bits a channel or several pages of which none is
    named, or shows nothing.
    """
    page = int(page) if page else None
    try:
        with Image.open(file, formats=FORMATS) as image:
            pages = getattr(image, "n_frames", 1)
            if page and page <= pages > 1:
                image.seek(page - 1)
            bits, preview = _bits(image), _is_preview(image)
            image.load()
            image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is a whole slide ({error}): cut fields of view from it first.") from error
    except Exception as error:  # what Pillow raises for a damaged file is not said anywhere
        raise ValueError(
            f"{name} is not a readable image: {error}. Files of {', '.join(FORMATS)} with 8 bits a channel are read: replace or convert it."
        ) from error
    if page and page > pages:
        raise ValueError(f"{name} has {pages} pages, no page {page}: name one of them.")
    if pages > 1 and not page:
        raise ValueError(
            f"{name} holds {pages} pages or pictures: save the one that is meant as a file of its own, or name it in a column page of "
            f"{data.LIST} (1 is the first)."
        )
    if preview and not page:
        raise ValueError(
            f"{name} holds only a small preview where its picture should be: save the picture itself, or name page 1 in a column page of "
            f"{data.LIST} if that is what is meant."
        )
    if image.mode not in MODES:
        raise ValueError(f"{name} is not an RGB image (its mode is {image.mode}): convert it first.")
    if bits > 8:
        raise ValueError(
            f"{name} holds {bits} bits a channel and does not say how many of them are used: save it with 8 bits a channel, brightest "
            "value 255 (values of a 12-bit camera are divided by 16, say)."
        )
    if not image.has_transparency_data:
        return image.convert("RGB"), False
    image = image.convert("RGBA")
    least, most = image.getchannel("A").getextrema()
    if most == 0:
        raise ValueError(f"{name} is transparent everywhere: save it without transparency.")
    if least == 255:
        return image.convert("RGB"), False
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB"), True


def say_transparent(table):
    """Say which images are transparent in part and therefore laid on white.

    table: with image (a name), path (or an open file) and, where files have several, page.
    """
    laid = []
    for row in table.to_dict("records"):
        with Image.open(row["path"], formats=FORMATS) as image:
            may_be = image.has_transparency_data  # which their first bytes tell
        if may_be and read_rgb(row["path"], row["image"], row.get("page", ""))[1]:
            laid.append(row["image"])
    if laid:
        tqdm.write(
            f"transparent in part, laid on white ({len(laid)}): {', '.join(laid[:5])}{', ...' * (len(laid) > 5)}"
        )


def _bits(image):
    """How many bits a file has for a channel's value: Pillow takes the upper eight of 16, in an image that is not loaded yet."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(ExifTags.Base.BitsPerSample, (8,)))
    return 16 if image.format == "PNG" and "16B" in str(image.tile[0].args) else 8


def _is_preview(image):
    """Whether a page of a TIFF says that it is a smaller version of another picture of the file."""
    return image.format == "TIFF" and bool(image.tag_v2.get(ExifTags.Base.NewSubfileType, 0) & 1)


def field_width(image_size):
    """The width of a whole field of view that is `image_size` pixels high."""
    return round(image_size * FIELD_OF_VIEW[0] / FIELD_OF_VIEW[1])
