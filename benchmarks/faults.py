"""Kill training and inference at random moments, start them again, and look for anything that was lost.

    python -m benchmarks.faults [--kills 50] [--rows 140]

Real processes, SIGKILL: of everything (the machine is gone), of the worker alone, of the parent alone, of one inference
worker. Half of the moments are drawn from the whole duration, start-up included; the other half come while a checkpoint
or a submission is being written. The wall clock of every process jumps by hours, back and forth. What counts is the
end: weights, held-out predictions and submission must be those of runs that were never disturbed. The last line of
output is JSON.
"""
import argparse
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.common import last_line, make_world, one_thread

ROOT = Path(__file__).resolve().parents[1]
JUMPS = '''import random, time
_real = time.time
time.time = lambda: _real() + random.Random(int(_real()*2)).choice([-86400, 0, 7200])
'''   # loaded by every process as sitecustomize
WRITTEN = dict(   # files that are there while something is written
    train=['checkpoint/.step-*', '.oof*', '.adapter*'],
    infer=['.submission.csv.*', '.answers*', '.predictions*'],
)
VICTIMS = dict(
    train=['all', 'all', 'worker', 'parent'],
    infer=['all', 'all', 'worker', 'parent', 'youngest'],
)
WHOLE = dict(train='whole', infer='whole-infer')   # folders of the runs that are not disturbed


# ---- what is killed
def train_job(folder, out):
    "A whole training, with a checkpoint every .3 seconds."
    from underdog.session import SessionConfig
    from underdog.training.run import train
    from underdog.model.settings import ModelConfig
    from underdog.text.prompt import PromptConfig
    from underdog.training.settings import TrainConfig
    model = ModelConfig(str(folder/'base'), rank=4, quantization='none')
    cfg = TrainConfig(n_folds=3, epochs=6., batch_rows=8, batch_tokens=512, lr=1e-2, head_lr=1e-2, evaluations=4)
    session = SessionConfig(save_minutes=.005)
    train(folder/'data'/'train.csv', model, out, PromptConfig(max_length=96), cfg=cfg, session=session)


def infer_job(folder, out):
    "A whole inference by two workers, with a deadline an hour away."
    from underdog.inference.settings import InferConfig
    from underdog.inference.scored import predict
    sample = str(folder/'data'/'sample_submission.csv')
    cfg = InferConfig(batch_tokens=300, processes=2, sample_submission=sample, time_limit=1., publish_s=.2)
    predict(str(folder/WHOLE['train']), folder/'data'/'test.csv', out, cfg)


JOBS = dict(train=train_job, infer=infer_job)


def do_job(kind, folder, out):
    from underdog.machine import quiet
    quiet()
    JOBS[kind](Path(folder), out)


def start(kind, folder, out):
    "A process that does the job `kind`."
    path = [str(folder/'jumps'), str(ROOT), os.environ.get('PYTHONPATH', '')]
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(path), OMP_NUM_THREADS='1')
    command = [sys.executable, '-m', 'benchmarks.faults', '--job', kind, str(folder), str(out)]
    with open(folder/'log.txt', 'ab') as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT)


# ---- kills
class Moment(NamedTuple):
    "When to kill: after so many seconds, and not before a file is there that fits the pattern."
    after: float
    pattern: str

    def __str__(self):
        file = f' at {self.pattern}' if self.pattern else ''
        return f'{self.after:.1f} s after its start{file}'


def draw_moment(kind, seconds, rng):
    "Any moment of a job that takes `seconds`, or one at which it writes."
    pattern = rng.choice(WRITTEN[kind])
    if rng.random() < .5: return Moment(rng.uniform(0, seconds), '')
    return Moment(rng.uniform(0, .6*seconds), pattern)


def wait_for(moment, process, out, seconds):
    "Wait until the moment; False when the process ended before it."
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 3*seconds + 30:
        late = time.monotonic() - began >= moment.after
        if late and (not moment.pattern or any(out.glob(moment.pattern))): return True
        time.sleep(.002)
    return process.poll() is None


def kill(process, whom):
    "SIGKILL `whom`: everything, the worker, the parent, or the youngest process; then wait for those that are to die."
    import psutil
    try: tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess: tree = []
    # the chosen ones
    children = [p for p in tree if p.is_running()]
    chosen = dict(all=[process, *children], parent=[process], worker=children[:1], youngest=children[-1:])
    for p in chosen[whom] or [process]:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError): p.kill()
    if whom != 'youngest': process.wait(120)
    # orphans end by themselves: they notice that their parent is gone
    if whom in ('parent', 'worker'):
        _, alive = psutil.wait_procs(children, timeout=60)
        for p in alive: raise RuntimeError(f'an orphan stays: {p.cmdline()}')


# ---- what is left
def read_arrays(file):
    import numpy as np
    with np.load(file) as arrays: return [arrays[name] for name in arrays]


def torn(out):
    "What cannot be read below `out`, a line for each; temporaries of the killed process aside."
    import pandas as pd

    from underdog.training.checkpoint import Checkpoints
    readers = {
        '.json': lambda file: json.loads(file.read_text()),
        '.parquet': pd.read_parquet,
        '.csv': pd.read_csv,
        '.npz': read_arrays,
    }
    broken = []
    for file in out.rglob('*'):
        temporary = file.name.startswith('.') or '.tmp' in str(file)
        if not file.is_file() or temporary or file.suffix not in readers: continue
        try: readers[file.suffix](file)
        except Exception as e: broken.append(f'{file}: {e}')
    # a broken checkpoint is told in a line
    with contextlib.redirect_stdout(io.StringIO()) as printed: Checkpoints(out/'checkpoint').load()
    return broken + printed.getvalue().splitlines()


def steps_redone(out):
    "Steps that were logged and are not in the newest checkpoint."
    from underdog.training.checkpoint import Checkpoints
    from underdog.runfolder import RunFolder
    run = RunFolder(out)
    if run.trained: return 0   # done, but for the last words
    metrics, saved = run.metrics(), Checkpoints(run.checkpoint).steps()
    logged = int(metrics['step'].max()) if 'step' in metrics else 0
    return logged - (saved[0] if saved else 0)


def valid(out, folder):
    "Is there a valid submission, or did the process not live to its first seconds?"
    from underdog.data.submission import check_submission
    from underdog.data.competition import LMSYS
    file = out/'submission.csv'
    try: return not file.exists() or check_submission(file, LMSYS, folder/'data'/'sample_submission.csv') > 0
    except Exception as e:
        print(f'{file}: {e}')
        return False


def same(kind, out, undisturbed):
    "Is the result in `out` that of the undisturbed run?"
    import numpy as np
    import pandas as pd

    from underdog.runfolder import RunFolder
    if kind == 'train':
        def result(folder):
            run = RunFolder(folder)
            return [f.read_bytes() for f in sorted(run.adapter.glob('*.safetensors'))], run.oof().to_csv()
        return result(out) == result(undisturbed)
    # the predictions must be whole; how rows fall into parts differs from start to start, and rounding with it
    pd.read_parquet(out/'predictions.parquet')
    a, b = (pd.read_csv(folder/'submission.csv') for folder in (out, undisturbed))
    return a['id'].equals(b['id']) and np.allclose(a.iloc[:, 1:], b.iloc[:, 1:], atol=1e-4)


# ---- the whole
@dataclass
class Figures:
    "What was done and what was lost: the JSON of the last line."
    kills: int = 0
    lost_runs: int = 0
    invalid_submissions: int = 0
    max_steps_redone: int = 0
    torn_files: int = 0
    runs: int = 0
    whom: dict = field(default_factory=dict)
    seconds: dict = field(default_factory=dict)   # of the undisturbed runs


def strike(kind, out, rng, figures):
    "Start a job in `out` and kill it at a drawn moment; True if it lived so long."
    folder = out.parent
    process, seconds = start(kind, folder, out), figures.seconds[kind]
    moment, whom = draw_moment(kind, seconds, rng), rng.choice(VICTIMS[kind])
    struck = wait_for(moment, process, out, seconds)
    if struck:
        kill(process, whom)
        figures.kills += 1
        figures.whom[whom] = figures.whom.get(whom, 0) + 1
        if whom == 'youngest': process.wait(300)
        if kind == 'train': figures.max_steps_redone = max(figures.max_steps_redone, steps_redone(out))
    # what it has left
    broken = torn(out)
    figures.torn_files += len(broken)
    figures.invalid_submissions += kind == 'infer' and not valid(out, folder)
    event = f'kill {figures.kills}, {whom}, {moment}' if struck else 'ended before the kill'
    print('; '.join([f'{out.name}: {event}', *broken]), flush=True)
    return struck


def disturb(kind, kills, folder, *, rng, figures):
    "Kill `kills` times; every few kills the run is let through to its end and compared."
    number, left = 0, rng.randint(1, 4)
    while kills > 0:
        out = folder/f'{kind}-{number}'
        if strike(kind, out, rng, figures): kills, left = kills - 1, left - 1
        else: left = 0   # it was quicker than the moment
        if left > 0 and kills > 0: continue
        # to its end
        code = start(kind, folder, out).wait(600)
        if code or not same(kind, out, folder/WHOLE[kind]):
            figures.lost_runs += 1
            print(f'{out.name}: LOST (exit code {code}); see {folder}/log.txt', flush=True)
        figures.runs += 1
        number, left = number + 1, rng.randint(1, 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--kills', type=int, default=50, help='half in training, half in inference')
    parser.add_argument('--rows', type=int, default=140, help='of train.csv and of test.csv: how long a run takes')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--keep', help='a folder that is left for inspection')
    parser.add_argument('--job', nargs=3, metavar=('KIND', 'FOLDER', 'OUT'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    one_thread()
    if args.job: return do_job(*args.job)
    figures, rng = Figures(), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as tmp:
        # rows, a base model, and a clock that jumps
        folder = Path(args.keep or tmp)
        os.environ['UNDERDOG_CACHE'] = str(folder/'cache')
        make_world(folder, n_train=args.rows, n_test=args.rows)
        (folder/'jumps').mkdir(parents=True, exist_ok=True)
        (folder/'jumps'/'sitecustomize.py').write_text(JUMPS)
        # undisturbed
        for kind, out in WHOLE.items():
            began = time.monotonic()
            if start(kind, folder, folder/out).wait(600):
                sys.exit(f'the undisturbed {kind} failed:\n{(folder/"log.txt").read_text()[-3000:]}')
            figures.seconds[kind] = time.monotonic() - began
        print(f"undisturbed: training {figures.seconds['train']:.1f} s, inference {figures.seconds['infer']:.1f} s",
              flush=True)
        # disturbed
        infer_kills = args.kills//2
        disturb('train', args.kills - infer_kills, folder, rng=rng, figures=figures)
        disturb('infer', infer_kills, folder, rng=rng, figures=figures)
    last_line(vars(figures))


if __name__ == '__main__': main()
