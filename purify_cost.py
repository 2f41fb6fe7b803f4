"""What the commands of reproduce_purify.py cost, before they run: forward passes of the diffusion
network, and EFLOP (10^18 multiplications and additions).

A gradient in the image passes the network three times: forward, forward again (checkpointed) and
backward, whose weights want no gradient. A training step passes it three times as well. Left out is
the classifier behind a purifier, which is called once for a whole purification. An estimate, within
some percent: every classifier is counted on 50,000 images, and what judges an attack generously.
"""

import functools
import math

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import classifier
import purify
import train
import training
from losses import NoiseSchedule
from purification import PurifiedClassifier
from purify_attack import noises
from runner import finished
from unet import PRESETS, UNet

PASSES = 3  # of a gradient, and of a training step
UNITS = {3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}
IMAGES = 50_000  # of a training set, CIFAR's


@functools.cache
def flops(kind, name, size):
    """Of one forward of one image; kind: unet | classifier, name: of its presets."""
    with torch.device("meta"):
        if kind == "unet":
            net = UNet(**PRESETS[name])
            inputs = torch.empty(1, 3, size, size), torch.zeros(1, dtype=torch.long)
        else:
            net = classifier.WideResNet(**classifier.PRESETS[name], classes=10)
            inputs = (torch.empty(1, 3, size, size),)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net.eval()(*inputs)
    return counter.get_total_flops()


@functools.cache
def calls(sampler, nfe):
    """Network calls of one purification, counted on an image of one number."""

    def model(x, t):
        return x

    model.real_t = True  # as UNet
    net = PurifiedClassifier(model, NoiseSchedule(), nn.Identity(), sampler, nfe=nfe)
    with torch.no_grad():
        net.purify(torch.zeros(1, 1, 1, 1))
    return net.calls


def passes_of_attack(argv):
    """Forward passes of the diffusion network in `purify.py ARGV`: {sampler: passes}."""
    args, _ = purify.parse(argv)
    found = {}
    for _, sampler, knowledge, _ in purify.planned(args, args.ckpt):
        if sampler == "none":
            continue
        known = purify.amounts_to(knowledge, sampler)
        draws = len(noises(known, 0, None, 0, args.eot))
        steps = args.pgd
        if args.attack == "aa-rand":  # two attacks, one more gradient each; libraries loop over EoT
            steps = 2 * (args.pgd + 1)
        judged = 4 * args.evaluations + 2 * draws
        each = calls(sampler, args.nfe) * (PASSES * steps * draws + judged)
        found[sampler] = found.get(sampler, 0) + args.n * each
    if args.figures or args.landscape:
        sampler = next(name for name in args.purifier if name != "none")
        draws = args.eot or 10
        gradients = 2 * args.figures + 2 * args.pgd * (draws + 1)
        each = calls(sampler, args.nfe) * (PASSES * gradients + args.landscape**2)
        images = len(args.ckpt) * min(args.n, args.batch_size)
        found[sampler] = found.get(sampler, 0) + images * each
    return found


def value_of(argv, flag, default=None):
    return argv[argv.index(flag) + 1] if flag in argv else default


def cost_of(argv, model, image, wrn):
    """(forward passes, FLOP) of a command; model, image: of the diffusion network it is for."""
    script, *flags = argv
    one = flops("unet", model, image)
    if script == "purify.py":
        passes = sum(passes_of_attack(flags).values())
        return passes, passes * one
    if script == "sample.py":
        passes = int(value_of(flags, "--n")) * int(value_of(flags, "--steps"))
        return passes, passes * one
    if script == "classifier.py":
        steps = float(value_of(flags, "--epochs")) * IMAGES
        return 0, steps * PASSES * flops("classifier", value_of(flags, "--model"), image)
    recipe = dict(train.RECIPES[model])
    addt = "addt" in flags
    if addt and model not in ("tiny", "mini"):
        recipe |= training.ADDT_DDPM
    images = int(value_of(flags, "--iters", recipe["iters"])) * recipe["batch_size"]
    guided = 5 if addt and value_of(flags, "--addt-guide") != "none" else 0
    passes = images * (PASSES + 2 * guided)
    flop = passes * one
    if "--classifier" in flags:
        flop += images * 2 * guided * flops("classifier", wrn, image)
    return passes, flop


def lines_of(todo, size):
    """-> lines: forward passes and FLOP of the commands that are left, by script, and of all.

    size: one of reproduce_purify.SIZES.
    """
    left = {}
    for done, argv in todo:
        if finished(done, argv):
            continue
        tiny = "tiny-imagenet" in argv
        model, image = ("ddpm64", 64) if tiny else (size["model"], size["image"])
        passes, flop = cost_of(argv, model, image, size["wrn"])
        before = left.get(argv[0], (0, 0, 0))
        left[argv[0]] = (before[0] + 1, before[1] + passes, before[2] + flop)
    lines = []
    for script, (count, passes, flop) in left.items():
        lines.append(f"{script}: {count} commands, {passes:.3g} forward passes, {in_words(flop)}")
    return [*lines, f"in all: {in_words(sum(flop for *_, flop in left.values()))}"]


def in_words(flop):
    """1.2e18 -> '1.2 EFLOP', from a hundredth of a day on with the days of a GPU."""
    exponent = min(3 * math.floor(math.log10(max(flop, 1)) / 3), 18)
    words = f"{flop / 10.0**exponent:.3g} {UNITS.get(exponent, '')}FLOP"
    days = flop / (0.4 * 990e12) / 86400
    return words if days < 0.01 else f"{words}, {days:.2g} days of an H100 at 40 % of 990 TFLOP/s"
