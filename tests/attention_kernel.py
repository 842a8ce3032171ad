"""A stand-in for PyTorch's memory-efficient attention: a CPU's version with the same arguments, results and traps."""
import numpy as np
import torch

from underdog.model.varlen import Operators


def stand_in(forward=lambda outputs: outputs, backward=lambda grads: grads):
    "`Operators` for a CPU; `forward` and `backward` may spoil what they return."
    return Operators(lambda **arguments: forward(efficient_attention_forward(**arguments)),
                     lambda **arguments: backward(efficient_attention_backward(**arguments)))


def spans_of(cu_seqlens_q, cu_seqlens_k):
    "((first, end) of queries, (first, end) of keys) of every span."
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    return zip(zip(starts_q, starts_q[1:]), zip(starts_k, starts_k[1:]), strict=True)


def scores_of(q, k, custom_mask_type, scale, window_size):
    "(H, n, m) of q (n, H, D) and k (m, H, D), masked."
    n, m, scale = len(q), len(k), scale or q.shape[-1]**-.5
    distance = torch.arange(m - n, m)[:, None] - torch.arange(m)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if custom_mask_type == 2: visible &= distance >= 0
    if window_size: visible &= distance < window_size
    scores = torch.einsum('nhd,mhd->hnm', q.float(), k.float())*scale
    return scores.masked_fill(~visible, -np.inf)


def efficient_attention_forward(
        query, key, value, bias, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, custom_mask_type,
        compute_log_sumexp=False, *, scale=None, seqlen_k=None, window_size=None):
    "As `aten::_efficient_attention_forward`; the places of logsumexp that belong to no query hold anything, here NaN."
    assert bias is None and not dropout_p and custom_mask_type in (0, 2)
    assert query.shape[2:] == key.shape[2:] == value.shape[2:], 'the kernel has no grouped queries'
    spans = list(spans_of(cu_seqlens_q, cu_seqlens_k))
    assert max_seqlen_q == max(end - first for (first, end), _ in spans)
    assert max_seqlen_k == max(end - first for _, (first, end) in spans)
    output = torch.full(query.shape, np.nan, dtype=query.dtype)
    places = -(-max_seqlen_q//32)*32 if compute_log_sumexp else 0
    logsumexp = torch.full((len(spans), query.shape[2], places), np.nan)
    for i, ((first, end), (first_k, end_k)) in enumerate(spans):
        q, k, v = query[0, first:end], key[0, first_k:end_k], value[0, first_k:end_k]
        scores = scores_of(q, k, custom_mask_type, scale, window_size)
        output[0, first:end] = torch.einsum('hnm,mhd->nhd', scores.softmax(-1), v.float()).to(query.dtype)
        if compute_log_sumexp: logsumexp[i, :, :end - first] = scores.logsumexp(-1)
    return output, logsumexp, torch.zeros((), dtype=torch.long), torch.zeros((), dtype=torch.long), \
        max_seqlen_q, max_seqlen_k


def efficient_attention_backward(
        grad_out_, query, key, value, bias, out, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, logsumexp,
        dropout_p, philox_seed, philox_offset, custom_mask_type, bias_requires_grad, *, scale=None,
        num_splits_key=None, window_size=None, shared_storage_dqdkdv=False):
    "As `aten::_efficient_attention_backward`: from the output and logsumexp, which must be inf where no query is."
    assert bias is None and not bias_requires_grad and not dropout_p
    assert logsumexp.shape[-1] % 32 == 0 and logsumexp.shape[-1] >= max_seqlen_q
    grad_q, grad_k, grad_v = (torch.full(x.shape, np.nan, dtype=x.dtype) for x in (query, key, value))
    for i, ((first, end), (first_k, end_k)) in enumerate(spans_of(cu_seqlens_q, cu_seqlens_k)):
        assert (logsumexp[i, :, end - first:] == np.inf).all()
        q, k, v = query[0, first:end], key[0, first_k:end_k], value[0, first_k:end_k]
        grad, o = grad_out_[0, first:end].float(), out[0, first:end].float()
        scores = scores_of(q, k, custom_mask_type, scale, window_size)
        weights = (scores - logsumexp[i, :, :end - first, None]).exp()
        # softmax backward
        grad_weights = torch.einsum('nhd,mhd->hnm', grad, v.float())
        delta = (grad*o).sum(-1).T[..., None]
        grad_scores = weights*(grad_weights - delta)*(scale or q.shape[-1]**-.5)
        grad_q[0, first:end] = torch.einsum('hnm,mhd->nhd', grad_scores, k.float()).to(query.dtype)
        grad_k[0, first_k:end_k] = torch.einsum('hnm,nhd->mhd', grad_scores, q.float()).to(key.dtype)
        grad_v[0, first_k:end_k] = torch.einsum('hnm,nhd->mhd', weights, grad).to(value.dtype)
    return grad_q, grad_k, grad_v, torch.empty(())
