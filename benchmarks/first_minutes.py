"""What a card must settle, in one go: does a model load, train and predict within a T4's memory, in float16?

    python -m benchmarks.first_minutes [--model gemma-2-9b] [--layers 42] [--only load train] [--out FILE]

A larger card is made to answer as a T4 (benchmarks/as_t4): compute capability 7.5 and 14.7 GiB. Weights are random, of
the model's own shape, and written to a temporary folder (20 GB for a 9B). Each part runs in a process of its own and
may fail without the others: the table says how. Decoders learn by LoRA in nf4, DeBERTa with every weight. Without a
card the small shape is used, to try the script. The last line of output is JSON; commit
it under benchmarks/results with the card's name.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

from benchmarks.common import last_line, save_tokenizer, table
from benchmarks.gpu import SHAPES

HERE = Path(__file__).resolve().parent
RANKS = 16, 64
ROWS, MAX_LENGTH = 96, 1024
SMALL = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=8192,
             num_key_value_heads=2, head_dim=32)


# ---- parts, each in a process of its own: figures by name
def weights(args):
    "Random weights in float16 and a tokenizer, as a folder that any loader reads; not as a T4, which has no room."
    import torch
    from transformers import AutoConfig, AutoModel

    from benchmarks.data import random_text
    model_type, shape = SHAPES[args.model]
    if not torch.cuda.is_available(): shape = shape | SMALL
    elif args.layers: shape = shape | dict(num_hidden_layers=args.layers)
    # made where it is fast
    torch.manual_seed(0)
    began = time.perf_counter()
    with torch.device('cuda' if torch.cuda.is_available() else 'cpu'):
        model = AutoModel.from_config(AutoConfig.for_model(model_type, **shape), dtype=torch.float16)
    model.save_pretrained(args.base, max_shard_size='2GB')
    save_tokenizer(args.base, [random_text(300_000, np.random.default_rng(0))], 8000)
    parameters = sum(p.numel() for p in model.parameters())
    return dict(parameters=parameters, seconds=time.perf_counter() - began)


def load(args):
    "Memory while nf4 weights are made from float16 files: it must not hold the model unquantized."
    import torch

    from underdog.model.model import load_model
    from underdog.model.settings import ModelConfig
    began = time.perf_counter()
    device = 'cuda:0' if torch.cuda.is_available() else 'cpu'
    model = load_model(ModelConfig(args.base, rank=RANKS[0]), device)
    figures = dict(seconds=time.perf_counter() - began, dtype=str(model.dtype))
    if device == 'cpu': return figures
    return figures | dict(peak_gb=torch.cuda.max_memory_allocated()/1e9, after_gb=torch.cuda.memory_allocated()/1e9)


def attention(args):
    "Lower-right causal attention with head_dim 256, forward and backward, against a mask."
    import torch
    from torch.nn.attention.bias import causal_lower_right
    from torch.nn.functional import scaled_dot_product_attention
    device, dtype = ('cuda', torch.float16) if torch.cuda.is_available() else ('cpu', torch.float32)
    queries, keys = 200, 700
    torch.manual_seed(0)
    options = dict(device=device, dtype=dtype, requires_grad=True)
    q, k, v = (torch.randn(1, 16, n, 256, **options) for n in (queries, keys, keys))
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    results = []
    for bias in (causal_lower_right(queries, keys), visible):
        out = scaled_dot_product_attention(q, k, v, attn_mask=bias)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))])
    difference = max(float((a - b).abs().max()/b.abs().max()) for a, b in zip(*results))
    return dict(largest_relative_difference=difference)


def training(args, out, **changes):
    "A training of a few steps with rehearsal into the folder `out`, as a student starts it; `changes` to `ModelConfig`."
    import torch

    from underdog import ModelConfig, PromptConfig, SessionConfig, TrainConfig, train
    model = ModelConfig(args.base, **changes)
    cfg = TrainConfig(epochs=1, evaluations=1, n_folds=3)
    out = Path(args.base).parent/out
    began = time.perf_counter()
    run = train(rows_of(args)/'train.csv', model, out, PromptConfig(max_length=args.max_length), cfg, SessionConfig())
    figures = dict(seconds=time.perf_counter() - began)
    # what the run says of itself
    log = run.log_file.read_text()
    metrics = run.metrics()
    last = metrics.iloc[-1]
    figures |= {name: float(metrics[name].dropna().iloc[-1]) for name in ('tokens_per_s', 'memory_gb', 'eval_loss')
                if name in metrics and len(metrics[name].dropna())}
    figures |= dict(steps=int(last['step']), memory_plan=[line for line in log.splitlines() if 'kept for' in line],
                    out_of_memory=log.count('out of memory'))
    if 'not_finite' in metrics: figures['rows_not_finite'] = int(metrics['not_finite'].sum())
    if 'skipped' in metrics: figures['steps_skipped'] = int(metrics['skipped'].max())
    if torch.cuda.is_available(): figures['gpu'] = torch.cuda.get_device_name()
    return figures


def train_r16(args): return training(args, 'run-16', rank=RANKS[0])
def train_r64(args): return training(args, 'run-64', rank=RANKS[1])
def train_full(args): return training(args, 'run-full', tuning='full', quantization='none')


def infer(args):
    "A finished run predicts unseen rows, both orders of A and B."
    from underdog import InferConfig, predict
    folder = Path(args.base).parent
    began = time.perf_counter()
    run = next(run for run in (folder/'run-16', folder/'run-full') if run.is_dir())
    answers = predict([run], rows_of(args)/'test.csv', folder/'predictions', InferConfig())
    import pandas as pd
    seconds = time.perf_counter() - began
    submission = pd.read_csv(next(folder.glob('predictions/**/submission.csv')))
    probabilities = submission.iloc[:, 1:].to_numpy()
    return dict(seconds=seconds, rows=len(submission), finite=bool(np.isfinite(probabilities).all()),
                what=type(answers).__name__)


def rows_of(args):
    "A folder with train.csv and test.csv of generated rows, made once."
    folder = Path(args.base).parent/'rows'
    if folder.is_dir(): return folder
    from benchmarks.data import make_rows
    rows = make_rows(ROWS + ROWS//2).rename(columns=dict(a='winner_model_a', b='winner_model_b', tie='winner_tie'))
    for column in ('prompt', 'response_a', 'response_b'): rows[column] = rows[column].map(json.dumps)
    folder.mkdir()
    rows[:ROWS].to_csv(folder/'train.csv', index=False)
    rows[ROWS:][['id', 'prompt', 'response_a', 'response_b']].to_csv(folder/'test.csv', index=False)
    return folder


PARTS = dict(weights=weights, load=load, attention=attention, train_r16=train_r16, train_r64=train_r64,
             train_full=train_full, infer=infer)


# ---- the script
def run_part(name, args):
    "Figures of a part that runs in a process of its own, as a T4 but for making the weights."
    paths = [str(HERE/'as_t4')] if name != 'weights' else []
    paths += [os.environ.get('PYTHONPATH', '')]
    command = [sys.executable, '-m', 'benchmarks.first_minutes', '--part', name, '--base', args.base,
               '--model', args.model, '--layers', str(args.layers), '--max-length', str(args.max_length)]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, paths)), HF_HUB_OFFLINE='1')
    try: done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, timeout=args.limit)
    except subprocess.TimeoutExpired: return dict(failed=f'not done within {args.limit} s')
    print(done.stdout, end='', flush=True)
    if done.returncode: return dict(failed=f'exit {done.returncode}')
    return json.loads(done.stdout.strip().splitlines()[-1])


def one_part(name, args):
    "Run the part `name` here and print its figures; a failure is told, not raised."
    try: figures = PARTS[name](args)
    except BaseException as error:   # SystemExit too: the JSON says what failed
        traceback.print_exc(file=sys.stdout)
        figures = dict(failed=f'{type(error).__name__}: {error}'[:600])
    last_line(figures)


def about():
    "The card and the versions."
    import torch
    import transformers
    versions = dict(torch=torch.__version__, transformers=transformers.__version__)
    for name in ('peft', 'bitsandbytes', 'accelerate'):
        try: versions[name] = __import__(name).__version__
        except ImportError: versions[name] = None
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'
    return dict(card=card, date=time.strftime('%Y-%m-%d'), versions=versions)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = list(PARTS)
    parser.add_argument('--model', choices=list(SHAPES), default='gemma-2-9b')
    parser.add_argument('--layers', type=int, default=0, help='fewer layers than the model has (default 0: all)')
    parser.add_argument('--max-length', type=int, default=MAX_LENGTH, help=f'tokens of a sequence ({MAX_LENGTH})')
    parser.add_argument('--only', nargs='+', choices=parts, help='parts to run (default: those that fit the model)')
    parser.add_argument('--limit', type=float, default=240., help='seconds of a part at most (default 240)')
    parser.add_argument('--out', type=Path, help='write the JSON to this file too')
    parser.add_argument('--commit', default='', help='of this checkout, for the record')
    parser.add_argument('--part', choices=parts, help=argparse.SUPPRESS)
    parser.add_argument('--base', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part: return one_part(args.part, args)
    # a decoder's own weights do not fit on a T4, and an encoder needs no LoRA to do so
    others = {'train_r16', 'train_r64', 'attention'} if 'deberta' in args.model else {'train_full'}
    wanted = args.only or [name for name in parts if name not in others]
    with tempfile.TemporaryDirectory() as work:
        args.base = f'{work}/base'
        figures = about() | dict(model=args.model, layers=args.layers or 'all', commit=args.commit, parts={})
        for name in PARTS:
            if name not in wanted and name != 'weights': continue
            figures['parts'][name] = run_part(name, args)
            # what is known so far survives a stop
            if args.out: args.out.write_text(json.dumps(figures, indent=1) + '\n')
    lines = [(name, key, str(value)) for name, part in figures['parts'].items() for key, value in part.items()]
    table(f"first minutes on {figures['card']}", ('part', 'figure', 'value'), lines)
    last_line(figures)


if __name__ == '__main__': main()
