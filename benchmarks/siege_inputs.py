"""Broken csv files, settings, YAML, run folders for the commands: one message, no traceback, nothing half-written."""
import json
import re
import shutil
import sys
from pathlib import Path

from hypothesis import strategies as st

from benchmarks.siege_damage import (
    HEADERS, JUNK, SCALARS, changed_record, damaged_file, damaged_rows, spoiled, write_damage)
from benchmarks.siege_fork import do, orphans
from benchmarks.siege_world import drawn, dump

TESTS = Path(__file__).resolve().parents[1]/'tests'
if str(TESTS) not in sys.path: sys.path.insert(0, str(TESTS))
LIMIT_S = 10.
OPTIONS = dict(
    check=['--competition'],
    floors=['--folds', '--competition'],
    show=['--row', '--head', '--max-length', '--competition'],
    plan=['--max-length', '--rank', '--epochs', '--rows', '--test-rows', '--head', '--quantization', '--on', '--folds',
          '--tuning', '--efficiency', '--hours', '--accelerators', '--calibrated'],
)
SWEEP = dict(kernel='train', search='grid', trials=2, seed=0, fixed=dict(train_csv='x', model='y'),
             space=dict(lr=[1e-3, 1e-4], rank=dict(low=1, high=8, log=True)), prune=False)


def argument(value):
    "A value as it may stand on a command line."
    text = value if isinstance(value, str) else json.dumps(value) if isinstance(value, (list, dict)) else str(value)
    return text.replace('\0', '').encode('utf-8', 'replace').decode()


@st.composite
def tables(draw, world):
    "A csv file for check, floors, show or submission, and options of any value."
    file = draw(st.sampled_from([world.train, world.test, world.sample]))
    content = file.read_text()
    raw = draw(st.sampled_from(HEADERS) | spoiled(content.encode())
               | damaged_rows((world.test if file == world.sample else file).read_text()))
    command = draw(st.sampled_from(['check', 'floors', 'show', 'submission']))
    if command == 'submission': return dict(raw=raw, args=[command, 'FILE', '--sample', str(world.sample)])
    args = [command, 'FILE', *(['--model', str(world.base)] if command == 'show' else [])]
    for name in draw(st.lists(st.sampled_from(OPTIONS[command]), max_size=1)): args += [name, argument(draw(SCALARS))]
    return dict(raw=raw, args=args)


@st.composite
def settings(draw, world):
    "Parameters of a kernel, or options of a plan, of any value."
    if draw(st.booleans()):
        args = ['plan', str(world.base)]
        for name in draw(st.lists(st.sampled_from(OPTIONS['plan']), min_size=1, max_size=3, unique=True)):
            args += [name, argument(draw(SCALARS))]
        return dict(args=args)
    from underdog.kernels import find_kernel, kernel_parameters
    kernel = draw(st.sampled_from(['train', 'infer', 'blend', 'sweep']))
    names = sorted(kernel_parameters(find_kernel(kernel)))
    given = {} if kernel != 'train' else dict(train_csv=str(world.train), model=str(world.base))
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)): given[name] = argument(draw(JUNK))
    given.pop('out', None)
    given.pop('submission', None)
    return dict(args=['run', kernel, *(x for k, v in given.items() for x in ('-p', f'{k}={v}')), '--out', 'OUT'])


@st.composite
def sweeps(draw, world):
    "A sweep file of any shape."
    import yaml
    record = draw(changed_record(SWEEP) | JUNK)
    raw = yaml.safe_dump(record, allow_unicode=True).encode('utf-8', 'surrogatepass')
    if draw(st.integers(0, 3)) == 0: raw = draw(spoiled(raw))
    return dict(raw=raw, args=['sweep', 'FILE', '--out', 'OUT', '--hours', argument(draw(NO_HOURS))])


# nothing is begun: what is wrong must be told before
NO_HOURS = st.sampled_from(['1e-12', '1e-12', '1e-12', 'nan', '-1', 'inf', 'x', ''])


# what is asked of a run, of which files may be damaged; doctor computes, and is asked less often
OF_A_RUN = (
    ['doctor', 'RUN'],
    ['scale', 'RUN', '--out', 'OUT'], ['scale', 'RUN', 'WHOLE', '--by', 'steps'],
    ['compare', 'RUN', 'WHOLE', '--out', 'OUT/page.html'], ['compare', 'WHOLE', 'RUN', '--json'],
    ['watch', 'RUN', '--once'],
    ['try', 'RUN', '--prompt', 'why?', '--a', 'because', '--b', 'so'],
    ['export', 'RUN', '--out', 'OUT'], ['export', 'RUN', '--out', 'OUT', '--merged'],
    ['run', 'infer', '-p', 'run=RUN', '-p', 'test_csv=TEST', '-p', 'out=OUT/p', '--out', 'OUT'],
    ['run', 'blend', '-p', 'runs=RUN,WHOLE', '-p', 'out=OUT/p', '--out', 'OUT'],
)
# of a base model
OF_A_BASE = (
    ['plan', 'BASE'], ['plan', 'BASE', 'TRAIN'],
    ['show', 'TRAIN', '--model', 'BASE'],
    ['try', 'WHOLE', '--prompt', 'why?', '--a', 'because', '--b', 'so', '--base', 'BASE'],
    ['export', 'WHOLE', '--out', 'OUT', '--base', 'BASE'],
    ['export', 'WHOLE', '--out', 'OUT', '--merged', '--base', 'BASE'],
    ['run', 'train', '-p', 'train_csv=TRAIN', '-p', 'model=BASE', '-p', 'out=OUT/run', '-p', 'quantization=none',
     '-p', 'epochs=.1', '-p', 'max_length=96', '-p', 'probe_rows=0', '-p', 'n_folds=3', '--out', 'OUT'],
)


@st.composite
def runs(draw, world):
    "A damaged run folder, for whatever takes one."
    damage = draw(st.lists(damaged_file(world.folder/'pair'), min_size=1, max_size=3))
    return dict(damage=damage, args=draw(st.sampled_from(OF_A_RUN)))


@st.composite
def bases(draw, world):
    "A damaged base model, for whatever takes one."
    damage = draw(st.lists(damaged_file(world.base), min_size=1, max_size=2))
    return dict(base=damage, args=draw(st.sampled_from(OF_A_BASE)))


@st.composite
def probes(draw, world):
    "What a probe of a machine found, changed, for a plan and for doctor; and somebody's own table of accelerators."
    from bad_inputs import PROBE, TABLE
    if draw(st.integers(0, 2)) == 0:
        return dict(raw=draw(spoiled(TABLE.encode())), args=['plan', str(world.base), '--accelerators', 'FILE',
                                                             '--on', 'Mine'])
    record = draw(changed_record(PROBE))
    raw = json.dumps(record).encode('utf-8', 'surrogatepass')
    if draw(st.integers(0, 3)) == 0: raw = draw(spoiled(raw))
    return dict(probe=raw, args=draw(st.sampled_from([['doctor', 'PROBE'], ['doctor', 'PROBE', '--json'],
                                                      ['plan', str(world.base), '--calibrated', 'PROBE']])))


@st.composite
def cases(draw, world):
    return draw(tables(world) | settings(world) | sweeps(world) | runs(world) | bases(world) | probes(world))


def command(args):
    "What the console command does with these arguments."
    from underdog.console import doctor
    from underdog.console.main import main
    doctor.imports_offline = lambda: []   # 10 s of CPU for the packages, which nobody damages
    sys.argv = ['underdog', *args]
    main()


def half_written(out):
    "Names of temporaries below `out`, and of JSON files that cannot be read."
    broken = []
    for file in Path(out).rglob('*'):
        if file.name.endswith('.tmp'): broken.append(file.name)
        if file.suffix != '.json' or not file.is_file(): continue
        try: json.loads(file.read_text())
        except ValueError: broken.append(file.name)
    return broken


def set_up(world, folder, case):
    "Make the files of a case in the `folder`; the arguments of its command."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    places = dict(FILE=folder/'file.csv', OUT=folder/'out', RUN=folder/'run', BASE=folder/'base',
                  PROBE=folder/'probe.json', WHOLE=world.folder/'joint', TRAIN=world.train, TEST=world.test)
    for name, place in (('raw', 'FILE'), ('probe', 'PROBE')):
        if name in case: places[place].write_bytes(case[name])
    for name, place, source in (('damage', 'RUN', world.folder/'pair'), ('base', 'BASE', world.base)):
        if name not in case: continue
        shutil.copytree(source, places[place])
        write_damage(places[place], case[name])
    # a place may stand in an argument, as in -p run=RUN
    return [re.sub(rf"\b({'|'.join(places)})\b", lambda word: str(places[word[0]]), arg) for arg in case['args']]


# what the parser of the command line says to the siege, not to a user's mistake
NO_COMMANDS = ('No such option: --', 'No such command', 'Missing option', 'unexpected extra argument')


def attack(world, kind, n, seed):
    "`n` commands."
    folder = world.folder/'inputs'
    for case in drawn(cases(world), n, seed):
        args = set_up(world, folder, case)
        # a training or an inference that was asked for may take its time; the others start nobody
        long = case['args'][0] in ('run', 'doctor', 'try', 'export')
        ended = do(lambda: command(args), world.log, limit_s=6*LIMIT_S if long else LIMIT_S, warm=long)
        if any(text in ended.text for text in NO_COMMANDS): raise SystemExit(f'no such command: {args}\n{ended.text}')
        faults = ['hangs']*(ended.code is None) + ['tracebacks']*bool(ended.traceback)
        faults += ['half_written']*bool(half_written(folder/'out')) + ['orphans']*bool(orphans())
        kind.note(dump(dict(case, code=ended.code)), faults, ended)
