"""Purified classifiers under attack: the tables and figures of P2.

    python purify.py --ckpt ddpm/ckpt.pt addt/ckpt.pt --classifier wrn/classifier.pt --data cifar10
    python purify.py ... --purifier none ddpm ddim edm-sde --knowledge white fwd both --norm linf l2
    python purify.py ... --n 32 --nfe 5 --pgd 5 --eot 2 --knowledge white both semi-8 --figures 16
    python purify.py ... --n 1024 --batch-size 128 --eot 10 --eot-batch 10           # a large GPU

The second is for Fig. 2 and Tables 2 and 9, the third for a laptop. P2 = "Understanding and
Enhancing the Robustness of Diffusion-Based Purification". The claim: purification is robust because
its noise is unknown, not because it removes the perturbation: an attacker who knows all the noise
(DW_Both) breaks it; and ADDT (`train.py --robust addt`) makes it more robust, known noise or not.
The purifiers: purification.py; the attack and what it may know: purify_attack.py.

One purification with noise that the attack has not seen (except as stated there) decides.
--evaluations M > 1 also lets M purifications choose between the image and the attacked image, as
P2's repaired AutoAttack does, and M others (ours) judge. --attack aa-rand is that AutoAttack itself
(P2 Tables 13, 14; library_attack.py says what its columns are).

The checks are always on: image within the ball and [0, 1], gradients finite and not 0, loss above
that of the start on 90 % of the images. A violation is printed on stderr and kept in metrics.json.

Leaves --out/purify.png, table.csv, table.md and metrics.json; with --figures also figures.png (P2
Figs. 7, 8), with --landscape landscape.png (Figs. 1, 3). Image i and all its noise are functions of
--seed and i alone.
"""

import argparse
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

import library_attack
import outputs
import purify_figures
import runtime
import sample
from classifier import load_classifier, refuse_labels
from images import NAMES, load_images, refuse_other_classes
from losses import NoiseSchedule, like
from metrics import clopper_pearson, mcnemar
from purification import GDMP, NOISELESS, SAMPLERS, PurifiedClassifier
from purify_attack import NORMS, correct, judging_draws, noises, pgd
from runtime import between

ATTACKS = {  # --attack: its own defaults
    "pgd": dict(pgd=20, eot=None, evaluations=1),
    "aa-rand": dict(pgd=100, eot=20, evaluations=20),
}

# --------------------------------------------------------------------------------------------------
# one attack


def amounts_to(knowledge, sampler):
    """fwd is both where there is no other noise: all its draws would be equal."""
    return "both" if knowledge == "fwd" and sampler in NOISELESS else knowledge


def evaluate(net, x, y, index, args, knowledge, norm):
    """Attack a batch -> {name: (B,)}: right before and after it, over --evaluations, the checks."""
    knowledge = amounts_to(knowledge, getattr(net, "sampler", None))

    if args.attack == "aa-rand":
        settings = (args.eot, args.pgd, args.evaluations, args.eot_batch)
        return library_attack.autoattack_rand(
            net, x, y, index, args.seed, knowledge, norm, *settings
        )[1]

    def draws(k):
        return noises(knowledge, args.seed, index, k, args.eot)

    def right(x, numbers):
        return correct(net, x, y, args.seed, index, knowledge, numbers, args.eot_batch)

    x_adv, row = pgd(net, x, y, draws, norm, args.pgd, args.eot_batch)
    row["robust"] = right(x_adv, [0])
    row["clean"] = right(x, [0])
    if args.evaluations > 1:
        choosers, judges = judging_draws(knowledge, args.evaluations)
        image_is_worse = right(x, choosers) < right(x_adv, choosers)
        x_adv = torch.where(like(image_is_worse, x) > 0, x, x_adv)
        row["selected"] = right(x_adv, judges)
    return row


def summarise(rows):
    """{name: (n,)} of an attack -> accuracies with intervals, the checks, `violated` among them."""
    n = len(rows["robust"])
    d = {}
    # these may be shares, which vary less than a coin of that mean: a safe interval
    for key in ("clean", *purify_figures.ACCURACIES):
        if key in rows:
            d[key] = rows[key].mean().item()
            d[key + "_ci"] = clopper_pearson(rows[key].sum().item(), n)
    d["outside"] = int(rows["outside"].sum())
    d["nonfinite"] = int((rows["nonfinite"] > 0).sum())
    d["zero"] = rows["zero"].mean().item()
    d["rises"] = rows["rises"].mean().item()
    d["loss_start"] = rows["start"].mean().item()
    d["loss_end"] = rows["end"].mean().item()
    checks = [
        (d["outside"] == 0, f"ball: {d['outside']} images exceed the radius or [0, 1]"),
        (d["nonfinite"] == 0, f"gradient: NaN or infinite for {d['nonfinite']} images"),
        (d["zero"] == 0, f"gradient: exactly 0 in {d['zero']:.2%} of (image, step)"),
        (d["rises"] >= 0.9, f"loss: above the start's on only {d['rises']:.0%} of the images"),
    ]
    d["violated"] = []
    for ok, line in checks:
        if not ok:
            d["violated"].append(line)
    return d


class Done:
    """What this process has done, kept in a file after each batch.

    attacks: {checkpoint, purifier, knowledge and norm: dict(rows={name: (k,)} of the first k of its
    images, calls=network calls of one purification, seconds=)}. With --resume it begins with those
    of the file.
    """

    def __init__(self, path, args, world, images):
        free = "device data_root out resume figures landscape".split()
        free += "batch_size eot_batch compile no_checkpoint".split()
        free += "n purifier knowledge norm".split()  # more images, further attacks
        settings = {name: value for name, value in vars(args).items() if name not in free}
        first = {size: zlib.crc32(x[0].numpy().tobytes()) for size, (x, _) in images.items()}
        self.settings = settings | dict(world=world, data=[args.data, first])
        self.path = path
        self.attacks = {}
        if args.resume and path.exists():
            found = runtime.load_checkpoint(path)
            if not all(isinstance(found.get(part), dict) for part in ("settings", "attacks")):
                raise ValueError(f"--resume: {path} holds no attacks of purify.py")
            for name, value in self.settings.items():
                if found["settings"].get(name) != value:
                    raise ValueError(f"--resume: {path} is of another {runtime.flag(name)}")
            self.attacks = found["attacks"]

    def of(self, run):
        return self.attacks.setdefault(" ".join(run), dict(rows={}, calls=0, seconds=0.0))

    def add(self, run, row, calls, seconds):
        attack = self.of(run)
        for name, values in row.items():
            attack["rows"][name] = torch.cat([attack["rows"].get(name, values[:0]), values])
        attack["calls"] = calls
        attack["seconds"] += seconds
        found = dict(settings=self.settings, attacks=self.attacks)
        runtime.save_checkpoint(self.path, found)


def run_attack(net, images, args, run, where, bar, done):
    """The rows {name: (n,)} of evaluate over all images, the same on every process; those in `done`
    are not attacked again."""
    device, rank, world = where
    _, _, knowledge, norm = run
    x, y = images
    mine = list(range(args.n))[rank::world]
    first = len(done.of(run)["rows"].get("robust", []))
    bar.update(min(first, len(mine)))
    left = mine[first:]  # none, if it was of a larger --n
    for numbers, count in sample.batches(left, args.batch_size, sample.is_compiled(net.model)):
        began = time.time()
        index = torch.tensor(numbers, device=device)
        batch = x[numbers].to(device), y[numbers].to(device)
        with runtime.autocast(device, args.amp):
            row = evaluate(net, *batch, index, args, knowledge, norm)
        row = {name: values[:count].double().cpu() for name, values in row.items()}
        done.add(run, row, net.calls, time.time() - began)
        bar.update(count)
    rows = {}
    for name, values in done.of(run)["rows"].items():
        rows[name] = torch.zeros(args.n, dtype=torch.float64)
        rows[name][mine] = values[: len(mine)]
        if world > 1:  # every row is written by one process; the others hold zeros
            dist.all_reduce(rows[name])
    return rows


# --------------------------------------------------------------------------------------------------
# the experiment


def parse(argv=None):
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    count = dict(type=between(1, kind=int))
    variances = ["fixed-large", "fixed-small"]
    norms = "l_inf 8/255 in steps of 2/255, l_2 0.5 in steps of 0.1"
    add("--ckpt", required=True, nargs="+", help="checkpoints of train.py, or diffusers folders")
    networks = "a checkpoint of classifier.py, torchvision:NAME:PATH or wrn:PATH"
    add("--classifier", required=True, metavar="PATH", help=networks)
    add("--data", required=True, metavar="NAME", help=f"its test split; all of a folder; {NAMES}")
    add("--data-root", default="data")
    add("--n", **count, default=64, help="test images; P2: 1024")
    add("--purifier", nargs="+", choices=SAMPLERS, default=["none", "ddpm"])
    add("--knowledge", nargs="+", default=["white", "both"], help="white | fwd | both | semi-N")
    add("--norm", nargs="+", choices=NORMS, default=["linf"], help=norms)
    add("--attack", choices=ATTACKS, default="pgd", help="aa-rand takes pip install pyautoattack")
    add("--pgd", **count, metavar="K", help="steps of the attack; default: 20, aa-rand 100")
    eot = "draws averaged; default: white 10, fwd 1 (P2's code), aa-rand 20"
    add("--eot", **count, metavar="N", help=eot)
    judges = "purifications that choose and judge; default: 1, aa-rand 20"
    add("--evaluations", **count, metavar="M", help=judges)
    add("--t-star", type=int, help="t of the diffused image; default: 100, EDM sigma .5, GDMP 36")
    add("--nfe", type=int, help="steps back; default: t*, EDM 50")
    draws = between(0, kind=int)
    add("--figures", type=draws, default=0, metavar="N", help="figures.png, EoT up to N draws")
    add("--landscape", type=draws, default=0, metavar="G", help="landscape.png on a grid of G x G")
    add("--variance", choices=variances, default="fixed-large", help="ddpm, gdmp: s_t^2 of Eq. 5")
    add("--coup", type=between(0), default=1.0, help="coup: weight of the confidence (ours)")
    add("--noise-removal", action="store_true", help="vp-sde: last step without noise (P2's code)")
    add("--no-clip", action="store_true", help="do not clip x^_0 to [-1, 1]")
    add("--raw", action="store_true", help="raw instead of EMA weights")
    add("--batch-size", **count, default=64, help="changes memory and speed, not the images")
    add("--seed", type=runtime.SEED, default=0)
    add("--eot-batch", **count, default=1, metavar="D", help="draws in one network call, batch x D")
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    kept = "keep activations: a third less time, memory x --nfe"
    add("--no-checkpoint", action="store_true", help=kept)
    more = "continue in --out, with the images that are left, a larger --n, further attacks"
    add("--resume", action="store_true", help=more)
    add("--out", default="purify")
    args = parser.parse_args(argv)
    for name, value in ATTACKS[args.attack].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    runtime.refuse_repeats(args, "purifier", "knowledge", "norm")
    for name in args.knowledge:
        draws = name.removeprefix("semi-") if name.startswith("semi-") else ""
        known = draws.isdecimal() and 0 < int(draws) < 10**6
        if name not in ("white", "fwd", "both") and not known:
            raise ValueError(f"--knowledge {name}: need white, fwd, both or semi-N with N >= 1")
    idle = runtime.idle_flags(parser, argv)
    unpurified = "t_star nfe variance no_clip raw knowledge eot figures landscape coup "
    unpurified += "no_checkpoint"
    idle(set(args.purifier) == {"none"}, unpurified, "with --purifier none alone")
    fresh = {"white", "fwd"} & set(args.knowledge) or args.landscape  # draws to average over
    idle(not fresh, "eot", "without --knowledge white or fwd")
    idle(not {"ddpm", *GDMP} & set(args.purifier), "variance", "without --purifier ddpm or gdmp")
    idle("coup" not in args.purifier, "coup", "without --purifier coup")
    if args.landscape == 1:
        raise ValueError("--landscape 1: needs at least 2")
    options = dict(t_star=args.t_star, nfe=args.nfe, clip=not args.no_clip, variance=args.variance)
    options |= dict(noise_removal=args.noise_removal, coup=args.coup)
    options |= dict(checkpointed=not args.no_checkpoint)
    sde = {"vp-sde", "vp-sde-corrector", "coup"}  # these clip nothing
    idle(not sde & set(args.purifier), "noise_removal", "without --purifier vp-sde or coup")
    idle(set(args.purifier) <= sde, "no_clip", "with --purifier vp-sde or coup alone")
    for sampler in args.purifier:  # all refused before any is run
        PurifiedClassifier(nn.Identity(), NoiseSchedule(), nn.Identity(), sampler, **options)
    return args, options


def first_images(name, size, n, root):
    """x (n, 3, S, S) in [0, 1], labels (n,): the first n of the test split; of a folder, which is
    sorted by class, of one random order: a larger n only adds to them."""
    images, labels = load_images(name, size, "test", root, labels_needed=True)
    if n > len(images):
        raise ValueError(f"--n {n}: --data {name} has {len(images)} images")
    rows = np.arange(len(images))
    if name.startswith("folder:"):
        rows = np.random.default_rng(0).permutation(rows)
    rows = rows[:n]
    x = torch.from_numpy(images[rows]).permute(0, 3, 1, 2).float() / 255
    return x, torch.as_tensor(labels)[torch.from_numpy(rows)]


def load_network(path, args, device):
    """-> the network of a checkpoint, compiled if asked for, its image size and training settings.

    Without CUDA graphs, which would write one call's output over another's: an attack needs those
    of all steps until its gradient is there.
    """
    load = argparse.Namespace(raw=args.raw, compile=False, image_size=None, amp=args.amp)
    model, size, trained = sample.load_model(path, load, device)
    if args.compile or (args.compile is None and device.type == "cuda"):
        model = torch.compile(model, dynamic=False)
    return model, size, trained


def load(args, device, world):
    """-> models {folder: (network, size, settings)}, the classifier, images {size: (x, y)}."""
    classifier = load_classifier(args.classifier, device, args.compile)
    refuse_other_classes(f"--classifier {args.classifier}", classifier.classes, args.data)
    names = sample.folder_names(args.ckpt)
    models = {name: load_network(path, args, device) for name, path in zip(names, args.ckpt)}
    data = {}
    with runtime.machine_by_one(world):
        for _, size, _ in models.values():
            data[size] = first_images(args.data, size, args.n, args.data_root)
    for _, labels in data.values():
        refuse_labels(classifier, args.classifier, labels, args.data)
    return models, classifier, data


def planned(args, names):
    """(checkpoint, purifier, knowledge, norm) of every attack."""
    for name in names:
        for sampler in args.purifier:
            for norm in args.norm:
                for knowledge in args.knowledge if sampler != "none" else ["no noise"]:
                    yield name, sampler, knowledge, norm


def draw_figures(args, options, models, classifier, data, styles, out, device):
    """figures.png and landscape.png, of the first batch and the first purifier -> their numbers."""
    curves = {}
    planes = {}
    if not (args.figures or args.landscape):
        return dict(directions=curves, landscapes=planes)
    schedule = NoiseSchedule().to(device)
    sampler = next(sampler for sampler in args.purifier if sampler != "none")
    for name, (model, size, _) in models.items():
        x, y = (a[: args.batch_size].to(device) for a in data[size])
        net = PurifiedClassifier(model, schedule, classifier, sampler, **options)
        with runtime.autocast(device, args.amp):
            if args.figures:
                curves[name] = purify_figures.directions(net, x, y, args)
            if args.landscape:
                plane = purify_figures.landscape(net, x, y, args)
                planes[name] = plane, purify_figures.trajectories(net, x, y, args)
    if curves:
        purify_figures.plot_directions(curves, sampler, styles, out / "figures.png")
    if planes:
        purify_figures.plot_landscape(planes, sampler, styles, out / "landscape.png")
    return dict(directions=curves, landscapes=planes)


def main():
    started = time.time()
    args, options = parse()
    device, rank, world = where = runtime.setup(args.device, True, args.compile)
    if args.n < world:
        raise ValueError(f"--n {args.n}: fewer than the {world} processes")
    dtype = runtime.precision(device, args.amp)  # refuses what the device cannot do
    if args.attack == "aa-rand":
        library_attack.package()
        if dtype == torch.float16:  # the library scales no gradient
            raise ValueError("--attack aa-rand: gradients vanish in fp16; use --amp bf16 or fp32")
    models, classifier, data = load(args, device, world)
    out = outputs.claim(args.out) if rank == 0 else Path(args.out)
    schedule = NoiseSchedule().to(device)
    runs = list(planned(args, models))
    record = []
    first = {}  # the rows of the first checkpoint, by attack
    done = Done(out / f"rows-{rank}.pt", args, world, data)
    total = len(range(args.n)[rank::world]) * len(runs)
    with tqdm(total=total, desc="attack", unit="img", disable=rank > 0) as bar:
        for run in runs:
            name, sampler, knowledge, _ = run
            model, size, _ = models[name]
            net = PurifiedClassifier(
                model, schedule, classifier, sampler, strict=False, **options
            )  # the attacks clamp
            rows = run_attack(net, data[size], args, run, where, bar, done)
            row = dict(zip(("checkpoint", "purifier", "knowledge", "norm"), run))
            eot = len(noises(amounts_to(knowledge, sampler), args.seed, None, 0, args.eot))
            row |= dict(calls=done.of(run)["calls"], eot=eot) | summarise(rows)
            row["seconds"] = done.of(run)["seconds"]
            if run[1:] in first and args.attack == "pgd":  # aa-rand's rows are shares
                for key in ("clean", "robust"):
                    counts = mcnemar(rows[key].numpy(), first[run[1:]][key].numpy())
                    row |= {f"{key}_{of}": value for of, value in counts.items()}
            first.setdefault(run[1:], rows)
            record.append(row)
            if rank == 0:
                for line in row["violated"]:
                    tqdm.write(f"CHECK VIOLATED: {', '.join(run)}: {line}", file=sys.stderr)
                outputs.write_table(out / "table.csv", record)
                tables = purify_figures.table(record, args) + purify_figures.pairs(record)
                (out / "table.md").write_text(tables)
    if rank == 0:
        methods = {name: outputs.method_of(trained) for name, (_, _, trained) in models.items()}
        styles = outputs.styles(methods)
        purify_figures.plot(record, args, styles, out / "purify.png")
        figures = draw_figures(args, options, models, classifier, data, styles, out, device)
        settings = ["n", "attack", "pgd", "data", "classifier", "evaluations"]
        settings = {name: getattr(args, name) for name in settings} | options
        violated = sum(len(row["violated"]) for row in record)
        settings |= dict(world=world, runs=record, violated=violated) | figures
        outputs.write_metrics(out, started, seed=args.seed, device=device, **settings)
        print((out / "table.md").read_text(), end="")
        print(f"-> {out}/purify.png, table.csv, table.md, metrics.json")
    runtime.leave(world)


if __name__ == "__main__":
    runtime.cli(main)
