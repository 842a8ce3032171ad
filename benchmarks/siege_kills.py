"""SIGKILL, SIGTERM and SIGINT at random moments of everything that takes long; started again, nothing may be lost."""
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

from benchmarks.faults import torn, valid
from benchmarks.siege_fork import KEPT, Job, descendants, do, orphans

TESTS = Path(__file__).resolve().parents[1]/'tests'
WAYS = ('all', 'all', 'parent', 'worker', 'youngest', 'SIGTERM', 'SIGINT', 'SIGTERM to all')
MOST = 6   # kills of a run
SETTINGS = dict(quantization='none', rank=4, max_length=96, batch_rows=4, n_folds=3, lr=1e-2, head_lr=1e-2,
                probe_rows=0, epochs=1.0, evaluations=2)


# ---- what is killed; each is started with (world, out) until it has come to its end
def train(world, out): world.learn(out, epochs=2., evaluations=4)


def infer(world, out, runs=('pair', 'joint')):
    from underdog.inference.scored import predict
    from underdog.inference.settings import InferConfig
    cfg = InferConfig(batch_tokens=300, processes=2, sample_submission=str(world.sample), time_limit=1., publish_s=.05)
    predict([str(world.folder/run) for run in runs], world.test, out, cfg)


def submit(world, out):
    os.environ['KAGGLE_IS_COMPETITION_RERUN'] = '1'
    infer(world, out)


def sweep(world, out):
    from underdog.search.sweep import Sweep
    from underdog.search.trials import run_sweep
    fixed = SETTINGS | dict(train_csv=str(world.train), model=str(world.base), save_minutes=.01)
    space = dict(lr=[1e-2, 1e-3])
    fixed.pop('lr')
    table = run_sweep(Sweep(space, search='grid', trials=2, fixed=fixed), out)
    states = table['state'].tolist()
    if states != ['complete']*2: raise RuntimeError(f'trials are {states}: {table["why"].tolist()}')


def demo(world, out):
    from underdog.console import demo, run_doctor
    demo.smollm2 = lambda: world.base
    run_doctor.run_checks = lambda *args: []   # it computes, and a process that has computed is not to be forked
    demo.run_demo(out, layers=0, lora_layers='', n_train=40, n_test=10, **SETTINGS)


def relay(world, out):
    from underdog.kaggle.account import Hub
    from underdog.kaggle.push import PushConfig
    from underdog.kaggle.relay import run_relay
    os.environ['UNDERDOG_HOME'] = str(out/'home')
    hub = client_of(world, Hub)
    last = run_relay(hub, out.name, str(world.folder/'count.ipynb'), dict(nap='.1'), PushConfig(shape='', gpus=0))
    versions = [pushes_of(hub, f'{out.name}-{k}') for k in (1, 2, 3)]
    if last.number != 3 or versions != [1, 1, 1]:
        raise RuntimeError(f'it ended with session {last.number}; pushes of each: {versions}')


# ---- what must be there in the end
def same_training(world, out, whole):
    from underdog.runfolder import RunFolder
    def result(folder):
        run = RunFolder.open(folder)
        weights = [f.read_bytes() for f in sorted(run.adapter.glob('*.safetensors'))]
        return run.status['state'], weights, run.oof().to_csv(), len(run.metrics())
    if result(out) != result(whole): raise RuntimeError('another result than undisturbed')


def same_submission(world, out, whole):
    import numpy as np
    import pandas as pd
    a, b = (pd.read_csv(folder/'submission.csv') for folder in (out, whole))
    if not a['id'].equals(b['id']): raise RuntimeError('other ids than undisturbed')
    distance = np.abs(a.iloc[:, 1:].to_numpy() - b.iloc[:, 1:].to_numpy()).max()
    if distance > 1e-4: raise RuntimeError(f'another submission than undisturbed: {distance}')


def nothing_more(world, out, whole): "The job itself has said so."


@dataclass(frozen=True)
class Target:
    "Something to be killed."
    work: Callable
    check: Callable = nothing_more      # (world, out, folder of the undisturbed one); raises
    written: tuple = ('',)   # moments: while a file of such a name is there; '': any
    share: int = 3           # of the kills
    ways: tuple = WAYS


TARGETS = dict(
    train=Target(train, same_training),
    checkpoint=Target(train, same_training, ('checkpoint/.step-*', 'checkpoint/step-*.pt')),
    evaluate=Target(train, same_training, ('.oof*', 'oof.parquet', '.adapter*', 'adapter')),
    infer=Target(infer, same_submission, ('', '.answers*', '.predictions*', '*/.predictions*')),
    submit=Target(submit, same_submission, ('.submission.csv.*', 'submission.csv', '')),
    # a trial that is killed alone has failed, and the sweep says so
    sweep=Target(sweep, share=1, ways=tuple(way for way in WAYS if way not in ('worker', 'youngest'))),
    demo=Target(demo, same_submission, ('', '.submission*', 'run/.oof*'), share=1),
    relay=Target(relay, share=1),
)

# ---- a Kaggle on this machine
def start_kaggle(world):
    "A process with the server of the tests, which is no part of any job; its addresses are left in a file."
    sys.path.insert(0, str(TESTS))
    # of an earlier siege
    shutil.rmtree(world.folder/'server', ignore_errors=True)
    (world.folder/'kaggle.env').unlink(missing_ok=True)
    def serve():
        from conftest import COUNTER, PARAMETERS
        from kaggle_server import KaggleServer, write_notebook

        from underdog.core import write_json
        from underdog.process import end_with
        end_with(os.getppid())
        os.environ.pop('OMP_NUM_THREADS', None)   # its kernels start cold: their logs are what a new process writes
        write_notebook(world.folder/'count.ipynb', COUNTER, parameters=PARAMETERS)
        server = KaggleServer(world.folder/'server').start()
        write_json(world.folder/'kaggle.env', server.client_environment())
        signal.pause()
    KEPT.add(Job(serve, world.folder/'server.txt', warm=False).pid)
    while not (world.folder/'kaggle.env').exists(): time.sleep(.05)


def client_of(world, hub):
    "A `Hub` that talks to that server."
    import kagglesdk.kaggle_env as env

    from underdog.core import read_json
    os.environ.update(read_json(world.folder/'kaggle.env'))
    env._env_to_endpoint[env.KaggleEnv.LOCAL] = os.environ['KAGGLE_LOOPBACK']
    return hub(poll_s=.05, first_pause_s=.01)


def pushes_of(hub, name):
    from underdog.kaggle.push import saved_kernel
    return saved_kernel(hub, hub.ref(name)).metadata.current_version_number


# ---- one kill
def wait_for(job, after, pattern, out, limit_s):
    "Wait for `after` seconds, then for a file that fits the `pattern`; False when the job ended before."
    began = time.monotonic()
    while job.poll() is None and time.monotonic() - began < limit_s:
        if time.monotonic() - began >= after and (not pattern or any(out.glob(pattern))): return True
        time.sleep(.002)
    return False


def strike(job, way):
    "End a job in one of the `WAYS`; True when it took longer than a minute."
    import psutil
    children = [p for p in descendants() if p.pid != job.pid]
    if way.startswith('SIG'):
        number = getattr(signal, way.split()[0])
        for pid in [job.pid, *([p.pid for p in children] if 'all' in way else [])]:
            with contextlib.suppress(ProcessLookupError): os.kill(pid, number)
    else:
        chosen = dict(all=[*children, job], parent=[job], worker=children[:1], youngest=children[-1:])[way] or [job]
        for p in chosen:
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError): p.kill()
    return job.end(60.).code is None


def begin(target, world, out): return Job(lambda: target.work(world, out), world.log)


def inspect(world, out):
    "Raises when something below `out` is torn, or a submission is not valid."
    broken = torn(out)
    own = out.name.split('-')[0] in ('infer', 'submit')   # a demo's is of other rows
    if own and not valid(out, world.folder): broken.append('submission.csv')
    if broken: raise RuntimeError('; '.join(broken))


def disturb(world, name, out, *, rng, seconds, kills):
    "Kill the target `name` up to `kills` times, then let it come to its end; (faults, what was done, how it ended)."
    target, faults, events = TARGETS[name], [], []
    for _ in range(kills):
        way, pattern = rng.choice(target.ways), rng.choice(target.written)
        # some of the work is done already when it goes on, and a file is still to come
        after = rng.uniform(0, seconds*(.4 if pattern else .8))
        job = begin(target, world, out)
        if not wait_for(job, after, pattern, out, limit_s=4*seconds + 30): break
        events.append(f'{way} after {after:.1f} s{" at " if pattern else ""}{pattern}')
        if strike(job, way): faults.append('hangs')
        left = orphans()
        if left: faults.append('orphans')
        events += left
        seen = do(lambda: inspect(world, out), world.folder/'inspect.txt', limit_s=30.)
        if seen.code: faults.append('half_written')
        if seen.code: events.append(seen.text.strip().splitlines()[-1])
    # to its end
    ended = begin(target, world, out).end(10*seconds + 120)
    if ended.code is None: faults.append('hangs')
    elif ended.code: faults.append('refused_folders' if 'is at work there' in ended.text else 'lost_runs')
    else:
        check = do(lambda: target.check(world, out, whole_of(world, name)), world.folder/'check.txt', limit_s=60.)
        if check.code: faults.append('lost_runs')
        if check.code: ended = check
    if orphans(): faults.append('orphans')
    return faults, events, ended


def whole_of(world, name):
    "The folder of the undisturbed one; targets with the same work share it."
    first = next(n for n, target in TARGETS.items() if target.work == TARGETS[name].work)
    return world.folder/f'{first}-whole'


def undisturbed(world, name):
    "Do the work of a target without a kill, in the folder that the others are compared with; the seconds it took."
    whole = whole_of(world, name)
    shutil.rmtree(whole, ignore_errors=True)   # of an earlier siege
    began = time.monotonic()
    ended = begin(TARGETS[name], world, whole).end(600.)
    if ended.code != 0: raise SystemExit(f'the undisturbed {name} failed:\n{ended.text[-3000:]}')
    return time.monotonic() - began


def attack(world, kind, n, seed, only=tuple(TARGETS)):
    "`n` kills, up to `MOST` of a run before it comes to its end; a case is a run."
    rng, seconds = random.Random(seed), {}
    if 'relay' in only: start_kaggle(world)
    names, shares = list(only), [TARGETS[name].share for name in only]
    run = kills = 0
    while kills < n:
        name = rng.choices(names, shares)[0]
        run += 1
        out, whole = world.folder/f'{name}-{run}', whole_of(world, name)
        shutil.rmtree(out, ignore_errors=True)
        if whole not in seconds: seconds[whole] = undisturbed(world, name)
        faults, events, ended = disturb(world, name, out, rng=rng, seconds=seconds[whole], kills=rng.randint(1, MOST))
        struck = sum(' after ' in event for event in events)
        kills += struck
        kind.counts['kills'] += struck
        kind.counts[f'kills_{name}'] += struck
        kind.note(f'{name}: {"; ".join(events)}', faults, ended)
        if not faults: shutil.rmtree(out, ignore_errors=True)
