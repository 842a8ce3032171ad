"""Useful tokens per CPU second of a LoRA training step: underdog's packed rows beside Hugging Face's Trainer.

    python -m benchmarks.train [--rounds 5] [--steps 6] [--quick]

The same small Llama, the same LoRA on all linear layers, 8 rows a step, fp32, one thread. Every peer takes its batches
from its own sampler over a whole epoch of 57,477 rows with the lengths of LMSYS (cut at 2,048, divided by 5); a round
runs `--steps` of them, spread evenly over the sizes that occur. Counters without noise come first, then paired rounds
in random order. See benchmarks/README.md. The last line of output is JSON.
"""
import argparse
import contextlib
import io
import tempfile
import time
from dataclasses import dataclass

import numpy as np

from benchmarks.common import (LAYERS, RANK, WIDTH, attention_as_products, last_line, make_base, make_prompter,
                               make_tokens, one_thread, paired_rounds, ratios, row_lengths, spread, table)
from benchmarks.peer import (FORMAT, FROZEN, ROWS, Rows, epoch_batches, flatten, flattened_logits, hf_model, pad,
                             padded_sizes, run_flattened, run_trainer, trainer_order)

BUDGET = 1024   # tokens of a packed forward pass
DEPTHS = (32, 42)   # layers of Mistral-7B and Gemma-2-9B
POLICIES = ('random', 'group_by_length')   # the orders in which the Trainer's samplers draw rows


# ---- underdog
def our_model(base, lora_layers=''):
    from underdog.model.model import load_model
    from underdog.model.settings import ModelConfig
    cfg = ModelConfig(base, head='joint', rank=RANK, alpha=RANK, lora_layers=lora_layers, quantization='none')
    return load_model(cfg)


def run_ours(model, tokens, packing='causal'):
    "(useful tokens, CPU seconds) of underdog's loop on these rows, 8 a step in the order given; `packing` '': padded."
    from accelerate import Accelerator

    from underdog.text.source import RowSource
    from underdog.training.loop import fit
    from underdog.training.schedule import row_order
    from underdog.training.settings import TrainConfig
    from underdog.training.step import FitData, Training
    cfg = TrainConfig(batch_rows=ROWS, batch_tokens=BUDGET if packing else 10**6, lr=1e-4, head_lr=1e-4, orders='given',
                      evaluations=1, log_every=10**6)
    source = RowSource(tokens, make_prompter('joint'), packing)
    # `fit` shuffles: undone here, so that every step gets the batch that the peer's sampler drew
    in_order = np.argsort(row_order(len(tokens), cfg.epochs, cfg.seed))
    data = FitData(source, np.eye(3)[np.arange(len(tokens)) % 3], None, in_order)
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.process_time()
        fit(Training(model, data, cfg, Accelerator(cpu=True)))
        seconds = time.process_time() - start
    return int(source.lengths.sum()), seconds


def packed_source(tokens):
    from underdog.text.source import RowSource
    return RowSource(tokens, make_prompter('joint'), 'causal')


# ---- equal results
def copy_lora(model, peer, seed=1):
    "Give our `model` and the `peer` the same LoRA weights, moved away from their start."
    import torch
    generator, named = torch.Generator().manual_seed(seed), dict(peer.named_parameters())
    for name, p in model.backbone.named_parameters():
        if not p.requires_grad: continue
        p.data.normal_(0, .05, generator=generator)
        named[peer_name(name)].data.copy_(p.data)


def peer_name(name):
    "The peer's name of a parameter of our backbone: its model has a head around the backbone."
    return name.replace('base_model.model.', 'base_model.model.model.', 1)


def equality(base, tokens):
    """(largest difference of logits, least cosine of a gradient) between ours, packed, and the peer's, padded.

    Its flattened logits count, too."""
    import torch.nn.functional as F
    model, peer = our_model(base), hf_model(base, kbit=False)
    copy_lora(model, peer)
    # the same rows in both models, and one step backward
    batch = packed_source(tokens).batch([(i, False) for i in range(len(tokens))])
    padded = pad(Rows(tokens).items)
    labels = padded.pop('labels')
    packed_logits, peer_logits = model.train()(batch), peer.train()(**padded).logits
    *flat, _ = flatten(Rows(tokens).items)
    flat_logits = flattened_logits(peer, *flat)
    for logits in (packed_logits, peer_logits): F.cross_entropy(logits, labels).backward()
    # logits, and the gradient of every adapter
    peer_gradients = {name: p.grad for name, p in peer.named_parameters() if 'lora' in name}
    cosines = []
    for name, p in model.backbone.named_parameters():
        if not p.requires_grad: continue
        peer_gradient = peer_gradients[peer_name(name)]
        cosines.append(F.cosine_similarity(p.grad.flatten(), peer_gradient.flatten(), dim=0).item())
    difference = max((logits - peer_logits).abs().max().item() for logits in (packed_logits, flat_logits))
    return difference, min(cosines)


# ---- operations
@dataclass(frozen=True)
class Operations:
    "Floating-point operations of a step."
    linear: float      # in linear layers
    attention: float

    @property
    def total(self): return self.linear + self.attention


def counted(step):
    "The `Operations` of what `step` computes."
    from benchmarks.common import operation_counter
    with operation_counter() as counter, attention_as_products(): step()
    # attention is batched products, which the layers' own are not
    by_kind = {str(kind): n for kind, n in counter.get_flop_counts()['Global'].items()}
    attention = sum(n for kind, n in by_kind.items() if 'bmm' in kind)
    return Operations(sum(by_kind.values()) - attention, attention)


def peer_operations(model, tokens):
    "Operations for each useful token of the peer's model, padded, 8 rows a batch."
    rows = Rows(tokens)
    def pass_over():
        for i in range(0, len(rows), ROWS): model.train()(**pad(rows.items[i:i + ROWS])).loss.backward()
    return counted(pass_over).total/rows.useful


def our_operations(model, batches):
    "The `Operations` of our model on packed `batches`."
    def pass_over():
        for batch in batches: model.train()(batch).sum().backward()
    return counted(pass_over)


def predicted_linear(tokens, read, frozen, layers=LAYERS):
    """Operations of the linear layers of a packed step by formula, for a model of so many `layers`.

    2P forward, 2P for the gradients of inputs above the `frozen` layers, LoRA three times; the last layer's queries,
    output and MLP for `read` tokens only."""
    qkvo, mlp, kv = 4*WIDTH**2, 3*4*WIDTH**2, 2*WIDTH**2
    lora_kv, lora = RANK*4*WIDTH, RANK*(8*WIDTH + 3*5*WIDTH)
    total = 0
    for layer in range(layers):
        # multiply-adds of weights and adapters
        weights, adapters = tokens*(qkvo + mlp), tokens*lora
        if layer == layers - 1:
            weights = tokens*kv + read*(qkvo + mlp - kv)
            adapters = tokens*lora_kv + read*(lora - lora_kv)
        total += 2*weights if layer < frozen else 4*weights + 6*adapters
        # nobody asks for the gradient of what enters the lowest trained layer
        if layer == frozen: total -= 2*tokens*(3*WIDTH**2 + 3*RANK*WIDTH)
    return total


def last_layer_saving(tokens, read, frozen=0, layers=LAYERS):
    "What computing the last layer only where it is read saves: operations of every layer whole, over ours."
    whole, ours = (predicted_linear(tokens, n, frozen, layers) for n in (tokens, read))
    return whole/ours


# ---- the rows of a round
@dataclass(frozen=True)
class Draw:
    "Draws the rows of every round."
    lengths: np.ndarray   # (n, 3) of the epoch
    batches: dict         # {policy: rows of each batch of the epoch}
    steps: int

    def sizes(self, policy): return padded_sizes(self.lengths, self.batches[policy])

    def efficiency(self, policy):
        "Real over computed tokens of the peer's whole epoch."
        real = (self.lengths.sum(1) + FORMAT)[self.batches[policy]].sum()
        return float(real/self.sizes(policy).sum())

    def peers(self, policy, i):
        "Whole batches of a policy's epoch, for round `i`."
        at = spread(self.sizes(policy), self.steps, np.random.default_rng(100 + i))
        at = np.random.default_rng(i).permutation(at)
        return make_tokens(self.lengths[self.batches[policy][at]].reshape(-1, 3), seed=i)

    def ours(self, i):
        "As many rows for round `i`, spread over the lengths of the epoch."
        at = spread(self.lengths.sum(1), ROWS*self.steps, np.random.default_rng(200 + i))
        return make_tokens(self.lengths[at], seed=i)


def count(models, draw):
    "{figure: value} of what a run cannot disturb: tokens and operations."
    # our packed rows
    tokens = draw.ours(0)
    source = packed_source(tokens)
    packed = [source.batch([(i, False) for i in part]) for part in source.bins(np.arange(len(source)), BUDGET)]
    real, computed = Rows(tokens).useful, sum(batch.padded for batch in packed)
    # operations of ours, and of the peers over ours
    plain, frozen = our_operations(models['ours'], packed), our_operations(models['frozen'], packed)
    random_rows, grouped_rows = (draw.peers(policy, 0) for policy in POLICIES)
    over_ours = {
        'Trainer, default': peer_operations(models['plain'], random_rows)/(plain.total/real),
        'Trainer, group_by_length': peer_operations(models['plain'], grouped_rows)/(plain.total/real),
        'Trainer, k-bit recipe': peer_operations(models['kbit'], random_rows)/(frozen.total/real),
        'Trainer, k-bit recipe, group_by_length': peer_operations(models['kbit'], grouped_rows)/(frozen.total/real),
    }
    for model in models.values(): model.zero_grad()
    # by formula: in deeper models one layer's saving is less
    deeper = {}
    for name, below in dict(plain=0, frozen=FROZEN).items():
        here = last_layer_saving(computed, len(source), below)
        savings = [last_layer_saving(computed, len(source), below*depth//LAYERS, depth) for depth in DEPTHS]
        deeper[name] = {depth: saving/here for depth, saving in zip(DEPTHS, savings)}
    return dict(
        token_efficiency=real/computed,
        flops_predicted_over_measured=predicted_linear(computed, len(source), FROZEN)/frozen.linear,
        operations_over_ours=over_ours,
        last_layer_saving=last_layer_saving(computed, len(source)),
        saving_deeper=deeper,
        attention_share=plain.attention/plain.total,
    )


def show_counters(draw, counters, difference, cosine):
    "Print the table of what a run cannot disturb."
    # tokens
    epoch = {policy: draw.efficiency(policy) for policy in POLICIES}
    rows = [
        ('real over computed tokens, a whole epoch: Trainer, random batches', epoch['random']),
        ('… group_by_length', epoch['group_by_length']),
        ('… underdog', counters['token_efficiency']),
    ]
    # operations
    for peer, ratio in counters['operations_over_ours'].items():
        rows.append((f'operations of a useful token over ours: {peer}', ratio))
    rows += [
        ('… of it from computing the last layer only where it is read', counters['last_layer_saving']),
        ('attention, share of our arithmetic', counters['attention_share']),
        ('lower 3/8 frozen: operations of the linear layers, formula over counted',
         counters['flops_predicted_over_measured']),
        ('largest difference of logits, packed to padded, 1e-6', difference*1e6),
        ('least cosine of a LoRA gradient', cosine),
    ]
    table('without noise', ('counter', 'value'), rows)


COMPARED = dict(   # key of the JSON: a side and its peer
    vs_own_loop_random=('underdog', 'own loop, random, padded'),
    vs_trainer_default=('underdog', 'Trainer, default'),
    vs_group_by_length=('underdog', 'Trainer, group_by_length'),
    vs_kbit_recipe=('underdog, lower 3/8 frozen', 'Trainer, k-bit recipe'),
    vs_kbit_recipe_grouped=('underdog, lower 3/8 frozen', 'Trainer, k-bit, group_by_length'),
    vs_flattened=('underdog', 'Transformers, flattened rows'),
)


def compare_speed(models, draw, rounds, folder):
    "{key of `COMPARED`: `Ratio` of the speeds}, from paired rounds."
    # every side draws its own rows of a round
    plain, kbit, ours, frozen = (models[name] for name in ('plain', 'kbit', 'ours', 'frozen'))
    sides = {
        'underdog': lambda i: run_ours(ours, draw.ours(i)),
        'underdog, lower 3/8 frozen': lambda i: run_ours(frozen, draw.ours(i)),
        'own loop, random, padded': lambda i: run_ours(ours, draw.peers('random', i), ''),
        'Trainer, default': lambda i: run_trainer(plain, draw.peers('random', i), folder),
        'Trainer, group_by_length': lambda i: run_trainer(plain, draw.peers('group_by_length', i), folder),
        'Trainer, k-bit recipe': lambda i: run_trainer(kbit, draw.peers('random', i), folder),
        'Trainer, k-bit, group_by_length': lambda i: run_trainer(kbit, draw.peers('group_by_length', i), folder),
        'Transformers, flattened rows': lambda i: run_flattened(plain, draw.ours(i)),
    }
    results = paired_rounds(sides, rounds)
    return {key: ratios(results, side, peer) for key, (side, peer) in COMPARED.items()}


def in_deeper_models(key, ratio, counters):
    """{layers: `ratio` of the key as it would be in a model of so many layers}, by formula.

    All that changes is the share of the last layer, which is computed only where it is read, with 8 layers here."""
    side, _ = COMPARED[key]
    saving = counters['saving_deeper']['frozen' if 'frozen' in side else 'plain']
    return {depth: ratio*saving[depth] for depth in DEPTHS}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=5, help='paired rounds (default 5)')
    parser.add_argument('--steps', type=int, default=6, help='optimizer steps of 8 rows per side and round (default 6)')
    parser.add_argument('--quick', action='store_true',
                        help='one round of one step, half a minute: counters and equality hold, the times say little')
    args = parser.parse_args()
    if args.quick: args.rounds = args.steps = 1
    one_thread()
    # rows and models
    lengths, origin = row_lengths()
    folder = tempfile.mkdtemp()
    base = make_base(folder + '/base')
    print(f'lengths of {origin}; mean {lengths.sum(1).mean() + FORMAT:.0f} tokens a row')
    batches = {policy: epoch_batches(trainer_order(lengths, policy, folder)) for policy in POLICIES}
    draw = Draw(lengths, batches, args.steps)
    models = dict(plain=hf_model(base, False), kbit=hf_model(base, True), ours=our_model(base),
                  frozen=our_model(base, f'{FROZEN}:'))
    # counters without noise, and equal results
    counters = count(models, draw)
    sample = spread(lengths.sum(1), ROWS, np.random.default_rng(0))
    difference, cosine = equality(base, make_tokens(lengths[sample], seed=1))
    show_counters(draw, counters, difference, cosine)
    # paired rounds
    compared = compare_speed(models, draw, args.rounds, folder)
    deeper = {key: in_deeper_models(key, ratio.median, counters) for key, ratio in compared.items()}
    at_depths = [f'{depth} layers, by formula' for depth in DEPTHS]
    columns = ('peer', 'median', 'best of each', 'least', 'greatest', *at_depths)
    table('useful tokens per CPU second, underdog over peer', columns,
          [(key, *ratio, *deeper[key].values()) for key, ratio in compared.items()])
    figures = {key: ratio.median for key, ratio in compared.items()}
    figures |= {f'{key}_{depth}_layers': ratio for key, at in deeper.items() for depth, ratio in at.items()}
    for name in ('min', 'max', 'best'):
        figures |= {f'{key}_{name}': getattr(ratio, name) for key, ratio in compared.items()}
    last_line(figures | counters | dict(max_logit_diff=difference, min_gradient_cosine=cosine, rounds=args.rounds,
                                        lengths=origin))


if __name__ == '__main__': main()
