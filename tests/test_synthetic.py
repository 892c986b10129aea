"""Drawn tissue: same seed same bytes, BreaKHis names, nothing half-written, and no shortcut through color."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from lib import runs, synthetic

SMALL = {"cases": 4, "images_per_case": 1, "magnifications": (200,)}


def digests(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """One image of each of 16 cases, all subtypes twice."""
    folder = tmp_path_factory.mktemp("drawn")
    return synthetic.draw_tree(folder, cases=16, images_per_case=1, magnifications=(100,), seed=3)


def test_names_sizes_and_folders_are_those_of_breakhis(tree):
    paths = sorted(tree.rglob("*.png"))
    assert len(paths) == 16
    cases, labels, subtypes, suffixes = set(), [], set(), set()
    for path in paths:
        name = re.fullmatch(r"SOB_([BM])_([A-Z]+)-(14)-(\d{5})([A-Z]*)-(100)-(\d{3})\.png", path.name)
        assert name, path.name
        kind, code, year, case, suffix, magnification, number = name.groups()
        label = {"B": "benign", "M": "malignant"}[kind]
        expected = (
            f"BreaKHis_v1/histology_slides/breast/{label}/SOB/{synthetic.SUBTYPES[code][1]}/"
            f"SOB_{kind}_{code}_{year}-{case}{suffix}/{magnification}X/{path.name}"
        )
        assert path.relative_to(tree).as_posix() == expected
        assert number == "001"
        cases.add(case)
        labels.append(label)
        subtypes.add(code)
        suffixes.add(suffix)
        with Image.open(path) as image:
            assert (image.size, image.mode, image.format) == ((700, 460), "RGB", "PNG")
            assert image.text["Description"] == synthetic.NOTE
    assert len(cases) == 16
    assert labels.count("benign") == labels.count("malignant") == 8
    assert subtypes == {"A", "F", "PT", "TA", "DC", "LC", "MC", "PC"}
    assert "" in suffixes and len(suffixes) > 1
    assert not list(tree.rglob("*.part"))


def test_marker_tells_what_was_drawn(tree):
    assert json.loads((tree / "DRAWN.json").read_text()) == {
        "drawn": True,
        "seed": 3,
        "cases": 16,
        "images_per_case": 1,
        "magnifications": [100],
        "version": synthetic.VERSION,
    }
    drawn, real = list(tree.rglob("*.png")), tree.parent / "real.png"
    assert synthetic.is_drawn(map(str, drawn))
    assert not synthetic.is_drawn([real])
    with pytest.raises(ValueError, match="keep them apart"):
        synthetic.is_drawn([*drawn, real])


def test_same_seed_same_bytes_whatever_the_workers(tmp_path):
    alone = digests(synthetic.draw_tree(tmp_path / "alone", seed=1, workers=1, **SMALL))
    pooled = digests(synthetic.draw_tree(tmp_path / "pooled", seed=1, workers=2, **SMALL))
    other = digests(synthetic.draw_tree(tmp_path / "other", seed=2, workers=1, **SMALL))
    assert alone == pooled
    assert alone.keys() == other.keys()
    assert not set(alone.values()) & set(other.values())


def test_more_cases_leave_the_first_ones_as_they_were(tmp_path):
    few = digests(synthetic.draw_tree(tmp_path / "few", seed=1, workers=1, **{**SMALL, "cases": 2}))
    more = digests(synthetic.draw_tree(tmp_path / "more", seed=1, workers=1, **SMALL))
    assert few.items() <= more.items()


def test_interrupted_tree_is_continued_and_a_finished_one_left_alone(tmp_path):
    folder = synthetic.draw_tree(tmp_path / "tree", seed=1, workers=1, **SMALL)
    before = digests(folder)
    paths = sorted(folder.rglob("*.png"))
    (folder / "DRAWN.json").rename(folder / "DRAWING.json")
    marker = json.loads((folder / "DRAWING.json").read_text())
    (folder / "DRAWING.json").write_text(json.dumps({**marker, "drawn": False}))
    assert synthetic.is_drawn(paths)  # half-drawn tissue is drawn tissue too
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:5000])
    kept = paths[2].stat().st_mtime_ns
    synthetic.draw_tree(folder, seed=1, workers=1, **SMALL)
    assert digests(folder) == before
    assert paths[2].stat().st_mtime_ns == kept
    assert not (folder / "DRAWING.json").exists()

    times = [path.stat().st_mtime_ns for path in paths]
    assert synthetic.draw_tree(str(folder), seed=1, **SMALL) == folder
    assert [path.stat().st_mtime_ns for path in paths] == times


@pytest.mark.parametrize("with_checksums", [True, False])
def test_damaged_or_missing_images_of_a_finished_tree_are_drawn_again(tmp_path, capfd, with_checksums):
    folder = synthetic.draw_tree(tmp_path / "tree", seed=1, workers=1, **SMALL)
    before, paths = digests(folder), sorted(folder.rglob("*.png"))
    checksums = (folder / "DRAWN.sha256").read_text()
    capfd.readouterr()
    damaged = bytearray(paths[0].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    paths[0].write_bytes(damaged)
    paths[1].unlink()
    if with_checksums:
        shutil.copy(paths[3], paths[2])  # an undamaged image, but another
    else:
        (folder / "DRAWN.sha256").unlink()  # a tree that was drawn before there were any
    kept = paths[3].stat().st_mtime_ns
    synthetic.draw_tree(folder, seed=1, workers=1, **SMALL)
    said = capfd.readouterr().out
    assert f"{2 + with_checksums} images of the synthetic tissue tree are missing or damaged" in said
    assert digests(folder) == before and (folder / "DRAWN.sha256").read_text() == checksums
    assert paths[3].stat().st_mtime_ns == kept
    synthetic.draw_tree(folder, seed=1, workers=1, **SMALL)
    assert capfd.readouterr().out == ""


def test_damaged_checksums_do_not_change_an_image(tmp_path):
    folder = synthetic.draw_tree(tmp_path / "tree", seed=1, workers=1, **SMALL)
    before, checksums = digests(folder), folder / "DRAWN.sha256"
    text = checksums.read_bytes()
    for damaged in (b"\xff" + text[1:], text[:70] + b"\n" + text[71:], text[: len(text) // 2], b""):
        checksums.write_bytes(damaged)
        assert digests(synthetic.draw_tree(folder, seed=1, workers=1, **SMALL)) == before


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory to look into")
def test_nothing_stays_in_shared_memory_when_the_process_is_killed(tmp_path):
    """As the runner does with a kernel once its notebook is done."""
    code = f"""if True:
        import os, signal
        from lib import synthetic
        synthetic.draw_tree({str(tmp_path / "tree")!r}, seed=1, workers=2, **{SMALL})
        os.kill(os.getpid(), signal.SIGKILL)"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=runs.ROOT, stderr=subprocess.DEVNULL)
    process.wait()
    assert len(list(tmp_path.rglob("*.png"))) == 4
    assert not [name for name in os.listdir("/dev/shm") if str(process.pid) in re.split("[-_]", name)]


def test_other_settings_or_foreign_files_are_refused(tmp_path):
    folder = synthetic.draw_tree(tmp_path / "tree", seed=1, workers=1, **{**SMALL, "cases": 2})
    before = digests(folder)
    with pytest.raises(ValueError, match=r"other settings.*another folder, or delete"):
        synthetic.draw_tree(folder, seed=2, **{**SMALL, "cases": 2})
    assert digests(folder) == before

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "slide.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=r"slide\.png.*empty or new folder"):
        synthetic.draw_tree(foreign, **SMALL)
    assert [path.name for path in foreign.iterdir()] == ["slide.png"]

    (folder / "DRAWN.json").write_text('{"drawn"')
    with pytest.raises(ValueError, match="damaged"):
        synthetic.draw_tree(folder, seed=1, **SMALL)


@pytest.mark.parametrize(
    "settings",
    [{"cases": 1}, {"images_per_case": 0}, {"magnifications": ()}, {"magnifications": (300,)}, {"seed": -1}],
)
def test_impossible_settings_are_refused_before_anything_is_written(tmp_path, settings):
    with pytest.raises(ValueError, match=r"needed|not one of"):
        synthetic.draw_tree(tmp_path / "tree", **settings)
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_no_half_image(tmp_path, full_disk):
    with full_disk(100_000), pytest.raises(OSError, match="run again"):
        synthetic.draw_tree(tmp_path / "tree", seed=1, workers=1, **SMALL)
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / "tree" / "DRAWN.json").exists()
    assert len(digests(synthetic.draw_tree(tmp_path / "tree", seed=1, workers=1, **SMALL))) == 4


def test_label_and_subtype_must_belong_together():
    with pytest.raises(ValueError, match="among the benign ones: A, F, PT, TA"):
        synthetic.draw_image("benign", "DC", 0, 100, np.random.default_rng(0))


def test_stain_varies_by_case_and_not_by_class():
    """Traits of 400 cases a class: the same spread of stain, two grades apart."""
    traits = {
        label: [
            synthetic._case_traits(label, np.random.default_rng((9, number, label == "benign")))
            for number in range(400)
        ]
        for label in synthetic.LABELS
    }
    for name in (
        "hematoxylin",
        "eosin",
        "hematoxylin_gain",
        "eosin_gain",
        "white",
        "nuclear_area",
        "white_area",
        "focus",
    ):
        benign, malignant = (np.array([case[name] for case in traits[label]]) for label in synthetic.LABELS)
        spread = np.concatenate([benign, malignant]).std(axis=0)
        assert (spread > 0).all(), name
        # means of 400 draws differ by 0.07 spreads on average: 0.3 is beyond four standard errors
        assert (np.abs(benign.mean(axis=0) - malignant.mean(axis=0)) < 0.3 * spread).all(), name
    grades = [np.mean([case["grade"] for case in traits[label]]) for label in synthetic.LABELS]
    assert grades[1] - grades[0] > 0.4


def test_images_of_a_case_share_their_stain():
    """The mean color scatters more between cases than within one."""
    colors = np.array(
        [
            [
                synthetic.draw_image(
                    "benign", "TA", (5, case), 200, np.random.default_rng((5, case, number))
                ).mean((0, 1))
                for number in range(3)
            ]
            for case in range(8)
        ]
    )
    within, between = colors.std(axis=1).mean(), colors.mean(axis=1).std(axis=0).mean()
    assert between > within


def test_color_alone_does_not_solve_it_by_case():
    """An RBF SVM on mean and spread of R, G, B, trained on half the cases, tested on the others and in turn."""
    cases, features = np.repeat(np.arange(16), 3), []
    for index, case in enumerate(cases):
        label = synthetic.LABELS[case % 2]
        code = synthetic._subtypes_of(label)[case // 2 % 4]
        pixels = synthetic.draw_image(label, code, (11, int(case)), 100, np.random.default_rng((11, index)))
        features.append(np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1))]))
    features, labels = np.array(features), cases % 2
    scores = []
    for split in range(5):
        order = np.random.default_rng(split)
        first = np.isin(cases, [2 * order.permutation(8)[:4], 2 * order.permutation(8)[:4] + 1])
        for train in (first, ~first):
            model = make_pipeline(StandardScaler(), SVC()).fit(features[train], labels[train])
            scores.append(balanced_accuracy_score(labels[~train], model.predict(features[~train])))
    assert np.mean(scores) < 0.8


def test_nuclei_are_larger_and_lumens_lost_when_malignant():
    """What a pathologist would look for is what was laid out: nuclear size, its spread, and lost lumens."""
    found = {}
    for label, code, grade in (("benign", "TA", 0.15), ("malignant", "DC", 0.85)):
        nuclei, shapes = synthetic._layout(code, grade, 1.0, 0.24, 1.0, np.random.default_rng(0))
        cells = nuclei[: len(nuclei) // 2]  # the epithelium comes first, the stroma last
        radii = np.sqrt(cells[:, 2] * cells[:, 3])
        found[label] = (radii.mean(), radii.std() / radii.mean(), (shapes[:, 6] > 0).mean())
    assert found["malignant"][0] > 1.3 * found["benign"][0]
    assert found["malignant"][1] > found["benign"][1]
    assert found["benign"][2] > 0.5 > found["malignant"][2]
