"Tensors that say `cuda:i`, hold data on the CPU and compute for real; what runs is counted. Import `t4` first."
from contextlib import ExitStack, contextmanager

from shadow_cuda import t4
import torch
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from shadow_cuda import attention
from shadow_cuda.counts import counts

aten = torch.ops.aten
# `module.to` makes new parameters: ours cannot change their device
torch.__future__.set_overwrite_module_params_on_conversion(True)
torch._C._set_only_lift_cpu_tensors(True)


class DeviceMix(RuntimeError): "An operation on tensors of two devices."


class Shadow(torch.Tensor):
    "A tensor on a device that is not there; `inner` is the real one."
    @staticmethod
    def __new__(cls, inner, device):
        shadow = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=device, requires_grad=False)
        shadow.inner = inner
        return shadow

    def __repr__(self): return f'Shadow({self.inner}, {self.device})'

    @property
    def data(self): return Shadow(self.inner.detach(), self.device)

    @data.setter
    def data(self, value):
        if not isinstance(value, Shadow): raise NotImplementedError('a parameter cannot change its device')
        self.inner = value.inner.detach()
        torch.Tensor.data.__set__(self, value)

    def untyped_storage(self): return self.inner.untyped_storage()
    def __deepcopy__(self, memo): return Shadow(self.detach().inner.clone(), self.device)

    def tolist(self):
        counts.syncs['tolist'] += 1
        counts.copies['to host'] += 1
        return self.detach().inner.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy it first.")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None): return _dispatch(func, args, kwargs or {})


# the optimizer takes many parameters at once, as it does on a card
for module in (optimizer, _foreach_utils): module._foreach_supported_types.append(Shadow)


def _tensors(*values):
    "The tensors among `values` and in lists of them: deeper ones no operation takes or gives."
    for x in values:
        if isinstance(x, torch.Tensor): yield x
        elif isinstance(x, (list, tuple)): yield from (y for y in x if isinstance(y, torch.Tensor))


def _unwrap(x):
    if isinstance(x, (list, tuple)): return type(x)(map(_unwrap, x))
    return x.inner if isinstance(x, Shadow) else x


def _wrap(x, device):
    if isinstance(x, (list, tuple)): return type(x)(_wrap(y, device) for y in x)
    return Shadow(x, device) if isinstance(x, torch.Tensor) and not isinstance(x, Shadow) else x


def _device(spec):
    "A cuda device with its index; None for the CPU."
    if spec is None: return None
    device = torch.device(spec)
    if device.type != 'cuda': return None
    return torch.device('cuda', t4.current[0] if device.index is None else device.index)


def _count(name, result):
    "Count the kernel `name` and what it made."
    counts.kernels[name] += 1
    for x in _tensors(result):
        if x.dtype not in (torch.float32, torch.bfloat16) or x.numel() < counts.limit: continue
        counter = counts.wide if x.numel() == counts.limit else counts.wider
        counter[f"{name} {str(x.dtype).removeprefix('torch.')}"] += 1


def _count_move(name, source, target):
    "Count a copy from one device to another; True if it is none."
    if source == target: return True
    counts.copies['to host' if target.type == 'cpu' else 'to device'] += 1
    if target.type == 'cpu': counts.syncs[name] += 1


def _copy(name, args, kwargs):
    "aten._to_copy: to another dtype, or between host and device."
    source = args[0].device
    target = source if kwargs.get('device') is None else _device(kwargs['device']) or torch.device('cpu')
    others = {k: v for k, v in kwargs.items() if k not in ('device', 'non_blocking')}
    result = aten._to_copy.default(_unwrap(args[0]), **others)
    if _count_move(name, source, target) and target.type == 'cuda': _count(name, result)
    return Shadow(result, target) if target.type == 'cuda' else result


def _copy_into(name, args):
    target, source = args[:2]
    _unwrap(target).copy_(_unwrap(source))
    if _count_move(name, source.device, target.device) and target.device.type == 'cuda': _count(name, _unwrap(target))
    return target


# the host reads a number or a size
_READS = {f'aten.{name}' for name in '''_local_scalar_dense equal nonzero _unique2 unique_consecutive unique_dim
    masked_select bincount'''.split()}
# views move no memory and start no kernel
_VIEWS = {f'aten.{name}' for name in '''view _unsafe_view reshape expand permute transpose t slice select unsqueeze
    squeeze split split_with_sizes chunk detach alias as_strided unbind narrow diagonal lift_fresh _reshape_alias unfold
    mT'''.split()}


_INDEXING = {'aten.index', 'aten.index_put', 'aten.index_put_', 'aten._index_put_impl_', 'aten._unsafe_index'}


def _count_indices(name, args):
    "Indices of the host travel; a mask has to be counted by the device before the host knows the size of the result."
    for index in args[1]:
        if index is None: continue
        if index.device.type == 'cpu': counts.copies['to device'] += 1
        # a number put where a mask says so is no question of size
        elif index.dtype == torch.bool and ('put' not in name or args[2].dim()): counts.syncs[name] += 1


def _check_devices(name, tensors):
    "Scalars of the host may meet any device, and indices of the host may index any tensor; all others must be on one."
    devices = {x.device for x in tensors if not (x.device.type == 'cpu' and x.dim() == 0)}
    if len(devices) > 1: raise DeviceMix(f'{name}: tensors on {sorted(map(str, devices))}')


def _dispatch(func, args, kwargs):
    name = str(func).rsplit('.', 1)[0]
    if func is aten._to_copy.default: return _copy(name, args, kwargs)
    if func is aten.copy_.default: return _copy_into(name, args)
    tensors = [*_tensors(*args, *kwargs.values())]
    indexing = name in _INDEXING
    if indexing: tensors = [args[0], *args[2:3], *(x for x in _tensors(args[1]) if x.device.type == 'cuda')]
    _check_devices(name, tensors)
    # where the result lives: where it was asked for, else where the arguments are
    asked, present = kwargs.get('device'), [x.device for x in tensors if x.device.type == 'cuda']
    target = _device(asked) if asked is not None else present[0] if present else None
    if _device(asked): kwargs = dict(kwargs, device='cpu')
    # what it costs
    if target is not None and indexing: _count_indices(name, args)
    if name in _READS and target is not None:
        counts.syncs[name] += 1
        counts.copies['to host'] += name == 'aten._local_scalar_dense'
    kernel = attention.KERNELS.get(func, func) if target is not None else func
    if kernel is not func: attention.count(name, args)
    result = kernel(*map(_unwrap, args), **{k: _unwrap(x) for k, x in kwargs.items()})
    if target is not None and name not in _VIEWS and name != 'aten._local_scalar_dense': _count(name, result)
    # an operation in place gives back its argument
    first = func._schema.arguments[0] if func._schema.arguments else None
    in_place = first is not None and first.alias_info is not None and first.alias_info.is_write
    if in_place and isinstance(args[0], Shadow) and not isinstance(result, (tuple, list)): return args[0]
    return result if target is None else _wrap(result, target)


class _Factories(TorchDispatchMode):
    "Operations that make a tensor on `cuda` from nothing, and those on our tensors that arrive here first."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        shadows = any(isinstance(x, Shadow) for x in _tensors(*args, *kwargs.values()))
        return _dispatch(func, args, kwargs) if shadows or _device(kwargs.get('device')) else func(*args, **kwargs)


@contextmanager
def shadow_cuda():
    "Two T4s, inside the block."
    with ExitStack() as stack:
        for patch in attention.patched(): stack.enter_context(patch)
        stack.enter_context(_Factories())
        yield counts


def to_shadow(tensor, device): return Shadow(tensor.detach(), torch.device(device))


def put(module, device):
    "Move a loaded `module`, also one with weights in 4 bits, to the shadow of `device`."
    move = lambda x: to_shadow(x, device) if isinstance(x, torch.Tensor) else x
    for owner in module.modules():
        for name, p in owner._parameters.items():
            if p is not None: owner._parameters[name] = _put_parameter(p, owner, move)
        for name, buffer in owner._buffers.items(): owner._buffers[name] = move(buffer)


_OF_4_BITS = ('quant_state', 'compress_statistics', 'quant_type', 'quant_storage', 'blocksize', 'bnb_quantized')


def _put_parameter(p, owner, move):
    new = torch.nn.Parameter(move(p.data.as_subclass(torch.Tensor)), requires_grad=False)
    if not hasattr(p, 'quant_state'): return new
    # what bitsandbytes keeps beside the weights
    for state in (p.quant_state, p.quant_state.state2):
        if state is None: continue
        state.absmax, state.code, state.offset = move(state.absmax), move(state.code), move(state.offset)
    for name in _OF_4_BITS: setattr(new, name, getattr(p, name, None))
    new.module = owner
    return new
