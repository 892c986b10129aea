"""Synthetic tissue: a seeded tree of H&E-like images under the names and sizes of BreaKHis, so that the study runs anywhere.

`draw_tree` writes the tree and `draw_image` one image; below them stand layout (where nuclei lie), drawing and color.
The images are drawn, not photographed: whatever is measured on them says nothing about medicine.
"""

import json
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from joblib.externals.loky import ProcessPoolExecutor
from PIL import Image, PngImagePlugin
from scipy import ndimage
from tqdm import tqdm

from lib import runs

VERSION = 2  # goes up whenever the same seed yields other pixels
HEIGHT, WIDTH = 460, 700
NOTE = "Drawn tissue, not a photograph: no medical evidence"

# Per subtype: label, folder name, and the shape of its glands or nests in pixels at 100X (radius, elongation).
SUBTYPES = {
    "A": ("benign", "adenosis", 27, 1.2),
    "F": ("benign", "fibroadenoma", 32, 1.7),
    "PT": ("benign", "phyllodes_tumor", 36, 1.9),
    "TA": ("benign", "tubular_adenoma", 25, 1.05),
    "DC": ("malignant", "ductal_carcinoma", 40, 1.3),
    "LC": ("malignant", "lobular_carcinoma", 22, 2.6),
    "MC": ("malignant", "mucinous_carcinoma", 32, 1.4),
    "PC": ("malignant", "papillary_carcinoma", 34, 1.9),
}
LABELS = ("benign", "malignant")
SUFFIXES = ("AB", "", "CD", "G")

# Optical density of hematoxylin and eosin in R, G, B: the reference vectors of Macenko et al. (ISBI 2009).
HEMATOXYLIN = np.array([0.5626, 0.7201, 0.4062])
EOSIN = np.array([0.2159, 0.8012, 0.5581])


def draw_tree(folder, cases=24, images_per_case=8, magnifications=(100, 200), seed=0, workers=None):
    """Draw a BreaKHis-shaped tree into `folder` and return the folder as a Path.

    cases: how many, half of them benign, subtypes in turn; images_per_case: for each magnification;
    workers: processes (default: one a core), which change nothing in the pixels.
    A tree drawn half-way is continued: complete images stay. The marker `DRAWN.json` comes last; where it is there
    with the same settings, images that are missing or do not fit their checksums in `DRAWN.sha256` are drawn again,
    which is said, and the others stay. Raises ValueError on bad settings or a folder that holds anything else,
    OSError when an image cannot be written (no half image is left under a final name).
    """
    folder = Path(folder)
    settings = {
        "seed": int(seed),
        "cases": int(cases),
        "images_per_case": int(images_per_case),
        "magnifications": [int(magnification) for magnification in magnifications],
        "version": VERSION,
    }
    if cases < 2 or images_per_case < 1 or not settings["magnifications"] or seed < 0:
        raise ValueError(
            f"Cannot draw {cases} cases, {images_per_case} images a case, magnifications {list(magnifications)}, "
            f"seed {seed}: at least 2 cases, 1 image, 1 magnification and a seed of 0 or more are needed."
        )
    unknown = set(settings["magnifications"]) - {40, 100, 200, 400}
    if unknown:
        raise ValueError(f"Magnification {sorted(unknown)} is not one of BreaKHis: 40, 100, 200 or 400.")

    folder.mkdir(parents=True, exist_ok=True)
    with runs.locked(folder.parent / f".{folder.name}.lock"):
        finished = _check_marker(folder, settings)
        noted = _checksums(folder) if finished else {}
        every = list(_jobs(folder, settings))
        with ThreadPool() as pool:
            whole = pool.starmap(_is_whole, [(job[0], noted.get(_name(job[0], folder))) for job in every])
        jobs = [job for job, good in zip(every, whole, strict=True) if not good]
        if finished and noted and not jobs:
            return folder
        if finished and jobs:
            tqdm.write(
                f"{len(jobs)} images of the synthetic tissue {folder.name} are missing or damaged "
                f"(the first: {jobs[0][0].name}): drawing them again"
            )
        if not finished:
            runs.write_json(folder / "DRAWING.json", {"drawn": False, **settings})
        _draw_files(jobs, workers)
        _write_checksums(folder, [job[0] for job in every])
        if not finished:
            runs.write_json(folder / "DRAWN.json", {"drawn": True, **settings})
            (folder / "DRAWING.json").unlink()
    return folder


def mend(paths):
    """Draw again what is damaged in the finished trees that hold these files; nothing where they lie in none."""
    folders = {above for path in paths for above in Path(path).parents if (above / "DRAWN.json").is_file()}
    for folder in folders:
        marker = runs.read_json(folder / "DRAWN.json")
        settings = ("seed", "cases", "images_per_case", "magnifications")
        draw_tree(folder, **{name: marker[name] for name in settings if name in marker})


def is_drawn(paths):
    """Whether these files lie in a tree made by `draw_tree` (finished or not). Raises ValueError where only some do."""
    found = {
        any(
            (above / name).is_file()
            for above in (place, *place.parents)
            for name in ("DRAWN.json", "DRAWING.json")
        ): place
        for place in {Path(path).resolve().parent for path in paths}
    }
    if len(found) > 1:
        raise ValueError(
            f"Drawn tissue ({found[True]}) and real images ({found[False]}) lie in one data folder: keep them apart."
        )
    return True in found


def draw_image(label, subtype, case_seed, magnification, rng):
    """Draw one field of tissue: uint8 (460, 700, 3), RGB.

    label: "benign" or "malignant"; subtype: a key of SUBTYPES of that label; case_seed: int or ints, from which all
    that the images of a case share is drawn (stain, thickness, grade); magnification: 100 draws nuclei about ten
    pixels wide, 200 the same tissue at twice the scale; rng: numpy Generator of this image.
    Color follows Beer-Lambert: both stains add up in optical density. Stain, stained area and white area are drawn
    from the same distributions for both labels; what tells them apart is how nuclei look and lie.
    """
    if subtype not in SUBTYPES or SUBTYPES[subtype][0] != label:
        raise ValueError(f"No subtype {subtype!r} among the {label} ones: {', '.join(_subtypes_of(label))}.")
    case = _case_traits(label, np.random.default_rng(case_seed))
    scale = magnification / 100
    # The classes overlap on purpose: about one field in fifty could be either (florid hyperplasia, or a carcinoma
    # that still forms glands), so that no classifier is always right.
    between = rng.random() < 0.02
    grade = rng.uniform(0.3, 0.7) if between else np.clip(case["grade"] + rng.normal(0, 0.06), 0, 1)
    nuclear_area = float(np.clip(case["nuclear_area"] + rng.normal(0, 0.015), 0.15, 0.35))
    white_area = float(np.clip(case["white_area"] + rng.normal(0, 0.02), 0.02, 0.2))

    nuclei, shapes = _layout(subtype, grade, case["nucleus"], nuclear_area, scale, rng)
    epithelium, lumen, secretion = _draw_shapes(shapes, white_area, scale)
    hematoxylin = _draw_nuclei(nuclei, scale, rng)
    return _stain(hematoxylin, epithelium, lumen, secretion, white_area, case, scale, rng)


def _subtypes_of(label):
    return [code for code, (its_label, *_) in SUBTYPES.items() if its_label == label]


def _case_traits(label, rng):
    """What the images of a case share. Only the grade depends on the label."""
    stain = {
        "hematoxylin": HEMATOXYLIN + rng.normal(0, 0.025, 3),
        "eosin": EOSIN + rng.normal(0, 0.025, 3),
        "hematoxylin_gain": float(np.exp(rng.normal(0, 0.08))),
        "eosin_gain": float(np.exp(rng.normal(0, 0.10))),
        "white": np.clip(rng.normal(0.94, 0.02) + rng.normal(0, 0.012, 3), 0.85, 1),
        "nuclear_area": rng.normal(0.24, 0.02),
        "white_area": rng.normal(0.09, 0.015),
        "nucleus": float(np.exp(rng.normal(0, 0.06))),
        "focus": rng.uniform(0.4, 1.0),
    }
    mean, spread = {"benign": (0.15, 0.10), "malignant": (0.83, 0.11)}[label]
    return {**stain, "grade": float(np.clip(rng.normal(mean, spread), 0, 1))}


def _layout(subtype, grade, nucleus, nuclear_area, scale, rng):
    """Where glands, nests and nuclei lie, in pixels at 100X.

    Structures are placed until their nuclei cover `nuclear_area` of the field, so both labels are equally blue.
    Returns nuclei (n, 7): x, y, long and short radius, angle, darkness, irregularity; and shapes (m, 8):
    x, y, radius, elongation, angle, irregularity, lumen (share of the radius; 0: solid), phase.
    """
    radius, elongation = SUBTYPES[subtype][2:]
    radius *= np.exp(rng.normal(0, 0.12))
    width, height = WIDTH / scale, HEIGHT / scale
    size = nucleus * (4.2 + 3.2 * grade)  # mean nuclear radius
    wanted = nuclear_area * width * height
    solid_share = 1 / (1 + np.exp(-(grade - 0.5) / 0.08))  # glands are lost with grade
    florid = rng.random() < 0.2

    pitch = (1.9 + 0.4 * elongation) * radius
    direction = rng.uniform(0, np.pi)
    spots = _jittered_grid(width, height, pitch, 0.10 + 0.35 * grade, rng, margin=radius)
    nuclei, shapes, area = [], [], 0.0
    for x, y in rng.permutation(spots):
        solid = rng.random() < solid_share
        r = radius * np.exp(rng.normal(0, 0.12 + 0.25 * grade))
        stretch = elongation * np.exp(rng.normal(0, 0.08 + 0.15 * grade))
        wobble = 0.04 + 0.22 * grade
        angle, phase = direction + rng.normal(0, 0.25 + 1.5 * grade), rng.uniform(0, 2 * np.pi)
        filled = florid and rng.random() < 0.5
        lumen = 0.0 if solid or filled else float(np.clip(1 - 3.4 * size / r, 0.2, 0.75))
        shape = (x, y, r, stretch, angle, wobble, lumen, phase)
        cells = (
            _solid_nuclei(shape, size, grade, rng)
            if solid or filled
            else _ring_nuclei(shape, size, grade, rng)
        )
        shapes.append(shape)
        nuclei.append(cells)
        inside = (cells[:, 0] > 0) & (cells[:, 0] < width) & (cells[:, 1] > 0) & (cells[:, 1] < height)
        area += float((np.pi * cells[inside, 2] * cells[inside, 3]).sum())
        if area > 0.9 * wanted:
            break

    # Fibroblasts (thin, along the fibers) and lymphocytes (round) make up the rest.
    rest = max(wanted - area, 0.08 * wanted)
    thin = rng.random() < 0.8
    count = int(rest / (np.pi * (7 * 1.8 if thin else 3.4**2)))
    if count:
        across = np.full(count, 1.8 if thin else 3.4) * rng.lognormal(0, 0.12, count)
        along = (7.0 if thin else 3.5) * rng.lognormal(0, 0.15, count)
        place = np.column_stack([rng.uniform(0, width, count), rng.uniform(0, height, count)])
        angle = rng.uniform(0, np.pi) + rng.normal(0, 0.4, count)
        dark = rng.uniform(0.6, 0.9, count)
        nuclei.append(np.column_stack([place, along, across, angle, dark, np.full(count, 0.04)]))
    nuclei = np.concatenate(nuclei)
    return nuclei[~_in_lumen(nuclei[:, :2], shapes)], np.array(shapes)


def _in_lumen(points, shapes):
    """Which points lie in the lumen of any shape: bool (n,)."""
    x, y, r, stretch, angle, wobble, lumen, phase = np.array(shapes).T[:, :, None]
    dx, dy = points[:, 0] - x, points[:, 1] - y
    c, s = np.cos(angle), np.sin(angle)
    along, across = (c * dx + s * dy) / np.sqrt(stretch), (-s * dx + c * dy) * np.sqrt(stretch)
    reach = r * lumen * _outline(np.arctan2(across, along), wobble, phase)
    return (np.hypot(along, across) < reach).any(axis=0)


def _jittered_grid(width, height, pitch, jitter, rng, margin=0.0):
    """Hexagonal grid with random offsets (share of the pitch): array (n, 2) of x, y."""
    rows = np.arange(-margin, height + margin + pitch, pitch * 0.87) - rng.uniform(0, pitch * 0.5)
    columns = np.arange(-margin - pitch, width + margin + pitch, pitch) - rng.uniform(0, pitch * 0.5)
    x, y = np.meshgrid(columns, rows)
    x = x + (np.arange(len(rows)) % 2)[:, None] * pitch / 2
    points = np.column_stack([x.ravel(), y.ravel()])
    return points + rng.normal(0, jitter * pitch, points.shape)


def _outline(theta, wobble, phase):
    """Radius of a closed wavy outline around 1, at angles theta."""
    return 1 + wobble * (
        np.cos(2 * theta + phase)
        + 0.7 * np.cos(3 * theta + 2.3 * phase)
        + 0.5 * np.cos(5 * theta + 4.1 * phase)
    )


def _place(shape, theta, share):
    """Points at `share` of the outline of a shape, and the outward direction there."""
    x, y, r, stretch, angle, wobble, _, phase = shape
    reach = r * share * _outline(theta, wobble, phase)
    u, v = reach * np.cos(theta) * np.sqrt(stretch), reach * np.sin(theta) / np.sqrt(stretch)
    c, s = np.cos(angle), np.sin(angle)
    outward = np.arctan2(np.sin(theta) * np.sqrt(stretch), np.cos(theta) / np.sqrt(stretch)) + angle
    return np.column_stack([x + c * u - s * v, y + s * u + c * v]), outward


def _finish(points, angle, size, grade, rng):
    """Nuclei at points: even at low grade, of all sizes, shapes and shades at high grade."""
    n = len(points)
    mean = size * np.exp(rng.normal(0, 0.06 + 0.26 * grade, n))
    aspect = np.exp(np.abs(rng.normal(0.22, 0.06 + 0.12 * grade, n)) / 2)
    dark = np.clip(rng.normal(0.80, 0.04 + 0.14 * grade, n), 0.4, 1.15)
    return np.column_stack(
        [points, mean * aspect, mean / aspect, angle, dark, np.full(n, 0.02 + 0.12 * grade)]
    )


def _ring_nuclei(shape, size, grade, rng):
    """One row of nuclei along the wall of a gland, upright on it, and flat ones outside."""
    _, _, r, stretch, *_ = shape
    around = 2 * np.pi * r * (np.sqrt(stretch) + 1 / np.sqrt(stretch)) / 2
    rows = []
    for share, spacing, flat in ((1 - 1.9 * size / r, 2.15, False), (1.0, 3.2, True)):
        count = max(int(around * share / (spacing * size)), 5)
        # even steps along the curve: angles at equal arc length
        fine = np.linspace(0, 2 * np.pi, 181)
        curve, _ = _place(shape, fine, share)
        length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(curve, axis=0).T))])
        steps = (np.arange(count) + rng.normal(0, 0.06 + 0.5 * grade, count)) * length[-1] / count
        points, outward = _place(shape, np.interp(steps % length[-1], length, fine), share)
        points += rng.normal(0, size * (0.08 + 0.8 * grade), points.shape)
        cells = _finish(points, outward + rng.normal(0, 0.1 + 1.2 * grade, count), size, grade, rng)
        if flat:
            cells[:, 3] *= 0.5
            cells[:, 4] += np.pi / 2
        rows.append(cells)
    return np.concatenate(rows)


def _solid_nuclei(shape, size, grade, rng):
    """Nuclei all over the inside of a nest (or of a filled duct, evenly, at low grade)."""
    x, y, r, stretch, angle, wobble, _, phase = shape
    reach = r * np.sqrt(stretch) * 1.5
    points = _jittered_grid(2 * reach, 2 * reach, 2.3 * size, 0.08 + 0.28 * grade, rng) - reach
    c, s = np.cos(angle), np.sin(angle)
    u = (c * points[:, 0] + s * points[:, 1]) / np.sqrt(stretch)
    v = (-s * points[:, 0] + c * points[:, 1]) * np.sqrt(stretch)
    points = points[np.hypot(u, v) < (r - 0.5 * size) * _outline(np.arctan2(v, u), wobble, phase)]
    return _finish(points + np.array([x, y]), rng.uniform(0, np.pi, len(points)), size, grade, rng)


def _draw_shapes(shapes, white_area, scale):
    """Soft masks of epithelium, empty lumens and lumens full of secretion, float32 (460, 700) in [0, 1].

    Lumens are empty until they cover `white_area` of the field. Drawn at half size, where the masks are smooth.
    """
    half = np.zeros((3, HEIGHT // 2, WIDTH // 2), np.float32)
    zoom = scale / 2
    for x, y, r, stretch, angle, wobble, lumen, phase in shapes:
        reach = r * np.sqrt(stretch) * 1.5 * zoom
        rows = slice(max(int(y * zoom - reach), 0), max(int(y * zoom + reach), 0))
        columns = slice(max(int(x * zoom - reach), 0), max(int(x * zoom + reach), 0))
        part = half[:, rows, columns]
        if not part.size:
            continue
        v, u = np.ogrid[
            rows.start : rows.start + part.shape[1], columns.start : columns.start + part.shape[2]
        ]
        dx, dy = (u / zoom - x).astype(np.float32), (v / zoom - y).astype(np.float32)
        c, s = np.cos(angle), np.sin(angle)
        along, across = (c * dx + s * dy) / np.sqrt(stretch), (-s * dx + c * dy) * np.sqrt(stretch)
        distance = np.hypot(along, across) / _outline(np.arctan2(across, along), wobble, phase)
        np.maximum(part[0], np.clip((r * 1.12 - distance) / 3, 0, 1), out=part[0])
        if lumen:
            hollow = np.clip((r * lumen - distance) / 2, 0, 1)
            full = half[1].mean() + 0.5 * hollow.sum() / half[1].size > white_area
            np.maximum(part[2 if full else 1], hollow, out=part[2 if full else 1])
    return [_resize(mask) for mask in half]


def _draw_nuclei(nuclei, scale, rng):
    """Hematoxylin of all nuclei, float32 (460, 700): wavy ellipses with a rim, grouped by size so that numpy draws many at once."""
    field = np.zeros((HEIGHT, WIDTH), np.float32)
    x, y, along, across, angle, dark, wobble = (nuclei * np.array([scale] * 4 + [1] * 3)).T.astype(np.float32)
    reach = np.ceil(along * 1.35 + 2).astype(int)
    reach = ((reach + 3) // 4) * 4
    seen = (x > -reach) & (x < WIDTH + reach) & (y > -reach) & (y < HEIGHT + reach)
    phase = rng.uniform(0, 2 * np.pi, len(x)).astype(np.float32)
    pale = rng.uniform(0.0, 0.35, len(x)).astype(
        np.float32
    )  # chromatin drawn to the rim, as in vesicular nuclei
    for size in np.unique(reach[seen]):
        chosen = np.flatnonzero(seen & (reach == size))
        column, row = np.round(x[chosen]).astype(int), np.round(y[chosen]).astype(int)
        span = np.arange(-size, size + 1, dtype=np.float32)
        traits = (along, across, angle, dark, wobble, phase, pale, x - np.round(x), y - np.round(y))
        a, b, turn, shade, wave, start, hollow, right, down = (trait[chosen, None, None] for trait in traits)
        dx, dy = span - right, span[:, None] - down
        c, s = np.cos(turn), np.sin(turn)
        u, v = (c * dx + s * dy) / a, (-s * dx + c * dy) / b
        theta = np.arctan2(v, u)
        distance = np.hypot(u, v) / (1 + wave * (np.cos(2 * theta + start) + np.cos(3 * theta + 2 * start)))
        edge = np.clip((1 - distance) * b + 0.5, 0, 1)
        patches = edge * shade * (1 - hollow * (1 - np.clip(distance, 0, 1) ** 2))
        for patch, r, q in zip(patches, row, column, strict=True):
            top, left = max(r - size, 0), max(q - size, 0)
            part = field[top : max(r + size + 1, 0), left : max(q + size + 1, 0)]
            r0, q0 = top - (r - size), left - (q - size)
            np.maximum(part, patch[r0 : r0 + part.shape[0], q0 : q0 + part.shape[1]], out=part)
    return field


def _stain(nuclei, epithelium, lumen, secretion, white_area, case, scale, rng):
    """From nuclei and masks to RGB: stroma fibers, cytoplasm, white gaps, both stains, focus."""
    coarse, patchy, grain = _noise(60 * scale, rng), _noise(25 * scale, rng), _noise(2.5 * scale, rng)
    angle = rng.uniform(0, np.pi)
    rows, columns = np.ogrid[:HEIGHT, :WIDTH]
    across = ((np.cos(angle) * columns + np.sin(angle) * rows) / scale).astype(np.float32)
    fibers = np.sin(across * (2 * np.pi / 11) + 2.2 * coarse) * (0.6 + 0.4 * patchy)

    # White: where empty lumens are too few, gaps open in the stroma, along its fibers.
    tissue = 1 - lumen
    missing = white_area - float(lumen.mean())
    if missing > 0.002:
        slits = np.sin(across * (2 * np.pi / 34) + 0.9 * coarse + 0.6 * patchy)
        gap = 2.5 * np.maximum(np.maximum(epithelium, secretion), nuclei) - 0.6 * slits - 0.03 * grain
        gap -= _noise(50 * scale, rng) + 0.3 * patchy
        cut = np.quantile(gap[::4, ::4], missing)
        tissue = tissue * np.clip((gap - cut) * 5 * scale + 0.5, 0, 1)

    stroma_eosin = 0.33 + 0.06 * fibers + 0.05 * coarse
    eosin = (1 - epithelium) * stroma_eosin + epithelium * (0.29 + 0.03 * patchy)
    eosin = eosin * (1 - secretion) + 0.3 * secretion
    eosin = (eosin + 0.03 * grain) * tissue
    cytoplasm = (0.04 + 0.16 * epithelium * (1 - secretion)) * tissue
    hematoxylin = np.maximum(nuclei * (1 + 0.14 * grain), cytoplasm)
    hematoxylin *= case["hematoxylin_gain"]
    eosin = np.clip(eosin, 0, None) * (1 - 0.5 * np.clip(nuclei, 0, 1)) * case["eosin_gain"]

    density = hematoxylin[..., None] * case["hematoxylin"] + eosin[..., None] * case["eosin"]
    light = case["white"] * np.exp(-np.log(10) * density.astype(np.float32))
    light *= np.exp(rng.normal(0, 0.03))
    blur = case["focus"] * rng.uniform(0.6, 1.5)
    light = ndimage.gaussian_filter(light, (blur, blur, 0), truncate=3)
    return np.clip(np.round(255 * light), 0, 255).astype(np.uint8)


def _noise(cell, rng):
    """Smooth noise of mean 0 and spread about 1, float32 (460, 700), with features about `cell` pixels wide."""
    coarse = rng.normal(0, 1.25, (int(HEIGHT / cell) + 4, int(WIDTH / cell) + 4)).astype(np.float32)
    return _resize(coarse)


def _resize(values):
    return np.asarray(Image.fromarray(values).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def _jobs(folder, settings):
    """One (path, label, subtype, case seed, magnification, image seed) per image of the tree."""
    top = folder / "BreaKHis_v1" / "histology_slides" / "breast"
    seed = settings["seed"]
    for case in range(settings["cases"]):
        label = LABELS[case % 2]
        codes = _subtypes_of(label)
        code = codes[case // 2 % len(codes)]
        name = SUBTYPES[code][1]
        slide = f"14-{10001 + 37 * case}{SUFFIXES[case // 2 % len(SUFFIXES)]}"
        kind = f"SOB_{label[0].upper()}_{code}"
        for magnification in settings["magnifications"]:
            for number in range(1, settings["images_per_case"] + 1):
                place = top / label / "SOB" / name / f"{kind}_{slide}" / f"{magnification}X"
                path = place / f"{kind}-{slide}-{magnification}-{number:03d}.png"
                yield path, label, code, (seed, case), magnification, (seed, case, magnification, number)


def _draw_file(job):
    path, label, subtype, case_seed, magnification, image_seed = job
    pixels = draw_image(label, subtype, case_seed, magnification, np.random.default_rng(image_seed))
    note = PngImagePlugin.PngInfo()
    note.add_text("Description", NOTE)
    with runs.whole_file(path) as part:
        Image.fromarray(pixels).save(part, format="PNG", compress_level=1, pnginfo=note)


def _draw_files(jobs, workers):
    """Draw the images of these jobs, in so many processes (default: one a core)."""
    show = partial(tqdm, total=len(jobs), desc="drawing tissue", unit="image", mininterval=1)
    if workers == 1 or not jobs:
        for job in show(jobs):
            _draw_file(job)
        return
    # loky's workers do not import the caller's script again, as multiprocessing's do where nothing is forked. Ended
    # here, they leave no semaphores behind when a kernel is killed, and joblib's folder in shared memory is never made.
    with ProcessPoolExecutor(workers) as pool:
        for _ in show(pool.map(_draw_file, jobs)):
            pass


def _checksums(folder):
    """The sha256 of each image of a finished tree, by its path in the folder; {} for a tree that was drawn without."""
    try:
        lines = (folder / "DRAWN.sha256").read_text("utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    return {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}


def _write_checksums(folder, paths):
    """Note the sha256 of each image, as `sha256sum -c` reads them."""
    with ThreadPool() as pool:
        found = pool.map(runs.file_hash, paths)
    lines = [f"{sha256}  {_name(path, folder)}\n" for sha256, path in zip(found, paths, strict=True)]
    runs.write_text(folder / "DRAWN.sha256", "".join(lines))


def _name(path, folder):
    return path.relative_to(folder).as_posix()


def _is_whole(path, sha256):
    """Whether an image is the one that was noted or, where none was, a PNG that fits the checksums within."""
    try:
        if sha256:
            return runs.file_hash(path) == sha256
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()
        return True
    except (OSError, SyntaxError, ValueError):  # PIL raises the second for a broken PNG
        return False


def _check_marker(folder, settings):
    """True where the tree is complete, False where drawing may start or go on; ValueError on anything else."""
    for name in ("DRAWN.json", "DRAWING.json"):
        marker = folder / name
        if marker.is_file():
            try:
                found = json.loads(marker.read_text())
            except ValueError as error:
                raise ValueError(f"{marker} is damaged: delete {folder} to have it drawn again.") from error
            if found != {"drawn": name == "DRAWN.json", **settings}:
                raise ValueError(
                    f"{folder} holds tissue drawn with other settings ({found}), not {settings}. "
                    "Give another folder, or delete this one to have it drawn again."
                )
            return name == "DRAWN.json"
    other = sorted(entry.name for entry in folder.iterdir())
    if other:
        raise ValueError(
            f"{folder} is not empty (it holds {other[0]}) and was not drawn here. Give an empty or new folder."
        )
    return False
