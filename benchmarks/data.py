"""Rows per second from a csv file to token ids: underdog's streamed tokenization beside a plain pandas + per-row loop.

    python -m benchmarks.data [--rows 57477] [--train FILE] [--tokenizer DIR] [--head pair] [--max-length 1024]

Each side runs in a process of its own and reads the same file. The last line of output is JSON. Without --train, rows are generated with the lengths of the LMSYS
competition's train.csv; without --tokenizer, a byte-level BPE is trained on the spot.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from underdog.search.estimate import CHARS_PER_TOKEN, LENGTHS, PROMPT_SHARE

MULTI_TURN = .13          # share of rows with more than one turn
WORDS = """the of and to in a is that for it as was with be by on not he this are or his from at which but have an had they you were their one all we can
her has there been if more when will would who so no about code value list return function question answer because example time people number water write
language model first system world work point these could different important reason large small between under think explain great story""".split()


def random_text(chars, rng):
    "About `chars` characters of common words, invented words, numbers, lists and paragraphs."
    syllables = ['ka', 'ren', 'to', 'mi', 'sol', 'ver', 'ta', 'qui', 'lan', 'des', 'por', 'ing', 'ble']
    invented = [''.join(rng.choice(syllables, rng.integers(2, 5))) for _ in range(3000)]
    pool = np.array(WORDS*20 + invented + [str(n) for n in range(200)] + ['\n', '\n\n', '\n- ', '.\n', ', ', '. '*1]*60, dtype=object)
    return ' '.join(rng.choice(pool, chars//5))


def make_rows(n, seed=0):
    "A DataFrame of `n` labelled rows whose lengths follow `LENGTHS`."
    import pandas as pd
    rng = np.random.default_rng(seed)
    text = random_text(8_000_000, rng)
    share, tokens = np.array(LENGTHS).T
    total = np.exp(np.interp(rng.random(n), share, np.log(tokens)))*CHARS_PER_TOKEN
    turns = np.where(rng.random(n) < MULTI_TURN, rng.integers(2, 6, n), 1)
    split = rng.beta(8, 8, n)    # how the two answers share the rest

    def cell(chars, turns):
        at = rng.integers(0, len(text) - int(chars) - 1)
        size = max(1, int(chars)//turns)
        return [text[at + i*size:at + (i + 1)*size] for i in range(turns)]
    rows = [(cell(c*PROMPT_SHARE, t), cell(c*(1 - PROMPT_SHARE)*s, t), cell(c*(1 - PROMPT_SHARE)*(1 - s), t)) for c, t, s in zip(total, turns, split)]
    df = pd.DataFrame(rows, columns=['prompt', 'response_a', 'response_b'])
    winner = rng.integers(0, 3, n)
    df.insert(0, 'id', np.arange(n))
    df.insert(1, 'model_a', 'one')
    df.insert(2, 'model_b', 'two')
    return df.assign(**{c: (winner == i).astype('float32') for i, c in enumerate(('a', 'b', 'tie'))})


def make_tokenizer(folder, seed=0):
    "Train a byte-level BPE of 8,000 entries on generated text and save it to `folder`."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=['<s>', '</s>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    bpe.train_from_iterator([random_text(1_000_000, np.random.default_rng(seed))], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token='<s>', eos_token='</s>').save_pretrained(folder)


def peak_gb():
    "Peak resident memory of this process in GB (10^9 bytes), its own from its start."
    status = Path('/proc/self/status')    # ru_maxrss of a child can show its parent's peak
    if status.exists(): return int(status.read_text().split('VmHWM:')[1].split()[0])*1024/1e9
    from underdog.machine import peak_memory_gb
    return peak_memory_gb()


def run_underdog(file, tokenizer, head, max_length, cache):
    "Read and tokenize with underdog; a second pass finds the cache."
    from underdog.machine import quiet
    from underdog.data.rows import read_rows
    from underdog.text.prompt import PromptConfig, Prompter, tokenize_rows
    quiet()
    prompter = Prompter(PromptConfig(max_length=max_length), tokenizer, head)
    start = time.perf_counter()
    df, _ = read_rows(file)
    read = time.perf_counter() - start
    tokens = tokenize_rows(df, prompter, cache)
    seconds, peak = time.perf_counter() - start, peak_gb()
    again = time.perf_counter()
    tokenize_rows(df, prompter, cache)
    full = sum(int(np.sum(tokens[i:i + 10000]['full'])) for i in range(0, len(tokens), 10000))
    return dict(rows=len(df), seconds=seconds, read_s=read, peak=peak, cached_s=time.perf_counter() - again, tokens=full)


def run_loop(file, tokenizer, head, max_length, cache):
    "What most public notebooks do: pandas, a loop over the rows, three tokenizer calls each, ids in lists."
    import pandas as pd
    from transformers import AutoTokenizer
    tok = AutoTokenizer.from_pretrained(tokenizer)
    start = time.perf_counter()
    df, rows = pd.read_csv(file), []
    read = time.perf_counter() - start
    for _, row in df.iterrows():
        ids = [tok('\n'.join(t or '' for t in json.loads(row[c])), add_special_tokens=False)['input_ids'] for c in ('prompt', 'response_a', 'response_b')]
        room = max_length//3
        rows.append(dict(zip(('prompt', 'a', 'b'), (i[-room:] for i in ids)), id=row['id']))
    tokens = pd.DataFrame(rows)
    return dict(rows=len(tokens), seconds=time.perf_counter() - start, read_s=read, peak=peak_gb())


def measure(side, args, file, tokenizer, cache):
    "Run one side in a fresh process; its figures."
    command = [sys.executable, '-m', 'benchmarks.data', '--side', side, '--train', str(file), '--tokenizer', str(tokenizer), '--head', args.head,
               '--max-length', str(args.max_length), '--cache', str(cache)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode: raise SystemExit(f'the {side} side failed, see above')
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=57477, help='rows to generate')
    parser.add_argument('--train', default='', help="a competition's train.csv instead")
    parser.add_argument('--tokenizer', default='', help='folder of a tokenizer')
    parser.add_argument('--head', default='pair', choices=('pair', 'joint'))
    parser.add_argument('--max-length', type=int, default=1024)
    parser.add_argument('--side', choices=('underdog', 'loop'), help=argparse.SUPPRESS)
    parser.add_argument('--cache', default='', help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run = run_underdog if args.side == 'underdog' else run_loop
        print(json.dumps(run(args.train, args.tokenizer, args.head, args.max_length, args.cache)))
        return
    if args.rows < 1: parser.error('--rows must be above 0')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        file, tokenizer = Path(args.train or folder/'train.csv'), args.tokenizer or folder/'tokenizer'
        if not args.train:
            from underdog.data.competition import LMSYS
            from underdog.data.rows import write_rows
            print(f'writing {args.rows:,} generated rows …', flush=True)
            write_rows(file, make_rows(args.rows), LMSYS)
        if not args.tokenizer: make_tokenizer(tokenizer)
        ours, loop = (measure(side, args, file, tokenizer, folder/'cache') for side in ('underdog', 'loop'))
        size = file.stat().st_size/1e6
    rate = {name: r['rows']/r['seconds'] for name, r in (('underdog', ours), ('loop', loop))}
    print(f"{ours['rows']:,} rows, {size:,.0f} MB, {ours['tokens']:,} tokens, head {args.head}, max_length {args.max_length}\n")
    print(f"{'':22}{'rows/s':>10}{'seconds':>10}{'reading':>10}{'peak GB':>10}")
    for name, r in (('underdog', ours), ('pandas + per-row loop', loop)):
        print(f"{name:22}{r['rows']/r['seconds']:>10,.0f}{r['seconds']:>10.1f}{r['read_s']:>10.1f}{r['peak']:>10.2f}")
    print(f"{'underdog, cached':22}{ours['rows']/ours['cached_s']:>10,.0f}{ours['cached_s']:>10.1f}\n")
    print(json.dumps(dict(rows=ours['rows'], underdog_rows_per_s=round(rate['underdog'], 1), loop_rows_per_s=round(rate['loop'], 1),
                          ratio=round(rate['underdog']/rate['loop'], 2), peak_memory_gb=round(ours['peak'], 3), loop_peak_memory_gb=round(loop['peak'], 3),
                          cached_s=round(ours['cached_s'], 2))))


if __name__ == '__main__': main()
