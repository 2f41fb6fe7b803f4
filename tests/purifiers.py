"""Small purifiers, networks and images in float64, for the tests of purification."""

import argparse
import math

import torch
from torch import nn

from losses import NoiseSchedule
from purification import PurifiedClassifier

SCHEDULE = NoiseSchedule()
INDEX = torch.arange(3)


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Eps(nn.Module):
    """A small smooth eps-network, float64."""

    real_t = True

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 3, padding=1).double()

    def forward(self, x, t):
        return 0.6 * x + torch.tanh(self.conv(x) + t.view(-1, 1, 1, 1) / 1000)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def linear(shape=(3, 6, 6), seed=4):
    net = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2)).double()
    net[1].weight.data = draw(2, math.prod(shape), seed=seed)
    return net


def purifier(sampler="ddpm", model=None, classifier=None, **kw):
    if sampler != "none":
        kw = dict(nfe=5) | kw
    return PurifiedClassifier(model or Eps(), SCHEDULE, classifier or linear(), sampler, **kw)


def images(n=3, shape=(3, 6, 6)):
    return 0.1 + 0.8 * torch.rand(
        n, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


def settings(**kw):
    return argparse.Namespace(
        **(dict(seed=0, eot=2, eot_batch=1, pgd=3, evaluations=1, attack="pgd") | kw)
    )
