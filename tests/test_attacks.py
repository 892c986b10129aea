import foolbox
import pytest
import torch
from torch import nn

from lib import attacks

EPSILON = 4 / 255


class Linear(nn.Module):
    """Logits linear in the pixels: the best perturbation is known in closed form."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.weight = nn.Parameter(
            scale * torch.randn(2, 3 * 8 * 8, generator=torch.Generator().manual_seed(0))
        )

    def forward(self, images):
        return images.flatten(1) @ self.weight.T


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(),
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 7 * 7, 2))
    model(torch.rand(64, 3, 16, 16))  # running statistics that are not their defaults
    model.eval()
    with torch.no_grad():  # both classes are answered, and answers are close enough to be turned
        model[-1].bias -= model(torch.rand(64, 3, 16, 16)).mean(0)
    return model


@pytest.fixture
def images():
    return torch.rand(48, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def right(model, images, labels):
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_fgsm_and_pgd_reach_the_known_optimum_of_a_linear_model(scale):
    """Inside [0, 1] the margin rises by epsilon times the L1 norm of the weights' difference, however large the logits."""
    model = Linear(scale)
    images = 0.4 + 0.2 * torch.rand(6, 3, 8, 8)
    labels = model(images).argmax(1)
    (perturbed,) = attacks.fgsm(model, images, labels, [EPSILON])
    rise = attacks.margin(model(perturbed), labels) - attacks.margin(model(images), labels)
    optimum = EPSILON * (model.weight[0] - model.weight[1]).abs().sum()
    assert torch.allclose(rise, optimum.expand(6), rtol=1e-3)
    walked = attacks.pgd(model, images, labels, 1e-4, steps=20, step_size=2e-5)
    rise = attacks.margin(model(walked), labels) - attacks.margin(model(images), labels)
    fooled = attacks.margin(model(walked), labels) > 0
    assert torch.allclose(rise[~fooled], optimum / EPSILON * 1e-4, rtol=2e-2)


def test_cross_entropy_would_lose_the_gradient_where_the_margin_keeps_it():
    model, images = Linear(1000.0), 0.4 + 0.2 * torch.rand(6, 3, 8, 8)
    labels = model(images).argmax(1)
    x = images.clone().requires_grad_()
    (vanished,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels), x)
    assert (vanished == 0).all()
    assert (attacks.margin_gradient(model, images, labels)[1] != 0).all()


def test_fgsm_equals_foolbox(network, images):
    labels = network(images).argmax(1)
    theirs = foolbox.attacks.FGSM()(
        foolbox.PyTorchModel(network, (0, 1)), images, labels, epsilons=[1 / 255, EPSILON]
    )[1]
    for ours, other in zip(attacks.fgsm(network, images, labels, [1 / 255, EPSILON]), theirs, strict=True):
        # A gradient of almost zero may have another sign in another loss.
        assert ((ours - other).abs() < 1e-6).float().mean() > 0.999


def test_pgd_is_as_strong_as_foolbox_with_the_same_steps(network, images):
    labels = network(images).argmax(1)
    for epsilon in (1 / 255, 3 / 255, 6 / 255):
        step_size = attacks.pgd_step_size(epsilon, 20)
        attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=20, random_start=False)
        theirs = attack(foolbox.PyTorchModel(network, (0, 1)), images, labels, epsilons=epsilon)[1]
        ours = attacks.pgd(network, images, labels, epsilon, 20, step_size, torch.Generator().manual_seed(0))
        assert abs(right(network, ours, labels) - right(network, theirs, labels)) <= 2 / len(images)
        assert (ours - images).abs().max() <= epsilon + 1e-6 and ours.min() >= 0 and ours.max() <= 1


def test_pgd_fools_what_fgsm_fools(network, images):
    labels = network(images).argmax(1)
    (one_step,) = attacks.fgsm(network, images, labels, [EPSILON])
    many = attacks.pgd(network, images, labels, EPSILON, 5, attacks.pgd_step_size(EPSILON, 5))
    fooled_by_one = network(one_step).argmax(1) != labels
    assert (network(many).argmax(1) != labels)[fooled_by_one].all()
    assert right(network, many, labels) < right(network, images, labels)


def test_pgd_in_batches_is_the_same_and_shows_only_what_stands(network, images):
    labels, sizes = network(images).argmax(1), []
    options = {"steps": 4, "step_size": EPSILON / 4}

    def attack(**how):
        generator = torch.Generator().manual_seed(0)
        return attacks.pgd(network, images, labels, EPSILON, **options, **how, generator=generator)

    handle = network.register_forward_hook(lambda _, shown, __: sizes.append(len(shown[0])))
    parts = attack(batch_size=7)
    handle.remove()
    whole = attack()
    assert ((parts - whole).abs() < 1e-6).float().mean() > 0.999
    standing = len(images) * right(network, whole, labels)
    assert max(sizes) <= 7 and 11 * standing <= sum(sizes) < 11 * len(images)


def test_one_backward_pass_serves_all_epsilons(network, images):
    labels = network(images).argmax(1)
    calls = []
    handle = network.register_full_backward_hook(lambda *_: calls.append(1))
    batches = list(attacks.fgsm(network, images, labels, [k / 255 for k in range(5)]))
    handle.remove()
    assert len(batches) == 5 and len(calls) == 1
    assert torch.equal(batches[0], images)


def test_attacks_leave_the_model_as_it_was(network, images):
    network.train()
    network[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    labels = torch.zeros(len(images), dtype=torch.int64)
    list(attacks.fgsm(network, images, labels, [EPSILON]))
    attacks.pgd(network, images, labels, EPSILON, 2, EPSILON)
    attacks.from_random_start(network, images, labels, EPSILON)
    attacks.from_random_start(network, images, labels, EPSILON, steps=2)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert network.training and network[1].training
    assert [p.requires_grad for p in network.parameters()] == [False] + [True] * 7
    assert all(p.grad is None for p in network.parameters())


def test_noise_has_the_size_of_the_attack(images):
    noisy = attacks.random_noise(images, EPSILON, torch.Generator().manual_seed(0))
    change = (noisy - images).abs()
    inside = (images > EPSILON) & (images < 1 - EPSILON)
    assert torch.allclose(change[inside], torch.tensor(EPSILON), atol=1e-6)
    assert noisy.min() >= 0 and noisy.max() <= 1
    assert abs((noisy - images)[inside].sign().mean()) < 0.05


@pytest.mark.parametrize("epsilon", [-1, 256])
def test_an_epsilon_out_of_range_is_refused(epsilon, network, images):
    with pytest.raises(ValueError, match="0 to 255"):
        attacks.fractions([1, epsilon])
    with pytest.raises(ValueError, match="0 to 255"):
        attacks.pgd(network, images, torch.zeros(48, dtype=torch.int64), epsilon / 255, 1, 0.1)


@pytest.mark.parametrize("epsilons", [[], [1, 4, 4.0]])
def test_no_epsilon_or_one_twice_is_refused(epsilons):
    with pytest.raises(ValueError, match="at least one, and none twice"):
        attacks.fractions(epsilons)


def test_pgd_of_nothing_is_nothing(network):
    empty = torch.zeros(0, 3, 16, 16)
    assert (
        attacks.pgd(network, empty, torch.zeros(0, dtype=torch.int64), EPSILON, 2, EPSILON).shape
        == empty.shape
    )


@pytest.mark.parametrize(("name", "steps"), [("apgd_ce", 20), ("fab", 20), ("square", 300)])
def test_autoattack_turns_what_the_closed_form_says_can_be_turned(name, steps):
    """On a linear model inside [0, 1] an image turns at epsilon = margin / L1 norm, and not before."""
    model, images = Linear(), 0.4 + 0.2 * torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    if name == "square":  # squares of one color need weights of one sign in each channel
        signs = torch.tensor([1.0, -1, 0]).repeat_interleave(64)
        model.weight.data = model.weight.data.abs() * torch.stack([signs, -signs])
    logits = model(images).detach()
    labels = logits.argmax(1)
    needed = (logits[:, 0] - logits[:, 1]).abs() / (model.weight[0] - model.weight[1]).abs().sum()
    epsilon = needed.median().item() * 1.0001
    state = torch.get_rng_state()
    perturbed = attacks.autoattack(model, images, labels, name, epsilon, steps)
    assert torch.equal(torch.get_rng_state(), state)
    fooled = attacks.margin(model(perturbed), labels) > 0
    assert not fooled[needed > epsilon].any()
    # Square never changes the last row and column, a quarter of these small images.
    assert fooled[needed < epsilon * (0.7 if name == "square" else 0.99)].all() and fooled.sum() >= 5
    assert torch.equal(perturbed[~fooled], images[~fooled])
    if name == "fab":
        distance = (perturbed - images).abs().amax((1, 2, 3))
        assert torch.allclose(distance[fooled], needed[fooled], rtol=0.05)


@pytest.mark.parametrize("name", ["apgd_ce", "fab", "square"])
def test_autoattack_stays_in_the_ball_and_leaves_the_wrong_ones_and_the_model_alone(network, images, name):
    labels = torch.arange(len(images)) % 2
    network.train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    with torch.no_grad():
        wrong = attacks.margin(network.eval()(images), labels) > 0
    network.train()
    perturbed = attacks.autoattack(network, images, labels, name, EPSILON, 20)
    again = attacks.autoattack(network, images, labels, name, EPSILON, 20)
    assert torch.equal(perturbed, again)
    assert network.training and all(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert (perturbed - images).abs().max() <= EPSILON + 1e-6
    assert perturbed.min() >= 0 and perturbed.max() <= 1
    assert torch.equal(perturbed[wrong], images[wrong])


def test_autoattack_refuses_what_it_does_not_know(network, images):
    labels = torch.zeros(len(images), dtype=torch.int64)
    with pytest.raises(ValueError, match="use apgd_ce, fab or square"):
        attacks.autoattack(network, images, labels, "apgd", EPSILON, 5)
    with pytest.raises(ValueError, match="out of range"):
        attacks.autoattack(network, images, labels, "fab", -0.1, 5)
