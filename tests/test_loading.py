"""The images of a split as arrays: decoded once, kept with checksums, and refused where they are not what notebook 01 read."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib import data, decoding, loading, runs, splits


def test_a_split_that_was_not_made_is_said(drawn, tmp_path):
    splits.by_case(data.index_images(drawn), seed=0).to_csv(tmp_path / "split.csv", index=False)
    for asked in (([200], "case"), ([100], "image")):
        with pytest.raises(ValueError, match=r"\(it has by case: 100X\): run notebook 01"):
            loading.open_images(tmp_path / "split.csv", 32, *asked)


def test_pixels_are_decoded_once(drawn, tmp_path, monkeypatch):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    index = data.index_images(tree)
    cache = tmp_path / "cache"
    first, _ = loading.load_pixels(index.head(5), 32, cache=cache)
    kept = first[:]
    shutil.rmtree(tree)  # decoding anything again would fail
    again, _ = loading.load_pixels(index.head(5).iloc[::-1], 32, cache=cache)
    assert np.array_equal(again[:], kept[::-1])
    assert first[:].shape == (5, 32, 49, 3) and first[2].shape == (32, 49, 3)
    monkeypatch.setattr(loading.runs, "code_hash", lambda *parts: "another rule of decoding")
    with pytest.raises(
        FileNotFoundError, match=r"5 images are gone .*32-.*uint8 lack them or are damaged: put them back"
    ):
        loading.load_pixels(index.head(5), 32, cache=cache)


def test_one_file_under_two_kinds_of_names_is_squeezed_under_one_and_cut_under_the_other(drawn, tmp_path):
    """The cache knows images by content; how they are decoded hangs on the name."""
    (source, *_) = data.index_images(drawn)["path"]
    table = pd.DataFrame({"path": [str(tmp_path / name) for name in (Path(source).name, "tile.png")]})
    with Image.open(source) as image:
        image.crop((0, 0, 460, 460)).save(table["path"][0])
    shutil.copy(table["path"][0], table["path"][1])
    table = table.assign(sha256=runs.file_hash(table["path"][0]))
    pixels, rows = loading.load_pixels(table, 32, cache=tmp_path / "cache")
    for at, path in enumerate(table["path"]):
        assert np.array_equal(pixels[at], decoding.decode(path, 32))
    assert not np.array_equal(pixels[0], pixels[1]) and list(rows) == ["path", "sha256"]


def test_a_half_written_cache_goes_on(drawn, tmp_path):
    index = data.index_images(drawn)
    whole = loading.load_pixels(index, 32, cache=tmp_path / "whole")[0][:]
    loading.load_pixels(index.head(7), 32, cache=tmp_path / "half")
    (pixels,), (names,) = (list((tmp_path / "half").glob(f"32-*.{kind}")) for kind in ("uint8", "rows"))
    with open(pixels, "ab") as pixels, open(names, "a") as names:
        pixels.write(b"killed here")
        names.write("0123")
    assert np.array_equal(loading.load_pixels(index, 32, cache=tmp_path / "half")[0][:], whole)
    os.truncate(pixels.name, 9 * whole[0].size + 5)
    assert np.array_equal(loading.load_pixels(index, 32, cache=tmp_path / "half")[0][:], whole)


def test_a_full_disk_while_decoding_loses_nothing(drawn, tmp_path, full_disk):
    index = data.index_images(drawn)
    whole = loading.load_pixels(index, 32, cache=tmp_path / "whole")[0][:]
    with full_disk(5 * whole[0].size + 100), pytest.raises(OSError, match=r"uint8.*free some space"):
        loading.load_pixels(index, 32, cache=tmp_path / "full")
    assert np.array_equal(loading.load_pixels(index, 32, cache=tmp_path / "full")[0][:], whole)


def test_damaged_images_are_named_and_left_out_only_when_asked(drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    one, two, *_ = sorted(tree.rglob("*.png"))
    one.write_bytes(one.read_bytes()[:5000])
    two.write_text("not an image")
    index = data.index_images(tree)
    with pytest.raises(ValueError, match="2 unreadable") as raised:
        loading.load_pixels(index, 32, cache=tmp_path / "cache")
    assert one.name in str(raised.value) and two.name in str(raised.value)
    pixels, table = loading.load_pixels(index, 32, skip_bad_files=True, cache=tmp_path / "cache")
    assert len(pixels) == len(table) == 18 and one.name not in set(table["image"])


@pytest.mark.parametrize("size", [0, 31, 100])
def test_a_size_that_the_network_cannot_take(drawn, size, tmp_path):
    with pytest.raises(ValueError, match="multiple of 32"):
        loading.load_pixels(data.index_images(drawn), size, cache=tmp_path)


def test_evaluation_sees_the_central_square():
    pixels = np.zeros((1, 32, 49, 3), np.uint8)
    pixels[:, :, 8:40] = 255
    crop = loading.center_crop(pixels)
    assert crop.shape == (1, 3, 32, 32) and crop.min() == 1


@pytest.fixture
def split(drawn, tmp_path):
    """A split of a copied tree as notebook 01 records it, and the paths of its images, sorted by name; nothing says that it is synthetic."""
    tree = shutil.copytree(drawn, tmp_path / "tree", ignore=shutil.ignore_patterns("DRAWN.*"))
    return record(tree, tmp_path / "split.csv"), sorted(tree.rglob("*.png"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))


def record(root, path):
    runs.write_table(path, splits.make(data.index_images(root)))
    runs.write_recipe(path, loading.source_of(root))
    return path


def flip(path, at, bits=1):
    """Change a byte of a file in place."""
    with open(path, "r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bits]))


def kept_files(folder):
    return [next(folder.glob(f"32-*.{kind}")) for kind in ("uint8", "rows")]


def test_damaged_pixels_are_said_and_decoded_again(drawn, tmp_path, capfd):
    index = data.index_images(drawn)
    whole = loading.load_pixels(index, 32, cache=tmp_path)[0][:]
    pixels, _ = kept_files(tmp_path)
    for row in (0, 7, 19):
        flip(pixels, row * whole[0].size + 1000)
    assert np.array_equal(loading.load_pixels(index, 32, cache=tmp_path)[0][:], whole)
    said = f"3 of 20 images in {tmp_path.name}/{pixels.name} fail their checksums: decoding them again"
    assert said in capfd.readouterr().out
    assert np.array_equal(loading.load_pixels(index.iloc[::-1], 32, cache=tmp_path)[0][:], whole[::-1])
    assert "checksums" not in capfd.readouterr().out


def test_no_flip_in_the_list_gives_an_image_the_pixels_of_another(drawn, tmp_path):
    """A digit turned into a space shifted all rows that followed; a byte that is no text ended every run."""
    index = data.index_images(drawn).head(6)
    whole = loading.load_pixels(index, 32, cache=tmp_path)[0][:]
    _, rows = kept_files(tmp_path)
    undamaged = rows.read_bytes()
    for at in range(0, len(undamaged) // 2, 7):
        for byte in (b" ", b"0", b"\n", b"\xff"):
            rows.write_bytes(undamaged[:at] + byte + undamaged[at + 1 :])
            assert np.array_equal(loading.load_pixels(index, 32, cache=tmp_path)[0][:], whole)


def test_pixels_of_an_image_under_the_name_of_another_are_not_taken(drawn, tmp_path):
    index = data.index_images(drawn).head(2)
    whole = loading.load_pixels(index, 32, cache=tmp_path)[0][:]
    _, rows = kept_files(tmp_path)
    lines = rows.read_bytes().splitlines()
    rows.write_bytes(lines[1] + b"\n" + lines[0] + b"\n")
    assert np.array_equal(loading.load_pixels(index, 32, cache=tmp_path)[0][:], whole)


def test_damaged_pixels_of_an_image_that_is_gone_are_an_error(split):
    path, images = split
    loading.open_images(path, 32)
    pixels, _ = kept_files(path.parent / "runs" / ".cache")
    images[3].unlink()
    assert len(loading.open_images(path, 32).table) == 20, (
        "a missing image is no loss while its pixels are kept"
    )
    for row in range(20):
        flip(pixels, (row + 1) * 32 * 49 * 3 - 1)
    with pytest.raises(
        FileNotFoundError,
        match=rf"1 images are gone \(the first: {images[3]}\), and the kept pixels in {pixels}",
    ):
        loading.open_images(path, 32)


@pytest.mark.parametrize("kept", [True, False])
def test_an_image_replaced_after_notebook_01_is_noticed(split, kept):
    path, images = split
    if kept:
        loading.open_images(path, 32)
    state = images[3].stat()
    whole, other = images[3].read_bytes(), images[4].read_bytes()
    images[3].write_bytes(other.ljust(len(whole))[: len(whole)])
    os.utime(images[3], ns=(state.st_atime_ns, state.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"1 images changed since notebook 01 .*{images[3].name}\): run"
        ):
            loading.open_images(path, 32)
    images[3].write_bytes(whole)
    assert len(loading.open_images(path, 32).table) == 20


@pytest.mark.parametrize("kept", [True, False])
def test_synthetic_tissue_damaged_after_notebook_01_is_drawn_again(drawn, tmp_path, capfd, kept):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    path = record(tree, tmp_path / "split.csv")
    if kept:
        loading.open_images(path, 32)
    image = min(tree.rglob("*.png"))
    whole = image.read_bytes()
    flip(image, len(whole) // 2)
    loading.open_images(path, 32)
    assert image.read_bytes() == whole
    assert "1 images of the synthetic tissue tree are missing or damaged" in capfd.readouterr().out


def test_images_are_hashed_once_a_process(split, monkeypatch):
    path, images = split
    loading.open_images(path, 32)
    read = []
    monkeypatch.setattr(
        runs, "file_hash", lambda path, hashed=runs.file_hash: read.append(path) or hashed(path)
    )
    loading.open_images(path, 32)
    assert not set(map(str, read)) & set(map(str, images))


def test_a_list_changed_after_notebook_01_is_noticed(own):
    path = record(own, own / "split.csv")
    listed, state = (own / data.LIST).read_text(), (own / data.LIST).stat()
    loading.open_images(path, 32)
    (own / data.LIST).write_text(listed.replace("patient 3", "patient 4"))
    os.utime(own / data.LIST, ns=(state.st_atime_ns, state.st_mtime_ns))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"images\.csv changed since notebook 01 read it: run notebook 01 again"
        ):
            loading.open_images(path, 32)
    record(own, path)
    loading.open_images(path, 32)


def test_a_damaged_split_is_noticed_and_one_without_a_recipe_is_read(split):
    path, _ = split
    table = data.load_split(path)
    copy = path.parent / "copy.csv.gz"
    table.to_csv(copy, index=False)
    assert data.load_split(copy).equals(table)
    text = path.read_text()
    path.write_text(text.replace(",benign,", ",malignant,", 1))
    with pytest.raises(ValueError, match=r"split\.csv is not as notebook 01 wrote it: run notebook 01 again"):
        data.load_split(path)
    path.write_text(text)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(ValueError, match=r"split\.csv is not as notebook 01 wrote it"):
        data.load_split(path)
