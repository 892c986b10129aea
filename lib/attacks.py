"""Attacks in pixel space. An attack is a step up the margin and a projection back to the ball of size epsilon and to [0, 1].

Threat model: the attacker knows weights and label and changes the float image that the model is given by at most
epsilon per channel value. Everything runs in float32 and eval mode. Making examples leaves the model as it was.
"""

from contextlib import contextmanager

import torch
from pyautoattack.autopgd_base import APGDAttack
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from tqdm import tqdm

# float32 is float32 on GPUs too: by default their convolutions round to TF32, ten bits, in attacks and answers alike.
torch.backends.cudnn.allow_tf32 = False

# What an attack name means; written beside every report's predictions.
DESCRIPTIONS = {
    "none": "the image as it is",
    "random_noise": "every channel value moved by plus or minus epsilon at random: the size of the attack without its aim",
    "fgsm": "one signed gradient step on the margin, clipped to [0, 1]",
    "pgd": "projected signed gradient steps on the margin, from the FGSM point, then from a random start; an image is left alone once it is fooled",
    "transfer_fgsm": "the FGSM images of source_model, shown to this model",
    "apgd_ce": "AutoAttack's PGD on cross-entropy, which sets its own step size; only on images that stand under PGD, others keep PGD's row",
    "fab": "AutoAttack's search for the nearest image across the boundary; only on images that still stand",
    "square": "AutoAttack's random search with squares, without gradients; only on images that still stand",
    "worst_case": "all of them together: right as it is and under every attack at every epsilon up to the one named",
}


@contextmanager
def frozen(model):
    """Eval mode without gradients for the weights, so that batch-norm statistics and gradients stay as they were."""
    modes = [(module, module.training) for module in model.modules()]
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training
        for parameter in needed:
            parameter.requires_grad_(True)


def margin(logits, labels):
    """The other class's logit minus the true one's, (N,): positive where the model is wrong.

    With two classes its gradient has the sign of cross-entropy's, and does not vanish when the model is sure
    (Carlini & Wagner 2017, section V.A).
    """
    return logits.gather(1, 1 - labels[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]


def margin_gradient(model, images, labels):
    """The margin (N,) and its gradient in the pixels (N, 3, H, W)."""
    with torch.enable_grad():
        images = images.detach().requires_grad_(True)
        margins = margin(model(images).float(), labels)
        (gradient,) = torch.autograd.grad(margins.sum(), images)
    return margins.detach(), gradient


def project(perturbed, images, epsilon):
    """The nearest image within epsilon of `images` and within [0, 1]."""
    return torch.minimum(torch.maximum(perturbed, images - epsilon), images + epsilon).clamp(0, 1)


def fractions(epsilons):
    """Epsilons given in 255ths as fractions of the value range: [4] is [4 / 255].

    Raises ValueError for one outside 0 to 255, one that is there twice, and for none.
    """
    if not len(epsilons) or len(set(epsilons)) < len(epsilons):
        raise ValueError(f"epsilons {list(epsilons)}: give at least one, and none twice.")
    for epsilon in epsilons:
        check_epsilon(epsilon / 255)
    return [epsilon / 255 for epsilon in epsilons]


def check_epsilon(epsilon):
    """Raises ValueError unless epsilon, a fraction, is in [0, 1]."""
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon {epsilon * 255:g}/255 is out of range: give 255ths from 0 to 255.")


def fgsm(model, images, labels, epsilons):
    """One signed gradient step up the loss (Goodfellow et al. 2015, section 4).

    images: float32 (N, 3, H, W) in [0, 1]; labels: int64 (N,); epsilons: largest changes of a channel value, each in [0, 1].
    Yields one clipped batch an epsilon, all from a single backward pass; the model's mode and gradients are left as they were.
    """
    for epsilon in epsilons:
        check_epsilon(epsilon)
    with frozen(model):
        direction = margin_gradient(model, images, labels)[1].sign()
    for epsilon in epsilons:
        yield (images + epsilon * direction).clamp(0, 1)


def random_start(images, epsilon, generator=None):
    """Uniform in the ball of size epsilon around `images`, clipped to [0, 1]."""
    noise = torch.rand(images.shape, generator=generator, dtype=images.dtype).to(images.device)
    return (images + epsilon * (2 * noise - 1)).clamp(0, 1)


def random_noise(images, epsilon, generator=None):
    """Every channel value moved by plus or minus epsilon, clipped to [0, 1]: an attack's size without its aim."""
    check_epsilon(epsilon)
    signs = torch.randint(0, 2, images.shape, generator=generator, dtype=torch.uint8).to(images) * 2 - 1
    return (images + epsilon * signs).clamp(0, 1)


def pgd(
    model,
    images,
    labels,
    epsilon,
    steps,
    step_size,
    generator=None,
    random_starts=1,
    batch_size=None,
    label=None,
):
    """Projected gradient ascent on the margin (Madry et al. 2018, section 2.1), once from the FGSM point, then from random ones.

    images, labels as for `fgsm`; epsilon, step_size: fractions in [0, 1]; batch_size: how many images are shown to the model at
    once, all of them without one; label: names the work where it takes long enough to show progress. Each image is left
    alone once the model is wrong about it, so the answer holds the first success, or the best try, and batches hold images that
    stand only. Returns a batch like `images`.
    """
    check_epsilon(epsilon)
    best = images.clone()
    if len(images) == 0:
        return best
    home, where = images.device, next(model.parameters(), images).device

    def batches(rows):
        return rows.tensor_split(-(-len(rows) // (batch_size or len(images))))

    def look(points, rows, goes_on):
        x, y = points[rows].to(where, memory_format=torch.channels_last), labels[rows].to(where)
        if goes_on:
            margins, gradient = margin_gradient(model, x, y)
            return margins.to(home), gradient.sign().to(home)
        with torch.no_grad():
            return margin(model(x).float(), y).to(home), None

    with frozen(model):
        best_margin, current = torch.empty(len(images), device=home), torch.empty_like(images)
        for rows in batches(torch.arange(len(images), device=home)):
            best_margin[rows], direction = look(images, rows, True)
            current[rows] = (images[rows] + epsilon * direction).clamp(0, 1)
        walk = [step < steps for _ in range(1 + random_starts) for step in range(steps + 1)]
        for number, goes_on in enumerate(tqdm(walk, label, leave=False, delay=10, disable=label is None)):
            if number and number % (steps + 1) == 0:
                current = random_start(images, epsilon, generator)
            standing = (best_margin <= 0).nonzero()[:, 0]
            if len(standing) == 0:
                break
            for rows in batches(standing):
                margins, direction = look(current, rows, goes_on)
                better = margins > best_margin[rows]
                best[rows[better]], best_margin[rows[better]] = current[rows[better]], margins[better]
                if goes_on:
                    current[rows] = project(current[rows] + step_size * direction, images[rows], epsilon)
    return best


def pgd_step_size(epsilon, steps):
    """Two and a half times the way to the edge, shared among the steps (Madry et al. 2018): every point can be reached."""
    return 2.5 * epsilon / steps


def from_random_start(model, images, labels, epsilon, steps=1, generator=None):
    """The training attack: from a random start every image takes every step, fooled or not. Arguments as for `pgd`.

    One step goes 1.25 epsilon (Wong et al. 2020, Algorithm 3), several go `pgd_step_size` each (Madry et al. 2018).
    """
    step_size = 1.25 * epsilon if steps == 1 else pgd_step_size(epsilon, steps)
    current = random_start(images, epsilon, generator)
    with frozen(model):
        for _ in range(steps):
            gradient = margin_gradient(model, current, labels)[1]
            current = project(current + step_size * gradient.sign(), images, epsilon)
    return current


def autoattack(model, images, labels, name, epsilon, steps, seed=0):
    """One attack of AutoAttack (Croce & Hein 2020): "apgd_ce", "fab" or "square". The others of its standard set need three classes.

    images, labels as for `fgsm`; epsilon: a fraction in [0, 1]; steps: gradient steps, for "square" queries of the model.
    Returns a batch like `images`; an image that was not fooled comes back as it was.
    """
    check_epsilon(epsilon)
    options = {"eps": epsilon, "seed": seed, "device": images.device}
    with frozen(model), torch.random.fork_rng():
        if name == "apgd_ce":
            attack = APGDAttack(model, n_iter=steps, **options)
        elif name == "fab":
            attack = FABAttack_PT(model, n_iter=steps, **options)
        elif name == "square":
            attack = SquareAttack(model, n_queries=steps, resc_schedule=False, **options)
        else:
            raise ValueError(f"Unknown attack {name!r}: use apgd_ce, fab or square.")
        return project(attack.perturb(images, labels), images, epsilon)
