"""Inductor's CUDA code on a machine without a GPU.

    with pretended_gpu():
        for code in inductor_code(function, arguments, needs_grad=(True, False)):
            for kernel in triton_kernels(code.text): ...

A file of its own, as both kernels.py and tests/test_cuda.py need it, and as it leans on private
names of PyTorch (2.11 to 2.15) that nothing else here should know. Three tricks
make it work. Fake CUDA tensors need no driver, and Inductor asks the device for little more than
its properties, which are given. The autograd engine does ask the driver for streams, so that a
function is traced twice: first its forward on CUDA tensors, with autocast's casts written out; then
that graph is differentiated on tensors which tell C++ alone that they are on the CPU. SDPA is
PyTorch's flash kernel, as on an A100 or H100 in half precision; cuDNN answers in channels_last
where it is asked in it.
"""

import ast
import contextlib
import copy
import re
from collections import Counter
from types import SimpleNamespace
from unittest import mock

import torch
import torch._dynamo.device_interface as device_interface
import torch._functorch.config
import torch._inductor.config
import torch._inductor.fx_passes.fuse_attention
import torch.utils._triton
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------
# a GPU that is not there


def properties(capability):
    """Those of an H200, under another compute capability if asked."""
    major, minor = capability
    return SimpleNamespace(
        name="pretended",
        major=major,
        minor=minor,
        multi_processor_count=132,
        warp_size=32,
        gcnArchName="",
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        shared_memory_per_block=232448,
        shared_memory_per_block_optin=232448,
        total_memory=1 << 37,
        L2_cache_size=50 << 20,
    )


def answers(value):
    """A function that answers `value`, whatever it is asked."""

    def answer(*args, **kwargs):
        return value

    return answer


def replacements(capability):
    """[(where, name, what)]: what stands for the driver and for what asks it."""
    properties_of = answers(properties(capability))
    cuda = dict(
        get_device_properties=properties_of,
        get_device_capability=answers(capability),
        is_available=answers(True),
        is_bf16_supported=answers(True),
        device_count=answers(1),
        current_device=answers(0),
        _exchange_device=answers(0),
        _maybe_exchange_device=answers(0),
        _lazy_init=answers(None),
        get_rng_state=answers(torch.zeros(16, dtype=torch.uint8)),
        set_rng_state=answers(None),
    )
    interface = device_interface.CudaInterface
    return [
        *[(torch.cuda, name, answer) for name, answer in cuda.items()],
        (interface, "get_device_properties", staticmethod(properties_of)),
        (interface.Worker, "get_device_properties", staticmethod(properties_of)),
        (FakeTensorMode, "avoid_device_init", True),  # torch.tensor(.., device=CUDA) asks no driver
        (torch.utils._triton, "triton_hash_with_backend", answers("pretended")),
        (torch.utils._triton, "triton_backend", answers(None)),
        (torch._inductor.fx_passes.fuse_attention, "_sfdp_init", answers(None)),  # real tensors
        (torch._C, "_conv_determine_backend_memory_format", cudnn_format),
        (torch.nn.functional, "scaled_dot_product_attention", flash_attention),
    ]


def cudnn_format(x, weight, backend):
    for v in (x, weight):
        if v.dim() == 4 and v.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
    return torch.contiguous_format


def flash_attention(q, k, v):
    aten = torch.ops.aten
    if q.dtype == torch.float32:
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, q.requires_grad)[0]
    return aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextlib.contextmanager
def pretended_gpu(capability=(9, 0)):
    """Within it Inductor compiles for CUDA.

    Yields the FakeTensorMode in which tensors on `CUDA` can be made.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:  # before CUDA is pretended: PyTorch then puts a device guard that needs no driver
        torch.zeros(1, device=CUDA)
    inductor = torch._inductor.config.patch(
        compile_threads=1,
        fx_graph_cache=False,
        profile_bandwidth=True,  # notes the bytes of each kernel
        shape_padding=False,  # this and the next make real tensors
        joint_graph_constant_folding=False,
    )
    both_at_once = torch._functorch.config.patch(force_non_lazy_backward_lowering=True)
    with contextlib.ExitStack() as stack:
        for where, name, what in replacements(capability):
            stack.enter_context(mock.patch.object(where, name, what))
        stack.enter_context(inductor)
        stack.enter_context(both_at_once)
        yield mode


def fake_parameters(net, device):
    """`net` itself, with fake parameters, those of convolutions in channels_last.

    Module.to cannot do it.
    """
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                form = torch.channels_last if p.dim() == 4 else torch.contiguous_format
                fake = torch.empty(p.shape, device=device, memory_format=form)
                module._parameters[name] = torch.nn.Parameter(fake)
    return net


# --------------------------------------------------------------------------------------------------
# Inductor's code of a function


@contextlib.contextmanager
def differentiable():
    """Within it the autograd engine takes tensors on CUDA for ones on the CPU."""
    make = torch.Tensor._make_wrapper_subclass
    dispatch = FunctionalTensorMode.__torch_dispatch__

    def make_wrapper(cls, *args, **kwargs):
        if cls is FunctionalTensor:
            args = [CPU if isinstance(v, torch.device) else v for v in args]
        return make(cls, *args, **kwargs)

    def dispatch_on_cuda(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == CPU:  # a formula of C++, which believed it
            kwargs["device"] = CUDA
        return dispatch(self, func, types, args, kwargs)

    def device_of(self):
        return self.elem.device

    patched = mock.patch.object
    with (
        patched(torch.Tensor, "_make_wrapper_subclass", staticmethod(make_wrapper)),
        patched(FunctionalTensorMode, "__torch_dispatch__", dispatch_on_cuda),
        patched(FunctionalTensor, "device", property(device_of), create=True),
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield


class Generated(Exception):
    """Ends Inductor's work once the code is there: it could not be loaded without a driver."""


def inductor_code(function, args, needs_grad=None):
    """-> [code] of an inference, or [code of the forward, of the backward] where anything in `args`
    needs a gradient.

    function(*args) -> tensor; args: CUDA tensors made in the mode of pretended_gpu, which must be
    active; needs_grad: one bool for each. code.text is Inductor's Python and Triton, code.library
    what it leaves to libraries, see `library_calls`.
    """
    codes = []
    needs_grad = needs_grad or [False] * len(args)
    with torch.no_grad():
        graph = make_fx(function)(*args)

    def generate(gm, inputs, **kwargs):
        def stop(self):
            text = self.codegen()[0]
            text = getattr(text, "value", text)
            codes.append(SimpleNamespace(text=text, library=library_calls(gm)))
            raise Generated

        before = len(codes)
        with mock.patch.object(GraphLowering, "compile_to_module", stop):
            try:
                compile_fx_inner(copy.deepcopy(gm), inputs, **kwargs)
            except Exception:
                if len(codes) == before:  # it is not Generated, perhaps wrapped in another
                    raise

        def call(values):
            return gm(*values)

        call._boxed_call = True
        return call

    args = [a.detach().requires_grad_(need) for a, need in zip(args, needs_grad)]
    args += lift_constants(graph)
    with torch.set_grad_enabled(any(needs_grad)), differentiable():
        compile_fx(graph, args, inner_compile=generate)
    return codes


def lift_constants(graph):
    """Makes the tensors that `graph` closes over arguments at its end -> these tensors."""
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    found = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and isinstance(getattr(graph, node.target, None), torch.Tensor):
            if node.target not in found:
                with graph.graph.inserting_after(inputs[-1]):
                    inputs.append(graph.graph.placeholder(f"lifted{len(found)}"))
                inputs[-1].meta = node.meta
                found[node.target] = inputs[-1]
            node.replace_all_uses_with(found[node.target])
            graph.graph.erase_node(node)
    graph.recompile()
    return [getattr(graph, name).detach() for name in found]


def code_of(function, args, needs_grad=None, amp=None):
    """inductor_code of a call with any arguments, whose tensors need not be on the GPU yet.

    needs_grad: a bool for each tensor; amp: dtype of the autocast around it, if any.
    """
    leaves, spec = tree_flatten(args)
    tensors = [on_cuda(v) for v in leaves if isinstance(v, torch.Tensor)]

    def traced(*tensors):
        rest = iter(tensors)
        values = [next(rest) if isinstance(v, torch.Tensor) else v for v in leaves]
        with torch.autocast("cuda", dtype=amp, enabled=amp is not None):
            return function(*tree_unflatten(values, spec))

    return inductor_code(traced, tensors, needs_grad)


def on_cuda(x):
    """On the pretended GPU, with its strides."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=CUDA)


def functional(net):
    """net(x, t) as function(x, t, keys, *parameters); keys: None, or those of its dropout."""
    names = [name for name, _ in net.named_parameters()]

    def function(x, t, keys, *parameters):
        net.mask_keys = keys
        return torch.func.functional_call(net, dict(zip(names, parameters)), (x, t))

    return function


# --------------------------------------------------------------------------------------------------
# reading the code


def triton_kernels(text):
    """-> [kernel]: name, source, signature {argument: type}, launches, size (elements), gb moved by
    a launch.

    kernel.copies: one tensor goes in, one comes out, and only casts happen between them.
    """
    launches = Counter(re.findall(r"\b(\w+)\.run\(", text))
    kernels = []
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", text, re.S):
        body = source[source.index("@triton.jit") :]
        signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", source)[1])
        made = re.findall(r"^ +tmp\d+ = (.*)$", body, re.M)
        casts = all("tl.load(" in m or ".to(" in m for m in made)
        size = 1
        for n in re.findall(r"^ +[xyz]numel = (\d+)$", body, re.M):
            size *= int(n)
        kernels.append(
            SimpleNamespace(
                name=name,
                source=source,
                signature=signature,
                launches=launches[name],
                size=size,
                gb=float(re.search(r"'kernel_num_gb': ([\d.e+-]+)", source)[1]),
                copies=casts and sum(kind[0] == "*" for kind in signature.values()) == 2,
            )
        )
    return kernels


def library_calls(graph):
    """-> [(GFLOP, GB)] of the products, convolutions and attentions, which libraries compute.

    The backward of a convolution is one call for its input and one for its weight.
    """
    found = []
    for node in graph.graph.nodes:
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if node.op != "call_function" or formula is None:
            continue
        args, kwargs = tree_map_only(torch.fx.Node, value_of, (node.args, node.kwargs))
        out = value_of(node)
        gflop = formula(*args, **kwargs, out_val=out) / 1e9
        if node.target is torch.ops.aten.convolution_backward.default:
            grad, x, weight = args[:3]
            wanted = [i for i in range(2) if args[-1][i]]
            for i in wanted:
                read = [grad, (weight, x)[i]]
                found.append((gflop / len(wanted), size_of([read, out[i]])))
        else:
            found.append((gflop, size_of([[args, kwargs], out])))
    return found


def value_of(node):
    return node.meta["val"]


def size_of(tree):
    """GB of the tensors in a tree."""
    tensors = [v for v in tree_leaves(tree) if isinstance(v, torch.Tensor)]
    return sum(v.numel() * v.element_size() for v in tensors) / 1e9
