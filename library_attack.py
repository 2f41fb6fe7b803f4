"""Attack libraries on a purified classifier under any knowledge of its noise, and AutoAttack-rand
as P2 repairs it (App. J).

    victim = Attackable(net, x, "both", seed=0)  # net: purification.PurifiedClassifier
    x_adv = torchattacks.PGD(victim, eps=8 / 255, alpha=2 / 255, steps=20)(x, y)
    x_adv, row = autoattack_rand(net, x, y, index, seed=0, knowledge="white", norm="linf")

A library picks images out of the batch, repeats them and changes their order: the noise follows the
image. AutoAttack-rand is APGD on the cross-entropy, then APGD on the difference of logits ratio
(Croce & Hein, 2020), both by the authors' own package: `pip install pyautoattack`.
"""

import torch
from torch import nn

import sample
from losses import like
from purify_attack import (
    NORMS,
    UNSEEN,
    correct,
    judging_draws,
    loss_of,
    noises,
    outside,
    over_draws,
)
from rng import image_noise, image_uniform

STARTS = 3 * UNSEEN  # the draws of the random starts
CALLS = 2**18  # reserved for one attack, so that its draws do not depend on the batch


class Attackable(nn.Module):
    """x (B, C, H, W) -> logits (B, classes): a purified classifier as an attack library wants it.

    clean (n, C, H, W) in [0, 1]: the images that are attacked; index (n,): their numbers, by
    default 0..n-1. Each row of x gets the noise of the clean image that it is nearest to, whatever
    the batch; of equal images all get that of the first. An attack that starts from another image,
    as boundary attacks do, needs a call for each image: with n = 1 all rows are that image.
    Call k takes the fresh draw k under white and fwd, draw k modulo N under semi-N: EoT-N of a
    library is then the average over all N.
    Counts, image by image, what the library asks for: `asked` gradients, `zero`, `nonfinite` ones.
    """

    def __init__(self, net, clean, knowledge, seed, index=None):
        super().__init__()
        self.net = net
        self.clean = clean.detach().flatten(1)
        if index is None:
            index = torch.arange(len(clean), device=clean.device)
        self.index = index
        self.knowledge = knowledge
        self.seed = seed
        self.calls = 0
        self.padded = sample.is_compiled(getattr(net, "model", None))
        self.asked = torch.zeros(len(clean), device=clean.device)
        self.zero = torch.zeros_like(self.asked)
        self.nonfinite = torch.zeros_like(self.asked)

    def forward(self, x):
        rows = self.nearest(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(lambda grad: self.note(rows, grad))
        count = len(x)
        index = self.index[rows]
        if self.padded and count < len(self.clean):  # one size, or it is compiled for each
            more = len(self.clean) - count
            x = torch.cat([x, x[:1].expand(more, *x.shape[1:])])
            index = torch.cat([index, index[:1].expand(more)])
        draws = noises(self.knowledge, self.seed, index, self.calls, 1)
        noise = draws[self.calls % len(draws)]
        self.calls += 1
        return self.net(x, noise)[:count].float()

    def nearest(self, x):
        """-> (B,) which of the clean images each row of x belongs to."""
        x = x.detach().flatten(1).to(self.clean.dtype)
        exact = "donot_use_mm_for_euclid_dist"
        return torch.cdist(x, self.clean, compute_mode=exact).argmin(1)

    def note(self, rows, grad):
        """Counts -> the same gradient, contiguous: libraries view it as vectors."""
        flat = grad.flatten(1)
        self.asked.index_add_(0, rows, torch.ones_like(self.asked[rows]))
        self.zero.index_add_(0, rows, (flat == 0).all(1).float())
        self.nonfinite.index_add_(0, rows, (~flat.isfinite()).any(1).float())
        return grad.contiguous()


def package():
    try:
        from pyautoattack import autopgd_base
    except ImportError:
        raise ValueError("--attack aa-rand: takes `pip install pyautoattack`") from None
    return autopgd_base


def apgd(victim, x, y, loss, norm, eot, steps, start):
    """One APGD of the library from a random start -> candidates of x's shape.

    loss: ce | dlr. start: the draw of the random start, the library's, but a function of (seed,
    index[i]) alone. Images that one pass misclassifies are left as they are (the library's choice).
    """
    radius = NORMS[norm][0]
    kind = {"linf": "Linf", "l2": "L2"}[norm]
    attack = package().APGDAttack(
        victim, steps, kind, eps=radius, seed=0, loss=loss, eot_iter=eot, device=x.device
    )
    single_run = attack.attack_single_run
    seed = victim.seed + (start << 32)

    def from_start(x, y):
        numbers = victim.index[victim.nearest(x)]
        if norm == "linf":
            way = 2 * image_uniform(seed, numbers, 0, x.shape[1:]) - 1
            way = way / like(way.flatten(1).norm(dim=1, p=float("inf")), x)
        else:
            way = image_noise(seed, numbers, 0, x.shape[1:])
            way = way / like(way.flatten(1).norm(dim=1), x)
        return single_run(x, y, x_init=x + radius * way)

    attack.attack_single_run = from_start
    return attack.perturb(x.contiguous(), y).detach().to(x.dtype)


def autoattack_rand(
    net, x, y, index, seed, knowledge, norm, eot=20, steps=100, evaluations=20, eot_batch=1
):
    """AutoAttack-rand -> x_adv, row {name: (B,)}.

    clean      accuracy over `evaluations` passes
    robust     P2's: after each attack the candidate is kept only if its accuracy over as many fresh
               passes is lower; the accuracy of what is kept. The smallest of noisy shares is a
               little low
    judged     ours: what is kept, over as many passes that chose nothing
    flags      AutoAttack's own count: right in one pass of the image and in one of each candidate
    unrepaired one fresh pass of what AutoAttack itself returns: the candidate of an image that one
               pass of it misclassified, else the image

    and the checks of purify_attack.pgd. Where the attack knows all the noise there is no fresh
    pass: the known draws choose and judge. Resets torch's global generator, as the library does.
    """
    choosers, judges = judging_draws(knowledge, evaluations)
    eot = len(noises(knowledge, seed, index, 0, eot))  # under both 1, under semi-N all N

    def share(x, draws):
        return correct(net, x, y, seed, index, knowledge, draws, eot_batch)

    victim = Attackable(net, x, knowledge, seed, index)
    kept = returned = x
    robust = clean = share(x, choosers)
    unfooled = share(x, choosers[:1]) > 0
    zero = torch.zeros_like(robust)
    for number, loss in enumerate(("ce", "dlr"), 1):
        rows = (robust > 0).nonzero().flatten()
        if len(rows) == 0:
            break
        candidate = x.clone()
        start = STARTS + number
        victim.calls = (number - 1) * CALLS
        candidate[rows] = apgd(victim, x[rows], y[rows], loss, norm, eot, steps, start)
        if loss == "ce":  # that of DLR is 0 wherever the label comes third
            zero = (victim.zero / victim.asked.clamp_min(1)).double()
        fresh = choosers
        if choosers != judges:
            fresh = [draw + number * evaluations for draw in choosers]
        now = share(candidate, fresh)
        kept = torch.where(like(now < robust, x) > 0, candidate, kept)
        robust = torch.minimum(now, robust)
        fooled = unfooled & (share(candidate, fresh[:1]) == 0)
        returned = torch.where(like(fooled, x) > 0, candidate, returned)
        unfooled = unfooled & ~fooled
    row = dict(clean=clean, robust=robust, judged=share(kept, judges))
    row |= dict(flags=unfooled.double(), unrepaired=share(returned, judges[:1]))
    row |= dict(zero=zero, nonfinite=victim.nonfinite.double())
    return kept, row | checks(victim, x, kept, y, norm, eot_batch)


def checks(victim, x, x_adv, y, norm, eot_batch):
    """As purify_attack.pgd's; an image that was kept as it is counts as risen."""
    draws = noises(victim.knowledge, victim.seed, victim.index, 2 * CALLS, 1)  # not used yet
    start = over_draws(loss_of, victim.net, x, y, draws, eot_batch)
    end = over_draws(loss_of, victim.net, x_adv, y, draws, eot_batch)
    return dict(
        outside=outside(x, x_adv - x, norm),
        rises=((end > start) | (x_adv == x).flatten(1).all(1)).double(),
        start=start,
        end=end,
    )
