"""The tables and figures of P2 as one list of commands: `reproduce.py purify`.

    python reproduce.py purify toy --data folder:cifar10/train --test folder:cifar10/test  # a CPU
    python reproduce.py purify full --data cifar10 --inception-weights PATH  # 8 days of an H100
    python reproduce.py purify full --ddpm ddpm-cifar10-32/ --classifiers torchvision:vgg16:PATH
    python reproduce.py purify full --dry-run      # the commands, what they are for, what they cost

P2 starts from a trained DDPM: --ddpm is one, a checkpoint or diffusers' folder; without it, one is
trained. --classifiers adds rows to Table 4. Networks and attacks stay in --work; --out gets
table.md and sweeps.png. Before anything starts the cost of what is left is printed, as
purify_cost.py counts it. AutoAttack takes `pip install pyautoattack`.
"""

import time
from pathlib import Path

import library_attack
import outputs
import purify_cost
import runtime
from purify_figures import percent, plot_sweeps
from runner import add_arguments, check, finished, run_all

SIZES = {
    "toy": dict(
        image=16,
        model="mini",
        train="--iters 300 --sample-every 0".split(),
        tune="--iters 30 --sample-every 0".split(),
        wrn="small",
        classifier="--epochs 4".split(),
        attack="--n 16 --batch-size 16 --pgd 4 --eot 2".split(),
        autoattack="--n 8 --batch-size 8 --pgd 4 --evaluations 4".split(),
        autoattack_eot="--eot 2".split(),
        nfe=(5, 2),  # the first is everywhere else
        eot=(1, 4),
        few="--n 8 --batch-size 8 --pgd 3".split(),
        figures="--eot 2 --figures 4 --landscape 4".split(),
        semi="semi-4",
        fid="--n 64 --sampler ddpm --steps 20 --no-png".split(),
        other_sets=(),
        wrn_large=None,
    ),
    "full": dict(
        image=32,
        model="ddpm",
        train=[],
        tune=[],
        wrn="wrn-28-10",
        classifier="--epochs 200".split(),
        attack="--n 1024 --batch-size 128 --eot-batch 2".split(),
        autoattack="--n 512 --batch-size 128 --eot-batch 2".split(),
        autoattack_eot=[],
        nfe=(100, 50, 20, 10, 5, 2, 1),
        eot=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
        few="--n 128 --batch-size 128".split(),
        figures="--figures 512 --landscape 21".split(),
        semi="semi-128",
        fid="--n 50000 --sampler ddpm --steps 1000 --no-png".split(),
        other_sets=("cifar100", "tiny-imagenet"),
        wrn_large="wrn-70-16",
    ),
}
BOTH_NORMS = "--norm linf l2".split()
WHITE = "--knowledge white".split()
SDE = ["--noise-removal"]  # as P2's code
KNOWN = "--knowledge fwd both".split()
ALL = "none ddpm ddim gdmp gdmp-mse gdmp-ssim coup vp-sde vp-sde-corrector edm-sde edm-ode".split()
TUNED = {  # folder: flags of its fine-tuning
    "addt": [],
    "plain": ["--addt-guide", "none"],
    "mse": ["--addt-guide", "mse"],
    "linf": ["--addt-perturb", "linf"],
    "unit-0.02": ["--addt-unit", "0.02"],
    "unit-0.04": ["--addt-unit", "0.04"],
}
NOT_RUN = {
    "Table 8": "what each attack knows: no numbers, the head of purify_attack.py",
    "Fig. 4": "a drawing of RBGM, losses.rank_gaussian_map",
    "Fig. 5": "a drawing of ADDT, losses.addt_loss",
    "Table 4": "give its classifiers as --classifiers (full trains WRN-70-16)",
    "Table 6": "Tiny-ImageNet: full alone",
}
P2 = {  # (checkpoint, purifier): clean, l_inf, l_2 of Tables 2, 9, 11, white
    ("ddpm", "none"): (95.12, 0.00, 1.46),
    ("ddpm", "ddim"): (88.38, 42.19, 70.02),
    ("addt", "ddim"): (88.77, 46.48, 71.19),
    ("ddpm", "gdmp"): (91.41, 40.82, 69.63),
    ("ddpm", "gdmp-mse"): (91.80, 40.97, 70.02),
    ("ddpm", "gdmp-ssim"): (92.19, 38.18, 68.95),
    ("ddpm", "ddpm"): (85.94, 47.27, 69.34),
    ("addt", "ddpm"): (85.64, 51.46, 70.12),
    ("ddpm", "coup"): (90.33, 50.78, 71.19),
    ("ddpm", "vp-sde"): (89.26, 55.96, 75.78),
    ("addt", "vp-sde"): (89.94, 62.11, 76.66),
    ("ddpm", "vp-sde-corrector"): (85.25, 59.77, 74.22),
    ("addt", "vp-sde-corrector"): (85.55, 65.23, 76.66),
    ("ddpm", "edm-sde"): (86.43, 62.50, 76.86),
    ("addt", "edm-sde"): (86.33, 66.41, 79.16),
    ("ddpm", "edm-ode"): (87.99, 60.45, 75.49),
    ("addt", "edm-ode"): (87.99, 64.16, 77.15),
}

# --------------------------------------------------------------------------------------------------
# the commands


class List:
    """Collects (result, argv) in order, and which tables and figures each folder is for."""

    def __init__(self, args):
        self.args = args
        self.size = SIZES[args.size]
        self.work = Path(args.work)
        self.todo = []
        self.purposes = {}

    def add(self, folder, argv, purposes=(), result="metrics.json"):
        common = ["--data-root", self.args.data_root, "--device", self.args.device]
        out = self.work / folder
        self.todo.append((out / result, [*argv, *common, "--out", str(out)]))
        for purpose in purposes:
            self.purposes.setdefault(purpose, []).append(folder)

    def train(self, folder, flags, data, model=None):
        size = ["--image-size", str(self.size["image"])] if self.args.size == "toy" else []
        model = model or self.size["model"]
        argv = ["train.py", *flags, "--model", model, *size, "--data", data]
        self.add(folder, [*argv, "--seed", str(self.args.seed)])

    def classify(self, folder, wrn, data, test=None):
        size = ["--image-size", str(self.size["image"])] if self.args.size == "toy" else []
        argv = ["classifier.py", "--model", wrn, *self.size["classifier"], *size, "--data", data]
        self.add(folder, argv + (["--test", test] if test else []))

    def ckpt(self, folder):
        if folder == "ddpm" and self.args.ddpm:
            return self.args.ddpm
        return str(self.work / folder)

    def purify(self, folder, purposes, ckpts, purifiers, flags, **given):
        """An attack on `purifiers` with each of `ckpts`; given: data, classifier, nfe, attack."""
        data = given.get("data", self.args.test or self.args.data)
        network = given.get("classifier", str(self.work / "classifier/classifier.pt"))
        argv = ["purify.py", "--ckpt", *(self.ckpt(name) for name in ckpts)]
        argv += ["--classifier", network, "--data", data, "--purifier", *purifiers, *flags]
        nfe = given.get("nfe", self.size["nfe"][0] if self.args.size == "toy" else None)
        if nfe is not None:  # else each purifier's own
            argv += ["--nfe", str(nfe)]
        argv += given.get("attack", self.size["attack"])
        self.add(folder, [*argv, "--seed", str(self.args.seed)], purposes)


def commands(args):
    """-> List; the most telling first."""
    found = List(args)
    size = found.size
    if not args.ddpm:
        found.train("ddpm", size["train"], args.data)
    found.classify("classifier", size["wrn"], args.data, args.test)
    pair = ["ddpm", "addt"]
    tune(found, "addt")
    labels = ["Table 1", "Table 2", "Table 9", "Table 11"]
    found.purify("methods", labels, pair, ALL, [*WHITE, *BOTH_NORMS, *SDE])
    ours = ["Fig. 2", "Fig. 6", "Fig. 9"]
    found.purify("known", ours, pair, ["ddpm", "ddim"], KNOWN)
    once = [*size["attack"], "--eot", "1"]
    some = ["ddpm", "ddim", "gdmp-mse", "vp-sde"]
    found.purify("eot-1", ["Table 1"], ["ddpm"], some, [*WHITE, *SDE], attack=once)
    labels = ["Fig. 1", "Fig. 3", "Fig. 7", "Fig. 8"]
    three = ["--knowledge", "white", "both", size["semi"]]
    found.purify("figures", labels, pair, ["ddpm"], three, attack=[*size["few"], *size["figures"]])
    for eot in size["eot"]:
        few = [*size["few"], "--eot", str(eot)]
        found.purify(f"eot-sweep-{eot}", ["Fig. 7"], ["ddpm"], ["ddpm"], WHITE, attack=few)
    for nfe in size["nfe"][1:]:
        two = ["ddpm", "ddim"]
        labels = ["Table 3", "Table 10"]
        found.purify(f"nfe-{nfe}", labels, pair, two, [*WHITE, *BOTH_NORMS], nfe=nfe)
        found.purify(f"nfe-{nfe}-known", ["Fig. 9"], pair, two, KNOWN, nfe=nfe)
    autoattack(found, pair)
    other_classifiers(found, pair)
    ablations(found)
    for data in size["other_sets"]:
        other_set(found, data)
    return found


def tune(
    found, folder, start="ddpm", data=None, network="classifier", prefix="", model=None, more=()
):
    """Fine-tune `start` with P2's recipe."""
    flags = TUNED[folder]
    argv = ["--robust", "addt", "--init", found.ckpt(start), *flags, *found.size["tune"], *more]
    argv += ["--amp", "fp32"]  # as P2
    if "--addt-guide" not in flags:
        argv += ["--classifier", str(found.work / network / "classifier.pt")]
    found.train(prefix + folder, argv, data or found.args.data, model)


def autoattack(found, pair):
    flags = ["--attack", "aa-rand", *WHITE, *BOTH_NORMS, *SDE]
    three = ["ddpm", "ddim", "vp-sde"]
    labels = ["Table 13", "Table 14"]
    attack = found.size["autoattack"]
    some = [*attack, *found.size["autoattack_eot"]]
    found.purify("autoattack", labels, pair, three, flags, attack=some)
    once = [*attack, "--eot", "1"]
    found.purify("autoattack-eot-1", labels[:1], pair, three, flags, attack=once)
    # ours: P2 attacks with it under white alone
    known = ["--attack", "aa-rand", "--knowledge", "both", "semi-8"]
    found.purify("autoattack-known", labels[:1], pair, ["ddpm"], known, attack=attack)


def other_classifiers(found, pair):
    specs = list(dict.fromkeys(found.args.classifiers))
    if found.size["wrn_large"]:
        found.classify("wrn-70-16", found.size["wrn_large"], found.args.data, found.args.test)
        specs = [str(found.work / "wrn-70-16/classifier.pt"), *specs]
    for i, spec in enumerate(specs):
        three = ["ddpm", "ddim", "edm-sde"]
        both = [*WHITE, *BOTH_NORMS]
        found.purify(f"other-{i}", ["Table 4"], pair, three, both, classifier=spec)


def ablations(found):
    for folder in list(TUNED)[1:]:
        tune(found, folder)
    both = [*WHITE, *BOTH_NORMS]
    for nfe in found.size["nfe"]:
        two = ["ddpm", "ddim"]
        found.purify(f"guides-nfe-{nfe}", ["Table 5"], ["plain", "mse"], two, both, nfe=nfe)
        units = ["unit-0.02", "unit-0.04"]
        found.purify(f"units-nfe-{nfe}", ["Table 15"], units, ["ddpm"], both, nfe=nfe)
    found.purify("linf-attacked", ["Table 12"], ["linf"], ["ddpm", "ddim"], both)
    score = ["--fid", "--features", str(found.work / "classifier/classifier.pt")]
    weights = found.args.inception_weights
    if weights or found.args.size == "full":
        score = ["--fid"] + (["--inception-weights", weights] if weights else [])
    for folder in ("ddpm", "plain", "addt", "linf"):
        argv = ["sample.py", "--ckpt", found.ckpt(folder), *found.size["fid"], *score]
        argv += ["--data", found.args.data]
        found.add(f"fid-{folder}", argv, ["Table 7"])


def other_set(found, data):
    """CIFAR-100, whose DDPM P2 fine-tunes from CIFAR-10's; Tiny-ImageNet, 64 x 64."""
    prefix = f"{data}-"
    network = f"{prefix}classifier"
    found.classify(network, found.size["wrn"], data)
    if data == "cifar100":
        model = found.size["model"]
        flags = ["--init", found.ckpt("ddpm"), "--iters", "39000"]  # 100 epochs
    else:
        model, flags = "ddpm64", []
    found.train(f"{prefix}ddpm", flags, data, model)
    start = f"{prefix}ddpm"
    more = [] if data == "cifar100" else ["--iters", "39000"]  # 100 epochs of twice the images
    for folder in ["addt", "linf"] if data == "cifar100" else ["addt"]:
        tune(found, folder, start, data, network, prefix, model, more)
    pair = [f"{prefix}ddpm", f"{prefix}addt"]
    given = dict(data=data, classifier=str(found.work / network / "classifier.pt"))
    both = [*WHITE, *BOTH_NORMS]
    if data == "tiny-imagenet":
        four = ["none", "ddpm", "ddim", "edm-sde"]
        found.purify(f"{prefix}methods", ["Table 6"], pair, four, both, **given)
        return
    for nfe in found.size["nfe"]:
        labels = ["Table 3", "Table 10"]
        found.purify(f"{prefix}nfe-{nfe}", labels, pair, ["ddpm", "ddim"], both, nfe=nfe, **given)
    linf = [f"{prefix}linf"]
    found.purify(f"{prefix}linf-attacked", ["Table 12"], linf, ["ddpm", "ddim"], both, **given)


# --------------------------------------------------------------------------------------------------
# what it is for, what it costs, what came out


def purposes(found):
    """-> lines: each table and figure of P2 with the folders of its numbers, or why it has none."""
    lines = []
    for kind, last in (("Table", 15), ("Fig.", 9)):
        for i in range(1, last + 1):
            name = f"{kind} {i}"
            folders = found.purposes.get(name)
            if folders:
                lines.append(f"{name}: {', '.join(folders)}")
            else:
                lines.append(f"{name}: not run: {NOT_RUN[name]}")
    if found.args.size == "full" and not found.args.classifiers:
        lines.append("Table 4: without VGG-16, ResNet-50, ViT-B: give them as --classifiers")
    return lines


def read_rows(found):
    """The rows of every finished attack, each with its folder."""
    rows = []
    for done, argv in found.todo:
        if argv[0] == "purify.py" and finished(done):
            record = outputs.read_json(done)
            for row in record["runs"]:
                rows.append(row | dict(folder=done.parent.name))
    return rows


def table(found, rows):
    """-> lines of Markdown: one for each attack, P2's number beside it where it has the setting."""
    of_folder = {}
    for name, folders in found.purposes.items():
        for folder in folders:
            of_folder.setdefault(folder, []).append(name)
    lines = ["| of P2 | run | checkpoint | purifier | norm | knowledge | clean | robust | P2 |"]
    lines.append("|---" * 9 + "|")
    for row in rows:
        name = row["checkpoint"] if row["checkpoint"] in TUNED else "ddpm"
        theirs = "-"
        if row["folder"] == "methods" and (name, row["purifier"]) in P2:
            clean, linf, l2 = P2[name, row["purifier"]]
            theirs = f"{clean} / {l2 if row['norm'] == 'l2' else linf}"
        cells = [", ".join(of_folder[row["folder"]]), row["folder"], row["checkpoint"]]
        cells += [row["purifier"], row["norm"], row["knowledge"]]
        cells += [percent(row, "clean"), percent(row, "robust"), theirs]
        lines.append("| " + " | ".join(cells) + " |")
    scores = []
    for done, argv in found.todo:
        if argv[0] == "sample.py" and finished(done):
            record = outputs.read_json(done)
            names = [name for name in record if name.startswith(("FID", "Fréchet"))]
            scores += [f"{done.parent.name}: {name} {record[name]:.4g}" for name in names]
    if scores:
        lines += ["", "Table 7: " + "; ".join(scores)]
    return lines


def parse_args(argv):
    parser = runtime.parser(__doc__, prog="reproduce.py purify")
    add_arguments(parser, SIZES)
    add = parser.add_argument
    add("--ddpm", metavar="PATH", help="a trained DDPM, instead of training one")
    add("--classifiers", nargs="+", default=[], metavar="SPEC", help="of Table 4, as purify.py's")
    add("--out", help="default WORK/results")
    args = parser.parse_args(argv)
    args.work = args.work or f"runs/purify-{args.size}"
    check(args)
    args.out = args.out or f"{args.work}/results"
    if args.ddpm and not Path(args.ddpm).exists():
        raise ValueError(f"--ddpm {args.ddpm}: no such file or folder")
    return args


def main(argv):
    args = parse_args(argv)
    if not args.dry_run:
        library_attack.package()
        outputs.claim(args.out)
    started = time.time()
    found = commands(args)
    cost = purify_cost.lines_of(found.todo, found.size)
    print("\n".join([*purposes(found), "", *cost, ""]), flush=True)
    if not run_all(found.todo, args):
        return
    rows = read_rows(found)
    lines = table(found, rows)
    (Path(args.out) / "table.md").write_text("\n".join(lines) + "\n")
    plot_sweeps(rows, Path(args.out) / "sweeps.png")
    todo = len(found.todo)
    outputs.write_metrics(args.out, started, seed=args.seed, device="cpu", n=todo, table=lines)
    print("\n".join(lines))
