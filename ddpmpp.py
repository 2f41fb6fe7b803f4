"""DDPM++ (Song et al., 2021), the network of DiffPure and of EDM, to purify and to sample with.

    python ddpmpp.py checkpoint_8.pth --out diffpure.pt             # score-sde's, of DiffPure
    python ddpmpp.py edm-cifar10-32x32-uncond-vp.pkl --out edm.pt   # EDM's
    python purify.py --ckpt edm.pt --classifier C --data cifar10 --purifier edm-sde

Their files are pickles, which may run code when they are opened. Here nothing but tensors is taken
from them: no code of the file is run, nor is theirs needed. What is written holds tensors and plain
values, like every checkpoint of this project. Unconditional networks alone; of score-sde's files
vp/cifar10_ddpmpp[_deep]_continuous: its subVP and discrete ones look the same and are not told
apart. train.py does not train them. Not checked against the public files, which were not at hand:
the tests compare with both codes' formulas, on random weights.
"""

import io
import math
import pickle
from collections import OrderedDict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import outputs
import runtime
import weights
from losses import NoiseSchedule, like
from samplers import level_of
from unet import Attention, UNet, conv3x3, timestep_embedding

SIGMAS = [0, *NoiseSchedule().sigmas]  # of t = -1, 0, ..
SIGMA_DATA = 0.5  # of EDM's preconditioning
BETA_MIN, BETA_D = 0.1, 19.9  # score-sde's: log(1 + sigma^2) = BETA_MIN s + BETA_D s^2 / 2


# --------------------------------------------------------------------------------------------------
# the network


class Block(nn.Module):
    """Residual block with BigGAN's resampling inside; sums are scaled by sqrt(1/2)."""

    def __init__(self, c_in, c_out, c_emb, resample=None, attention=False):
        super().__init__()
        self.resample = resample
        self.norm1 = nn.GroupNorm(min(32, c_in // 4), c_in, eps=1e-6)
        self.conv1 = conv3x3(c_in, c_out)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(min(32, c_out // 4), c_out, eps=1e-6)
        self.conv2 = conv3x3(c_out, c_out)
        if c_in != c_out or resample:
            self.skip = nn.Conv2d(c_in, c_out, 1)
        else:
            self.skip = nn.Identity()
        if attention:
            self.attn = Attention(c_out, min(32, c_out // 4))
        else:
            self.attn = None

    def forward(self, x, emb):
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = F.interpolate(h, scale_factor=2.0), F.interpolate(x, scale_factor=2.0)
        h = self.conv1(h) + self.emb(emb)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        x = (self.skip(x) + h) * math.sqrt(0.5)
        if self.attn is not None:
            x = self.attn(x) * math.sqrt(0.5)
        return x


class DDPMpp(nn.Module):
    """eps_theta: x_t (B, C, H, W), t (B,) integer or real > -1 of NoiseSchedule() -> the predicted
    unit noise, x_t's shape and dtype.

    channels, attention: per resolution; blocks: residual blocks per resolution.
    edm: of a denoiser D(x; sigma) with EDM's preconditioning, else of score-sde's VP network.
    """

    real_t = True  # see samplers.edm_follow
    t_min = -1  # both were trained down to sigma = .002 or less
    refuse_size = UNet.refuse_size
    cast = UNet.cast

    def __init__(self, channels, attention, blocks, in_channels=3, edm=False):
        super().__init__()
        self.edm = edm
        self.factor = 2 ** (len(channels) - 1)
        levels = torch.tensor(SIGMAS, dtype=torch.float64)
        self.register_buffer("levels", levels.square().log1p(), persistent=False)

        c, c_emb = channels[0], 4 * channels[0]
        self.time = nn.Sequential(nn.Linear(c, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.conv_in = conv3x3(in_channels, c)
        self.down = nn.ModuleList()
        skips = [c]
        for i, width in enumerate(channels):
            if i > 0:
                self.down.append(Block(c, c, c_emb, "down"))
                skips.append(c)
            for _ in range(blocks):
                self.down.append(Block(c, width, c_emb, attention=attention[i]))
                skips.append(width)
                c = width
        self.mid = nn.ModuleList([Block(c, c, c_emb, attention=True), Block(c, c, c_emb)])
        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(channels))):
            if i < len(channels) - 1:
                self.up.append(Block(c, c, c_emb, "up"))
            for j in range(blocks + 1):
                attends = attention[i] and j == blocks
                self.up.append(Block(c + skips.pop(), width, c_emb, attention=attends))
                c = width
        self.norm_out = nn.GroupNorm(min(32, c // 4), c, eps=1e-6)
        self.conv_out = conv3x3(c, in_channels)

    def forward(self, x_t, t):
        self.refuse_size(*x_t.shape[-2:])
        level = level_of(self.levels, t)  # log(1 + sigma^2) = -log abar
        if not self.edm:
            time = ((BETA_MIN**2 + 2 * BETA_D * level).sqrt() - BETA_MIN) / BETA_D
            # it was trained on labels up to 999, which DDPM's own schedule passes by 3
            return self.network(x_t, 999 * time.clamp(max=1)).to(x_t.dtype)
        sigma = level.expm1().sqrt()
        total = (sigma**2 + SIGMA_DATA**2).sqrt()
        x = like((level / 2).exp(), x_t) * x_t  # x_0 + sigma eps
        answer = self.network(like(1 / total, x) * x, sigma.log() / 4).to(x_t.dtype)
        # (x - D) / sigma, D = c_skip x + c_out answer (Karras et al., 2022, Table 1)
        return like(sigma / total**2, x) * x - like(SIGMA_DATA / total, x) * answer

    def network(self, x, label):
        emb = timestep_embedding(label, self.time[0].in_features).to(self.time[0].weight.dtype)
        emb = F.silu(self.time(emb))
        h = self.conv_in(x)
        skips = [h]
        for block in self.down:
            h = block(h, emb)
            skips.append(h)
        for block in self.mid:
            h = block(h, emb)
        for block in self.up:
            if block.resample is None:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb)
        return self.conv_out(F.silu(self.norm_out(h)))


# --------------------------------------------------------------------------------------------------
# names: of a file, here. Both codes build their blocks in the order of the lists above

BLOCK_EDM = dict(
    norm0="norm1", conv0="conv1", affine="emb", norm1="norm2", conv1="conv2", skip="skip",
    norm2="attn.norm", qkv="attn.qkv", proj="attn.out",
)  # fmt: skip
BLOCK_SCORE_SDE = dict(
    GroupNorm_0="norm1", Conv_0="conv1", Dense_0="emb", GroupNorm_1="norm2", Conv_1="conv2",
    Conv_2="skip",
)  # fmt: skip


def grouped(state):
    """{"a.b.c": tensor} by its first name -> {"a": {"b.c": tensor}}, in the order of the file."""
    groups = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        groups.setdefault(first, {})[rest] = value
    return groups


def renamed(block, names):
    new = {}
    for key, value in block.items():
        layer, _, part = key.rpartition(".")
        new[f"{names[layer]}.{part}"] = value
    return new


def from_edm(state, edm, image_size):
    """EDM's SongUNet, {name: tensor} -> the checkpoint. edm: of EDMPrecond, else of VPPrecond."""
    groups = grouped(state)
    if "map_label" in groups:
        raise ValueError("class-conditional")
    ends, blocks = {}, []
    for part in ("enc", "dec"):
        for name, unit in grouped(groups[part]).items():
            end = {"conv": "conv_in", "norm": "norm_out"}.get(name.split("_")[-1])
            if name.endswith("aux_conv"):
                end = "conv_out"
            if end:
                ends |= {f"{end}.{key}": value for key, value in unit.items()}
                continue
            unit = {key: value for key, value in unit.items() if "resample_filter" not in key}
            block = renamed(unit, BLOCK_EDM)
            for key in [key for key in block if key.startswith("attn.qkv")]:
                value = block[key]  # its rows are q_0, k_0, v_0, q_1, ..
                block[key] = value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
            for key in ("attn.qkv.weight", "attn.out.weight"):
                if key in block:
                    block[key] = block[key][:, :, 0, 0]
            blocks.append(block)
    for key, value in groups["map_layer0"].items():
        ends[f"time.0.{key}"] = value
    for key, value in groups["map_layer1"].items():
        ends[f"time.2.{key}"] = value
    return assembled(ends, blocks, edm, image_size)


def from_score_sde(state, image_size=32):
    """score-sde's NCSNpp as DDPM++, {name: tensor} -> the checkpoint."""
    units = list(grouped(grouped(state)["all_modules"]).values())
    ends = {}
    for name, unit in zip(("time.0", "time.2", "conv_in"), units):
        ends |= {f"{name}.{key}": value for key, value in unit.items()}
    for name, unit in zip(("norm_out", "conv_out"), units[-2:]):
        ends |= {f"{name}.{key}": value for key, value in unit.items()}
    blocks = []
    for unit in units[3:-2]:
        if "Conv_0.weight" in unit:
            blocks.append(renamed(unit, BLOCK_SCORE_SDE))
        else:  # the attention behind the last block
            qkv = [unit[f"NIN_{j}.W"].T for j in range(3)]
            blocks[-1] |= {
                "attn.norm.weight": unit["GroupNorm_0.weight"],
                "attn.norm.bias": unit["GroupNorm_0.bias"],
                "attn.qkv.weight": torch.cat(qkv),
                "attn.qkv.bias": torch.cat([unit[f"NIN_{j}.b"] for j in range(3)]),
                "attn.out.weight": unit["NIN_3.W"].T,
                "attn.out.bias": unit["NIN_3.b"],
            }
    return assembled(ends, blocks, False, image_size)


def assembled(ends, blocks, edm, image_size):
    """The checkpoint of blocks in order; their shapes tell the rest."""
    resampling = 0
    for block in blocks:
        c_out, c_in = block["conv1.weight"].shape[:2]
        resampling += "skip.weight" in block and c_in == c_out
    levels = resampling // 2 + 1
    per_level = (len(blocks) // levels - 3) // 2  # of levels (2 n + 3) blocks
    n = levels * (per_level + 1) - 1
    state = dict(ends)
    for part, units in dict(down=blocks[:n], mid=blocks[n : n + 2], up=blocks[n + 2 :]).items():
        for i, unit in enumerate(units):
            state |= {f"{part}.{i}.{key}": value for key, value in unit.items()}
    first = blocks[:n][:: per_level + 1]
    config = dict(
        channels=[len(block["conv2.weight"]) for block in first],
        attention=["attn.out.weight" in block for block in first],
        blocks=per_level,
        in_channels=ends["conv_in.weight"].shape[1],
        edm=edm,
    )
    state = {key: value.detach().float().clone() for key, value in state.items()}
    return dict(kind="ddpmpp", config=config, ema=state, image_size=image_size, args={})


# --------------------------------------------------------------------------------------------------
# files


class Stub:
    """In the place of whatever else a file holds: keeps its state, does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __setitem__(self, key, value):
        pass

    def __setstate__(self, state):
        if isinstance(state, dict):
            self.__dict__.update(state)


def stub(module, name):
    return type(name, (Stub,), dict(__module__=module))


NUMPY = [
    stub("numpy", "dtype"),
    stub("numpy.core.multiarray", "scalar"),
    stub("numpy._core.multiarray", "scalar"),
]


def load_storage(data):
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def persistent(meta):
    """EDM's objects carry their source, which is left unread: -> a Stub with their state."""
    found = Stub()
    found.__dict__.update(meta["state"], class_name=meta["class_name"])
    return found


class Tensors(pickle.Unpickler):
    """Of a pickle the tensors alone; every other class is a Stub, no other function is called."""

    KNOWN = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
        ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
        ("torch.storage", "_load_from_bytes"): load_storage,
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): persistent,
    }

    def find_class(self, module, name):
        return self.KNOWN.get((module, name), Stub)


def tensors_of(module, prefix=""):
    """{name: tensor} of a Stub in the place of an nn.Module."""
    found = {}
    for kind in ("_parameters", "_buffers"):
        for name, value in vars(module).get(kind, {}).items():
            if value is not None:
                found[prefix + name] = value
    for name, child in vars(module).get("_modules", {}).items():
        if child is not None:
            found |= tensors_of(child, f"{prefix}{name}.")
    return found


def read_edm(path):
    with open(path, "rb") as f:
        net = Tensors(f).load()["ema"]
    if net.class_name not in ("EDMPrecond", "VPPrecond"):
        raise ValueError(f"preconditioned by {net.class_name}")
    state = tensors_of(net._modules["model"])
    return from_edm(state, net.class_name == "EDMPrecond", net.img_resolution)


def read_score_sde(path):
    """Of its averaged weights, which are a list in the order of the parameters."""
    with torch.serialization.safe_globals(NUMPY):  # the optimizer's rate is a number of NumPy's
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    names = [key.removeprefix("module.") for key in ckpt["model"]]
    names = [name for name in names if name.startswith("all_modules.")]
    return from_score_sde(dict(zip(names, ckpt["ema"]["shadow_params"], strict=True)))


def main():
    parser = runtime.parser(__doc__)
    parser.add_argument("file", help="EDM's .pkl, or score-sde's .pth")
    parser.add_argument("--out", required=True, metavar="FILE", help="the checkpoint")
    args = parser.parse_args()
    if Path(args.out).exists():
        raise ValueError(f"--out {args.out}: exists; give another name")
    if not Path(args.file).is_file():
        raise ValueError(f"{args.file}: no such file")
    try:
        read = read_edm if args.file.endswith(".pkl") else read_score_sde
        ckpt = read(args.file)
        weights.fitted(DDPMpp, ckpt, "ema", args.file)
    except Exception as e:  # whatever may stand in another's file
        why = f"no unconditional DDPM++ of EDM or score-sde ({outputs.reason(e)})"
        raise ValueError(f"{args.file}: {why}") from None
    runtime.save_checkpoint(args.out, ckpt)
    print(f"{ckpt['config']} -> {args.out}")


if __name__ == "__main__":
    runtime.cli(main)
