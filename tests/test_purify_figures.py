"""purify_figures.py: the landscape and the trajectories of attacks whose ends are known."""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

import purify_figures
from purify_attack import noises

ARGS = argparse.Namespace(seed=0, eot=3, eot_batch=1, pgd=2, landscape=3)
INDEX = torch.arange(2)


class Tilted(nn.Module):
    """Two classes, logits (0, <w + z, x>): z, the noise of Eq. 2, tilts the border of each draw."""

    def forward(self, x, noise):
        self.w = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view_as(x[0])
        score = ((self.w + noise(0, x)) * (x - 0.5)).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)


def tilts(x, knowledge, k, eot):
    """w + z, the mean over draws: the loss of class 1 falls along it."""
    draws = noises(knowledge, 0, INDEX[: len(x)], k, eot)
    w = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view_as(x[0])
    return [w + noise(0, x) for noise in draws]


def ends(x):
    """Where White-box EoT-3 and DW_Both end, by an independent PGD-2 of steps of 2/255."""
    both = -4 / 255 * tilts(x, "both", 0, 1)[0].sign()
    white = torch.zeros_like(x)
    for k in range(2):
        grad = 0
        for tilt in tilts(x, "white", k, 3):
            score = (tilt * (x + white - 0.5)).flatten(1).sum(1)
            grad = grad - tilt * torch.sigmoid(-score).view(-1, 1, 1, 1)
        white = white + 2 / 255 * grad.sign()
    return white, both


def test_landscape_of_fig_3():
    """The plane of App. D in closed form: DW_Both ends at (1, 0), White-box at height 1."""
    x = 0.5 + 0.1 * torch.rand(2, 3, 4, 4, dtype=torch.float64)
    y = torch.ones(2, dtype=torch.long)
    found = purify_figures.landscape(Tilted(), x, y, ARGS)
    white, both = ends(x)
    share = (white * both).flatten(1).sum(1) / (both * both).flatten(1).sum(1)
    off = white - share.view(-1, 1, 1, 1) * both
    assert (off * both).flatten(1).sum(1).abs().max() < 1e-12 and 0.1 < share.mean() < 0.9
    paths = found["paths"]
    torch.testing.assert_close(
        torch.tensor(paths["all noise known (DW)"]),
        torch.tensor([[0.0, 0], [0.5, 0], [1, 0]]),
        atol=1e-6,
        rtol=0,
    )
    assert paths["White-box EoT-3"][0] == [0, 0]
    a, b = paths["White-box EoT-3"][-1]
    assert abs(a - share.mean()) < 1e-6 and abs(b - 1) < 1e-6
    assert found["a"] == [-0.5, 0.5, 1.5]
    tilt = tilts(x, "both", 0, 1)[0]
    for i, b in enumerate(found["a"]):
        for j, a in enumerate(found["a"]):
            score = (tilt * (x + a * both + b * off - 0.5)).flatten(1).sum(1)
            assert abs(found["loss"][i][j] - F.softplus(-score).mean().item()) < 1e-9


def test_trajectories_of_fig_1():
    """Five evaluations of one image: each known-noise attack ends at its own corner, where the loss
    under its own noise is highest; distances to the start in the plane are no larger than in full.
    """
    x = 0.5 + 0.1 * torch.rand(2, 3, 4, 4, dtype=torch.float64)
    found = purify_figures.trajectories(Tilted(), x, torch.ones(2, dtype=torch.long), ARGS)
    known = found["all noise known (DW)"]
    assert len(known["at"]) == len(known["loss"]) == 5 and len(known["at"][0]) == 3
    assert len({tuple(at[-1]) for at in known["at"]}) == 5
    for name, way in found.items():
        at, loss = torch.tensor(way["at"]), torch.tensor(way["loss"])
        assert ((at[:, -1] - at[:, 0]).norm(dim=1) <= 4 / 255 * 48**0.5 + 1e-6).all()
        assert (at[:, 0] == at[0, 0]).all()
        if name != "all noise known (DW)":
            assert (loss[:, -1] < torch.tensor(known["loss"])[:, -1]).all()
    white = torch.tensor(found["White-box EoT-3"]["loss"])[:, -1].mean()
    assert white > torch.tensor(found["White-box EoT-1"]["loss"])[:, -1].mean()


def test_the_figure_is_drawn(tmp_path):
    x, y = torch.full((2, 3, 4, 4), 0.55), torch.ones(2, dtype=torch.long)
    pair = [
        f(Tilted(), x, y, ARGS) for f in (purify_figures.landscape, purify_figures.trajectories)
    ]
    path = tmp_path / "landscape.png"
    purify_figures.plot_landscape({"a": pair}, "ddpm", {"a": ("#000000", "DDPM")}, path)
    assert path.stat().st_size > 10_000


def test_the_bars_are_named_with_their_draws(tmp_path, monkeypatch):
    """White-box averages ten draws, DW_Fwd one."""
    names = []
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig",
        lambda figure, *_, **__: names.extend(text.get_text() for text in figure.legends[0].texts),
    )
    score = dict(clean=0.5, clean_ci=(0.4, 0.6), robust=0.2, robust_ci=(0.1, 0.3), norm="linf")
    kinds = [("none", "no noise", 1), ("ddpm", "white", 10), ("ddpm", "fwd", 1), ("ddim", "fwd", 1)]
    record = []
    for purifier, knowledge, eot in kinds:
        row = dict(checkpoint="a", purifier=purifier, knowledge=knowledge, eot=eot)
        record.append(row | score)
    args = argparse.Namespace(purifier=["none", "ddpm", "ddim"], attack="pgd", pgd=20, n=8)
    purify_figures.plot(record, args, {"a": ("#000000", "DDPM")}, tmp_path / "purify.png")
    wanted = ["no purifier, linf", "White-box, linf, EoT-10", "DW_Fwd, linf"]
    assert names == ["clean", *wanted]
