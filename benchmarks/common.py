"What the engine's benchmarks share: real lengths scaled down, a small Llama, paired rounds in CPU time, one table, one line of JSON."
import json
import os
import random
import statistics
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from underdog.text.heads import HEADS
from underdog.search.estimate import CHARS_PER_TOKEN, lmsys_lengths

EPOCH = 57_477   # rows of the LMSYS train.csv
CUT = 2048       # tokens of prompt and both answers
SCALE = 5        # lengths are divided by it, as the model is narrower: attention stays below 15 % of the arithmetic
FRAME = dict(start=[1], middle=[2], label_a=[3], label_b=[4], end=[5], ask=[6, 7])
LAYERS, WIDTH, VOCAB, RANK = 8, 256, 512, 16


def one_thread():
    "One thread for everything, so that CPU time is work and not waiting; call it before torch is imported."
    os.environ.update(OMP_NUM_THREADS='1', TOKENIZERS_PARALLELISM='false', HF_HUB_OFFLINE='1')
    import torch

    from underdog.machine import quiet
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', category=FutureWarning)   # of transformers and peft to each other
    warnings.filterwarnings('ignore', message='.*use_reentrant')          # of torch to the k-bit recipe
    quiet()


def shared_file(name='lmsys_train_1000.csv'):
    "A file of real rows beside the repository, or None."
    path = Path(os.environ.get('UNDERDOG_SHARED', Path(__file__).resolve().parents[2]/'shared'/'data'))/name
    return path if path.is_file() else None


def row_lengths(n=EPOCH, seed=0, scale=SCALE):
    "((n, 3) tokens of prompt, A and B, cut at `CUT` and divided by `scale`; where they come from)."
    rng, file = np.random.default_rng(seed), shared_file()
    if file:
        from underdog.data.rows import read_rows
        rows, _ = read_rows(file)
        real = np.array([[sum(map(len, r[c])) for c in ('prompt', 'response_a', 'response_b')] for _, r in rows.iterrows()])/CHARS_PER_TOKEN
        lengths, source = real[rng.integers(0, len(real), n)], f'{len(real):,} real rows, drawn {n:,} times'
    else:
        lengths, source = lmsys_lengths(n, seed), 'the recorded table of the LMSYS train.csv'
    lengths = lengths*np.minimum(1, CUT/lengths.sum(1))[:, None]/scale
    return np.maximum(1, lengths.round().astype(int)), source


def spread(sizes, k, rng):
    "`k` positions spread evenly over the order of `sizes`: a sample whose mean is near that of all, another one in every round."
    order = np.argsort(sizes, kind='stable')
    return order[((np.arange(k) + rng.random())*len(order)/k).astype(int)]


def make_tokens(lengths, seed=0):
    "Rows of random token ids with the given (n, 3) lengths, as `RowSource` wants them."
    import datasets
    rng = np.random.default_rng(seed)
    return datasets.Dataset.from_list([{c: rng.integers(10, VOCAB, k).tolist() for c, k in zip(('prompt', 'a', 'b'), row)} for row in lengths])


def make_prompter(head):
    "The part of a `Prompter` that packing needs, with the frame of `head`."
    names = dict(joint=('start', 'label_a', 'label_b', 'end'), pair=('start', 'middle', 'end'), symmetric=('start', 'middle', 'end', 'ask'))[head]
    frame = {n: FRAME[n] for n in names}
    return SimpleNamespace(head=HEADS[head], frame=frame | dict(read='last'), frame_size=sum(map(len, frame.values())), read='last', pad_id=0)


def make_base(folder):
    "Write a Llama classifier of 8 layers and width 256 with random weights: the backbone of every side, and its head."
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=4*WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=4, pad_token_id=0, num_labels=3, max_position_embeddings=4096)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def paired_rounds(sides, rounds, seed=0):
    "Run every side once per round, in random order: {side: [(useful units, CPU seconds), …]}; a side is a function of the round's number that returns the units and the seconds."
    rng, results = random.Random(seed), {name: [] for name in sides}
    for i in range(rounds):
        for name in rng.sample(list(sides), len(sides)):
            units, seconds = sides[name](i)
            results[name].append((units, seconds))
            print(f'round {i + 1} of {rounds}: {name:32} {units/seconds:10,.0f} per CPU second', flush=True)
    return results


def cpu_time(run):
    "(result, CPU seconds of this process)."
    start = time.process_time()
    return run(), time.process_time() - start


def ratios(results, ours, peer):
    "Speed of `ours` over that of `peer`: median of the paired rounds, best of each, least and greatest."
    speed = {name: [u/s for u, s in results[name]] for name in (ours, peer)}
    paired = [a/b for a, b in zip(speed[ours], speed[peer])]
    return dict(median=statistics.median(paired), best=max(speed[ours])/max(speed[peer]), min=min(paired), max=max(paired))


def table(title, columns, rows):
    "Print a table; numbers with a sensible number of digits."
    from rich.console import Console
    from rich.table import Table
    shown = Table(*columns, title=title)
    for row in rows: shown.add_row(*(x if isinstance(x, str) else f'{x:,.0f}' if abs(x) >= 100 else f'{x:.3f}' for x in row))
    Console(width=160).print(shown)


def last_line(figures):
    "The JSON that ends the output."
    short = lambda v: {k: short(x) for k, x in v.items()} if isinstance(v, dict) else float(f'{v:.5g}') if isinstance(v, float) else v
    print(json.dumps(short(figures)))


def make_world(folder, n_train, n_test, seed=0, layers=2, width=64):
    "Write a generated competition and a small Llama with its own tokenizer to `folder`: ({name: path} of the files, path of the base model)."
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    from underdog.data.sample import write_sample
    paths, tok = write_sample(folder/'data', n_train=n_train, n_test=n_test, seed=seed), Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(paths['train.csv'].read_text().splitlines()[:200], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=['<s>', '</s>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=tok, bos_token='<s>', eos_token='</s>').save_pretrained(folder/'base')
    torch.manual_seed(seed)
    LlamaModel(LlamaConfig(vocab_size=VOCAB, hidden_size=width, intermediate_size=2*width, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=4)).save_pretrained(folder/'base')
    return paths, str(folder/'base')
