"""library_attack.py: known noise follows its image, AutoAttack-rand and its repair."""

import importlib
import json

import cli
import pytest
import torch
from purifiers import INDEX, SCHEDULE, Eps, draw, images, linear, purifier
from test_purify import files  # noqa: F401
from torch import nn

import library_attack
import purify
from library_attack import Attackable, autoattack_rand
from purification import PurifiedClassifier, image_draws
from purify_attack import noises


class Recorder(nn.Module):
    """Classifies by the first pixel of the image plus that of the noise of Eq. 2; keeps
    the noise."""

    def __init__(self, scale=0.0):
        super().__init__()
        self.scale = scale
        self.seen = []

    def forward(self, x, noise):
        z = noise(0, x)
        self.seen.append(z.flatten(1)[:, 0].double())
        first = x.flatten(1)[:, 0] - 0.5 + self.scale * z.flatten(1)[:, 0]
        return torch.stack([first, -first, -10 + 0 * first], dim=1)


def value(knowledge, index, k=0, j=0):
    """The first number of the noise of Eq. 2 that noises() gives."""
    x = images().float()[: len(index)]
    return noises(knowledge, 0, index, k, 1)[j](0, x).flatten(1)[:, 0].double()


@pytest.mark.parametrize("sampler", ["ddpm", "gdmp", "edm-sde"])
def test_known_noise_follows_its_image(sampler):
    """Attacked images in another order, one left out, one twice, as APGD calls its model."""
    clean = images()
    net = purifier(sampler)
    victim = Attackable(net, clean, "both", 0, INDEX + 5)
    wanted = net(clean, image_draws(0, INDEX + 5)).float()
    torch.testing.assert_close(victim(clean), wanted)
    attacked = (clean + 8 / 255 * draw(3, 3, 6, 6).sign()).clamp(0, 1)
    wanted = net(attacked, image_draws(0, INDEX + 5)).float()
    for rows in ([2, 0], [1], [0, 0, 2, 1]):
        torch.testing.assert_close(victim(attacked[rows]), wanted[rows], rtol=1e-5, atol=1e-6)


def test_a_padded_batch_has_the_gradients_of_a_short_one():
    """Compiled, a network is always given as many images as there are."""
    gradients = []
    for padded in (False, True):
        victim = Attackable(purifier("ddpm"), images(), "both", 0, INDEX + 5)
        victim.padded = padded
        x = images()[[2, 0]].requires_grad_()
        logits = victim(x)
        assert logits.shape[0] == 2
        gradients.append(torch.autograd.grad(logits.square().sum(), x)[0])
        assert victim.asked.tolist() == [1, 0, 1]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_each_call_takes_the_draw_that_the_knowledge_allows():
    x = images().float()
    evaluation = value("both", INDEX)
    for knowledge in ("white", "fwd", "both", "semi-3"):
        net = Recorder()
        victim = Attackable(net, x, knowledge, 0)
        for rows in ([0, 1, 2], [2, 1], [1], [0, 2]):
            victim(x[rows])
        first = [net.seen[0], net.seen[1].flip(0)[-2:], net.seen[2], net.seen[3]]
        parts = [INDEX, INDEX[1:], INDEX[1:2], INDEX[[0, 2]]]
        for k, (seen, index) in enumerate(zip(first, parts)):
            if knowledge == "white":
                assert torch.equal(seen, value("white", index, k))
                assert not torch.isin(seen, evaluation).any()
            elif knowledge == "semi-3":
                assert torch.equal(seen, value("semi-3", index, 0, k % 3))
            else:  # of Eq. 2, which both know
                assert torch.equal(seen, evaluation[index])


def test_forward_knowledge_leaves_the_reverse_noise_fresh():
    x = images().float()
    seen = []

    def net(x, noise):
        seen.append((noise(0, x).sum().item(), noise(1, x).sum().item()))
        return x.flatten(1)[:, :2]

    victim = Attackable(net, x, "fwd", 0)
    for _ in range(3):
        victim(x)
    assert len({a for a, _ in seen}) == 1 and len({b for _, b in seen}) == 3


def test_a_compiled_network_sees_one_size():
    sizes = []

    class Compiled(nn.Module):
        _orig_mod = True

    class Net(Recorder):
        model = Compiled()

        def forward(self, x, noise):
            sizes.append(len(x))
            return super().forward(x, noise)

    x = images().float()
    victim = Attackable(Net(), x, "both", 0)
    whole = victim(x)
    torch.testing.assert_close(victim(x[1:]), whole[1:])
    assert sizes == [3, 3] and victim(x[:1]).shape == (1, 3)


def test_gradients_that_vanish_or_are_not_finite_are_counted():
    x = images().float()

    def net(x, noise):
        factor = torch.tensor([0.0, float("nan"), 1.0])[: len(x)]
        return x.flatten(1)[:, :2] * factor[:, None]

    victim = Attackable(net, x, "both", 0)
    for _ in range(2):
        at = x.clone().requires_grad_()
        torch.autograd.grad(victim(at).sum(), at)
    victim(x)  # no gradient asked for
    assert victim.asked.tolist() == [2, 2, 2]
    assert victim.zero.tolist() == [2, 0, 0] and victim.nonfinite.tolist() == [0, 2, 0]


def test_images_outside_the_box_are_taken_if_told_so():
    """strict=False: a library that probes beyond the border gets an answer and a gradient there."""
    clean = images()
    net = purifier(strict=False)
    x = (clean + 0.5).requires_grad_()
    assert x.max() > 1
    (grad,) = torch.autograd.grad(Attackable(net, clean, "both", 0)(x).sum(), x)
    assert (grad.flatten(1) != 0).all()
    with pytest.raises(ValueError, match="need .B, C, H, W. in .0, 1."):
        Attackable(purifier(), clean, "both", 0)(x)


# AutoAttack-rand ----------------------------------------------------------------------------------


def fixed_candidates(monkeypatch, pixels):
    """The attacks "find" images whose first pixel is that number; -> the rows they were given."""
    given = []

    def candidate(victim, x, y, loss, norm, eot, steps, start):
        given.append((loss, len(x)))
        x = x.clone()
        x[:, 0, 0, 0] = pixels[loss]
        return x

    monkeypatch.setattr(library_attack, "apgd", candidate)
    return given


def pictures(n, first):
    x = torch.full((n, 3, 2, 2), 0.5) + torch.arange(n).view(-1, 1, 1, 1) / (8 * n)
    x[:, 0, 0, 0] = first
    return x


def normal(a):
    return torch.distributions.Normal(0, 1).cdf(torch.tensor(float(a))).item()


def test_the_repair_of_autoattack_in_closed_form(monkeypatch):
    """P2 App. J. A coin that is right with probability p, q and r for the image and for what the
    two attacks find: one pass of each counts p q r robust; what AutoAttack then returns is right
    far more often than the worst candidate, which the repair, 150 passes, finds."""
    given = fixed_candidates(monkeypatch, {"ce": 0.8, "dlr": 0.2})
    n, evaluations = 300, 150
    x, y, index = pictures(n, 1.5), torch.zeros(n, dtype=torch.long), torch.arange(n)
    net = Recorder(scale=1.0)
    kept, row = autoattack_rand(net, x, y, index, 0, "white", "linf", 1, 1, evaluations=evaluations)
    p, q, r = normal(1.0), normal(0.3), normal(-0.3)
    spread = 4 * 0.5 / n**0.5
    assert row["clean"].mean().item() == pytest.approx(p, abs=0.01)
    assert row["flags"].mean().item() == pytest.approx(p * q * r, abs=spread)
    returns = (1 - p) * p + p * (1 - q) * q + p * q * (1 - r) * r + p * q * r * p
    assert row["unrepaired"].mean().item() == pytest.approx(returns, abs=spread)
    assert row["robust"].mean().item() == pytest.approx(r, abs=0.01)
    assert row["judged"].mean().item() == pytest.approx(r, abs=0.01)
    assert torch.equal(kept[:, 0, 0, 0], torch.full((n,), 0.2))
    assert given == [("ce", n), ("dlr", n)]
    assert p * q * r < r - spread and returns > r + spread


def test_a_candidate_must_lower_the_accuracy_over_fresh_passes(monkeypatch):
    """It does not where it is worse than the image; nor is an image attacked that is
    never right."""
    given = fixed_candidates(monkeypatch, {"ce": 5.0, "dlr": 2.0})
    x, y, index = pictures(3, 0.7), torch.zeros(3, dtype=torch.long), torch.arange(3)
    x[0, 0, 0, 0] = -9.0
    kept, row = autoattack_rand(Recorder(1.0), x, y, index, 0, "white", "linf", 1, 1, 40)
    assert torch.equal(kept, x) and row["robust"].tolist() == row["clean"].tolist()
    assert given == [("ce", 2), ("dlr", 2)] and row["robust"][0] == 0
    assert (row["judged"][1:] != row["robust"][1:]).any()  # by passes that chose nothing
    _, row = autoattack_rand(Recorder(1.0), x, y, index, 0, "both", "linf", 1, 1, 40)
    assert set(row["robust"].tolist()) <= {0.0, 1.0}  # one known draw decides
    assert torch.equal(row["judged"], row["robust"])


def test_draws_of_an_attack_do_not_depend_on_the_calls_of_the_one_before(monkeypatch):
    """A batch may leave the first attack early: the second takes the same draws all the same."""
    first_calls = []
    lengths = iter([5, 5, 70, 70])

    def attack(victim, x, y, loss, norm, eot, steps, start):
        first_calls.append(victim.calls)
        victim.calls += next(lengths)
        return x

    monkeypatch.setattr(library_attack, "apgd", attack)
    x, y, index = pictures(3, 0.7), torch.zeros(3, dtype=torch.long), torch.arange(3)
    for _ in range(2):
        autoattack_rand(Recorder(1.0), x, y, index, 0, "white", "linf", 1, 1, 40)
    assert first_calls[:2] == first_calls[2:] and first_calls[1] > first_calls[0] + 70


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_of_the_package_starts_at_each_images_own_point(norm):
    """The result of an image is that of a batch of it alone, whatever the library's generator does;
    also of images in channels_last, as purify.py's are, which the package cannot view."""
    pytest.importorskip("pyautoattack")
    net = purifier(model=Eps().float(), classifier=five_classes())
    x, index = images().float().to(memory_format=torch.channels_last), INDEX
    y = net(x, image_draws(0, index)).argmax(1)
    together, _ = autoattack_rand(net, x, y, index, 0, "both", norm, 1, 3, evaluations=4)
    for i in range(3):
        alone = (x[[i]], y[[i]], index[[i]])
        kept, row = autoattack_rand(net, *alone, 0, "both", norm, 1, 3, evaluations=4)
        torch.testing.assert_close(kept[0], together[i], rtol=1e-4, atol=1e-4)
        assert not row["outside"].any()
    assert not torch.equal(together, x) and not together.requires_grad


def five_classes():
    net = linear().float()
    net[1] = nn.Linear(108, 5)
    torch.manual_seed(3)
    nn.init.normal_(net[1].weight, std=0.3)
    return net


@pytest.mark.parametrize("knowledge", ["white", "fwd", "both", "semi-2"])
def test_autoattack_rand_runs_under_any_knowledge(knowledge):
    """A tiny network, attacked where its margin is small: known noise is broken, and no check
    fails."""
    pytest.importorskip("pyautoattack")
    net = PurifiedClassifier(Eps().float(), SCHEDULE, five_classes(), nfe=3, strict=False)
    x, index = images(6).float(), torch.arange(6)
    y = net(x, image_draws(0, index)).argmax(1)
    kept, row = autoattack_rand(net, x, y, index, 0, knowledge, "linf", 2, 10, evaluations=4)
    found = purify.summarise(row)
    assert found["robust"] < found["clean"] and (kept != x).any()
    assert not row["outside"].any() and not row["zero"].any() and not row["nonfinite"].any()
    if knowledge == "both":
        assert found["clean"] == 1 and found["robust"] == found["judged"]


def test_command_with_autoattack(files, tmp_path):  # noqa: F811
    pytest.importorskip("pyautoattack")
    argv = ["--ckpt", files / "a/ckpt.pt", "--classifier", files / "classifier.pt", "--nfe", 1]
    argv += "--data synthetic:64 --n 2 --attack aa-rand --pgd 2 --eot 2 --device cpu".split()
    argv += "--evaluations 3 --knowledge white both --purifier ddpm --norm l2".split()
    assert cli.call(purify, *argv, "--out", tmp_path) == 0
    runs = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert [row["knowledge"] for row in runs] == ["white", "both"]
    assert {"robust", "judged", "unrepaired", "flags"} <= set(runs[0])
    assert "AutoAttack's own" in (tmp_path / "table.md").read_text()


def test_the_flags_reach_autoattack(files, tmp_path, monkeypatch):  # noqa: F811
    seen, attack = [], library_attack.autoattack_rand

    def watched(net, x, y, index, seed, knowledge, norm, eot, steps, evaluations, eot_batch):
        seen.append((seed, knowledge, norm, eot, steps, evaluations, eot_batch))
        return attack(net, x, y, index, seed, knowledge, norm, 1, 1, 1, 1)

    monkeypatch.setattr(library_attack, "autoattack_rand", watched)
    argv = ["--ckpt", files / "a/ckpt.pt", "--classifier", files / "classifier.pt", "--nfe", 1]
    argv += "--data synthetic:64 --n 2 --attack aa-rand --purifier ddpm --device cpu".split()
    argv += "--pgd 4 --eot 3 --eot-batch 2 --evaluations 5 --seed 7 --norm linf l2".split()
    argv += ["--knowledge", "white"]
    pytest.importorskip("pyautoattack")
    assert cli.call(purify, *argv, "--out", tmp_path) == 0
    assert seen == [(7, "white", norm, 3, 4, 5, 2) for norm in ("linf", "l2")]


def test_autoattack_without_its_package(monkeypatch, capsys, files, tmp_path):  # noqa: F811
    monkeypatch.setitem(importlib.sys.modules, "pyautoattack", None)
    argv = ["--ckpt", files / "a/ckpt.pt", "--classifier", files / "classifier.pt", "--nfe", 1]
    argv += "--data synthetic:64 --n 2 --attack aa-rand --purifier ddpm --device cpu".split()
    assert cli.call(purify, *argv, "--out", tmp_path) == 2
    assert "pip install pyautoattack" in capsys.readouterr().err


@pytest.mark.parametrize("library", ["torchattacks", "foolbox", "pyautoattack"])
def test_public_attack_libraries_run_on_it(library):
    module = pytest.importorskip(library)
    net = purifier(model=Eps().float(), classifier=five_classes(), strict=False)
    x, y = images().float(), INDEX % 2
    victim = Attackable(net, x, "both", 0).eval()
    if library == "torchattacks":
        x_adv = module.PGD(victim, eps=8 / 255, alpha=2 / 255, steps=2)(x, y)
    elif library == "foolbox":
        fmodel = module.PyTorchModel(victim, bounds=(0, 1), device="cpu")
        attack = importlib.import_module("foolbox.attacks").LinfPGD(steps=2)
        _, x_adv, _ = attack(fmodel, x, y, epsilons=8 / 255)
    else:
        attacks = ["apgd-ce", "square"]
        attack = module.AutoAttack(victim, eps=8 / 255, version="custom", attacks=attacks)
        attack.apgd.n_iter = 2
        attack.square.n_queries = 10
        x_adv, _ = attack.run_standard_evaluation(x, y, batch_size=3)
    assert x_adv.shape == x.shape and (x_adv - x).abs().max() <= 8 / 255 + 1e-6
