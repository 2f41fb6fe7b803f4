"""The U-Net of DDPM (Ho et al., 2020), eps_theta(x_t, t): the graph of `google/ddpm-cifar10-32`.

    net = UNet(**PRESETS["ddpm"])                  # 35.7 M parameters, 32x32
    net = UNet.load("out/ckpt.pt")                 # a checkpoint of train.py, EMA weights
    net = UNet.from_diffusers("ddpm-cifar10-32/")  # a folder or state dict of a UNet2DModel

Details that matter for loading those weights: GroupNorm eps 1e-6, down-sampling pads right and
bottom only, the time embedding is [sin, cos] with frequencies 1e4^(-i / (d/2 - 1)), attention has
one head.
"""

import math
import os

import torch
import torch.nn.functional as F
from torch import nn

import weights
from outputs import reason
from rng import scramble
from runtime import load_checkpoint

PRESETS = {
    # DDPM on CIFAR-10, attention at 16x16: 35.7 M parameters.
    "ddpm": dict(
        channels=(128, 256, 256, 256), attention=(False, True, False, False), blocks=2, dropout=0.1
    ),
    # DDIM's CelebA network for 64x64, attention at 16x16: 78.7 M parameters.
    "ddpm64": dict(
        channels=(128, 256, 256, 256, 512),
        attention=(False, False, True, False, False),
        blocks=2,
        dropout=0.1,
    ),
    # 2.6 M parameters on 2x2 patches (ours): the cheapest here per step, 0.4 of tiny.
    "mini": dict(channels=(96, 96), attention=(False, True), blocks=1, dropout=0.0, patch=2),
    # 2.8 M parameters, trains on a CPU at 16x16 (minutes) or 32x32. No dropout: its runs are too
    # short to overfit.
    "tiny": dict(channels=(64, 96, 96), attention=(False, True, False), blocks=1, dropout=0.0),
}


def timestep_embedding(t, dim):
    """Sin-cos features of t, (B,) integer or real -> (B, dim); DDPM's frequencies 1e4^(-i / (dim/2
    - 1)).
    """
    dtype = t.dtype if t.dtype == torch.float64 else torch.float32
    freqs = torch.exp(
        torch.arange(dim // 2, device=t.device, dtype=dtype) * (-math.log(1e4) / (dim // 2 - 1))
    )
    phase = t[:, None].to(dtype) * freqs  # (B, dim/2)
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def layout_of(weight):
    """The memory format of a convolution's weight, which its input should share."""
    last = weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def conv3x3(c_in, c_out, stride=1, padding=1):
    return nn.Conv2d(c_in, c_out, 3, stride=stride, padding=padding)


class Dropout(nn.Module):
    """Dropout. Given keys (B,) int64, row i of the mask is a function of keys[i] and `layer`, the
    layer's number.

    Equal keys give equal masks, in every forward and on every device. Without keys it is torch's.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p
        self.layer = 0

    def forward(self, x, keys=None):
        if keys is None or self.p == 0 or not self.training:
            return F.dropout(x, self.p, self.training)
        element = torch.arange(x[0].numel(), dtype=torch.int32, device=x.device)
        row = scramble(scramble(keys.to(torch.int32)) ^ self.layer).view(-1, 1, 1, 1)
        random = scramble(element.view(x.shape[1:]) ^ row) ^ -(2**31)  # as if unsigned
        keep = random >= round(self.p * 2**32) - 2**31
        return x * keep.to(x.dtype) / (1 - self.p)


class ResBlock(nn.Module):
    def __init__(self, c_in, c_out, c_emb, groups, dropout):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = conv3x3(c_in, c_out)
        self.emb = nn.Linear(c_emb, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.dropout = Dropout(dropout)
        self.conv2 = conv3x3(c_out, c_out)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, shift, keys):
        """shift (B, c_out): self.emb of the time embedding, which UNet.shifts computes for all
        blocks; keys: of Dropout.
        """
        h = F.conv2d(F.silu(self.norm1(x)), self.conv1.weight, padding=1)
        # shift and bias added first, so that the backward sums over the pixels once
        h = h + (shift + self.conv1.bias.to(shift.dtype))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h)), keys))
        return self.skip(x) + h


class Attention(nn.Module):
    """Single-head self-attention over the pixels."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.qkv = nn.Linear(c, 3 * c)
        self.out = nn.Linear(c, c)

    def forward(self, x):
        h = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C): a view if x is channels_last
        q, k, v = self.qkv(h)[:, None].chunk(3, dim=-1)  # (B, 1 head, HW, C)
        if q.is_cuda or q.dtype != torch.bfloat16:
            h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        else:  # in bf16, PyTorch's kernel for CPUs is 1.3 (large batch) to 3 times slower
            h = ((q * q.shape[-1] ** -0.5) @ k.mT).softmax(-1).to(v.dtype).matmul(v)[:, 0]
        return x + self.out(h).transpose(1, 2).unflatten(2, x.shape[2:])


class Level(nn.Module):
    """The blocks of one resolution; `resample` leads to the next one (absent on the last)."""

    def __init__(self, widths, c_emb, attention, groups, dropout, resample=None):
        super().__init__()
        self.res = nn.ModuleList(
            ResBlock(c_in, c_out, c_emb, groups, dropout) for c_in, c_out in widths
        )
        self.attn = nn.ModuleList(
            Attention(c_out, groups) if attention else nn.Identity() for _, c_out in widths
        )
        self.resample = resample


class UNet(nn.Module):
    """eps_theta: x (B, C, H, W), t (B,) in 0..T-1, integer or real -> the predicted unit noise, x's
    shape and dtype.

    channels   width of each resolution, halving from one to the next, so that H and W must divide
               by `factor`, patch 2^(len(channels) - 1)
    attention  per resolution
    blocks     residual blocks per resolution
    patch      the network sees patch x patch pixels as channels (ours, for CPUs: wants channels[0]
               well above 2 in_channels patch^2)

    `config` rebuilds the network: UNet(**net.config). mask_keys: (B,) int64 or None. The forwards
    of Robust_adv compare outputs: with a dropout mask each, the attack and the regulariser would
    hold the masks' noise. So train.py gives the rows of a batch one mask for a whole step (ours).
    """

    real_t = True  # EDM's sampler may ask for a t between two steps

    def __init__(
        self,
        channels=(128, 256, 256, 256),
        attention=(False, True, False, False),
        blocks=2,
        dropout=0.1,
        groups=32,
        in_channels=3,
        patch=1,
    ):
        super().__init__()
        self.config = dict(
            channels=list(channels),
            attention=list(attention),
            blocks=blocks,
            dropout=dropout,
            groups=groups,
            in_channels=in_channels,
            patch=patch,
        )
        self.patch, self.factor = patch, patch * 2 ** (len(channels) - 1)
        c0, c_emb, last = channels[0], 4 * channels[0], len(channels) - 1
        self.time = nn.Sequential(nn.Linear(c0, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb))
        self.conv_in = conv3x3(in_channels * patch**2, c0)

        self.down = nn.ModuleList()
        skips, c = [c0], c0
        for i, width in enumerate(channels):
            widths = [(c if j == 0 else width, width) for j in range(blocks)]
            resample = conv3x3(width, width, stride=2, padding=0) if i < last else None
            self.down.append(Level(widths, c_emb, attention[i], groups, dropout, resample))
            skips += [width] * (blocks + (i < last))
            c = width

        self.mid = Level([(c, c), (c, c)], c_emb, True, groups, dropout)
        self.mid.attn[1] = nn.Identity()  # residual, attention, residual

        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(channels))):
            widths = []
            for _ in range(blocks + 1):  # each block takes one stored activation of the way down
                widths.append((c + skips.pop(), width))
                c = width
            resample = conv3x3(c, c) if i > 0 else None
            self.up.append(Level(widths, c_emb, attention[i], groups, dropout, resample))

        self.mask_keys = None  # one dropout mask for all forwards of a step, see Dropout
        for i, block in enumerate(m for m in self.modules() if isinstance(m, Dropout)):
            block.layer = i

        self.norm_out = nn.GroupNorm(groups, c0, eps=1e-6)
        self.conv_out = conv3x3(c0, in_channels * patch**2)
        self._init_weights()

    def _init_weights(self):
        """DDPM's: uniform with variance 1/fan_avg; the last layer of every branch and of the
        network starts at 0.
        """
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        for m in self.modules():
            if isinstance(m, ResBlock):
                nn.init.zeros_(m.conv2.weight)
            if isinstance(m, Attention):
                for w in m.qkv.weight.chunk(3):
                    nn.init.xavier_uniform_(w)
                nn.init.zeros_(m.out.weight)
        nn.init.zeros_(self.conv_out.weight)

    def cast(self, dtype):
        """The parameters of convolutions and linear layers cast, once, as autocast would at every
        call -> this network.

        For use under autocast still: all else remains in float32.
        """
        for m in self.modules():
            if isinstance(m, (nn.Conv2d, nn.Linear)):
                m.weight = nn.Parameter(m.weight.detach().to(dtype), m.weight.requires_grad)
                m.bias = nn.Parameter(m.bias.detach().to(dtype), m.bias.requires_grad)
        return self

    def shifts(self, emb):
        """self.emb of every residual block, as one product: an iterator over (B, c_out)."""
        blocks = [res for level in (*self.down, self.mid, *self.up) for res in level.res]
        weight = torch.cat([res.emb.weight for res in blocks])
        bias = torch.cat([res.emb.bias for res in blocks])
        return iter(F.linear(emb, weight, bias).split([len(res.emb.bias) for res in blocks], dim=1))

    def refuse_size(self, height, width):
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"--image-size {height}x{width} does not divide by {self.factor}, as this network "
                "needs"
            )

    def forward(self, x, t):
        self.refuse_size(*x.shape[-2:])
        x = x.contiguous(memory_format=layout_of(self.conv_in.weight))
        emb = timestep_embedding(t, self.time[0].in_features).to(self.time[0].weight.dtype)
        shifts = self.shifts(F.silu(self.time(emb)))
        keys = self.mask_keys
        if keys is not None:  # Robust_ran repeats the first rows of a batch behind it
            keys = torch.cat([keys, keys])[: len(x)]

        h = self.conv_in(F.pixel_unshuffle(x, self.patch) if self.patch > 1 else x)
        hs = [h]
        for level in self.down:
            for res, attn in zip(level.res, level.attn):
                h = attn(res(h, next(shifts), keys))
                hs.append(h)
            if level.resample is not None:
                # right and bottom only, as in DDPM's TensorFlow code
                h = level.resample(F.pad(h, (0, 1, 0, 1)))
                hs.append(h)

        for res, attn in zip(self.mid.res, self.mid.attn):
            h = attn(res(h, next(shifts), keys))

        for level in self.up:
            for res, attn in zip(level.res, level.attn):
                h = attn(res(torch.cat([h, hs.pop()], dim=1), next(shifts), keys))
            if level.resample is not None:
                h = level.resample(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.conv_out(F.silu(self.norm_out(h)))
        return (F.pixel_shuffle(h, self.patch) if self.patch > 1 else h).to(x.dtype)

    @classmethod
    def load(cls, checkpoint, ema=True, name="checkpoint"):
        """The network of a train.py checkpoint (path or loaded dict), in eval mode; ema=False for
        the raw weights; name: of a dict, in messages.
        """
        ckpt = checkpoint
        if isinstance(checkpoint, (str, os.PathLike)):
            ckpt, name = load_checkpoint(checkpoint), checkpoint
        if ckpt.get("kind") != "unet":
            raise ValueError(f"{name}: holds no UNet (train.py's checkpoints do)")
        return weights.fitted(cls, ckpt, "ema" if ema else "model", name).eval()

    @classmethod
    def from_diffusers(cls, source, dropout=0.1):
        """From a folder with a UNet2DModel (config.json beside .safetensors or .bin), or its state
        dict.

        Raises ValueError for a model outside the family of google/ddpm-cifar10-32.
        """
        name = "state dict" if isinstance(source, dict) else source
        state = source if isinstance(source, dict) else weights.read_diffusers(source)
        try:
            config, state = weights.from_diffusers(state)
            ckpt = dict(config=config | dict(dropout=dropout), model=state)
            return weights.fitted(cls, ckpt, "model", "file").eval()
        except Exception as e:  # whatever may stand in another's file
            why = f"not a UNet2DModel of the ddpm-cifar10-32 family ({reason(e)})"
            raise ValueError(f"{name}: {why}") from None

    def to_diffusers(self, folder, image_size=32):
        """Write a folder that diffusers' DDPMPipeline.from_pretrained opens; the inverse of
        from_diffusers.

        Raises ValueError for patch > 1, which UNet2DModel cannot express.
        """
        weights.write_diffusers(self.state_dict(), self.config, folder, image_size)
