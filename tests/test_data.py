"""Random numbers that belong to an image, the corruption, the order of the images, and loading."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

from data import CORRUPTIONS, Batches, CorruptedImages, Order, load_images, synthetic_butterflies
from rng import image_noise, philox

ALL_ONES = 0xFFFFFFFF


def pixels(n=1000, size=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


def one_line(error, *names):
    text = str(error.value)
    return "\n" not in text and all(str(name) in text for name in names)


# random numbers -----------------------------------------------------------------------------------


def philox_plain(counter, key):
    """Philox4x32-10 in Python's integers, as Salmon et al. define it."""
    a, b, c, d = counter
    for i in range(10):
        p, q = 0xD2511F53 * a, 0xCD9E8D57 * c
        k0, k1 = (key[0] + i * 0x9E3779B9) % 2**32, (key[1] + i * 0xBB67AE85) % 2**32
        a, b, c, d = (q >> 32) ^ b ^ k0, q % 2**32, (p >> 32) ^ d ^ k1, p % 2**32
    return [a, b, c, d]


def test_philox_known_answers():
    """Random123's kat_vectors for philox4x32 10: directly where the counter starts at 0, else
    through philox_plain."""
    zero = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(0, torch.tensor([0]), 0, 1)[0, 0].tolist() == zero
    assert philox_plain([0] * 4, [0] * 2) == zero
    assert philox_plain([ALL_ONES] * 4, [ALL_ONES] * 2) == [
        0x408F276D,
        0x41C83B0E,
        0xA20BC7C6,
        0x6D5451FD,
    ]
    assert philox_plain(
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]
    ) == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]

    index = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**62 + 12345])
    for seed, stream in ((0, 0), (1, 2), (2**63 + 2**31 + 7, ALL_ONES), (2**64 - 1, 2**31)):
        bits = philox(seed, index, stream, 3)
        assert bits.shape == (5, 3, 4) and bits.dtype == torch.int64
        for row, i in zip(bits.tolist(), index.tolist()):
            assert row == [
                philox_plain([block, stream, i % 2**32, i >> 32], [seed % 2**32, seed >> 32])
                for block in range(3)
            ]


def test_image_noise_is_standard_normal():
    z = image_noise(3, torch.arange(2000), 0, (3, 8, 8))
    assert z.shape == (2000, 3, 8, 8) and z.dtype == torch.float32
    assert stats.kstest(z.flatten().double().numpy(), "norm").pvalue > 1e-3
    np.testing.assert_allclose(stats.kurtosis(z.flatten().double().numpy()), 0, atol=0.05)
    assert z.mean((1, 2, 3)).std().item() == pytest.approx(192**-0.5, rel=0.1)  # no row leans


def test_image_noise_is_independent():
    """No correlation of values or of squares, between elements of a row, rows, streams or seeds."""
    z = image_noise(3, torch.arange(1000), 0, (100,)).double()
    others = [z.roll(k, 1) for k in (1, 2, 50)] + [
        z.roll(1, 0),
        image_noise(3, torch.arange(1000), 1, (100,)),
        image_noise(4, torch.arange(1000), 0, (100,)),
    ]
    for other in others:
        for a, b in ((z, other), (z.square(), other.square())):
            assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 5 / 100_000**0.5


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 5, 5), (1,)])
def test_image_noise_belongs_to_the_image(shape):
    """Row i depends on (seed, index[i], stream) alone, whatever stands beside it."""
    index = torch.arange(40)
    whole = image_noise(0, index, 7, shape)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(image_noise(0, order, 7, shape), whole[order])
    for n in (1, 3, 16):
        assert torch.equal(
            torch.cat([image_noise(0, part, 7, shape) for part in index.split(n)]), whole
        )
    assert len(whole.flatten(1).unique(dim=0)) == 40


# corruption ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.25, 0.9, 0.9996, 1.0])
def test_share_of_corrupted_images(p):
    data = CorruptedImages(pixels(), p=p, sigma=0.2)
    index = torch.arange(1000)
    changed = (data.batch(index) != data.clean(index)).flatten(1)
    assert changed.any(1).sum() == round(1000 * p) == data.corrupted.sum()
    assert torch.equal(changed.any(1), data.corrupted)


def test_clean_images_are_the_pixels():
    images = pixels(20)
    images[0], images[1] = 0, 255
    data = CorruptedImages(images, p=0.0, sigma=0.5)
    x = data.batch(torch.arange(20))
    assert (
        x.shape == (20, 3, 8, 8)
        and x.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
    )
    assert (x[0] == -1).all() and (x[1] == 1).all()
    np.testing.assert_allclose(x.permute(0, 2, 3, 1), images / 127.5 - 1, atol=1e-6)
    assert torch.equal(CorruptedImages(images, p=1.0, sigma=0.0).batch(torch.arange(20)), x)


@pytest.mark.parametrize("sigma", [0.1, 0.2])
def test_corruption_is_gaussian_of_sigma(sigma):
    index = torch.arange(1000)
    data = CorruptedImages(pixels(), p=0.9, sigma=sigma)
    z = (data.batch(index) - data.clean(index))[data.corrupted].double().numpy().ravel()
    assert z.std() == pytest.approx(sigma, rel=0.01) and abs(z.mean()) < 0.01 * sigma
    assert stats.kstest(z / sigma, "norm").pvalue > 1e-3


def test_corruption_is_not_clipped():
    x = CorruptedImages(np.full((100, 8, 8, 3), 255, np.uint8), p=1.0, sigma=0.2).batch(
        torch.arange(100)
    )
    assert (x > 1).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_corruption_is_fixed_per_image():
    """Never redrawn; the same in any order, split or second object; another seed changes images and
    noise."""
    images, index = pixels(200), torch.randperm(200, generator=torch.Generator().manual_seed(0))
    data = CorruptedImages(images, p=0.9, sigma=0.2, seed=4)
    whole = data.batch(torch.arange(200))
    assert torch.equal(data.batch(index), whole[index])
    assert torch.equal(torch.cat([data.batch(part) for part in index.split(7)]), whole[index])
    assert torch.equal(
        CorruptedImages(images, p=0.9, sigma=0.2, seed=4).batch(torch.arange(200)), whole
    )
    other = CorruptedImages(images, p=0.9, sigma=0.2, seed=5)
    assert not torch.equal(other.corrupted, data.corrupted)
    both = data.corrupted & other.corrupted
    assert (other.batch(torch.arange(200)) != whole)[both].flatten(1).float().mean(1).min() > 0.9


def test_flip_mirrors_the_corrupted_image():
    data, index = CorruptedImages(pixels(50), p=0.9, sigma=0.2), torch.arange(50)
    flip = torch.arange(50) % 3 == 0
    plain, x = data.batch(index), data.batch(index, flip)
    assert torch.equal(x[flip], plain[flip].flip(3)) and torch.equal(x[~flip], plain[~flip])


def test_streaming_is_resident(tmp_path):
    """A memory map that exceeds the budget yields the same batches as the array."""
    np.save(tmp_path / "a.npy", pixels(100))
    mapped, index = np.load(tmp_path / "a.npy", mmap_mode="r"), torch.arange(99, -1, -3)
    streamed, resident = (
        CorruptedImages(mapped, p=0.9, sigma=0.2, budget=budget) for budget in (0, None)
    )
    assert streamed.streams and not resident.streams
    assert isinstance(streamed.images, np.memmap) and isinstance(resident.images, torch.Tensor)
    assert len(streamed) == len(resident) == 100 and streamed.shape == resident.shape == (3, 8, 8)
    assert torch.equal(streamed.batch(index, index % 2 == 0), resident.batch(index, index % 2 == 0))


def test_corruption_refuses_nonsense():
    for bad in (
        dict(p=-0.1),
        dict(p=1.1),
        dict(sigma=-1.0),
        dict(sigma=float("nan")),
        dict(p=float("nan")),
    ):
        with pytest.raises(ValueError) as error:
            CorruptedImages(pixels(4), **bad)
        assert one_line(error, "--" + next(iter(bad)))


# order --------------------------------------------------------------------------------------------


def test_order_is_a_permutation_per_epoch():
    order = Order(11, seed=0)
    epochs = order(0, 44).view(4, 11)
    assert torch.equal(epochs.sort(dim=1).values, torch.arange(11).expand(4, 11))
    assert len(epochs.unique(dim=0)) == 4
    assert not torch.equal(order(0, 44), Order(11, seed=1)(0, 44))


def test_order_depends_on_the_position_alone():
    """Any chunking, and any jump forth or back, as after a resume."""
    whole = Order(11, seed=3)(0, 60)
    for chunk in (1, 7, 11, 25, 60):
        order = Order(11, seed=3)
        assert torch.equal(
            torch.cat([order(i, min(chunk, 60 - i)) for i in range(0, 60, chunk)]), whole
        )
    for first in (50, 3, 22, 0, 59):
        assert torch.equal(order(first, 1), whole[first : first + 1])
    assert torch.equal(Order(11, seed=3)(13, 30), whole[13:43])


# synthetic butterflies ----------------------------------------------------------------------------


def test_synthetic_is_a_function_of_seed_and_index():
    images, labels = synthetic_butterflies(600, 16)
    assert images.shape == (600, 16, 16, 3) and images.dtype == np.uint8
    assert np.array_equal(images, synthetic_butterflies(600, 16)[0])
    few, few_labels = synthetic_butterflies(5, 16)
    assert np.array_equal(few, images[:5]) and np.array_equal(few_labels, labels[:5])
    assert len(np.unique(images.reshape(600, -1), axis=0)) == 600
    assert set(labels) == set(range(10))
    assert not np.array_equal(images, synthetic_butterflies(600, 16, seed=1)[0])


def test_synthetic_is_white_around_something_dark():
    images, _ = synthetic_butterflies(600, 32)
    assert (images[:, [0, 0, -1, -1], [0, -1, 0, -1]] > 240).all()
    assert (images.min((1, 2, 3)) < 60).all()


def test_synthetic_is_bilaterally_symmetric():
    for size in (16, 32):
        images, _ = synthetic_butterflies(600, size)
        assert np.array_equal(images, images[:, :, ::-1])


def test_load_synthetic(tmp_path):
    images, labels = load_images("synthetic:7", root=tmp_path)
    assert images.shape == (7, 32, 32, 3) and len(labels) == 7
    assert load_images("synthetic:7", image_size=16, root=tmp_path)[0].shape == (7, 16, 16, 3)
    assert not np.array_equal(load_images("synthetic:7", split="test", root=tmp_path)[0], images)


# folders ------------------------------------------------------------------------------------------


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path)


def plain(colour, width=8, height=8):
    return np.broadcast_to(np.uint8(colour), (height, width, 3))


def load(folder, **kwargs):
    return load_images(f"folder:{folder}", root=folder.parent / "root", **kwargs)


def test_folder_of_classes(tmp_path):
    """Sub-folders in alphabetical order are the classes; the pixels come back as they are,
    memory-mapped."""
    first, second = pixels(2)
    write(tmp_path / "set" / "cat" / "a.png", first)
    write(tmp_path / "set" / "ant" / "b.bmp", second)
    write(tmp_path / "set" / "ant" / "c.PNG", pixels(1)[0, :, :, 0])  # grey
    (tmp_path / "set" / "notes.txt").write_text("no image")
    images, labels = load(tmp_path / "set", labels_needed=True)
    assert (
        isinstance(images, np.memmap) and images.dtype == np.uint8 and images.shape == (3, 8, 8, 3)
    )
    assert labels.tolist() == [0, 0, 1]
    assert np.array_equal(images[2], first) and np.array_equal(images[0], second)
    assert np.array_equal(images[1], pixels(1)[0, :, :, :1].repeat(3, axis=2))


def test_folder_without_classes(tmp_path):
    write(tmp_path / "set" / "a.png", plain((1, 2, 3)))
    assert load(tmp_path / "set")[1] is None
    with pytest.raises(ValueError) as error:
        load(tmp_path / "set", labels_needed=True)
    assert one_line(error, tmp_path / "set", "labels")


def test_folder_is_resized_and_cropped(tmp_path):
    """Shorter side to S, then the centre: of three stripes the middle one is left; a checkerboard
    is averaged."""
    red, green, blue = (
        plain((255, 0, 0), 32, 32),
        plain((0, 255, 0), 32, 32),
        plain((0, 0, 255), 32, 32),
    )
    write(tmp_path / "set" / "a.png", np.concatenate([red, green, blue], axis=1))
    write(tmp_path / "set" / "b.png", np.concatenate([red, green, blue], axis=0))
    board = np.indices((64, 64)).sum(0)[..., None] % 2 * np.full(3, 255)
    write(tmp_path / "set" / "c.png", board)
    write(tmp_path / "set" / "d.png", plain((9, 99, 199), 4, 5))  # enlarged
    images, _ = load(tmp_path / "set", image_size=16)
    assert images.shape == (4, 16, 16, 3)
    assert (
        abs(images[:2, 2:-2, 2:-2].astype(int) - [0, 255, 0]) < 8
    ).all()  # the cut lies on the stripes' edges
    assert (abs(images[2, 1:-1, 1:-1].astype(int) - 127.5) < 8).all()
    assert (images[3] == [9, 99, 199]).all()


def test_folder_is_decoded_once(tmp_path, monkeypatch):
    write(tmp_path / "set" / "a" / "1.png", pixels(1)[0])
    write(tmp_path / "set" / "b" / "2.png", pixels(1)[0])
    images, labels = load(tmp_path / "set")
    monkeypatch.setattr(Image, "open", lambda *a, **k: 1 / 0)
    again, again_labels = load(tmp_path / "set")
    assert np.array_equal(images, again) and np.array_equal(labels, again_labels)
    monkeypatch.undo()
    assert load(tmp_path / "set", image_size=4)[0].shape == (
        2,
        4,
        4,
        3,
    )  # another size is another array


def test_changes_refresh_the_cache(tmp_path):
    path = tmp_path / "set" / "a.bmp"
    write(path, plain((10, 10, 10)))
    assert (load(tmp_path / "set")[0] == 10).all()
    write(path, plain((20, 20, 20)))
    os.utime(path, ns=(1, 1))
    assert (load(tmp_path / "set")[0] == 20).all()
    write(tmp_path / "set" / "b.bmp", plain((30, 30, 30)))
    assert len(load(tmp_path / "set")[0]) == 2
    path.unlink()
    assert (load(tmp_path / "set")[0] == 30).all()


def test_two_folders_do_not_share_a_cache(tmp_path):
    """Even with equal names, sizes and times, as archives with a fixed date unpack."""
    for folder, value in (("one", 10), ("two", 20)):
        write(tmp_path / folder / "a.bmp", plain((value,) * 3))
        os.utime(tmp_path / folder / "a.bmp", ns=(1, 1))
    assert (load(tmp_path / "one")[0] == 10).all()
    assert (load(tmp_path / "two")[0] == 20).all()


def test_tiny_imagenet_as_it_is_distributed(tmp_path):
    """Classes in the order of their names; the list of the val images has no order."""
    root = tmp_path / "tiny-imagenet-200"
    with pytest.raises(ValueError, match="holds no train/"):
        load_images("tiny-imagenet", root=tmp_path)
    colours = {"n02": (200, 0, 0), "n01": (0, 200, 0), "n10": (0, 0, 200)}

    def picture(path, colour):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), colour).save(path, quality=95)

    for name, colour in colours.items():
        (root / "train" / name).mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text("0 0 1 1")
        for i in range(2):
            picture(root / f"train/{name}/images/{name}_{i}.JPEG", colour)
    lines = []
    for i, name in enumerate(("n10", "n01")):
        picture(root / f"val/images/val_{1 - i}.JPEG", colours[name])
        lines.append(f"val_{1 - i}.JPEG\t{name}\t0\t0\t62\t62")
    (root / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")
    images, labels = load_images("tiny-imagenet", root=tmp_path)
    assert images.shape == (6, 64, 64, 3) and labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert images.argmax(-1)[:, 5, 5].tolist() == [1, 1, 0, 0, 2, 2]
    images, labels = load_images("tiny-imagenet", 32, "test", tmp_path)
    assert images.shape == (2, 32, 32, 3) and labels.tolist() == [2, 0]
    assert images.argmax(-1)[:, 5, 5].tolist() == [2, 1]
    (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn99\n")
    with pytest.raises(ValueError, match="not the list of the val images"):
        load_images("tiny-imagenet", split="test", root=tmp_path)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError) as error:
        load(tmp_path / "missing")
    assert one_line(error, tmp_path / "missing")

    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError) as error:
        load(tmp_path / "set")
    assert one_line(error, tmp_path / "set")

    write(tmp_path / "set" / "a.png", plain((1, 2, 3)))
    write(tmp_path / "set" / "b.png", plain((1, 2, 3), 9, 8))
    with pytest.raises(ValueError) as error:
        load(tmp_path / "set")
    assert one_line(error, tmp_path / "set" / "b.png", "9x8", "--image-size")

    write(tmp_path / "noise.png", pixels(1)[0])
    half = (tmp_path / "noise.png").read_bytes()[:150]
    for content in (b"", b"not an image", half):
        (tmp_path / "set" / "b.png").write_bytes(content)
        with pytest.raises(ValueError) as error:
            load(tmp_path / "set")
        assert one_line(error, tmp_path / "set" / "b.png")
    assert not list((tmp_path / "root").rglob("*.npy")) and not list(
        (tmp_path / "root").rglob("*.tmp")
    )

    write(tmp_path / "set" / "b.png", plain((4, 5, 6)))
    assert len(load(tmp_path / "set")[0]) == 2  # repaired, it loads


def test_bad_names(tmp_path):
    for name in ("cifar11", "synthetic:0", "synthetic:x", "folder", "folder:", ""):
        with pytest.raises(ValueError) as error:
            load_images(name, root=tmp_path)
        assert one_line(error, f"--data {name}")
    with pytest.raises(ValueError, match="--image-size 3"):
        load_images("synthetic", image_size=3, root=tmp_path)


# other kinds of corruption ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_corruption_of_any_kind_is_fixed_per_image(kind):
    """Exactly round(p N) images, the same in any order or split and when streamed; mirror images
    are of the result."""
    images, index = pixels(90), torch.randperm(90, generator=torch.Generator().manual_seed(0))
    data, again, streamed, other = (
        CorruptedImages(images, p=0.7, sigma=0.5, seed=seed, corrupt=kind, budget=budget)
        for seed, budget in ((4, None), (4, None), (4, 0), (5, None))
    )
    whole = data.batch(torch.arange(90))
    changed = (whole != data.clean(torch.arange(90))).flatten(1).any(1)
    assert changed.sum() == 63 and torch.equal(changed, data.corrupted)
    for same in (data, again, streamed):
        batches = torch.cat([same.batch(part) for part in index.split(7)])
        torch.testing.assert_close(
            batches, whole[index], rtol=0, atol=1e-6 if kind == "blur" else 0
        )
    flip = torch.arange(90) % 3 == 0
    assert torch.equal(
        data.batch(torch.arange(90), flip),
        torch.where(flip.view(-1, 1, 1, 1), whole.flip(3), whole),
    )
    assert whole.is_contiguous(memory_format=torch.channels_last) and whole.dtype == torch.float32
    assert not torch.equal(other.corrupted, data.corrupted)
    both, drawn_per_seed = data.corrupted & other.corrupted, kind not in ("blur", "class")
    assert (other.batch(torch.arange(90)) != whole)[both].any() == drawn_per_seed


def corrupted(kind, sigma, n=1000, size=8):
    """-> clean images, the same images corrupted, both (n, 3, size, size)."""
    data, index = (
        CorruptedImages(pixels(n, size), p=1.0, sigma=sigma, corrupt=kind),
        torch.arange(n),
    )
    return data.clean(index), data.batch(index)


def test_gauss_is_added_noise():
    clean, x = corrupted("gauss", 0.2)
    assert torch.equal(x, clean + 0.2 * image_noise(0, torch.arange(1000), ALL_ONES, (3, 8, 8)))


def test_outliers_are_uniform():
    _, x = corrupted("outliers", 0)
    assert stats.kstest(x.flatten().double().numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-3
    assert len(x.flatten(1).unique(dim=0)) == 1000


def test_salt_pepper():
    """A share sigma of the pixels, half of them black in all channels, half white; the others as
    they were."""
    clean, x = corrupted("salt-pepper", 0.3)
    changed = (x != clean).any(1)
    assert changed.float().mean().item() == pytest.approx(0.3, abs=0.01)
    values = x.permute(0, 2, 3, 1)[changed]  # (n, 3)
    assert (values == values[:, :1]).all() and set(values.unique().tolist()) == {-1, 1}
    assert values.mean().abs() < 0.03


@pytest.mark.parametrize("sigma", [0.4, 1.5, 9.0])
def test_blur_against_scipy(sigma):
    clean, x = corrupted("blur", sigma, n=4, size=16)
    radius = min(np.ceil(3 * sigma), 15)
    expected = ndimage.gaussian_filter(
        clean.double(), (0, 0, sigma, sigma), mode="mirror", truncate=radius / sigma
    )
    np.testing.assert_allclose(x, expected, atol=1e-5)


def test_patch():
    """A 3x3 square of one colour per image; every one of the 6x6 places occurs about as often."""
    clean, x = corrupted("patch", 0.4)
    changed = (x != clean).all(
        1
    )  # (n, 8, 8); a channel of a pixel equals the colour's with probability 0
    assert (changed.flatten(1).sum(1) == 9).all()
    rows, columns = changed.any(2), changed.any(1)
    top, left = rows.int().argmax(1), columns.int().argmax(1)
    assert (rows.sum(1) == 3).all() and (columns.sum(1) == 3).all()
    assert stats.chisquare(np.bincount(6 * top + left, minlength=36)).pvalue > 1e-3
    colours = x.permute(0, 2, 3, 1)[changed].view(1000, 9, 3)
    assert (colours == colours[:, :1]).all()
    assert (
        stats.kstest(colours[:, 0].flatten().double().numpy(), stats.uniform(-1, 2).cdf).pvalue
        > 1e-3
    )


def test_class_is_butterflies():
    _, x = corrupted("class", 0, n=20)
    expected = synthetic_butterflies(20, 8, seed=2)[0] / 127.5 - 1
    np.testing.assert_allclose(x.permute(0, 2, 3, 1), expected, atol=1e-6)


def test_other_corruption_refuses_nonsense():
    for bad in (
        dict(corrupt="fog"),
        dict(sigma=1.5, corrupt="patch"),
        dict(sigma=1.5, corrupt="salt-pepper"),
    ):
        with pytest.raises(ValueError) as error:
            CorruptedImages(pixels(4), p=0.5, **bad)
        assert one_line(error, "--" + next(iter(bad)), bad["corrupt"])


def save_and_load(tmp_path, image, name="a.png", **options):
    """The image as load_images reads it from a folder."""
    folder = tmp_path / "folder"
    folder.mkdir(exist_ok=True)
    image.save(folder / name, **options)
    images, _ = load_images(f"folder:{folder}", root=tmp_path)
    return np.array(images[0])


def test_sixteen_bits_are_scaled(tmp_path):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    grey = save_and_load(tmp_path, Image.fromarray(ramp))
    np.testing.assert_allclose(grey[..., 0], ramp / 257, atol=0.51)
    assert (grey[..., 0] == grey[..., 2]).all()


@pytest.mark.parametrize("top", [1, 255])
def test_floats_are_scaled(top, tmp_path):
    ramp = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
    grey = save_and_load(tmp_path, Image.fromarray(ramp), "a.tif")
    np.testing.assert_allclose(grey[..., 0], ramp * 255 / top, atol=0.51)


def test_floats_beyond_the_scale_are_refused(tmp_path):
    image = Image.fromarray(np.full((8, 8), -3, np.float32))
    with pytest.raises(ValueError, match=r"a.tif: not a readable image \(values -3..-3") as error:
        save_and_load(tmp_path, image, "a.tif")
    assert one_line(error)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode, tmp_path):
    rgba = np.full((8, 8, 4), 40, np.uint8)
    rgba[..., 3] = 255
    rgba[2:5, 2:5, 3] = 0
    image = Image.fromarray(rgba)
    options = {}
    if mode == "P":
        image = Image.fromarray((rgba[..., 3] > 0).astype(np.uint8), mode="P")
        image.putpalette([7, 7, 7, 40, 40, 40] + [0] * 750)
        options = dict(transparency=0)
    if mode == "LA":
        image = image.convert("LA")
    seen = save_and_load(tmp_path, image, **options)
    assert (seen[3, 3] == 255).all() and (seen[0, 0] == 40).all()


def test_an_image_stands_as_its_camera_held_it(tmp_path):
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:2] = 255  # the upper edge, turned to the right by orientation 6
    exif = Image.Exif()
    exif[0x0112] = 6
    seen = save_and_load(tmp_path, Image.fromarray(picture), exif=exif)
    assert (seen[:, -2:] == 255).all() and (seen[:, :-2] == 0).all()


def test_files_left_out_are_counted(tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "b.gif").write_bytes(b"GIF")
    save_and_load(tmp_path, Image.new("RGB", (8, 8)))
    assert "1 other files are left out (.gif)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage", ["truncated", "empty", "shape", "dtype", "zeros", "labels", "no labels"]
)
def test_a_damaged_cache_is_decoded_anew(damage, tmp_path, capsys):
    picture = Image.fromarray(pixels(1)[0])
    first = save_and_load(tmp_path, picture)
    (path,) = (tmp_path / "cache").glob("*.npy")
    labels = path.with_suffix(".labels.npz")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    if damage == "empty":
        path.write_bytes(b"")
    if damage == "shape":
        np.save(path, np.zeros((2, 8, 8, 3), np.uint8))
    if damage == "dtype":
        np.save(path, np.zeros((1, 8, 8, 3), np.float32))
    if damage == "zeros":
        np.save(path, np.zeros((1, 8, 8, 3), np.uint8))
    if damage == "labels":
        np.savez(labels, labels=np.zeros(3, np.int64), check=0)
    if damage == "no labels":
        labels.unlink()
    again, _ = load_images(f"folder:{tmp_path / 'folder'}", root=tmp_path)
    assert np.array_equal(again[0], first)
    assert "damaged, decoded anew" in capsys.readouterr().out


def test_no_dropout_mask_comes_back():
    """The keys of all rows of 100 steps differ; those of consecutive steps were shifted
    by one row."""
    from types import SimpleNamespace

    data = CorruptedImages(pixels(16))
    args = SimpleNamespace(batch_size=8, accum=2, seed=3, dropout=0.1, flip=False, classifier=None)
    args.drop_noisy = False
    args.robust = "none"
    args.reg_from, args.reg_until = 5, 100
    run = SimpleNamespace(data=data, sigma_y=None, device=torch.device("cpu"), rank=0, world=1)

    def numbers(generator, seed, step, T, B, size):
        g = torch.Generator().manual_seed(step)
        return dict(flip=torch.zeros(B, dtype=torch.bool), t=torch.randint(200, (B,), generator=g))

    batches = Batches(args, run, numbers, 1000)
    parts = [part for step in range(100) for part in batches(step)]
    batches.close()
    keys = torch.cat([part["keys"] for part in parts])
    assert len(keys) == 800 and len(keys.unique()) == 800
    for part in parts:  # rows that the regulariser acts on come first
        acts = (part["t"] >= 5) & (part["t"] < 100)
        assert acts[: acts.sum()].all()
    for first, second in zip(parts[::2], parts[1::2]):  # and are spread over the parts
        acts = [((part["t"] >= 5) & (part["t"] < 100)).sum() for part in (first, second)]
        assert 0 <= acts[0] - acts[1] <= 1
