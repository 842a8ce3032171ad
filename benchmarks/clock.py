"""Inference under deadlines: is it ever late, how many rows does the model answer, how far is that from an oracle?

    python -m benchmarks.clock [--rows 1500] [--train-rows 800]

Two runs of SmolLM2 (its lower 4 and 2 layers) on generated rows, whose law gives the log loss without the noise of
drawn labels. First without pressure: that is the full time. Then 100 %, 60 %, 30 % and 5 % of it, each also on a
machine that becomes three times slower half-way: every worker is stopped for two of three tenths of a second, with
SIGSTOP. The oracle reads rows in the same order, knows beforehand how fast the machine is and will be, wastes nothing
on safety, and publishes in no time. The last line of output is JSON.
"""
import argparse
import contextlib
import os
import signal
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import last_line, one_thread, table

SHARES, FACTOR = (1., .6, .3, .05), 3
LAYERS = (4, 2)   # of the two runs


# ---- runs and inferences
def make_runs(data):
    "The two runs, trained on the rows in the folder `data`."
    from underdog.training.run import train
    from underdog.console.demo import smollm2
    from underdog.model.settings import ModelConfig
    from underdog.text.prompt import PromptConfig
    from underdog.training.settings import TrainConfig
    # without help from the baselines, so that there is something to answer
    base, prompt = str(smollm2()), PromptConfig(max_length=128)
    cfg = TrainConfig(lr=1e-3, head_lr=5e-4, start='none', n_folds=4, evaluations=1)
    runs = []
    for layers in LAYERS:
        model = ModelConfig(base, layers=layers, rank=16, alpha=32, quantization='none')
        runs.append(train(data/'train.csv', model, data.parent/f'layers{layers}', prompt, cfg=cfg))
    return runs


@contextlib.contextmanager
def slower(after):
    "From `after` seconds on, let inference workers run for one third of the time."
    import psutil
    over = threading.Event()
    def brake():
        if over.wait(after): return
        while not over.is_set():
            # workers are what our child has started
            workers = [p for p in psutil.Process().children(recursive=True) if p.ppid() != os.getpid()]
            for number, seconds in ((signal.SIGSTOP, .1*(FACTOR - 1)), (signal.SIGCONT, .1)):
                for p in workers:
                    with contextlib.suppress(psutil.NoSuchProcess): p.send_signal(number)
                time.sleep(seconds)
    thread = threading.Thread(target=brake)
    thread.start()
    try: yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True)
class Inference:
    "An inference that was timed."
    out: Path
    seconds: float
    summary: dict

    def answered(self, run):
        "Rows that `run` has answered in one order or in both."
        return sum(self.summary['answered'][str(run.path)][1:])


def infer(folder, runs, name, limit):
    "An `Inference` with the deadline `limit` seconds from now."
    from underdog.core import read_json
    from underdog.inference.settings import InferConfig
    from underdog.inference.scored import predict
    data, out = folder/'data', folder/name
    began = time.monotonic()
    cfg = InferConfig(batch_tokens=512, processes=1, sample_submission=str(data/'sample_submission.csv'),
                      time_limit=limit/3600, began=began)
    predict([str(run.path) for run in runs], data/'test.csv', out, cfg)
    seconds = time.monotonic() - began
    # with little time nothing is answered, and there is no summary
    file = out/'summary.json'
    summary = read_json(file) if file.exists() else dict(answered={str(run.path): [0, 0] for run in runs})
    return Inference(out, seconds, summary)


# ---- the oracle
class Oracle:
    "What the same passes reach when every second until the deadline is used."
    def __init__(self, full):
        from underdog.core import read_json
        from underdog.inference.publish import Answers
        from underdog.inference.scored import start_jobs
        # the passes of the inference without pressure, and what they answered
        self.jobs, self.evidence = start_jobs(read_json(full.out/'submit.json'))
        Answers(full.out/'answers.npz', self.jobs).load()
        self.passes, lines = self.evidence.plan(self.jobs)
        print('\n'.join(lines))
        self.answers = [job.open().logits.copy() for job in self.jobs]
        # what they took: tokens per second, loading of the model, start-up with the first model
        spent = [full.summary['spent'][str(job.run.path)] for job, *_ in self.passes]
        self.speed = [s['tokens']/s['busy_s'] for s in spent]
        self.load = [0.] + [s['load_s'] for s in spent[1:]]
        self.before = full.seconds - sum(s['busy_s'] for s in spent) - sum(self.load)

    def probabilities(self, limit, slowed):
        "(n, C) after `limit` seconds."
        from underdog.inference.schedule import RANKINGS, doubt
        from underdog.inference.publish import blend_answers
        for job in self.jobs: job.logits[:] = np.nan
        left = self._seconds(limit, slowed)
        for (job, order, ranking), speed, load in zip(self.passes, self.speed, self.load):
            left -= load
            # the rows that fit into what is left, in the order of the real pass
            cost = job.source.tokens_of((order,))
            priority = RANKINGS[ranking](cost, doubt(blend_answers(self.jobs, self.evidence)))
            rows = np.argsort(-priority, kind='stable')
            used = np.cumsum(cost[rows])/speed
            rows = rows[used <= max(0., left)]
            i, k = self.jobs.index(job), job.orders.index(order)
            job.logits[k, rows] = self.answers[i][k, rows]
            left -= used[-1]
        return blend_answers(self.jobs, self.evidence)

    def _seconds(self, limit, slowed):
        "Seconds of computing at full speed between the start-up and `limit`."
        if not slowed: return max(0., limit - self.before)
        fast = max(0., limit/2 - self.before)
        slow = min(limit/2, max(0., limit - self.before))
        return fast + slow/FACTOR


# ---- how good
class Law:
    "The true probabilities of the generated rows in the folder `data`."
    def __init__(self, data):
        from underdog.core import read_json
        self.truth = read_json(data/'truth.json')['test']

    def of(self, ids): return np.array([self.truth[str(i)] for i in ids])

    def loss(self, ids, p):
        "Expected log loss of probabilities `p` (n, C) of the rows `ids`."
        return float(-(self.of(ids)*np.log(p.clip(1e-15))).sum(1).mean())

    def loss_of(self, inference):
        "Expected log loss of the submission of an `Inference`."
        import pandas as pd
        submission = pd.read_csv(inference.out/'submission.csv')
        return self.loss(submission['id'], submission.iloc[:, 1:].to_numpy())


def is_valid(inference, data, rows):
    from underdog.data.submission import check_submission
    from underdog.data.competition import LMSYS
    return check_submission(inference.out/'submission.csv', LMSYS, data/'sample_submission.csv') == rows


@dataclass(frozen=True)
class Deadline:
    "What came of one deadline."
    name: str
    limit_s: float
    taken_s: float
    answered: list   # rows, by run
    log_loss: float
    oracle: float
    valid: bool

    @property
    def overrun_s(self): return self.taken_s - self.limit_s

    @property
    def row(self):
        "For the table."
        rows = [f'{n:,}' for n in self.answered]
        return [self.name, self.limit_s, self.taken_s, *rows, f'{self.log_loss:.4f}', f'{self.oracle:.4f}']


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', type=int, default=1500, help='rows to predict')
    parser.add_argument('--train-rows', type=int, default=800)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    one_thread()
    from underdog.data.sample import write_sample
    with tempfile.TemporaryDirectory() as tmp:
        folder, data = Path(tmp), Path(tmp)/'data'
        write_sample(data, n_train=args.train_rows, n_test=args.rows, seed=args.seed)
        runs, law = make_runs(data), Law(data)
        # without pressure
        full = infer(folder, runs, 'full', 3600)
        oracle = Oracle(full)
        ids = oracle.jobs[0].df['id']
        print(f'full time {full.seconds:.1f} s, {oracle.before:.1f} s of them before the first answer')
        # under pressure
        deadlines = []
        for slowed in (False, True):
            for share in SHARES:
                limit, name = share*full.seconds, f'{share:.0%}{" slower" if slowed else ""}'
                pressure = slower(limit/2) if slowed else contextlib.nullcontext()
                with pressure: inference = infer(folder, runs, name, limit)
                deadlines.append(Deadline(
                    name,
                    limit_s=limit,
                    taken_s=inference.seconds,
                    answered=[inference.answered(run) for run in runs],
                    log_loss=law.loss_of(inference),
                    oracle=law.loss(ids, oracle.probabilities(limit, slowed)),
                    valid=is_valid(inference, data, args.rows),
                ))
        # between nothing and everything
        floors, everything = law.loss(ids, oracle.probabilities(0, False)), law.loss_of(full)
        best_possible = law.loss(ids, law.of(ids))
    show(deadlines, f'{args.rows:,} rows; floors {floors:.4f}, everything {everything:.4f}, law {best_possible:.4f}')
    figures = {d.name: {k: v for k, v in vars(d).items() if k not in ('name', 'valid')} for d in deadlines}
    last_line(dict(
        overruns=sum(d.overrun_s > 0 for d in deadlines),
        worst_overrun_s=max(0., *(d.overrun_s for d in deadlines)),
        invalid_submissions=sum(not d.valid for d in deadlines),
        full_s=full.seconds,
        rows=args.rows,
        floors=floors,
        everything=everything,
        deadlines=figures,
    ))


def show(deadlines, title):
    "Print the table."
    columns = ['deadline', 'seconds', 'taken', *(f'rows, {n} layers' for n in LAYERS), 'log loss', 'oracle']
    table(title, columns, [d.row for d in deadlines])


if __name__ == '__main__': main()
