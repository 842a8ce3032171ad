"A run that is watched: its state whatever became of its process, its figures whatever its files hold, in any place."
import json
import os
import pty
import random
import select
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from fixtures import small_run
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kaggle_server import write_notebook

from underdog.console.chart import Curve, chart, sparkline
from underdog.console.judge import judge
from underdog.console.live import _html, line_of, picture, verdict, watch_run
from underdog.console.live_kernel import _view, records_in, watch_kernel
from underdog.console.main import main
from underdog.console.report import _baselines
from underdog.console.runview import best_baseline, figures_of, notes_on, view_run
from underdog.console.watching import _names_kernel
from underdog.console.writers import TensorBoard, Writer
from underdog.core import UserError
from underdog.data.floors import BASELINES
from underdog.runfolder import RunFolder
from underdog.session import last_holder, locked

CONFIG = dict(competition='lmsys', model=dict(path='models/small', head='pair'), best_floor='tfidf',
              train=dict(batch_rows=8, epochs=1.), data=dict(train_rows=400))
UNDERDOG = [sys.executable, '-m', 'underdog']


def log_steps(run, first, last, of=50):
    "What a training writes, with an evaluation every ten steps."
    for step in range(first, last + 1):
        run.log(step=step, of=of, loss=1.1 - .002*step + .01*np.sin(step), lr=1e-4*(1 - step/of), tokens=900*step,
                tokens_per_s=1200., elapsed_s=.5*step, memory_gb=1.5, grad_norm=.3, skipped=False, not_finite=0)
        if step % 10 == 0: log_evaluation(run, step)
    run.set_status('running', last, of, elapsed_s=.5*last)


def log_evaluation(run, step):
    held = 1.05 - .001*step
    run.log(step=step, eval_rows=80, eval_not_finite=0, eval_earned=.4, eval_loss=held, eval_model=held, eval_tta=held,
            eval_prior=1.09, eval_tfidf=1.02, eval_gain=1.02 - held, eval_gain_low=1. - held,
            eval_gain_high=1.04 - held)


@pytest.fixture
def run(tmp_path):
    "A run of which thirty of fifty steps are logged."
    run = RunFolder.create(tmp_path/'run', CONFIG)
    log_steps(run, 1, 30)
    return run


# ---- the state

HOLD = '''
import subprocess, sys, time
from underdog.session import locked
with locked(sys.argv[1]) as lock:
    if sys.argv[2] == 'orphan': print(subprocess.Popen(['sleep', '60'], pass_fds=[lock]).pid, flush=True)
    else: print(0, flush=True)
    time.sleep(60)
'''


@contextmanager
def trainer(folder, kind=''):
    "A process that holds the folder, and perhaps a child that goes on holding it: (the process, the id of the child)."
    process = subprocess.Popen([sys.executable, '-c', HOLD, folder, kind], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    try: yield process, child
    finally:
        process.kill()
        process.wait()
        if child: os.kill(child, signal.SIGKILL)


def test_a_killed_training_is_gone_and_an_orphan_is_not(run):
    with trainer(run.path) as (process, _):
        assert view_run(run.path).state == 'running'
        process.kill()
        process.wait()
        view = view_run(run.path)
        assert view.state == 'gone' and f'it was {process.pid} on' in view.sentence and 'begins anew' in view.sentence
    # its checkpoint is named
    run.checkpoint.mkdir()
    (run.checkpoint/'step-00000020.json').write_text('{}')
    assert 'goes on after step 20' in view_run(run.path).sentence
    with trainer(run.path, 'orphan') as (process, _):
        process.kill()
        process.wait()
        assert view_run(run.path).state == 'running', 'a child of it is still saving'


def test_who_asks_for_the_holder_leaves_no_lock(tmp_path):
    assert last_holder(tmp_path/'nothing') == ('', False) and not list(tmp_path.iterdir())
    with locked(tmp_path): assert last_holder(tmp_path).at_work
    assert last_holder(tmp_path) == (f'{os.getpid()} on {os.uname().nodename}', False)
    with locked(tmp_path): pass


def test_who_looks_stops_nobody_from_beginning(tmp_path):
    "A look holds a free lock for an instant; a training that begins just then waits for it."
    import fcntl
    import threading
    with locked(tmp_path): pass
    with open(tmp_path/'.lock') as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(.15, lambda: fcntl.flock(looking, fcntl.LOCK_UN)).start()
        with locked(tmp_path): assert last_holder(tmp_path).at_work


def test_before_the_first_step(tmp_path):
    path = tmp_path/'run'
    assert view_run(path).state == 'waiting'
    with locked(path):
        assert view_run(path).state == view_run(tmp_path).state == 'starting', 'runs/1 means runs/1/run'
        run = RunFolder.create(path, CONFIG)
        assert view_run(path).state == 'starting' and line_of(view_run(path)).endswith('no step yet in this session')
        # gone on with after a pause
        log_steps(run, 1, 5)
        run.set_status('paused', 5, 50, 'stopped by the time limit')
        assert view_run(path).state == 'starting'
    view = view_run(path)
    assert view.state == 'paused' and 'stopped by the time limit' in view.sentence
    (tmp_path/'file').write_text('')
    with pytest.raises(UserError, match='a file'): view_run(tmp_path/'file')


# ---- what the files hold

@settings(max_examples=25)
@given(st.data())
def test_a_file_that_is_cut_anywhere_loses_a_line_at_most(tmp_path_factory, data):
    run = RunFolder.create(tmp_path_factory.mktemp('cut')/'run', CONFIG)
    log_steps(run, 1, 12)
    whole = run.metrics_file.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    run.metrics_file.write_bytes(whole[:at])
    view = view_run(run.path)
    assert len(view.records) + view.torn == len(whole[:at].splitlines()) and view.torn <= 1
    assert [json.loads(x) for x in whole[:at].splitlines()[:len(view.records)]] == view.records
    assert any('1 torn line' in note for note in notes_on(view)) == bool(view.torn)
    picture(view), line_of(view)


ODD = st.one_of(st.none(), st.booleans(), st.floats(), st.integers(-10**6, 10**6), st.text(max_size=5),
                st.lists(st.integers(), max_size=2))
NAMES = st.sampled_from(['step', 'of', 'loss', 'lr', 'tokens', 'tokens_per_s', 'elapsed_s', 'memory_gb', 'eval_loss',
                         'eval_rows', 'eval_tfidf', 'eval_gain', 'eval_gain_low', 'eval_gain_high', 'other'])


@example([{'loss': 140737488355329., 'step': False}], {})   # flat, and .01 more is the same number
@settings(max_examples=40)
@given(st.lists(st.dictionaries(NAMES, ODD, max_size=8), max_size=6), st.sampled_from([{}, CONFIG, dict(model={})]))
def test_whatever_was_logged_there_is_a_picture(tmp_path_factory, records, config):
    run = RunFolder.create(tmp_path_factory.mktemp('odd')/'run', config)
    run.metrics_file.write_text(''.join(f'{json.dumps(record)}\n' for record in records))
    with locked(run.path):
        view = view_run(run.path)
        assert str(run.path) in picture(view).plain and line_of(view)


@settings(max_examples=15)
@given(st.integers(20, 160), st.integers(5, 60))
def test_a_picture_fits_its_window(tmp_path_factory, width, height):
    run = RunFolder.create(tmp_path_factory.mktemp('fit')/'run', CONFIG)
    log_steps(run, 1, 20)
    view = view_run(run.path)
    lines = picture(view, width, height).plain.splitlines()
    # no curves where there is no room for them, but all figures
    figures = 1 + len(figures_of(view)) + len(notes_on(view))
    assert figures <= len(lines) <= max(height, figures)
    assert picture(view, width, height, plain=True).plain.replace(str(run.path), '').isascii()


def test_figures_are_those_of_the_files(run):
    with locked(run.path):
        run.log_file.write_text('model\rtrain:  10%\rtrain:  60%|███ | 240/400\n\n')
        view = view_run(run.path)
        figures = {f.name: f.text for f in figures_of(view)}
        assert figures['held out'] == '1.0200 at step 30 on 80 rows'
        assert figures['baseline'] == '1.0200, tfidf: not to be told from the model, +0.0000 [-0.0200, +0.0200]'
        assert figures['rows'] == '240 of 400' and figures['time'] == '15 s, about 10 s left'
        assert figures['speed'] == '1,200 tokens/s' and figures['rate'] == '4e-05' and '1.5 GB' in figures['memory']
        assert view.words == 'train:  60%|███ | 240/400'
        # the speed is that of the last lines, not the mean of the run
        for step in range(31, 45):
            run.log(step=step, of=50, loss=1., lr=0., tokens=27_000 + 90*(step - 30), elapsed_s=step,
                    tokens_per_s=(27_000 + 90*(step - 30))/(22.5 + .9*(step - 30)))
        assert {f.name: f.text for f in figures_of(view_run(run.path))}['speed'] == '100 tokens/s'


def test_a_long_silence_is_said(run):
    os.utime(run.metrics_file, (time.time() - 300,)*2)
    with locked(run.path): assert 'nothing was logged for 5 min' in notes_on(view_run(run.path))[0]
    assert not notes_on(view_run(run.path)), 'a run that is gone is silent anyway'


def test_the_baseline_to_beat_is_that_of_the_report(finished):
    "Whatever else an evaluation notes beside the losses, such as the earned share, is no baseline."
    metrics = finished.metrics()
    assert 'eval_earned' in metrics
    best = best_baseline(view_run(finished.path))
    assert best == min(_baselines(metrics).items(), key=lambda item: item[1]) and best.name in BASELINES


def test_before_an_evaluation_the_baseline_is_that_of_its_rows(finished, tmp_path):
    finished.copy_to(tmp_path/'run')
    run = RunFolder.create(tmp_path/'run', finished.config)
    run.cut_metrics(0)
    held = [r for r in view_run(finished.path).records if 'eval_loss' in r][-1]
    figure, = figures_of(view_run(run.path))
    names = [n for n in ('prior', 'length', 'tfidf', 'traits', 'trees', 'stack') if f'eval_{n}' in held]
    best = min(names, key=lambda name: held[f'eval_{name}'])
    assert figure.name == 'baseline' and figure.text == f"{held[f'eval_{best}']:.4f}, {best}; no evaluation yet"


# ---- curves

@settings(max_examples=60)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=80), st.integers(20, 120), st.integers(6, 30), st.booleans())
def test_a_chart_holds_its_curve(values, width, height, plain):
    curve = Curve('loss', np.arange(len(values)), np.array(values), 'points')
    lines = chart([curve], width, height, plain).plain.splitlines()
    assert len(lines) == height and lines[-1].strip().endswith('loss')
    field = [line.split('+' if plain and '+' in line else '|' if plain else '┤' if '┤' in line else '│')[-1]
             for line in lines[:-3]]
    mark = 'o' if plain else '●'
    # the highest stands at the top, the lowest at the bottom
    if max(values) - min(values) > 1e-6: assert mark in field[0] and mark in field[-1]
    assert sum(row.count(mark) for row in field) <= len(values) and not any(set(row) - {mark, ' '} for row in field)


def test_a_line_has_no_holes_and_a_word_no_more_than_its_blocks():
    rng = random.Random(0)
    values = [rng.random() for _ in range(40)]
    lines = chart([Curve('x', range(40), values)], 60, 12).plain.splitlines()[:-3]
    columns = zip(*(line.split('┤' if '┤' in line else '│')[-1].ljust(50) for line in lines))
    assert sum(any(c != ' ' for c in column) for column in columns) >= 50
    assert chart([]).plain == chart([Curve('x', [], [])]).plain == '' and len(sparkline(range(100), 16)) == 16
    assert sparkline([5, 5]) == '██' and sparkline([0, 1]) == '▁█' and sparkline([1]) == ''


# ---- until it ends

def test_a_real_training_is_watched_from_before_its_start_to_its_verdict(world, tmp_path):
    "In a process of its own, into a pipe: a line for every change, no control codes, the findings of the report."
    path = tmp_path/'run'
    watcher = subprocess.Popen([*UNDERDOG, 'watch', str(path), '--every', '.05'], stdout=subprocess.PIPE, text=True,
                               env=dict(os.environ, FORCE_COLOR='1'))
    first = watcher.stdout.readline()
    assert first.startswith(f'{path}: no run here yet')
    run = small_run(world, path, epochs=2., log_every=1, evaluations=2)
    said = watcher.communicate(timeout=60)[0].splitlines()
    assert watcher.returncode == 0 and '\x1b' not in ''.join(said)
    assert len(set(said)) == len(said) and any(line.startswith('step ') for line in said)
    # the last of them are those of the report
    findings = [str(f) for f in judge(run)]
    assert said[-len(findings):] == findings and 'finished after' in said[-len(findings) - 1]


def test_a_finished_run_is_told_at_once(finished, capsys, monkeypatch):
    assert watch_run(finished.path).state == 'finished'
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith('step ') and lines[1:] == verdict(view_run(finished.path))
    monkeypatch.setenv('COLUMNS', '80')
    main_code('watch', str(finished.path), '--once')
    shown = capsys.readouterr().out
    assert '┤' in shown and 'held out' in shown and '\x1b' not in shown
    assert max(map(len, shown.split(' finished after ')[0].splitlines())) <= 80, 'all of the picture, not the verdict'


def main_code(*args):
    "The exit code of a command."
    with pytest.raises(SystemExit) as e: main(list(args))
    return e.value.code or 0


def test_exit_codes_and_mistakes(run, capsys):
    assert main_code('watch', str(run.path)) == 1 and 'its process is gone' in capsys.readouterr().out
    run.set_status('failed', 30, 50, 'UserError: too hot')
    assert main_code('watch', str(run.path)) == 1 and 'too hot' in capsys.readouterr().out
    run.set_status('paused', 30, 50, 'stopped on request')
    assert main_code('watch', str(run.path)) == 0
    assert main_code('watch', str(run.path), '--every', '0') == 1 and 'above 0' in capsys.readouterr().err
    assert main_code('watch', '--help') == 0
    help_text = ' '.join(capsys.readouterr().out.split())
    for word in ('--once', '--every', '--tensorboard', '--trackio', 'owner/slug', 'Ctrl-C', 'exit code 1'):
        assert word in help_text


def on_terminal(*args, until, interrupt, **environment):
    "(exit code, what was shown) of `underdog …` at a terminal that is interrupted once `until` was seen."
    main_end, its_end = pty.openpty()
    env = {**os.environ, 'TERM': 'xterm-256color', 'COLUMNS': '80', 'LINES': '24', **environment}
    env.pop('NO_COLOR', None) if 'NO_COLOR' not in environment else None
    child = subprocess.Popen([*UNDERDOG, *args], stdin=its_end, stdout=its_end, stderr=its_end, env=env)
    os.close(its_end)
    shown, asked = b'', False
    while True:
        if not select.select([main_end], [], [], 60)[0]: pytest.fail(f'nothing for a minute after {shown[-500:]}')
        try: piece = os.read(main_end, 65536)
        except OSError: break   # closed
        if not piece: break
        shown += piece
        if interrupt and not asked and until.encode() in shown:
            child.send_signal(signal.SIGINT)
            asked = True
    os.close(main_end)
    return child.wait(), shown.decode(errors='replace')


def test_at_a_terminal_the_picture_keeps_its_place_and_ctrl_c_ends_it(run):
    with locked(run.path):
        code, shown = on_terminal('watch', str(run.path), '--every', '.1', until='memory', interrupt=True)
    assert code == 130 and 'Traceback' not in shown
    *_, after = shown.split('\x1b[?25h')
    assert '\x1b[?25l' in shown and after.split() == 'underdog: stopped by Ctrl-C'.split(), 'the cursor is back'
    assert '\x1b[34m' in shown or '\x1b[94m' in shown or '\x1b[38' in shown


def test_no_colour_where_none_is_wanted(run):
    code, shown = on_terminal('watch', str(run.path), '--once', until='', interrupt=False, NO_COLOR='1')
    assert code == 1 and '┤' in shown and '\x1b[3' not in shown
    code, shown = on_terminal('watch', str(run.path), until='', interrupt=False, TERM='dumb')
    assert code == 1 and shown.startswith('step 30 of 50') and '\x1b' not in shown


def test_in_a_notebook_one_output_is_replaced(finished, tmp_path):
    nbclient, nbformat = pytest.importorskip('nbclient'), pytest.importorskip('nbformat')
    source = f'from underdog.console.live import watch_run\nlast = watch_run({str(finished.path)!r})\nlast.state'
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    nbclient.NotebookClient(nb, timeout=120, kernel_name='python3').execute()
    shown = [o for o in nb.cells[0].outputs if 'text/html' in o.get('data', {})]
    assert len(shown) == 1 and '<img src="data:image/png;base64,' in shown[0]['data']['text/html']
    assert shown[0]['data']['text/plain'].startswith('step ')
    text = ''.join(o.get('text', '') for o in nb.cells[0].outputs)
    assert str(judge(finished)[1]) in text and nb.cells[0].outputs[-1]['data']['text/plain'] == "'finished'"


# ---- elsewhere

class Kept(Writer):
    "Keeps lines as TensorBoard does: what comes again replaces what has its step or a later one."
    def __init__(self):
        super().__init__()
        self.lines = []

    def write(self, step, values, seconds): self.lines.append((step, values))

    def back(self, step): self.lines = [line for line in self.lines if line[0] < step]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 40), st.booleans(), st.booleans()), max_size=6))
def test_a_writer_ends_with_all_that_is_there_whatever_was_made_again(tmp_path_factory, sessions):
    run, writer, step = RunFolder.create(tmp_path_factory.mktemp('writer')/'run', CONFIG), Kept(), 0
    for more, checkpoint, evaluated, looked in sessions:
        log_steps(run, step + 1, step + more)
        if looked: writer.take(view_run(run.path))
        # killed; gone on from a checkpoint, after which an evaluation may still be due
        step = min(step + more, checkpoint)
        run.cut_metrics(step, evaluated)
        if not evaluated and step and step % 10 == 0: log_evaluation(run, step)
    log_steps(run, step + 1, step + 3)
    writer.take(view_run(run.path))
    at_once = Kept()
    at_once.take(view_run(run.path))
    assert writer.lines == at_once.lines and len(at_once.lines) == len(view_run(run.path).records)


@pytest.mark.parametrize('option, value', [('tensorboard', 'tb'), ('trackio', 'project')])
def test_what_is_not_installed_is_said_in_a_line(run, tmp_path, monkeypatch, capsys, option, value):
    for name in [n for n in sys.modules if n.split('.')[0] == option]: monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, option, None)
    assert main_code('watch', str(run.path), f'--{option}', str(tmp_path/value)) == 1
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and f'pip install {option}' in error


def test_tensorboard_reads_what_was_written_and_no_more_after_a_second_time(run, tmp_path):
    pytest.importorskip('tensorboard', reason='tensorboard is not installed; it is optional')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    for more in range(2):   # watched, and watched again after it went on
        with TensorBoard(tmp_path/'tb') as writer: writer.take(view_run(run.path))
        run.cut_metrics(25)
        log_steps(run, 26, 30 + 5*more)
        time.sleep(1.1)   # files of events are named by the second
    with TensorBoard(tmp_path/'tb') as writer: writer.take(view_run(run.path))
    events = EventAccumulator(str(tmp_path/'tb'))
    events.Reload()
    logged = run.metrics()
    for tag, column in {'train/loss': 'loss', 'eval/loss': 'eval_loss', 'eval/tfidf': 'eval_tfidf'}.items():
        scalars, wanted = events.Scalars(tag), logged[logged[column].notna()]
        assert [s.step for s in scalars] == wanted['step'].tolist()
        assert [s.value for s in scalars] == pytest.approx(wanted[column].tolist(), rel=1e-6)
    times = [s.wall_time for s in events.Scalars('train/loss')]
    assert times[-1] - times[0] == pytest.approx(logged['elapsed_s'].max() - logged['elapsed_s'].min(), abs=1e-3)


KEPT = """
import json
from trackio.sqlite_storage import SQLiteStorage
project, = SQLiteStorage.get_projects()
name, = SQLiteStorage.get_runs(project)
print(json.dumps([project, name, SQLiteStorage.get_logs(project, name)]))
"""


def test_trackio_keeps_what_was_logged(run, tmp_path):
    "In processes of its own: it keeps its folder in mind, and threads."
    pytest.importorskip('trackio', reason='trackio is not installed; it is optional')
    env = dict(os.environ, TRACKIO_DIR=str(tmp_path/'trackio'))
    watching = [*UNDERDOG, 'watch', str(run.path), '--once', '--trackio', 'pairs']
    assert subprocess.run(watching, env=env, capture_output=True).returncode == 1, 'the run is gone'
    project, name, lines = json.loads(subprocess.check_output([sys.executable, '-c', KEPT], env=env))
    assert (project, name) == ('pairs', str(run.path))
    logged = run.metrics()
    for key, column in {'train/loss': 'loss', 'eval/tfidf': 'eval_tfidf'}.items():
        kept = [(line['step'], line[key]) for line in lines if key in line]
        wanted = logged[logged[column].notna()]
        assert kept == list(zip(wanted['step'], wanted[column]))


# ---- on Kaggle

LOG = '''import time
print('50 steps to go at 9 tokens/s: about 1 min with evaluations', flush=True)
for done in (80, 160, 240):
    print(f'train:  {done//4}%|███   | {done}/400 [00:0{done//80}<00:10, 8row/s, loss=1.0{done}, tok_s=9]', flush=True)
    time.sleep(.1)
print('step 30: held-out log loss 1.0240 on 80 rows (model 1.0260, prior 1.0901, tfidf 1.0310)', flush=True)
'''


@pytest.mark.parametrize('bad', [False, True])
def test_a_kernel_is_watched_to_its_end(server, hub, tmp_path, monkeypatch, capsys, bad):
    from underdog.kaggle.push import PushConfig, push_kernel
    monkeypatch.setattr('underdog.kaggle.account.Hub', lambda: hub)
    kernel = write_notebook(tmp_path/'small-kernel.ipynb', LOG + ("raise ValueError('too hot')" if bad else ''))
    pushed = push_kernel(hub, kernel, {}, 'small-kernel', settings=PushConfig(shape='', gpus=0))
    assert main_code('watch', pushed.ref, '--every', '.05') == int(bad)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f'{pushed.ref}: ') and any('steps to go' in line for line in lines)
    assert ('error' in lines[-1] and 'too hot' in lines[-1]) if bad else 'complete' in lines[-1]
    assert len([line for line in lines if line.startswith('step 30: held-out')]) == 1
    assert watch_kernel(hub, pushed.ref, once=True).over


def test_a_log_gives_the_curves_of_its_run():
    events = [dict(data=piece, time=2.*i) for i, piece in enumerate([
        'going on after step 10 of 50\n', '40 steps to go at 9 tok', 'ens/s\n',
        'train:  20%|██  | 80/400 [00:00<?, ?row/s]\r',
        'train:  40%|███ | 160/400 [00:09<00:10, 8.1row/s, loss=1.01, tok_s=1,204, lr=9.1e-05, gb=14.1]\r',
        'train:  60%|████ | 240/400 [00:19<00:10, 8.1row/s, loss=nan, tok_s=1,204]\n',
        'step 30: held-out log loss 1.0240 on 1,080 rows (model 1.0260, prior 1.0901, tfidf 1.0310)\n', 'half a li'])]
    first, nan, held = records_in(events)
    assert first == dict(step=20, of=50, loss=1.01, elapsed_s=8., tokens_per_s=1204., lr=9.1e-5, memory_gb=14.1)
    assert nan['step'] == 30 and 'lr' not in nan, 'a log of an older version'
    # the same picture as of a run folder
    view = _view('me/gemma-1', events)
    assert 'step 20 of 50' in line_of(view) and 'tfidf 1.0310' in picture(view).plain and view.words == 'half a li'
    assert '1.0240 at step 30 on 1,080 rows' in _html(view) and '<img' in _html(view)
    assert {'rate', 'memory'} <= {figure.name for figure in figures_of(_view('me/gemma-1', events[:5]))}
    assert held == dict(step=30, eval_loss=1.024, eval_rows=1080, eval_model=1.026, eval_prior=1.0901, eval_tfidf=1.031)


def test_a_log_that_ends_before_the_last_cell_is_of_a_run_that_failed():
    began, done = dict(data='underdog: push 1a2b\n'), dict(data='underdog: done 1a2b\n')
    cut, whole, of_others = [began], [began, done], [dict(data='epoch 1\n')]
    assert [_view('me/k', events, ended=True).state for events in (cut, whole, of_others)] == [
        'failed', 'finished', 'finished']
    assert _view('me/k', cut).state == 'running'


def test_the_log_of_a_training_says_what_its_metrics_say(finished):
    lines = [dict(data=line, time=1.) for line in finished.log_file.read_text().splitlines(True)]
    *_, logged = [r for r in records_in(lines) if 'loss' in r]
    *_, wrote = [r for r in finished.metrics().dropna(subset='loss').to_dict('records')]
    assert logged['step'] == wrote['step'] == logged['of'] and wrote['lr'] > 0
    assert {name: logged[name] for name in ('lr', 'memory_gb')} == pytest.approx(
        {name: wrote[name] for name in ('lr', 'memory_gb')}, rel=.01)
    assert 'lr ' in line_of(_view('me/kernel', lines)) and ' GB' in line_of(_view('me/kernel', lines))


@pytest.mark.parametrize('text, kernel', [('me/gemma-1', True), ('runs/1', False), ('runs/1/run', False),
                                          ('gemma', False), ('../run', False)])
def test_what_is_named_decides(tmp_path, monkeypatch, text, kernel):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'runs').mkdir()
    assert _names_kernel(text) == kernel
