"""curves.png, from metrics.json beside this file: python results/recipe/plot.py

Left and middle: distance to the clean test images against the steps of training, one dot a seed.
Right: what is left of the noise, and the distance, after 10,000 steps, one dot a method and seed.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from outputs import plt  # noqa: E402

SAMPLERS = {"ddpm": "100-step DDPM (Eq. 5)", "ddim": "50-step DDIM"}
NETWORKS = {  # prefix of a record at 10,000 steps: label, colour
    "none": ("DDPM", "#000000"),
    "band": ("Robust_adv late", "#D55E00"),
    "band-ran": ("Robust_ran late", "#56B4E9"),
    "t5": ("Robust_adv late, t ≥ 5, λ .3", "#E69F00"),
    "late": ("Robust_adv late, all t, λ .3", "#F0E442"),
    "ran": ("Robust_ran late, t ≥ 5, λ .3", "#CC79A7"),
    "drop-none": ("drop-noisy", "#0072B2"),
    "drop-band": ("drop-noisy, Robust_adv late", "#009E73"),
    "ambient": ("ambient", "#999999"),
}
CURVES = {  # of training length: the words of a record's name
    "DDPM": ("DDPM, {}", "none", "#000000"),
    "Robust_adv late": ("late, 5 <= t < 100, {}", "band", "#D55E00"),
    "Robust_adv late, t ≥ 5, λ .3": ("late, t >= 5, {}", "t5", "#E69F00"),
    "Robust_adv late, all t, λ .3": ("late, {}", "late", "#F0E442"),
    "Robust_adv from the first step": ("from scratch, {}", None, "#0072B2"),
}
EARLIER = {
    "DDPM": "ddpm",
    "Robust_adv late, all t, λ .3": "late",
    "Robust_adv from the first step": "scratch",
}


def distance(record):
    return next(value for key, value in record.items() if key.startswith(("Fr", "distance")))


def points_of(label, sampler, records):
    """[(steps, distance)] of a method, all seeds."""
    words, short, _ = CURVES[label]
    points = []
    if sampler == "ddpm" and label in EARLIER:  # DDIM was another then: eps was not re-derived
        for name, row in records["earlier_4000_steps"]["rows"].items():
            if re.fullmatch(rf"{EARLIER[label]}-s\d-ddpm", name):
                points.append((4000, row["distance"]))
    for seed in range(3):
        for steps in (2000, 6000, 10_000, 20_000):
            names = f"{words.format(steps)}, seed {seed}", f"{steps:,} steps, {short}-s{seed}"
            found = [f"{name}, {sampler}" for name in names if f"{name}, {sampler}" in records]
            if found:
                points.append((steps, distance(records[found[0]])))
    return points


def main():
    records = json.loads((HERE / "metrics.json").read_text())
    fig, axes = plt.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    for ax, (sampler, title) in zip(axes, SAMPLERS.items()):
        for label, (_, _, colour) in CURVES.items():
            points = points_of(label, sampler, records)
            steps = sorted({step for step, _ in points})
            means = [sum(d for s, d in points if s == step) for step in steps]
            counts = [sum(s == step for s, _ in points) for step in steps]
            ax.plot(
                steps, [m / c for m, c in zip(means, counts)], color=colour, label=label, lw=1.4
            )
            ax.plot(*zip(*points), "o", color=colour, ms=4)
        ax.set(title=title, xlabel="steps of training, thousands", ylabel="distance", ylim=(0, 6))
        ax.set_xticks([2000, 4000, 6000, 10_000, 20_000], [2, 4, 6, 10, 20])
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    for prefix, (label, colour) in NETWORKS.items():
        for sampler, marker in (("ddpm", "o"), ("ddim", "^")):
            for seed in range(3):
                record = records.get(f"10,000 steps, {prefix}-s{seed}, {sampler}")
                if record:
                    style = dict(label=label) if (sampler, seed) == ("ddpm", 0) else {}
                    position = record["noise_level"], distance(record)
                    axes[2].plot(*position, marker, color=colour, ms=6, ls="", **style)
    clean = records["clean training images, 1,000 of them"]
    noisy = records["noisy training images, 1,000 of them"]
    for record, text in ((clean, "clean images"), (noisy, "as trained on")):
        axes[2].plot(record["noise_level"], distance(record), "x", color="0.4")
        at = record["noise_level"] + 0.003, distance(record) + 0.1
        axes[2].annotate(text, at, fontsize=8)
    title = "10,000 steps; ● DDPM, ▲ DDIM"
    axes[2].set(title=title, xlabel="noise left", ylabel="distance", xlim=(0.02, 0.25), ylim=(0, 6))
    axes[2].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes[2].grid(alpha=0.3)
    fig.savefig(HERE / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
