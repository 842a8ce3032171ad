"""How long until it works: from the command to training's first step, and to the first valid submission.

    python -m benchmarks.startup [--rows 57477] [--test-rows 25000]

Generated rows with the lengths of the LMSYS competition's files and a Llama of two layers, so that hardly any of the
time is the model's (no probe either). Each start is a process of its own, watched from outside: wall and CPU seconds
of it and all its children until the first line of metrics.jsonl, or the first submission.csv that `check_submission`
takes, and the largest memory of them all together (shared pages once). Training starts twice, with an empty cache of
tokens and baselines and with a full one. Wall seconds hold only on a quiet machine: `load` is the system's, this
benchmark included. The last line of output is JSON.
"""
import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks.common import last_line, make_world, save_tokenizer, table
from benchmarks.data import make_rows, random_text

TRAIN = """
from underdog import ModelConfig, SessionConfig, TrainConfig, train
train({train!r}, ModelConfig({base!r}, rank=8, quantization='none'), {out!r},
      cfg=TrainConfig(probe_rows=0, batch_tokens=2048), session=SessionConfig(processes=1))
"""
PREDICT = """
from underdog import InferConfig, predict
predict([{run!r}], {test!r}, {out!r}, InferConfig(sample_submission={sample!r}))
"""
LIMIT = 3600   # seconds after which a start has failed


# ---- a start, seen from outside
def family(root):
    "The process `root` and all its children."
    import psutil
    with suppress(psutil.NoSuchProcess): return [root, *root.children(recursive=True)]
    return []


def cpu_seconds(processes):
    "CPU seconds of the living `processes` and of those that they have seen end."
    import psutil
    total = 0.
    for p in processes:
        with suppress(psutil.NoSuchProcess): total += sum(p.cpu_times()[:4])   # user, system, and the children's
    return total


def memory_gb(processes):
    "Memory of the `processes` in GB (10^9 bytes); pages that several share count once."
    import psutil
    total = 0
    for p in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied): total += p.memory_full_info().pss
    return total/1e9


def watch(code, done, cache, log):
    "Figures of a process that runs `code`, until `done()`; then it is ended, with its children."
    import psutil
    env = dict(os.environ, UNDERDOG_CACHE=str(cache), HF_HUB_OFFLINE='1')
    began, peak, looked = time.perf_counter(), 0., 0.
    with open(log, 'w') as file:
        child = subprocess.Popen([sys.executable, '-c', code], stdout=file, stderr=subprocess.STDOUT, env=env)
    root = psutil.Process(child.pid)
    try:
        while not done():
            # ended too early, or far too slow?
            if child.poll() is not None or time.perf_counter() - began > LIMIT:
                raise SystemExit(f'the start has failed:\n{Path(log).read_text()[-3000:]}')
            # to look at the memory takes time of its own
            if time.perf_counter() - looked > 1:
                peak, looked = max(peak, memory_gb(family(root))), time.perf_counter()
            time.sleep(.02)
        wall, processes = time.perf_counter() - began, family(root)
        return dict(wall_s=wall, cpu_s=cpu_seconds(processes), peak_gb=peak, load=os.getloadavg()[0])
    finally: end(family(root))


def end(processes):
    "Kill the `processes`, which this benchmark has started, and wait until they are gone."
    import psutil
    for p in processes:
        with suppress(psutil.NoSuchProcess): p.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=20)


# ---- what is started
def write_world(folder, rows, test_rows):
    "{name: path}: train.csv, test.csv and its sample of real lengths, a small model with a tokenizer, a finished run."
    import pandas as pd

    from underdog import ModelConfig, PromptConfig, TrainConfig, train
    from underdog.data.competition import LMSYS
    from underdog.data.rows import write_rows
    made, base = make_world(folder, n_train=200, n_test=20)
    save_tokenizer(base, [random_text(1_000_000, _rng())], 8000)
    _resize(base, 8000)
    # the files of a competition
    paths = {name: folder/f'{name}.csv' for name in ('train', 'test', 'sample')}
    write_rows(paths['train'], make_rows(rows), LMSYS)
    test = make_rows(test_rows, seed=1)
    write_rows(paths['test'], test.drop(columns=['model_a', 'model_b', *LMSYS.classes]), LMSYS)
    sample = pd.DataFrame({'id': test['id'].sample(frac=1, random_state=0)})
    sample.assign(**dict.fromkeys(LMSYS.label_columns, 1/3)).to_csv(paths['sample'], index=False)
    # a run to predict with
    model = ModelConfig(str(base), rank=8, quantization='none')
    train(made['train.csv'], model, folder/'trained', PromptConfig(), cfg=TrainConfig(probe_rows=0, evaluations=1))
    return {name: str(path) for name, path in paths.items()} | dict(base=str(base), run=str(folder/'trained'))


def _rng():
    import numpy as np
    return np.random.default_rng(0)


def _resize(base, entries):
    "Give the model in `base` a vocabulary of so many `entries`."
    from transformers import AutoModel
    model = AutoModel.from_pretrained(base)
    model.resize_token_embeddings(entries)
    model.save_pretrained(base)


def training(world, folder, name):
    "Figures until training's first step."
    out = folder/name
    metrics = out/'metrics.jsonl'
    code = TRAIN.format(train=world['train'], base=world['base'], out=str(out))
    return watch(code, lambda: metrics.exists() and metrics.stat().st_size, folder/'cache', folder/f'{name}.log')


def submission(world, folder):
    "Figures until the first valid submission."
    from underdog.data.competition import LMSYS
    from underdog.data.submission import check_submission
    out = folder/'predictions'
    code = PREDICT.format(run=world['run'], test=world['test'], out=str(out), sample=world['sample'])
    file = out/'submission.csv'
    figures = watch(code, file.exists, folder/'cache-test', folder/'predict.log')
    return figures | dict(rows=check_submission(file, LMSYS, world['sample']))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=57477, help='rows to train on')
    parser.add_argument('--test-rows', type=int, default=25000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f'writing {args.rows:,} and {args.test_rows:,} rows …', flush=True)
        world = write_world(folder, args.rows, args.test_rows)
        starts = dict(submission=submission(world, folder))
        for cache in ('cold', 'warm'): starts[f'step_{cache}'] = training(world, folder, cache)
    columns = ['start', 'wall s', 'CPU s', 'peak GB', 'load']
    rows = [[name, *(f[c] for c in ('wall_s', 'cpu_s', 'peak_gb', 'load'))] for name, f in starts.items()]
    table(f'{args.rows:,} training rows, {args.test_rows:,} test rows, {os.cpu_count()} cores', columns, rows)
    last_line({f'{start}_{name}': value for start, figures in starts.items() for name, value in figures.items()})


if __name__ == '__main__': main()
