"""The images of a split as arrays: each decoded once and kept, and one side of one fold for training or testing."""

import functools
import hashlib
import os
import zlib
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from lib import data, runs
from lib.decoding import decode, field_width

LINE = 74  # bytes of a line in the list of kept pixels (`_line`)
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

    Raises ValueError, saying what is there, where that selects nothing, and where the images or their list are not as notebook 01
    read them; FileNotFoundError for images that are gone, unless their pixels are kept.
    """
    whole = data.load_split(path)
    split_by = split_by or whole["split_by"].iloc[0]
    table = whole[whole["split_by"] == split_by]
    if len(magnifications):
        table = table[table["magnification"].isin(magnifications)]
    if table.empty:
        there = whole.groupby("split_by")["magnification"].unique()
        said = "; ".join(f"by {name}: {', '.join(map(str, sorted(at)))}X" for name, at in there.items())
        raise ValueError(
            f"{path} has no images split by {split_by} at magnification {list(magnifications)} (it has {said}): run notebook 01 with the same parameters."
        )
    _check_list(runs.recipe_of(path))
    _check_sources(table)
    pixels, table = load_pixels(table, image_size)
    return Images(table, pixels)


def source_of(root):
    """What a split hangs on besides the images' bytes: their folder, and the sha256 of the list in it (None without one)."""
    root = Path(root).expanduser().resolve()
    listed = root / data.LIST
    return {"root": str(root), "list": runs.file_hash(listed) if listed.is_file() else None}


def _check_list(source):
    """Raise ValueError where the list of images is not the one that notebook 01 read. source: of `source_of`, or {}."""
    root = source.get("root")
    if root and Path(root).is_dir() and source_of(root)["list"] != source.get("list"):
        raise ValueError(
            f"{Path(root) / data.LIST} changed since notebook 01 read it: run notebook 01 again."
        )


def _check_sources(table):
    """Raise ValueError where an image is not the one that notebook 01 read; one that is gone passes, synthetic tissue is mended."""
    if changed := _changed(table):
        from lib import synthetic  # here, since it is hardly ever needed

        synthetic.mend(changed)
        changed = _changed(table)
    if changed:
        raise ValueError(
            f"{len(changed)} images changed since notebook 01 read them ({', '.join(changed[:3])}"
            f"{', ...' * (len(changed) > 3)}): run notebook 01 again."
        )


def _changed(table):
    """The paths of the images whose bytes are not those that the table was made from; of those that are there."""
    table = table.drop_duplicates(["path", "sha256"])
    with ThreadPool() as pool:
        hashes = pool.imap(_hash_now, table["path"])
        now = list(tqdm(hashes, desc="checking", total=len(table), unit="image", delay=10))
    read = zip(table["path"], table["sha256"], now, table.get("page", [""] * len(table)), strict=True)
    return [path for path, before, now, page in read if now and data.page_hash(now, page) != before]


def _hash_now(path):
    """The sha256 of a file's bytes, read once a process unless the file changes; None where it cannot be read."""
    try:
        state = os.stat(path)
        return _hash(path, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    except OSError:
        return None


@functools.cache
def _hash(path, *state):
    return runs.file_hash(path)


def load_pixels(table, image_size, skip_bad_files=False, cache=None):
    """The table's images as memory-mapped uint8 (n, image_size, width, 3), and the table (renumbered).

    Each file is decoded once for each size, ever: `cache` (runs/.cache) holds one growing array a size and, beside it, a list with
    the key and checksum of each row (`_line`). Rows that do not fit theirs are said, and decoded again.
    Raises FileNotFoundError for images that are gone and not kept, ValueError for unreadable ones, all named; with `skip_bad_files`
    the unreadable are left out of both.
    """
    if image_size < SMALLEST_IMAGE or image_size % SMALLEST_IMAGE:
        raise ValueError(
            f"image_size {image_size} does not fit DenseNet-121: use a multiple of {SMALLEST_IMAGE} pixels."
        )
    shape = (image_size, field_width(image_size), 3)
    cache = Path(cache or runs.home() / "runs" / ".cache")
    cache.mkdir(parents=True, exist_ok=True)
    stem = f"{image_size}-{runs.code_hash(decode, _line)}"
    pixels, rows = cache / f"{stem}.uint8", cache / f"{stem}.rows"
    table = table.assign(key=list(map(_cache_key, table["path"], table["sha256"])))
    bad = []
    with runs.locked(cache / f"{stem}.lock"):
        lines, position = _kept(pixels, rows, shape, table["key"].unique())
        missing = table[~table["key"].isin(position)].drop_duplicates("key")
        gone = [path for path in missing["path"] if not os.path.isfile(path)]
        if gone:
            raise FileNotFoundError(
                f"{len(gone)} images are gone (the first: {gone[0]}), and the kept pixels in {pixels} lack them or are damaged: "
                "put them back, or run notebook 01 on a folder that holds them."
            )
        if len(missing):
            _check_sources(missing)
            # Pixels first, then their line: what a killed run half wrote lies past the last line and is overwritten.
            pixels.touch()
            rows.touch()
            with (
                runs.writing(pixels),
                open(pixels, "r+b") as stored,
                open(rows, "r+b") as listed,
                ThreadPool() as pool,
            ):
                stored.seek(lines * int(np.prod(shape)))
                listed.seek(lines * LINE)
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
                    listed.write(_line(key, image))
                    listed.flush()
                    position[key] = lines
                    lines += 1
    if bad:
        data.refuse([message for _, message in bad], "unreadable", skip_bad_files)
        table = table[~table["key"].isin({key for key, _ in bad})]
    stored = np.memmap(pixels, np.uint8, "r", shape=(lines, *shape))
    pixels = Pixels(stored, table["key"].map(position).to_numpy())
    return pixels, table.drop(columns="key").reset_index(drop=True)


def _kept(pixels, rows, shape, wanted):
    """How many rows are kept, and where the wanted ones lie that are undamaged: {key: row}."""
    text = rows.read_bytes() if rows.exists() else b""
    # Pixels that were lost, by a copy cut short say, are decoded anew.
    whole = pixels.stat().st_size // int(np.prod(shape)) if pixels.exists() else 0
    lines = [text[at : at + LINE] for at in range(0, len(text) // LINE * LINE, LINE)][:whole]
    if not lines:
        return 0, {}
    last = {line[:64]: row for row, line in enumerate(lines)}  # a row made again comes later
    found = {key: last[key.encode()] for key in wanted if key.encode() in last}
    stored = np.memmap(pixels, np.uint8, "r", shape=(len(lines), *shape))
    position = {key: row for key, row in found.items() if lines[row] == _line(key, stored[row])}
    if damaged := len(found) - len(position):
        # Published with the notebook, so without the path of this machine.
        where = f"{pixels.parent.name}/{pixels.name}"
        tqdm.write(f"{damaged} of {len(found)} images in {where} fail their checksums: decoding them again")
    return len(lines), position


def _line(key, pixels):
    """The line of the list for one row: its key, and a checksum (CRC-32) of key and pixels, 74 bytes."""
    key = key.encode()
    return b"%s %08x\n" % (key, zlib.crc32(pixels, zlib.crc32(key)))


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
