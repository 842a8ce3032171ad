"""Attention as a T4 computes it, on the CPU: one kernel forward, one backward, PyTorch's memory-efficient ones.

A CPU build of torch would take attention on `cuda` apart into products and a softmax."""
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from attention_kernel import efficient_attention_backward, efficient_attention_forward

from shadow_cuda.counts import counts

aten = torch.ops.aten
_whole = F.scaled_dot_product_attention


# ---- scaled_dot_product_attention
class LowerRight:
    "What `causal_lower_right` gives: the real one cannot be made where operations are intercepted."
    def __init__(self, queries, keys): self.shape = queries, keys


def attention(query, key, value, attn_mask=None, dropout_p=0., is_causal=False, scale=None, enable_gqa=False):
    "torch's function of that name; on `cuda` it takes the memory-efficient kernel, as sm_75 does for fp16 and fp32."
    if query.device.type != 'cuda':
        return _whole(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    assert not enable_gqa, 'the memory-efficient kernel has no grouped queries: products and softmax of all scores'
    note_dtypes(query, key, value)
    # autocast
    if torch.is_autocast_enabled('cuda'):
        half = lambda x: x.to(torch.get_autocast_dtype('cuda')) if x.is_floating_point() else x
        query, key, value = map(half, (query, key, value))
        if isinstance(attn_mask, torch.Tensor): attn_mask = half(attn_mask)
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if isinstance(attn_mask, LowerRight):
        assert attn_mask.shape == (query.shape[-2], key.shape[-2])
        by_token = (x.transpose(1, 2) for x in (query, key, value))
        return aten._efficient_attention_forward(*by_token, None, None, None, None, None, dropout_p, 2, needs,
                                                 scale=scale)[0].transpose(1, 2)
    bias = None if attn_mask is None else _as_bias(attn_mask, query, key)
    needs = needs or (bias is not None and bias.requires_grad)
    return aten._scaled_dot_product_efficient_attention(query, key, value, bias, needs, dropout_p, is_causal,
                                                        scale=scale)[0]


def note_dtypes(query, key, value):
    "Count the dtypes with which attention is called, before autocast makes them equal."
    counts.attention['called with ' + ' '.join(str(x.dtype).removeprefix('torch.') for x in (query, key, value))] += 1


def count(name, args):
    "Count a call of one of the `KERNELS` below."
    queries = args[1] if 'backward' in name else args[0]
    counts.attention[f"{name.removeprefix('aten.')} {str(queries.dtype).removeprefix('torch.')}"] += 1


def _as_bias(mask, query, key):
    "The bias that SDPA makes of a `mask`: in numbers, its rows padded to a multiple of 16, and for every head."
    if mask.dtype == torch.bool:
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype, device=query.device), -np.inf)
    if mask.shape[-1] % 16: mask = F.pad(mask, (0, -mask.shape[-1] % 16))[..., :mask.shape[-1]]
    return mask.expand(*query.shape[:3], key.shape[2])


def patched():
    "A context in which the library's attention on `cuda` is this one."
    from torch.nn.attention import bias
    import underdog.model.attention as ours
    places = [bias] + [ours]*hasattr(ours, 'causal_lower_right')
    patches = [mock.patch.object(F, 'scaled_dot_product_attention', attention)]
    return patches + [mock.patch.object(place, 'causal_lower_right', LowerRight) for place in places]


# ---- its kernels, on a CPU's tensors
def _scores(query, key, bias, is_causal, scale):
    "(B, H, M, N) float32."
    scores = query.float() @ key.float().mT*(scale or query.shape[-1]**-.5)
    if bias is not None: scores = scores + bias.float()
    if is_causal: scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -np.inf)
    return scores


def _kept(weights, dropout_p, seed):
    "Dropout's factors."
    if not dropout_p: return 1.
    kept = torch.rand(weights.shape, generator=torch.Generator().manual_seed(int(seed))) >= dropout_p
    return kept/(1 - dropout_p)


def _forward(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0., is_causal=False, *, scale=None):
    "As `aten::_scaled_dot_product_efficient_attention`."
    scores, seed = _scores(query, key, attn_bias, is_causal, scale), torch.randint(2**31, ())
    weights = scores.softmax(-1)
    output = (weights*_kept(weights, dropout_p, seed) @ value.float()).to(query.dtype)
    # laid out token by token
    output = output.transpose(1, 2).contiguous().transpose(1, 2)
    return output, scores.logsumexp(-1), seed, torch.zeros((), dtype=torch.long)


def _backward(grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p,
              grad_input_mask, is_causal=False, *, scale=None):
    "As `aten::_scaled_dot_product_efficient_attention_backward`."
    grad = grad_out_.float()
    weights = (_scores(query, key, attn_bias, is_causal, scale) - logsumexp[..., None]).exp()
    kept = _kept(weights, dropout_p, philox_seed)
    grad_v = (weights*kept).mT @ grad
    # softmax backward
    grad_weights = grad @ value.float().mT*kept
    grad_scores = weights*(grad_weights - (grad*out.float()).sum(-1, keepdim=True))
    factor = scale or query.shape[-1]**-.5
    grad_q, grad_k = grad_scores @ key.float()*factor, grad_scores.mT @ query.float()*factor
    grad_bias = grad_scores.to(attn_bias.dtype) if attn_bias is not None and grad_input_mask[3] else None
    return grad_q.to(query.dtype), grad_k.to(key.dtype), grad_v.to(value.dtype), grad_bias


def _one_span(query, key): return [torch.tensor([0, x.shape[1]], dtype=torch.int32) for x in (query, key)]


def _spans_forward(query, key, value, bias, starts_q, starts_k, longest_q, longest_k, dropout_p, custom_mask_type,
                   compute_log_sumexp=False, **how):
    "As `aten::_efficient_attention_forward`: of many spans, or of one."
    if starts_q is None:
        assert len(query) == 1
        starts_q, starts_k = _one_span(query, key)
        longest_q, longest_k = query.shape[1], key.shape[1]
    return efficient_attention_forward(query, key, value, bias, starts_q, starts_k, longest_q, longest_k, dropout_p,
                                       custom_mask_type, compute_log_sumexp, **how)


def _spans_backward(grad_out_, query, key, value, bias, out, starts_q, starts_k, longest_q, longest_k, logsumexp,
                    dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, **how):
    "As `aten::_efficient_attention_backward`."
    if starts_q is None:
        starts_q, starts_k = _one_span(query, key)
        longest_q, longest_k = query.shape[1], key.shape[1]
        # PyTorch itself does this where a kernel's logsumexp comes back to it
        logsumexp = logsumexp.clone()
        logsumexp[..., longest_q:] = np.inf
    return efficient_attention_backward(
        grad_out_, query, key, value, bias, out, starts_q, starts_k, longest_q, longest_k, logsumexp, dropout_p,
        philox_seed, philox_offset, custom_mask_type, bias_requires_grad, **how)


KERNELS = {   # what runs in their place
    aten._scaled_dot_product_efficient_attention.default: _forward,
    aten._scaled_dot_product_efficient_attention_backward.default: _backward,
    aten._efficient_attention_forward.default: _spans_forward,
    aten._efficient_attention_backward.default: _spans_backward,
}
