"""ddpmpp.py against score-sde's and EDM's formulas, written out under their own names."""

import math
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli import call
from torch import nn

import ddpmpp
import sample
import weights
from ddpmpp import DDPMpp
from losses import NoiseSchedule
from samplers import edm_follow, time_of

SCHEDULE = NoiseSchedule()
CHANNELS, BLOCKS, ATTENTION, SIZE = (32, 160), 2, (4,), 8  # 160: more than 32 groups of 4


def parameters(shapes):
    """Random tensors, in float64, so that a wrong weight shows at once."""
    g = torch.Generator().manual_seed(0)
    found = {}
    for name, shape in shapes.items():
        fan_in = math.prod(shape[1:]) if name.endswith("weight") else shape[0]
        scale = fan_in**-0.5 if len(shape) > 1 else 0.3
        found[name] = scale * torch.randn(shape, generator=g, dtype=torch.float64)
    return found


# --------------------------------------------------------------------------------------------------
# score-sde's NCSNpp with the settings of its ddpmpp configurations: modules numbered as they come


def modules():
    """[(kind, in, out, resampling)] in the order of all_modules."""
    c0 = CHANNELS[0]
    found = [("dense", c0, 4 * c0, None), ("dense", 4 * c0, 4 * c0, None), ("conv", 3, c0, None)]
    c, skips, size = c0, [c0], SIZE
    for i, width in enumerate(CHANNELS):
        for _ in range(BLOCKS):
            found.append(("res", c, width, None))
            c = width
            if size in ATTENTION:
                found.append(("attn", c, c, None))
            skips.append(c)
        if i < len(CHANNELS) - 1:
            found.append(("res", c, c, "down"))
            skips.append(c)
            size //= 2
    found += [("res", c, c, None), ("attn", c, c, None), ("res", c, c, None)]
    for i, width in reversed(list(enumerate(CHANNELS))):
        for _ in range(BLOCKS + 1):
            found.append(("res", c + skips.pop(), width, None))
            c = width
        if size in ATTENTION:
            found.append(("attn", c, c, None))
        if i > 0:
            found.append(("res", c, c, "up"))
            size *= 2
    return [*found, ("norm", c, c, None), ("conv", c, 3, None)]


def score_sde_weights():
    shapes = {}
    for n, (kind, c_in, c_out, resampling) in enumerate(modules()):
        p = f"all_modules.{n}."
        if kind == "dense":
            shapes |= {p + "weight": (c_out, c_in), p + "bias": (c_out,)}
        elif kind == "conv":
            shapes |= {p + "weight": (c_out, c_in, 3, 3), p + "bias": (c_out,)}
        elif kind == "norm":
            shapes |= {p + "weight": (c_in,), p + "bias": (c_in,)}
        elif kind == "attn":
            shapes |= {p + "GroupNorm_0.weight": (c_in,), p + "GroupNorm_0.bias": (c_in,)}
            for j in range(4):
                shapes |= {p + f"NIN_{j}.W": (c_in, c_in), p + f"NIN_{j}.b": (c_in,)}
        else:
            shapes |= {p + "GroupNorm_0.weight": (c_in,), p + "GroupNorm_0.bias": (c_in,)}
            shapes |= {p + "Conv_0.weight": (c_out, c_in, 3, 3), p + "Conv_0.bias": (c_out,)}
            shapes |= {p + "Dense_0.weight": (c_out, 4 * CHANNELS[0]), p + "Dense_0.bias": (c_out,)}
            shapes |= {p + "GroupNorm_1.weight": (c_out,), p + "GroupNorm_1.bias": (c_out,)}
            shapes |= {p + "Conv_1.weight": (c_out, c_out, 3, 3), p + "Conv_1.bias": (c_out,)}
            if c_in != c_out or resampling:
                shapes |= {p + "Conv_2.weight": (c_out, c_in, 1, 1), p + "Conv_2.bias": (c_out,)}
    return parameters(shapes)


def score_sde(w, x, labels):
    """The network at labels (B,), as its forward goes through all_modules."""

    def norm(x, name):
        c = x.shape[1]
        return F.group_norm(x, min(c // 4, 32), w[name + ".weight"], w[name + ".bias"], eps=1e-6)

    def nin(x, name):
        return torch.einsum("bchw,cd->bdhw", x, w[name + ".W"]) + w[name + ".b"].view(-1, 1, 1)

    def residual(x, p, resampling):
        h = F.silu(norm(x, p + "GroupNorm_0"))
        if resampling == "up":
            h, x = (a.repeat_interleave(2, 2).repeat_interleave(2, 3) for a in (h, x))
        elif resampling == "down":
            h, x = (a.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)) for a in (h, x))
        h = F.conv2d(h, w[p + "Conv_0.weight"], w[p + "Conv_0.bias"], padding=1)
        shift = F.linear(F.silu(temb), w[p + "Dense_0.weight"], w[p + "Dense_0.bias"])
        h = h + shift[:, :, None, None]
        h = F.silu(norm(h, p + "GroupNorm_1"))
        h = F.conv2d(h, w[p + "Conv_1.weight"], w[p + "Conv_1.bias"], padding=1)
        if p + "Conv_2.weight" in w:
            x = F.conv2d(x, w[p + "Conv_2.weight"], w[p + "Conv_2.bias"])
        return (x + h) / math.sqrt(2)

    def attention(x, p):
        h = norm(x, p + "GroupNorm_0")
        q, k, v = (nin(h, p + f"NIN_{j}") for j in range(3))
        a = torch.einsum("bchw,bcij->bhwij", q, k) * x.shape[1] ** -0.5
        a = a.flatten(3).softmax(-1).view_as(a)
        h = torch.einsum("bhwij,bcij->bchw", a, v)
        return (x + nin(h, p + "NIN_3")) / math.sqrt(2)

    half = CHANNELS[0] // 2
    freqs = torch.exp(torch.arange(half, dtype=torch.float64) * -(math.log(10000) / (half - 1)))
    phase = labels[:, None] * freqs
    temb = torch.cat([phase.sin(), phase.cos()], dim=1)
    temb = F.linear(temb, w["all_modules.0.weight"], w["all_modules.0.bias"])
    temb = F.linear(F.silu(temb), w["all_modules.1.weight"], w["all_modules.1.bias"])
    h = F.conv2d(x, w["all_modules.2.weight"], w["all_modules.2.bias"], padding=1)
    hs, widths = [h], {}
    kinds = modules()
    for n, (kind, c_in, _, resampling) in enumerate(kinds[3:-2], 3):
        p = f"all_modules.{n}."
        if kind == "attn":
            h = attention(h, p)
            if widths.get(n - 1):
                hs[-1] = h
        else:
            if c_in != h.shape[1]:
                h = torch.cat([h, hs.pop()], dim=1)
            h = residual(h, p, resampling)
            down = n < first_of_middle(kinds)
            widths[n] = down
            if down:
                hs.append(h)
    assert not hs
    n = len(kinds) - 2
    h = F.silu(norm(h, f"all_modules.{n}"))
    return F.conv2d(h, w[f"all_modules.{n + 1}.weight"], w[f"all_modules.{n + 1}.bias"], padding=1)


def first_of_middle(kinds):
    """The first residual block of the middle: before it all results are kept."""
    kept = 1 + len(CHANNELS) * BLOCKS + len(CHANNELS) - 1
    found = [n for n, (kind, *_) in enumerate(kinds) if kind == "res"]
    return found[kept - 1]


def network(ckpt):
    return weights.fitted(DDPMpp, ckpt, "ema", "ckpt").double().eval()


def test_ddpmpp_is_score_sde_s():
    """eps at t: the network at label 999 s, s the time at which score-sde's VP has this abar."""
    w = score_sde_weights()
    net = network(ddpmpp.from_score_sde(w, SIZE))
    assert all(m.eps == 1e-6 for m in net.modules() if isinstance(m, nn.GroupNorm))
    x = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    t = torch.tensor([0, 99, 999])
    s = torch.linspace(0, 1.01, 400_001, dtype=torch.float64)
    log_abar = -0.1 * s - 19.9 * s**2 / 2
    wanted = SCHEDULE.alphas_bar[t].log()
    labels = 999 * s[torch.searchsorted(-log_abar, -wanted)]
    torch.testing.assert_close(labels, (t + 1).double(), rtol=1e-2, atol=0.1)  # nearly DDPM's own t
    labels = labels.clamp(max=999)
    expected = score_sde(w, x, labels)
    assert expected.std() > 0.1
    torch.testing.assert_close(net(x, t), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(net.network(x, labels), expected, rtol=1e-5, atol=1e-5)
    smallest = torch.full((3,), time_of(SCHEDULE, 0.002), dtype=torch.float64)
    asked = torch.full((3,), 999 * math.log1p(0.002**2) / 0.1, dtype=torch.float64)
    assert net.t_min == -1 and asked[0] < 0.05
    torch.testing.assert_close(net(x, smallest), score_sde(w, x, asked), rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------------
# EDM's SongUNet: the same network under other names


def edm_weights(w):
    """score-sde's weights under EDM's names; q, k, v take turns in the rows of one convolution."""
    block = dict(
        GroupNorm_0="norm0", Conv_0="conv0", Dense_0="affine", GroupNorm_1="norm1", Conv_1="conv1",
        Conv_2="skip",
    )  # fmt: skip
    new, names, place, last = {}, edm_names(), 0, None
    for n, (kind, *_) in enumerate(modules()):
        unit = {k.removeprefix(f"all_modules.{n}."): v for k, v in w.items() if f"s.{n}." in k}
        if kind == "attn":
            for part in ("weight", "bias"):
                new[f"{last}.norm2.{part}"] = unit[f"GroupNorm_0.{part}"]
            qkv = torch.stack([unit[f"NIN_{j}.W"].T for j in range(3)], dim=1).flatten(0, 1)
            new[f"{last}.qkv.weight"] = qkv[:, :, None, None]
            bias = torch.stack([unit[f"NIN_{j}.b"] for j in range(3)], dim=1)
            new[f"{last}.qkv.bias"] = bias.flatten()
            new[f"{last}.proj.weight"] = unit["NIN_3.W"].T[:, :, None, None]
            new[f"{last}.proj.bias"] = unit["NIN_3.b"]
            continue
        last = names[place]
        place += 1
        for key, value in unit.items():
            layer, _, part = key.rpartition(".")
            new[f"{last}.{block[layer]}.{part}" if layer else f"{last}.{key}"] = value
    new["enc.4x4_down.conv0.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
    new["map_augment.weight"] = torch.ones(CHANNELS[0], 9)
    return new


def edm_names():
    return [
        "map_layer0", "map_layer1", "enc.8x8_conv", "enc.8x8_block0", "enc.8x8_block1",
        "enc.4x4_down", "enc.4x4_block0", "enc.4x4_block1", "dec.4x4_in0", "dec.4x4_in1",
        "dec.4x4_block0", "dec.4x4_block1", "dec.4x4_block2", "dec.8x8_up", "dec.8x8_block0",
        "dec.8x8_block1", "dec.8x8_block2", "dec.8x8_aux_norm", "dec.8x8_aux_conv",
    ]  # fmt: skip


def denoiser(w):
    """D(x; sigma) with EDM's preconditioning (Karras et al., 2022, Table 1)."""

    def D(x, sigma):
        s = sigma.view(-1, 1, 1, 1)
        c_skip = 0.25 / (s**2 + 0.25)
        c_out = s * 0.5 / (s**2 + 0.25).sqrt()
        c_in = 1 / (s**2 + 0.25).sqrt()
        return c_skip * x + c_out * score_sde(w, c_in * x, sigma.log() / 4)

    return D


def test_ddpmpp_is_edm_s():
    w = score_sde_weights()
    net = network(ddpmpp.from_edm(edm_weights(w), True, SIZE))
    D = denoiser(w)
    sigmas = torch.tensor([0.002, 0.3, 80.0], dtype=torch.float64)
    t = torch.tensor([time_of(SCHEDULE, s) for s in sigmas.tolist()], dtype=torch.float64)
    x = torch.randn(3, 3, SIZE, SIZE, dtype=torch.float64)
    s = sigmas.view(-1, 1, 1, 1)
    expected = (x - D(x, sigmas)) / s
    torch.testing.assert_close(net(x / (1 + s**2).sqrt(), t), expected, rtol=1e-5, atol=1e-5)


def test_edm_s_sampler_asks_edm_s_network_for_every_level():
    """Its Algorithm 2 on the denoiser itself, deterministic, down to .002."""
    w = score_sde_weights()
    net, D = network(ddpmpp.from_edm(edm_weights(w), True, SIZE)), denoiser(w)
    start = 0.5 * torch.randn(1, 3, SIZE, SIZE, dtype=torch.float64)
    steps = torch.linspace(0, 1, 6, dtype=torch.float64)
    levels = [*((0.5 ** (1 / 7) + steps * (0.002 ** (1 / 7) - 0.5 ** (1 / 7))) ** 7).tolist(), 0.0]
    x = start
    for now, after in zip(levels, levels[1:]):
        d = (x - D(x, torch.tensor([now]).double())) / now
        euler = x + (after - now) * d
        if after > 0:
            d = (d + (euler - D(euler, torch.tensor([after]).double())) / after) / 2
        x = x + (after - now) * d
    ours = edm_follow(net, SCHEDULE, start, 0.5, 6, clip=False)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# files


class Persistent:
    """An object that EDM's torch_utils pickles with its source."""

    def __init__(self, class_name, **state):
        self.class_name, self.state = class_name, state

    def __reduce__(self):
        source = "import pathlib; pathlib.Path('ran').touch()"
        meta = dict(type="class", version=6, module_src=source, class_name=self.class_name)
        return rebuild, (meta | dict(state=self.state),)


def rebuild(meta):
    raise AssertionError("no code of the file may run")


def as_modules(state, name=""):
    """{name: tensor} as nested objects, torch's own containers among them."""
    own = {k: nn.Parameter(v, requires_grad=False) for k, v in state.items() if "." not in k}
    buffers = {k: own.pop(k).data for k in list(own) if k == "resample_filter"}
    children = {}
    for child, part in ddpmpp.grouped({k: v for k, v in state.items() if "." in k}).items():
        children[child] = as_modules(part, child)
    if name in ("enc", "dec"):
        container = nn.ModuleDict()
        container._modules = children
        return container
    return Persistent("Layer", _parameters=own, _buffers=buffers, _modules=children, bias=None)


@pytest.fixture
def edm_file(tmp_path, monkeypatch):
    """-> a function that writes EDM's file of a class of preconditioning."""
    module = types.ModuleType("torch_utils.persistence")
    module._reconstruct_persistent_obj = rebuild
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)
    monkeypatch.setattr(rebuild, "__module__", "torch_utils.persistence")
    monkeypatch.setattr(rebuild, "__qualname__", "_reconstruct_persistent_obj")

    def write(class_name, **more):
        state = {k: v.float() for k, v in (edm_weights(score_sde_weights()) | more).items()}
        net = Persistent(
            class_name, img_resolution=SIZE, sigma_data=np.sqrt(0.25), _parameters={}, _buffers={},
            _modules=dict(model=as_modules(state)),
        )  # fmt: skip
        path = tmp_path / "edm.pkl"
        path.write_bytes(pickle.dumps(dict(ema=net, other=types.SimpleNamespace(a=1))))
        return path

    return write


@pytest.mark.parametrize("class_name, edm", [("EDMPrecond", True), ("VPPrecond", False)])
def test_edm_s_file_is_read_without_its_code(edm_file, tmp_path, monkeypatch, class_name, edm):
    monkeypatch.chdir(tmp_path)
    assert call(ddpmpp, edm_file(class_name), "--out", tmp_path / "edm.pt") == 0
    assert not (tmp_path / "ran").exists()
    flags = "--n 2 --sampler heun --steps 2 --device cpu --amp fp32 --no-png".split()
    assert call(sample, "--ckpt", tmp_path / "edm.pt", *flags, "--out", tmp_path / "o") == 0
    ckpt = torch.load(tmp_path / "edm.pt", weights_only=True)
    assert ckpt["config"] == dict(
        channels=list(CHANNELS), attention=[False, True], blocks=BLOCKS, in_channels=3, edm=edm
    )
    expected = ddpmpp.from_edm(edm_weights(score_sde_weights()), edm, SIZE)["ema"]
    assert ckpt["ema"].keys() == expected.keys()
    assert all(torch.equal(ckpt["ema"][k], expected[k]) for k in expected)


def test_what_sample_py_cannot_do_with_it(edm_file, tmp_path, capsys):
    assert call(ddpmpp, edm_file("EDMPrecond"), "--out", tmp_path / "edm.pt") == 0
    for flag in (["--raw"], ["--export", tmp_path / "e"]):
        capsys.readouterr()
        assert call(sample, "--ckpt", tmp_path / "edm.pt", *flag, "--out", tmp_path / "o") == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and flag[0] in err[0]


def test_other_networks_of_edm_are_refused(edm_file, tmp_path, capsys):
    labels = {"map_label.weight": torch.ones(CHANNELS[0], 10)}
    for class_name, more, why in (
        ("VEPrecond", {}, "VEPrecond"),
        ("EDMPrecond", labels, "class-conditional"),
    ):
        assert call(ddpmpp, edm_file(class_name, **more), "--out", tmp_path / "x.pt") == 2
        assert why in capsys.readouterr().err


@pytest.mark.parametrize("as_zip", [True, False])
def test_score_sde_s_file_is_read_by_its_averaged_weights(tmp_path, as_zip):
    w = score_sde_weights()
    raw = {f"module.{k}": torch.zeros_like(v) for k, v in w.items()}
    raw["module.sigmas"] = torch.ones(1000)
    ema = dict(decay=0.9999, num_updates=5, shadow_params=list(w.values()))
    file = tmp_path / "checkpoint_8.pth"
    optimizer = dict(state={}, param_groups=[dict(lr=2e-4 * np.minimum(1.0, 1.0), params=[0])])
    ckpt = dict(optimizer=optimizer, model=raw, ema=ema, step=5)
    torch.save(ckpt, file, _use_new_zipfile_serialization=as_zip)
    assert call(ddpmpp, file, "--out", tmp_path / "diffpure.pt") == 0
    ckpt = torch.load(tmp_path / "diffpure.pt", weights_only=True)
    expected = ddpmpp.from_score_sde(w)["ema"]
    assert all(torch.equal(ckpt["ema"][k], expected[k]) for k in expected)
    assert ckpt["image_size"] == 32 and not ckpt["config"]["edm"]


class Evil:
    def __reduce__(self):
        return eval, ("open('ran', 'w')",)


@pytest.mark.parametrize("content", [b"", b"text", "evil", dict(ema=1), dict(a=torch.ones(2))])
@pytest.mark.parametrize("ending", ["pkl", "pth"])
def test_other_files_are_refused_in_a_line(content, ending, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / f"x.{ending}"
    if content == "evil":
        file.write_bytes(pickle.dumps(dict(ema=Evil())))
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    assert call(ddpmpp, file, "--out", tmp_path / "y.pt") == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1 and "x." in err[0]
    assert not (tmp_path / "y.pt").exists() and not (tmp_path / "ran").exists()
