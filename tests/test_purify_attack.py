"""purify_attack.py, and purify.evaluate: what the attack knows and what judges it, PGD in closed
form."""

import math

import pytest
import torch
import torch.nn.functional as F
from purifiers import INDEX, SCHEDULE, Eps, Function, draw, images, linear, purifier, settings
from torch import nn

import purify
import purify_attack
from purification import PurifiedClassifier, image_draws
from purify_attack import gradient_of, loss_of, over_draws
from rng import image_noise


def test_draws_per_step_by_default():
    """P2's code: EoT 10, but 1 with the noise of the forward step known; what is asked
    for counts."""
    asked = {"white": (10, 4), "fwd": (1, 4), "both": (1, 1), "semi-3": (3, 3), "no noise": (1, 1)}
    for knowledge, numbers in asked.items():
        draws = [purify_attack.noises(knowledge, 0, INDEX, 0, eot) for eot in (None, 4)]
        assert tuple(len(d) for d in draws) == numbers


@pytest.mark.parametrize("sampler, single", [("ddim", True), ("edm-ode", True), ("ddpm", False)])
def test_equal_draws_are_one(sampler, single):
    """With no noise on the way back, DW_Fwd knows all: one draw, not ten, and DW_Both's numbers."""
    calls = []

    class Counted(PurifiedClassifier):
        def forward(self, x, noise=None):
            calls.append(len(x))
            return super().forward(x, noise)

    x, y = images(), INDEX % 2
    net = Counted(Eps(), SCHEDULE, linear(), sampler, nfe=2)
    args = settings(eot=3, pgd=2, evaluations=4)
    rows = [purify.evaluate(net, x, y, INDEX, args, know, "linf") for know in ("fwd", "both")]
    # attack, losses of start and end, robust and clean, and for `selected` 2 + 1, or 2 x 4 + 4
    one = 2 + 2 + 2 + 3
    many = 2 * 3 + 2 * 3 + 2 + 12
    assert len(calls) == one + (one if single else many)
    equal = [torch.equal(rows[0][name], rows[1][name]) for name in ("start", "end", "selected")]
    assert all(equal) if single else not all(equal)
    assert purify.amounts_to("white", sampler) == "white"


def test_what_the_attack_knows():
    def values(knowledge, k, **kw):
        return [
            noise(1, images()).double()
            for noise in purify_attack.noises(knowledge, 0, INDEX, k, **kw)
        ]

    evaluation = image_draws(0, INDEX)(1, images())
    assert torch.equal(values("both", 0)[0], evaluation) and torch.equal(
        values("both", 5)[0], evaluation
    )
    semi = values("semi-3", 2)
    assert (
        len(semi) == 3
        and torch.equal(semi[0], evaluation)
        and torch.equal(semi[2], values("semi-3", 0)[2])
    )
    for knowledge in ("white", "fwd"):
        fresh = [v for k in range(3) for v in values(knowledge, k, eot=2)] + [evaluation]
        assert len({v.sum().item() for v in fresh}) == 7
    assert torch.equal(
        *(purify_attack.noises(k, 0, INDEX, 1)[0](0, images()) for k in ("fwd", "both"))
    )


def test_pgd_on_a_linear_classifier():
    """Two classes: the gradient's direction never changes, so the end is at the border of the ball
    and of the box."""
    classifier, y = linear(), torch.tensor([0, 1, 0])
    net, x = purifier("none", classifier=classifier), images()
    x[0, 0, 0, :3], x[1, 1, 1, :3] = 0.0, 1.0
    w = (classifier[1].weight[1] - classifier[1].weight[0]).view(3, 6, 6).detach()
    way = torch.stack([w, -w, w])
    x_adv, checks = purify_attack.pgd(net, x, y, lambda k: [None], "linf", steps=5)
    torch.testing.assert_close(x_adv, (x + 8 / 255 * way.sign()).clamp(0, 1))
    assert (
        not checks["outside"].any()
        and checks["rises"].all()
        and not checks["zero"].any()
        and not checks["nonfinite"].any()
    )
    x = images() * 0.2 + 0.4  # away from the box
    x_adv, checks = purify_attack.pgd(net, x, y, lambda k: [None], "l2", steps=7)
    torch.testing.assert_close(x_adv, x + 0.5 * way / w.norm())
    assert not checks["outside"].any() and checks["rises"].all()
    few, _ = purify_attack.pgd(net, x, y, lambda k: [None], "l2", steps=3)
    torch.testing.assert_close(few, x + 0.3 * way / w.norm())


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_keeps_to_the_ball_and_the_box(norm):
    x = images().round()  # on the border of the box
    x_adv, checks = purify_attack.pgd(
        purifier(),
        x,
        INDEX % 2,
        lambda k: purify_attack.noises("white", 0, INDEX, k, 2),
        norm,
        steps=8,
    )
    size = (x_adv - x).flatten(1).norm(dim=1, p=math.inf if norm == "linf" else 2)
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and (size > 0.01).all()
    assert (size <= purify_attack.NORMS[norm][0] + 1e-9).all() and not checks["outside"].any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_as_in_p2(norm):
    """P2's loop written a second time, on curved networks with the draws that were used: gradients
    of the mean cross-entropy summed over the draws of a step, from delta = 0, in the ball, in the
    box."""
    used = []

    class Recording(PurifiedClassifier):
        def forward(self, x, noise=None):
            if x.requires_grad:
                used.append(noise)
            return super().forward(x, noise)

    curved = nn.Sequential(linear(), nn.Tanh(), nn.Linear(2, 2).double())
    net = Recording(Eps(), SCHEDULE, curved, "ddpm", nfe=2)
    x, y = images(), INDEX % 2
    x[0, :, :2], x[1, :, 2:4] = 0.0, 1.0

    def draws(k):
        return purify_attack.noises("white", 0, INDEX, k, 3)

    x_adv, _ = purify_attack.pgd(net, x, y, draws, norm, 6)
    delta = torch.zeros_like(x)
    recorded = list(used)
    assert len(recorded) == 6 * 3
    for k in range(6):
        delta.requires_grad_()
        losses = [F.cross_entropy(net(x + delta, z), y) for z in recorded[3 * k : 3 * k + 3]]
        (total,) = torch.autograd.grad(sum(losses), delta)
        if norm == "linf":
            delta = (delta.detach() + 2 / 255 * total.sign()).clamp(-8 / 255, 8 / 255)
        else:
            size = total.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = delta.detach() + 0.1 * total / size
            size = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = torch.where(size > 0.5, 0.5 * delta / size, delta)
        delta = torch.max(torch.min(delta, 1 - x), -x)
    torch.testing.assert_close(x_adv, x + delta)


def test_eot_averages_gradients():
    net, x, draws = purifier(), images(), [image_draws(0, INDEX, d) for d in range(3)]
    both = over_draws(gradient_of, net, x, INDEX % 2, draws)
    each = [over_draws(gradient_of, net, x, INDEX % 2, [d]) for d in draws]
    torch.testing.assert_close(both, sum(each) / 3)


@pytest.mark.parametrize("eot_batch", [2, 3, 7])
@pytest.mark.parametrize("knowledge", ["white", "fwd", "semi-4"])
def test_batched_draws_are_the_draws(knowledge, eot_batch):
    """5 draws (of semi 4) in one larger batch, or in some: the loss, its gradient and the hits are
    those of single draws."""
    net, x, y = purifier("vp-sde-corrector"), images(), INDEX % 2
    draws = purify_attack.noises(knowledge, 0, INDEX, 1, 5)
    for quantity in (loss_of, gradient_of):
        one = over_draws(quantity, net, x, y, draws)
        many = over_draws(quantity, net, x, y, draws, eot_batch)
        torch.testing.assert_close(many, one, rtol=1e-9, atol=1e-12)
    hits = [
        purify_attack.correct(net, x, y, 0, INDEX, knowledge, range(4), b) for b in (1, eot_batch)
    ]
    assert torch.equal(*hits)


def test_noise_is_a_function_of_seed_image_draw_and_number():
    """As rng.image_noise gives it; also for a seed beyond 64 bits, of which the lower 64 count."""
    x = images()
    for seed in (0, 3, 2**63 + 5, 2**70 + 3):
        want = image_noise(seed + (8 << 32), INDEX, 4, x.shape[1:]).double()
        assert torch.equal(image_draws(seed, INDEX, 7)(4, x), want)


def test_gradient_survives_float16():
    """A classifier that runs in float16 and is sure: its gradients, about 1e-9, would be
    0 there."""
    w = (0.01 * draw(2, 108)).half()

    def classifier(x):
        return x.flatten(1).half() @ w.T + torch.tensor([[14.0, 0], [0, 14], [14, 0]]).half()

    net = PurifiedClassifier(nn.Identity(), SCHEDULE, Function(classifier), "none")
    grad = over_draws(gradient_of, net, images().float(), INDEX % 2, [None]).double()
    way = torch.stack([w[1] - w[0], w[0] - w[1], w[1] - w[0]]).double()
    assert torch.cosine_similarity(grad.flatten(1), way, dim=1).min() > 0.99
    assert (grad.abs().amax((1, 2, 3)) < 1e-6).all()  # not scaled


def test_checks_report_what_goes_wrong():
    class Broken(nn.Module):
        factor = 0.0

        def forward(self, x):
            return torch.stack([self.factor * x.sum((1, 2, 3)), x.new_zeros(len(x))], dim=1)

    def violated(factor):
        net = purifier("none", classifier=Broken())
        net.classifier.factor = factor
        _, row = purify_attack.pgd(net, images(), INDEX % 2, lambda k: [None], steps=2)
        return " ".join(
            purify.summarise(row | dict(robust=torch.ones(3, dtype=torch.float64)))["violated"]
        )

    assert "exactly 0 in 100" in violated(0.0) and "only 0% of the images" in violated(0.0)
    assert "NaN or infinite for 3" in violated(math.nan)
    assert violated(0.01) == ""


class Spy(nn.Module):
    """Classifies by a linear network; records draw 0 (of Eq. 2) and draw 1 of every call."""

    def __init__(self):
        super().__init__()
        self.linear = linear()
        self.gradients = []
        self.values = []

    def forward(self, x, noise):
        calls = self.gradients if x.requires_grad else self.values
        calls.append(tuple(round(noise(k, x).sum().item(), 9) for k in (0, 1)))
        return self.linear(x)


@pytest.mark.parametrize("knowledge", ["white", "fwd", "both", "semi-4"])
def test_noise_of_the_attack_and_of_the_evaluation(knowledge):
    """P2's Algorithm: fresh draws in every step and an unseen one to judge, but for what
    is known."""
    spy, x = Spy(), images()
    purify.evaluate(spy, x, INDEX % 2, INDEX, settings(), knowledge, "linf")
    judge = tuple(round(image_draws(0, INDEX)(k, x).sum().item(), 9) for k in (0, 1))
    assert spy.values[-2:] == [judge, judge]  # after the attack and before it
    losses = spy.values[:-2]
    start, end = losses[: len(losses) // 2], losses[len(losses) // 2 :]
    assert start == end  # the rise of the loss is measured with equal noise
    if knowledge == "both":
        assert spy.gradients == [judge] * 3 and start == [judge]
    elif knowledge == "semi-4":
        draws = spy.gradients[:4]
        assert len(set(draws)) == 4 and judge in draws
        assert spy.gradients == 3 * draws and start == draws
    else:
        assert (len(spy.gradients), len(start)) == (3 * 2, 2)  # pgd x eot
        later = [draw[1] for draw in spy.gradients + start + [judge]]
        assert len(set(later)) == len(later)
        of_eq2 = {draw[0] for draw in spy.gradients + start}
        if knowledge == "fwd":
            assert of_eq2 == {judge[0]}
        else:
            assert len(of_eq2) == 8 and judge[0] not in of_eq2


@pytest.mark.parametrize("knowledge", ["white", "fwd", "both", "semi-4"])
def test_draws_that_choose_and_draws_that_judge(knowledge):
    """--evaluations 3: other draws judge than choose, and neither is the attack's, unless it knows
    them."""
    spy, x = Spy(), images()
    purify.evaluate(spy, x, INDEX % 2, INDEX, settings(evaluations=3), knowledge, "linf")
    n = 1 if knowledge == "both" else 3
    image, attacked, judges = (spy.values[len(spy.values) - i * n :][:n] for i in (3, 2, 1))
    wanted = [image_draws(0, INDEX, d, 0 if knowledge == "fwd" else None) for d in range(n)]
    assert judges == [tuple(round(z(k, x).sum().item(), 9) for k in (0, 1)) for z in wanted]
    assert image == attacked and len(set(image)) == n
    if knowledge in ("white", "fwd"):
        assert not set(image) & set(judges)
        assert not (set(image) | set(judges)) & set(spy.gradients)
    else:
        assert image == judges and set(judges) <= set(spy.gradients)


def test_clean_and_robust_accuracy_differ():
    """Images 1, 2 and 10 hundredths from the border of a linear classifier, in steps of 2/255."""
    classifier = linear()
    w = (classifier[1].weight[1] - classifier[1].weight[0]).detach()
    classifier[1].bias.data = torch.stack([w.sum() / 2, torch.zeros(())])  # 0.5 is on the border
    margins = torch.tensor([0.01, 0.02, 0.1], dtype=torch.float64)
    x = 0.5 + margins.view(-1, 1, 1, 1) * w.sign().view(3, 6, 6)
    net, y = purifier("none", classifier=classifier), torch.ones(3, dtype=torch.long)
    for steps, robust in ((1, [1, 1, 1]), (2, [0, 1, 1]), (3, [0, 0, 1]), (20, [0, 0, 1])):
        row = purify.evaluate(net, x, y, INDEX, settings(pgd=steps), "no noise", "linf")
        assert row["clean"].tolist() == [1, 1, 1] and row["robust"].tolist() == robust
        found = purify.summarise(row)
        assert found["clean"] == 1 and found["robust"] == pytest.approx(sum(robust) / 3)


def test_candidates_are_chosen_by_several_evaluations(monkeypatch):
    """A candidate that fools one purification in two loses to the image itself if that is always
    misclassified."""

    class Coin(nn.Module):
        def forward(self, x, noise):
            right = torch.where(
                x.flatten(1)[:, 0] > 0.5, noise(0, x).flatten(1)[:, 0] > 0, False
            ).double()
            return torch.stack([right, 1 - right], dim=1)

    args = settings(eot=1, pgd=1, evaluations=40)
    x, y = torch.full((3, 3, 6, 6), 0.4, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    monkeypatch.setattr(purify, "pgd", lambda net, x, *a: (x + 0.2, {}))
    assert purify.evaluate(Coin(), x, y, INDEX, args, "white", "linf")["selected"].tolist() == [
        0,
        0,
        0,
    ]
    monkeypatch.setattr(purify, "pgd", lambda net, x, *a: (x + 0.1, {}))  # 0.5: never right
    row = purify.evaluate(Coin(), x + 0.2, y, INDEX, args, "white", "linf")
    assert 0.2 < row["selected"].mean() < 0.8  # both are right by chance
