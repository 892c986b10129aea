"""What one notebook left is taken by another only while both belong together."""

import os
import shutil

import numpy as np
import pandas as pd
import pytest

from lib import data, evaluation, explorer, lineage, loading, models, robustness, runs, splits

EPSILONS = [4 / 255]


def split(drawn, folder, seed=0):
    """What notebook 01 leaves with this seed, and its images at 32 pixels."""
    table = splits.make(data.index_images(drawn), None, "case", seed=seed)
    runs.write_table(folder / "split.csv", table[table["fold"] == 0])
    about = {
        "name": "toy",
        "magnifications": [100],
        "fingerprint": data.fingerprint(data.index_images(drawn)),
    }
    runs.write_json(folder / "dataset.json", about)
    return loading.open_images(folder / "split.csv", 32)


def train(folder, name, images, seed=0, start="none"):
    """A checkpoint as notebook 02 leaves it: untrained, but with its record."""
    sides = {"sides": [images.side(side).origin for side in ("train", "validation")]}
    path = robustness.checkpoint(folder, name)
    models.save(models.build("none", seed=seed), path, robustness.made_from(folder, start) | sides)


@pytest.fixture(scope="module")
def made(drawn, tmp_path_factory):
    """The home of a run with a baseline, a model that builds upon it, and the predictions of both."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "runs" / "toy"
    images = split(drawn, folder)
    train(folder, "baseline", images)
    train(folder, "merged_fgsm", images, 1, robustness.checkpoint(folder, "baseline"))
    for name in ("baseline", "merged_fgsm"):
        robustness.evaluate(folder, name, images, ["none", "fgsm"], epsilons=EPSILONS)
    return home


@pytest.fixture
def run(made, tmp_path, monkeypatch):
    """A copy of that run, to be changed, and its images."""
    monkeypatch.setenv("STUDY_HOME", str(shutil.copytree(made, tmp_path, dirs_exist_ok=True)))
    folder = runs.folder("toy")
    return folder, loading.open_images(folder / "split.csv", 32)


def test_what_belongs_together_is_taken(run):
    folder, images = run
    assert robustness.load(folder, "baseline", images) is not None
    assert set(robustness.read(folder)["model"]) == {"baseline", "merged_fgsm"}
    assert explorer.of_run("toy", background=False).networks.keys() == {"baseline", "merged_fgsm"}


def test_after_another_split_no_model_is_judged_on_images_it_was_trained_on(run, drawn):
    """Notebook 01 again with another seed, then the others without 02."""
    folder, _ = run
    images = split(drawn, folder, seed=1)
    said = (
        r"models/baseline\.safetensors: made from other train images .*\nRun notebooks/02_transfer_learning"
    )
    asked = (
        lambda: robustness.load(folder, "baseline", images),
        lambda: robustness.evaluate(folder, "baseline", images, ["none"]),
        lambda: robustness.pgd_by_steps(folder, "baseline", images, 4 / 255, [(1, 0, 1.0)], 2),
        lambda: robustness.vote_under_noise(folder, "baseline", images, 0.1, 5, 2),
        lambda: explorer.of_run("toy"),
    )
    for ask in asked:
        with pytest.raises(lineage.StaleError, match=said):
            ask()
    with pytest.raises(
        lineage.StaleError, match=r"02_transfer_learning.ipynb, then .*03_fgsm.*, then .*05_adv"
    ):
        robustness.read(folder)
    assert "02_transfer_learning" in explorer.view_of("toy").data

    # 02 and 03 again, but not 05: what it left is not compared with the new baseline.
    train(folder, "baseline", images)
    robustness.evaluate(folder, "baseline", images, ["none", "fgsm"], epsilons=EPSILONS)
    assert set(robustness.read(folder, ["baseline"])["model"]) == {"baseline"}
    with pytest.raises(lineage.StaleError, match="made from other test images") as error:
        robustness.read(folder)
    assert "baseline-" not in str(error.value) and "02_transfer" not in str(error.value)
    assert "05_adversarial" in str(error.value)


def test_another_size_or_selection_is_another_model(run):
    folder, images = run
    larger = loading.open_images(folder / "split.csv", 64)
    with pytest.raises(lineage.StaleError, match="made at 32 pixels, not at 64"):
        robustness.evaluate(folder, "baseline", larger, ["none"])
    with pytest.raises(lineage.StaleError, match="made at 32 pixels, not at 64"):
        robustness.read(folder, ["baseline"], images=larger)
    fewer = loading.Images(
        images.table[images.table["case"] != images.side("train").table["case"][0]], images.pixels
    )
    with pytest.raises(lineage.StaleError, match="other train images"):
        robustness.load(folder, "baseline", fewer)


def test_a_baseline_trained_anew_leaves_behind_what_was_made_from_the_old_one(run):
    folder, images = run
    train(folder, "baseline", images, seed=2)
    with pytest.raises(
        lineage.StaleError, match=r"made from another baseline\.safetensors .*\n.*05_adversarial"
    ):
        robustness.load(folder, "merged_fgsm", images)
    with pytest.raises(lineage.StaleError, match=r"baseline-fgsm-case0\.csv\.gz: made from another baseline"):
        robustness.read(folder, ["baseline"])


def test_the_attack_of_a_cascade_goes_on_only_from_rows_of_the_same_model(run):
    folder, images = run
    options = {"epsilons": EPSILONS, "steps": {"pgd": 2, "square": 5}}
    robustness.evaluate(folder, "baseline", images, ["pgd"], **options)
    train(folder, "baseline", images, seed=2)
    with pytest.raises(FileNotFoundError, match=r"run pgd first, in notebooks/03_fgsm_attack\.ipynb"):
        robustness.evaluate(folder, "baseline", images, ["square"], **options)


def test_pieces_that_nothing_would_write_anew_are_removed(run, capsys):
    """A model trained anew takes along the audit's pieces, which the audit itself might never write again."""
    folder, images = run
    options = {"epsilons": EPSILONS, "steps": {"pgd": 2, "square": 5}}
    robustness.evaluate(folder, "baseline", images, ["pgd", "square"], **options)
    robustness.evaluate(folder, "baseline", images, ["transfer_fgsm"], source="merged_fgsm", **options)
    before = {path.name for path in (folder / "predictions").iterdir()}
    robustness.evaluate(folder, "baseline", images, ["none"], **options)
    assert {path.name for path in (folder / "predictions").iterdir()} == before
    train(folder, "baseline", images, seed=2)
    robustness.evaluate(folder, "baseline", images, ["none"], **options)
    assert set(robustness.read(folder, ["baseline"])["attack"]) == {"none"}
    assert "removed 5 pieces of predictions of baseline" in "".join(capsys.readouterr())
    # Predictions of a model without a network on the other kind of split stay: they belong to this split.csv too.
    for kind in ("case", "image"):
        each = loading.open_images(folder / "split.csv", 32, [100], kind)
        robustness.evaluate_without_network(folder, each, ["none"])
    assert set(robustness.read(folder, ["color_only"])["split_by"]) == {"case", "image"}


def test_a_cascade_belongs_to_the_attack_it_went_on_from(run):
    folder, images = run
    for name in ("baseline", "merged_fgsm"):
        robustness.evaluate(folder, name, images, ["pgd"], epsilons=EPSILONS, steps={"pgd": 2})
    robustness.evaluate(folder, "baseline", images, ["square"], epsilons=EPSILONS, steps={"square": 5})
    assert "square" in set(robustness.read(folder)["attack"])
    for name in ("baseline", "merged_fgsm"):
        robustness.evaluate(folder, name, images, ["pgd"], epsilons=EPSILONS, steps={"pgd": 3}, seed=0)
    with pytest.raises(
        lineage.StaleError, match=r"square-4-case0\.csv\.gz: made from another baseline-pgd-4"
    ):
        robustness.read(folder)


def test_one_attack_means_the_same_for_all_models(run):
    folder, images = run
    for name, steps in (("baseline", 2), ("merged_fgsm", 5)):
        robustness.evaluate(folder, name, images, ["pgd"], epsilons=EPSILONS, steps={"pgd": steps})
    with pytest.raises(
        lineage.StaleError, match=r"merged_fgsm-pgd-4-case0\.csv\.gz: made with steps of pgd 5"
    ):
        robustness.read(folder)
    robustness.evaluate(folder, "merged_fgsm", images, ["none"], seed=3)
    with pytest.raises(lineage.StaleError, match=r"merged_fgsm-none-case0\.csv\.gz: made with seed 3"):
        robustness.read(folder)


def test_tables_of_a_run_belong_to_its_models(run):
    folder, images = run
    robustness.write_table(folder, "audit.csv", pd.DataFrame({"model": ["baseline"]}), ["baseline"], [0])
    table = data.load_split(folder / "split.csv")
    lineage.check([folder / "audit.csv"], table)
    train(folder, "baseline", images, seed=2)
    with pytest.raises(
        lineage.StaleError, match=r"audit\.csv: made from another baseline.*\n.*07_robustness_audit"
    ):
        lineage.check([folder / "audit.csv"], table)
    with pytest.raises(lineage.StaleError, match=r"recipes\.csv: missing\n.*05_adversarial"):
        lineage.check([folder / "recipes.csv"], table)


def test_a_damaged_or_unexplained_file_is_named(run):
    folder, images = run
    path = robustness.checkpoint(folder, "baseline")
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(lineage.StaleError, match=r"baseline\.safetensors: damaged"):
        robustness.load(folder, "baseline", images)
    os.remove(path.with_suffix(".json"))
    with pytest.raises(lineage.StaleError, match="has no record of what it was made from"):
        robustness.load(folder, "baseline", images)


def test_starting_weights_learned_from_the_training_side_of_this_split(run, drawn):
    folder, images = run
    train(folder, "source_100X", images)
    assert robustness.starting_weights(folder, "100X").exists()
    split(drawn, folder, seed=1)
    with pytest.raises(lineage.StaleError, match=r"source_100X\.safetensors: made from other train images"):
        robustness.starting_weights(folder, "100X")
    assert robustness.starting_weights(folder, "none") == "none"


def test_predictions_without_a_network_belong_to_the_images_they_were_fitted_to(run, drawn):
    folder, images = run
    robustness.evaluate_without_network(folder, images, ["none"])
    robustness.read(folder, evaluation.WITHOUT_NETWORK)
    test = images.table["split"] == "test"
    other = np.where(~test, "train", "test")  # the same test images, fitted to more
    runs.write_table(folder / "split.csv", images.table.assign(split=other))
    with pytest.raises(
        lineage.StaleError, match=r"color_only-none-case0\.csv\.gz: made from other train images"
    ):
        robustness.read(folder, evaluation.WITHOUT_NETWORK)


def test_a_data_set_described_by_another_notebook_01_is_named(run):
    folder, _ = run
    table, predictions = data.load_split(folder / "split.csv"), robustness.read(folder)
    lineage.check_dataset("toy", table, predictions)
    with pytest.raises(lineage.StaleError, match=r"dataset\.json describes other images .* run notebooks/01"):
        lineage.check_dataset("toy", table[table["image"] != table["image"][0]], predictions)
    with pytest.raises(lineage.StaleError, match=r"differ in magnification \[100, 200\]: give all notebooks"):
        lineage.check_dataset("toy", table, predictions.assign(magnification=200))


def test_runner_parameters_are_not_recorded_for_results_made_by_hand_later(run, capsys):
    folder, images = run
    noted = {"seed": 0, "image_size": 32, "pgd_steps": 2, "epochs": None, "primary_defense": "merged_fgsm"}
    runs.write_note(folder / "stages" / "03_fgsm_attack.json", {"parameters": noted})
    assert lineage.parameters_used(folder) == noted
    robustness.evaluate(folder, "baseline", images, ["pgd"], epsilons=EPSILONS, steps={"pgd": 3})
    assert lineage.parameters_used(folder) == {}
    assert "the runner used pgd_steps 2, but a notebook run by hand since then 3" in capsys.readouterr().err


@pytest.fixture
def folds(drawn, tmp_path, monkeypatch):
    """A run of two folds with a baseline and its predictions."""
    monkeypatch.setenv("STUDY_HOME", str(tmp_path))
    folder = runs.folder("toy")
    table = splits.make(data.index_images(drawn), None, "case", seed=0)
    runs.write_table(folder / "split.csv", table[table["fold"].isin([0, 1])])
    images = loading.open_images(folder / "split.csv", 32)
    for fold in images.folds:
        sides = {"sides": [images.side(side, fold).origin for side in ("train", "validation")]}
        models.save(models.build("none"), robustness.checkpoint(folder, "baseline", fold), sides)
    robustness.evaluate(folder, "baseline", images, ["none", "random_noise"], epsilons=EPSILONS)
    return folder, images


@pytest.mark.parametrize("lost", ["random_noise-case0", "random_noise-case1", "none-case1"])
def test_folds_are_pooled_only_where_each_was_shown_the_same(folds, lost):
    """An interrupted notebook leaves some folds without an attack, or at other epsilons."""
    folder, images = folds
    assert len(robustness.read(folder)) == 2 * sum(len(images.side("test", fold)) for fold in images.folds)
    runs.discard(folder / "predictions" / f"baseline-{lost}.csv.gz")
    with pytest.raises(lineage.StaleError, match=f"fold {lost[-1]} was not shown the same attack"):
        robustness.read(folder)


def test_folds_at_other_epsilons_are_not_pooled(folds):
    folder, images = folds
    first = loading.Images(images.table[images.table["fold"] == 0], images.pixels)
    robustness.evaluate(folder, "baseline", first, ["random_noise"], epsilons=[8 / 255])
    with pytest.raises(lineage.StaleError, match="fold 1 was not shown the same attack"):
        robustness.read(folder)


def test_fewer_folds_leave_no_pieces_of_the_others(folds):
    folder, images = folds
    table = images.table[images.table["fold"] == 0]
    runs.write_table(folder / "split.csv", table)
    images = loading.open_images(folder / "split.csv", 32)
    robustness.evaluate(folder, "baseline", images, ["none"])
    assert set(robustness.read(folder)["fold"]) == {0}


def test_a_damaged_note_hides_no_piece(run):
    folder, _ = run
    (folder / "predictions" / "baseline-none-case0.json").write_text("{")
    with pytest.raises(
        lineage.StaleError, match=r"baseline-none-case0\.csv\.gz: has no record of what it was made"
    ):
        robustness.read(folder, ["baseline"], ["none", "fgsm"])


def test_what_is_reported_is_the_epsilon_of_training(run):
    folder, _ = run
    path = robustness.checkpoint(folder, "merged_fgsm")
    models.save(models.build("none"), path, runs.recipe_of(path) | {"train_epsilon": 8})
    lineage.check_trained_at(folder, 8.0)
    with pytest.raises(
        lineage.StaleError, match="merged_fgsm was trained at train_epsilon 8, not 4: set train_epsilon"
    ):
        lineage.check_trained_at(folder, 4)
