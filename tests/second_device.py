"""A second device without one: tensors that say they are on `second:0` while their numbers lie in the CPU's memory.

What a GPU would refuse, this refuses too: an operation on tensors of both devices, numpy on its tensors, a random
generator of the wrong side. What a GPU would wait for (a number read back) is counted.
"""

import contextlib
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

NAME = "second"
aten = torch.ops.aten
# operations that may see both devices: copies, and what CUDA's indexing allows (indices on the CPU)
ACROSS = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default,
          aten.index_put.default, aten._index_put_impl_.default}
# what makes the processor wait for a GPU: a number read back, or a size that depends on numbers
WAITS = {aten._local_scalar_dense.default: "item", aten.nonzero.default: "nonzero", aten.bincount.default: "bincount",
         aten.masked_select.default: "masked_select", aten.equal.default: "equal", aten._unique2.default: "unique",
         aten.is_nonzero.default: "item"}


LIBRARIES = []  # what is told to torch holds as long as these live


class DeviceMistake(RuntimeError):
    """Tensors of both devices in one operation."""


class OnSecond(torch.Tensor):
    """A tensor of the second device; its numbers are in `inside`."""

    @staticmethod
    def __new__(cls, inside, requires_grad=False):
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype,
            layout=inside.layout, device=torch.device(NAME, 0), requires_grad=requires_grad)

    def __init__(self, inside, requires_grad=False): self.inside = inside

    def __repr__(self, *, tensor_contents=None): return f"{NAME}:{self.inside!r}"

    def numpy(self, *more, **by_name): raise TypeError(f"can't convert {NAME}:0 device type tensor to numpy")

    def untyped_storage(self): return self.inside.untyped_storage()

    def data_ptr(self): return self.inside.data_ptr()

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            made = memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
            vars(made).update({name: value for name, value in vars(self).items() if name != "inside"})
        return memo[id(self)]

    def tolist(self): return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None): return compute(function, args, kwargs or {})


STATE = {}  # of the second device's own random generator


@contextlib.contextmanager
def own_numbers():
    """While in this context torch's random numbers are those of the second device."""
    before = torch.get_rng_state()
    torch.set_rng_state(Module.get_rng_state())
    try: yield
    finally:
        STATE["now"] = torch.get_rng_state()
        torch.set_rng_state(before)


def compute(function, args, kwargs, waits=None):
    """An operation on tensors of either device, on the one where its tensors are."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
    ours = [t for t in tensors if isinstance(t, OnSecond)]
    named = kwargs.get("device")
    target = None if named is None else torch.device(named).type
    strangers = [t for t in tensors if not isinstance(t, OnSecond) and t.ndim]
    if ours and strangers and function not in ACROSS:
        raise DeviceMistake(f"{function}: tensors on {NAME}:0 and on cpu, of shapes "
                            f"{[tuple(t.shape) for t in ours][:3]} and {[tuple(t.shape) for t in strangers][:3]}")
    if function in ACROSS and ours and function in (aten.index.Tensor, aten.index_put_.default):
        if not isinstance(args[0], OnSecond) and args[0].ndim:
            raise DeviceMistake(f"{function}: indices on {NAME}:0, of a tensor on the cpu")
    generator = kwargs.get("generator")
    if generator is not None and (target == NAME or ours):
        raise DeviceMistake(f"{function}: a generator on the cpu for a tensor on {NAME}:0")
    if waits is not None and ours:
        if function in WAITS: waits[WAITS[function]] += 1
        elif function is aten._to_copy.default and target == "cpu": waits["to cpu"] += 1
        elif function is aten.copy_.default and not isinstance(args[0], OnSecond): waits["to cpu"] += 1
        elif function is aten.index.Tensor and any(i is not None and i.dtype in (torch.bool, torch.uint8)
                                                   for i in args[1]): waits["mask"] += 1
    inside = tree_map_only(OnSecond, lambda t: t.inside, (args, kwargs))
    if target == NAME: inside[1]["device"] = torch.device("cpu")
    if inside[1].get("pin_memory"): inside[1]["pin_memory"] = False
    if function is aten._efficientzerotensor.default: function = aten.zeros.default  # one without memory of its own
    second = target == NAME or (bool(ours) and target is None)
    with own_numbers() if second and torch.Tag.nondeterministic_seeded in function.tags else contextlib.nullcontext():
        found = function(*inside[0], **inside[1])
    if function is aten.copy_.default: second = isinstance(args[0], OnSecond)
    if not second: return found
    held = {id(t.inside): t for t in ours}  # an operation in place gives back what it was given
    return tree_map_only(torch.Tensor, lambda t: _again(held[id(t)]) if id(t) in held else OnSecond(t), found)


def _again(tensor):
    """The tensor, with the size that an operation in place may have given it."""
    return tensor if tensor.size() == tensor.inside.size() else OnSecond(tensor.inside)


class Second(TorchDispatchMode):
    """While in this mode tensors can be made on the second device, and `waits` counts what a GPU would wait for."""

    def __init__(self):
        super().__init__()
        self.waits = Counter()

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # a list's numbers are copied to the device in sight of this mode
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # `.data = ` would change the cover alone
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {}, self.waits)


class Module:
    """What torch asks of a device's own module."""

    @staticmethod
    def is_available(): return True
    @staticmethod
    def is_initialized(): return True
    @staticmethod
    def current_device(): return 0
    @staticmethod
    def device_count(): return 1
    @staticmethod
    def _is_in_bad_fork(): return False
    @staticmethod
    def manual_seed_all(seed): STATE["now"] = torch.Generator().manual_seed(seed).get_state()
    @staticmethod
    def get_rng_state(*where): return STATE.setdefault("now", torch.Generator().manual_seed(0).get_state()).clone()
    @staticmethod
    def set_rng_state(state, *where): STATE["now"] = state.clone()
    @staticmethod
    def get_amp_supported_dtype(): return [torch.bfloat16, torch.float16]


def _in_bfloat16(name):
    """An operation that autocast does in few bits, as on other devices."""
    operation = getattr(aten, name).default
    ours = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def kernel(*args, **kwargs):
        few = torch.get_autocast_dtype(NAME)
        with torch._C._ExcludeDispatchKeyGuard(ours):
            fewer = lambda t: t.to(few) if t.dtype == torch.float32 else t
            return operation(*tree_map_only(torch.Tensor, fewer, args), **kwargs)

    return kernel


def prepare():
    """Tell torch of the device, once a process; False if this torch cannot have one that is written in Python."""
    from torch.utils import backend_registration
    if torch._C._get_privateuse1_backend_name() == NAME: return True
    found = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
    if found is None: return False
    found(NAME, Module)
    rest = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel)
    few = torch.library.Library("aten", "IMPL", "AutocastPrivateUse1")
    for name in ("conv2d", "linear", "matmul", "mm", "bmm"): few.impl(name, _in_bfloat16(name))
    LIBRARIES.extend([rest, few])
    return True
