"""Inductor's CUDA code on a machine without a GPU: what a training or sampling step launches there.

    with pretended_gpu():
        for code in inductor_code(function, arguments, needs_grad=(True, False)):
            for kernel in triton_kernels(code.text): ...

A file of its own, as both bench.py (`--what kernels`) and tests/test_cuda.py need it, and as it leans on private names of
PyTorch (2.11 to 2.15) that nothing else here should know. Three tricks make it work. Fake CUDA tensors need no driver, and
Inductor asks the device for little more than its properties, which are given. The autograd engine does ask the driver for
streams, so that a function is traced twice: first its forward on CUDA tensors, with autocast's casts written out; then that
graph is differentiated on tensors which tell C++ alone that they are on the CPU. SDPA is PyTorch's flash kernel, as on an
A100 or H100 in half precision; cuDNN answers in channels_last where it is asked in it.
"""

import ast
import contextlib
import copy
import re
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
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.flop_counter import flop_registry

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")

# ---------------------------------------------------------------------------------------------------------------------
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


@contextlib.contextmanager
def pretended_gpu(capability=(9, 0)):
    """Within it Inductor compiles for CUDA; yields the FakeTensorMode in which tensors on `CUDA` can be made."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:  # before CUDA is pretended to be there: PyTorch then puts a device guard that needs no driver
        torch.zeros(1, device=CUDA)
    device = properties(capability)
    cuda = dict(
        get_device_properties=lambda *a, **k: device,
        get_device_capability=lambda *a, **k: capability,
        is_available=lambda: True,
        is_bf16_supported=lambda *a, **k: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        _exchange_device=lambda i: i,
        _maybe_exchange_device=lambda i: i,
        _lazy_init=lambda: None,
        get_rng_state=lambda *a: torch.zeros(16, dtype=torch.uint8),
        set_rng_state=lambda *a: None,
    )
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for cls in (device_interface.CudaInterface, device_interface.CudaInterface.Worker):
            stack.enter_context(
                mock.patch.object(
                    cls, "get_device_properties", staticmethod(lambda *a, **k: device)
                )
            )
        replace = [
            (torch.utils._triton, "triton_hash_with_backend", lambda *a, **k: "pretended"),
            (torch.utils._triton, "triton_backend", lambda: None),
            (
                torch._inductor.fx_passes.fuse_attention,
                "_sfdp_init",
                lambda *a: None,
            ),  # makes real tensors
            (torch._C, "_conv_determine_backend_memory_format", cudnn_format),
            (torch.nn.functional, "scaled_dot_product_attention", flash_attention),
        ]
        for where, name, value in replace:
            stack.enter_context(mock.patch.object(where, name, value))
        stack.enter_context(torch._functorch.config.patch(force_non_lazy_backward_lowering=True))
        stack.enter_context(
            torch._inductor.config.patch(
                compile_threads=1,
                fx_graph_cache=False,
                profile_bandwidth=True,  # notes the bytes of each kernel
                shape_padding=False,
                joint_graph_constant_folding=False,
            )
        )  # these two make real tensors
        yield mode


def cudnn_format(x, weight, backend):
    last = any(
        v.dim() == 4 and v.is_contiguous(memory_format=torch.channels_last) for v in (x, weight)
    )
    return torch.channels_last if last else torch.contiguous_format


def flash_attention(q, k, v):
    if q.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            q, k, v, None, q.requires_grad
        )[0]
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


@contextlib.contextmanager
def differentiable():
    """Within it the autograd engine takes tensors on CUDA for ones on the CPU."""
    make, dispatch = torch.Tensor._make_wrapper_subclass, FunctionalTensorMode.__torch_dispatch__

    def make_wrapper(cls, *args, **kwargs):
        if cls is FunctionalTensor:
            args = [CPU if isinstance(v, torch.device) else v for v in args]
        return make(cls, *args, **kwargs)

    def dispatch_on_cuda(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == CPU:  # a formula of C++, which believed it
            kwargs["device"] = CUDA
        return dispatch(self, func, types, args, kwargs)

    with (
        mock.patch.object(torch.Tensor, "_make_wrapper_subclass", staticmethod(make_wrapper)),
        mock.patch.object(FunctionalTensorMode, "__torch_dispatch__", dispatch_on_cuda),
        mock.patch.object(
            FunctionalTensor, "device", property(lambda self: self.elem.device), create=True
        ),
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield


@contextlib.contextmanager
def eager_autograd():
    """Within it fake tensors on CUDA are differentiable outside a graph too; in float32, as autocast would not know them."""
    dispatch, to = FakeTensor.__torch_dispatch__, torch.ops.aten._to_copy
    device_of, mode_dispatch, inside = (
        torch.ops.prim.device.default,
        FakeTensorMode.__torch_dispatch__,
        [],
    )
    engine = torch.autograd.graph._engine_run_backward

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

    with (
        mock.patch.object(FakeTensor, "__torch_dispatch__", classmethod(class_dispatch)),
        mock.patch.object(FakeTensorMode, "__torch_dispatch__", dispatch_on_cuda),
        mock.patch.dict(
            fake_tensor._DISPATCH_META_HANDLERS, {device_of: lambda args: answer(args[0])}
        ),
        mock.patch.object(torch.autograd.graph, "_engine_run_backward", run),
        mock.patch.object(torch.autograd, "_engine_run_backward", run),
        mock.patch.object(torch.Tensor, "cpu", lambda x: to(x, device=CPU)),
        torch.autograd.set_multithreading_enabled(False),
    ):
        yield


class _Generated(Exception):
    """Ends Inductor's work once the code is there: it could not be loaded without a driver."""


def inductor_code(function, args, needs_grad=None):
    """-> [code] of an inference, or [code of the forward, of the backward] where anything in `args` needs a gradient.

    function(*args) -> tensor; args: CUDA tensors made in the mode of pretended_gpu, which must be active; needs_grad: one
    bool for each. code.text is Inductor's Python and Triton, code.graph its FX graph.
    """
    codes, needs_grad = [], needs_grad or [False] * len(args)
    with torch.no_grad():
        graph = make_fx(function)(*args)

    def generate(gm, inputs, **kwargs):
        def stop(self):
            text = self.codegen()[0]
            codes.append(SimpleNamespace(text=getattr(text, "value", text), graph=gm))
            raise _Generated

        with mock.patch.object(GraphLowering, "compile_to_module", stop):
            try:
                compile_fx_inner(copy.deepcopy(gm), inputs, **kwargs)
            except Exception as e:
                causes = [e]
                while causes[-1] is not None:
                    causes.append(causes[-1].__cause__ or causes[-1].__context__)
                if not any(isinstance(c, _Generated) for c in causes):
                    raise

        def call(values):
            return gm(*values)

        call._boxed_call = True
        return call

    args = [a.detach().requires_grad_(need) for a, need in zip(args, needs_grad)] + lift_constants(
        graph
    )
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
                inputs[-1].meta, found[node.target] = node.meta, inputs[-1]
            node.replace_all_uses_with(found[node.target])
            graph.graph.erase_node(node)
    graph.recompile()
    return [getattr(graph, name).detach() for name in found]


# ---------------------------------------------------------------------------------------------------------------------
# reading the code


def triton_kernels(text):
    """-> [kernel]: name, source, signature {argument: type}, launches, size (elements), gb moved by a launch.

    kernel.copies: one tensor goes in, one comes out, and nothing but casts happens between them.
    """
    kernels = []
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", text, re.S):
        body = source[source.index("@triton.jit") :]
        signature = ast.literal_eval(re.search(r"'signature': (\{.*?\})", source)[1])
        made = re.findall(r"^ +tmp\d+ = (.*)$", body, re.M)
        size = 1
        for n in re.findall(r"^ +[xyz]numel = (\d+)$", body, re.M):
            size *= int(n)
        kernels.append(
            SimpleNamespace(
                name=name,
                source=source,
                signature=signature,
                launches=len(re.findall(rf"\b{name}\.run\(", text)),
                size=size,
                gb=float(re.search(r"'kernel_num_gb': ([\d.e+-]+)", source)[1]),
                copies=sum(v[0] == "*" for v in signature.values()) == 2
                and all("tl.load(" in m or ".to(" in m for m in made),
            )
        )
    return kernels


def externs(code):
    """-> [(GFLOP, GB)] of the products, convolutions and attentions, which libraries compute."""
    found = []
    for node in code.graph.graph.nodes:
        formula = flop_registry.get(getattr(node.target, "overloadpacket", None))
        if node.op == "call_function" and formula:
            values = [n.meta["val"] for n in node.all_input_nodes]
            args, kwargs = tree_map_only(
                torch.fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs)
            )
            flop = formula(*args, **kwargs, out_val=node.meta["val"])
            found.append((flop / 1e9, size_of([values, node.meta["val"]])))
    return found


def size_of(tree):
    """GB of the tensors in a tree."""
    return (
        sum(v.numel() * v.element_size() for v in tree_leaves(tree) if isinstance(v, torch.Tensor))
        / 1e9
    )


# ---------------------------------------------------------------------------------------------------------------------
# what a call launches: eagerly, and through torch.compile


class Eager(TorchDispatchMode):
    """Records (operator, GB) of each operator that launches a kernel."""

    def __init__(self):
        super().__init__()
        self.ops, self.off = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        allocates = name in (
            "empty",
            "empty_like",
            "empty_strided",
            "new_empty",
            "new_empty_strided",
            "detach",
        )
        if not (self.off or func.is_view or allocates) and func.namespace == "aten":
            self.ops.append((name, size_of([args, kwargs, out])))
        return out


class Opaque(torch.autograd.Function):
    """A network of which only its being called counts."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return torch.empty_like(tensors[0])

    @staticmethod
    def backward(ctx, grad):
        return tuple(
            torch.empty_like(v) if need else None
            for v, need in zip(ctx.saved_tensors, ctx.needs_input_grad)
        )


def record(make, device):
    """What the second call of step = make() does on fake tensors -> eager operators and the calls of compiled functions.

    Eager ones are (name, GB); the calls (function, args, needs_grad, amp), as key_of and code_of take them.
    """
    eager, compiled = Eager(), []

    def note(function, args, needs_grad=None):
        amp = (
            torch.get_autocast_dtype(device.type)
            if torch.is_autocast_enabled(device.type)
            else None
        )
        compiled.append((function, args, needs_grad, amp))

    class Network(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            tensors = [x, t, *self.net.parameters()]
            note(
                self.net,
                tensors,
                tuple(torch.is_grad_enabled() and v.requires_grad for v in tensors),
            )
            return Opaque.apply(*tensors)

    def compiles(function, **_):
        def run(*args):
            note(function, list(args))
            eager.off, before = True, eager.off
            try:
                return function(*args)
            finally:
                eager.off = before

        return Network(function) if isinstance(function, torch.nn.Module) else run

    with mock.patch.object(torch, "compile", compiles), eager:
        step = make()
        step()  # makes the optimizer's moments
        eager.ops.clear()
        compiled.clear()
        step()
    return eager.ops, compiled


def on_cuda(tree):
    """Its tensors on the pretended GPU, with their strides."""
    return tree_map_only(
        torch.Tensor,
        lambda v: torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=CUDA),
        tree,
    )


def code_of(function, args, needs_grad, amp):
    """inductor_code of an entry of `record`."""
    args = on_cuda(args)
    if isinstance(function, torch.nn.Module):
        names = [name for name, _ in function.named_parameters()]

        def traced(x, t, *weights):
            with torch.autocast("cuda", dtype=amp, enabled=amp is not None):
                return torch.func.functional_call(function, dict(zip(names, weights)), (x, t))

        return inductor_code(traced, args, needs_grad)
    leaves, spec = tree_flatten(args)
    tensors = [v for v in leaves if isinstance(v, torch.Tensor)]

    def traced(*tensors):
        rest = iter(tensors)
        with torch.autocast("cuda", dtype=amp, enabled=amp is not None):
            return function(
                *tree_unflatten(
                    [next(rest) if isinstance(v, torch.Tensor) else v for v in leaves], spec
                )
            )

    return inductor_code(traced, tensors)


def key_of(function, args, needs_grad, amp):
    """Equal for calls that run the same code."""
    leaves = [
        (v.shape, v.stride(), v.dtype) if isinstance(v, torch.Tensor) else v
        for v in tree_leaves(args)
    ]
    return str((id(function), leaves, needs_grad, amp))


def fake_parameters(net, device):
    """`net` itself, with fake parameters, those of convolutions in channels_last: Module.to cannot do it."""
    for module in net.modules():
        for name, p in module._parameters.items():
            if p is not None:
                form = torch.channels_last if p.dim() == 4 else torch.contiguous_format
                module._parameters[name] = torch.nn.Parameter(
                    torch.empty(p.shape, device=device, memory_format=form)
                )
    return net
