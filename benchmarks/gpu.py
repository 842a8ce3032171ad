"""Useful tokens per second on a CUDA card: underdog beside the Hugging Face recipes, with the shapes of real models.

    python -m benchmarks.gpu [--models mistral-7b gemma-2-9b deberta-v3-large] [--rows 32] [--rounds 3]

Weights are random and made on the card: nothing is downloaded. Decoders in nf4 (training and inference) and int8
(inference), LoRA on all linear layers; the peers compute the same rows padded, in random batches and grouped by length,
with the k-bit recipe's recomputation and input gradients. The share of the card's own fp16 matmul rate and a projection
for a T4 (24 TFLOP/s) are printed. Without a card it says so and ends. The last line of output is JSON; commit it with
the card's name.
"""
import argparse
import statistics
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.common import FRAME, last_line, make_prompter, make_tokens, row_lengths, spread, table

T4_FLOPS = 24e12            # sustained fp16 rate at 70 W (cited, not measured here)
DEQUANT_BANDWIDTH = 256e9   # memory bandwidth in use while nf4 is unpacked (cited, not measured here)
ROWS, BUDGET, RANK = 8, 4096, 16
SHAPES = {   # published config.json of the models
    'mistral-7b': ('mistral', dict(
        vocab_size=32768, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, sliding_window=None)),
    'gemma-2-9b': ('gemma2', dict(
        vocab_size=256000, hidden_size=3584, intermediate_size=14336, num_hidden_layers=42, num_attention_heads=16,
        num_key_value_heads=8, head_dim=256, attn_logit_softcapping=None)),
    'deberta-v3-large': ('deberta-v2', dict(
        vocab_size=128100, hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        max_position_embeddings=512, relative_attention=True, position_buckets=256, norm_rel_ebd='layer_norm',
        share_att_key=True, pos_att_type=['p2c', 'c2p'], position_biased_input=False, type_vocab_size=0,
        max_relative_positions=-1)),
}


@dataclass(frozen=True)
class Place:
    "Where a model computes, and in what."
    device: str
    dtype: object      # of torch
    ceiling: float     # the device's own fp16 rate in FLOP/s

    @property
    def cuda(self): return str(self.device).startswith('cuda')

    def synchronize(self):
        import torch
        if self.cuda: torch.cuda.synchronize()


# ---- models with random weights
def quantized(weight, kind, dtype):
    "A frozen linear layer with these weights in nf4, int8 or as they are."
    import torch
    from bitsandbytes import nn as bnb
    out, width = weight.shape
    # nf4: what QLoRA trains on
    if kind == 'nf4':
        layer = bnb.Linear4bit(width, out, bias=False, compute_dtype=dtype, quant_type='nf4', compress_statistics=True)
        layer.weight = bnb.Params4bit(weight, requires_grad=False, quant_type='nf4', compress_statistics=True)
    # int8: inference only
    elif kind == 'int8':
        layer = bnb.Linear8bitLt(width, out, bias=False, has_fp16_weights=False, threshold=0.)
        layer.weight = bnb.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = torch.nn.Linear(width, out, bias=False, dtype=dtype)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer.to(weight.device)


def build(name, kind, head, place):
    "A `PreferenceModel` of the shape `name` with random weights, made layer by layer: never whole in 16 bits."
    import torch
    from transformers import AutoConfig, AutoModel

    from underdog.model.planner import Planner, attention_of
    from underdog.model.backbone import load_bitsandbytes
    from underdog.model.head import make_head
    from underdog.model.lora import add_lora
    from underdog.model.model import PreferenceModel
    from underdog.model.settings import ModelConfig
    if kind != 'none': load_bitsandbytes()
    # shapes without weights
    model_type, shape = SHAPES[name]
    config = AutoConfig.for_model(model_type, **shape)
    config.use_cache = False
    attention = 'eager' if model_type == 'deberta-v2' else attention_of(config)
    with torch.device('meta'):
        backbone = AutoModel.from_config(config, attn_implementation=attention, dtype=place.dtype)
    if model_type == 'gemma2': backbone.config._attn_implementation = attention_of(config)
    # weights
    fill_linear(backbone, kind, place)
    fill_rest(backbone, place)
    if hasattr(backbone, 'rotary_emb'):
        with torch.device(place.device): backbone.rotary_emb = type(backbone.rotary_emb)(config)
    backbone.requires_grad_(False)
    # adapters and head
    planner = Planner(backbone)
    planner.choose(config, place.device, place.dtype)
    if place.cuda: print(f'{name}: {planner.attention.line}')
    cfg = ModelConfig('random', head=head, rank=RANK, pooling='read', quantization='none')
    head_module = make_head(cfg, config.hidden_size).to(place.device)
    return PreferenceModel(cfg, add_lora(backbone, cfg), head_module, place.dtype,
                           head_source='seeded', base_hash='', planner=planner)


def random_weight(shape, place):
    import torch
    return torch.randn(shape, device=place.device, dtype=place.dtype)*.02


def fill_linear(backbone, kind, place):
    "Replace every linear layer without a bias by one with random weights in the precision `kind`."
    import torch
    for name, module in list(backbone.named_modules()):
        if not isinstance(module, torch.nn.Linear) or module.bias is not None: continue
        parent, _, own_name = name.rpartition('.')
        layer = quantized(random_weight(module.weight.shape, place), kind, place.dtype)
        setattr(backbone.get_submodule(parent), own_name, layer)


def fill_rest(backbone, place):
    "Random matrices, norms of one, biases of zero, buffers of positions."
    import torch
    options = dict(device=place.device, dtype=place.dtype)
    # only what is still without weights
    for module in backbone.modules():
        for name, p in module.named_parameters(recurse=False):
            if not p.is_meta: continue
            if p.dim() > 1: weight = random_weight(p.shape, place)
            elif 'weight' in name: weight = torch.ones(p.shape, **options)
            else: weight = torch.zeros(p.shape, **options)
            setattr(module, name, torch.nn.Parameter(weight))
        for name, b in module.named_buffers(recurse=False):
            if not b.is_meta: continue
            positions = torch.arange(b.numel(), device=place.device).reshape(b.shape)
            module.register_buffer(name, positions, persistent=False)


def linear_weights(model):
    "P: multiply-adds of a token in the frozen linear layers."
    layers = [module for name, module in model.backbone.named_modules() if name.endswith('base_layer')]
    return sum(layer.in_features*layer.out_features for layer in layers)


def kbit_recipe(model):
    "What `prepare_model_for_kbit_training` does to a step: embeddings ask for a gradient, every layer is recomputed."
    from underdog.model.memory import blocks, recompute
    for layer in blocks(model.backbone): recompute(layer)
    embeddings = model.backbone.get_base_model().get_input_embeddings()
    return embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_(True))


# ---- time
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


def batches_of(lengths, how, head, model):
    "One pass over rows of these lengths: packed ('underdog'), or padded in eights in 'random' or 'grouped' order."
    from underdog.text.source import RowSource
    source = RowSource(make_tokens(lengths, vocab=500), make_prompter(head), model.packing if how == 'underdog' else '')
    if how == 'underdog': parts = source.bins(np.arange(len(lengths)), BUDGET)
    else:
        order = np.argsort(-lengths.sum(1), kind='stable') if how == 'grouped' else np.arange(len(lengths))
        parts = [order[i:i + ROWS] for i in range(0, len(order), ROWS)]
    return [source.batch([(row, False) for row in part]) for part in parts]


def seconds_of(model, batches, place, train):
    "Wall seconds of one pass over `batches`, the device synchronized."
    import torch
    model.train(train)
    place.synchronize()
    start = time.perf_counter()
    for batch in batches:
        with torch.set_grad_enabled(train): logits = model(batch.to(place.device))
        if train: logits.square().sum().backward()
    place.synchronize()
    model.zero_grad()
    return time.perf_counter() - start


# ---- the jobs of a model
@dataclass(frozen=True)
class Job:
    "Something to be timed."
    name: str
    how: str     # batches, as of `batches_of`
    train: bool

    @property
    def factor(self):
        "Operations of a token over P: forward 2, the backward pass of adapters as much again."
        return 4 if self.train else 2


def jobs_of(kind):
    "(jobs, jobs with the k-bit recipe) of a model in the precision `kind`."
    ways = ('underdog', 'random', 'grouped')
    jobs = [Job('infer', how, False) for how in ways]
    if kind != 'int8': jobs += [Job('train', how, True) for how in ways]
    recipe = [Job('train, k-bit recipe', 'random', True)] if kind == 'nf4' else []
    return jobs, recipe


def measure(name, kind, lengths, rounds, place):
    "A dict for each job of one model in one precision; a job that runs out of memory is named and left out."
    frame = sum(len(FRAME[n]) for n in ('start', 'label_a', 'label_b', 'end'))
    useful = int(lengths.sum() + frame*len(lengths))
    model = build(name, kind, 'joint', place)
    P, rows = linear_weights(model), []
    jobs, recipe = jobs_of(kind)
    # the recipe last, as its recomputation cannot be undone
    for job in (*jobs, *recipe):
        if job in recipe: kbit_recipe(model)
        seconds, peak_gb = median_of(model, job, lengths, rounds=rounds, place=place)
        if seconds is None:
            print(f'{name} {kind}: {job.name} {job.how} does not fit into memory')
            continue
        rate = useful/seconds
        # what is known survives a stop
        print(f'{name} {kind}: {job.name} {job.how}, {rate:,.0f} useful tokens/s', flush=True)
        rows.append(dict(
            model=name,
            precision=kind,
            job=job.name,
            how=job.how,
            useful_tokens_per_s=rate,
            share_of_ceiling=rate*P*job.factor/place.ceiling,
            peak_gb=peak_gb,
            t4_tokens_per_s=projected(P, job.factor, kind) if job.how == 'underdog' else None,
        ))
    return rows


def median_of(model, job, lengths, rounds, place):
    "(median seconds of `rounds` passes, GB at the peak); (None, None) when memory runs out."
    import torch
    batches = batches_of(lengths, job.how, 'joint', model)
    if place.cuda: torch.cuda.reset_peak_memory_stats()
    # the first pass warms up
    try: times = [seconds_of(model, batches, place, job.train) for _ in range(rounds + 1)][1:]
    except torch.OutOfMemoryError:
        model.zero_grad()
        torch.cuda.empty_cache()
        return None, None
    return statistics.median(times), torch.cuda.max_memory_allocated()/1e9 if place.cuda else float('nan')


def projected(P, factor, kind):
    """Useful tokens per second of one T4 by formula.

    factor·P operations a token at the sustained rate; in nf4 also the dequantization, once a pass, forward and
    backward, shared by the tokens of a micro-batch."""
    dequant = 2.5*P/DEQUANT_BANDWIDTH*(factor/2)/BUDGET if kind == 'nf4' else 0
    return 1/(factor*P/T4_FLOPS + dequant)


def show(rows):
    "Print the table of `measure`d rows."
    columns = ('model', 'precision', 'job', 'how', 'tokens/s', 'share of ceiling', 'peak GB', 'T4 by formula')
    keys = ('model', 'precision', 'job', 'how', 'useful_tokens_per_s', 'share_of_ceiling', 'peak_gb')
    table('useful tokens', columns, [(*(row[k] for k in keys), row['t4_tokens_per_s'] or '') for row in rows])
    print(f'T4 by formula: 1/(factor·P/{T4_FLOPS:.0e} + 2.5·P/{DEQUANT_BANDWIDTH:.0e}·(factor/2)/{BUDGET}), '
          'factor 2 for inference, 4 for training; the second term only in nf4')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', choices=list(SHAPES), default=list(SHAPES),
                        help='shapes to run (default: all)')
    parser.add_argument('--rows', type=int, default=32, help='rows with the lengths of LMSYS (default 32)')
    parser.add_argument('--rounds', type=int, default=3, help='timed passes of each (default 3)')
    args = parser.parse_args()
    import torch
    if not torch.cuda.is_available():
        print('skipped: no CUDA device here; run it on a card')
        return last_line(dict(skipped='no CUDA device'))
    # the card
    from underdog.machine import pick_dtype, quiet
    quiet()
    device = 'cuda:0'
    place = Place(device, pick_dtype(device)[0], matmul_rate(device))
    # the rows
    lengths, origin = row_lengths(scale=1)
    lengths = lengths[spread(lengths.sum(1), args.rows, np.random.default_rng(0))]
    lengths = np.random.default_rng(1).permutation(lengths)
    card, tflops = torch.cuda.get_device_name(), place.ceiling/1e12
    print(f'{card}: {tflops:.0f} TFLOP/s in fp16 products; lengths of {origin}')
    # every model in its precisions
    rows = []
    for name in args.models:
        for kind in ('none',) if name.startswith('deberta') else ('nf4', 'int8'):
            rows += measure(name, kind, lengths, rounds=args.rounds, place=place)
    show(rows)
    last_line(dict(card=card, ceiling_tflops=tflops, rows=rows))


if __name__ == '__main__': main()
