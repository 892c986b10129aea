"""Lists of own images, written as people, spreadsheets and other systems write them."""

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from lib import data, image_list, loading, splits


@pytest.fixture
def listed(own):
    """`listed(**columns)`: the index of `own` with the first cells of some columns of its list written in another way."""

    def index(**columns):
        table = pd.read_csv(own / data.LIST, dtype=str, keep_default_na=False)
        for name, cells in columns.items():
            if name not in table:
                table[name] = ""
            table.loc[: len(cells) - 1, name] = cells
        table.to_csv(own / data.LIST, index=False)
        return data.index_images(own)

    return index


@pytest.mark.parametrize(
    "written",
    [
        ("Müller", unicodedata.normalize("NFD", "Müller")),
        ("patient 3a", "patient  3a"),
        ("patient 3a", "patient\N{NO-BREAK SPACE}3a"),
        ("patient 3a", "patient 3a\N{ZERO WIDTH SPACE}"),
        ("Patient 3a", "patient 3A"),
        ("7", "7.0"),
        ("12.00", "12"),
    ],
)
def test_what_is_certainly_one_case_is_one_and_said(listed, capsys, written):
    """The first two images of the list are of one case, and that of no other."""
    index = listed(case=written)
    one = index["case"][index["image"].isin(["slides/b0.jpg", "slides/b1.jpg"])]
    assert set(one) == {unicodedata.normalize("NFC", written[0])}, "as it is written first"
    assert index["case"].nunique() == 10 and list(index["patient"]) == list(index["case"])
    said = capsys.readouterr().out
    assert said.startswith("images.csv: cases written in several ways, each taken as one (1): ")
    assert f"{written[0]!r} and {written[1]!r}" in said


@pytest.mark.parametrize(
    "written",
    [
        ("7", "007"),
        ("patient-3a", "patient_3a"),
        ("patient3a", "patient 3a"),
        ("Muller", "Müller"),
        ("14-21998AB", "14-21998CD"),
        ("14-21998", "14-21998AB"),
    ],
)
def test_what_may_be_one_case_is_refused_until_the_list_decides(listed, written):
    with pytest.raises(ValueError, match=r"images\.csv may name one patient in several ways \(1\)") as raised:
        listed(case=written)
    for name in written:
        assert repr(name) in str(raised.value)
    assert "write them alike" in str(raised.value) and "tell them apart" in str(raised.value)
    assert "skip_bad_files" not in str(raised.value)
    apart = [f"{place} {name}" for place, name in zip("AB", written, strict=True)]
    assert listed(case=apart)["case"].nunique() == 11
    assert listed(case=[written[0]] * 2)["case"].nunique() == 10


@pytest.mark.parametrize(
    "cases", [("1-2", "12"), ("ER+", "ER-"), ("राम", "रमा"), ("3 left", "3 right"), ("1.1", "1.2")]
)
def test_other_cases_stay_apart(listed, cases, capsys):
    assert set(cases) < set(listed(case=cases)["case"]) and capsys.readouterr().out == ""


def test_labels_subtypes_and_magnifications_mean_what_a_person_meant(listed, capsys):
    plain = listed(subtype=["Ductal"] * 4)
    said = capsys.readouterr().out
    index = listed(
        subtype=["Ductal", "ductal ", "DUCTAL", "ductal"],
        label=["Benign", "BENIGN ", "benign"],
        magnification=["250X", "250x", "250.0", "x250", "× 250", "250,0"],
    )
    assert index.equals(plain) and said == ""
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "images.csv: labels written in several ways, each taken as one (1): 'Benign' and 'BENIGN' and 'benign'",
        "images.csv: subtypes written in several ways, each taken as one (1): 'Ductal' and 'ductal' and 'DUCTAL'",
    ]


def test_columns_are_found_in_capitals_and_named_where_they_stand_twice(own):
    plain, text = data.index_images(own), (own / data.LIST).read_text()
    (own / data.LIST).write_text(text.replace("path,label,case", "Path, Label,CASE", 1))
    assert data.index_images(own).equals(plain)
    (own / data.LIST).write_text(
        text.replace("path,label,case", "path,label,case,Case", 1).replace(",patient", ",a,patient")
    )
    with pytest.raises(ValueError, match=r"images\.csv names the columns case twice: leave one"):
        data.index_images(own)
    (own / data.LIST).write_text(
        text.replace("path,label,case", "path,label,case,case", 1).replace(",patient", ",a,patient")
    )
    with pytest.raises(ValueError, match=r"images\.csv names the columns case twice: leave one"):
        data.index_images(own)


@pytest.mark.parametrize("case", ["patient 9", "patient 0"])
def test_one_image_under_two_cases_or_labels_is_refused(own, case):
    """The first row is benign, of patient 0."""
    shutil.copy(own / "slides" / "b0.jpg", own / "slides" / "copy.jpg")
    with open(own / data.LIST, "a") as file:
        file.write(f"slides/copy.jpg,malignant,{case},250\n")
    with pytest.raises(
        ValueError, match=r"images\.csv has the same picture, .* under two cases or two labels \(1\)"
    ) as raised:
        data.index_images(own, skip_bad_files=True)
    assert f"slides/b0.jpg (case patient 0, benign) and slides/copy.jpg (case {case}, malignant)" in str(
        raised.value
    )
    assert "Give each one case and one label" in str(raised.value) and "skip_bad" not in str(raised.value)


def test_one_image_twice_in_a_case_is_said(own, capsys):
    shutil.copy(own / "slides" / "b0.jpg", own / "slides" / "copy.jpg")
    with open(own / data.LIST, "a") as file:
        file.write("slides/copy.jpg,benign,Patient 0,250\n")
    assert len(data.index_images(own)) == 21
    assert "is there under several names (1):\n  slides/b0.jpg" in capsys.readouterr().out


def test_what_the_database_has_twice_is_said_in_a_list_too(drawn, tmp_path, capsys):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    index = data.index_images(tree)
    shutil.copy(index["path"][0], index["path"][1])
    names = [str(Path(path).relative_to(tree)) for path in index["path"]]
    index.assign(path=names)[[*image_list.LISTED]].to_csv(tree / data.LIST, index=False)
    assert len(data.index_images(tree)) == 20
    assert "is there under several names (1):\n" in capsys.readouterr().out


def test_images_of_one_slide_of_the_database_need_one_case(drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path / "tree")
    index = data.index_images(tree)
    second = Path(index["path"][0].replace("-100-001", "-100-002"))
    shutil.copy(index["path"][1], second)
    Path(index["path"][1]).unlink()
    names = [*index["path"].drop(1), str(second)]
    table = pd.concat([index.drop(1), index.iloc[[0]]]).assign(
        path=[str(Path(n).relative_to(tree)) for n in names]
    )
    table.assign(case=range(20))[[*image_list.LISTED]].to_csv(tree / data.LIST, index=False)
    with pytest.raises(
        ValueError, match=r"images of BreaKHis's slide .* are listed under 2 cases \(0, 19\): give them one"
    ):
        data.index_images(tree)


def test_a_named_page_is_the_image(own, tmp_path):
    rng = np.random.default_rng(0)
    first, second = (Image.fromarray(rng.integers(0, 255, (100, 160, 3)).astype(np.uint8)) for _ in range(2))
    first.save(own / "scan.tif", save_all=True, append_images=[second])
    text = (own / data.LIST).read_text().replace("magnification\n", "magnification,page\n")
    (own / data.LIST).write_text(text + "scan.tif,benign,p1,250,\n")
    with pytest.raises(
        ValueError, match=r"scan\.tif holds 2 pages or pictures: .* in a column page of images\.csv"
    ):
        loading.load_pixels(data.index_images(own), 64, cache=tmp_path / "cache")
    # Two pages of one file are two images, of two patients here; a spreadsheet made a number of the page.
    (own / data.LIST).write_text(text + "scan.tif,benign,p1,250,1.0\nscan.tif,malignant,p2,250,2\n")
    index = data.index_images(own)
    splits.make(index, split_by="image").to_csv(tmp_path / "split.csv", index=False)
    images = loading.open_images(tmp_path / "split.csv", 64)
    for name, picture in (("scan.tif page 1", first), ("scan.tif page 2", second)):
        at = images.table.index[images.table["image"] == name][0]
        expected = np.asarray(picture.crop((4, 0, 156, 100)).resize((97, 64), Image.Resampling.LANCZOS))
        assert np.abs(images.pixels[at].astype(int) - expected).mean() < 6
    (own / data.LIST).write_text(text + "scan.tif,benign,p1,250,first\n")
    with pytest.raises(
        ValueError, match=r"line 22 of images\.csv: page 'first' is not the number of a page, counted from 1"
    ):
        data.index_images(own)


@pytest.mark.parametrize(
    ("on_disk", "written"),
    [
        ("Bilder/a1.png", "Bilder\\a1.png"),
        ("Bilder/a1.png", "bilder/A1.PNG"),
        ("Präparate/Größe 1.png", unicodedata.normalize("NFD", "Präparate/Größe 1.png")),
        (unicodedata.normalize("NFD", "Präparate/Größe 1.png"), "Präparate\\Größe 1.png"),
        ("two  spaces.png", "./two  spaces.png"),
    ],
)
def test_paths_as_other_systems_write_them_find_their_file(own, on_disk, written):
    (own / on_disk).parent.mkdir(exist_ok=True)
    shutil.move(own / "slides" / "b0.jpg", own / on_disk)
    text = (own / data.LIST).read_text()
    (own / data.LIST).write_text(text.replace("slides/b0.jpg", on_disk))
    plain = data.index_images(own)
    (own / data.LIST).write_text(text.replace("slides/b0.jpg", written))
    assert data.index_images(own).equals(plain)
    assert unicodedata.normalize("NFC", on_disk) in set(plain["image"]), "one name on every system"


def test_a_file_whose_name_has_a_backslash_is_itself(own):
    os.rename(own / "slides" / "b0.jpg", own / "slides\\b0.jpg")
    (own / data.LIST).write_text((own / data.LIST).read_text().replace("slides/b0.jpg", "slides\\b0.jpg"))
    assert "slides\\b0.jpg" in set(data.index_images(own)["image"])


def test_rows_and_files_of_systems_are_left_out(own, capsys):
    plain = data.index_images(own)
    (own / "slides" / "._b0.jpg").write_bytes(b"resource fork")
    (own / "slides" / "Thumbs.db").touch()
    (own / "slides" / "more.jpg").touch()
    with open(own / data.LIST, "a") as file:
        file.write("slides/._b0.jpg,benign,patient 0,250\nslides\\Thumbs.db,benign,patient 0,250\n")
    assert data.index_images(own).equals(plain)
    one, two = capsys.readouterr().out.splitlines()
    assert one.startswith(
        "images.csv: rows left out that name hidden files or files of a system (2), such as slides/._b0.jpg"
    )
    assert two.endswith(": other pictures are left out: 1 .jpg, such as more.jpg")


def test_a_link_in_a_list_is_what_the_list_calls_it_and_stays_in_the_folder(own, tmp_path_factory):
    (own / "store").mkdir()
    shutil.move(own / "slides" / "b0.jpg", own / "store" / "3f786850")
    (own / "slides" / "b0.jpg").symlink_to("../store/3f786850")
    index = data.index_images(own)
    assert "slides/b0.jpg" in set(index["image"]) and index["path"].str.endswith("slides/b0.jpg").any()
    outside = tmp_path_factory.mktemp("outside") / "b0.jpg"
    shutil.move(own / "store" / "3f786850", outside)
    (own / "slides" / "b0.jpg").unlink()
    (own / "slides" / "b0.jpg").symlink_to(outside)
    with pytest.raises(
        ValueError, match=r"line 2 of images\.csv: slides/b0.jpg is a link to a file outside of"
    ):
        data.index_images(own)
