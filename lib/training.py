"""The one training loop. Models differ by the images they are given and by hooks that change a batch before the loss."""

import hashlib
import io
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torchvision.transforms.v2.functional import resized_crop
from tqdm import tqdm

from lib import attacks, data, decoding, models, profiles, runs, splits

# Catastrophic overfitting (Wong et al. 2020): accuracy under FGSM lies further above that under PGD than in the best epoch, by this.
SUDDEN_LOSS = 0.2

# What a recipe with "averaged" keeps of the average at each step: its memory is some thirty steps.
AVERAGING = 0.97

# What an augmentation's parts stand for (`profiles.AUGMENTATIONS`): an option of `train` and its value.
AUGMENTATIONS = {
    "scale": ("scale_jitter", 0.5),
    "stain": ("stain_jitter", 0.25),
    "balanced": ("balanced", True),
}

TIMED = 4  # the batch after which the time of a training is foretold
# Epochs of plain training that take as long as one of adversarial training, its validation under PGD included; measured.
EPOCHS_WORTH = {"fgsm": 2, "pgd": 3}


def device():
    """The GPU where there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training_dtype(precision):
    """torch.bfloat16 or torch.float32 for "bfloat16", "float32" or "auto": bfloat16 where the machine multiplies in it.

    A CPU does with AMX or AVX512-BF16 (half again to twice the images a second); others are no faster in it. Raises ValueError
    for another name.
    """
    if precision not in ("auto", "float32", "bfloat16"):
        raise ValueError(f"Unknown precision {precision!r}: use auto, float32 or bfloat16.")
    if precision == "auto":
        gains = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if torch.cuda.is_available()
            else any(map(torch.cpu.get_capabilities().get, ("amx_bf16", "avx512_bf16")))
        )
        precision = "bfloat16" if gains else "float32"
    return getattr(torch, precision)


def images_ahead(parameters, table):
    """How many images the trainings of a whole study show in all their epochs; adversarial training counts by what it costs.

    parameters: of the study, all; table: its split (`data.load_split`).
    """
    rows = table[(table["split"] == "train") & (table["split_by"] == parameters["split_by"])]
    own = rows[rows["magnification"].isin(parameters["magnifications"] or rows["magnification"])]
    starts = {parameters["pretrained"], *parameters["other_starts"]}
    sources = rows[rows["magnification"].isin(splits.source_magnifications(starts))]
    augmentations = {parameters["augmentation"], *parameters["other_augmentations"]}
    # Gaussian noise at each sigma, and the merged set: twice the images in half the epochs.
    defenses = 1 + len(parameters["other_sigmas"]) + 1
    adversarial = sum(EPOCHS_WORTH[profiles.recipe_parts(recipe)[0]] for recipe in parameters["recipes"])
    in_every_fold = len(augmentations) + defenses + adversarial
    once = (own["fold"] == 0).sum() * (len(starts) - 1)
    return int(parameters["epochs"] * (len(own) * in_every_fold + once + len(sources)))


def seconds_ahead(parameters, split):
    """How long the trainings of a study take on this machine: `images_ahead`, timed on the last of three batches.

    parameters: of the study, all; split: path of its split.csv.
    """
    images = images_ahead(parameters, data.load_split(split))
    size, shown = parameters["image_size"], parameters["batch_size"]
    model = models.build("none").to(device(), memory_format=torch.channels_last).train()
    labels = torch.arange(shown, device=device()) % 2
    for _ in range(3):
        started = time.monotonic()
        batch = torch.rand(shown, 3, size, size).to(device(), memory_format=torch.channels_last)
        with in_precision(training_dtype(parameters["precision"])):
            logits = model(batch)
        loss = cross_entropy(logits.float(), labels)
        loss.backward()
        loss.item()  # waits for a GPU
    return images * (time.monotonic() - started) / shown


def augment(pixels, generator):
    """uint8 (n, S, W, 3) to float32 (n, 3, S, S) in [0, 1]: a random square, flips and right-angle rotations (tissue has no up)."""
    size, width = pixels.shape[1:3]
    draws = torch.stack(
        [torch.randint(0, high, (len(pixels),), generator=generator) for high in (width - size + 1, 2, 4)], 1
    )
    batch = torch.empty(len(pixels), 3, size, size)
    for row, (left, flip, turns) in enumerate(draws.tolist()):
        square = torch.from_numpy(np.ascontiguousarray(pixels[row, :, left : left + size])).permute(2, 0, 1)
        if flip:
            square = square.flip(2)
        batch[row] = square.rot90(turns, (1, 2)).float() / 255
    return batch


def jitter_scale(images, strength, generator):
    """Tissue from nearer: a random square of each image, enlarged to its size (Szegedy et al. 2015).

    images: float32 (n, 3, S, S) in [0, 1]; strength: the square's side is 1 - strength to 1 of the image's.
    """
    size = images.shape[-1]
    changed = torch.empty_like(images)
    draws = torch.rand(len(images), 3, generator=generator).tolist()
    for image, out, (smaller, down, right) in zip(images, changed, draws, strict=True):
        side = round(size * (1 - strength * smaller))
        top, left = (int(share * (size - side + 1)) for share in (down, right))
        out[:] = resized_crop(image, top, left, side, side, [size, size]).clamp(0, 1)
    return changed


def jitter_stain(images, strength, generator):
    """Other stains of the same tissue: the optical density of each channel scaled and shifted at random (Tellez et al. 2018).

    images: float32 (n, 3, S, S) in [0, 1]; strength: the density is scaled by 1 - strength to 1 + strength and shifted by at most
    a fifth of that.
    """
    gain, shift = strength * (2 * torch.rand(2, len(images), 3, 1, 1, generator=generator) - 1)
    density = -torch.log(images.clamp_min(1 / 255))
    return torch.exp(-(density * (1 + gain) + shift / 5)).clamp(0, 1)


def merge_fgsm(model, side, epsilon, batch_size=16):
    """The merged set of Alam et al.: the images of `side`, then their FGSM images for `model` at epsilon (a fraction).

    The images are attacked whole, before cropping, and rounded to 8 bits as a data set on disk would be.
    """
    originals, labels = side.pixels[:], torch.from_numpy(side.labels)
    merged = np.concatenate([originals, originals])
    starts = range(0, len(side), batch_size)
    for start in tqdm(starts, desc="making FGSM images", unit="batch", delay=10):
        rows = slice(start, start + batch_size)
        images = torch.from_numpy(originals[rows]).permute(0, 3, 1, 2).float().div(255).to(device())
        perturbed = next(attacks.fgsm(model, images, labels[rows].to(device()), [epsilon]))
        merged[len(side) :][rows] = perturbed.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    fingerprint = hashlib.sha256(merged).hexdigest()[:12]
    return replace(
        side,
        table=pd.concat([side.table, side.table], ignore_index=True),
        pixels=merged,
        labels=np.concatenate([side.labels, side.labels]),
        fingerprint=fingerprint,
    )


def add_gaussian_noise(sigma, clipped=True):
    """A hook that adds fresh Gaussian noise to every training image in every batch, clipped to [0, 1] or not.

    The defense of Li & Liu (2023, section 3.3) with one difference: their text says "before training the model", which points to
    noise that is drawn once (`store_gaussian_noise`). They give neither sigma nor whether the result is clipped.

    sigma: standard deviation in pixel values of [0, 1].
    """

    def change(model, images, labels, generator):
        noisy = images + sigma * torch.randn(images.shape, generator=generator).to(images.device)
        return noisy.clamp(0, 1) if clipped else noisy

    return change


def store_gaussian_noise(side, sigma, seed=0):
    """The images of `side` with Gaussian noise drawn once, before training and any augmentation, as Li & Liu's text suggests.

    sigma: standard deviation in pixel values of [0, 1]. The noisy images are clipped and have 8 bits, as files would.
    """
    draws = np.random.default_rng(seed)

    def add(image):
        return np.clip(np.rint(image + draws.normal(0, 255 * sigma, image.shape)), 0, 255).astype(np.uint8)

    noisy = np.stack([add(image) for image in side.pixels[:]])
    return replace(side, pixels=noisy, fingerprint=hashlib.sha256(noisy).hexdigest()[:12])


def noisy_training(side, sigma, drawn, seed=0):
    """What a model trained with Gaussian noise is trained on, as (side, hook of `train`).

    drawn: "anew" in each batch, after augmentation, and clipped to [0, 1]; "anew_unclipped"; or "once", before training, which is
    how Li & Liu's text reads (`store_gaussian_noise`).
    """
    if drawn == "once":
        return store_gaussian_noise(side, sigma, seed), None
    return side, add_gaussian_noise(sigma, clipped=drawn == "anew")


def add_fresh_examples(epsilon, steps=1, noise_sigma=0.0):
    """A hook that makes half of each batch adversarial for the model as it is now (`attacks.from_random_start`).

    epsilon: a fraction; noise_sigma: of Gaussian noise on the other half, in pixel values of [0, 1], 0 for none.
    """
    noise = add_gaussian_noise(noise_sigma)

    def change(model, images, labels, generator):
        half = len(images) // 2
        perturbed = attacks.from_random_start(model, images[half:], labels[half:], epsilon, steps, generator)
        rest = noise(model, images[:half], labels[:half], generator) if noise_sigma else images[:half]
        return torch.cat([rest, perturbed])

    return change


def draw_balanced(side, generator):
    """Rows of `side`, as many as it has, drawn with benign and malignant even, and the cases of each even within it."""
    rows = pd.DataFrame({"label": side.labels, "case": side.table["case"].to_numpy()})
    images = rows.groupby(["label", "case"])["case"].transform("size")
    cases = rows.groupby("label")["case"].transform("nunique")
    weights = torch.tensor(1 / (images * cases))
    return torch.multinomial(weights, len(side), replacement=True, generator=generator)


def augmentation(name):
    """The options of `train` for an augmentation: "plain", or parts joined by "+" (`AUGMENTATIONS`), as in "scale+stain".

    Flips, turns and squares are there in any case; "balanced" is `draw_balanced`. Raises ParameterError for another name.
    """
    parts = profiles.augmentation_parts(name)
    return {
        option: value if part in parts else type(value)() for part, (option, value) in AUGMENTATIONS.items()
    }


def adversarial_recipe(name, epsilon, noise_sigma):
    """What a recipe of adversarial training trains with: (options of `train`, what the record must say beside them).

    name: "fgsm" or "pgd" for the examples, then what `profiles.RECIPE_EXTRAS` names, as in "pgd+noise+averaged"; epsilon: a
    fraction in [0, 1]; noise_sigma: in pixel values of [0, 1]. Raises ParameterError for another name.
    """
    attack, *extras = profiles.recipe_parts(name)
    sigma = noise_sigma if "noise" in extras else 0.0
    options = {
        "hook": add_fresh_examples(epsilon, {"fgsm": 1, "pgd": 3}[attack], sigma),
        "averaging": AVERAGING if "averaged" in extras else 0.0,
    }
    return options, {"recipe": name, "noise_sigma": sigma}


def recalibrate(model, side, path, made, *, batch_size, seed=0):
    """Take the running statistics of batch norm anew from the images of `side` without noise, and save the model to `path`.

    A model trained on changed images (noise) normalizes by means and spreads that unchanged images do not have. The weights
    stay. side: `loading.Side`, shown once, in squares, flips and turns; made: what else the result depends on, for the record.
    A finished file is kept.
    """
    made = made | {
        "images": [len(side), side.fingerprint, list(side.pixels[:1].shape[1:])],
        "sides": [side.origin],
        "batch_size": batch_size,
        "seed": seed,
        "code": runs.code_hash(recalibrate, type(model), decoding.decode, type(side)),
    }
    if runs.is_current(path, made):
        return
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(side), generator=generator).numpy()
    batches = [rows for rows in np.split(order, range(batch_size, len(order), batch_size)) if len(rows) > 1]
    shown = (augment(side.pixels[rows], generator) for rows in tqdm(batches, desc="recalibrating", delay=10))
    update_bn(shown, model.to(device()), device())
    models.save(model.eval(), path, made)


def pgd_threat(epsilon, steps=5):
    """The validation images of a model trained against an attacker: PGD with a few steps from the FGSM point."""

    def change(model, images, labels):
        step_size = attacks.pgd_step_size(epsilon, steps)
        return attacks.pgd(model, images, labels, epsilon, steps, step_size, random_starts=0)

    return change


def fgsm_threat(epsilon):
    """The validation images under one FGSM step: what a model that only learned to mislead FGSM still gets right."""
    return lambda model, images, labels: next(attacks.fgsm(model, images, labels, [epsilon]))


def in_precision(dtype):
    """Autocast to torch.bfloat16; for torch.float32 it changes nothing."""
    return torch.autocast(device().type, dtype, enabled=dtype != torch.float32)


def score(model, images, labels, threat=None, batch_size=32, dtype=torch.float32):
    """Mean cross-entropy and accuracy in float32 on `images`, changed in `dtype` by `threat` first where one is given."""
    loss = correct = 0
    with attacks.frozen(model):
        for start in range(0, len(images), batch_size):
            x, y = (part[start : start + batch_size].to(device()) for part in (images, labels))
            if threat:
                with in_precision(dtype):
                    x = threat(model, x, y)
            with torch.no_grad():
                logits = model(x)
            loss += cross_entropy(logits, y, reduction="sum").item()
            correct += (logits.argmax(1) == y).sum().item()
    return loss / len(images), correct / len(images)


def train(
    model,
    side,
    validation,
    path,
    made,
    *,
    epochs,
    batch_size,
    learning_rate,
    seed=0,
    precision="auto",
    scale_jitter=0.0,
    stain_jitter=0.0,
    balanced=False,
    averaging=0.0,
    hook=None,
    threat=None,
    guard=None,
    patience=0,
):
    """Train `model` with Adam; keep the epoch with the least validation loss under `threat`. Returns the history.

    side, validation: `loading.Side`; made: what the numbers below do not say (starting weights, defense), for the record.
    scale_jitter, stain_jitter: strength of `jitter_scale` and `jitter_stain` in the augmentation, 0 for none; balanced: rows by
    `draw_balanced` in place of every image once an epoch. averaging: the share that a moving average of
    weights and batch-norm statistics keeps at each step (Gowal et al. 2020); the average is then what is validated
    and saved; 0 for none. hook(model, images, labels, generator) changes a batch before the loss; threat and guard (model,
    images, labels) change the validation images. Where accuracy under `threat` collapses while that under `guard` stays, the
    loop goes back to its best epoch at half the rate. Stops after `patience` epochs without progress (0: never).

    Writes `path` (.safetensors) and the history as CSV in ../history, each with its recipe beside it. Each finished epoch is kept
    in a .resume file: the same call goes on from there after being killed, and returns at once when all is done.
    """
    path = Path(path)
    history_path = path.parents[1] / "history" / f"{path.stem}.csv"
    made = made | {
        "images": [len(side), side.fingerprint, validation.fingerprint, list(side.pixels[:1].shape[1:])],
        "sides": [side.origin, validation.origin],
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "precision": str(training_dtype(precision)),
        "scale_jitter": scale_jitter,
        "stain_jitter": stain_jitter,
        "balanced": balanced,
        "patience": patience or None,
        "averaging": averaging,
        "code": runs.code_hash(
            train, models.build, type(model), decoding.decode, type(side), hook, threat, guard
        ),
    }
    if runs.is_current(history_path, made) and runs.is_current(path, made):
        print(f"{path.stem}: already trained, kept", file=sys.stderr)
        return pd.read_csv(history_path)

    where, dtype = device(), training_dtype(precision)
    model = model.to(where, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), learning_rate)
    pixels, labels = side.pixels, torch.from_numpy(side.labels)
    held_out = validation.tensors()
    judged, average = model, None
    if averaging:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(averaging), use_buffers=True)
        judged = average.module
    resume = path.with_suffix(".resume")
    state = {"epoch": 0, "best": None, "loss": math.inf, "gap": 0.0, "rate": 1.0, "history": []}
    kept = _read_resume(resume, where)
    if kept and kept["made"] == repr(made):
        state = kept
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if average:
            average.load_state_dict(state["average"])
        print(f"{path.stem}: resumed after epoch {state['epoch']} of {epochs}", file=sys.stderr)

    def stalled():
        losses = [row["validation_loss"] for row in state["history"]]
        return patience > 0 and bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= patience

    begun = state["epoch"]
    while state["epoch"] < epochs and not stalled():
        started = time.monotonic()
        # One generator an epoch: a resumed run draws what an unbroken one would have drawn.
        generator = torch.Generator().manual_seed(seed * 100_003 + state["epoch"])
        every = torch.randperm(len(side), generator=generator)
        order = (draw_balanced(side, generator) if balanced else every).numpy()
        # A last batch of one image has no batch-norm statistics of its own.
        batches = [
            rows for rows in np.split(order, range(batch_size, len(order), batch_size)) if len(rows) > 1
        ]
        model.train()
        loss_sum = correct = seen = 0
        for number, rows in enumerate(batches):
            done = (state["epoch"] + number / len(batches)) / epochs
            # Cosine decay, from the position alone, so that it survives a restart.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * state["rate"] * (1 + math.cos(math.pi * done)) / 2
            images = augment(pixels[rows], generator)
            if scale_jitter:
                images = jitter_scale(images, scale_jitter, generator)
            if stain_jitter:
                images = jitter_stain(images, stain_jitter, generator)
            images = images.to(where, memory_format=torch.channels_last)
            targets = labels[rows].to(where)
            if hook:
                with in_precision(dtype):
                    images = hook(model, images, targets, generator)
            optimizer.zero_grad(set_to_none=True)
            with in_precision(dtype):
                logits = model(images)
            loss = cross_entropy(logits.float(), targets)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"{path.stem}: the loss is {loss.item()} in epoch {state['epoch'] + 1}: lower learning_rate."
                )
            loss.backward()
            optimizer.step()
            if average:
                average.update_parameters(model)
            if state["epoch"] == begun and number == TIMED:
                left = (time.monotonic() - started) / (TIMED + 1) * len(batches) * (epochs - begun)
                if left > 120:
                    print(
                        f"{path.stem}: {epochs - begun} epochs, about {left / 60:.0f} minutes on this machine",
                        file=sys.stderr,
                    )
            loss_sum += loss.item() * len(rows)
            correct += (logits.argmax(1) == targets).sum().item()
            seen += len(rows)

        loss, accuracy = score(judged, *held_out, threat, dtype=dtype)
        row = {
            "epoch": state["epoch"] + 1,
            "learning_rate": optimizer.param_groups[0]["lr"],
            "train_loss": loss_sum / seen,
            "train_accuracy": correct / seen,
            "validation_loss": loss,
            "validation_accuracy": accuracy,
        }
        gap = 0.0
        if guard:
            row["guard_accuracy"] = score(judged, *held_out, guard, dtype=dtype)[1]
            gap = row["guard_accuracy"] - accuracy
        state["epoch"] += 1
        state["history"].append(row | {"seconds": time.monotonic() - started})
        if loss < state["loss"]:
            state |= {
                "loss": loss,
                "gap": gap,
                "best": {name: value.detach().clone() for name, value in judged.state_dict().items()},
            }
        elif gap - state["gap"] > SUDDEN_LOSS:
            for each in (model, judged):
                each.load_state_dict(state["best"])
            optimizer.state.clear()
            state["rate"] /= 2
            print(
                f"{path.stem}: robustness lost under PGD but not under FGSM; back to the best epoch",
                file=sys.stderr,
            )
        print(
            f"{path.stem} epoch {state['epoch']}/{epochs}: loss {row['train_loss']:.3f}, accuracy {row['train_accuracy']:.3f}; "
            f"validation {loss:.3f}, {accuracy:.3f}; {time.monotonic() - started:.0f} s",
            file=sys.stderr,
            flush=True,
        )
        now = {"model": model, "optimizer": optimizer} | ({"average": average} if average else {})
        now = {name: each.state_dict() for name, each in now.items()}
        _write_resume(resume, state | now | {"made": repr(made)})

    if state["best"] is None:
        raise FloatingPointError(f"{path.stem}: no epoch had a finite validation loss: lower learning_rate.")
    model.load_state_dict(state["best"])
    model.eval()
    history = pd.DataFrame(state["history"])
    runs.write_table(history_path, history)
    runs.write_recipe(history_path, made)
    models.save(model, path, made)
    resume.unlink(missing_ok=True)
    return history


def _write_resume(path, state):
    """Keep a training half-way: the sha256 of what follows, then the state as torch writes it."""
    content = io.BytesIO()
    torch.save(state, content)
    with runs.whole_file(path) as part, open(part, "wb") as file:
        file.write(hashlib.sha256(content.getbuffer()).digest())
        file.write(content.getbuffer())


def _read_resume(path, where):
    """What `_write_resume` kept, on the device `where`; None where there is nothing, or nothing whole."""
    if not path.exists():
        return None
    content = path.read_bytes()
    digest, state = content[:32], content[32:]
    if hashlib.sha256(state).digest() != digest:
        print(f"{path} is damaged, or of another version: trained from the start", file=sys.stderr)
        return None
    return torch.load(io.BytesIO(state), map_location=where, weights_only=True)
