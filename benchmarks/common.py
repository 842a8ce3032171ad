"""What the benchmarks share: real lengths scaled down, small models, paired rounds in CPU time, a table and JSON."""
import json
import os
import random
import statistics
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from underdog.text.heads import HEADS
from underdog.search.lengths import CHARS_PER_TOKEN, lmsys_lengths

EPOCH = 57_477   # rows of the LMSYS train.csv
CUT = 2048       # tokens of prompt and both answers
SCALE = 5        # lengths are divided by it, as the model is narrower: attention stays below 15 % of the arithmetic
FRAME = dict(start=[1], middle=[2], label_a=[3], label_b=[4], end=[5], ask=[6, 7])
FIELDS = ('prompt', 'a', 'b')   # of a tokenized row
LAYERS, WIDTH, VOCAB, RANK = 8, 256, 512, 16


def one_thread():
    "One thread for everything, so that CPU time is work and not waiting; call it before torch is imported."
    os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')
    import torch

    from underdog.machine import quiet
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', category=FutureWarning)      # of transformers and peft to each other
    warnings.filterwarnings('ignore', message='.*use_reentrant')   # of torch to the k-bit recipe
    quiet()


# ---- rows
def shared_file(name='lmsys_train_1000.csv'):
    "A file of real rows beside the repository, or None."
    beside = Path(__file__).resolve().parents[2]/'shared'/'data'
    path = Path(os.environ.get('UNDERDOG_SHARED', beside))/name
    return path if path.is_file() else None


def row_lengths(n=EPOCH, seed=0, scale=SCALE):
    "((n, 3) tokens of prompt, A and B, cut at `CUT` and divided by `scale`; where they come from)."
    rng, file = np.random.default_rng(seed), shared_file()
    if file:
        real = real_lengths(file)
        lengths, source = real[rng.integers(0, len(real), n)], f'{len(real):,} real rows, drawn {n:,} times'
    else:
        lengths, source = lmsys_lengths(n, seed), 'the recorded table of the LMSYS train.csv'
    lengths = lengths*np.minimum(1, CUT/lengths.sum(1))[:, None]/scale
    return np.maximum(1, lengths.round().astype(int)), source


def real_lengths(file):
    "(n, 3) estimated tokens of prompt, A and B of the rows of a csv file."
    from underdog.data.rows import read_rows
    rows, _ = read_rows(file)
    texts = rows[['prompt', 'response_a', 'response_b']].to_numpy()
    return np.array([[sum(map(len, turns)) for turns in row] for row in texts])/CHARS_PER_TOKEN


def spread(sizes, k, rng):
    "`k` positions spread evenly over the order of `sizes`: a sample with nearly the mean of all, a new one each time."
    order = np.argsort(sizes, kind='stable')
    return order[((np.arange(k) + rng.random())*len(order)/k).astype(int)]


def make_tokens(lengths, seed=0, vocab=VOCAB):
    "Rows of random token ids below `vocab` with the given (n, 3) lengths, as `RowSource` wants them."
    import datasets
    rng = np.random.default_rng(seed)
    rows = [{field: rng.integers(10, vocab, k).tolist() for field, k in zip(FIELDS, row)} for row in lengths]
    return datasets.Dataset.from_list(rows)


def make_prompter(head):
    "The part of a `Prompter` that packing needs, with the frame of `head`."
    names = dict(
        joint=('start', 'label_a', 'label_b', 'end'),
        pair=('start', 'middle', 'end'),
        symmetric=('start', 'middle', 'end', 'ask'),
    )
    frame = {name: FRAME[name] for name in names[head]}
    size = sum(map(len, frame.values()))
    return SimpleNamespace(head=HEADS[head], frame=frame | dict(read='last'), frame_size=size, read='last', pad_id=0)


# ---- models and tokenizers
def save_model(folder, model_class, config, seed=0):
    "A model of `model_class` with random weights in `folder`."
    import torch
    torch.manual_seed(seed)
    model_class(config).save_pretrained(folder)
    return str(folder)


def save_tokenizer(folder, texts, vocab_size):
    "A byte-level BPE of `vocab_size` entries, trained on `texts`, in `folder`."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    # a tokenizer without entries, and how it gets them
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=['<s>', '</s>'],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<s>', eos_token='</s>').save_pretrained(folder)


def make_base(folder):
    "A Llama classifier of 8 layers and width 256 with random weights in `folder`: backbone and head of every side."
    # wide enough that the linear layers outweigh the attention, as in large models
    from transformers import LlamaConfig, LlamaForSequenceClassification
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=4*WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=0,
        num_labels=3,
        max_position_embeddings=4096,
    )
    return save_model(folder, LlamaForSequenceClassification, config)


def make_world(folder, n_train, n_test, seed=0):
    "({name: path} of a generated competition, path of a small Llama with a tokenizer of its own), all in `folder`."
    from transformers import LlamaConfig, LlamaModel

    from underdog.data.sample import write_sample
    paths = write_sample(folder/'data', n_train=n_train, n_test=n_test, seed=seed)
    # the tokenizer is trained on the rows themselves
    save_tokenizer(folder/'base', paths['train.csv'].read_text().splitlines()[:200], VOCAB)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    return paths, save_model(folder/'base', LlamaModel, config, seed=seed)


# ---- figures
class Timed(NamedTuple):
    "What a side has done in a round."
    units: float       # useful ones, such as tokens
    seconds: float     # of CPU time


class Ratio(NamedTuple):
    "The speed of one side over that of another."
    median: float   # of the paired rounds
    best: float     # the best round of one over the best of the other
    min: float
    max: float


def paired_rounds(sides, rounds, seed=0):
    """{side: [`Timed` of each round]}, every side once per round, in random order.

    `sides`: {name: function of the round's number that returns (useful units, CPU seconds)}."""
    rng, results = random.Random(seed), {name: [] for name in sides}
    for i in range(rounds):
        for name in rng.sample(list(sides), len(sides)):
            timed = Timed(*sides[name](i))
            results[name].append(timed)
            speed = timed.units/timed.seconds
            print(f'round {i + 1} of {rounds}: {name:32} {speed:10,.0f} per CPU second', flush=True)
    return results


def cpu_time(run):
    "(result, CPU seconds of this process)."
    start = time.process_time()
    return run(), time.process_time() - start


def ratios(results, ours, peer):
    "The `Ratio` of the speeds of two sides of `paired_rounds`."
    speed = {name: [units/seconds for units, seconds in results[name]] for name in (ours, peer)}
    paired = [a/b for a, b in zip(speed[ours], speed[peer])]
    best = max(speed[ours])/max(speed[peer])
    return Ratio(statistics.median(paired), best, min=min(paired), max=max(paired))


def attention_as_products():
    "A context in which attention runs as plain matrix products, which the counter of operations can see."
    from torch.nn.attention import SDPBackend, sdpa_kernel
    return sdpa_kernel(SDPBackend.MATH)


def operation_counter():
    "PyTorch's counter of floating-point operations, which by itself leaves out products that are added in place."
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    def added_product(y, a, b, **kwargs): return 2*a[0]*a[1]*b[1]   # of these shapes
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_product})


def table(title, columns, rows):
    "Print a table; numbers with a sensible number of digits."
    from rich.console import Console
    from rich.table import Table
    shown = Table(*columns, title=title)
    for row in rows: shown.add_row(*map(_cell, row))
    Console(width=160).print(shown)


def _cell(x):
    if isinstance(x, str): return x
    return f'{x:,.0f}' if abs(x) >= 100 else f'{x:.3f}'


def last_line(figures):
    "Print the line of JSON that ends the output; floats with five digits."
    print(json.dumps(_short(figures)))


def _short(value):
    if isinstance(value, dict): return {k: _short(v) for k, v in value.items()}
    return float(f'{value:.5g}') if isinstance(value, float) else value
