"""Weights: into a network that they fit, and of unet.UNet as diffusers' UNet2DModel and back.

    python sample.py --ckpt out/ckpt.pt --export F  # for DDPMPipeline.from_pretrained("F")
    net = UNet.from_diffusers("ddpm-cifar10-32/")

A .safetensors file takes `pip install safetensors`.
"""

import json
import os
import re
from pathlib import Path

import torch

from outputs import read_json, reason
from runtime import load_checkpoint

NAMES = [  # diffusers', as a pattern; here
    (r"down_blocks\.(\d+)", r"down.\1"),
    (r"up_blocks\.(\d+)", r"up.\1"),
    ("mid_block", "mid"),
    ("resnets", "res"),
    ("attentions", "attn"),
    (r"(down|up)samplers\.0\.conv", "resample"),
    ("conv_shortcut", "skip"),
    ("time_emb_proj", "emb"),
    (r"time_embedding\.linear_1", "time.0"),
    (r"time_embedding\.linear_2", "time.2"),
    ("conv_norm_out", "norm_out"),
    ("group_norm", "norm"),
    (r"to_out\.0|proj_attn", "out"),
    (r"to_q|query", "attn_q"),
    (r"to_k|key", "attn_k"),
    (r"to_v|value", "attn_v"),
]
BACK = [  # here, as a pattern; diffusers'
    (r"^down\.(\d+)\.resample", r"down_blocks.\1.downsamplers.0.conv"),
    (r"^up\.(\d+)\.resample", r"up_blocks.\1.upsamplers.0.conv"),
    (r"^(down|up)\.(\d+)", r"\1_blocks.\2"),
    (r"^mid\.", "mid_block."),
    (r"\.res\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"\.skip\.", ".conv_shortcut."),
    (r"\.emb\.", ".time_emb_proj."),
    (r"^time\.0", "time_embedding.linear_1"),
    (r"^time\.2", "time_embedding.linear_2"),
    (r"^norm_out", "conv_norm_out"),
    (r"\.norm\.", ".group_norm."),
    (r"\.out\.", ".to_out.0."),
]
FIXED = dict(  # key: (what UNet computes, diffusers' default where a file leaves the key out)
    norm_eps=(1e-6, 1e-5),
    downsample_padding=(0, 1),
    flip_sin_to_cos=(False, True),
    freq_shift=(1, 0),
    attention_head_dim=(None, 8),
    norm_num_groups=(32, 32),
    mid_block_scale_factor=(1, 1),
    act_fn=("silu", "silu"),
    center_input_sample=(False, False),
    resnet_time_scale_shift=("default", "default"),
    time_embedding_type=("positional", "positional"),
    attn_norm_num_groups=(None, None),
)
SCHEDULER = dict(  # of losses.NoiseSchedule, and of samplers.ddpm_sample's defaults
    _class_name="DDPMScheduler",
    num_train_timesteps=1000,
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    variance_type="fixed_large",
    clip_sample=True,
    prediction_type="epsilon",
)
PIPELINE = dict(
    _class_name="DDPMPipeline",
    scheduler=["diffusers", "DDPMScheduler"],
    unet=["diffusers", "UNet2DModel"],
)


def fitted(cls, ckpt, part, name):
    """cls(**ckpt["config"]) with the weights ckpt[part].

    Raises ValueError, in one line that begins with `name`, for a config that makes no network, for
    weights that do not fit it or are not finite; nothing large is allocated before.
    """
    state = ckpt.get(part)
    config = ckpt.get("config")
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise ValueError(f"{name}: lacks its config or its weights ({part})")
    try:
        for value in config.values():
            if not plausible(value):
                raise ValueError(f"config holds {value!r}")
        with torch.device("meta"):
            refuse_other_shapes(cls(**config).state_dict(), state)
    except (ValueError, TypeError, ArithmeticError, LookupError, RuntimeError) as e:
        why = f"its weights do not fit its config, so it is of another architecture ({reason(e)})"
        raise ValueError(f"{name}: {why}") from None
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{name}: {key} is not finite; did training diverge?")
    net = cls(**config)
    net.load_state_dict(state)
    return net


def plausible(value):
    """Whether a config may hold it: no loop over it is long."""
    if isinstance(value, (list, tuple)):
        return len(value) <= 16 and all(plausible(v) for v in value)
    return isinstance(value, (int, float)) and abs(value) <= 10_000


def refuse_other_shapes(wanted, state, what=""):
    """Raises ValueError where a tensor is missing, left over, or of another shape or dtype."""

    def kinds(tensors):
        return {
            (key, getattr(x, "shape", None), getattr(x, "dtype", None))
            for key, x in tensors.items()
        }

    different = sorted({str(key) for key, _, _ in kinds(wanted) ^ kinds(state)})
    if different:
        raise ValueError(f"{what}{len(different)} tensors differ, such as {different[0]}")


def renamed(key, names):
    for old, new in names:
        key = re.sub(old, new, key)
    return key


def from_diffusers(state):
    """A state dict of UNet2DModel -> (config of a UNet, its state dict)."""
    state = {renamed(key, NAMES): value.float() for key, value in state.items()}
    for key in [key for key in state if key.endswith(".attn_q.weight")]:
        prefix = key[: -len("attn_q.weight")]
        for part in ("weight", "bias"):
            qkv = [state.pop(f"{prefix}attn_{letter}.{part}") for letter in "qkv"]
            if part == "weight":  # the oldest files store these as 1x1 convolutions
                qkv = [w.flatten(1) for w in qkv]
            state[f"{prefix}qkv.{part}"] = torch.cat(qkv)
    levels = 1 + highest(r"down\.(\d+)\.res", state)
    config = dict(
        channels=[state[f"down.{i}.res.0.conv2.bias"].shape[0] for i in range(levels)],
        attention=[f"down.{i}.attn.0.qkv.weight" in state for i in range(levels)],
        blocks=1 + highest(r"down\.0\.res\.(\d+)", state),
        in_channels=state["conv_in.weight"].shape[1],
    )
    return config, state


def highest(pattern, state):
    found = [re.match(pattern, key) for key in state]
    return max(int(match[1]) for match in found if match)


def read_config(folder):
    """-> the folder with config.json, of a model or of a pipeline around it, and its content."""
    folder = Path(folder)
    if (folder / "unet").is_dir():
        folder = folder / "unet"
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: no config.json, so not a diffusers model folder")
    return folder, read_json(folder / "config.json")


def sample_size(folder):
    """The image size of a UNet2DModel's folder; 32 where the file leaves it out."""
    size = read_config(folder)[1].get("sample_size")
    if isinstance(size, list) and len(size) == 2 and size[0] == size[1]:
        size = size[0]
    return 32 if size is None else size


def read_diffusers(folder):
    """The state dict in a folder of UNet2DModel or DDPMPipeline; ValueError where it is another
    family's.
    """
    folder, config = read_config(folder)
    wrong = []  # silently different arithmetic is worse than a refusal
    for key, (value, default) in FIXED.items():
        found = config.get(key, default)
        if found != value:
            wrong.append(f"{key}={found!r} (need {value!r})")
    if wrong:
        raise ValueError(f"{folder}: not of the ddpm-cifar10-32 family: {', '.join(wrong)}")
    if (folder / "diffusion_pytorch_model.safetensors").is_file():
        return read_safetensors(folder / "diffusion_pytorch_model.safetensors")
    if (folder / "diffusion_pytorch_model.bin").is_file():
        return load_checkpoint(folder / "diffusion_pytorch_model.bin")
    raise ValueError(f"{folder}: no diffusion_pytorch_model.safetensors or .bin")


def read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise ValueError(f"{path}: reading it takes `pip install safetensors`") from None
    try:
        return load_file(path)
    except Exception as e:  # safetensors' own error derives from Exception alone
        raise ValueError(f"{path}: truncated or not a safetensors file ({reason(e)})") from None


def to_diffusers(state):
    """The state dict of a UNet -> that of a UNet2DModel."""
    theirs = {}
    for key, value in state.items():
        if ".qkv." not in key:
            theirs[renamed(key, BACK)] = value.contiguous()
            continue
        for name, part in zip(("to_q", "to_k", "to_v"), value.chunk(3)):
            theirs[renamed(key.replace("qkv", name), BACK)] = part.contiguous()
    return theirs


def unet2d_config(config, image_size):
    """That of a UNet2DModel for the config of a UNet."""
    attention = config["attention"]
    return {key: value for key, (value, _) in FIXED.items()} | dict(
        _class_name="UNet2DModel",
        sample_size=image_size,
        in_channels=config["in_channels"],
        out_channels=config["in_channels"],
        block_out_channels=config["channels"],
        layers_per_block=config["blocks"],
        down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
        up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in attention[::-1]],
        norm_num_groups=config["groups"],
        dropout=config["dropout"],
    )


def write_diffusers(state, config, folder, image_size):
    """FOLDER/model_index.json, unet/ and scheduler/, which DDPMPipeline.from_pretrained opens."""
    if config["patch"] > 1:
        raise ValueError(
            f"{folder}: a network on {config['patch']}x{config['patch']} patches, as --model mini, "
            "has no form in diffusers; train tiny, ddpm or ddpm64"
        )
    folder = Path(folder)
    write_json(folder / "model_index.json", PIPELINE)
    write_json(folder / "scheduler" / "scheduler_config.json", SCHEDULER)
    write_json(folder / "unet" / "config.json", unet2d_config(config, image_size))
    path = folder / "unet" / "diffusion_pytorch_model.bin"
    tmp = path.with_suffix(".tmp")
    torch.save(to_diffusers(state), tmp)
    os.replace(tmp, path)
    path.with_suffix(".safetensors").unlink(missing_ok=True)  # readers would prefer it


def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
