"""Inference under deadlines: `python -m benchmarks.clock`. Is it ever late, how many rows does the model answer, and how far is that from an oracle that knew the speed beforehand?

Two runs of SmolLM2 (its lower 4 and 2 layers) on generated rows, whose law gives the log loss without the noise of drawn labels. First without pressure: that is the full time. Then 100 %, 60 %, 30 % and 5 % of it, each also on a machine that becomes three times slower
half-way: every worker is stopped for two of three tenths of a second, with SIGSTOP. The oracle reads rows in the same order, knows beforehand how fast the machine is and will be, wastes nothing on safety, and publishes in no time."""
import argparse
import contextlib
import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from benchmarks.common import last_line, one_thread, table

SHARES, FACTOR = (1., .6, .3, .05), 3


def make_runs(folder, n_train):
    "Train the two runs."
    from underdog.console.demo import smollm2
    from underdog.training.run import train
    from underdog.model.model import ModelConfig
    from underdog.text.prompt import PromptConfig
    from underdog.training.settings import TrainConfig
    base = str(smollm2())
    cfg = TrainConfig(lr=1e-3, head_lr=5e-4, start='none', n_folds=4, evaluations=1)
    models = {n: ModelConfig(base, layers=n, rank=16, alpha=32, quantization='none') for n in (4, 2)}
    return [train(folder/'data'/'train.csv', m, folder/f'layers{n}', PromptConfig(max_length=128), cfg=cfg) for n, m in models.items()]


@contextlib.contextmanager
def slower(after):
    "From `after` seconds on, let inference workers run for one third of the time."
    import psutil
    over = threading.Event()
    def brake():
        if over.wait(after): return
        while not over.is_set():
            mine = psutil.Process().children(recursive=True)
            workers = [p for p in mine if p.ppid() != os.getpid()]   # what our child has started
            for wanted, seconds in ((signal.SIGSTOP, .1*(FACTOR - 1)), (signal.SIGCONT, .1)):
                for p in workers:
                    with contextlib.suppress(psutil.NoSuchProcess): p.send_signal(wanted)
                time.sleep(seconds)
    thread = threading.Thread(target=brake)
    thread.start()
    try: yield
    finally:
        over.set()
        thread.join()


def timed(folder, runs, name, limit):
    "(seconds, summary) of an inference with `limit` seconds."
    from underdog.core import read_json
    from underdog.inference.job import InferConfig
    from underdog.inference.scored import predict
    began = time.monotonic()
    predict([str(r.path) for r in runs], folder/'data'/'test.csv', folder/name, 
            InferConfig(batch_tokens=512, processes=1, sample_submission=str(folder/'data'/'sample_submission.csv'), time_limit=limit/3600, began=began))
    seconds, file = time.monotonic() - began, folder/name/'summary.json'
    return seconds, read_json(file) if file.exists() else dict(answered={str(r.path): [0, 0] for r in runs})


class Oracle:
    "What the same passes reach when every second until the deadline is used."
    def __init__(self, folder, runs, full_s, full):
        from underdog.inference.scored import Answers, start_jobs
        from underdog.core import read_json
        self.jobs, self.evidence = start_jobs(read_json(folder/'full'/'submit.json'))
        Answers(folder/'full'/'answers.npz', self.jobs).load()
        self.passes, said = self.evidence.plan(self.jobs)
        print('\n'.join(said))
        spent = [full['spent'][str(j.run.path)] for j, *_ in self.passes]
        self.speed = [s['tokens']/s['busy_s'] for s in spent]
        self.load = [0.] + [s['load_s'] for s in spent[1:]]
        self.before = full_s - sum(s['busy_s'] for s in spent) - sum(self.load)   # start-up and the first model
        self.answers = [j.open().logits.copy() for j in self.jobs]

    def probabilities(self, limit, slowed):
        "(n, C) after `limit` seconds."
        from underdog.inference.schedule import RANKINGS, doubt
        from underdog.inference.scored import current
        for j in self.jobs: j.logits[:] = np.nan
        left = max(0., limit - self.before) if not slowed else max(0., limit/2 - self.before) + min(limit/2, max(0., limit - self.before))/FACTOR
        for (job, order, ranking), speed, load in zip(self.passes, self.speed, self.load):
            left -= load
            cost = job.source.tokens_of((order,))
            rows = np.argsort(-RANKINGS[ranking](cost, doubt(current(self.jobs, self.evidence))), kind='stable')
            used = np.cumsum(cost[rows])/speed
            rows = rows[used <= max(0., left)]
            i, k = self.jobs.index(job), job.orders.index(order)
            job.logits[k, rows] = self.answers[i][k, rows]
            left -= used[-1]
        return current(self.jobs, self.evidence)


def log_loss_of(path, folder):
    "Log loss of a submission under the law of the generated rows."
    import pandas as pd

    from underdog.core import read_json
    truth, p = read_json(folder/'data'/'truth.json')['test'], pd.read_csv(path)
    return expected(np.array([truth[str(i)] for i in p['id']]), p.iloc[:, 1:].to_numpy())


def expected(law, p): return float(-(law*np.log(p.clip(1e-15))).sum(1).mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--rows', type=int, default=1500, help='rows to predict')
    parser.add_argument('--train-rows', type=int, default=800)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    one_thread()
    from underdog.data.submission import check_submission
    from underdog.data.competition import LMSYS
    from underdog.core import read_json
    from underdog.data.sample import write_sample
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        write_sample(folder/'data', n_train=args.train_rows, n_test=args.rows, seed=args.seed)
        runs = make_runs(folder, args.train_rows)
        full_s, full = timed(folder, runs, 'full', 3600)
        oracle, truth = Oracle(folder, runs, full_s, full), read_json(folder/'data'/'truth.json')['test']
        law = np.array([truth[str(i)] for i in oracle.jobs[0].df['id']])
        lines, overruns, worst, invalid = [], 0, 0., 0
        print(f'full time {full_s:.1f} s, {oracle.before:.1f} s of them before the first answer')
        for slowed in (False, True):
            for share in SHARES:
                limit, name = share*full_s, f'{share:.0%}{" slower" if slowed else ""}'
                with slower(limit/2) if slowed else contextlib.nullcontext(): seconds, found = timed(folder, runs, name, limit)
                overruns += seconds > limit
                worst = max(worst, seconds - limit)
                invalid += check_submission(folder/name/'submission.csv', LMSYS, folder/'data'/'sample_submission.csv') != args.rows
                answered = [sum(found['answered'][str(r.path)][1:]) for r in runs]
                lines.append((name, limit, seconds, *answered, log_loss_of(folder/name/'submission.csv', folder), expected(law, oracle.probabilities(limit, slowed))))
        floors, everything = expected(law, oracle.probabilities(0, False)), log_loss_of(folder/'full'/'submission.csv', folder)
        table(f'{args.rows:,} rows; floors {floors:.4f}, everything {everything:.4f}, law {expected(law, law):.4f}', ['deadline', 'seconds', 'taken', 'rows, 4 layers', 'rows, 2 layers', 'log loss', 'oracle'],
              [[n, l, s, f'{a:,}', f'{b:,}', f'{x:.4f}', f'{o:.4f}'] for n, l, s, a, b, x, o in lines])
        last_line(dict(overruns=overruns, worst_overrun_s=worst, invalid_submissions=invalid, full_s=full_s, rows=args.rows, floors=floors, everything=everything,
                       deadlines={n: dict(limit_s=l, taken_s=s, answered=[a, b], log_loss=x, oracle=o) for n, l, s, a, b, x, o in lines}))


if __name__ == '__main__': main()
