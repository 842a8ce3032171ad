"""Rows per CPU second of a prediction: underdog's packed rows beside padded batches, and what both orders, pair and symmetric cost.

    python -m benchmarks.infer [--rounds 9] [--rows 64]

The same small Llama with LoRA, fp32, one thread; a test set of 25,000 rows with the lengths of LMSYS (cut at 2,048, divided by 5). The peers: batches of 8 in file order with dynamic padding, and the
public inference notebook's way, all rows sorted by length first; a round computes some of each one's batches, spread evenly over the sizes that occur. Counters without noise come first, then paired rounds in random order; last, one worker process against two, in wall time on as many cores.
See benchmarks/README.md. The last line of output is JSON.
"""
import argparse
import os
import tempfile
import time
from functools import partial

import numpy as np

from benchmarks.common import RANK, cpu_time, last_line, make_base, make_prompter, make_tokens, one_thread, paired_rounds, ratios, row_lengths, spread, table

ROWS, BUDGET = 8, 2048


def load(base, head):
    "The model of `head`, ready to predict; its LoRA moved away from its start."
    import torch

    from underdog.model.model import ModelConfig, adapter_parameters, load_model
    model = load_model(ModelConfig(base, head=head, rank=RANK, alpha=RANK, quantization='none')).eval()
    generator = torch.Generator().manual_seed(0)
    for p in adapter_parameters(model): p.data.normal_(0, .02, generator=generator)
    return model


def peer(model, tokens):
    "(logits, padded tokens) of batches of 8 rows as they come, dynamically padded: transformers' own forward pass."
    import torch

    from underdog.text.source import RowSource
    source, out, padded = RowSource(tokens, make_prompter('joint')), np.empty((len(tokens), 3), np.float32), 0
    with torch.no_grad():
        for part in np.arange(len(tokens)).reshape(-1, ROWS):
            batch = source.batch([(r, False) for r in part])
            out[part] = model(batch).numpy()
            padded += batch.padded
    return out, padded


def ours(model, head, tokens, orders=(False,)):
    "(logits of the first order, tokens computed) of packed parts."
    from underdog.text.source import RowSource
    from underdog.model.predict import part_logits
    source, out = RowSource(tokens, make_prompter(head), 'causal'), np.empty((len(orders), len(tokens), 3), np.float32)
    parts = source.bins(np.arange(len(tokens)), BUDGET, orders)
    for part in parts: out[:, part] = part_logits(model, source, part, orders).numpy()
    return out[0], int(source.tokens_of(orders).sum())


def operations(run):
    "Floating-point operations of `run`."
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH): run()
    return counter.get_total_flops()


def start(base, lengths, device):
    "A worker: model and rows loaded, then logits of a part."
    one_thread()
    from underdog.text.source import RowSource
    from underdog.model.predict import part_logits
    model, source = load(base, 'joint'), RowSource(make_tokens(lengths), make_prompter('joint'), 'causal')
    part_logits(model, source, [0])   # first calls allocate
    return lambda part: part_logits(model, source, part).numpy()


def wall_time(base, lengths, parts, workers):
    "(seconds, logits) of all parts with so many worker processes, from the moment all are ready."
    from underdog.inference.workers import Workers
    out = np.empty((len(lengths), 3), np.float32)
    def done(i, result): out[parts[i]] = result[0]
    with Workers(partial(start, base, lengths), ['cpu']*workers) as pool:
        pool.wait_until_ready()
        began = time.perf_counter()
        pool.run(parts, done)
        return time.perf_counter() - began, out


def two_workers(base, lengths, rounds=3):
    "Speed-up of two worker processes over one on rows of these lengths, by the clock, a few times; the results must be equal."
    from underdog.text.source import RowSource
    parts = RowSource(make_tokens(lengths), make_prompter('joint'), 'causal').bins(np.arange(len(lengths)), BUDGET//2)
    speedups = []
    for _ in range(rounds):
        (one, a), (two, b) = wall_time(base, lengths, parts, 1), wall_time(base, lengths, parts, 2)
        assert np.array_equal(a, b)
        speedups.append(one/two)
        print(f'{len(parts)} parts: one worker {one:.1f} s, two {two:.1f} s (wall), load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores', flush=True)
    return speedups


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=9, help='paired rounds (default 9)')
    parser.add_argument('--rows', type=int, default=64, help='rows per side and round (default 64)')
    args = parser.parse_args()
    one_thread()
    lengths, origin = row_lengths(25_000)
    base = make_base(tempfile.mkdtemp() + '/base')
    print(f'lengths of {origin}')
    models = {head: load(base, head) for head in ('joint', 'pair', 'symmetric')}
    total = lengths.sum(1)
    policies = {name: order[:len(order)//ROWS*ROWS].reshape(-1, ROWS) for name, order in (('file order', np.arange(len(total))), ('sorted', np.argsort(total, kind='stable')))}

    def pick(policy, i):
        "Whole batches of a policy, for round `i`."
        at = spread(total[policies[policy]].max(1), args.rows//ROWS, np.random.default_rng(i))
        return make_tokens(lengths[policies[policy][at]].reshape(-1, 3), seed=i)

    def rows(i): return make_tokens(lengths[spread(total, args.rows, np.random.default_rng(i))], seed=i)
    sides = {'padded, file order': (lambda i: pick('file order', i), lambda t: peer(models['joint'], t)), 'padded, sorted': (lambda i: pick('sorted', i), lambda t: peer(models['joint'], t)),
             'underdog, one order': (rows, lambda t: ours(models['joint'], 'joint', t)), 'underdog, both orders': (rows, lambda t: ours(models['joint'], 'joint', t, (False, True))),
             'underdog, pair': (rows, lambda t: ours(models['pair'], 'pair', t)), 'underdog, symmetric': (rows, lambda t: ours(models['symmetric'], 'symmetric', t))}
    useful = lambda tokens: sum(len(row[c]) for row in tokens for c in ('prompt', 'a', 'b'))

    # ---- counters without noise
    (reference, _), (mine, _) = peer(models['joint'], rows(0)), ours(models['joint'], 'joint', rows(0))
    difference = float(np.abs(reference - mine).max())
    counters = {}
    for name, (draw, run) in sides.items():
        tokens = draw(0)
        counters[name] = [run(tokens)[1]/useful(tokens), operations(lambda: run(tokens))/useful(tokens)]
    base_counters = counters['underdog, one order']
    counters = {name: [x/y for x, y in zip(v, base_counters)] for name, v in counters.items()}
    table('without noise: for each useful token, one order without padding = 1', ('', 'tokens computed', 'operations'), [(k, *v) for k, v in counters.items()])
    print(f'largest difference of logits, packed to padded: {difference:.1e}')

    # ---- paired rounds
    def timed(draw, run):
        def side(i):
            tokens = draw(i)
            return useful(tokens), cpu_time(lambda: run(tokens))[1]
        return side
    results = paired_rounds({name: timed(*side) for name, side in sides.items()}, args.rounds)
    compared = {key: ratios(results, a, b) for key, a, b in (
        ('vs_file_order', 'underdog, one order', 'padded, file order'), ('vs_sorted', 'underdog, one order', 'padded, sorted'), ('both_orders_cost', 'underdog, one order', 'underdog, both orders'),
        ('pair_cost', 'underdog, one order', 'underdog, pair'), ('symmetric_cost', 'underdog, one order', 'underdog, symmetric'))}
    table('useful tokens per CPU second, one order over the other', ('', 'median', 'best of each', 'least', 'greatest'), [(k, *v.values()) for k, v in compared.items()])

    speedups = two_workers(base, lengths[spread(total, 4*args.rows, np.random.default_rng(0))], min(3, args.rounds))
    last_line(dict({k: v['median'] for k, v in compared.items()}, **{f'{k}_min': v['min'] for k, v in compared.items()}, **{f'{k}_max': v['max'] for k, v in compared.items()},
                   two_worker_speedup=float(np.median(speedups)), two_worker_best=max(speedups), max_logit_diff=difference, operations={k: v[1] for k, v in counters.items()}, rounds=args.rounds, lengths=origin))


if __name__ == '__main__': main()
