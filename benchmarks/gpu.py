"""Useful tokens per second on a CUDA card: underdog beside the Hugging Face recipes, with the shapes of real models.

    python -m benchmarks.gpu [--models mistral-7b gemma-2-9b deberta-v3-large] [--rows 32] [--rounds 3]

Weights are random and made on the card: nothing is downloaded. Decoders in nf4 (training and inference) and int8 (inference), LoRA on all linear layers; the peers compute the same rows padded, in
random batches and grouped by length, with the k-bit recipe's recomputation and input gradients. The share of the card's own fp16 matmul rate and a projection for a T4 (24 TFLOP/s) are printed.
Without a card it says so and ends. The last line of output is JSON; commit it with the card's name.
"""
import argparse
import statistics
import time

import numpy as np

from benchmarks.common import FRAME, last_line, make_prompter, row_lengths, spread, table

T4_FLOPS, DEQUANT_BANDWIDTH = 24e12, 256e9   # sustained fp16 rate at 70 W, memory bandwidth in use (both cited, not measured here)
ROWS, BUDGET, RANK = 8, 4096, 16
SHAPES = {   # published config.json of the models
    'mistral-7b': ('mistral', dict(vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128, sliding_window=None)),
    'gemma-2-9b': ('gemma2', dict(vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16, num_key_value_heads=8, head_dim=256, attn_logit_softcapping=None)),
    'deberta-v3-large': ('deberta-v2', dict(vocab_size=128100, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, max_position_embeddings=512, relative_attention=True, position_buckets=256,
                                            norm_rel_ebd='layer_norm', share_att_key=True, pos_att_type=['p2c', 'c2p'], position_biased_input=False, type_vocab_size=0, max_relative_positions=-1)),
}


def quantized(weight, kind, dtype):
    "A frozen linear layer with these weights in nf4, int8 or as they are."
    import torch
    from bitsandbytes import nn as bnb
    out, width = weight.shape
    if kind == 'nf4':
        layer = bnb.Linear4bit(width, out, bias=False, compute_dtype=dtype, quant_type='nf4', compress_statistics=True)
        layer.weight = bnb.Params4bit(weight, requires_grad=False, quant_type='nf4', compress_statistics=True)
    elif kind == 'int8':
        layer = bnb.Linear8bitLt(width, out, bias=False, has_fp16_weights=False, threshold=0.)
        layer.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = torch.nn.Linear(width, out, bias=False, dtype=dtype)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer.to(weight.device)


def build(model_type, shape, kind, head, device, dtype):
    "A `PreferenceModel` of this shape with random weights, made on `device` layer by layer, so that it never exists in 16 bits as a whole."
    import torch
    from transformers import AutoConfig, AutoModel

    from underdog.model.attention import Planner, attention_of
    from underdog.model.head import make_head
    from underdog.model.model import ModelConfig, PreferenceModel, _load_bitsandbytes, add_lora
    if kind != 'none': _load_bitsandbytes()
    config = AutoConfig.for_model(model_type, **shape)
    config.use_cache = False
    with torch.device('meta'): backbone = AutoModel.from_config(config, attn_implementation=attention_of(config) if model_type != 'deberta-v2' else 'eager', dtype=dtype)
    if model_type == 'gemma2': backbone.config._attn_implementation = attention_of(config)
    for name, module in list(backbone.named_modules()):
        if isinstance(module, torch.nn.Linear) and module.bias is None:
            parent = backbone.get_submodule(name.rpartition('.')[0])
            setattr(parent, name.rpartition('.')[2], quantized(torch.randn(module.weight.shape, device=device, dtype=dtype)*.02, kind, dtype))
    for module in backbone.modules():
        for name, p in module.named_parameters(recurse=False):
            if p.is_meta: setattr(module, name, torch.nn.Parameter(torch.randn(p.shape, device=device, dtype=dtype)*.02 if p.dim() > 1 else torch.ones(p.shape, device=device, dtype=dtype) if 'weight' in name else torch.zeros(p.shape, device=device, dtype=dtype)))
        for name, b in module.named_buffers(recurse=False):
            if b.is_meta: module.register_buffer(name, torch.arange(b.numel(), device=device).reshape(b.shape), persistent=False)
    if hasattr(backbone, 'rotary_emb'):
        with torch.device(device): backbone.rotary_emb = type(backbone.rotary_emb)(config)
    backbone.requires_grad_(False)
    planner, cfg = Planner(backbone), ModelConfig('random', head=head, rank=RANK, pooling='read', quantization='none')
    return PreferenceModel(cfg, add_lora(backbone, cfg), make_head(cfg, config.hidden_size).to(device), dtype, 'seeded', '', planner)


def linear_weights(model):
    "P: multiply-adds of a token in the frozen linear layers."
    return sum(m.in_features*m.out_features for n, m in model.backbone.named_modules() if n.endswith('base_layer'))


def matmul_rate(device, n=8192, seconds=2.):
    "The card's own fp16 rate in FLOP/s: a product of two n × n matrices, again and again."
    import torch
    a = torch.randn(n, n, device=device, dtype=torch.float16)
    for _ in range(3): a @ a
    torch.cuda.synchronize()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(5): a @ a
        torch.cuda.synchronize()
        count += 5
    return 2*n**3*count/(time.perf_counter() - start)


def synchronize(device):
    import torch
    if str(device).startswith('cuda'): torch.cuda.synchronize()


def batches_of(lengths, how, head, model):
    "The batches of one pass over rows of these lengths: packed ('underdog'), or padded in eights in 'random' or 'grouped' order."
    import datasets

    from underdog.text.source import RowSource
    rng = np.random.default_rng(0)
    tokens = datasets.Dataset.from_list([{c: rng.integers(10, 500, k).tolist() for c, k in zip(('prompt', 'a', 'b'), row)} for row in lengths])
    source = RowSource(tokens, make_prompter(head), model.packing if how == 'underdog' else '')
    order = np.argsort(-lengths.sum(1), kind='stable') if how == 'grouped' else np.arange(len(lengths))
    parts = source.bins(np.arange(len(lengths)), BUDGET) if how == 'underdog' else [order[i:i + ROWS] for i in range(0, len(order), ROWS)]
    return [source.batch([(r, False) for r in part]) for part in parts]


def seconds_of(model, batches, device, train):
    "Wall seconds of one pass over `batches`, the device synchronized."
    import torch
    model.train(train)
    synchronize(device)
    start = time.perf_counter()
    for batch in batches:
        with torch.set_grad_enabled(train): logits = model(batch.to(device))
        if train: logits.square().sum().backward()
    synchronize(device)
    model.zero_grad()
    return time.perf_counter() - start


def kbit_recipe(model):
    "What `prepare_model_for_kbit_training` does to a step: the embeddings' output asks for a gradient, every layer is recomputed."
    from underdog.model.memory import blocks, recompute
    for layer in blocks(model.backbone): recompute(layer)
    base = model.backbone.get_base_model()
    return base.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))


def measure(name, kind, lengths, rounds, device, dtype, ceiling):
    "Results of one model in one precision: a dict for each job and way of batching; a job that runs out of memory is named and left out."
    import torch
    model_type, shape = SHAPES[name]
    model, useful = build(model_type, shape, kind, 'joint', device, dtype), int(lengths.sum() + sum(len(FRAME[n]) for n in ('start', 'label_a', 'label_b', 'end'))*len(lengths))
    P, rates, peaks = linear_weights(model), {}, {}
    jobs = [('infer', how, False) for how in ('underdog', 'random', 'grouped')] + ([('train', how, True) for how in ('underdog', 'random', 'grouped')] if kind != 'int8' else [])
    for kbit in (False, True):   # recomputation cannot be undone: last
        if kbit: kbit_recipe(model)
        for job, how, train in (jobs if not kbit else [('train, k-bit recipe', 'random', True)] if kind == 'nf4' else []):
            batches = batches_of(lengths, how, 'joint', model)
            if str(device).startswith('cuda'): torch.cuda.reset_peak_memory_stats()
            try: times = [seconds_of(model, batches, device, train) for _ in range(rounds + 1)][1:]   # the first one warms up
            except torch.OutOfMemoryError:
                print(f'{name} {kind}: {job} {how} does not fit into memory')
                model.zero_grad()
                torch.cuda.empty_cache()
                continue
            rates[job, how] = useful/statistics.median(times)
            peaks[job, how] = torch.cuda.max_memory_allocated()/1e9 if str(device).startswith('cuda') else float('nan')
    return [dict(model=name, precision=kind, job=job, how=how, useful_tokens_per_s=r, share_of_ceiling=r*P*(2 if job == 'infer' else 4)/ceiling, peak_gb=peaks[job, how],
                 t4_tokens_per_s=projected(P, 2 if job == 'infer' else 4, kind) if how == 'underdog' else None) for (job, how), r in rates.items()]


def projected(P, factor, kind):
    "Useful tokens per second of one T4 by formula: factor·P operations a token at the sustained rate, and the dequantization of nf4 once a pass, forward and backward, shared by the tokens of a micro-batch."
    dequant = 2.5*P/DEQUANT_BANDWIDTH*(factor/2)/BUDGET if kind == 'nf4' else 0
    return 1/(factor*P/T4_FLOPS + dequant)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=list(SHAPES), default=list(SHAPES), help='shapes to run (default: all)')
    parser.add_argument('--rows', type=int, default=32, help='rows with the lengths of LMSYS (default 32)')
    parser.add_argument('--rounds', type=int, default=3, help='timed passes of each (default 3)')
    args = parser.parse_args()
    import torch
    if not torch.cuda.is_available():
        print('skipped: no CUDA device here; run it on a card')
        return last_line(dict(skipped='no CUDA device'))
    from underdog.machine import pick_dtype, quiet
    quiet()
    device, dtype = 'cuda:0', pick_dtype('cuda:0')[0]
    lengths, origin = row_lengths(scale=1)
    lengths, ceiling = lengths[spread(lengths.sum(1), args.rows, np.random.default_rng(0))], matmul_rate(device)
    lengths = np.random.default_rng(1).permutation(lengths)
    print(f'{torch.cuda.get_device_name()}: {ceiling/1e12:.0f} TFLOP/s in fp16 products; lengths of {origin}')
    rows = [r for name in args.models for kind in (('none',) if name.startswith('deberta') else ('nf4', 'int8')) for r in measure(name, kind, lengths, args.rounds, device, dtype, ceiling)]
    table('useful tokens', ('model', 'precision', 'job', 'how', 'tokens/s', 'share of ceiling', 'peak GB', 'T4 by formula'),
          [(r['model'], r['precision'], r['job'], r['how'], r['useful_tokens_per_s'], r['share_of_ceiling'], r['peak_gb'], r['t4_tokens_per_s'] or '') for r in rows])
    print(f'T4 by formula: 1/(factor·P/{T4_FLOPS:.0e} + 2.5·P/{DEQUANT_BANDWIDTH:.0e}·(factor/2)/{BUDGET}), factor 2 for inference, 4 for training; the second term only in nf4')
    last_line(dict(card=torch.cuda.get_device_name(), ceiling_tflops=ceiling/1e12, rows=rows))


if __name__ == '__main__': main()
