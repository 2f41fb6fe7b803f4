"""What a step launches on a GPU, counted without one: `bench.py --what kernels`.

The step runs once on tensors without values, while `Recorder` notes its operators and the calls of
what torch.compile was given. The latter count as Inductor's code for a pretended H200 says
(cuda_code.py). The network is counted once for each way in which it is called, however often it is.
"""

import gc
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cuda_code import (
    CPU,
    CUDA,
    code_of,
    fake_parameters,
    functional,
    pretended_gpu,
    size_of,
    triton_kernels,
)
from losses import NoiseSchedule
from runtime import autocast, precision
from sample import generate
from samplers import SAMPLERS
from unet import PRESETS, UNet

ALLOCATES = "empty empty_like empty_strided new_empty new_empty_strided detach".split()
SAMPLING_BATCH = 16
SHORTEST = 2e-3  # ms that any kernel takes (ours)


class Opaque(torch.autograd.Function):
    """A network of which only its being called counts."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx, grad):
        pairs = zip(ctx.saved_tensors, ctx.needs_input_grad)
        return tuple(torch.empty_like(v) if need else None for v, need in pairs)


def mutated(func, args):
    """The arguments that an operator writes into."""
    pairs = zip(func._schema.arguments, args)
    return [v for kind, v in pairs if kind.alias_info and kind.alias_info.is_write]


class Network(torch.nn.Module):
    """Stands for a compiled network: its calls are noted, its gradients have no values."""

    def __init__(self, net, recorder):
        super().__init__()
        self.net, self.recorder = net, recorder
        self.function = functional(net)
        recorder.networks.append(self.function)

    def forward(self, x, t):
        args = [x, t, self.net.mask_keys, *self.net.parameters()]
        tensors = [v for v in args if v is not None]
        needs_grad = [torch.is_grad_enabled() and v.requires_grad for v in tensors]
        self.recorder.note(self.function, args, tuple(needs_grad))
        return Opaque.apply(*tensors)


class Recorder(TorchDispatchMode):
    """Within it, what is done to fake tensors is noted, and nothing is compiled.

    eager: [(operator, GB)] of those that launch a kernel; compiled: [(function, args, needs_grad,
    amp)], the calls of functions that torch.compile was given, as `code_of` takes them; networks:
    those functions that are networks.
    """

    def __init__(self, device):
        super().__init__()
        self.device = device
        self.eager, self.compiled, self.networks = [], [], []
        self.codes = {}
        self.within = False  # a compiled function

    def __enter__(self):
        self.patch = mock.patch.object(torch, "compile", self.compile)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        launches = not func.is_view and name not in ALLOCATES and func.namespace == "aten"
        if launches and not self.within:
            written = mutated(func, args) if out is None else out
            self.eager.append((name, size_of([args, kwargs, written])))
        return out

    def compile(self, function, **_):
        if isinstance(function, torch.nn.Module):
            return Network(function, self)

        def run(*args):
            self.note(function, list(args))
            self.within = True
            try:
                return function(*args)
            finally:
                self.within = False

        return run

    def note(self, function, args, needs_grad=None):
        kind = self.device.type
        amp = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.compiled.append((function, args, needs_grad, amp))

    def calls(self, step, *args):
        """-> (eager, compiled) of step(*args)."""
        self.eager, self.compiled = [], []
        step(*args)
        return self.eager, self.compiled

    def code(self, function, args, needs_grad, amp):
        """Inductor's code of a call; generated once for calls that run the same."""
        forms = []
        for leaf in tree_leaves(args):
            tensor = isinstance(leaf, torch.Tensor)
            forms.append((leaf.shape, leaf.stride(), leaf.dtype) if tensor else leaf)
        key = function, str(forms), needs_grad, amp
        if key not in self.codes:
            self.codes[key] = code_of(function, args, needs_grad, amp)
        return self.codes[key]


# --------------------------------------------------------------------------------------------------
# the table


def rows(args, make_step):
    """One row for a training step of each of --methods, one for a step of each sampler.

    make_step: that of bench.py.
    """
    amp = "bf16" if args.amp == "auto" else args.amp
    sigmas = NoiseSchedule().sigmas  # read here, as tensors without values cannot be
    gc.disable()  # in PyTorch 2.15 the collector has met a tensor here that was freed too early
    try:
        with pretended_gpu() as mode, mode:
            return training_rows(args, amp, make_step) + sampling_rows(args, amp, sigmas)
    finally:
        gc.enable()


def training_rows(args, amp, make_step):
    B, S = args.batch_size, args.image_size
    x0, eps, u = (torch.empty(B, S, S, 3).permute(0, 3, 1, 2) for _ in range(3))
    t, keys = (torch.zeros(B, dtype=torch.int64) for _ in range(2))
    batch = dict(x0=x0, t=t, eps=eps, beta=torch.ones(B), u=u, keys=keys)
    net = fake_parameters(UNet(**PRESETS[args.model]), CPU)
    found = {}
    with Recorder(CPU) as recorder:
        step = make_step(net, CPU, amp, "inductor", cast_once=True)
        step(args.methods[0], batch)  # makes the optimizer's moments
        for method in args.methods:
            found[f"{method}, B = {B}"] = recorder.calls(step, method, batch)
    return [row(args, name, net, recorder, *calls) for name, calls in found.items()]


def sampling_rows(args, amp, sigmas):
    """A step is what n + 1 steps do more than n."""
    net = fake_parameters(UNet(**PRESETS[args.model]), CUDA).eval().requires_grad_(False)
    net.cast(precision(CUDA, amp))  # as sample.py
    shape = (3, args.image_size, args.image_size)
    found = {}
    with Recorder(CUDA) as recorder, autocast(CUDA, amp):
        model = torch.compile(net)
        schedule = NoiseSchedule().to(CUDA)
        schedule.sigmas = sigmas
        index = torch.zeros(SAMPLING_BATCH, dtype=torch.int64, device=CUDA)

        def sample(sampler, steps):
            generate(model, schedule, index, shape, 0, CUDA, sampler, steps=steps)

        for sampler in SAMPLERS:
            few = recorder.calls(sample, sampler, 3)
            more = recorder.calls(sample, sampler, 4)
            name = f"{sampler} step, B = {SAMPLING_BATCH}"
            found[name] = [calls[len(before) :] for before, calls in zip(few, more)]
    return [row(args, name, net, recorder, *calls) for name, calls in found.items()]


def row(args, name, net, recorder, eager, compiled):
    """launches: by the host; a network without gradients is a CUDA graph and its inputs' copies."""
    graphs = [call for call in compiled if call[0] in recorder.networks and not any(call[2])]
    codes = [recorder.code(*call) for call in compiled]
    numbers = totals(sum(codes, []), eager, net, args)
    within = [totals(recorder.code(*call), [], net, args) for call in graphs]
    launches = sum(numbers[kind] for kind in ("triton", "library", "eager"))
    for inner in within:
        launches += 3 - inner["triton"] - inner["library"]
    return dict(section="kernels", name=name, **numbers, launches=launches)


def totals(codes, eager, net, args):
    """The numbers of a step: those of its compiled calls' codes, and [(operator, GB)] of the rest.

    triton: generated kernels; small: those that move less than 2 MB; copies: those that only cast
    or copy one parameter; library: products, convolutions, attentions; eager: operators outside
    the compiled graphs. GB: of all; ms: if each is bound by --bandwidth or --peak, at least
    SHORTEST.
    """
    sizes = {p.numel() for p in net.parameters()}
    triton = [k for code in codes for k in triton_kernels(code.text) for _ in range(k.launches)]
    library = [call for code in codes for call in code.library]
    work = [(0, k.gb) for k in triton] + library + [(0, gb) for _, gb in eager]
    ms = 0
    for gflop, gb in work:
        ms += max(gflop / args.peak, gb / args.bandwidth, SHORTEST)
    return dict(
        triton=len(triton),
        small=sum(k.gb < 2e-3 for k in triton),
        copies=sum(k.copies and k.size in sizes for k in triton),
        library=len(library),
        eager=len(eager),
        GB_triton=sum(k.gb for k in triton),
        GB=sum(gb for _, gb in work),
        GFLOP=sum(gflop for gflop, _ in work),
        ms=ms,
    )
