"""Train the image classifier whose features stand in for Inception's, and which purification will
defend.

    python classifier.py --data cifar10 --model wrn-28-10 --epochs 100      # one GPU
    python classifier.py --data cifar10 --model small --epochs 10           # a CPU

A wide residual network (Zagoruyko & Komodakis, 2016) with the usual recipe: random crop and flip,
SGD with Nesterov momentum and one cycle of the learning rate, label smoothing. Images in [0, 1] ->
logits; the normalisation is inside, by the mean and std of the training images. Leaves
--out/classifier.pt, which `sample.py --features` takes, and metrics.json with the test accuracy.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import outputs
import public_classifiers
import runtime
import weights
from data import NAMES, CorruptedImages, Order, load_images
from images import class_names, refuse_other_classes
from rng import seed_at
from runtime import autocast, between, load_checkpoint, precision, save_checkpoint, setup

PRESETS = {
    "wrn-28-10": dict(depth=28, width=10),
    "wrn-70-16": dict(depth=70, width=16),
    "small": dict(depth=10, width=2),
}


class Block(nn.Module):
    def __init__(self, c_in, c_out, stride, activation, shifted):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.skip = nn.Identity()
        if c_in != c_out or stride > 1:
            self.skip = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        self.activation = activation
        self.shifted = shifted and stride == 2

    def forward(self, x):
        h = self.activation(self.bn1(x))
        x = x if isinstance(self.skip, nn.Identity) else self.skip(h)
        if self.shifted:  # pads right and below alone
            h = F.conv2d(F.pad(h, (0, 1, 0, 1)), self.conv1.weight, stride=2)
        else:
            h = self.conv1(h)
        return x + self.conv2(self.activation(self.bn2(h)))


class WideResNet(nn.Module):
    """x (B, 3, H, W) float in [0, 1] -> logits (B, classes); `features` gives the pooled
    activations (B, 64 width).

    mean and std, by which x is normalised, are part of the weights: CIFAR-10's until `main` has
    measured the training images, or a checkpoint is loaded. silu, shifted: SiLU in the place of
    ReLU, and strided convolutions that pad right and below alone, as DeepMind's networks have it.
    """

    def __init__(self, depth, width, classes, silu=False, shifted=False):
        super().__init__()
        if (depth - 4) % 6:
            raise ValueError(f"WideResNet depth {depth}: must be 6 n + 4")
        self.config = dict(depth=depth, width=width, classes=classes, silu=silu, shifted=shifted)
        for name, value in zip(("mean", "std"), public_classifiers.NORMALISATIONS["cifar10"]):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))
        self.activation = F.silu if silu else F.relu
        layers, c = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)], 16
        for c_out, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for i in range((depth - 4) // 6):
                layers.append(Block(c, c_out, stride if i == 0 else 1, self.activation, shifted))
                c = c_out
        self.body = nn.Sequential(*layers)
        self.bn = nn.BatchNorm2d(c)
        self.head = nn.Linear(c, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def features(self, x):
        return self.activation(self.bn(self.body((x - self.mean) / self.std))).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class Features(nn.Module):
    """What metrics.extract wants: uint8 (B, 3, S, S) -> features (B, d), logits (B, classes)."""

    def __init__(self, network):
        super().__init__()
        self.network = network.eval()

    @torch.no_grad()
    def forward(self, x):
        f = self.network.features(x.float() / 255)
        return f, self.network.head(f)


def load_classifier(path, device="cpu", compiled=False):
    """The network of a checkpoint of this script, or of public weights (public_classifiers.py says
    how they are named), in eval mode, on `device`; compiled: None for "on a GPU".

    It has config["classes"].
    """
    kind = str(path).partition(":")[0]
    classes = None  # their names, where they are known
    if kind == "torchvision":
        net = public_classifiers.load_torchvision(path)
    else:
        ckpt = public_classifiers.read_wrn(path) if kind == "wrn" else load_checkpoint(path)
        if kind != "wrn" and ckpt.get("kind") != "classifier":
            raise ValueError(f"{path}: holds no classifier (classifier.py's checkpoints do)")
        net = weights.fitted(WideResNet, ckpt, "model", path)
        classes = ckpt.get("classes")
    net.classes = classes
    on_gpu = torch.device(device).type == "cuda"
    net = net.eval().to(
        device, memory_format=torch.channels_last if on_gpu else torch.preserve_format
    )
    return torch.compile(net, dynamic=False) if compiled or (compiled is None and on_gpu) else net


def refuse_labels(network, path, labels, name):
    """Raises ValueError where --data NAME has a class beyond those of --classifier PATH."""
    classes = network.config["classes"]
    most = int(labels.max())
    if most >= classes:
        what = f"knows {classes} classes, but --data {name} has label {most}"
        raise ValueError(f"--classifier {path}: {what}")


def load_features(path):
    net = load_classifier(path)
    if not isinstance(net, WideResNet):
        raise ValueError(f"--features {path}: need a checkpoint of classifier.py")
    return Features(net)


def random_crop(x, generator, pad=4):
    """Each image shifted by its own -pad..pad pixels, reflected at the border; x (B, 3, S, S)."""
    B, _, S, _ = x.shape
    shift = torch.randint(2 * pad + 1, (2, B), generator=generator, device=x.device)
    rows, cols = (shift[:, :, None] + torch.arange(S, device=x.device)).unbind()  # (B, S)
    x = F.pad(x, (pad, pad, pad, pad), mode="reflect").permute(0, 2, 3, 1)
    batch = torch.arange(B, device=x.device)[:, None, None]
    return x[batch, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)  # channels_last


def accuracy(net, data, batch_size, cast):
    """Share of the images of `data` that are classified correctly."""
    right = torch.zeros((), device=data.device)
    for i in range(0, len(data), batch_size):
        index = torch.arange(i, min(i + batch_size, len(data)), device=data.device)
        with torch.no_grad(), cast:
            right += (net((data.clean(index) + 1) / 2).argmax(1) == data.labels[index]).sum()
    return right.item() / len(data)


def parse_args():
    parser = runtime.parser(__doc__)
    add = parser.add_argument
    positive = between(0, 1e6, above=True)
    add("--data", default="synthetic", metavar="NAME", help=NAMES)
    add("--test", metavar="NAME", help="default: the test split of --data; needed for folder:PATH")
    add("--data-root", default="data")
    add("--image-size", type=between(5, 4096, int), metavar="S")  # random_crop mirrors 4 pixels
    add("--model", choices=PRESETS, default="wrn-28-10", help="36.5 M parameters; small: 0.3 M")
    add("--epochs", type=positive, default=100)
    add("--batch-size", type=between(2, kind=int), default=128)
    add("--lr", type=positive, default=0.1, help="peak of the one-cycle schedule")
    add("--seed", type=runtime.SEED, default=0)
    add("--device", default="auto", help="auto | cpu | cuda | cuda:N")
    add("--amp", choices=["auto", "bf16", "fp16", "fp32"], default="auto")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile; default: on a GPU")
    add("--out", default="out_classifier")
    return parser.parse_args()


def load_sets(args, device):
    """The training and the test images, as CorruptedImages without corruption."""
    if args.data.startswith("folder:") and not args.test:
        raise ValueError("--data folder:PATH: give --test folder:PATH as well")
    sets = []
    for name, split in ((args.data, "train"), (args.test or args.data, "test")):
        found = load_images(name, args.image_size, split, args.data_root, labels_needed=True)
        sets.append(CorruptedImages(*found, device=device))
    train_set, test_set = sets
    refuse_other_classes(f"--test {args.test}", class_names(args.test or args.data), args.data)
    if train_set.shape != test_set.shape:
        raise ValueError(f"--test: images of {test_set.shape}, --data of {train_set.shape}")
    if args.batch_size > len(train_set):
        raise ValueError(f"--batch-size {args.batch_size}: --data holds {len(train_set)} images")
    return train_set, test_set


def measure(data, chunk=4096):
    """The mean and the std of each channel over all pixels of `data`, in [0, 1] -> (3,), (3,)."""
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for i in range(0, len(data), chunk):
        index = torch.arange(i, min(i + chunk, len(data)), device=data.device)
        x = (data.clean(index).double() + 1) / 2
        sums += torch.stack([x.mean((2, 3)).sum(0), x.square().mean((2, 3)).sum(0)]).cpu()
    mean, square = sums / len(data)
    return mean.float(), (square - mean**2).sqrt().float()


def fit(net, train_set, args, device):
    """SGD with Nesterov momentum on mirrored, shifted images; one-cycle rate -> number of steps."""
    cast = autocast(device, args.amp)
    scaler = torch.amp.GradScaler(device.type, enabled=precision(device, args.amp) == torch.float16)
    compiled = device.type == "cuda" if args.compile is None else args.compile
    model = torch.compile(net) if compiled else net
    steps = max(1, int(args.epochs * len(train_set) / args.batch_size))
    optimizer = torch.optim.SGD(
        net.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps + 1, pct_start=0.2
    )
    order = Order(len(train_set), args.seed, device)
    generator = torch.Generator(device)
    for step in tqdm(range(steps), desc=f"train {args.model}", unit="step"):
        generator.manual_seed(seed_at(args.seed, step, stream=6))
        index = order(step * args.batch_size, args.batch_size)
        flip = torch.rand(args.batch_size, generator=generator, device=device) < 0.5
        x = random_crop(train_set.batch(index, flip), generator)
        with cast:
            loss = F.cross_entropy(model((x + 1) / 2), train_set.labels[index], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    return steps


def main():
    args = parse_args()
    started = time.time()
    device, _, _ = setup(args.device, compiled=args.compile)
    out = outputs.claim(args.out)
    train_set, test_set = load_sets(args, device)

    torch.manual_seed(args.seed)
    net = WideResNet(**PRESETS[args.model], classes=int(train_set.labels.max()) + 1)
    for buffer, value in zip((net.mean, net.std), measure(train_set)):
        buffer.copy_(value.view(3, 1, 1))
    net = net.to(device, memory_format=torch.channels_last)
    steps = fit(net, train_set, args, device)
    score = accuracy(net.eval(), test_set, args.batch_size, autocast(device, args.amp))
    if not all(value.isfinite().all() for value in net.state_dict().values()):
        message = f"--lr {args.lr}: training diverged; nothing was saved, try a lower one"
        raise outputs.Failed(message)
    ckpt = dict(kind="classifier", config=net.config, model=net.state_dict())
    ckpt |= dict(image_size=train_set.shape[1], accuracy=score, classes=class_names(args.data))
    save_checkpoint(out / "classifier.pt", ckpt)
    outputs.write_metrics(
        out, started, seed=args.seed, device=device, n=len(test_set), test_accuracy=score,
        steps=steps, model=args.model, data=args.data,
    )  # fmt: skip
    print(f"test accuracy {score:.2%} of {len(test_set)} images -> {out}/classifier.pt")


if __name__ == "__main__":
    runtime.cli(main)
