"""public_classifiers.py: the names of public weights, against networks written anew with those
names."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import classifier
import public_classifiers
from data import CorruptedImages
from public_classifiers import NORMALISATIONS
from runtime import save_checkpoint
from synthetic import synthetic_butterflies


class Trades(nn.Module):
    """A wide residual network of RobustBench's first family, by its names (Zagoruyko &
    Komodakis)."""

    def __init__(self, blocks, width, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        c = 16
        for g in (1, 2, 3):
            group = nn.Module()
            group.layer = nn.ModuleList()
            for i in range(blocks):
                out = 16 * width * 2 ** (g - 1)
                block = nn.Module()
                block.stride = 2 if g > 1 and i == 0 else 1
                block.bn1 = nn.BatchNorm2d(c)
                block.conv1 = nn.Conv2d(c, out, 3, block.stride, 1, bias=False)
                block.bn2 = nn.BatchNorm2d(out)
                block.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
                if c != out:
                    block.convShortcut = nn.Conv2d(c, out, 1, block.stride, bias=False)
                group.layer.append(block)
                c = out
            setattr(self, f"block{g}", group)
        self.bn1 = nn.BatchNorm2d(c)
        self.fc = nn.Linear(c, classes)

    def forward(self, x):
        x = self.conv1(x)
        for group in (self.block1, self.block2, self.block3):
            for block in group.layer:
                h = block.bn1(x).relu()
                if hasattr(block, "convShortcut"):
                    x = block.convShortcut(h)
                x = x + block.conv2(block.bn2(block.conv1(h)).relu())
        return self.fc(F.avg_pool2d(self.bn1(x).relu(), 8).flatten(1))


class DeepMind(nn.Module):
    """The second family: SiLU, and strides that see one pixel further to the right and below."""

    def __init__(self, blocks, width, classes):
        super().__init__()
        self.init_conv = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.layer = nn.ModuleList()
        c = 16
        for g in range(3):
            group = nn.Module()
            group.block = nn.ModuleList()
            for i in range(blocks):
                out = 16 * width * 2**g
                block = nn.Module()
                stride = 2 if g > 0 and i == 0 else 1
                block.batchnorm_0 = nn.BatchNorm2d(c)
                block.conv_0 = nn.Conv2d(c, out, 3, stride, 0, bias=False)
                block.batchnorm_1 = nn.BatchNorm2d(out)
                block.conv_1 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
                if c != out:
                    block.shortcut = nn.Conv2d(c, out, 1, stride, bias=False)
                group.block.append(block)
                c = out
            self.layer.append(group)
        self.batchnorm = nn.BatchNorm2d(c)
        self.logits = nn.Linear(c, classes)

    def forward(self, x):
        x = self.init_conv(x)
        for group in self.layer:
            for block in group.block:
                h = F.silu(block.batchnorm_0(x))
                if hasattr(block, "shortcut"):
                    x = block.shortcut(h)
                around = (1, 1, 1, 1) if block.conv_0.stride == (1, 1) else (0, 1, 0, 1)
                h = block.conv_0(F.pad(h, around))
                x = x + block.conv_1(F.silu(block.batchnorm_1(h)))
        return self.logits(F.avg_pool2d(F.silu(self.batchnorm(x)), 8).flatten(1))


def random_network(cls, *args):
    """In eval mode, with statistics that differ from 0 and 1."""
    torch.manual_seed(0)
    net = cls(*args)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.uniform_(m.weight, 0.5, 1.5)
    return net.eval()


X = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    "cls, spec, norm",
    [
        (Trades, "wrn:", "none"),
        (Trades, "wrn:cifar10:", "cifar10"),
        (Trades, "wrn:half:", "half"),
        (DeepMind, "wrn:", "cifar10"),
        (DeepMind, "wrn:none:", "none"),
    ],
)
def test_logits_of_robustbench_networks(tmp_path, cls, spec, norm, prefix):
    net = random_network(cls, 2, 2, 10)
    state = {prefix + key: value for key, value in net.state_dict().items()}
    torch.save(dict(state_dict=state) if prefix else state, tmp_path / "wrn.pt")
    ours = classifier.load_classifier(f"{spec}{tmp_path}/wrn.pt")
    assert ours.config["depth"] == 16 and ours.config["width"] == 2
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in NORMALISATIONS[norm])
    with torch.no_grad():
        torch.testing.assert_close(ours(X), net((X - mean) / std), rtol=1e-4, atol=1e-4)


def test_the_published_sizes_fit(tmp_path):
    """WRN-28-10 and WRN-70-16: every name has its place (no memory is taken)."""
    for cls in (Trades, DeepMind):
        for blocks, width, classes in ((4, 10, 100), (11, 16, 10)):
            with torch.device("meta"):
                state = cls(blocks, width, classes).state_dict()
                config = dict(depth=6 * blocks + 4, width=width, classes=classes)
                wanted = classifier.WideResNet(**config).state_dict()
            if cls is DeepMind:
                state = {public_classifiers.trades_name(key): v for key, v in state.items()}
            names = {public_classifiers.own_name(key, blocks): v.shape for key, v in state.items()}
            assert names == {k: v.shape for k, v in wanted.items() if k not in ("mean", "std")}


@pytest.mark.parametrize(
    "name, size", [("resnet18", 0), ("resnet18", 32), ("mobilenet_v3_small", 0)]
)
def test_logits_of_torchvision_networks(tmp_path, name, size):
    torch.manual_seed(0)
    net = torchvision.models.get_model(name, weights=None, num_classes=7).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    part = f"{size}:" if size else ""
    ours = classifier.load_classifier(f"torchvision:{name}:{part}{tmp_path}/net.pth")
    assert ours.config["classes"] == 7
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in NORMALISATIONS["imagenet"])
    x = X
    if not size:
        x = F.interpolate(X, size=(224, 224), mode="bilinear")
    with torch.no_grad():
        torch.testing.assert_close(ours(X), net((x - mean) / std), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name, size", [("resnet50", 224), ("vgg16", 224), ("vit_b_16", 32)])
def test_classifiers_of_table_4_have_their_places(name, size):
    """P2's three, without memory: the weights fit and the image size is found."""
    options = dict(image_size=size) if name == "vit_b_16" else {}
    with torch.device("meta"):
        state = torchvision.models.get_model(name, num_classes=10, **options).state_dict()
    net, found = public_classifiers.torchvision_network(name, state)
    assert found == size
    assert net.eval()(torch.empty(2, 3, size, size, device="meta")).shape == (2, 10)


def test_what_is_not_such_a_network_is_refused(tmp_path):
    path = tmp_path / "net.pth"
    net = torchvision.models.get_model("resnet18", num_classes=3)
    torch.save(net.state_dict(), path)
    save_checkpoint(tmp_path / "own.pt", dict(kind="classifier", config={}, model={}))
    for spec, message in (
        (f"torchvision:resnet50:{path}", "not of resnet50"),
        (f"torchvision:resnet0:{path}", "need torchvision:NAME:PATH"),
        (f"wrn:{path}", "do not fit"),
        (f"wrn:{tmp_path}/own.pt", "holds no classifier"),
        (f"wrn:{tmp_path}/none.pth", "no such checkpoint"),
        (f"torchvision:resnet18:{tmp_path}/own.pt", "holds no classifier"),
    ):
        with pytest.raises(ValueError, match=message):
            classifier.load_classifier(spec)
    with pytest.raises(ValueError, match="need a checkpoint of classifier.py"):
        classifier.load_features(f"torchvision:resnet18:{path}")


def test_normalisation_is_that_of_the_training_images():
    """Mean and std over all pixels, independently by NumPy; a checkpoint carries its own."""
    images, labels = synthetic_butterflies(50, 16)
    mean, std = classifier.measure(CorruptedImages(images, labels), chunk=7)
    pixels = images.reshape(-1, 3) / 255
    torch.testing.assert_close(mean.double().numpy(), pixels.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(std.double().numpy(), pixels.std(0), rtol=1e-5, atol=1e-6)


def test_a_checkpoint_carries_its_normalisation(tmp_path):
    """Also one from before there was a choice of activation, of which the config says nothing."""
    net = classifier.WideResNet(10, 1, 4)
    net.mean.fill_(0.25)
    config = dict(depth=10, width=1, classes=4)
    save_checkpoint(
        tmp_path / "c.pt", dict(kind="classifier", config=config, model=net.state_dict())
    )
    loaded = classifier.load_classifier(tmp_path / "c.pt")
    assert (loaded.mean == 0.25).all()
    with torch.no_grad():
        torch.testing.assert_close(loaded(X), net.eval()(X))
