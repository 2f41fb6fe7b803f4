"""The U-Net against diffusers' UNet2DModel, its files and its failure modes."""

import copy
import errno
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli import call

import outputs
import sample
from losses import NoiseSchedule, acting_rows, robust_loss
from runtime import load_checkpoint, save_checkpoint
from unet import PRESETS, Attention, Dropout, UNet

CONFIG = dict(
    sample_size=32,
    in_channels=3,
    out_channels=3,
    layers_per_block=2,
    block_out_channels=(128, 256, 256, 256),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=None,
    downsample_padding=0,
    norm_eps=1e-6,
    flip_sin_to_cos=False,
    freq_shift=1,
)  # google/ddpm-cifar10-32
SMALL = dict(
    CONFIG,
    layers_per_block=1,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)


def reference(**config):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**config).eval()


def inputs(n=2, size=32):
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=g), torch.tensor([7, 993])[:n]


def random_net(seed=0, **config):
    """A network whose zero-initialised layers are not zero."""
    torch.manual_seed(seed)
    net = UNet(**(config or PRESETS["tiny"])).eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return net


def one_line(error, *names):
    text = str(error.value)
    return "\n" not in text and all(str(name) in text for name in names)


@torch.no_grad()
def agree(net, ref, size=32, atol=1e-5):
    x, t = inputs(size=size)
    expected = ref(x, t).sample
    assert expected.std() > 0.1  # not a network that returns nothing
    return (net(x, t) - expected).abs().max() < atol


# diffusers ----------------------------------------------------------------------------------------


def test_parity_with_diffusers():
    """google/ddpm-cifar10-32's graph."""
    ref = reference(**CONFIG)
    net = UNet.from_diffusers(ref.state_dict())
    assert not net.training and agree(net, ref)
    assert (
        sum(p.numel() for p in net.parameters())
        == sum(p.numel() for p in ref.parameters())
        == 35_746_307
    )


@pytest.mark.parametrize("safe", [True, False])
def test_from_diffusers_folder(safe, tmp_path):
    """.safetensors or .bin, the model itself or a pipeline's folder around it."""
    ref = reference(**SMALL)
    ref.save_pretrained(tmp_path / "unet", safe_serialization=safe)
    assert agree(UNet.from_diffusers(tmp_path / "unet"), ref, size=16)
    assert agree(UNet.from_diffusers(str(tmp_path)), ref, size=16)


@pytest.mark.parametrize("attention", [(False, True, False), (True, False, True)])
def test_to_diffusers_folder(attention, tmp_path):
    """The pipeline opens it and samples; its network is ours, and reading it back gives our
    weights."""
    diffusers = pytest.importorskip("diffusers")
    net = random_net(channels=(32, 32, 64), attention=attention, blocks=2)
    net.to_diffusers(tmp_path, image_size=16)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert agree(net, pipeline.unet.eval(), size=16)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    betas = pipeline.scheduler.betas.double()
    torch.testing.assert_close(betas, NoiseSchedule().betas, rtol=1e-5, atol=1e-8)
    again = UNet.from_diffusers(tmp_path)
    for name, value in net.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_sample_export(tmp_path):
    net = random_net(channels=(32, 32), attention=(False, True), blocks=1)
    ckpt = dict(kind="unet", config=net.config, image_size=8, args={}, ema=net.state_dict())
    save_checkpoint(tmp_path / "ckpt.pt", ckpt)
    assert not call(sample, "--ckpt", tmp_path / "ckpt.pt", "--export", tmp_path / "out")
    assert json.loads((tmp_path / "out/unet/config.json").read_text())["sample_size"] == 8
    x, t = inputs(size=8)
    assert torch.equal(UNet.from_diffusers(tmp_path / "out")(x, t), net(x, t))


def test_no_export_of_a_network_on_patches(tmp_path):
    with pytest.raises(ValueError, match="2x2 patches") as error:
        UNet(**PRESETS["mini"]).to_diffusers(tmp_path)
    assert one_line(error)


def test_ddpm_preset_is_that_graph():
    with torch.device("meta"):
        net = UNet(**PRESETS["ddpm"])
    assert sum(p.numel() for p in net.parameters()) == 35_746_307


def test_old_attention_names_load():
    """Files of 2022 say query, key, value, proj_attn, and may store them as 1x1 convolutions."""
    ref = reference(**SMALL)
    old = {}
    for key, value in ref.state_dict().items():
        for a, b in (
            ("to_q", "query"),
            ("to_k", "key"),
            ("to_v", "value"),
            ("to_out.0", "proj_attn"),
        ):
            key = key.replace(f".{a}.", f".{b}.")
        old[key] = value
    assert any("query" in key for key in old) and any("proj_attn" in key for key in old)
    assert agree(UNet.from_diffusers(old), ref, size=16)
    for key in old:
        if key.endswith(("query.weight", "key.weight", "value.weight")):
            old[key] = old[key][:, :, None, None]
    assert agree(UNet.from_diffusers(old), ref, size=16)


@pytest.mark.parametrize(
    "change",
    [
        dict(norm_eps=1e-5),
        dict(attention_head_dim=8),
        dict(downsample_padding=1),
        dict(flip_sin_to_cos=True),
        dict(freq_shift=0),
        dict(act_fn="gelu"),
        dict(resnet_time_scale_shift="scale_shift"),
        dict(out_channels=6),
        dict(add_attention=False),
        dict(up_block_types=("UpBlock2D", "UpBlock2D")),
    ],
    ids=lambda change: next(iter(change)),
)
def test_refuses_another_config(change, tmp_path):
    """Other arithmetic under the same names must not load silently."""
    reference(**dict(SMALL, **change)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ddpm-cifar10-32 family") as error:
        UNet.from_diffusers(tmp_path)
    assert one_line(error)


def test_refuses_a_config_that_leaves_a_default_of_diffusers(tmp_path):
    """diffusers fills in norm_eps = 1e-5 where the file is silent."""
    reference(**SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="norm_eps"):
        UNet.from_diffusers(tmp_path)


def test_refuses_what_is_no_diffusers_folder(tmp_path):
    with pytest.raises(ValueError, match="config.json"):
        UNet.from_diffusers(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError) as error:
        UNet.from_diffusers(tmp_path)
    assert one_line(error, tmp_path)
    with pytest.raises(ValueError, match="family"):
        UNet.from_diffusers({"weight": torch.zeros(3)})


# the network --------------------------------------------------------------------------------------


def test_dropout_by_keys():
    """The share p is dropped, the rest enlarged; other rows, layers and keys drop others, as
    independent draws would."""
    x, keys = torch.ones(2000, 4, 3, 3), torch.arange(2000) * 7 + 123456789
    layers = [Dropout(0.3), Dropout(0.3)]
    layers[1].layer = 1
    masks = [layer(x, keys) for layer in layers] + [layers[0](x, keys + 2000 * 7)]
    assert set(masks[0].unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    dropped = [(m == 0).double() for m in masks]
    for d in dropped:
        assert abs(d.mean() - 0.3) < 4 * (0.21 / d.numel()) ** 0.5
        for axis in ((1, 2, 3), (0, 2, 3)):  # of a row, of a channel
            spread = d.mean(axis).std() / (0.21 / (d.numel() / len(d.mean(axis)))) ** 0.5
            assert 0.4 < spread < 1.9 if len(d.mean(axis)) < 10 else abs(spread - 1) < 0.1
    pairs = [
        (dropped[0], dropped[1]),
        (dropped[0], dropped[2]),
        (dropped[0][1:], dropped[0][:-1]),
        (dropped[0][..., 1:], dropped[0][..., :-1]),
    ]
    for a, b in pairs:
        assert abs((a * b).mean() - 0.09) < 5 * (0.09 * 0.91 / a.numel()) ** 0.5
    assert torch.equal(layers[0](x, keys), masks[0])
    assert torch.equal(layers[0].eval()(x, keys), x)


def test_one_dropout_mask_for_all_forwards_of_a_step():
    """With mask_keys the net is a function: over B rows, over the first of them, and over both at
    once ("ran")."""
    net = random_net(**dict(PRESETS["tiny"], dropout=0.3)).train()
    x = torch.randn(6, 3, 8, 8)
    t = torch.arange(6) * 150
    with torch.no_grad():
        assert not torch.allclose(net(x, t), net(x, t), atol=1e-3)
        net.mask_keys = torch.arange(6) + 5
        y = net(x, t)
        torch.testing.assert_close(net(x, t), y, rtol=0, atol=0)
        torch.testing.assert_close(net(x[:2], t[:2]), y[:2], rtol=1e-4, atol=1e-5)
        both = net(torch.cat([x, x[:2]]), torch.cat([t, t[:2]]))
        torch.testing.assert_close(both, torch.cat([y, y[:2]]), rtol=1e-4, atol=1e-5)
        net.mask_keys = torch.arange(6) + 99
        assert not torch.allclose(net(x, t), y, atol=1e-3)


def test_eq10_compares_two_forwards_with_one_mask():
    """With delta = 0 the second term is 0, although its rows are not the first of the batch in t's
    order: batches put them there, where the keys of both forwards agree."""
    net = random_net(**dict(PRESETS["tiny"], dropout=0.3)).train()
    net.mask_keys = torch.arange(8) + 5
    x0 = torch.randn(8, 3, 8, 8)
    drawn = torch.tensor([900, 50, 700, 3, 20, 300, 99, 400])

    def term(t):
        own = dict(beta=torch.ones(8), u=torch.zeros_like(x0), share=0.5, t_min=5, t_max=100)
        loss = robust_loss(net, NoiseSchedule(), x0, t, x0.flip(0), "ran", gamma=1e-9, **own)
        return loss[1]["L_reg"].item()

    first = drawn[acting_rows(drawn, 5, 100)]
    assert first.tolist() == [50, 20, 99, 900, 700, 3, 300, 400]
    assert term(first) < 1e-8 < 1e-3 < term(drawn)


def test_starts_at_zero():
    """DDPM's initialisation: a new network predicts 0."""
    x, t = inputs(size=16)
    assert UNet(**PRESETS["tiny"])(x, t).abs().max() == 0


def test_sees_x_and_t():
    net, (x, t) = random_net(), inputs(size=16)
    with torch.no_grad():
        y = net(x, t)
        assert (net(x, t + 3) - y).abs().max() > 1e-3
        assert (net(x.flip(3), t) - y).abs().max() > 1e-3
        torch.testing.assert_close(
            net(x[:1], t[:1]), y[:1], rtol=0, atol=1e-5
        )  # a row depends on its own inputs


@torch.no_grad()
def test_t_may_be_real():
    """A whole number is the same t as a real number; a t a little larger is another one."""
    net = random_net()
    x, t = inputs(size=8)
    assert net.real_t and torch.compile(net).real_t
    assert torch.equal(net(x, t.float()), net(x, t))
    step = (net(x, t + 1) - net(x, t)).abs().max()
    assert 0 < (net(x, t + 0.1) - net(x, t)).abs().max() < 0.3 * step


def test_channels_last_is_the_same():
    net, (x, t) = random_net(), inputs(size=16)
    with torch.no_grad():
        expected = net(x, t)
        net = net.to(memory_format=torch.channels_last)
        torch.testing.assert_close(
            net(x.to(memory_format=torch.channels_last), t), expected, rtol=0, atol=1e-5
        )


def test_bf16_attention_is_the_same():
    """The CPU's own formula for bf16 against PyTorch's attention in float64; scores of about +-2
    make the scale matter."""
    torch.manual_seed(0)
    attn, x = Attention(64, 8), torch.randn(2, 64, 6, 6)
    torch.nn.init.normal_(attn.out.weight, std=0.2)
    attn.qkv.weight.data[:128] *= 1.5
    expected = copy.deepcopy(attn).double()(x.double()) - x
    with torch.autocast("cpu", torch.bfloat16):
        got = attn(x) - x
    assert (got - expected).abs().mean() < 0.015 * expected.abs().mean()


def test_float64_input_and_network():
    net, (x, t) = random_net(), inputs(size=16)
    with torch.no_grad():
        expected = net(x, t)
        y = net.double()(x.double(), t)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=1e-4)


def test_compiles_without_a_break():
    net, (x, t) = random_net(), inputs(size=16)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t), net(x, t), rtol=0, atol=1e-5)


def test_no_gradient_is_given_twice():
    """A compiled backward merges equal results, and Inductor returns slices of them in the same
    memory: clipping in place would scale the gradients twice."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    given = []

    def backward(graph, inputs):
        given.extend(node for node in graph.graph.output_node().args[0] if node is not None)
        return graph.forward

    net, (x, t) = (
        random_net(channels=(32, 32), attention=(False, True), blocks=1, dropout=0.0),
        inputs(size=8),
    )
    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: graph.forward,
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
    )
    torch.compile(net, backend=backend)(x, t).square().mean().backward()
    assert len(given) == len(set(given)) == len(list(net.parameters()))


def test_cast_is_what_autocast_does():
    net, (x, t) = random_net(), inputs(size=16)
    cast = copy.deepcopy(net).cast(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cast(x, t), net(x, t))
    for name, p in cast.named_parameters():
        assert p.dtype == (torch.float32 if "norm" in name else torch.bfloat16), name
    assert all(
        torch.equal(p, q)
        for p, q in zip(net.parameters(), copy.deepcopy(net).cast(torch.float32).parameters())
    )


def test_size_must_halve():
    net = UNet(**PRESETS["tiny"])  # three resolutions
    for shape in ((18, 16), (16, 15)):
        with pytest.raises(ValueError, match=f"{shape[0]}x{shape[1]}.*4"):
            net(torch.zeros(1, 3, *shape), torch.zeros(1, dtype=torch.long))


# checkpoints --------------------------------------------------------------------------------------


def tiny_checkpoint():
    nets = [
        random_net(seed, channels=[32, 32], attention=[False, True], blocks=1, dropout=0.2)
        for seed in (0, 1)
    ]
    return dict(
        kind="unet", config=nets[0].config, model=nets[0].state_dict(), ema=nets[1].state_dict()
    ), nets


def test_load_round_trip(tmp_path):
    """EMA by default, in eval mode, from the path or the dict."""
    ckpt, (raw, ema) = tiny_checkpoint()
    save_checkpoint(tmp_path / "a.pt", ckpt)
    x, t = inputs(size=16)
    for source in (tmp_path / "a.pt", str(tmp_path / "a.pt"), ckpt):
        net = UNet.load(source)
        assert not net.training and net.config == ema.config
        assert torch.equal(net(x, t), ema(x, t))
        assert torch.equal(UNet.load(source, ema=False)(x, t), raw(x, t))
    assert not torch.equal(raw(x, t), ema(x, t))


def test_load_refuses_another_network(tmp_path):
    save_checkpoint(tmp_path / "a.pt", dict(kind="mlp", config={}, model={}, ema={}))
    with pytest.raises(ValueError) as error:
        UNet.load(tmp_path / "a.pt")
    assert one_line(error, tmp_path / "a.pt")


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed\nat x.cpp")],
)
def test_failed_save_leaves_the_previous_file(failure, tmp_path, monkeypatch):
    path = tmp_path / "a.pt"
    save_checkpoint(path, dict(step=1))
    before = path.read_bytes()

    def full_disk(ckpt, f, *args, **kwargs):
        f.write(b"half a checkpoint")
        raise failure

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(outputs.Failed) as error:
        save_checkpoint(path, dict(step=2))
    assert one_line(error, path)
    assert path.read_bytes() == before
    assert [f.name for f in tmp_path.iterdir()] == ["a.pt"]  # and no half file is left

    monkeypatch.undo()
    save_checkpoint(path, dict(step=2))
    assert load_checkpoint(path) == dict(step=2)


class Evil:
    """Executes code when unpickled without care."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_a_checkpoint_is_refused(tmp_path):
    marker = tmp_path / "executed"
    torch.save(dict(step=1, model=Evil(marker)), tmp_path / "zip.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(dict(step=1, model=Evil(marker)), protocol=2))
    for name in ("zip.pt", "pickle.pt"):
        with pytest.raises(ValueError, match="refused") as error:
            load_checkpoint(tmp_path / name)
        assert one_line(error, tmp_path / name)
        assert not marker.exists()
    # on purpose: what load_checkpoint refused would have run code
    torch.load(tmp_path / "zip.pt", weights_only=False)
    assert marker.exists()


def test_broken_files(tmp_path):
    path = tmp_path / "a.pt"
    save_checkpoint(path, tiny_checkpoint()[0])
    whole = path.read_bytes()
    broken = [whole[:n] for n in (0, 1, 10, 1000, len(whole) // 2, len(whole) - 1)]
    for content in [*broken, b"<html>not found</html>", bytes(range(256)) * 8]:
        path.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_checkpoint(path)
        assert one_line(error, path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="list"):
        load_checkpoint(path)
    with pytest.raises(ValueError, match="no such"):
        load_checkpoint(tmp_path / "b.pt")


def test_patch_is_the_network_on_reordered_pixels():
    """UNet(patch=2) is the same network, applied to 2x2 pixels as channels."""
    config = dict(channels=(32, 32), attention=(False, True), blocks=1, dropout=0.0)
    net, inner = (
        UNet(**config, patch=2).double().eval(),
        UNet(**config, in_channels=12).double().eval(),
    )
    torch.nn.init.normal_(net.conv_out.weight, std=0.1)
    inner.load_state_dict(net.state_dict())
    x, t = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([3, 900])
    want = F.pixel_shuffle(inner(F.pixel_unshuffle(x, 2), t), 2)
    assert want.std() > 0.01 and torch.equal(net(x, t), want)
    with pytest.raises(ValueError, match="divide by 4"):
        net(x[..., :6], t)


def test_a_folder_of_diffusers_is_sampled_at_its_size(tmp_path):
    net = random_net(channels=(32, 32), attention=(False, True), blocks=1)
    net.to_diffusers(tmp_path / "a", image_size=16)
    small = ["--n", 1, "--steps", 1, "--device", "cpu", "--no-png"]
    assert call(sample, "--ckpt", tmp_path / "a", *small, "--out", tmp_path / "s") == 0
    assert np.load(tmp_path / "s/samples.npz")["images"].shape == (1, 16, 16, 3)
    stale = tmp_path / "a/unet/diffusion_pytorch_model.safetensors"
    stale.write_bytes(b"of an earlier export")
    net.to_diffusers(tmp_path / "a", image_size=16)
    assert not stale.exists()
