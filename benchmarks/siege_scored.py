"""Scored runs with something damaged: test file, sample, run, base, settings or disk. A valid submission must stand."""
import os
import shutil
import signal
import subprocess
from contextlib import contextmanager

from hypothesis import strategies as st

from benchmarks.siege_damage import HEADERS, damaged_file, damaged_rows, write_damage
from benchmarks.siege_fork import do, orphans
from benchmarks.siege_world import drawn, dump

SAMPLES = ('more', 'less', 'floats', 'twice', 'turned', 'garbage', 'gone', 'columns', 'empty', 'commas')
PARTS = ('test', 'header', 'sample', 'run', 'run', 'base', 'settings', 'disk')
INFER = st.fixed_dictionaries({}, optional=dict(
    time_limit=st.sampled_from([1e-9, .0005, .002, 0., 12., 1e6]),
    batch_tokens=st.sampled_from([1, 7, 300, 10**8]),
    processes=st.sampled_from([1, 2, 3]),
    tta=st.booleans(),
    with_floors=st.booleans(),
    merge=st.booleans(),
    publish_s=st.sampled_from([0., .01, 1e9]),
    quantization=st.sampled_from(['none', 'nf4', 'int8']),
    dtype=st.sampled_from(['float32', 'bfloat16', 'float16']),
    base=st.sampled_from(['none/of/these', '\0', 'x'*5000, '/dev/null']),
))
DISKS = st.fixed_dictionaries(dict(
    kb=st.sampled_from([16, 24, 32, 48, 64, 128, 1024]),   # 8 are two versions of the submission
    files=st.sampled_from([12, 16, 24, 1000]),
    what=st.sampled_from(['out', 'out', 'cache', 'home', 'tmp']),
))


@st.composite
def cases(draw, world):
    "What is damaged, and whether the model answers at all."
    parts = draw(st.lists(st.sampled_from(PARTS), min_size=1, max_size=3, unique=True))
    # something must tell the ids
    if 'header' in parts: parts = [p for p in parts if p not in ('test', 'sample')]
    case = dict(runs=draw(st.sampled_from([['run'], ['run', 'joint'], ['joint', 'run']])),
                whole=draw(st.integers(0, 3)) == 0)
    if 'test' in parts: case['test'] = draw(damaged_rows(world.test.read_text()))
    if 'header' in parts: case['test'] = draw(st.sampled_from([*HEADERS, None]))
    if 'sample' in parts: case['sample'] = draw(st.sampled_from(SAMPLES))
    if 'run' in parts: case['run'] = draw(st.lists(damaged_file(world.folder/'pair'), min_size=1, max_size=3))
    if 'base' in parts: case['base'] = draw(st.just('gone') | st.just('other') | damaged_file(world.base))
    if 'settings' in parts: case['settings'] = draw(INFER)
    if 'disk' in parts: case['disk'] = draw(DISKS)
    return case


def damaged_sample(file, how, ids):
    "Damage the sample `file` of these `ids`; the ids that it, or else the test file, still tells."
    import pandas as pd
    # the tables it may become
    table = pd.read_csv(file, dtype=str)
    one_more = pd.DataFrame([['4242', '1', '0', '0']], columns=table.columns)
    tables = dict(more=pd.concat([table, one_more]), less=table[1:], floats=table.assign(id=table['id'] + '.0'),
                  twice=pd.concat([table, table[:2]]), turned=table[::-1], columns=table[['id']], empty=table[:0])
    # the file
    if how in tables: tables[how].to_csv(file, index=False)
    elif how == 'gone': file.unlink()
    elif how == 'commas': file.write_text(file.read_text().replace('\n', ',\n').replace(',\n', '\n', 1))
    else: file.write_bytes(b'\x89PNG\r\n\0\xff')
    # what it tells
    told = dict(tables, commas=table).get(how, table[:0])
    return list(dict.fromkeys(told['id'])) or ids


@contextmanager
def small_disk(place, kb=64, files=1000):
    "A file system of so many kB and files at `place`; yields False where there is no right to mount one."
    place.mkdir(parents=True, exist_ok=True)
    options = f'size={kb}k,nr_inodes={files}'
    mounted = not subprocess.run(['mount', '-t', 'tmpfs', '-o', options, 'none', place], capture_output=True).returncode
    try: yield mounted
    finally:
        if mounted: subprocess.run(['umount', '-l', place], check=True)


def set_up(world, folder, case):
    "The files of a case in `folder`; the ids that its submission must have, or None: those of the file that is left."
    from underdog.data.submission import wanted_ids
    # a copy of everything
    shutil.rmtree(folder, ignore_errors=True)
    (folder/'data').mkdir(parents=True)
    for file in (world.test, world.sample): shutil.copy(file, folder/'data')
    for name in ('pair', 'joint'): shutil.copytree(world.folder/name, folder/('run' if name == 'pair' else name))
    # damaged
    if 'test' in case:
        if case['test'] is None: (folder/'data'/'test.csv').unlink()
        else: (folder/'data'/'test.csv').write_bytes(case['test'])
    write_damage(folder/'run', case.get('run', ()))
    ids = wanted_ids(folder/'data'/'test.csv')
    if 'sample' in case: return damaged_sample(folder/'data'/'sample_submission.csv', case['sample'], ids)
    return wanted_ids(world.sample)


@contextmanager
def damaged_base(world, case):
    "The base model is gone, another one, or has a damaged file, as long as this lasts."
    if 'base' not in case:
        yield
        return
    # the real one is kept beside it
    kept, damage = world.base.with_name('kept'), case['base']
    world.base.rename(kept)
    try:
        if damage != 'gone': shutil.copytree(world.folder/'other' if damage == 'other' else kept, world.base)
        if isinstance(damage, tuple): write_damage(world.base, [damage])
        yield
    finally:
        shutil.rmtree(world.base, ignore_errors=True)
        kept.rename(world.base)


def submit(folder, case):
    "The scored run itself."
    from underdog.inference import scored
    from underdog.inference.settings import InferConfig
    os.environ['KAGGLE_IS_COMPETITION_RERUN'] = '1'
    places = dict(home='HOME', cache='UNDERDOG_CACHE', tmp='TMPDIR')
    name = places.get(case.get('disk', {}).get('what'))
    if name: os.environ[name] = str(folder/'small')
    # mostly the child is killed at once: what counts is what stands before it
    if not case['whole']: scored.launch = lambda *args, **kwargs: (-signal.SIGKILL, '')
    cfg = InferConfig(**dict(processes=1, sample_submission=str(folder/'data'/'sample_submission.csv'))
                      | case.get('settings', {}))
    scored.predict([str(folder/run) for run in case['runs']], folder/'data'/'test.csv', out_of(folder, case), cfg)


def out_of(folder, case): return folder/('small/out' if case.get('disk', {}).get('what') == 'out' else 'out')


def missed(file, ids):
    "Why the submission `file` is not valid, or not of these `ids`; '' where it is."
    from underdog.data.competition import LMSYS
    from underdog.data.submission import check_submission, wanted_ids
    try: check_submission(file, LMSYS)
    except Exception as e: return str(e)
    return '' if wanted_ids(file) == ids else f'other ids than are wanted, first {wanted_ids(file)[:3]}'


def attack(world, kind, n, seed):
    "`n` scored runs."
    folder = world.folder/'scored'
    for case in drawn(cases(world), n, seed):
        ids = set_up(world, folder, case)
        disk = case.get('disk', dict(kb=1024, files=1000))
        with small_disk(folder/'small', disk['kb'], disk['files']), damaged_base(world, case):
            ended = do(lambda: submit(folder, case), world.log, limit_s=60.)
            why = missed(out_of(folder, case)/'submission.csv', ids)
            faults = ['missed_submissions']*bool(why) + ['hangs']*(ended.code is None)
            faults += ['tracebacks']*bool(ended.code and ended.traceback) + ['orphans']*bool(orphans())
        kind.note(f'{why} {dump(case)}', faults, ended)
