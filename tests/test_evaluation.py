"""The statistics against outside oracles: scikit-learn, SciPy, scikit-image and a published table."""

import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from skimage.metrics import structural_similarity
from sklearn import metrics as oracle

from lib import checks, evaluation

pytestmark = pytest.mark.filterwarnings("error")


def split_table(labels, cases=None, magnification=100, **columns):
    """Test rows of split.csv; by default each image is a case of its own."""
    count = len(labels)
    cases = [f"14-{k}" for k in range(count)] if cases is None else cases
    images = [f"{k}.png" for k in range(count)]
    table = pd.DataFrame({"image": images, "path": images, "case": cases, "label": labels, "subtype": "A"})
    return table.assign(magnification=magnification, split="test", split_by="case", fold=0).assign(**columns)


def rows(table, margins, model="baseline", attack="none", epsilon=0.0, **more):
    return evaluation.prediction_rows(
        table, model=model, attack=attack, epsilon=epsilon, margins=margins, **{"seed": 0, **more}
    )


def random_table(seed, cases=20):
    """Labels by case, uneven case sizes, and margins that lean toward the truth."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 8, cases)
    label_of_case = np.where(np.arange(cases) % 3 > 0, "malignant", "benign")
    table = split_table(np.repeat(label_of_case, size), np.repeat([f"14-{k}" for k in range(cases)], size))
    margins = rng.normal(size=len(table)) + 0.7 * np.where(table["label"] == "malignant", 1, -1)
    return table, margins.round(1)


def one(frame, **wanted):
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


# ---------------------------------------------------------------- the table


class Shifted(torch.nn.Module):
    """Logits (0, mean - 0.5), but another answer in training mode."""

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.inner = torch.nn.BatchNorm2d(3)

    def forward(self, images):
        margin = (images.mean((1, 2, 3)) - 0.5) * self.scale + 100 * self.training
        return torch.stack([torch.zeros_like(margin), margin], 1)


def test_predict_gives_margins_in_eval_mode_and_restores_every_mode():
    model = Shifted().train()
    model.inner.eval()
    images = torch.rand(7, 3, 8, 8)
    margins = evaluation.predict(model, images, batch_size=3)
    assert margins.dtype == np.float32
    np.testing.assert_allclose(margins, images.mean((1, 2, 3)) - 0.5, atol=1e-6)
    assert model.training
    assert not model.inner.training
    assert model.scale.grad is None
    assert evaluation.predict(model, images[:0]).shape == (0,)


def test_prediction_rows_hold_distances_and_a_sigmoid():
    clean = torch.rand(4, 3, 16, 16, generator=torch.manual_seed(0))
    perturbed = (clean + torch.sign(clean - 0.5) * 4 / 255).clamp(0, 1)
    made = rows(
        split_table(["benign", "malignant"] * 2),
        [0, 2, -1, 80.0],
        "m",
        "fgsm",
        4 / 255,
        clean=clean,
        perturbed=perturbed,
    )
    assert list(made.columns) == evaluation.COLUMNS
    np.testing.assert_allclose(made["p_malignant"], torch.tensor([0, 2, -1, 80.0]).sigmoid(), atol=5e-5)
    np.testing.assert_allclose(made["linf"], (perturbed - clean).abs().amax((1, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(made["l2"], (perturbed - clean).flatten(1).norm(dim=1), rtol=5e-3)
    ssim = [
        structural_similarity(a, b, channel_axis=2, data_range=1)
        for a, b in zip(clean.permute(0, 2, 3, 1).numpy(), perturbed.permute(0, 2, 3, 1).numpy(), strict=True)
    ]
    np.testing.assert_allclose(made["ssim"], ssim, atol=5e-4)
    unperturbed = rows(split_table(["benign"]), [1.0])
    assert unperturbed[["linf", "l2", "ssim"]].isna().all(axis=None)
    assert unperturbed["source_model"].item() == ""


def test_prediction_rows_refuse_what_cannot_be():
    table, clean = split_table(["benign"]), torch.zeros(1, 3, 8, 8)
    with pytest.raises(AssertionError, match="more than"):
        rows(table, [0.0], attack="fgsm", epsilon=1 / 255, clean=clean, perturbed=clean + 1.1 / 255)
    with pytest.raises(ValueError, match="2 margins for 1 images"):
        rows(table, [0.0, 1.0])
    with pytest.raises(ValueError, match="not finite"):
        rows(table, [np.nan])
    with pytest.raises(ValueError, match="both"):
        rows(table, [0.0], clean=clean)
    with pytest.raises(ValueError, match="shape"):
        rows(table, [0.0], clean=clean, perturbed=clean[:, :, :4])


def test_predictions_come_back_from_their_files_bit_for_bit(tmp_path):
    table, margins = random_table(0)
    made = rows(table, margins / 3)
    attacked = rows(table, -margins / 7, attack="transfer_fgsm", epsilon=4 / 255, source_model="baseline")
    made.to_csv(tmp_path / "a-none.csv.gz", index=False)
    attacked.to_csv(tmp_path / "b-transfer.csv.gz", index=False)
    read = evaluation.read_predictions(sorted(tmp_path.iterdir()))
    assert list(read.columns) == evaluation.COLUMNS
    both = pd.concat([made, attacked], ignore_index=True)
    for name in evaluation.COLUMNS:
        got, expected = read[name], both[name]
        if name == "margin":
            got = got.astype(np.float32)
        assert got.equals(expected.astype(got.dtype)), name
    pd.testing.assert_frame_equal(evaluation.metrics(read), evaluation.metrics(both), check_dtype=False)


def test_predictions_that_cannot_be_used_are_named(tmp_path):
    both = [tmp_path / "a.csv.gz", tmp_path / "b.csv.gz"]
    made = rows(split_table(["benign", "malignant"]), [1.0, 2.0])
    made.to_csv(tmp_path / "a.csv.gz", index=False)
    made.to_csv(tmp_path / "b.csv.gz", index=False)
    with pytest.raises(ValueError, match=r"2 predictions are there twice.*0\.png"):
        evaluation.read_predictions(both)
    made.drop(columns="ssim").to_csv(tmp_path / "b.csv.gz", index=False)
    with pytest.raises(ValueError, match=r"b\.csv\.gz.*ssim"):
        evaluation.read_predictions(both)
    made.assign(seed=1, margin=np.nan).to_csv(tmp_path / "b.csv.gz", index=False)
    with pytest.raises(ValueError, match="2 predictions lack a value"):
        evaluation.read_predictions(both)
    with pytest.raises(ValueError, match="Unknown labels"):
        evaluation.metrics(made.assign(label="unsure"))
    with pytest.raises(ValueError, match="there twice"):
        evaluation.metrics(pd.concat([made, made.assign(fold=1)]))


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize("seed", range(5))
def test_metrics_are_scikit_learns(seed):
    table, margins = random_table(seed)
    found = one(evaluation.metrics(rows(table, margins)), subset="all")
    truth, answer = (table["label"] == "malignant").to_numpy(), margins > 0
    expected = {
        "accuracy": oracle.accuracy_score(truth, answer),
        "balanced_accuracy": oracle.balanced_accuracy_score(truth, answer),
        "sensitivity": oracle.recall_score(truth, answer),
        "specificity": oracle.recall_score(~truth, ~answer),
        "precision": oracle.precision_score(truth, answer),
        "auroc": oracle.roc_auc_score(truth, margins),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name
    assert [found[name] for name in ("tn", "fp", "fn", "tp")] == list(
        oracle.confusion_matrix(truth, answer).ravel()
    )
    assert (found["n"], found["n_cases"]) == (len(table), table["case"].nunique())
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]


def test_li_and_liu_table_3():
    """Bioengineering 2023, 10(8), 973, Table 3: 91 malignant test images, percent right."""
    published = {
        ("a", "none"): (90, 98.90),
        ("b", "none"): (88, 96.70),
        ("a", "fgsm"): (10, 10.99),
        ("b", "fgsm"): (25, 27.47),
    }
    table = split_table(["malignant"] * 91 + ["benign"] * 65)
    made = []
    for (model, attack), (right, _) in published.items():
        margins = np.where(np.arange(156) < right, 1.0, -1.0)
        made.append(rows(table, margins, model, attack, 0.0 if attack == "none" else 0.01))
    found = evaluation.metrics(pd.concat(made))
    for (model, attack), (right, percent) in published.items():
        row = one(found, model=model, attack=attack, subset="malignant")
        assert round(100 * row["accuracy"], 2) == percent
        assert (row["n"], row["tp"], row["fn"]) == (91, right, 91 - right)


def test_subsets_are_by_magnification_where_there_are_several():
    table, margins = random_table(1)
    table["magnification"] = np.where(np.arange(len(table)) % 2, 200, 100)
    found = evaluation.metrics(rows(table, margins))
    assert list(found["subset"]) == ["all", "malignant", "100X", "200X"]
    half = (table["magnification"] == 200).to_numpy()
    alone = one(evaluation.metrics(rows(table[half], margins[half])), subset="all")
    pd.testing.assert_series_equal(
        one(found, subset="200X").drop("subset"), alone.drop("subset"), check_names=False
    )
    assert list(evaluation.metrics(rows(table[half], margins[half]))["subset"]) == ["all", "malignant"]


def test_folds_are_pooled_and_only_test_rows_count():
    table, margins = random_table(2)
    folds = table.assign(fold=np.arange(len(table)) % 5)
    others = table.assign(split="validation", image=table["image"] + "v")
    mixed = pd.concat([rows(folds, margins), rows(others, -margins)])
    pd.testing.assert_frame_equal(evaluation.metrics(mixed), evaluation.metrics(rows(table, margins)))


def test_the_published_folds_overlap_and_each_test_of_an_image_counts():
    table, margins = random_table(2)
    folds = pd.concat([table.assign(fold=fold, split_by="fold") for fold in (0, 1)], ignore_index=True)
    both = np.concatenate([margins, -margins])
    attacked = pd.concat([rows(folds, both), rows(folds, both - 0.3, attack="pgd", epsilon=0.01)])
    row = one(evaluation.metrics(attacked), attack="none", subset="all")
    assert row["n"] == 2 * len(table) and row["n_cases"] == table["case"].nunique()
    assert len(evaluation.worst_case(attacked)) == 2 * len(table)
    other = rows(folds, both, model="gaussian_noise")
    assert evaluation.comparisons(pd.concat([attacked, other]))["difference"].tolist() == [0.0]
    with pytest.raises(ValueError, match="twice"):
        evaluation.metrics(attacked.assign(split_by="case"))


def test_the_patient_score_is_the_mean_over_cases():
    table = split_table(["malignant"] * 4 + ["benign"], ["a", "a", "a", "b", "c"])
    row = one(evaluation.metrics(rows(table, [1.0, 1.0, -1.0, -1.0, -1.0])), subset="all")
    assert row["patient_score"] == pytest.approx((2 / 3 + 0 + 1) / 3)


@pytest.mark.parametrize("answers", ["many", "few"])
def test_intervals_of_area_and_patient_score_are_those_of_resampled_tables(answers):
    """Oracle: whole cases drawn image by image, measured by scikit-learn; "few": with ties among the margins."""
    table, margins = random_table(7)
    margins = margins if answers == "many" else margins.round()
    made = rows(table, margins)
    row = one(evaluation.metrics(made, resamples=200, seed=4), subset="all")
    areas, scores = [], []
    malignant = table["label"] == "malignant"
    names = [sorted(table.loc[malignant == kind, "case"].unique()) for kind in (False, True)]
    counts = [evaluation._case_counts(len(each), 200, 4, kind).astype(int) for kind, each in enumerate(names)]
    for drawn in zip(*counts, strict=True):
        times = {case: n for kind in (0, 1) for case, n in zip(names[kind], drawn[kind], strict=True)}
        weight = table["case"].map(times)
        areas.append(oracle.roc_auc_score(malignant, margins, sample_weight=weight))
        by_case = ((margins > 0) == malignant).groupby(table["case"]).mean()
        scores.append(np.average(by_case, weights=by_case.index.map(times)))
    for name, values in (("auroc", areas), ("patient_score", scores)):
        found = [row[f"{name}_low"], row[f"{name}_high"]]
        assert found == pytest.approx(list(np.quantile(values, [0.025, 0.975])), abs=1e-9)
        assert found[0] < row[name] < found[1]


def test_what_does_not_exist_is_null():
    found = evaluation.metrics(rows(split_table(["malignant"] * 6), [1, 1, 1, -1, -1, 1.0]))
    for subset in ("all", "malignant"):
        row = one(found, subset=subset)
        assert row["sensitivity"] == row["accuracy"] == pytest.approx(4 / 6)
        absent = row[["balanced_accuracy", "specificity", "precision", "auroc", "fp", "tn"]]
        assert absent.isna().all()
        assert row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"]
    found = evaluation.metrics(rows(split_table(["benign"] * 6), [-1.0] * 6))
    assert list(found["subset"]) == ["all"]
    assert found.loc[0, "specificity"] == 1
    assert found.loc[0, ["sensitivity", "precision", "tp", "fn"]].isna().all()


def test_models_that_give_one_answer():
    table = split_table(["malignant"] * 6 + ["benign"] * 6)
    always = one(evaluation.metrics(rows(table, np.ones(12))), subset="all")
    assert (always["sensitivity"], always["specificity"], always["auroc"], always["precision"]) == (
        1,
        0,
        0.5,
        0.5,
    )
    never = one(evaluation.metrics(rows(table, -np.ones(12))), subset="all")
    assert np.isnan(never["precision"])
    # A margin of exactly zero is not malignant.
    assert one(evaluation.metrics(rows(table, np.zeros(12))), subset="all")["tn"] == 6


def test_no_predictions_give_empty_tables():
    empty = rows(split_table(["benign"], split="train"), [1.0])
    assert list(evaluation.metrics(empty).columns) == evaluation.METRICS
    assert list(evaluation.comparisons(empty).columns) == evaluation.COMPARISONS
    assert list(evaluation.worst_case(empty).columns) == evaluation.COLUMNS
    assert evaluation.metrics(empty).empty
    assert evaluation.comparisons(empty).empty
    assert evaluation.worst_case(empty).empty
    assert checks.verdicts(empty) == []


# ---------------------------------------------------------------- leakage


def test_leakage_is_the_difference_of_balanced_accuracies_of_resampled_tables():
    """Oracle: whole cases drawn image by image, both splits with them, measured by scikit-learn."""
    table, by_image = random_table(3)
    by_case = by_image + np.random.default_rng(0).normal(size=len(table))
    some = np.arange(len(table)) % 3 > 0  # the split by image tests fewer images
    mine = rows(table, by_case)
    others = rows(table[some].assign(split_by="image"), by_image[some])
    row = one(evaluation.leakage([mine, others], resamples=200, seed=4), model="baseline")

    malignant = table["label"] == "malignant"
    names = [sorted(table.loc[malignant == kind, "case"].unique()) for kind in (False, True)]
    counts = [evaluation._case_counts(len(each), 200, 4, kind).astype(int) for kind, each in enumerate(names)]
    falls = []
    for drawn in [[np.ones(len(each)) for each in names], *zip(*counts, strict=True)]:
        times = {case: n for kind in (0, 1) for case, n in zip(names[kind], drawn[kind], strict=True)}
        weight = table["case"].map(times)
        of_image = oracle.balanced_accuracy_score(
            malignant[some], by_image[some] > 0, sample_weight=weight[some]
        )
        falls.append(of_image - oracle.balanced_accuracy_score(malignant, by_case > 0, sample_weight=weight))
    assert row["leakage"] == pytest.approx(falls[0]) == pytest.approx(row["by_image"] - row["by_case"])
    assert [row["low"], row["high"]] == pytest.approx(list(np.quantile(falls[1:], [0.025, 0.975])))
    assert (row["n_image"], row["n_case"], row["n_cases"]) == (some.sum(), len(table), 20)


def test_leakage_needs_both_splits_and_takes_the_first_table_that_has_one():
    table, margins = random_table(1)
    by_case, by_image = rows(table, margins), rows(table.assign(split_by="image"), margins)
    assert list(evaluation.leakage([by_case]).columns) == evaluation.LEAKAGE
    assert evaluation.leakage([by_case]).empty
    attacked = rows(table.assign(split_by="image"), margins, attack="fgsm", epsilon=0.1)
    assert evaluation.leakage([by_case, attacked]).empty
    row = one(evaluation.leakage([by_case, by_image, by_image.assign(margin=-by_image["margin"])]))
    assert (row["leakage"], row["low"], row["high"]) == (0, 0, 0)
    few, answers = random_table(1, cases=6)
    row = one(evaluation.leakage([rows(few, answers), rows(few.assign(split_by="image"), -answers)]))
    assert np.isfinite(row["leakage"]) and np.isnan([row["low"], row["high"]]).all()


# ---------------------------------------------------------------- intervals


@pytest.mark.parametrize("seed", range(3))
def test_intervals_are_scipys_when_each_case_is_one_image(seed):
    rng = np.random.default_rng(seed)
    sick, well = rng.random(60) < 0.8, rng.random(40) < 0.6
    table = split_table(["malignant"] * 60 + ["benign"] * 40).assign(case=[str(k) for k in range(100)])
    predictions = rows(table, np.where(np.r_[sick, ~well], 1.0, -1.0))
    found = one(evaluation.metrics(predictions, resamples=9999), subset="all")
    for name, image, scipys in [
        ("accuracy", 1 / 100, lambda a, b, axis: (a.sum(axis) + b.sum(axis)) / 100),
        ("balanced_accuracy", 1 / 80, lambda a, b, axis: (a.mean(axis) + b.mean(axis)) / 2),
        ("sensitivity", 1 / 60, lambda a, b, axis: a.mean(axis)),
        ("specificity", 1 / 40, lambda a, b, axis: b.mean(axis)),
        ("precision", 1 / 60, lambda a, b, axis: a.sum(axis) / (a.sum(axis) + (~b).sum(axis))),
    ]:
        expected = stats.bootstrap(
            (sick, well), scipys, vectorized=True, method="percentile", n_resamples=9999, rng=seed
        ).confidence_interval
        got = found[f"{name}_low"], found[f"{name}_high"]
        np.testing.assert_allclose(got, expected, atol=image + 1e-4)


def test_interval_resamples_whole_cases():
    """Ten identical images of a case are one: the interval of the cases, not a narrower one."""
    right, malignant = np.tile([1, 0, 1, 1, 0, 1, 1, 0], 3), np.arange(24) < 12
    cases = np.arange(24)
    alone = evaluation.bootstrap_interval(right, cases, malignant)
    tenfold = evaluation.bootstrap_interval(*(np.repeat(x, 10) for x in (right, cases, malignant)))
    assert alone == pytest.approx(tenfold, abs=1e-12)
    shuffled = np.random.default_rng(0).permutation(24)
    assert alone == evaluation.bootstrap_interval(right[shuffled], cases[shuffled], malignant[shuffled])


def test_interval_needs_five_cases_in_each_class():
    right, cases = np.tile([1.0, 0.0], 10), np.arange(20)
    assert np.isnan(evaluation.bootstrap_interval(right, cases, cases < 4)).all()
    assert np.isfinite(evaluation.bootstrap_interval(right, cases, cases < 5)).all()
    assert np.isnan(evaluation.bootstrap_interval(right, np.minimum(cases, 3), cases < 0)).all()
    assert np.isnan(evaluation.bootstrap_interval([], [], [])).all()


def test_a_case_of_both_classes_is_drawn_whole_and_counts_in_each():
    """A patient may have benign and malignant tissue: such cases are drawn among each other, each with all of its images."""
    rng = np.random.default_rng(0)
    cases, right = np.repeat(np.arange(20), 2), rng.random(40) < 0.7
    malignant = np.tile([True, False], 20)
    found = evaluation.bootstrap_interval(right, cases, malignant)
    assert found == evaluation.bootstrap_interval(right, cases, np.ones(40, bool)), "one stratum of all cases"
    few = np.where(cases < 4, malignant, True)
    assert np.isnan(evaluation.bootstrap_interval(right, cases, few)).all(), "four cases hold benign images"
    assert np.isfinite(
        evaluation.bootstrap_interval(right, cases, np.where(cases < 5, malignant, True))
    ).all()
    table, margins = random_table(3)
    table["case"] = table["case"].where(np.arange(len(table)) > 1, table["case"].iloc[-1])
    whole = one(evaluation.metrics(rows(table, margins, "m", "none", 0.0)), subset="all")
    assert whole[["accuracy_low", "auroc_low", "patient_score_low"]].notna().all()


def test_metrics_of_a_whole_study_take_seconds():
    table, margins = random_table(0, cases=80)
    many = [rows(table, margins, f"m{k}", "pgd", e / 255) for k in range(6) for e in range(1, 26)]
    start = time.perf_counter()
    assert len(evaluation.metrics(pd.concat(many))) == 300
    assert time.perf_counter() - start < 10


# ---------------------------------------------------------------- comparisons


@pytest.mark.parametrize("seed", range(5))
def test_sign_flip_test_is_scipys_permutation_test(seed):
    rng = np.random.default_rng(seed)
    cases = rng.integers(0, 10, 60)
    differences = rng.integers(-1, 2, 60)
    sums = np.bincount(cases, differences)
    expected = stats.permutation_test(
        (sums, np.zeros_like(sums)),
        lambda a, b, axis: (a - b).sum(axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    ).pvalue
    assert evaluation.sign_flip_test(differences, cases) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("better", "worse"), [(9, 2), (3, 3), (0, 6), (1, 0), (40, 20)])
def test_sign_flip_test_is_mcnemars_when_each_case_is_one_image(better, worse):
    differences = [1] * better + [-1] * worse + [0] * 30
    expected = stats.binomtest(better, better + worse).pvalue
    assert evaluation.sign_flip_test(differences, range(len(differences))) == pytest.approx(
        expected, rel=1e-9
    )


def test_sign_flip_test_without_a_difference():
    assert evaluation.sign_flip_test([0, 0], [1, 2]) == 1
    assert evaluation.sign_flip_test([1, -1], [1, 1]) == 1
    assert evaluation.sign_flip_test([], []) == 1


def test_comparisons_pair_the_same_images():
    table, margins = random_table(3)
    better = np.where(np.arange(len(table)) % 3 == 0, np.where(table["label"] == "malignant", 1, -1), margins)
    made = [
        *(rows(table, margins), rows(table, better, "defended")),
        *(rows(table, margins, seed=1), rows(table, margins, "defended", seed=1)),
        *(
            rows(table[:9], -margins[:9], attack="pgd", epsilon=0.1),
            rows(table, margins, "defended", "pgd", 0.1),
        ),
        rows(table, margins, "defended", "transfer_fgsm", 0.1, source_model="baseline"),
    ]
    found = evaluation.comparisons(pd.concat(made))
    assert list(found.columns) == evaluation.COMPARISONS
    assert len(found) == 3
    row = one(found, attack="none", seed=0)
    truth = table["label"] == "malignant"
    change = ((better > 0) == truth).astype(int) - ((margins > 0) == truth).astype(int)
    assert (row["model_a"], row["model_b"]) == ("defended", "baseline")
    assert row["difference"] == pytest.approx(change.mean())
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["p_value"] == evaluation.sign_flip_test(change, table["case"])
    same = one(found, seed=1)
    assert (same["difference"], same["low"], same["high"], same["p_value"]) == (0, 0, 0, 1)
    few = one(found, attack="pgd")
    assert few["n"] == 9
    assert np.isnan(few["low"])


def test_holm_gives_the_published_correction():
    """The textbook example: 0.01, 0.04, 0.03, 0.005 become 0.03, 0.06, 0.06, 0.02."""
    assert evaluation.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert evaluation.holm([0.7, 0.9]).tolist() == [1, 1]
    assert evaluation.holm([]).shape == (0,)


def test_comparisons_are_corrected_within_a_split_and_a_seed():
    table, margins = random_table(4)
    made = [
        rows(table, sign * margins, model, seed=seed)
        for seed in (0, 1)
        for model, sign in (("baseline", 1), ("one", -1), ("other", 1))
    ]
    found = evaluation.comparisons(pd.concat(made))
    for _, own in found.groupby("seed"):
        assert own["p_holm"].tolist() == evaluation.holm(own["p_value"]).tolist()
        assert (own["p_holm"] >= own["p_value"]).all() and len(own) == 2


def test_the_main_comparisons_are_corrected_by_themselves():
    table, margins = random_table(4, cases=24)
    rng = np.random.default_rng(0)
    models = {"baseline": 0.0, "merged_fgsm": 0.3, "adversarial_training": 0.8, "color_only": 0.1}
    toward = np.where(table["label"] == "malignant", 1, -1)
    made = []
    for model, shift in models.items():
        for attack, k in (("none", 0), ("pgd", 3), ("pgd", 8), ("random_noise", 3)):
            moved = margins + shift * toward + rng.normal(size=len(table))
            made.append(rows(table, moved, model, attack, k / 255))
    everything = evaluation.with_worst_case(pd.concat(made))
    found = evaluation.comparisons(everything, "adversarial_training", 4 / 255)
    main = found[found["p_main"].notna()]
    pairs = set(zip(main["model_a"], main["model_b"], main["attack"], main["epsilon"], strict=True))
    assert pairs == {
        (a, b, *test)
        for a, b in [
            ("merged_fgsm", "baseline"),
            ("adversarial_training", "baseline"),
            ("adversarial_training", "merged_fgsm"),
        ]
        for test in (("none", 0.0), ("worst_case", 3 / 255))
    }, "not color only, and not at another epsilon"
    assert main["p_main"].tolist() == evaluation.holm(main["p_value"]).tolist()


def test_no_headline_is_below_one_gray_level_where_another_epsilon_is():
    asked = [
        0.25 / 255,
        0.5 / 255,
        0.0039215,
        8 / 255,
    ]  # the third is 1/255, as a table with fewer digits holds it
    assert evaluation.nearest(asked, 0.25 / 255) == asked[2]
    assert evaluation.nearest(asked, 4 / 255) == asked[2], "the smaller of two as near"
    assert evaluation.nearest(asked, 6 / 255) == asked[3]
    assert evaluation.nearest([0.0, 0.25 / 255], 4 / 255) == 0.25 / 255, "there is no other"
    assert evaluation.visible(asked) == asked[2:] and evaluation.visible(asked[:2]) == asked[:2]
    assert evaluation.middle([8 / 255, 0.25 / 255, 0.5 / 255]) == 8 / 255
    assert evaluation.middle([64 / 255, 2 / 255, 4 / 255, 8 / 255]) == 8 / 255, "whatever their order"

    table, margins = random_table(4)
    made = [
        rows(table, margins * sign, model, attack, k / 255)
        for model, sign in (("baseline", 1), ("adversarial_training", -1))
        for attack, k in (("none", 0), ("pgd", 0.25), ("pgd", 2))
    ]
    everything = evaluation.with_worst_case(pd.concat(made))
    found = evaluation.comparisons(everything, "adversarial_training", 0.25 / 255)
    main = found[found["p_main"].notna() & (found["attack"] == "worst_case")]
    assert main["epsilon"].tolist() == [2 / 255]
    assert found["p_holm"].tolist() == evaluation.holm(found["p_value"]).tolist()
    rates = evaluation.metrics(everything).query("subset == 'all'").set_index(["model", "attack", "epsilon"])
    for row in main.to_dict("records"):
        a, b = (rates.loc[(row[name], row["attack"], row["epsilon"])] for name in ("model_a", "model_b"))
        assert row["difference"] == pytest.approx(a["accuracy"] - b["accuracy"])
        change = a["balanced_accuracy"] - b["balanced_accuracy"]
        assert row["balanced_difference"] == pytest.approx(change)
        assert row["balanced_difference_low"] <= change <= row["balanced_difference_high"]


# ---------------------------------------------------------------- the worst case


def by_hand():
    """Four images; the columns are clean, FGSM 1, PGD 1, FGSM 2; image 3 was not given to PGD."""
    table = split_table(["malignant", "malignant", "benign", "malignant"])
    runs = {
        ("none", 0.0): [3.0, -1.0, -3.0, 1.0],
        ("fgsm", 1 / 255): [2.0, -2.0, 0.5, 1.0],
        ("pgd", 1 / 255): [1.5, -3.0, 2.5, 1.0],
        ("fgsm", 2 / 255): [-1.0, -4.0, -2.0, 1.0],
    }
    made = []
    for (attack, epsilon), margins in runs.items():
        use = slice(0, 3 if attack == "pgd" else 4)
        made.append(rows(table[use], margins[use], attack=attack, epsilon=epsilon))
    return pd.concat(made)


def test_worst_case_by_hand():
    worst = evaluation.worst_case(by_hand())
    assert list(worst.columns) == evaluation.COLUMNS
    assert set(worst["attack"]) == {"worst_case"}
    assert set(worst["source_model"]) == {""}
    first, second = (worst[worst["epsilon"] == k / 255].set_index("image")["margin"] for k in (1, 2))
    # 0 stands (nearest: PGD), 1 was wrong clean, 2 fell at 1/255 (most wrong: PGD); 3 did not see every attack.
    assert first.to_dict() == {"0.png": 1.5, "1.png": -1.0, "2.png": 2.5}
    # At 2/255 image 0 falls; image 2 stays fooled although FGSM at 2/255 missed it.
    assert second.to_dict() == {"0.png": -1.0, "1.png": -1.0, "2.png": 2.5}
    accuracy = evaluation.metrics(worst).query("subset == 'all'").set_index("epsilon")["accuracy"]
    assert accuracy.round(6).to_dict() == {1 / 255: round(1 / 3, 6), 2 / 255: 0.0}


def test_in_the_worst_case_an_image_that_nothing_changed_is_whole_in_8_bits():
    """Of four images one is wrong clean, one falls and stands again when saved, one falls for good, one stands."""
    table = split_table(["malignant"] * 4)
    clean = rows(table, [-1, 1, 1, 1])
    attacked = rows(table, [-2, -1, -1, 0.5], attack="pgd", epsilon=0.1, margins_8bit=[-2, 1, -1, 0.5])
    found = one(evaluation.metrics(evaluation.worst_case(pd.concat([clean, attacked]))), subset="all")
    assert (found["accuracy"], found["accuracy_8bit"]) == (0.25, 0.5)
    unknown = attacked.assign(right_8bit=clean["right_8bit"])
    found = one(evaluation.metrics(evaluation.worst_case(pd.concat([clean, unknown]))), subset="all")
    assert np.isnan(found["accuracy_8bit"])
    # The first image to fall falls in a stronger attack for good; of one attack nothing is known in 8 bits.
    stronger = attacked.assign(epsilon=0.2, margin=-3.0, right_8bit=0)
    found = evaluation.metrics(evaluation.worst_case(pd.concat([clean, attacked, stronger])))
    assert one(found, subset="all", epsilon=0.2)["accuracy_8bit"] == 0
    found = evaluation.metrics(evaluation.worst_case(pd.concat([clean, unknown, stronger])))
    assert found["accuracy_8bit"].isna().all()


def test_worst_case_does_not_depend_on_row_order_and_ignores_itself():
    made = by_hand()
    worst = evaluation.worst_case(made)
    again = evaluation.worst_case(pd.concat([worst, made]).sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(worst, again)
    assert evaluation.worst_case(made[made["attack"] != "none"]).empty
    assert evaluation.worst_case(made[made["attack"] == "none"]).empty
    assert evaluation.worst_case(made[made["attack"] != "pgd"]).empty, "one step is no worst case"


@pytest.mark.parametrize("seed", range(3))
def test_worst_case_is_never_better_than_any_attack(seed):
    rng = np.random.default_rng(seed)
    table, margins = random_table(seed)
    made = [rows(table, margins)]
    for attack in ("fgsm", "pgd"):
        for e in (1, 4):
            changed, rounded = (margins - rng.normal(size=len(table)) for _ in range(2))
            made.append(rows(table, changed, attack=attack, epsilon=e / 255, margins_8bit=rounded))
    made = pd.concat(made)
    truth = made["label"] == "malignant"
    wrong = made[(made["margin"] > 0) != truth]
    worst = evaluation.metrics(evaluation.worst_case(made)).query("subset == 'all'").set_index("epsilon")
    for epsilon in (1 / 255, 4 / 255):
        fooled = wrong.loc[wrong["epsilon"] <= epsilon, "image"].nunique()
        assert worst.loc[epsilon, "accuracy"] == pytest.approx(1 - fooled / len(table))
        fallen = (made["right_8bit"] == 0).fillna(False) | (
            (made["attack"] == "none") & ((made["margin"] > 0) != truth)
        )
        fooled = made.loc[(made["epsilon"] <= epsilon) & fallen, "image"].nunique()
        assert worst.loc[epsilon, "accuracy_8bit"] == pytest.approx(1 - fooled / len(table))


def test_margin_falls_by_hand():
    table = split_table(["malignant", "benign", "malignant"])
    made = pd.concat([rows(table, [3.0, -1, 2]), rows(table, [1.0, 1, -2], attack="fgsm", epsilon=4 / 255)])
    found = one(evaluation.margin_falls(made), model="baseline")
    assert (found["clean"], found["fgsm"], found["fall"]) == (2.0, -1.0, 2.0)


# ---------------------------------------------------------------- for files


def test_records_are_strict_json():
    table = split_table(["malignant"] * 3 + ["benign"])
    made = pd.concat([rows(table, [1.0, 2, -1, -1]), rows(table, [1.0, 1, 1, -1], "other")])
    lists = [evaluation.metrics(made), evaluation.comparisons(made), checks.verdicts(made), made]
    text = json.dumps([evaluation.records(frame) for frame in lists], allow_nan=False)
    row = json.loads(text)[0][1]
    assert list(row) == evaluation.METRICS
    assert (row["n"], row["tp"], row["fp"], row["auroc"], row["accuracy_low"]) == (3, 2, None, None, None)
    assert row["accuracy"] == 0.666667
    values = pd.DataFrame({"x": [np.inf, 1e-9 / 3, 2 / 3]})
    assert evaluation.records(values) == [{"x": None}, {"x": 3.33333e-10}, {"x": 0.666667}]
