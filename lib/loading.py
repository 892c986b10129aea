"""The images of a split as arrays: each decoded once and kept, and one side of one fold for training or testing."""

import hashlib
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from tqdm import tqdm

from lib import data, runs
from lib.decoding import decode, field_width

NAME_LENGTH = 65  # bytes of a line in the pixel cache's list: 64 hexadecimal digits and the end of the line
SMALLEST_IMAGE = 32  # pixels; DenseNet-121 halves the size five times


@dataclass
class Side:
    """One side of one fold.

    table: its rows; pixels: uint8 (n, S, W, 3), in the same order; labels: int64 (n,), 1 malignant; fingerprint: of the images,
    changed ones too; origin: which images of which split they come from, for recipes (`lineage`).
    """

    table: pd.DataFrame
    pixels: object
    labels: np.ndarray
    fingerprint: str
    origin: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.labels)

    def tensors(self):
        """The images for evaluation, float32 (n, 3, S, S) in [0, 1], and int64 labels (n,), as torch tensors."""
        return center_crop(self.pixels[:]), torch.from_numpy(self.labels)


@dataclass(eq=False)
class Images:
    """The images of one split with their pixels: `images.side("train", fold)` for each of `images.folds`."""

    table: pd.DataFrame
    pixels: object

    @property
    def folds(self):
        """The folds' numbers; only 0 where there is one split."""
        return sorted(self.table["fold"].unique().tolist())

    @property
    def image_size(self):
        """The height of the images in pixels."""
        return self.pixels.stored.shape[1]

    def side(self, split, fold=0):
        """The "train", "validation" or "test" images of one fold. Raises ValueError where there is none, or only one class."""
        rows = np.flatnonzero((self.table["split"] == split) & (self.table["fold"] == fold))
        table = self.table.iloc[rows].reset_index(drop=True)
        if table["label"].nunique() < len(data.CLASSES):
            raise ValueError(
                f"The {split} side of fold {fold} holds {len(table)} images of {table['label'].nunique()} classes: "
                "both are needed. Take more images, or another split."
            )
        name = data.fingerprint(table)
        origin = {
            "split_by": table["split_by"].iloc[0],
            "fold": int(fold),
            "split": split,
            "magnifications": sorted(map(int, table["magnification"].unique())),
            "image_size": self.image_size,
            "fingerprint": name,
        }
        pixels = Pixels(self.pixels.stored, self.pixels.rows[rows])
        return Side(table, pixels, data.labels_of(table), name, origin)


def open_images(path, image_size, magnifications=(), split_by=None):
    """The images of a split table (`data.load_split`), of these magnifications and of one of its splits (the first by default).

    Raises ValueError, saying what is there, where that selects nothing.
    """
    whole = table = data.load_split(path)
    table = table[table["split_by"] == (split_by or table["split_by"].iloc[0])]
    if len(magnifications):
        table = table[table["magnification"].isin(magnifications)]
    if table.empty:
        there = whole.groupby("split_by")["magnification"].unique()
        said = "; ".join(f"by {name}: {', '.join(map(str, sorted(at)))}X" for name, at in there.items())
        raise ValueError(
            f"{path} has no split by {split_by} of magnification {list(magnifications)} ({said}): run notebook 01 with the same parameters."
        )
    pixels, table = load_pixels(table, image_size)
    return Images(table, pixels)


def load_pixels(table, image_size, skip_bad_files=False, cache=None):
    """The table's images as memory-mapped uint8 (n, image_size, width, 3), and the table (renumbered).

    Each file is decoded once for each size, ever: `cache` (runs/.cache) holds one growing array a size and, beside it, the
    keys of its rows (`_cache_key`). Unreadable files raise ValueError, all named; with `skip_bad_files` they are left out of both.
    """
    if image_size < SMALLEST_IMAGE or image_size % SMALLEST_IMAGE:
        raise ValueError(
            f"image_size {image_size} does not fit DenseNet-121: use a multiple of {SMALLEST_IMAGE} pixels."
        )
    shape = (image_size, field_width(image_size), 3)
    row_bytes = int(np.prod(shape))
    cache = Path(cache or runs.home() / "runs" / ".cache")
    cache.mkdir(parents=True, exist_ok=True)
    stem = f"{image_size}-{runs.code_hash(decode)}"
    pixels, names = cache / f"{stem}.uint8", cache / f"{stem}.sha256"
    table = table.assign(key=list(map(_cache_key, table["path"], table["sha256"])))
    bad = []
    with FileLock(cache / f"{stem}.lock"):
        text = names.read_text() if names.exists() else ""
        # Pixels that were lost, by a copy cut short say, are decoded anew.
        whole = pixels.stat().st_size // row_bytes if pixels.exists() else 0
        known = text[: len(text) // NAME_LENGTH * NAME_LENGTH].split()[:whole]
        position = {key: row for row, key in enumerate(known)}
        missing = table[~table["key"].isin(position)].drop_duplicates("key")
        if len(missing):
            # Pixels first, then the name: what a killed run half wrote lies past the last name and is overwritten.
            pixels.touch()
            names.touch()
            with (
                runs.writing(pixels),
                open(pixels, "r+b") as stored,
                open(names, "r+") as listed,
                ThreadPool() as pool,
            ):
                stored.seek(len(known) * row_bytes)
                listed.seek(len(known) * NAME_LENGTH)
                listed.truncate()
                pages = missing.get("page", [""] * len(missing))
                decoded = pool.imap(
                    lambda of: decode(of[0], image_size, of[1]), zip(missing["path"], pages, strict=True)
                )
                for key in tqdm(missing["key"], desc=f"decoding at {image_size} px", unit="image"):
                    try:
                        image = next(decoded)
                    except ValueError as error:
                        bad.append((key, str(error)))
                        continue
                    stored.write(image.tobytes())
                    stored.flush()
                    listed.write(key + "\n")
                    listed.flush()
                    position[key] = len(position)
    if bad:
        data.refuse([message for _, message in bad], "unreadable", skip_bad_files)
        table = table[~table["key"].isin({key for key, _ in bad})]
    rows = table["key"].map(position).to_numpy()
    stored = np.memmap(pixels, np.uint8, "r", shape=(len(position), *shape))
    return Pixels(stored, rows), table.drop(columns="key").reset_index(drop=True)


def _cache_key(path, sha256):
    """64 hexadecimal digits for an image's pixels: its content, and whether its name has it cut to shape (`decode`)."""
    if data.FILE_NAME.fullmatch(Path(path).name):
        return sha256
    return hashlib.sha256(f"cut {sha256}".encode()).hexdigest()


class Pixels:
    """Rows of a memory-mapped array, read when they are asked for: pixels[3], pixels[[5, 1]], pixels[:8] are uint8 arrays."""

    def __init__(self, stored, rows):
        self.stored, self.rows = stored, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, which):
        return self.stored[self.rows[which]]


def center_crop(pixels):
    """The central square of uint8 (n, S, W, 3) as float32 torch (n, 3, S, S) in [0, 1]: the one rule for evaluation."""
    size = pixels.shape[1]
    left = (pixels.shape[2] - size) // 2
    square = np.ascontiguousarray(pixels[:, :, left : left + size])
    return torch.from_numpy(square).permute(0, 3, 1, 2).float().div(255)
