"""Rows per CPU second of a prediction: underdog's packed rows beside padded batches, and what other layouts cost.

    python -m benchmarks.infer [--rounds 9] [--rows 64]

The same small Llama with LoRA, fp32, one thread; a test set of 25,000 rows with the lengths of LMSYS (cut at 2,048,
divided by 5). The peers: batches of 8 in file order with dynamic padding, and the public inference notebook's way, all
rows sorted by length first. A round computes some of each one's batches, spread evenly over the sizes that occur.
Counters without noise come first, then paired rounds in random order: what both orders, pair and symmetric cost is
measured, too. Last, one worker process against two, in wall time on as many cores. See benchmarks/README.md. The last
line of output is JSON.
"""
import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from typing import Callable

import numpy as np

from benchmarks.common import (FIELDS, LAYERS, RANK, attention_as_products, cpu_time, last_line, make_base,
                               make_prompter, make_tokens, one_thread, paired_rounds, ratios, row_lengths, spread,
                               table)
from benchmarks.peer import hf_model
from benchmarks.train import DEPTHS, copy_lora

ROWS, BUDGET = 8, 2048
KEYS_AND_VALUES = 2/16   # of a layer's products: two of 4 squares in attention, 12 in the MLP
PEERS = ('vs_file_order', 'vs_sorted', 'vs_flattened')   # that compute every layer whole


def load(base, head):
    "The model of `head`, ready to predict; its LoRA moved away from its start."
    import torch

    from underdog.model.model import adapter_parameters, load_model
    from underdog.model.settings import ModelConfig
    model = load_model(ModelConfig(base, head=head, rank=RANK, alpha=RANK, quantization='none')).eval()
    generator = torch.Generator().manual_seed(0)
    for p in adapter_parameters(model): p.data.normal_(0, .02, generator=generator)
    return model


def packed_source(tokens, head='joint'):
    from underdog.text.source import RowSource
    return RowSource(tokens, make_prompter(head), 'causal')


# ---- the ways to predict: each gives (logits of the first order, tokens computed)
def predict_padded(model, tokens):
    "The peer: batches of 8 rows as they come, dynamically padded, through transformers' own forward pass."
    import torch

    from underdog.text.source import RowSource
    # a source without packing pads
    source = RowSource(tokens, make_prompter('joint'))
    logits, computed = np.empty((len(tokens), 3), np.float32), 0
    with torch.no_grad():
        for part in np.arange(len(tokens)).reshape(-1, ROWS):
            batch = source.batch([(row, False) for row in part])
            logits[part] = model(batch).numpy()
            computed += batch.padded
    return logits, computed


def predict_flattened(model, tokens):
    "Another peer: batches of 8 rows flattened, Transformers' way to do without padding, in the peer's own model."
    import torch

    from benchmarks.peer import Rows, flatten, flattened_logits
    rows, logits, computed = Rows(tokens).items, np.empty((len(tokens), 3), np.float32), 0
    with torch.no_grad():
        for i in range(0, len(rows), ROWS):
            ids, positions, last, _ = flatten(rows[i:i + ROWS])
            logits[i:i + ROWS] = flattened_logits(model, ids, positions, last).numpy()
            computed += ids.numel()
    return logits, computed


def predict_packed(model, tokens, head='joint', orders=(False,)):
    "underdog: packed parts of at most `BUDGET` tokens."
    from underdog.model.predict import part_logits
    source = packed_source(tokens, head)
    logits = np.empty((len(orders), len(tokens), 3), np.float32)
    for part in source.bins(np.arange(len(tokens)), BUDGET, orders):
        logits[:, part] = part_logits(model, source, part, orders).numpy()
    return logits[0], int(source.tokens_of(orders).sum())


def operations(run):
    "Floating-point operations of `run`."
    from benchmarks.common import operation_counter
    with operation_counter() as counter, attention_as_products(): run()
    return counter.get_total_flops()


# ---- worker processes
def start_worker(base, lengths, device):
    "A worker: model and rows loaded, then logits of a part."
    one_thread()
    from underdog.model.predict import part_logits
    model, source = load(base, 'joint'), packed_source(make_tokens(lengths))
    part_logits(model, source, [0])   # first calls allocate
    return lambda part: part_logits(model, source, part).numpy()


def wall_time(base, lengths, parts, workers):
    "(seconds, logits) of all parts with so many worker processes, from the moment all are ready."
    from underdog.inference.workers import Workers
    logits = np.empty((len(lengths), 3), np.float32)
    def done(i, result): logits[parts[i]] = result[0]
    with Workers(partial(start_worker, base, lengths), ['cpu']*workers) as pool:
        pool.wait_until_ready()
        began = time.perf_counter()
        pool.run(parts, done)
        return time.perf_counter() - began, logits


def two_workers(base, lengths, rounds=3):
    "Speed-up of two worker processes over one on rows of these lengths, a few times; the results must be equal."
    parts = packed_source(make_tokens(lengths)).bins(np.arange(len(lengths)), BUDGET//2)
    speedups = []
    for _ in range(rounds):
        one_s, one_logits = wall_time(base, lengths, parts, 1)
        two_s, two_logits = wall_time(base, lengths, parts, 2)
        assert np.array_equal(one_logits, two_logits)
        speedups.append(one_s/two_s)
        print(f'{len(parts)} parts: one worker {one_s:.1f} s, two {two_s:.1f} s (wall), '
              f'load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores', flush=True)
    return speedups


# ---- the sides that are compared
@dataclass(frozen=True)
class Side:
    "A way to predict, with the rows that it gets in a round."
    draw: Callable      # tokens of the round's number
    predict: Callable   # (logits, tokens computed) of tokens

    def timed(self, i):
        "(useful tokens, CPU seconds) of round `i`."
        tokens = self.draw(i)
        return useful(tokens), cpu_time(lambda: self.predict(tokens))[1]

    def counters(self):
        "(tokens computed, operations) for each useful token of the first round."
        tokens = self.draw(0)
        _, computed = self.predict(tokens)
        return np.array([computed, operations(lambda: self.predict(tokens))])/useful(tokens)


def useful(tokens):
    "Tokens of prompt, A and B, once."
    return sum(len(row[field]) for row in tokens for field in FIELDS)


def make_sides(models, lengths, rows):
    "{name: `Side`} for rounds of `rows` rows."
    # the batches of both peers over the whole test set
    total = lengths.sum(1)
    orders = {'file order': np.arange(len(total)), 'sorted': np.argsort(total, kind='stable')}
    whole = len(total)//ROWS*ROWS
    policies = {name: order[:whole].reshape(-1, ROWS) for name, order in orders.items()}

    def batches(policy, i):
        "Whole batches of a policy, for round `i`."
        at = spread(total[policies[policy]].max(1), rows//ROWS, np.random.default_rng(i))
        return make_tokens(lengths[policies[policy][at]].reshape(-1, 3), seed=i)

    def any_rows(i): return make_tokens(lengths[spread(total, rows, np.random.default_rng(i))], seed=i)

    # peers get whole batches, ours any rows
    joint = models['joint']
    both = partial(predict_packed, joint, orders=(False, True))
    return {
        'padded, file order': Side(partial(batches, 'file order'), partial(predict_padded, joint)),
        'padded, sorted': Side(partial(batches, 'sorted'), partial(predict_padded, joint)),
        'flattened': Side(any_rows, partial(predict_flattened, models['peer'])),
        'underdog, one order': Side(any_rows, partial(predict_packed, joint)),
        'underdog, both orders': Side(any_rows, both),
        'underdog, pair': Side(any_rows, partial(predict_packed, models['pair'], head='pair')),
        'underdog, symmetric': Side(any_rows, partial(predict_packed, models['symmetric'], head='symmetric')),
    }


COMPARED = dict(   # key of the JSON: a side and its peer
    vs_file_order=('underdog, one order', 'padded, file order'),
    vs_sorted=('underdog, one order', 'padded, sorted'),
    vs_flattened=('underdog, one order', 'flattened'),
    both_orders_cost=('underdog, one order', 'underdog, both orders'),
    pair_cost=('underdog, one order', 'underdog, pair'),
    symmetric_cost=('underdog, one order', 'underdog, symmetric'),
)


def in_deeper_models(ratio, tokens):
    """{layers: the speed over a peer, `ratio` with the layers here, in a model of so many}, by formula.

    The last layer is computed only where it is read: its keys and values everywhere, 1/8 of its products with this
    shape. What that saves is less in deeper models; nothing else changes."""
    per_row = len(tokens)/(useful(tokens) + 4*len(tokens))   # a row is read at one token
    last = KEYS_AND_VALUES + (1 - KEYS_AND_VALUES)*per_row
    layers = lambda n: n/(n - 1 + last)   # all layers whole, over ours
    return {depth: ratio*layers(depth)/layers(LAYERS) for depth in DEPTHS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=9, help='paired rounds (default 9)')
    parser.add_argument('--rows', type=int, default=64, help='rows per side and round (default 64)')
    args = parser.parse_args()
    one_thread()
    # rows and models
    lengths, origin = row_lengths(25_000)
    base = make_base(tempfile.mkdtemp() + '/base')
    print(f'lengths of {origin}')
    models = {head: load(base, head) for head in ('joint', 'pair', 'symmetric')}
    models['peer'] = hf_model(base, kbit=False).eval()
    copy_lora(models['joint'], models['peer'])
    sides = make_sides(models, lengths, args.rows)
    # equal results
    tokens = sides['underdog, one order'].draw(0)
    padded, packed = predict_padded(models['joint'], tokens)[0], predict_packed(models['joint'], tokens)[0]
    flattened, _ = predict_flattened(models['peer'], tokens)
    difference = float(max(np.abs(packed - padded).max(), np.abs(flattened - padded).max()))
    # counters without noise
    counters = {name: side.counters() for name, side in sides.items()}
    counters = {name: (c/counters['underdog, one order']).tolist() for name, c in counters.items()}
    table('without noise: for each useful token, one order without padding = 1', ('', 'tokens computed', 'operations'),
          [(name, *c) for name, c in counters.items()])
    print(f'largest difference of logits, packed and flattened to padded: {difference:.1e}')
    # paired rounds
    results = paired_rounds({name: side.timed for name, side in sides.items()}, args.rounds)
    compared = {key: ratios(results, side, peer) for key, (side, peer) in COMPARED.items()}
    deeper = {key: in_deeper_models(compared[key].median, sides['underdog, one order'].draw(0)) for key in PEERS}
    columns = ('', 'median', 'best of each', 'least', 'greatest')
    table('useful tokens per CPU second, one order over the other', columns, [(k, *r) for k, r in compared.items()])
    table('the same in deeper models, by formula', ('', *(f'{depth} layers' for depth in DEPTHS)),
          [(key, *at.values()) for key, at in deeper.items()])
    # worker processes
    sample = spread(lengths.sum(1), 4*args.rows, np.random.default_rng(0))
    speedups = two_workers(base, lengths[sample], min(3, args.rounds))
    # figures
    figures = {key: ratio.median for key, ratio in compared.items()}
    figures |= {f'{key}_{depth}_layers': ratio for key, at in deeper.items() for depth, ratio in at.items()}
    for name in ('min', 'max'):
        figures |= {f'{key}_{name}': getattr(ratio, name) for key, ratio in compared.items()}
    last_line(figures | dict(
        two_worker_speedup=float(np.median(speedups)),
        two_worker_best=max(speedups),
        max_logit_diff=difference,
        operations={name: ops for name, (_, ops) in counters.items()},
        rounds=args.rounds,
        lengths=origin,
    ))


if __name__ == '__main__': main()
