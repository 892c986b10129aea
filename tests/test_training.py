import contextlib
import io

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lib import attacks, loading, models, runs, training

SETTINGS = {"epochs": 3, "batch_size": 4, "learning_rate": 1e-3, "seed": 7, "precision": "float32"}


class Small(nn.Module):
    """A network small enough to train in a moment, with batch norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(4, 2)

    def forward(self, images):
        return self.head(self.body(images))


def side(n, seed):
    labels = np.arange(n) % 2
    pixels = np.random.default_rng(seed).integers(0, 200, (n, 32, 49, 3), np.uint8)
    pixels[labels == 1] += 50
    table = pd.DataFrame({"image": [f"{seed}-{k}" for k in range(n)]})
    return loading.Side(table, pixels, labels.astype(np.int64), f"side {seed}")


@pytest.fixture
def sides():
    return side(22, 1), side(8, 2)


def test_training_lowers_the_loss_and_keeps_the_best_epoch(sides, tmp_path):
    model = Small()
    before = training.score(model, *sides[1].tensors())[0]
    history = training.train(
        model,
        *sides,
        tmp_path / "models" / "a.safetensors",
        {},
        **SETTINGS | {"epochs": 8, "learning_rate": 0.02},
    )
    after = training.score(model, *sides[1].tensors())[0]
    assert after == pytest.approx(history["validation_loss"].min(), abs=1e-5)
    assert after < before
    assert history["learning_rate"].is_monotonic_decreasing


def test_the_same_seed_gives_the_same_weights(sides, tmp_path):
    models_ = [Small(), Small(), Small()]
    for k, model in enumerate(models_):
        training.train(
            model, *sides, tmp_path / "models" / f"{k}.safetensors", {}, **SETTINGS | {"seed": k // 2}
        )
    one, two, other = (model.head.weight for model in models_)
    assert torch.equal(one, two) and not torch.equal(one, other)


@pytest.mark.parametrize("averaging", [0.0, 0.9])
def test_a_killed_training_goes_on_and_ends_as_an_unbroken_one(averaging, sides, tmp_path, capsys):
    settings = SETTINGS | {"averaging": averaging}
    unbroken, path = Small(), tmp_path / "models" / "a.safetensors"
    expected = training.train(unbroken, *sides, path, {}, **settings)
    calls = []

    def killed(model, images, labels, generator):
        calls.append(1)
        if len(calls) == 9:  # in the second epoch of six batches each
            raise KeyboardInterrupt
        return images

    def harmless(model, images, labels, generator):
        return images

    path = tmp_path / "models" / "b.safetensors"
    with pytest.raises(KeyboardInterrupt):
        training.train(Small(), *sides, path, {}, hook=killed, **settings)
    assert not path.exists()
    resumed = Small()
    history = training.train(resumed, *sides, path, {}, hook=harmless, **settings)
    assert "resumed after epoch 1" in capsys.readouterr().err
    assert all(
        torch.equal(a, b)
        for a, b in zip(unbroken.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), expected.drop(columns="seconds"))
    assert not list(tmp_path.rglob("*.resume"))


def test_averaging_keeps_the_moving_average_of_the_weights(sides, tmp_path):
    steps, model = [], Small()
    noted = register_optimizer_step_post_hook(
        lambda optimizer, *_: steps.append(optimizer.param_groups[0]["params"][-1].detach().clone())
    )
    try:
        path = tmp_path / "models" / "a.safetensors"
        training.train(model, *sides, path, {}, **SETTINGS | {"epochs": 1, "averaging": 0.9})
    finally:
        noted.remove()
    expected = steps[0]
    for bias in steps[1:]:
        expected = 0.9 * expected + 0.1 * bias
    assert len(steps) == 6 and torch.allclose(model.head.bias, expected, atol=1e-7)
    assert not torch.allclose(model.head.bias, steps[-1], atol=1e-5)


def test_a_full_disk_while_training_says_what_to_do_and_loses_nothing(sides, tmp_path, full_disk, capsys):
    path = tmp_path / "models" / "net.safetensors"
    with contextlib.ExitStack() as until_space_is_freed:
        calls = []

        def fill_the_disk_in_the_second_epoch(model, images, labels, generator):
            calls.append(1)
            if len(calls) == 7:
                until_space_is_freed.enter_context(full_disk(1000))
            return images

        with pytest.raises(OSError, match=r"net\.resume.*free some space and run again"):
            training.train(Small(), *sides, path, {}, hook=fill_the_disk_in_the_second_epoch, **SETTINGS)
    assert [file.name for file in path.parent.iterdir()] == ["net.resume"]
    assert len(training.train(Small(), *sides, path, {}, **SETTINGS)) == 3
    assert "resumed after epoch 1" in capsys.readouterr().err


@pytest.fixture
def half_way(sides, tmp_path):
    """The file that a training killed in its second epoch leaves."""

    def killed(model, images, labels, generator):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return images

    calls, path = [], tmp_path / "models" / "net.safetensors"
    with pytest.raises(KeyboardInterrupt):
        training.train(Small(), *sides, path, {}, hook=killed, **SETTINGS)
    return path.with_suffix(".resume")


def flipped(content, at):
    changed = bytearray(content)
    changed[at] ^= 1
    return bytes(changed)


def saved(value):
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"damaged",
        lambda content: b"",
        lambda content: content[:-1],
        *(lambda content, part=part: flipped(content, len(content) * part // 8) for part in range(8)),
        lambda content: saved([1, 2]),  # as an older version could have written
        lambda content: saved({"made": "x", "model": {}}),
    ],
)
def test_a_training_whose_kept_epochs_are_damaged_starts_anew(damage, half_way, sides, capsys):
    half_way.write_bytes(damage(half_way.read_bytes()))
    model, unbroken = Small(), Small()
    path = half_way.with_suffix(".safetensors")
    assert len(training.train(model, *sides, path, {}, **SETTINGS)) == 3
    assert "net.resume is damaged, or of another version: trained from the start" in capsys.readouterr().err
    assert not half_way.exists()
    training.train(unbroken, *sides, path.with_name("other.safetensors"), {}, **SETTINGS)
    assert torch.equal(model.head.weight, unbroken.head.weight)


@pytest.mark.parametrize("name", ["models/net.safetensors", "history/net.csv"])
def test_a_finished_training_that_is_damaged_is_made_anew(name, sides, tmp_path, capsys):
    path = tmp_path / "models" / "net.safetensors"
    training.train(Small(), *sides, path, {}, **SETTINGS)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(flipped(whole, len(whole) - 3))
    assert len(training.train(Small(), *sides, path, {}, **SETTINGS)) == 3
    assert "epoch 3/3" in capsys.readouterr().err
    assert runs.is_whole(tmp_path / name)


def test_a_finished_training_is_kept_and_other_settings_are_not(sides, tmp_path, capsys):
    path = tmp_path / "models" / "a.safetensors"
    training.train(Small(), *sides, path, {}, **SETTINGS)
    training.train(Small(), *sides, path, {}, **SETTINGS)
    assert "already trained" in capsys.readouterr().err
    training.train(Small(), *sides, path, {"noise_sigma": 1}, **SETTINGS)
    assert "epoch 3/3" in capsys.readouterr().err


def test_it_stops_early_without_progress(sides, tmp_path):
    settings = SETTINGS | {"epochs": 50, "learning_rate": 1e-12, "patience": 2}
    model = Small()
    model.body[1].momentum = 0  # nothing moves at all
    assert len(training.train(model, *sides, tmp_path / "models" / "a.safetensors", {}, **settings)) == 3


def test_a_loss_that_is_not_finite_says_what_to_do(sides, tmp_path):
    model = Small()
    model.head.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="learning_rate"):
        training.train(model, *sides, tmp_path / "models" / "a.safetensors", {}, **SETTINGS)


def test_the_guard_goes_back_when_only_fgsm_is_learned(sides, tmp_path, capsys):
    """A planted collapse: from the second epoch on every image is lost under the threat and kept under the guard."""
    epochs = []

    def threat(model, images, labels):
        epochs.append(1)
        return images if len(epochs) == 1 else images * torch.nan

    settings = SETTINGS | {"epochs": 2}
    model = Small()
    model.head.bias.data = torch.tensor([5.0, -5.0])  # half of the validation images right, under the guard
    training.train(
        model,
        *sides,
        tmp_path / "models" / "a.safetensors",
        {},
        threat=threat,
        guard=lambda m, x, y: x,
        **settings,
    )
    # NaN images count as benign: accuracy 0.5; the guard sees 0.5 too, so nothing is lost yet.
    assert "back to the best epoch" not in capsys.readouterr().err
    epochs.clear()

    def wrong(model, images, labels):
        epochs.append(1)
        return (
            images
            if len(epochs) == 1
            else torch.where(labels[:, None, None, None] == 0, 1e4, -1e4).expand(images.shape)
        )

    kept = Small()
    kept.body[1].eval()
    history = training.train(
        kept,
        *side_pair(),
        tmp_path / "models" / "b.safetensors",
        {},
        threat=wrong,
        guard=lambda m, x, y: x,
        **SETTINGS,
    )
    assert "back to the best epoch" in capsys.readouterr().err
    assert history["learning_rate"].iloc[-1] < SETTINGS["learning_rate"] / 2
    assert training.score(kept, *side_pair()[1].tensors())[1] == history["guard_accuracy"].iloc[0]


def side_pair():
    """Two classes that brightness tells apart at once."""
    pair = side(24, 1), side(8, 2)
    for part in pair:
        part.pixels[:] = np.where(part.labels[:, None, None, None] == 1, 230, 20)
    return pair


def test_noise_has_the_given_spread_and_stays_in_range():
    images = torch.full((4, 3, 64, 64), 0.5)
    noisy = training.add_gaussian_noise(0.1)(None, images, None, torch.Generator().manual_seed(0))
    assert (noisy - images).std().item() == pytest.approx(0.1, rel=0.02)
    bright = training.add_gaussian_noise(0.5)(None, images * 2, None, torch.Generator().manual_seed(0))
    assert bright.max() <= 1 and bright.min() >= 0


@pytest.mark.parametrize("drawn", ["anew", "anew_unclipped", "once"])
def test_noise_is_drawn_as_asked(drawn, sides):
    grey, few = sides[0], 4
    grey.pixels[:] = 128
    grey.pixels[:few] = 250
    shown, hook = training.noisy_training(grey, 0.1, drawn, seed=3)
    generator = torch.Generator().manual_seed(0)
    seen = []
    for _ in range(2):
        batch = torch.from_numpy(shown.pixels[:]).permute(0, 3, 1, 2).float() / 255
        seen.append(hook(None, batch, None, generator) if hook else batch)
    assert torch.equal(*seen) == (drawn == "once")
    assert (seen[0][few:] - 128 / 255).std().item() == pytest.approx(0.1, rel=0.02)
    assert (seen[0][:few].max() > 1) == (drawn == "anew_unclipped")
    assert (grey.pixels[few:] == 128).all(), "the images themselves stay"
    if drawn == "once":
        again, _ = training.noisy_training(grey, 0.1, drawn, seed=3)
        other, _ = training.noisy_training(grey, 0.1, drawn, seed=4)
        assert shown.fingerprint == again.fingerprint not in (other.fingerprint, grey.fingerprint)


def test_recalibrating_takes_the_statistics_of_clean_images_and_leaves_the_weights(tmp_path):
    """Turning and flipping squares leaves a channel's mean, so that of all images is known beforehand."""
    images = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), np.uint8)
    clean = loading.Side(pd.DataFrame(), images, np.arange(12) % 2, "clean")
    model = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    nn.init.uniform_(model[0].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "models" / "a.safetensors"
    training.recalibrate(model, clean, path, {"weights": "w"}, batch_size=4)
    after = model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {"0.running_mean", "0.running_var", "0.num_batches_tracked"}
    values = images.reshape(-1, 3) / 255
    assert np.allclose(model[0].running_mean, values.mean(0), atol=1e-5)
    assert np.allclose(model[0].running_var, values.var(0), rtol=0.01)
    assert not model.training and model[0].momentum == 0.1
    written = path.stat().st_ino
    training.recalibrate(model, clean, path, {"weights": "w"}, batch_size=4)
    assert path.stat().st_ino == written
    training.recalibrate(model, clean, path, {"weights": "other"}, batch_size=4)
    assert path.stat().st_ino != written


def test_fresh_examples_change_half_a_batch_within_epsilon_and_leave_statistics():
    model = Small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8) % 2
    changed = training.add_fresh_examples(4 / 255)(model, images, labels, torch.Generator().manual_seed(0))
    assert torch.equal(changed[:4], images[:4])
    assert 0 < (changed[4:] - images[4:]).abs().max() <= 4 / 255 + 1e-6
    assert (
        all(torch.equal(before[name], value) for name, value in model.state_dict().items()) and model.training
    )


@pytest.mark.parametrize("name", ["fgsm", "pgd", "fgsm+noise", "pgd+noise+averaged"])
def test_a_recipe_changes_what_its_name_says(name):
    options, made = training.adversarial_recipe(name, 4 / 255, 0.1)
    model, images, labels = Small().eval(), torch.rand(64, 3, 32, 32), torch.arange(64) % 2
    changed = options["hook"](model, images, labels, torch.Generator().manual_seed(0))
    assert options["averaging"] == (0.97 if "averaged" in name else 0)
    assert 0 < (changed[32:] - images[32:]).abs().max() <= 4 / 255 + 1e-6
    noise = (changed - images)[:32][(images[:32] > 0.4) & (images[:32] < 0.6)]
    assert noise.std().item() == pytest.approx(0.1 if "noise" in name else 0, abs=0.01)
    assert made == {"recipe": name, "noise_sigma": 0.1 if "noise" in name else 0}


def test_more_steps_find_worse_examples():
    """On a linear model the optimum is known in closed form: every channel value at the edge of the ball, against the label."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2))
    images, labels = torch.rand(6, 3, 8, 8) * 0.8 + 0.1, torch.arange(6) % 2
    weights = model[1].weight.detach()
    direction = torch.stack([(weights[1 - label] - weights[label]).reshape(3, 8, 8) for label in labels])
    found = attacks.from_random_start(model, images, labels, 4 / 255, 3, torch.Generator().manual_seed(0))
    assert torch.allclose(found, images + 4 / 255 * direction.sign(), atol=1e-6)


def test_the_merged_set_is_the_originals_and_their_fgsm_images(sides):
    model, train = Small().eval(), sides[0]
    merged = training.merge_fgsm(model, train, 4 / 255, batch_size=5)
    assert merged.fingerprint != training.merge_fgsm(model, train, 5 / 255).fingerprint != train.fingerprint
    assert len(merged) == 44 and merged.labels.tolist() == train.labels.tolist() * 2
    assert np.array_equal(merged.pixels[:22], train.pixels)
    change = merged.pixels[22:].astype(int) - train.pixels
    assert np.abs(change).max() == 4
    whole = torch.from_numpy(train.pixels).permute(0, 3, 1, 2).float() / 255
    (expected,) = attacks.fgsm(model, whole, torch.from_numpy(train.labels), [4 / 255])
    assert np.array_equal(merged.pixels[22:], expected.mul(255).round().byte().permute(0, 2, 3, 1).numpy())


def test_augmentation_moves_pixels_and_changes_none():
    pixels = np.random.default_rng(0).integers(0, 255, (40, 32, 49, 3), np.uint8)
    batch = training.augment(pixels, torch.Generator().manual_seed(0))
    assert batch.shape == (40, 3, 32, 32) and batch.min() >= 0 and batch.max() <= 1
    for row in range(40):
        values = np.sort(batch[row].mul(255).round().byte().numpy().ravel())
        crops = (pixels[row, :, left : left + 32] for left in range(18))
        assert any(np.array_equal(values, np.sort(crop.ravel())) for crop in crops)


def test_stain_jitter_scales_and_shifts_the_density_of_each_channel():
    images = torch.rand(6, 3, 8, 8).clamp(0.2, 0.9)
    changed = training.jitter_stain(images, 0.25, torch.Generator().manual_seed(0))
    density, other = -images.log(), -changed.log()
    for image in range(6):
        for channel in range(3):
            gain, shift = np.polyfit(density[image, channel].flatten(), other[image, channel].flatten(), 1)
            assert abs(gain - 1) <= 0.25 and abs(shift) <= 0.05 + 1e-6
    assert torch.allclose(training.jitter_stain(images, 0.0, None), images, atol=1e-6)
    black_and_white = torch.tensor([0.0, 1.0]).repeat(1, 3, 4, 2)
    assert training.jitter_stain(black_and_white, 0.25, None).isfinite().all()


def test_scale_jitter_shows_a_part_enlarged():
    """On a ramp, the square's place and side are the ramp's offset and slope."""
    ramp = torch.linspace(0, 1, 64).repeat(20, 3, 64, 1)
    images = torch.cat([ramp, ramp.transpose(2, 3)])
    changed = training.jitter_scale(images, 0.5, torch.Generator().manual_seed(0))
    assert changed.shape == images.shape and changed.min() >= 0 and changed.max() <= 1
    inner = changed[:20, 0, 32, 4:-4].diff() * 63
    slopes = inner.mean(1)
    assert torch.allclose(inner, slopes[:, None].expand_as(inner), atol=1e-3)
    assert 0.49 < slopes.min() < 0.6 and 0.9 < slopes.max() <= 1.01
    assert changed[:20, 0, 0].mean(1).std() > 0.02, "squares lie in different places from left to right"
    assert changed[20:, 0, :, 0].mean(1).std() > 0.02, "and from top to bottom"
    assert torch.equal(training.jitter_scale(images, 0.0, torch.Generator()), images)


def test_balanced_rows_are_even_over_classes_and_over_the_cases_of_each():
    cases = np.repeat(["a", "b", "c", "d", "e"], [3000, 100, 500, 10, 390])
    labels = np.isin(cases, ["c", "d", "e"]).astype(np.int64)
    shown = loading.Side(pd.DataFrame({"case": cases}), np.zeros((4000, 1, 1, 3), np.uint8), labels, "uneven")
    rows = training.draw_balanced(shown, torch.Generator().manual_seed(0)).numpy()
    assert len(rows) == 4000 and rows.min() >= 0 and rows.max() < 4000
    shares = pd.Series(cases[rows]).value_counts(normalize=True)
    for case, share in {"a": 1 / 4, "b": 1 / 4, "c": 1 / 6, "d": 1 / 6, "e": 1 / 6}.items():
        assert shares[case] == pytest.approx(share, abs=0.03)
    assert len(set(rows[cases[rows] == "a"])) > 800, "all images of a case are drawn from"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain", {"scale_jitter": 0, "stain_jitter": 0, "balanced": False}),
        ("scale+balanced", {"scale_jitter": 0.5, "stain_jitter": 0, "balanced": True}),
        ("stain", {"scale_jitter": 0, "stain_jitter": 0.25, "balanced": False}),
    ],
)
def test_an_augmentation_is_what_its_name_says_and_changes_a_training(name, options, sides, tmp_path):
    assert training.augmentation(name) == options
    for part in sides:
        part.table["case"] = [f"case {row % 6}" for row in range(len(part))]
    losses = [
        training.train(
            Small(), *sides, tmp_path / str(number) / "models" / "a.safetensors", {}, **SETTINGS, **each
        )["train_loss"].tolist()
        for number, each in enumerate([options, {}])
    ]
    assert (losses[0] == losses[1]) == (name == "plain")


def test_precision_is_what_was_asked_for():
    assert training.training_dtype("float32") == torch.float32
    assert training.training_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="auto, float32 or bfloat16"):
        training.training_dtype("half")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what the CPU can do")
@pytest.mark.parametrize("name", ["amx_bf16", "avx512_bf16", "avx512_f"])
def test_automatic_precision_is_bfloat16_where_the_processor_multiplies_in_it(name, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, name: True})
    assert training.training_dtype("auto") == (torch.bfloat16 if "bf16" in name else torch.float32)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_hook_and_threat_see_the_precision_of_training_and_the_score_is_in_float32(
    precision, sides, tmp_path
):
    """What each forward pass of one epoch computes in, told by the logits it gives."""
    seen = {"hook": set(), "threat": set(), "other": set()}
    by, model = ["other"], Small()
    model.register_forward_hook(lambda module, given, logits: seen[by[0]].add(logits.dtype))

    def asking(who):
        def change(model, images, labels, generator=None):
            by[0] = who
            attacks.margin_gradient(model, images, labels)
            by[0] = "other"
            assert images.dtype == torch.float32
            return images

        return change

    settings = SETTINGS | {"epochs": 1, "precision": precision}
    path = tmp_path / "models" / "a.safetensors"
    training.train(model, *sides, path, {}, hook=asking("hook"), threat=asking("threat"), **settings)
    dtype = getattr(torch, precision)
    assert seen == {"hook": {dtype}, "threat": {dtype}, "other": {dtype, torch.float32}}


def test_densenet_trains_in_bfloat16(sides, tmp_path):
    model = models.build("none")
    settings = SETTINGS | {"epochs": 1, "precision": "bfloat16"}
    history = training.train(model, *sides, tmp_path / "models" / "a.safetensors", {}, **settings)
    assert np.isfinite(history["train_loss"]).all()
