import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib import data, decoding, image_list, loading, splits


def test_a_case_is_the_slide_number_without_its_letters():
    names = ("SOB_B_F-14-21998CD-40-001.png", "SOB_B_PT-14-21998AB-40-001.png")
    one, two = map(data.parse_name, names)
    assert one["case"] == two["case"] == "14-21998"
    assert one["patient"] != two["patient"]


@pytest.mark.parametrize(
    "name",
    [
        "image.png",
        "SOB_B_A-14-22549AB-150-001.png",
        "SOB_X_A-14-22549AB-100-001.png",
        "SOB_M_A-14-22549AB-100-001.png",
    ],
)
def test_a_name_that_breaks_the_pattern_is_refused(name):
    with pytest.raises(ValueError, match=name):
        data.parse_name(name)


def test_index_of_the_tree_its_parent_and_a_part(drawn):
    whole = data.index_images(drawn)
    assert len(whole) == 20 and whole["label"].value_counts().to_dict() == {"benign": 10, "malignant": 10}
    assert len(data.index_images(drawn / "BreaKHis_v1")) == 20
    assert set(
        data.index_images(drawn / "BreaKHis_v1" / "histology_slides" / "breast" / "benign")["label"]
    ) == {"benign"}


def test_a_folder_without_images_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="SOB_B_A-14-22549AB-100-001"):
        data.index_images(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        data.index_images(tmp_path / "nowhere")


def test_badly_named_files_are_named_and_left_out_only_when_asked(drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    Image.new("RGB", (8, 8)).save(tree / "thumbnail.png")
    with pytest.raises(ValueError, match=r"thumbnail\.png.*\n.*skip_bad_files"):
        data.index_images(tree)
    assert len(data.index_images(tree, skip_bad_files=True)) == 20


def test_what_systems_leave_is_skipped_in_silence(drawn, tmp_path, capsys):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    plain = data.index_images(tree)
    name = plain["image"][0]
    for left in (f"._{name}", ".DS_Store", "Thumbs.db", ".Trash-1000/files/old.png", "@eaDir/thumb.png"):
        (tree / left).parent.mkdir(parents=True, exist_ok=True)
        (tree / left).write_bytes(b"left by a system")
    for folder in ("$RECYCLE.BIN", ".ipynb_checkpoints", "__MACOSX", "#recycle", ".Trashes"):
        shutil.copytree(drawn / "BreaKHis_v1", tree / "BreaKHis_v1" / folder)
    assert data.index_images(tree).equals(plain)
    assert capsys.readouterr().out == ""


def test_other_pictures_are_counted_in_one_line(drawn, tmp_path, capsys):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    for name in ("a.jpg", "b.JPG", "c.tif", "notes.txt"):
        (tree / name).touch()
    assert len(data.index_images(tree)) == 20
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("tree: other pictures are left out: 2 .jpg, 1 .tif, such as a.jpg")


def test_capital_letters_in_an_ending_change_nothing(drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    for path in sorted(tree.rglob("*.png"))[:10]:
        path.rename(path.with_suffix(".PNG"))
    plain, index = data.index_images(drawn), data.index_images(tree)
    assert list(index["image"]) == list(plain["image"]) and data.fingerprint(index) == data.fingerprint(plain)
    for one, other in zip(plain["path"], index["path"], strict=True):
        assert np.array_equal(decoding.decode(one, 32), decoding.decode(other, 32))


def test_copies_of_the_database_in_another_format_are_not_left_out_without_a_word(drawn, tmp_path, capsys):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    files = sorted(tree.rglob("*.png"))
    for path in files[:3]:
        path.with_suffix(".jpg").touch()
    assert len(data.index_images(tree)) == 20, "with the published file beside it a copy is only counted"
    assert "other pictures are left out: 3 .jpg" in capsys.readouterr().out
    for path in files[:3]:
        path.unlink()
    with pytest.raises(
        ValueError, match=r"3 images of BreaKHis .*\.jpg; 17 are there as \.png\. .*convert"
    ) as raised:
        data.index_images(tree)
    assert "skip_bad_files" not in str(raised.value)


def test_a_linked_image_is_what_its_visible_name_says(drawn, tmp_path):
    """As datasets linked from a store that names files by their content."""
    files = sorted(drawn.rglob("*.png"))
    store, seen = tmp_path / "store", tmp_path / "seen"
    for number, path in enumerate(files):
        for folder in (store, seen):
            folder.mkdir(exist_ok=True)
        with Image.open(path) as image:  # small, as some copies are: to be stretched, not to be cut
            image.resize((224, 224)).save(store / f"{number}.png")
        (seen / path.name).symlink_to(store / f"{number}.png")
    linked, copied = data.index_images(seen), data.index_images(shutil.copytree(seen, tmp_path / "copy"))
    assert data.fingerprint(linked) == data.fingerprint(copied)
    for one, other in zip(linked["path"], copied["path"], strict=True):
        assert np.array_equal(decoding.decode(one, 96), decoding.decode(other, 96))


def test_a_link_that_leads_nowhere_is_named(drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    (tree / "SOB_B_A-14-99999-100-001.png").symlink_to("nowhere")
    (tree / "SOB_B_A-14-99999-100-002.png").symlink_to("SOB_B_A-14-99999-100-002.png")
    with pytest.raises(ValueError, match=r"2 bad files:\n.*-001\.png is a link that leads nowhere"):
        data.index_images(tree)
    assert len(data.index_images(tree, skip_bad_files=True)) == 20


def test_the_same_content_under_names_of_the_database_is_said(drawn, tmp_path, capsys):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    one = data.index_images(tree).iloc[0]
    shutil.copy(one["path"], tree / "SOB_B_A-14-99999-100-001.png")
    assert len(data.index_images(tree)) == 21
    said = capsys.readouterr().out
    assert f"is there under several names (1):\n  {one['image']} (case" in said
    assert "SOB_B_A-14-99999-100-001.png (case 14-99999, benign)" in said


def test_images_of_several_cases_that_look_alike_are_named(drawn, tmp_path, capsys):
    index = data.index_images(drawn).head(4)
    pixels = np.stack([decoding.decode(path, 96) for path in index["path"]])
    pixels[3] = pixels[0] // 2  # the same picture, darker
    names = index["image"]
    data.say_alike(splits.near_duplicates(pixels, index), index)
    said = capsys.readouterr().out
    assert said.startswith(
        "images of different cases that look alike (1 pairs): compare them before you train"
    )
    assert f"\n  {names[0]} (case {index['case'][0]}, {index['label'][0]}) and {names[3]} (case" in said
    data.say_alike(splits.near_duplicates(pixels, index), index.assign(case="one"))
    assert capsys.readouterr().out == ""


def test_one_image_in_two_places_is_refused(drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    shutil.copytree(drawn, tmp_path / "tree" / "copy")
    with pytest.raises(ValueError, match="appear twice"):
        data.index_images(tree)


def test_images_of_another_source_stand_in_a_list(own, tmp_path):
    index = data.index_images(own)
    assert len(index) == 20 and index["case"].nunique() == 10
    assert index["label"].value_counts().to_dict() == {"benign": 10, "malignant": 10}
    assert len(data.select(index, magnifications=[250])) == 20
    pixels, table = loading.load_pixels(index, 64, cache=tmp_path / "cache")
    with Image.open(table["path"][0]) as image:  # 460 x 460: 302 of the rows remain, no pixel is squeezed
        whole = image.resize((97, 64))
        cut = image.crop((0, 79, 460, 381)).resize((97, 64), Image.Resampling.LANCZOS)
    distances = [np.abs(pixels[0].astype(int) - np.asarray(other)).mean() for other in (cut, whole)]
    assert distances[0] < 2 and distances[1] > 5
    table = splits.make(index, split_by="image")
    assert data.cases_on_two_sides(table[table["split_by"] == "image"])


def test_a_list_is_read_as_spreadsheets_write_it(own):
    plain = data.index_images(own)
    listed = pd.read_csv(own / data.LIST, dtype=str)
    text = listed.assign(case=listed["case"] + " ", magnification="250.0").to_csv(index=False)
    (own / data.LIST).write_text("\ufeff" + text.replace("path,", "path, ", 1) + ",,,\n\n")
    assert data.index_images(own).equals(plain)
    assert data.fingerprint(plain) == data.fingerprint(plain.iloc[::-1])
    for column, value in (("case", "another"), ("label", "benign"), ("magnification", 40)):
        changed = plain.copy()
        changed.loc[19, column] = value
        assert data.fingerprint(changed) != data.fingerprint(plain), "what a list says counts"


def test_what_a_list_says_of_images_with_names_of_the_database_counts(drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    known = data.index_images(tree)
    names = [str(Path(path).relative_to(tree)) for path in known["path"]]
    listed = known.assign(path=names)[[*image_list.LISTED, "subtype"]]
    listed.to_csv(tree / data.LIST, index=False)
    one = data.fingerprint(data.index_images(tree))
    listed.assign(case="p" + listed["case"]).to_csv(tree / data.LIST, index=False)
    assert data.fingerprint(data.index_images(tree)) != one


def test_numbers_are_names_too(own, tmp_path):
    """Files without an ending whose names are numbers stay text on the way through split.csv."""
    listed = pd.read_csv(own / data.LIST, dtype=str)
    for number, path in enumerate(listed["path"], 1001):
        (own / path).rename(own / str(number))
    listed.assign(path=range(1001, 1021)).to_csv(own / data.LIST, index=False)
    splits.make(data.index_images(own)).to_csv(tmp_path / "split.csv", index=False)
    images = loading.open_images(tmp_path / "split.csv", 32)
    assert images.side("test").table["image"].str.startswith("10").all()


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("label", "Malignant?", "line 3 of images.csv: label 'Malignant\\?' is neither benign nor malignant"),
        ("path", "nowhere.jpg", "line 3 of images.csv: no file .*nowhere.jpg"),
        ("magnification", "10-20", "line 3 of images.csv: magnification '10-20' is not a whole number"),
        ("case", "", "line 3 of images.csv: no case; images of one patient must share one"),
        ("path", "../cat.png", "line 3 of images.csv: .*cat.png lies outside of "),
        ("path", "./slides/b0.jpg", "line 3 of images.csv: ./slides/b0.jpg is already listed on line 2"),
        ("path", "a\0b.png", r"line 3 of images.csv: no file 'a\\x00b.png' in "),
        ("path", "x" * 300, "line 3 of images.csv: no file 'xxx"),
        ("path", "loop.png", "line 3 of images.csv: loop.png is a link that leads nowhere"),
        ("path", "loop.png/b0.jpg", "line 3 of images.csv: no file 'loop.png/b0.jpg'"),
        ("path", "slides", "line 3 of images.csv: no file 'slides'"),
    ],
)
def test_a_row_that_cannot_be_meant_is_named_and_left_out_only_when_asked(own, column, value, said):
    (own / "loop.png").symlink_to("loop.png")
    listed = pd.read_csv(own / data.LIST, dtype=str)
    listed.loc[1, column] = value
    listed.to_csv(own / data.LIST, index=False)
    with pytest.raises(ValueError, match=said):
        data.index_images(own)
    assert len(data.index_images(own, skip_bad_files=True)) == 19
    listed.drop(columns="case").to_csv(own / data.LIST, index=False)
    with pytest.raises(
        ValueError, match=r"images\.csv lacks the columns case: its first line must name path,"
    ):
        data.index_images(own)
    (own / data.LIST).write_text("path,label,case,magnification\nslides/b0.jpg,benign\n\n")
    with pytest.raises(ValueError, match=r"1 bad files:\n  line 2 of images\.csv: no case"):
        data.index_images(own)
    (own / data.LIST).write_text("path,label,case,magnification\nslides/b0.jpg,benign,Smith, John,100\n")
    with pytest.raises(ValueError, match=r"images\.csv: a line has more cells than the first"):
        data.index_images(own)
    (own / data.LIST).write_text("path,label,case,magnification\n")
    with pytest.raises(ValueError, match=r"images\.csv lists no image"):
        data.index_images(own)
    (own / data.LIST).write_bytes("path,label,case,magnification\na.jpg,benign,Müller,100\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"images\.csv is not a table in UTF-8 with commas"):
        data.index_images(own)


def test_a_missing_class_says_what_is_there(published):
    with pytest.raises(ValueError, match="No malignant"):
        data.select(published, subtypes=["A"])
    assert set(data.select(published, magnifications=[100])["magnification"]) == {100}
    with pytest.raises(ValueError, match="Unknown magnification"):
        data.select(published, magnifications=[50])


def test_a_split_by_case_that_leaks_is_refused_on_load(published, tmp_path):
    table = splits.by_image(published, seed=0)
    table.to_csv(tmp_path / "image.csv", index=False)
    assert len(data.load_split(tmp_path / "image.csv")) == len(published)
    table.assign(split_by="case").to_csv(tmp_path / "case.csv", index=False)
    with pytest.raises(ValueError, match="cases on two sides"):
        data.load_split(tmp_path / "case.csv")


def test_a_squeezed_copy_shows_the_same_field_of_view(drawn, tmp_path):
    original = sorted(drawn.rglob("*.png"))[0]
    squeezed = tmp_path / original.name
    with Image.open(original) as image:
        image.resize((224, 224), Image.Resampling.LANCZOS).save(squeezed)
    one, two = (decoding.decode(path, 96).astype(int) for path in (original, squeezed))
    assert one.shape == two.shape == (96, 146, 3)
    assert np.abs(one - two).mean() < 3


def test_real_images(breakhis, tmp_path):
    index = data.index_images(breakhis)
    if (breakhis / "manifest.csv").exists():  # the sample's own list
        manifest = pd.read_csv(breakhis / "manifest.csv")
        counts = index.groupby(["magnification", "label"]).size().to_dict()
        expected = manifest.assign(magnification=manifest["magnification"].str[:-1].astype(int))
        assert counts == expected.groupby(["magnification", "label"]).size().to_dict()
        assert index["case"].nunique() == manifest["case"].nunique()
    some = index.groupby("magnification").head(2)
    pixels, table = loading.load_pixels(some, 64, cache=tmp_path)
    assert len(pixels) == len(table) == 8 and pixels[:].std(axis=(1, 2, 3)).min() > 1
