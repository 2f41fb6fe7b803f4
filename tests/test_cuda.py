"""The CUDA path without a GPU: devices on fake tensors, Inductor's kernels compiled by Triton for
sm_80 and sm_90, graphs.

What is proven: no operator mixes devices; every kernel of the generated code compiles for those
targets, and those of the random integers compute the right values; nothing breaks a graph or
compiles it again. What is not: speed, and the numbers of kernels in floating point. Where private
names of PyTorch have moved, the tests skip and say so.
"""

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from cli import call
from torch._dynamo.testing import CompileCounter

import attack
import bench
import data
import memorization
import metrics
import purification
import purify
import rng
import sample
import samplers
import train
import training
from classifier import Features, WideResNet
from data import CORRUPTION_STREAM, CorruptedImages
from losses import NoiseSchedule
from rng import image_noise, philox
from unet import PRESETS, UNet

try:
    from torch._subclasses import fake_tensor
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    import cuda_code
    import kernels
    from cuda_code import CPU, CUDA
except (ImportError, AttributeError) as e:
    pytest.skip(
        f"cuda_code.py: PyTorch {torch.__version__} has moved a private name: {e}",
        allow_module_level=True,
    )

SHAPE = dict(channels=(32, 32), attention=(False, True), blocks=1, dropout=0.1)
SIGMAS = NoiseSchedule().sigmas  # read here, as tensors without values cannot be
B, S = 4, 8
needs_codegen = pytest.mark.cuda_codegen
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="a GPU is here: its tests are the others, run on it"
)

# --------------------------------------------------------------------------------------------------
# devices


@contextlib.contextmanager
def eager_autograd():
    """Within it fake tensors on CUDA are differentiable outside a graph too.

    In float32, as autocast would not know them.
    """
    dispatch = FakeTensor.__torch_dispatch__
    mode_dispatch = FakeTensorMode.__torch_dispatch__
    engine = torch.autograd.graph._engine_run_backward
    device_of = torch.ops.prim.device.default
    to = torch.ops.aten._to_copy
    inside = []  # a backward

    def answer(x):  # what C++ hears; Python reads x.device from the tensor itself
        if x.fake_mode.in_kernel_invocation:
            return torch.device("meta")
        return CPU

    def class_dispatch(cls, func, types, args=(), kwargs=None):
        return answer(args[0]) if func is device_of else dispatch(func, types, args, kwargs or {})

    def dispatch_on_cuda(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if inside and kwargs.get("device") == CPU:  # a formula of C++
            kwargs["device"] = CUDA
        return mode_dispatch(self, func, types, args, kwargs)

    def run(*args, **kwargs):
        inside.append(True)
        try:
            return engine(*args, **kwargs)
        finally:
            inside.pop()

    def first_answer(args):
        return answer(args[0])

    def cpu(x):
        return to(x, device=CPU)

    patched = mock.patch.object
    with (
        patched(FakeTensor, "__torch_dispatch__", classmethod(class_dispatch)),
        patched(FakeTensorMode, "__torch_dispatch__", dispatch_on_cuda),
        mock.patch.dict(fake_tensor._DISPATCH_META_HANDLERS, {device_of: first_answer}),
        patched(torch.autograd.graph, "_engine_run_backward", run),
        patched(torch.autograd, "_engine_run_backward", run),
        patched(torch.Tensor, "cpu", cpu),
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield


@contextlib.contextmanager
def fake_cuda():
    """A GPU whose tensors hold no values: where one is read, it is 1."""
    impls = torch._subclasses.fake_impls.op_implementations_dict
    scalar = torch.ops.aten._local_scalar_dense.default

    def numpy(x):
        assert x.device == CPU, "numpy() of a tensor on the GPU"
        return np.ones(x.shape, np.float32)

    with (
        cuda_code.pretended_gpu() as mode,
        mode,
        eager_autograd(),
        mock.patch.dict(
            impls, {scalar: lambda mode, func, x: 1.0 if x.dtype.is_floating_point else 1}
        ),
        mock.patch.object(torch.Tensor, "numpy", numpy),
    ):
        yield


@pytest.fixture(scope="module")
def can_fake():
    """Skips where PyTorch alone, as nothing of this project runs here, cannot do it."""
    try:
        with fake_cuda():
            x = torch.ones(2, device=CUDA, requires_grad=True)
            torch.autograd.grad((x * x).sum(), x)
    except Exception as e:
        pytest.skip(f"no fake CUDA tensors in PyTorch {torch.__version__}: {type(e).__name__} {e}")


@pytest.fixture
def gpu(can_fake):
    with fake_cuda():
        yield


def network():
    return cuda_code.fake_parameters(UNet(**SHAPE), CUDA)


def images(n=3):
    return [torch.empty(B, S, S, 3, device=CUDA).permute(0, 3, 1, 2) for _ in range(n)]


def classifier():
    net = WideResNet(10, 1, 10)
    for module in net.modules():
        for values in (module._parameters, module._buffers):
            values.update(
                {
                    k: torch.empty(v.shape, dtype=v.dtype, device=CUDA)
                    for k, v in values.items()
                    if v is not None
                }
            )
    for p in net.parameters():
        p.requires_grad_(False)
    return net.eval()


def always(method):
    """The regulariser from the first step on."""
    return ["--reg-last", "1"] if "reg_last" in train.OBJECTIVES[method][1] else []


@pytest.mark.parametrize(
    "method", ["none", "ran", "adv", "inv-ran", "inv-adv", "huber", "ambient", "addt"]
)
def test_devices_of_a_training_step(gpu, method):
    args = train.parse_args(["--robust", method, "--amp", "fp32", *always(method)])
    state = train.prepare(network().train(), args, CUDA)
    x0, eps, u = images()
    t, y, keys = (torch.zeros(B, dtype=torch.int64, device=CUDA) for _ in range(3))
    beta, sigma_y = (torch.ones(B, device=CUDA) for _ in range(2))
    batch = dict(x0=x0, t=t, eps=eps, beta=beta, u=u, y=y, sigma_y=sigma_y, keys=keys)
    logs = train.train_step(state, args, 0, [batch], classifier() if method == "addt" else None)
    assert {v.device for v in logs.values()} == {CUDA}


def drawn(sampler, **options):
    index = torch.zeros(B, dtype=torch.int64, device=CUDA)
    return sample.generate(
        network().eval(),
        NoiseSchedule().to(CUDA),
        index,
        (3, S, S),
        0,
        CUDA,
        sampler,
        steps=3,
        **options,
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun"])
def test_devices_of_a_sampler(gpu, sampler, monkeypatch):
    monkeypatch.setattr(NoiseSchedule, "sigmas", SIGMAS)
    assert drawn(sampler).device == CUDA


def test_a_cpu_tensor_in_a_sampler_is_seen(gpu, monkeypatch):
    """Planted: the coefficients of a step stay on the CPU."""
    right = samplers.ddpm_variance
    monkeypatch.setattr(samplers, "ddpm_variance", lambda *args: right(*args) * torch.ones(B))
    with pytest.raises(RuntimeError, match="device"):
        drawn("ddpm")


@pytest.mark.parametrize("kind", data.CORRUPTIONS)
def test_devices_of_a_batch(gpu, kind, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    x = CorruptedImages.__new__(CorruptedImages)
    vars(x).update(
        device=CUDA,
        seed=0,
        sigma=0.5,
        corrupt=data.CORRUPTIONS[kind][0],
        streams=False,
        intact=False,
        noise=image_noise,
        images=torch.zeros(9, S, S, 3, dtype=torch.uint8, device=CUDA),
        corrupted=torch.ones(9, dtype=torch.bool, device=CUDA),
    )
    index = torch.zeros(B, dtype=torch.int64, device=CUDA)
    assert x.batch(index, index > 0).device == CUDA


def test_devices_of_the_attack(gpu, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the noise
    schedule, index = NoiseSchedule().to(CUDA), torch.zeros(B, dtype=torch.int64, device=CUDA)
    options = dict(steps=2, spacing="respaced", clip=True, variance="fixed-large")
    on_step = attack.Attack(network().eval(), schedule, "ddpm", options, index, 0, iters=2)
    assert on_step(0, on_step.pairs[0][0], images(1)[0]).device == CUDA


@pytest.mark.parametrize("sampler", purification.SAMPLERS)
def test_devices_of_a_purifier_under_attack(gpu, sampler, monkeypatch):
    monkeypatch.setattr(
        purification, "noise_on", lambda kind: image_noise
    )  # compiled on a GPU: see test_kernels_of_the_noise
    monkeypatch.setattr(NoiseSchedule, "sigmas", SIGMAS)
    net = purification.PurifiedClassifier(
        network(), NoiseSchedule().to(CUDA), classifier(), sampler, t_star=2, nfe=2, rounds=1
    )
    x, y = images(1)[0], torch.zeros(B, dtype=torch.int64, device=CUDA)
    args = SimpleNamespace(seed=0, pgd=1, eot=1, eot_batch=1, evaluations=1, attack="pgd")
    row = purify.evaluate(net, x, y, torch.arange(B), args, "white", "l2")
    assert row["robust"].device == CUDA


def test_devices_of_search_and_features(gpu):
    unit = [torch.ones(n, 16, device=CPU) for n in (5, 7)]
    similarity, index = memorization.nearest(*unit, chunk_q=2, chunk_k=3, device=CUDA)
    assert similarity.device == index.device == CPU
    network = Features(classifier())
    network.to = lambda device: network  # it is there, and Module.to cannot move fake parameters
    features, logits = metrics.extract(network, np.zeros((5, S, S, 3), np.uint8), 2, CUDA)
    assert features.shape == (5, 64) and logits.shape == (5, 10)


# --------------------------------------------------------------------------------------------------
# kernels

HEAD = (
    "import triton\nimport triton.language as tl\n"
    "from torch._inductor.runtime import triton_helpers\n"
    "from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math\n"
)


@pytest.fixture(scope="module")
def inductor():
    """-> run(make, capability), make() on a pretended GPU; skips where even x -> sin(2 x) is beyond
    PyTorch."""
    pytest.importorskip("triton")

    def run(make, capability=(9, 0)):
        with cuda_code.pretended_gpu(capability) as mode, mode:
            return make()

    try:
        run(
            lambda: cuda_code.inductor_code(
                lambda x: (2 * x).sin(), [torch.ones(8, device=CUDA)], [True]
            )
        )
    except Exception as e:
        pytest.skip(
            f"Inductor's code cannot be had without a GPU in PyTorch {torch.__version__}: "
            f"{type(e).__name__} {e}"
        )
    return run


def loaded(kernel, folder):
    """The kernel's Triton function, without the decorators that ask for a driver."""
    path = folder / f"{kernel.name}.py"
    path.write_text(HEAD + kernel.source[kernel.source.index("@triton.jit") :])
    spec = importlib.util.spec_from_file_location(f"{kernel.name}_{abs(hash(kernel.source))}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, kernel.name)


def compile_all(codes, folder, targets=(80, 90)):
    """Every kernel of the codes through Triton and ptxas for the targets -> how many; equal ones
    once."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = {}
    for kernel in (k for code in codes for k in cuda_code.triton_kernels(code.text)):
        body = kernel.source[kernel.source.index("@triton.jit") :].replace(kernel.name, "kernel")
        # sizes differ from layer to layer, which changes no type
        found.setdefault((re.sub(r"\b\d{2,}\b", "N", body), str(kernel.signature)), kernel)
    for kernel in found.values():
        constants = {name: 16 for name, kind in kernel.signature.items() if kind == "constexpr"}
        for target in targets:
            source = ASTSource(
                fn=loaded(kernel, folder), signature=kernel.signature, constexprs=constants
            )
            try:
                compile(source, target=GPUTarget("cuda", target, 32))
            except Exception as e:
                raise AssertionError(
                    f"{kernel.name}, sm_{target}: {str(e).strip().splitlines()[-1]}"
                ) from e
    return len(found)


def noise_code(function=image_noise):
    index, stream = (
        torch.zeros(3, dtype=torch.int64, device=CUDA),
        torch.zeros((), dtype=torch.int64, device=CUDA),
    )
    return cuda_code.inductor_code(
        lambda i: function(2**63 + 7, i, CORRUPTION_STREAM, (3, S, S)), [index]
    ) + cuda_code.inductor_code(lambda i, s: function(2**63 + 7, i, s, (3, S, S)), [index, stream])


@needs_codegen
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
def test_kernels_of_the_noise(inductor, capability, tmp_path):
    assert compile_all(inductor(noise_code, capability), tmp_path, [10 * capability[0]]) >= 2


def bare_counter(seed, index, stream, blocks):
    """philox as it was: Inductor keeps the counter, a bare arange, and its first product
    in int32."""
    mask, index = 0xFFFFFFFF, index.view(-1, 1)
    product = torch.arange(blocks, device=index.device).expand(len(index), -1) * 0xD2511F53
    return torch.stack(
        torch.broadcast_tensors(*[(product >> 32 & mask) ^ index, product & mask] * 2), dim=-1
    )


@needs_codegen
def test_an_int32_constant_is_seen(inductor, monkeypatch, tmp_path):
    """Planted: the counter that Triton refused, a constant above 2^31 in int32."""
    monkeypatch.setattr(rng, "philox", bare_counter)
    with pytest.raises(AssertionError, match="int32"):
        compile_all(inductor(noise_code), tmp_path, [90])


INTERPRET = """
import importlib, sys
sys.path[:0] = [{folder!r}, {root!r}]
import torch
import rng
from rng import philox

class Kernel:
    def __init__(self, name):
        self.function = getattr(importlib.import_module(name), name)

    def run(self, *args, stream):
        self.function[(-(-args[-1] // 64),)](*args, XBLOCK=64)

empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)
arg0_1 = index = torch.tensor({index})
{kernels}
{lines}
eager = philox({seed}, index, {stream}, {blocks})
assert torch.equal(result, eager), "the kernel's integers are not those of eager"
"""


@needs_codegen
@pytest.mark.parametrize("planted", [False, True])
def test_integer_kernels_equal_eager(inductor, planted, tmp_path):
    """Those of philox in Triton's interpreter, on the CPU, bit for bit; with a digit of a constant
    changed they differ."""
    index, seed, blocks = [0, 1, 49_999, 2**40 + 3], 2**63 + 2**31 + 7, 48
    (code,) = inductor(
        lambda: cuda_code.inductor_code(
            lambda i: philox(seed, i, CORRUPTION_STREAM, blocks),
            [torch.zeros(4, dtype=torch.int64, device=CUDA)],
        )
    )
    found = cuda_code.triton_kernels(code.text)
    assert {v for k in found for v in k.signature.values()} == {"*i64", "i32", "constexpr"}
    for kernel in found:
        body = kernel.source[kernel.source.index("@triton.jit") :]
        (tmp_path / f"{kernel.name}.py").write_text(
            HEAD + body.replace("3528531795", "3528531797") if planted else HEAD + body
        )
    assert not planted or "3528531795" in code.text
    call = code.text[code.text.index("def call(") :]
    lines = re.findall(r"^ +((?:buf\d+ = empty_strided_cuda|triton_\w+\.run)\(.*\))", call, re.M)
    lines = [re.sub(r"stream=\w+", "stream=0", line) for line in lines]
    result = re.search(r"return \((\w+), \)", call)[1]
    script = INTERPRET.format(
        folder=str(tmp_path),
        root=os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
        index=index,
        seed=seed,
        blocks=blocks,
        stream=CORRUPTION_STREAM,
        kernels="\n".join(f"{k.name} = Kernel({k.name!r})" for k in found),
        lines="\n".join([*lines, f"result = {result}"]),
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | dict(TRITON_INTERPRET="1"),
        capture_output=True,
        text=True,
    )
    if planted:
        assert done.returncode != 0 and "not those of eager" in done.stderr
    else:
        assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def counted(inductor):
    """`bench.py --what kernels` on a small network -> its rows, the codes of all that it counts.

    These are the network in training, frozen (as the attack calls it) and in sampling, in bf16,
    with the keys of dropout, and the samplers' steps with their noise.
    """
    codes = []
    code_of = kernels.code_of

    def noted(*call):
        codes.append(code_of(*call))
        return codes[-1]

    args = SimpleNamespace(
        model="tiny", methods=["none", "adv"], amp="bf16", batch_size=B, image_size=S,
        bandwidth=4.8, peak=989.0,
    )  # fmt: skip
    patched = mock.patch.object(kernels, "code_of", noted)
    with patched, mock.patch.dict(PRESETS, tiny=SHAPE):
        return kernels.rows(args, bench.make_step), codes


@needs_codegen
def test_kernels_of_a_step(counted, tmp_path):
    _, codes = counted
    forward_and_backward = [len(code) == 2 for code in codes]
    assert forward_and_backward[:3] == [True, True, False]  # training, frozen, sampling
    assert compile_all(sum(codes, []), tmp_path) > 60


@needs_codegen
def test_a_step_is_counted(counted):
    """FLOPs as in test_bench.py, the attack's without the weights; no weight is cast in the graphs;
    a sampler's step is a few launches."""
    (none, adv, ddpm, ddim, heun), _ = counted
    assert adv["GFLOP"] / none["GFLOP"] == pytest.approx(8 / 3, rel=0.03)
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= (
        2,
        15,
    ):  # 2.14's Inductor casts 12 tensors of a weight's size in kernels of their own
        assert none["copies"] == 0
    assert none["launches"] == none["triton"] + none["library"] + none["eager"]
    assert none["eager"] < 40
    assert ddpm["launches"] <= 10
    assert ddim["launches"] <= 10
    assert heun["launches"] <= 12  # of two network calls
    for row in (none, adv, ddpm, ddim, heun):
        assert 0 < row["GB_triton"] < row["GB"]
        assert row["small"] <= row["triton"]
        count = row["triton"] + row["library"] + row["eager"]
        assert row["ms"] > 0.999 * kernels.SHORTEST * count


# --------------------------------------------------------------------------------------------------
# graphs


def test_noise_is_one_graph_for_all_streams():
    torch._dynamo.reset()
    counter, index = CompileCounter(), torch.arange(3)
    noise = torch.compile(image_noise, backend=counter, dynamic=False, fullgraph=True)
    for stream in (0, 5, CORRUPTION_STREAM):
        assert torch.equal(
            noise(1, index, torch.tensor(stream), (3, S, S)),
            image_noise(1, index, stream, (3, S, S)),
        )
    assert counter.frame_count == 1


def test_a_graph_break_is_seen(monkeypatch):
    """Planted: a value of the noise is printed."""
    torch._dynamo.reset()
    right = rng.philox

    def talks(*args):
        bits = right(*args)
        torch._dynamo.graph_break()
        return bits

    monkeypatch.setattr(rng, "philox", talks)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(image_noise, backend="eager", fullgraph=True)(
            1, torch.arange(3), 0, (3, S, S)
        )


def test_network_and_sampler_steps_are_one_graph():
    torch._dynamo.reset()
    net, x = UNet(**SHAPE).eval(), torch.randn(2, 3, S, S)
    abars = [torch.full((2,), value, dtype=torch.float64) for value in (0.5, 0.6)]
    sigmas = [torch.tensor(value, dtype=torch.float64) for value in (0.6, 0.5)]
    with torch.no_grad():
        torch.compile(net, backend="eager", fullgraph=True)(x, torch.zeros(2, dtype=torch.int64))
        for step in (samplers.ddpm_step, samplers.ddim_step):
            torch.compile(step, backend="eager", fullgraph=True)(x, x, x, *abars)
        torch.compile(samplers.heun_predict, backend="eager", fullgraph=True)(x, x, *sigmas)
        torch.compile(samplers.heun_correct, backend="eager", fullgraph=True)(x, x, x, x, *sigmas)


@pytest.mark.parametrize("share, graphs", [(1.0, 2), (0.5, 3)])
def test_adversarial_training_compiles_two_graphs(share, graphs):
    """The network with gradients in its weights, and frozen with one in its input; no more in 20
    steps and a resume.

    On a share of the rows the former is also compiled for their number. Dropout's keys change at
    each step.
    """
    torch._dynamo.reset()
    flags = [
        "--robust",
        "adv",
        "--amp",
        "fp32",
        "--warmup",
        "0",
        "--reg-last",
        "1",
        "--reg-share",
        share,
    ]
    counter, args = CompileCounter(), train.parse_args(list(map(str, flags)))
    state = train.prepare(UNet(**dict(SHAPE, dropout=0.1)).train(), args, CPU, backend=counter)
    generator = torch.Generator()
    for step in range(20):
        if step == 10:
            again = [part.state_dict() for part in (state.net, state.ema, state.optimizer)]
            for part, values in zip((state.net, state.ema, state.optimizer), again):
                part.load_state_dict(values)
        batch = train.draw_numbers(generator, 0, step, 1000, 2, S)
        batch |= dict(x0=torch.zeros(2, 3, S, S), keys=torch.arange(2) + step)
        train.train_step(state, args, step, [batch])
        if step == 0:
            assert counter.frame_count == graphs
    assert counter.frame_count == graphs


def test_loader_thread_only_reads(monkeypatch, tmp_path):
    """Of a set that streams, the noise is drawn, which may compile it, where the network is
    compiled: in the main thread."""
    in_main = {"read": set(), "noise": set()}

    def noted(name, function):
        def call(*args):
            in_main[name].add(threading.current_thread() is threading.main_thread())
            return function(*args)

        return call

    def streaming(*args):
        streams = CorruptedImages(*args, budget=0)
        streams.noise = noted("noise", streams.noise)
        streams.images = Reads(streams.images)
        return streams

    class Reads(np.ndarray):
        def __new__(cls, images):
            return images.view(cls)

        def __getitem__(self, index):
            return noted("read", np.ndarray.__getitem__)(self.view(np.ndarray), index)

    def probe(*args):  # which reads before the loop begins
        return {}, {}

    def diagnose(*args):
        return {}

    def generate(*args, **kwargs):
        return torch.zeros(64, 3, S, S)

    monkeypatch.setattr(training, "CorruptedImages", streaming)
    monkeypatch.setattr(metrics, "probe", probe)
    monkeypatch.setattr(metrics, "diagnose", diagnose)
    monkeypatch.setattr(training, "generate", generate)
    flags = """--model mini --image-size 8 --data synthetic:16 --batch-size 2 --p 0.5 --sigma 0.2
        --iters 2 --sample-every 0"""
    assert call(train, *flags.split(), "--device", "cpu", "--out", tmp_path) == 0
    assert in_main == {"read": {False}, "noise": {True}}
