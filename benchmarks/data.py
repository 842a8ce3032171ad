"""Rows per second from a csv file to token ids: underdog's streamed tokenization beside a plain pandas + per-row loop.

    python -m benchmarks.data [--rows 57477] [--train FILE] [--tokenizer DIR] [--head pair] [--max-length 1024]

Each side runs in a process of its own and reads the same file. Without --train, rows are generated with the lengths
of the LMSYS competition's train.csv; without --tokenizer, a byte-level BPE is trained on the spot. The last line of
output is JSON.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from underdog.search.lengths import CHARS_PER_TOKEN, LENGTHS, PROMPT_SHARE

from benchmarks.common import save_tokenizer

MULTI_TURN = .13   # share of rows with more than one turn
WORDS = """
the of and to in a is that for it as was with be by on not he this are or his from at which but have an had they you
were their one all we can her has there been if more when will would who so no about code value list return function
question answer because example time people number water write language model first system world work point these
could different important reason large small between under think explain great story""".split()
SYLLABLES = ['ka', 'ren', 'to', 'mi', 'sol', 'ver', 'ta', 'qui', 'lan', 'des', 'por', 'ing', 'ble']
BREAKS = ['\n', '\n\n', '\n- ', '.\n', ', ', '. ']


def random_text(chars, rng):
    "About `chars` characters of common words, invented words, numbers, lists and paragraphs."
    invented = [''.join(rng.choice(SYLLABLES, rng.integers(2, 5))) for _ in range(3000)]
    numbers = [str(n) for n in range(200)]
    pool = np.array(WORDS*20 + invented + numbers + BREAKS*60, dtype=object)
    return ' '.join(rng.choice(pool, chars//5))


def make_rows(n, seed=0):
    "A DataFrame of `n` labelled rows whose lengths follow `LENGTHS`."
    import pandas as pd
    rng = np.random.default_rng(seed)
    text = random_text(8_000_000, rng)
    # characters and turns of each row, and how the two answers share what the prompt leaves
    share, tokens = np.array(LENGTHS).T
    total = np.exp(np.interp(rng.random(n), share, np.log(tokens)))*CHARS_PER_TOKEN
    turns = np.where(rng.random(n) < MULTI_TURN, rng.integers(2, 6, n), 1)
    split = rng.beta(8, 8, n)

    def cell(chars, turns):
        at = rng.integers(0, len(text) - int(chars) - 1)
        size = max(1, int(chars)//turns)
        return [text[at + i*size:at + (i + 1)*size] for i in range(turns)]

    # texts are pieces of the one text
    rows, answers = [], 1 - PROMPT_SHARE
    for c, t, s in zip(total, turns, split):
        rows.append((cell(c*PROMPT_SHARE, t), cell(c*answers*s, t), cell(c*answers*(1 - s), t)))
    df = pd.DataFrame(rows, columns=['prompt', 'response_a', 'response_b'])
    # the other columns of a train.csv
    winner = rng.integers(0, 3, n)
    df.insert(0, 'id', np.arange(n))
    df.insert(1, 'model_a', 'one')
    df.insert(2, 'model_b', 'two')
    return df.assign(**{c: (winner == i).astype('float32') for i, c in enumerate(('a', 'b', 'tie'))})


def make_tokenizer(folder, seed=0):
    "A byte-level BPE of 8,000 entries, trained on generated text, in `folder`."
    save_tokenizer(folder, [random_text(1_000_000, np.random.default_rng(seed))], 8000)


def peak_gb():
    "Peak resident memory of this process in GB (10^9 bytes), its own from its start."
    status = Path('/proc/self/status')    # ru_maxrss of a child can show its parent's peak
    if status.exists(): return int(status.read_text().split('VmHWM:')[1].split()[0])*1024/1e9
    from underdog.machine import peak_memory_gb
    return peak_memory_gb()


# ---- the two sides, each in a process of its own
def run_underdog(args):
    "Read and tokenize with underdog; a second pass finds the cache."
    from underdog.machine import quiet
    from underdog.data.rows import read_rows
    from underdog.text.prompt import PromptConfig, Prompter
    from underdog.text.tokens import tokenize_rows
    quiet()
    prompter = Prompter(PromptConfig(max_length=args.max_length), args.tokenizer, args.head)
    # read and tokenize
    start = time.perf_counter()
    df, _ = read_rows(args.train)
    read_s = time.perf_counter() - start
    tokens = tokenize_rows(df, prompter, args.cache)
    seconds = time.perf_counter() - start
    peak = peak_gb()
    # from the cache
    again = time.perf_counter()
    tokenize_rows(df, prompter, args.cache)
    total = sum(int(np.sum(tokens[i:i + 10000]['full'])) for i in range(0, len(tokens), 10000))
    cached_s = time.perf_counter() - again
    return dict(rows=len(df), seconds=seconds, read_s=read_s, peak=peak, cached_s=cached_s, tokens=total)


def run_loop(args):
    "What most public notebooks do: pandas, a loop over the rows, three tokenizer calls each, ids in lists."
    import pandas as pd
    from transformers import AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    start = time.perf_counter()
    df = pd.read_csv(args.train)
    read_s = time.perf_counter() - start
    # a third of the length for each text
    rows, room = [], args.max_length//3
    for _, row in df.iterrows():
        texts = ['\n'.join(turn or '' for turn in json.loads(row[c])) for c in ('prompt', 'response_a', 'response_b')]
        prompt, a, b = (tokenizer(text, add_special_tokens=False)['input_ids'][-room:] for text in texts)
        rows.append(dict(prompt=prompt, a=a, b=b, id=row['id']))
    tokens = pd.DataFrame(rows)
    return dict(rows=len(tokens), seconds=time.perf_counter() - start, read_s=read_s, peak=peak_gb())


SIDES = dict(underdog=run_underdog, loop=run_loop)


def measure(side, args, cache):
    "Run one side in a fresh process; its figures."
    options = dict(side=side, train=args.train, tokenizer=args.tokenizer, head=args.head, max_length=args.max_length,
                   cache=cache)
    command = [sys.executable, '-m', 'benchmarks.data']
    for name, value in options.items(): command += ['--' + name.replace('_', '-'), str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode: raise SystemExit(f'the {side} side failed, see above')
    return json.loads(done.stdout.strip().splitlines()[-1])


def fill_in(args, folder):
    "Make the rows and the tokenizer that `args` leave out."
    if not args.train:
        from underdog.data.competition import LMSYS
        from underdog.data.rows import write_rows
        args.train = str(folder/'train.csv')
        print(f'writing {args.rows:,} generated rows …', flush=True)
        write_rows(args.train, make_rows(args.rows), LMSYS)
    if not args.tokenizer:
        args.tokenizer = str(folder/'tokenizer')
        make_tokenizer(args.tokenizer)


def show(ours, loop):
    "Print a line for each side, and one for the cache."
    print(f"{'':22}{'rows/s':>10}{'seconds':>10}{'reading':>10}{'peak GB':>10}")
    for name, side in (('underdog', ours), ('pandas + per-row loop', loop)):
        rate = side['rows']/side['seconds']
        print(f"{name:22}{rate:>10,.0f}{side['seconds']:>10.1f}{side['read_s']:>10.1f}{side['peak']:>10.2f}")
    rate = ours['rows']/ours['cached_s']
    print(f"{'underdog, cached':22}{rate:>10,.0f}{ours['cached_s']:>10.1f}\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=57477, help='rows to generate')
    parser.add_argument('--train', default='', help="a competition's train.csv instead")
    parser.add_argument('--tokenizer', default='', help='folder of a tokenizer')
    parser.add_argument('--head', default='pair', choices=('pair', 'joint'))
    parser.add_argument('--max-length', type=int, default=1024)
    parser.add_argument('--side', choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument('--cache', default='', help=argparse.SUPPRESS)
    args = parser.parse_args()
    # a child measures its side
    if args.side:
        print(json.dumps(SIDES[args.side](args)))
        return
    # the parent makes what is missing and starts a child for each side
    if args.rows < 1: parser.error('--rows must be above 0')
    with tempfile.TemporaryDirectory() as folder:
        fill_in(args, Path(folder))
        ours, loop = (measure(side, args, Path(folder)/'cache') for side in SIDES)
        size = Path(args.train).stat().st_size/1e6
    # figures
    print(f"{ours['rows']:,} rows, {size:,.0f} MB, {ours['tokens']:,} tokens, head {args.head}, "
          f'max_length {args.max_length}\n')
    show(ours, loop)
    rate = {name: side['rows']/side['seconds'] for name, side in (('underdog', ours), ('loop', loop))}
    print(json.dumps(dict(
        rows=ours['rows'],
        underdog_rows_per_s=round(rate['underdog'], 1),
        loop_rows_per_s=round(rate['loop'], 1),
        ratio=round(rate['underdog']/rate['loop'], 2),
        peak_memory_gb=round(ours['peak'], 3),
        loop_peak_memory_gb=round(loop['peak'], 3),
        cached_s=round(ours['cached_s'], 2),
    )))


if __name__ == '__main__': main()
