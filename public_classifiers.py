"""Classifiers with public weights, as --classifier takes them: files of tensors, read without
running what else a pickle may hold.

    --classifier torchvision:resnet50:PATH       any classifier of torchvision.models by its name,
    --classifier torchvision:vit_b_16:PATH       with as many classes as its last layer has rows
    --classifier torchvision:vgg16:32:PATH       sees the images at 32 x 32; default 224
    --classifier wrn:PATH                        a wide residual network of RobustBench
    --classifier wrn:cifar10:PATH                the same, normalised by CIFAR-10's mean and std

Resizing and normalisation are part of the network: it takes images in [0, 1] at any size.
RobustBench has two families, told by the names of their weights: TRADES' (block1.layer.0.bn1, which
normalise nothing) and DeepMind's (layer.0.block.0.batchnorm_0: SiLU, CIFAR's mean and std).
"""

import re

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from runtime import load_checkpoint
from weights import refuse_other_shapes

NORMALISATIONS = {  # mean, std
    "none": ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0]),
    "half": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "cifar10": ([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]),
    "cifar100": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}
WRAPPERS = ["state_dict", "model_state_dict", "model"]  # under which training scripts keep weights
DEEPMIND = [  # its names, as a pattern; those of TRADES' networks
    (r"^init_conv\.", "conv1."),
    (r"\.batchnorm_0\.", ".bn1."),
    (r"\.batchnorm_1\.", ".bn2."),
    (r"\.conv_0\.", ".conv1."),
    (r"\.conv_1\.", ".conv2."),
    (r"\.shortcut\.", ".convShortcut."),
    (r"^batchnorm\.", "bn1."),
    (r"^logits\.", "fc."),
]


def read_state(path):
    """The state dict in a file, without the prefix that DataParallel puts before each name."""
    state = load_checkpoint(path)
    for name in WRAPPERS:
        if isinstance(state.get(name), dict):
            state = state[name]
    tensors = {}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{path}: holds {key}, not a state dict of tensors alone")
        if not value.isfinite().all():
            raise ValueError(f"{path}: {key} is not finite")
        tensors[re.sub(r"^(module|model|0|1)\.", "", key)] = value
    if not any(value.dim() == 2 for value in tensors.values()):
        raise ValueError(f"{path}: holds no classifier")
    return tensors


# --------------------------------------------------------------------------------------------------
# RobustBench


def read_wrn(spec):
    """wrn[:NORMALISATION]:PATH -> dict(config=, model=) of a classifier.WideResNet."""
    _, first, *rest = spec.split(":", 2)
    if first in NORMALISATIONS and rest:
        norm, path = first, rest[0]
    else:
        norm, path = None, ":".join([first, *rest])
    state = read_state(path)
    deepmind = "init_conv.weight" in state
    if deepmind:
        state = {trades_name(key): value for key, value in state.items()}
    if "conv1.weight" not in state or "fc.weight" not in state:
        raise ValueError(f"{path}: not a wide residual network of RobustBench")
    classes = len(state["fc.weight"])
    if norm is None:
        norm = ("cifar100" if classes == 100 else "cifar10") if deepmind else "none"
    per_group = 1 + max(number(r"block1\.layer\.(\d+)\.", key) for key in state)
    width = state["fc.weight"].shape[1] // 64
    model = {}
    for key, value in state.items():
        unused = key.startswith("sub_block1.")  # held, but never called, by TRADES' network
        if not unused and key not in ("mean", "std", "mu", "sigma"):  # `norm` says what they are
            model[own_name(key, per_group)] = value.float() if value.is_floating_point() else value
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in NORMALISATIONS[norm])
    config = dict(depth=6 * per_group + 4, width=width, classes=classes)
    config |= dict(silu=deepmind, shifted=deepmind)
    return dict(config=config, model=model | dict(mean=mean, std=std))


def number(pattern, key):
    found = re.match(pattern, key)
    return int(found[1]) if found else -1


def trades_name(key):
    for old, new in DEEPMIND:
        key = re.sub(old, new, key)
    found = re.match(r"layer\.(\d)\.block\.(.*)", key)
    return f"block{int(found[1]) + 1}.layer.{found[2]}" if found else key


def own_name(key, per_group):
    """That of classifier.WideResNet, which has all its blocks in one list after its first layer."""
    key = re.sub(r"^conv1\.", "body.0.", key)
    key = re.sub(r"^bn1\.", "bn.", key)
    key = re.sub(r"^fc\.", "head.", key)
    found = re.match(r"block(\d)\.layer\.(\d+)\.(.*)", key)
    if not found:
        return key
    at = 1 + (int(found[1]) - 1) * per_group + int(found[2])
    return f"body.{at}.{found[3]}".replace("convShortcut", "skip")


# --------------------------------------------------------------------------------------------------
# torchvision


class Resized(nn.Module):
    """x (B, 3, H, W) in [0, 1] -> logits of `network` at size x size (bilinear), normalised."""

    def __init__(self, network, size, classes):
        super().__init__()
        self.network = network
        self.size = size
        self.config = dict(classes=classes)
        mean, std = NORMALISATIONS["imagenet"]
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, x):
        if x.shape[-1] != self.size:
            x = F.interpolate(x, size=(self.size, self.size), mode="bilinear", antialias=True)
        return self.network((x - self.mean) / self.std)


def load_torchvision(spec):
    """torchvision:NAME[:SIZE]:PATH -> the network."""
    _, name, *rest = spec.split(":", 2)
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names or not rest:
        known = "resnet50, vgg16, vit_b_16 and others"
        raise ValueError(f"--classifier {spec}: need torchvision:NAME:PATH, NAME one of {known}")
    size, _, path = rest[0].partition(":")
    if not (size.isdecimal() and path):
        size, path = "", rest[0]
    state = read_state(path)
    network, size = torchvision_network(name, state, int(size or 0), path)
    return Resized(network, size, len(last_layer(state)))


def last_layer(state):
    """The weight of the layer that gives the logits, the last matrix of the file."""
    return [value for value in state.values() if value.dim() == 2][-1]


def torchvision_network(name, state, size=0, path="state"):
    """-> the network with these weights, its image size (0: 224, or what a ViT's positions say)."""
    options = dict(weights=None, num_classes=len(last_layer(state)))
    positions = state.get("encoder.pos_embedding")
    if positions is not None:
        patch = state["conv_proj.weight"].shape[-1]
        side = patch * round((positions.shape[1] - 1) ** 0.5)
        if size not in (0, side):
            raise ValueError(f"{path}: a ViT of {side} x {side} images, not of {size} x {size}")
        size = options["image_size"] = side
    with torch.device("meta"):  # nothing is drawn at random, no memory is taken
        network = torchvision.models.get_model(name, **options)
    refuse_other_shapes(network.state_dict(), state, f"{path}: not of {name}: ")
    network.load_state_dict(state, assign=True)
    return network, size or 224
