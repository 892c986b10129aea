"""Pictures are decoded as they are meant to be seen, or refused with words that say what to do."""

import io
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image, TiffImagePlugin

from lib import decoding

TISSUE = np.random.default_rng(0).integers(120, 240, (100, 160, 3)).astype(np.uint8)


def cut(image):
    """What `fit` makes of an image at 64 pixels, by the plainest means."""
    side = Image.fromarray(np.asarray(image))
    width = decoding.field_width(64)
    scale = min(side.width / width, side.height / 64)
    left, top = (side.width - width * scale) / 2, (side.height - 64 * scale) / 2
    box = (left, top, left + width * scale, top + 64 * scale)
    return np.asarray(side.resize((width, 64), Image.Resampling.LANCZOS, box=box)).astype(int)


def same(pixels, image):
    return np.abs(pixels.astype(int) - cut(image)).max() <= 1


def png_16(pixels, kind=2):
    """A PNG with 16 bits a channel, which Pillow does not write. kind: 2 RGB, 6 RGBA."""

    def chunk(name, content):
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff_16(pixels):
    """An RGB TIFF with 16 bits a channel, in one strip."""
    high, wide, _ = pixels.shape
    content = pixels.astype("<u2").tobytes()
    after = 8 + len(content)
    tags = [
        (256, 3, 1, wide),
        (257, 3, 1, high),
        (258, 3, 3, after),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, 8),
    ]
    tags += [(277, 3, 1, 3), (278, 3, 1, high), (279, 4, 1, len(content))]
    listed = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return (
        struct.pack("<2sHI", b"II", 42, after + 6)
        + content
        + struct.pack("<HHH", 16, 16, 16)
        + struct.pack("<H", len(tags))
        + listed
        + struct.pack("<I", 0)
    )


def test_an_ordinary_image_is_only_cut_and_resized(tmp_path):
    for name in ("a.png", "a.tif", "a.bmp"):
        Image.fromarray(TISSUE).save(tmp_path / name)
        assert same(decoding.decode(tmp_path / name, 64), TISSUE)


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.tif", "SOB_B_A-14-1-40-001.png"])
def test_an_upright_photo_is_turned_as_its_exif_says(tmp_path, name):
    upright = np.concatenate([np.full((80, 160, 3), 200, np.uint8), np.full((80, 160, 3), 60, np.uint8)])
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side: to be turned a quarter clockwise
    Image.fromarray(np.rot90(upright)).save(tmp_path / name, exif=exif, quality=95)
    Image.fromarray(upright).save(tmp_path / "plain.png")
    plain = tmp_path / ("SOB_B_A-14-1-40-002.png" if name.startswith("SOB") else "plain.png")
    Image.fromarray(upright).save(plain)
    turned, expected = (decoding.decode(path, 64).astype(int) for path in (tmp_path / name, plain))
    assert np.abs(turned - expected).max() <= 3
    assert turned[:20].mean() > 190 and turned[-20:].mean() < 70


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("RGBA", "mask.tif"),
        *((mode, name) for mode in ("RGBA", "P", "RGB") for name in ("mask.png", "SOB_B_A-14-1-40-001.png")),
    ],
)
def test_what_is_transparent_becomes_white_and_is_said(tmp_path, capsys, mode, name):
    """By an alpha channel, by a color of a palette, or by one color that counts as transparent."""
    hidden = np.full((92, 140, 3), (200, 60, 120), np.uint8)
    hidden[:, :70] = (10, 200, 30)  # seen by nobody
    path, options = tmp_path / name, {}
    if mode == "RGBA":
        image = Image.fromarray(
            np.dstack([hidden, np.where(np.arange(140) < 70, 0, 255) * np.ones((92, 1))]).astype(np.uint8)
        )
    elif mode == "RGB":
        image, options = Image.fromarray(hidden), {"transparency": (10, 200, 30)}
    else:
        image = Image.fromarray(hidden).quantize(2)
        options = {"transparency": image.getpixel((0, 0))}
    image.save(path, **options)
    pixels = decoding.decode(path, 64)
    assert (pixels[:, :40] == 255).all() and np.abs(pixels[:, -40:].astype(int) - (200, 60, 120)).max() <= 1
    plain = tmp_path / "plain.png"
    Image.fromarray(hidden).convert("RGBA").save(plain)  # an alpha channel that hides nothing
    assert same(decoding.decode(plain, 64), hidden)
    decoding.say_transparent(pd.DataFrame({"image": [name, "plain.png"], "path": [path, plain]}))
    assert capsys.readouterr().out == f"transparent in part, laid on white (1): {name}\n"


def test_an_image_that_shows_nothing_is_refused():
    image, file = Image.fromarray(TISSUE).convert("RGBA"), io.BytesIO()
    image.putalpha(0)
    image.save(file, "png")
    with pytest.raises(ValueError, match=r"mask\.png is transparent everywhere: save it without"):
        decoding.fit(file, 64, "mask.png")


@pytest.mark.parametrize("name", ["deep.png", "SOB_B_A-14-1-40-001.png"])
@pytest.mark.parametrize("write", [png_16, tiff_16, lambda a: png_16(np.dstack([a, a[..., :1]]), 6)])
def test_twelve_bits_in_sixteen_do_not_become_almost_black(tmp_path, name, write):
    path = tmp_path / name
    path.write_bytes(write(TISSUE.astype(np.uint16) * 16))
    with pytest.raises(
        ValueError, match=r"holds 16 bits a channel and does not say.*: save it with 8 bits a channel"
    ):
        decoding.decode(path, 64)


@pytest.mark.parametrize(
    ("format", "name"), [("TIFF", "pages.tif"), ("MPO", "phone.jpg"), ("TIFF", "SOB_B_A-14-1-40-001.png")]
)
def test_several_pages_are_refused_unless_one_is_named(tmp_path, format, name):
    path = tmp_path / name
    label, picture = Image.new("RGB", (160, 100), "black"), Image.fromarray(TISSUE // 16 * 16)
    label.save(path, format, save_all=True, append_images=[picture])
    with pytest.raises(
        ValueError, match=r"holds 2 pages or pictures: .* name it in a column page of images\.csv"
    ):
        decoding.decode(path, 64)
    assert decoding.decode(path, 64, page="1").max() <= 10
    assert decoding.decode(path, 64, page="2").mean() > 100
    with pytest.raises(ValueError, match="has 2 pages, no page 3"):
        decoding.decode(path, 64, page="3")


def test_a_preview_is_not_taken_for_the_picture(tmp_path):
    """As in camera files that hold the picture itself where only their own programs look for it."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[254] = 1
    Image.fromarray(TISSUE).save(tmp_path / "camera.tif", tiffinfo=tags)
    with pytest.raises(ValueError, match="holds only a small preview where its picture should be"):
        decoding.decode(tmp_path / "camera.tif", 64)
    assert same(decoding.decode(tmp_path / "camera.tif", 64, page=1), TISSUE)


@pytest.mark.parametrize("name", ["tile.png", "SOB_B_A-14-1-40-001.png"])
def test_other_formats_are_not_opened_whatever_their_name_says(tmp_path, monkeypatch, name):
    """A PostScript file would start Ghostscript."""
    started = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: started.append(1))
    for format in ("EPS", "GIF", "WEBP"):
        Image.fromarray(TISSUE).save(tmp_path / name, format)
        with pytest.raises(
            ValueError, match=r"not a readable image: .*Files of PNG, JPEG, TIFF, BMP with 8 bits"
        ):
            decoding.decode(tmp_path / name, 64)
    assert not started


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_in_words():
    """Cut short, or with bytes turned over anywhere: pixels or a ValueError, nothing else."""
    rng, failed = np.random.default_rng(0), 0
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("PNG", "JPEG", "TIFF", "BMP", "MPO"):
        whole = io.BytesIO()
        Image.fromarray(TISSUE).save(whole, format, exif=exif)
        whole = np.frombuffer(whole.getvalue(), np.uint8)
        for _ in range(60):
            damaged = whole[: rng.integers(1, len(whole))] if rng.random() < 0.3 else whole.copy()
            if len(damaged) == len(whole):
                damaged[rng.integers(0, min(400, len(whole)), 4)] = rng.integers(0, 256, 4)
            try:
                decoding.fit(io.BytesIO(damaged.tobytes()), 32, "scan")
            except ValueError as error:
                failed += 1
                assert str(error).startswith("scan ")
    assert failed > 50


def test_an_image_of_another_source_must_show_enough_and_be_rgb(tmp_path, monkeypatch):
    path = tmp_path / "tile.png"
    Image.new("RGB", (50, 50)).save(path)
    with pytest.raises(ValueError, match=r"tile\.png is 50 x 50 pixels: at least 97 x 64 are needed"):
        decoding.decode(path, 64)
    Image.new("I;16", (400, 400)).save(path)
    with pytest.raises(ValueError, match=r"tile\.png is not an RGB image \(its mode is I;16\): convert it"):
        decoding.decode(path, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"tile\.png is a whole slide .*: cut fields of view from it first"):
        decoding.decode(path, 64)
