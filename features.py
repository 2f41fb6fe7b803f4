"""Features of images for a search: DINOv2's, or the pixels themselves.

Modules as metrics.extract wants them: uint8 (B, 3, S, S) -> features (B, d), logits (B, 0).
"""

import numpy as np
import torch
import torch.nn.functional as F

from outputs import reason
from runtime import load_checkpoint


class DINOv2(torch.nn.Module):
    """CLS token of DINOv2's ViT-B/14, d = 768.

    Images are brought to 224 px: bicubic, antialiased, clipped to [0, 1] (ours); no autocast.
    hub: a local clone of github.com/facebookresearch/dinov2, else torch.hub downloads it; weights:
    a local copy of dinov2_vitb14_pretrain.pth, likewise. Raises ValueError where neither is there.
    """

    def __init__(self, hub=None, weights=None):
        super().__init__()
        state = load_checkpoint(weights) if weights else None
        repository = hub or "facebookresearch/dinov2"
        where = dict(source="local" if hub else "github", pretrained=state is None, verbose=False)
        try:
            self.vit = torch.hub.load(repository, "dinov2_vitb14", **where)
            missing = []
            if state is not None:
                missing = self.vit.load_state_dict(state, strict=False).missing_keys
            if missing:
                raise KeyError(f"{weights} lacks {missing[0]}")
        except Exception as e:  # no network, no hubconf.py, or weights of another network
            raise ValueError(
                f"DINOv2 could not be loaded ({reason(e)}); give --dino-hub FOLDER, a clone of "
                "github.com/facebookresearch/dinov2, and --dino-weights PATH to "
                "dinov2_vitb14_pretrain.pth, or --features pixels"
            ) from None
        mean = torch.tensor([0.485, 0.456, 0.406])  # of ImageNet
        std = torch.tensor([0.229, 0.224, 0.225])
        self.register_buffer("mean", mean.view(3, 1, 1))
        self.register_buffer("std", std.view(3, 1, 1))
        self.eval()

    @torch.no_grad()
    def forward(self, x):
        size = dict(size=(224, 224), mode="bicubic", antialias=True, align_corners=False)
        x = F.interpolate(x.float() / 255, **size).clamp(0, 1)
        f = self.vit((x - self.mean) / self.std)
        return f, f[:, :0]


class Pixels(torch.nn.Module):
    """Pixels minus the mean training image, without which all images have a cosine near 1."""

    def __init__(self, images, flips):
        super().__init__()
        total = np.sum(images, axis=0, dtype=np.int64)
        mean = torch.from_numpy(total / (255 * len(images))).permute(2, 0, 1)
        if flips:  # the mirror images are searched too
            mean = (mean + mean.flip(2)) / 2
        self.register_buffer("mean", mean.float())

    def forward(self, x):
        f = (x.float() / 255 - self.mean).flatten(1)
        return f, f[:, :0]
