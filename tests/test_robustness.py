import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from lib import (
    attacks,
    checks,
    data,
    evaluation,
    loading,
    models,
    robustness,
    runs,
    splits,
    training,
)

EPSILONS = [2 / 255, 8 / 255]


@pytest.fixture(scope="module")
def run(drawn, tmp_path_factory):
    """A run folder with two untrained models, and its images."""
    folder = tmp_path_factory.mktemp("run")
    index = data.index_images(drawn)
    table = splits.make(index, None, "case", seed=0)
    table[table["fold"] == 0].to_csv(folder / "split.csv", index=False)
    images = loading.open_images(folder / "split.csv", 32)
    for k, name in enumerate(("baseline", "defended")):
        models.save(models.build("none", seed=k), folder / "models" / f"{name}.safetensors", made_for(images))
    return folder, images


def made_for(images):
    """What the recipe of a model says that learned from these images."""
    return {"sides": [images.side(split).origin for split in set(images.table["split"])]}


def test_every_attack_gives_a_row_for_each_image_and_epsilon(run):
    folder, images = run
    rows = robustness.evaluate(
        folder,
        "defended",
        images,
        ["none", *robustness.AT_EVERY_EPSILON],
        epsilons=EPSILONS,
        steps={"pgd": 2},
    )
    test = images.side("test")
    assert rows.groupby(["attack", "epsilon"]).size().eq(len(test)).all()
    assert len(rows) == len(test) * 9
    attacked = rows[rows["attack"] != "none"]
    assert (attacked["linf"] <= attacked["epsilon"] + 1e-6).all() and attacked["ssim"].between(0, 1).all()
    assert set(rows.loc[rows["attack"] == "transfer_fgsm", "source_model"]) == {"baseline"}
    clean = rows[rows["attack"] == "none"]
    model = models.load(folder / "models" / "defended.safetensors")
    assert np.allclose(clean["margin"], evaluation.predict(model, test.tensors()[0]), rtol=1e-3)
    assert clean[["linf", "l2", "ssim"]].isna().all(axis=None)
    keys = ["image", "attack", "epsilon"]
    reread, rows = (part.sort_values(keys, ignore_index=True) for part in (robustness.read(folder), rows))
    pd.testing.assert_frame_equal(reread, rows[list(reread)], check_dtype=False)


def test_finished_rows_are_kept_and_a_changed_checkpoint_is_judged_anew(run):
    folder, images = run
    options = {"epsilons": EPSILONS, "steps": {"pgd": 2}}
    robustness.evaluate(folder, "baseline", images, ["none", "pgd"], **options)
    piece = folder / "predictions" / "baseline-pgd-8-case0.csv.gz"
    written = piece.stat().st_ino
    robustness.evaluate(folder, "baseline", images, ["none", "pgd"], **options)
    assert piece.stat().st_ino == written
    models.save(models.build("none", seed=9), folder / "models" / "baseline.safetensors", made_for(images))
    robustness.evaluate(folder, "baseline", images, ["none", "pgd"], **options)
    assert piece.stat().st_ino != written


def test_models_without_a_network_are_shown_the_baselines_images(run):
    folder, images = run
    malignant, color = robustness.evaluate_without_network(
        folder, images, evaluation.NOT_AIMED, epsilons=EPSILONS
    )
    assert (malignant["margin"] > 0).all() and set(color["model"]) == {"color_only"}
    assert set(color["attack"]) == set(evaluation.NOT_AIMED)


def test_color_only_is_judged_anew_when_its_training_images_change(run, tmp_path):
    folder, images = run
    color = robustness.evaluate_without_network(folder, images, ["none"])[1]
    table = images.table
    left_out = table.index[(table["split"] == "train") & (table["label"] == "benign")][:4]
    fewer = loading.Images(
        table.drop(left_out),
        loading.Pixels(images.pixels.stored, images.pixels.rows[[k not in left_out for k in table.index]]),
    )
    again = robustness.evaluate_without_network(folder, fewer, ["none"])[1]
    assert (again["margin"] != color["margin"]).any()


@pytest.mark.parametrize("epsilon", [2 / 255, 2.5 / 255])
def test_the_margin_in_8_bits_is_that_of_the_rounded_images(epsilon, run, monkeypatch):
    """A whole epsilon leaves nothing to round, so the model is shown these images once."""
    folder, images = run
    batch, labels = images.side("test").tensors()
    model = models.load(folder / "models" / "defended.safetensors")
    (made,) = robustness.perturb(model, batch, labels, "fgsm", [epsilon])
    expected = evaluation.predict(model, robustness.in_8_bits(made))
    shown, predict = [], evaluation.predict
    monkeypatch.setattr(evaluation, "predict", lambda model, x: shown.append(len(x)) or predict(model, x))
    rows = robustness.evaluate(folder, "defended", images, ["fgsm"], epsilons=[epsilon])
    assert rows["right_8bit"].tolist() == evaluation.is_right(rows, expected).tolist()
    assert sum(shown) == len(batch) * (1 if epsilon == 2 / 255 else 2)


STEPS = {"pgd": 2, "apgd_ce": 3, "fab": 3, "square": 20}


def test_the_cascade_goes_on_from_pgd_and_keeps_what_was_fooled(run):
    folder, images = run
    epsilon, count = EPSILONS[1:], len(images.side("test"))
    with pytest.raises(FileNotFoundError, match="run fab first"):
        robustness.evaluate(folder, "defended", images, ["square"], epsilons=epsilon, steps=STEPS)
    rows = robustness.evaluate(
        folder, "defended", images, ["pgd", *evaluation.CASCADE], epsilons=epsilon, steps=STEPS
    )
    by_attack = [rows[rows["attack"] == name].reset_index(drop=True) for name in ("pgd", *evaluation.CASCADE)]
    assert [len(part) for part in by_attack] == [count] * 4
    for before, after in itertools.pairwise(by_attack):
        fooled = ~evaluation.is_right(before)
        assert before["image"].tolist() == after["image"].tolist()
        columns = [name for name in evaluation.COLUMNS if name != "attack"]
        stays = fooled | evaluation.is_right(after)
        pd.testing.assert_frame_equal(
            before.loc[stays, columns], after.loc[stays, columns], check_dtype=False
        )
        assert not evaluation.is_right(after)[fooled].any()
    assert (rows["linf"] <= rows["epsilon"] + 1e-6).all() and rows["right_8bit"].notna().all()


def test_an_attack_that_is_left_out_leaves_no_gap(run):
    folder, images = run
    steps = {"pgd": 2, "apgd_ce": 0, "fab": 0, "square": 20}
    options = {"epsilons": EPSILONS[:1], "steps": steps}
    rows = robustness.evaluate(folder, "defended", images, ["pgd", "square"], **options)
    right = evaluation.is_right(rows).groupby(rows["attack"]).sum()
    assert right["square"] <= right["pgd"] and (rows["attack"] == "square").sum() == len(images.side("test"))


def test_nothing_left_to_fool_is_no_error(run):
    folder, images = run
    side = images.side("test")
    piece = folder / "predictions" / "defended-pgd-8-case0.csv.gz"
    robustness.evaluate(folder, "defended", images, ["pgd"], epsilons=EPSILONS[1:], steps=STEPS)
    fooled = evaluation.read_piece(piece)
    fooled["margin"] = np.where(fooled["label"] == "malignant", -1.0, 1.0)
    evaluation.write_piece(fooled, piece)
    runs.write_recipe(piece, runs.recipe_of(piece))
    rows = robustness.evaluate(
        folder, "defended", images, evaluation.CASCADE, epsilons=EPSILONS[1:], steps=STEPS
    )
    assert len(rows) == 3 * len(side) and not evaluation.is_right(rows).any()


def test_images_of_another_model_are_a_transfer_of_their_own(run):
    folder, images = run
    options = {"epsilons": EPSILONS, "source": "defended"}
    rows = robustness.evaluate(folder, "baseline", images, ["transfer_fgsm"], **options)
    assert set(rows["source_model"]) == {"defended"} and len(rows) == 2 * len(images.side("test"))
    assert (folder / "predictions" / "baseline-transfer_fgsm-from_defended-case0.csv.gz").exists()


PLANTED = "adversarial_training"  # the name under which models made to be caught are audited


class Masked(torch.nn.Module):
    """A model that looks at a hundred gray levels only: its gradient is zero, but it is no harder to fool."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        seen = (images * 100).round() / 100
        margin = (seen[:, 0].mean((1, 2)) - seen[:, 2].mean((1, 2))) * self.weight
        return torch.stack([torch.zeros_like(margin), margin], 1)


class Overfitted(torch.nn.Module):
    """A margin that falls within one small step and rises again: it stands where FGSM lands and falls on the way there."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, images):
        red = images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
        margin = red.sign() * (0.05 * torch.cos(red.abs() * 90) + 0.02) * self.weight
        return torch.stack([torch.zeros_like(margin), margin], 1)


def audited(model, folder, images, monkeypatch):
    """All attacks on a planted model, and the checks on what they found, by name."""
    monkeypatch.setattr(models, "load", lambda path: model)
    options = {"epsilons": [4 / 255, 64 / 255], "steps": STEPS | {"pgd": 5, "square": 100}}
    rows = robustness.evaluate(folder, PLANTED, images, ["none", *robustness.AT_EVERY_EPSILON], **options)
    options["epsilons"] = options["epsilons"][:1]
    cascade = robustness.evaluate(folder, PLANTED, images, evaluation.CASCADE, **options)
    settings = [(5, 1, 0.5), (20, 4, 0.125)]
    steps = robustness.pgd_by_steps(folder, PLANTED, images, 4 / 255, settings, among=4)
    found = checks.verdicts(pd.concat([rows, cascade]), steps)
    return {check["name"]: check for check in found}


@pytest.fixture
def colored(run, tmp_path):
    """Images of which the classes differ a little in red and blue, and a checkpoint that only has to be there."""
    rng = np.random.default_rng(0)
    table = run[1].side("test").table.reset_index(drop=True)
    shade = np.where(table["label"] == "malignant", 6, -6)[:, None, None]
    pixels = rng.integers(100, 140, (len(table), 16, 16, 3))
    pixels[...] = pixels[..., :1]
    pixels[..., 0] += shade
    images = loading.Images(table, loading.Pixels(pixels.astype(np.uint8), np.arange(len(table))))
    for name in (PLANTED, "baseline"):
        models.save(models.build("none"), tmp_path / "models" / f"{name}.safetensors", made_for(images))
    return tmp_path, images


def test_a_planted_masked_model_is_caught(colored, monkeypatch):
    found = audited(Masked(), *colored, monkeypatch)
    assert found["gradients are there"]["verdict"] == "fails"
    assert found["an attack without gradients finds little more"]["verdict"] == "fails"
    assert found["a huge epsilon turns everything"]["verdict"] == "fails"


def test_a_planted_overfitted_model_is_caught(colored, monkeypatch):
    found = audited(Overfitted(), *colored, monkeypatch)
    assert found["no catastrophic overfitting"]["verdict"] == "fails"
    assert found["gradients are there"]["verdict"] == "holds"


def test_pgd_by_steps_counts_images_and_gradients_and_is_kept(run, monkeypatch):
    folder, images = run
    settings = [(1, 0, 1.0), (3, 1, 0.5)]
    found = robustness.pgd_by_steps(folder, "defended", images, EPSILONS[1], settings, among=3)
    assert list(found.columns) == checks.AUDIT and (found["n"] == 3).all()
    assert found["steps"].dtype == found["restarts"].dtype == int
    assert found[["steps", "restarts", "step_size"]].to_numpy().tolist() == [
        [0, 0, 0],
        [1, 0, 1],
        [3, 1, 0.5],
    ]
    assert found["accuracy"].is_monotonic_decreasing
    assert (
        found["zero_gradient"].notna().tolist() == [True, False, False] and found["zero_gradient"][0] < 0.05
    )
    monkeypatch.setattr(robustness, "_load", None)
    options = (folder, "defended", images, EPSILONS[1])
    pd.testing.assert_frame_equal(robustness.pgd_by_steps(*options, settings, among=3), found)
    with pytest.raises(TypeError):
        robustness.pgd_by_steps(*options, settings[:1], among=3)


def test_votes_under_noise_are_the_models_answers_and_are_kept(run, monkeypatch):
    folder, images = run
    found = robustness.vote_under_noise(folder, "defended", images, 0.0, 5, among=4)
    shown = images.side("test")
    network = models.load(folder / "models" / "defended.safetensors")
    answers = dict(
        zip(shown.table["image"], evaluation.predict(network, shown.tensors()[0]) > 0, strict=True)
    )
    assert len(found) == 4 and found["votes"].tolist() == [5 * answers[image] for image in found["image"]]
    assert set(found["model"]) == {"defended"} and set(found["samples"]) == {5}
    monkeypatch.setattr(robustness, "_load", None)
    again = robustness.vote_under_noise(folder, "defended", images, 0.0, 5, among=4)
    pd.testing.assert_frame_equal(again, found)
    assert robustness.vote_under_noise(folder, "defended", images, 0.0, 5, among=0).empty


def test_pieces_of_other_epsilons_go_and_other_models_and_sides_stay(run):
    folder, images = run
    options = {"steps": {"pgd": 2}}
    robustness.evaluate(folder, "baseline", images, ["none", "pgd"], epsilons=EPSILONS, **options)
    robustness.evaluate(folder, "baseline", images, ["pgd"], side="validation", epsilons=EPSILONS, **options)
    robustness.evaluate(folder, "defended", images, ["pgd"], epsilons=EPSILONS, **options)
    before = {path.name for path in (folder / "predictions").iterdir()}
    robustness.evaluate(folder, "baseline", images, ["none", "pgd"], epsilons=EPSILONS[1:], **options)
    gone = before - {path.name for path in (folder / "predictions").iterdir()}
    assert gone == {"baseline-pgd-2-case0.csv.gz", "baseline-pgd-2-case0.json"}


def test_gaussian_noise_stands_beside_the_clean_rows_that_are_kept(run):
    folder, images = run
    names = ("baseline", "defended")
    found = robustness.under_gaussian_noise(folder, names, images, 0.2, seed=3)
    assert list(found["model"]) == ["baseline", "baseline", "defended", "defended"]
    assert list(found["sigma"]) == [0, 0.2, 0, 0.2]
    still = robustness.under_gaussian_noise(folder, names, images, 0.0, seed=3)
    assert (still["auroc"].to_numpy() == found.loc[found["sigma"] == 0, "auroc"].repeat(2).to_numpy()).all()
    shown = images.side("test")
    generator = torch.Generator().manual_seed(3)
    noisy = training.add_gaussian_noise(0.2)(None, shown.tensors()[0], None, generator)
    network = models.load(folder / "models" / "defended.safetensors")
    right = (evaluation.predict(network, noisy) > 0) == (shown.labels == 1)
    assert found["accuracy"].iloc[3] == right.mean()


def test_examples_hold_one_image_that_turns_and_one_that_stands_of_each_class():
    """The margin is the distance of the red mean from a threshold: which images turn at which epsilon is known."""

    class Red(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, images):
            margin = (images[:, 0].mean((1, 2)) - 0.5) * self.weight
            return torch.stack([torch.zeros_like(margin), margin], 1)

    red = np.array([0.4, 0.2, 0.49, 0.6, 0.51, 0.45])  # the last malignant one is wrong as it is
    pixels = np.broadcast_to((255 * red).round()[:, None, None, None], (6, 8, 8, 3)).astype(np.uint8)
    side = loading.Side(None, pixels, np.array([0, 0, 0, 1, 1, 1]), "")
    assert robustness.examples(Red(), side, 8 / 255) == [2, 0, 4, 3]
    assert robustness.examples(Red(), side, 0.0) == [0, 1, 3, 4], "none turns"
    assert robustness.examples(Red(), side, 64 / 255) == [0, 1, 3, 4], "the second benign one stands"
    two = loading.Side(None, pixels[[0, 3]], np.array([0, 1]), "")
    assert robustness.examples(Red(), two, 8 / 255) == [0, 0, 1, 1], "the only one of a class"


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "square"])
def test_a_model_is_attacked_where_it_is(monkeypatch, attack):
    """Notebooks and explorer keep models on the CPU where there is a GPU too; the device without data stands for it."""
    monkeypatch.setattr(training, "device", lambda: torch.device("meta"))
    images, labels = torch.rand(2, 3, 16, 16), torch.tensor([0, 1])
    (made,) = robustness.perturb(Counted().eval(), images, labels, attack, [4 / 255], steps=2)
    assert made.shape == images.shape and (made - images).abs().max() <= 4 / 255 + 1e-6


def test_noise_is_the_same_alone_and_in_a_row_of_epsilons(run):
    images = torch.rand(4, 3, 32, 32)
    both = robustness.perturb(None, images, None, "random_noise", EPSILONS, seed=3)
    (alone,) = robustness.perturb(None, images, None, "random_noise", EPSILONS[1:], seed=3)
    assert torch.equal(both[1], alone)
    assert not torch.equal(
        alone, robustness.perturb(None, images, None, "random_noise", EPSILONS[1:], seed=4)[0]
    )


def test_an_unknown_attack_lists_the_known_ones(run):
    with pytest.raises(ValueError, match="transfer_fgsm, apgd_ce"):
        robustness.perturb(None, torch.rand(1, 3, 32, 32), torch.zeros(1), "fgms", EPSILONS)


def test_each_attack_name_is_explained():
    table = robustness.attack_table(EPSILONS, {"pgd": 10})
    whole = robustness.attack_table(EPSILONS, STEPS, EPSILONS[1:])
    assert set(whole["name"]) == set(attacks.DESCRIPTIONS)
    assert whole.set_index("name").loc["square", ["queries", "epsilons"]].tolist() == [23, "8/255"]
    assert (
        set(table["name"])
        == {"none", *robustness.AT_EVERY_EPSILON, "worst_case"}
        <= set(attacks.DESCRIPTIONS)
    )
    assert table.set_index("name").loc["pgd", ["steps", "step_size"]].tolist() == [10, "0.25 epsilon"]


class Counted(torch.nn.Module):
    """A small network that counts its passes, forward and backward."""

    def __init__(self):
        super().__init__()
        self.convolution, self.last, self.passes = torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(4, 2), 0

    def forward(self, images):
        self.passes += 1
        logits = self.last(torch.tanh(self.convolution(images)).mean((2, 3)))
        if logits.requires_grad:
            logits.register_hook(lambda gradient: setattr(self, "passes", self.passes + 1))
        return logits


@pytest.mark.parametrize("attack", ["pgd", *evaluation.CASCADE])
@pytest.mark.parametrize("epsilon", [0.1 / 255, 30 / 255])
def test_no_attack_asks_more_of_the_model_than_the_table_says(attack, epsilon):
    torch.manual_seed(0)
    model, image = Counted().eval(), torch.rand(1, 3, 16, 16)
    label = model(image).argmax(1)
    model.passes = 0
    robustness.perturb(model, image, label, attack, [epsilon], STEPS[attack])
    allowed = robustness.attack_table([epsilon], STEPS, [epsilon]).set_index("name").loc[attack, "queries"]
    assert 1 < model.passes <= allowed
