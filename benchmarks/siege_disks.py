"""Disks that become full while something is written: an honest end in one line, no loss once there is room again."""
import json
import resource
import shutil
import subprocess
import time
from contextlib import contextmanager, suppress

from hypothesis import strategies as st

from benchmarks.siege_fork import Job, do, orphans
from benchmarks.siege_kills import TARGETS, whole_of
from benchmarks.siege_scored import small_disk
from benchmarks.siege_world import drawn, dump

NAMES = ('train', 'train', 'infer', 'submit', 'sweep')
ROOM = dict(kb=2**16, files=10_000)


@st.composite
def cases(draw, names=NAMES):
    "Which job, and what it runs out of: room from the start, room at a moment, files, or the size of one file."
    case = dict(name=draw(st.sampled_from(names)), short_of=draw(st.sampled_from(['room', 'later', 'files', 'file'])))
    if case['short_of'] == 'room': case |= dict(kb=draw(st.integers(4, 700)))
    if case['short_of'] == 'later': case |= dict(after=draw(st.floats(0, 1)), left_kb=draw(st.sampled_from([0, 4, 40])))
    if case['short_of'] == 'files': case |= dict(files=draw(st.integers(3, 60)))
    if case['short_of'] == 'file': case |= dict(file_kb=draw(st.integers(1, 300)))
    return case


@contextmanager
def disk_of(place, case):
    "A disk of its own for a case."
    with small_disk(place, case.get('kb', ROOM['kb']), case.get('files', ROOM['files'])) as mounted: yield mounted


def fill(place, left_kb):
    "Leave so much room, or less where others write at the same time."
    free = shutil.disk_usage(place).free - 1024*left_kb
    with suppress(OSError), open(place/'filler', 'wb') as f: f.write(b'\0'*max(0, free))


def widen(place):
    (place/'filler').unlink(missing_ok=True)
    options = f"remount,size={ROOM['kb']}k,nr_inodes={ROOM['files']}"
    subprocess.run(['mount', '-o', options, place], check=True)


def limited(work, file_kb):
    "`work`, with no file above so many kB; Python ignores the signal, so that it is an error of the write."
    def with_limit():
        if file_kb: resource.setrlimit(resource.RLIMIT_FSIZE, (1024*file_kb, resource.RLIM_INFINITY))
        work()
    return with_limit


def dishonest(out):
    "What status.json says of a run that is not at work; '' where that is true."
    try: state = json.loads((out/'status.json').read_text())['state']
    except (OSError, ValueError): return ''
    return state if state == 'running' else ''


def suffer(world, case, place, seconds):
    "(faults, how it ended) of a job on a disk that is too small, and of the same once there is room."
    target, out, faults = TARGETS[case['name']], place/'out', []
    job = Job(limited(lambda: target.work(world, out), case.get('file_kb')), world.log)
    if case['short_of'] == 'later':
        time.sleep(case['after']*seconds)
        fill(place, case['left_kb'])
    ended = job.end(10*seconds + 60)
    if ended.code is None: faults.append('hangs')
    if ended.code and ended.traceback: faults.append('tracebacks')
    if dishonest(out): faults.append('dishonest')
    if orphans(): faults.append('orphans')
    if faults: return faults, ended
    # with room again
    widen(place)
    ended = Job(lambda: target.work(world, out), world.log).end(10*seconds + 60)
    if ended.code != 0: return ['lost_runs'], ended
    check = do(lambda: target.check(world, out, whole_of(world, case['name'])), world.folder/'check.txt', 60.)
    return ['lost_runs']*bool(check.code), check


def attack(world, kind, n, seed, names=NAMES):
    "`n` disks."
    place, seconds = world.folder/'disk', {}
    with small_disk(place) as mounted:
        if not mounted: return print('disks: no right to mount one; left out', flush=True)
    for name in dict.fromkeys(names):
        began = time.monotonic()
        whole = whole_of(world, name)
        shutil.rmtree(whole, ignore_errors=True)
        ended = do(lambda: TARGETS[name].work(world, whole), world.log, 600.)
        if ended.code != 0: raise SystemExit(f'the undisturbed {name} failed:\n{ended.text[-3000:]}')
        seconds[name] = time.monotonic() - began
    for case in drawn(cases(names), n, seed):
        with disk_of(place, case): faults, ended = suffer(world, case, place, seconds[case['name']])
        kind.note(dump(case), faults, ended)
