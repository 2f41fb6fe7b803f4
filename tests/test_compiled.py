"""What a compiled network sees, batches of one size; and what a GPU never waits for, on tensors
without values."""

import argparse
import contextlib

import cli
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import attack
import purification
import purify
import runtime
import sample
from classifier import WideResNet, load_classifier
from losses import NoiseSchedule
from runtime import save_checkpoint
from unet import UNet

DDPM = dict(steps=2, spacing="respaced", variance="fixed-large", clip=True)


def network():
    torch.manual_seed(0)
    net = UNet(channels=(32,), attention=(False,), blocks=1, dropout=0.0)
    nn.init.normal_(net.conv_out.weight, std=0.02)
    return net.eval().requires_grad_(False)


class Counting:
    """A backend of torch.compile that runs what it is given as it is, and counts."""

    def __init__(self):
        self.sizes = []

    def __call__(self, graph, inputs):
        tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
        self.sizes.append(
            next(len(x) for x in tensors if x.shape[1:] == (3, 8, 8))
        )  # of the images
        return graph.forward


@pytest.fixture
def counting(monkeypatch):
    """torch.compile with that backend."""
    torch._dynamo.reset()
    backend, compile_ = Counting(), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **kw: compile_(f, backend=backend, dynamic=False)
    )
    yield backend
    torch._dynamo.reset()


# batches of one size ------------------------------------------------------------------------------


def test_batches():
    numbers = list(range(3, 10))
    assert list(sample.batches(numbers, 3, padded=False)) == [
        ([3, 4, 5], 3),
        ([6, 7, 8], 3),
        ([9], 1),
    ]
    assert list(sample.batches(numbers, 3, padded=True)) == [
        ([3, 4, 5], 3),
        ([6, 7, 8], 3),
        ([9, 9, 9], 1),
    ]
    assert list(sample.batches(numbers, 9, padded=True)) == [(numbers, 7)]
    assert list(sample.batches([], 9, padded=True)) == []


def test_a_sample_compiles_one_graph(counting):
    args = argparse.Namespace(batch_size=3, seed=1, sampler="ddpm", amp="fp32")
    net = network()
    plain, full = (
        sample.sample_uint8(model, 8, 7, args, DDPM, torch.device("cpu"), 0, 1)
        for model in (net, torch.compile(net))
    )
    assert len(counting.sizes) == 1
    assert abs(plain.astype(int) - full).max() <= 1  # grey level: the batch size moves the rounding


def test_an_attack_compiles_no_graph_for_a_short_batch(counting):
    args = argparse.Namespace(
        n=4,
        seed=1,
        sampler="ddpm",
        amp="fp32",
        scale="std",
        phi=1.0,
        attack_factor=2.0,
        batch_size=3,
    )
    runs = [(0.0, "none", {}), (1.0, "adversarial", {}), (1.0, "random", {})]
    net, graphs = network(), {}
    for n in (3, 4):
        args.n = n
        torch._dynamo.reset()
        counting.sizes.clear()
        bar = argparse.Namespace(update=lambda n: None)
        images, rows = attack.attacked_samples(
            torch.compile(net), 8, runs, args, DDPM, (torch.device("cpu"), 0, 1), bar
        )
        graphs[n] = len(counting.sizes)
    assert graphs[3] == graphs[4]
    plain, plain_rows = attack.attacked_samples(
        net, 8, runs, args, DDPM, (torch.device("cpu"), 0, 1), bar
    )
    assert abs(plain.astype(int) - images).max() <= 1
    for name in ("outside", "steps", "nonfinite", "probes", "lost"):
        assert torch.equal(rows[name], plain_rows[name])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    out, net = tmp_path_factory.mktemp("compiled"), network()
    torch.manual_seed(0)
    clf = WideResNet(10, 1, 10)
    save_checkpoint(
        out / "ckpt.pt",
        dict(
            kind="unet",
            config=net.config,
            image_size=8,
            model=net.state_dict(),
            ema=net.state_dict(),
            args=dict(data="synthetic:64"),
        ),
    )
    save_checkpoint(
        out / "classifier.pt", dict(kind="classifier", config=clf.config, model=clf.state_dict())
    )
    return out


def test_purification_compiles_no_graph_for_a_short_batch(files, tmp_path, counting):
    """Neither for the last images nor for the last draws: 4 images in threes, 3 draws in twos."""

    def run(n, *flags):
        torch._dynamo.reset()
        counting.sizes.clear()
        assert (
            cli.call(
                purify,
                "--ckpt",
                files / "ckpt.pt",
                "--classifier",
                files / "classifier.pt",
                "--data",
                "synthetic:64",
                "--n",
                n,
                "--batch-size",
                3,
                "--pgd",
                1,
                "--eot",
                3,
                "--nfe",
                1,
                "--purifier",
                "ddpm",
                "--knowledge",
                "white",
                "--device",
                "cpu",
                "--out",
                tmp_path,
                *flags,
            )
            == 0
        )
        return list(counting.sizes), (tmp_path / "table.csv").read_text().splitlines()[1].split(",")

    short, table = run(4, "--compile", "--eot-batch", 2)
    full, _ = run(3, "--compile", "--eot-batch", 2)
    assert short == full and set(short) == {3, 6}  # images, and images x draws
    _, plain = run(4)
    assert counting.sizes == []
    assert table[:-1] == plain[:-1]  # all but the seconds, to the 4 digits of the table


# a classifier -------------------------------------------------------------------------------------


def test_a_classifier_is_compiled_if_asked(files, counting, monkeypatch):
    path, x = files / "classifier.pt", torch.rand(2, 3, 8, 8)
    plain, compiled = load_classifier(path), load_classifier(path, compiled=True)
    assert isinstance(load_classifier(path, compiled=None), WideResNet)  # a CPU
    assert (
        torch.equal(plain(x), compiled(x))
        and counting.sizes == [2]
        and compiled.config["classes"] == 10
    )
    monkeypatch.setattr(
        WideResNet,
        "to",
        lambda self, device, memory_format: self.train(memory_format == torch.channels_last),
    )
    assert load_classifier(path, "cuda").training  # a mark that it was asked for channels_last


# nothing waits ------------------------------------------------------------------------------------


class Copies(TorchDispatchMode):
    """Notes every operator between devices; those which ask for a value raise, as a tensor on
    "meta" has none."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [a for a in tree_leaves((args, kwargs, out)) if isinstance(a, torch.Tensor)]
        if len({a.device.type for a in tensors}) > 1:
            self.seen.append(str(func))
        return out


class Eps(nn.Conv2d):
    def forward(self, x, t):
        return super().forward(x) + t.view(-1, 1, 1, 1)


def elsewhere():
    """Network, classifier, schedule, 2 images and their numbers on a device that is not the CPU."""
    schedule = NoiseSchedule()
    assert schedule.sigmas  # read once
    with torch.device("meta"):
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        return (
            Eps(3, 3, 3, padding=1),
            classifier,
            schedule.to("meta"),
            torch.rand(2, 3, 8, 8),
            torch.arange(2),
        )


@pytest.mark.parametrize("sampler", purification.SAMPLERS)
def test_purification_never_waits_for_the_gpu(sampler, monkeypatch):
    def noise(seed, index, stream, shape):
        assert {seed.device.type, index.device.type, stream.device.type} == {"meta"}
        return torch.randn(len(index), *shape, device="meta")

    monkeypatch.setattr(purification, "noise_on", lambda kind: noise)
    monkeypatch.setattr(
        runtime, "autocast", lambda *a: contextlib.nullcontext()
    )  # which knows no "meta"
    args = argparse.Namespace(seed=0, eot=2, eot_batch=2, pgd=2, evaluations=2, attack="pgd")
    net, classifier, schedule, x, index = elsewhere()
    purifier = purification.PurifiedClassifier(
        net, schedule, classifier, sampler, nfe=2, strict=False
    )
    with Copies() as copies:
        row = purify.evaluate(purifier, x, index, index, args, "fwd", "l2")
    assert copies.seen == [] and {v.device.type for v in row.values()} == {"meta"}


@pytest.mark.parametrize(
    "sampler, settings",
    [
        ("ddpm", dict(kind="random")),
        ("ddpm", dict(iters=2, restarts=2)),
        ("ddim", dict(objective="x0", through=2)),
    ],
)
def test_the_attacked_step_copies_nothing_to_the_gpu(sampler, settings):
    net, _, schedule, x, index = elsewhere()
    options = DDPM if sampler == "ddpm" else dict(steps=2, eta=0.0, clip=True, rederive=True)
    on_step = attack.Attack(net, schedule, sampler, options, index, 0, **settings)
    with Copies() as copies:
        for i, (t, _) in enumerate(on_step.pairs):
            on_step(i, t, x)
    assert copies.seen == []
