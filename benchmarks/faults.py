"""Kill training and inference at random moments, start them again, and look for anything that was lost: `python -m benchmarks.faults --kills 50`.

Real processes, SIGKILL: of everything (the machine is gone), of the worker alone, of the parent alone, of one inference worker. Half of the moments are drawn from the whole duration, start-up included; the other half come while a checkpoint or a
submission is being written. The wall clock of every process jumps by hours, back and forth. What counts is the end: weights, held-out predictions and submission must be those of runs that were never disturbed."""
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
from pathlib import Path

from benchmarks.common import last_line, make_world, one_thread

ROOT = Path(__file__).resolve().parents[1]
JUMPS = "import random, time\n_real = time.time\ntime.time = lambda: _real() + random.Random(int(_real()*2)).choice([-86400, 0, 7200])\n"   # loaded by every process as sitecustomize


def job(kind, folder, out):
    "What a killed process was doing: a whole training, or a whole inference with a deadline an hour away."
    from underdog.machine import quiet
    quiet()
    data, base = Path(folder)/'data', str(Path(folder)/'base')
    if kind == 'train':
        from underdog.session import SessionConfig
        from underdog.training.run import train
        from underdog.model.model import ModelConfig
        from underdog.text.prompt import PromptConfig
        from underdog.training.settings import TrainConfig
        cfg = TrainConfig(n_folds=3, epochs=6., batch_rows=8, batch_tokens=512, lr=1e-2, head_lr=1e-2, evaluations=4)
        train(data/'train.csv', ModelConfig(base, rank=4, quantization='none'), out, PromptConfig(max_length=96), cfg=cfg, session=SessionConfig(save_minutes=.005))
    else:
        from underdog.inference.job import InferConfig
        from underdog.inference.scored import predict
        predict(str(Path(folder)/'whole'), data/'test.csv', out, 
                InferConfig(batch_tokens=300, processes=2, sample_submission=str(data/'sample_submission.csv'), time_limit=1., publish_s=.2))


def start(kind, folder, out):
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(folder/'jumps'), str(ROOT), os.environ.get('PYTHONPATH', '')]), OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-m', 'benchmarks.faults', '--job', kind, str(folder), str(out)], stdout=open(folder/'log.txt', 'ab'), stderr=subprocess.STDOUT, env=env, cwd=ROOT)


def wait_for(moment, process, out, seconds):
    "Wait until the drawn moment: a time, or the first sight of a file that is being written (after that time)."
    after, pattern = moment
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < 3*seconds + 30:
        if time.monotonic() - began >= after and (not pattern or any(out.glob(pattern))): return True
        time.sleep(.002)
    return process.poll() is None


def kill(process, whom, rng):
    "SIGKILL `whom`: everything, the worker, the parent, or the youngest process; then wait until none is left that was meant to die."
    import psutil
    try: tree = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess: tree = []
    python = [p for p in tree if p.is_running()]
    chosen = dict(all=[process, *python], parent=[process], worker=python[:1], youngest=python[-1:])[whom] or [process]
    for p in chosen:
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError): p.kill()
    if whom != 'youngest': process.wait(120)
    if whom in ('parent', 'worker'):   # orphans end by themselves: they notice that their parent is gone
        gone, alive = psutil.wait_procs(python, timeout=60)
        for p in alive: raise RuntimeError(f'an orphan stays: {p.cmdline()}')


def torn(out):
    "Files below `out` that cannot be read, temporaries of the killed process aside."
    import numpy as np
    import pandas as pd

    from underdog.training.checkpoint import Checkpoints
    bad = []
    for f in out.rglob('*'):
        if not f.is_file() or f.name.startswith('.') or '.tmp' in str(f): continue
        try: {'.json': lambda f: json.loads(f.read_text()), '.parquet': pd.read_parquet, '.csv': pd.read_csv, '.npz': lambda f: [np.load(f)[k] for k in np.load(f)]}.get(f.suffix, lambda f: None)(f)
        except Exception as e: bad.append(f'{f}: {e}')
    said = io.StringIO()
    with contextlib.redirect_stdout(said): Checkpoints(out/'checkpoint').load()
    return bad + said.getvalue().splitlines()


def steps_redone(out):
    "Steps that were logged and are not in the newest checkpoint."
    from underdog.training.checkpoint import Checkpoints
    from underdog.runfolder import RunFolder
    if (out/'adapter').exists(): return 0   # done, but for the last words
    metrics, kept = RunFolder(out).metrics(), Checkpoints(out/'checkpoint').steps()
    return int(metrics['step'].max() if 'step' in metrics else 0) - (kept[0] if kept else 0)


def result(kind, out):
    "What must be equal in the end."
    import pandas as pd
    if kind == 'train': return [f.read_bytes() for f in sorted((out/'adapter').glob('*.safetensors'))], pd.read_parquet(out/'oof.parquet').to_csv()
    return (out/'submission.csv').read_bytes(), pd.read_parquet(out/'predictions.parquet').round(5).to_csv()   # parts differ from start to start: rounding does


def valid(out, folder):
    "Is there a valid submission, or did the process not live to its first seconds?"
    from underdog.data.submission import check_submission
    from underdog.data.competition import LMSYS
    file = out/'submission.csv'
    try: return not file.exists() or check_submission(file, LMSYS, folder/'data'/'sample_submission.csv') > 0
    except Exception as e:
        print(f'{file}: {e}')
        return False


def same(kind, a, b):
    import numpy as np
    import pandas as pd
    if kind == 'train': return a == b
    tables = [pd.read_csv(io.BytesIO(x[0])) for x in (a, b)]
    return tables[0]['id'].equals(tables[1]['id']) and np.allclose(tables[0].iloc[:, 1:], tables[1].iloc[:, 1:], atol=1e-4)


def disturb(kind, folder, kills, rng, figures):
    "Kill `kills` times; every few kills the run is let through to its end and compared."
    reference, seconds = folder/('whole' if kind == 'train' else 'whole-infer'), figures['seconds'][kind]
    wanted, life, left = result(kind, reference), 0, rng.randint(1, 4)
    out = folder/f'{kind}-{life}'
    while kills > 0:
        process = start(kind, folder, out)
        pattern = rng.choice(['checkpoint/.step-*', '.oof*', '.adapter*']) if kind == 'train' else rng.choice(['.submission.csv.*', '.answers*', '.predictions*'])
        moment = (rng.uniform(0, seconds), '') if rng.random() < .5 else (rng.uniform(0, .6*seconds), pattern)
        whom = rng.choice(['all', 'all', 'worker', 'parent'] + ['youngest']*(kind == 'infer'))
        if struck := wait_for(moment, process, out, seconds):
            kill(process, whom, rng)
            kills, left, figures['kills'] = kills - 1, left - 1, figures['kills'] + 1
            figures['whom'][whom] = figures['whom'].get(whom, 0) + 1
            if whom == 'youngest': process.wait(300)
            if kind == 'train': figures['max_steps_redone'] = max(figures['max_steps_redone'], steps_redone(out))
        else: left = 0   # it was quicker than the moment
        bad = torn(out)
        figures['torn_files'] += len(bad)
        figures['invalid_submissions'] += kind == 'infer' and not valid(out, folder)
        said = f"kill {figures['kills']}, {whom}, {moment[0]:.1f} s after its start{' at ' + moment[1] if moment[1] else ''}" if struck else 'ended before the kill'
        print('; '.join([f'{kind} {life}: {said}', *bad]), flush=True)
        if left <= 0 or kills == 0:
            code = start(kind, folder, out).wait(600)
            if code or not same(kind, result(kind, out), wanted):
                figures['lost_runs'] += 1
                print(f'{kind} {life}: LOST (exit code {code}); see {folder}/log.txt', flush=True)
            figures['runs'] += 1
            life, left = life + 1, rng.randint(1, 4)
            out = folder/f'{kind}-{life}'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=50, help='half in training, half in inference')
    parser.add_argument('--rows', type=int, default=140, help='of train.csv and of test.csv: how long a run takes')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--keep', help='a folder that is left for inspection')
    parser.add_argument('--job', nargs=3, metavar=('KIND', 'FOLDER', 'OUT'), help=argparse.SUPPRESS)
    args = parser.parse_args()
    one_thread()
    if args.job: return job(*args.job)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(args.keep or tmp)
        os.environ['UNDERDOG_CACHE'] = str(folder/'cache')
        make_world(folder, n_train=args.rows, n_test=args.rows)
        (folder/'jumps').mkdir(parents=True, exist_ok=True)
        (folder/'jumps'/'sitecustomize.py').write_text(JUMPS)
        figures, rng = dict(kills=0, lost_runs=0, invalid_submissions=0, max_steps_redone=0, torn_files=0, runs=0, whom={}, seconds={}), random.Random(args.seed)
        for kind, out in (('train', 'whole'), ('infer', 'whole-infer')):
            began = time.monotonic()
            if start(kind, folder, folder/out).wait(600): sys.exit(f'the undisturbed {kind} failed:\n{(folder/"log.txt").read_text()[-3000:]}')
            figures['seconds'][kind] = time.monotonic() - began
        print(f"undisturbed: training {figures['seconds']['train']:.1f} s, inference {figures['seconds']['infer']:.1f} s", flush=True)
        for kind, kills in (('train', args.kills - args.kills//2), ('infer', args.kills//2)): disturb(kind, folder, kills, rng, figures)
    last_line(figures)


if __name__ == '__main__': main()
