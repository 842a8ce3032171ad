"A sweep comes to the same end however often it is killed, by one process or two, and never tries the same twice."
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import nbformat
import pandas as pd
import pytest
from conftest import slow

from underdog.core import UserError
from underdog.session import locked
from underdog.runfolder import RunFolder
from underdog.search.study import folder_of, study_of, suggest, trials_of, trials_table
from underdog.search.sweep import Sweep, read_sweep
from underdog.search.sweep_figures import axis_of, importances, write_figures
from underdog.search.trials import abandon, eval_losses, falls_behind, run_sweep

PRETEND = '''import json, math, os, time
from pathlib import Path
run = Path(out)
run.mkdir(parents=True, exist_ok=True)
if len([*run.glob('died-*')]) < die:
    (run/'status.json').write_text(json.dumps(dict(state='running', step=0, of=30)))
    (run/f'died-{time.time_ns()}').touch()
    os.kill(os.getpid(), 9)
if lr > fail_above: raise ValueError('the loss is not finite')
done = len((run/'metrics.jsonl').read_text().splitlines()) if (run/'metrics.jsonl').exists() else 0
state = 'finished'
for i in range(done, 3):
    loss = .9 + .05*(math.log10(lr) + 4)**2 + .1/(i + 1)
    with open(run/'metrics.jsonl', 'a') as f: f.write(json.dumps(dict(step=10*(i + 1), eval_loss=loss)) + '\\n')
    time.sleep(nap)
    if (run/'stop').exists():
        state = 'paused'
        break
(run/'status.json').write_text(json.dumps(dict(state=state, step=30, of=30)))'''
# a sweep in a process of its own: its arguments are the file and the folder
CODE = '''# warm
import sys
from underdog.search.sweep import read_sweep
from underdog.search.trials import run_sweep
run_sweep(read_sweep(sys.argv[1]), sys.argv[2], say=lambda s: print(s, flush=True))'''
# a writer that is killed within a line of the journal
TORN = '''import os
from underdog.search.study import JournalLock
lock = JournalLock('out/journal.log')
lock.acquire()
lock.file.write(b'{"op_code": 8, "wor')
lock.file.flush()
os.kill(os.getpid(), 9)'''
LOG_LR = dict(lr=dict(low=1e-6, high=1e-2, log=True))


@pytest.fixture
def kernel(tmp_path):
    "A kernel that pretends to train: its loss is a parabola in log lr."
    new_cell, file = nbformat.v4.new_code_cell, tmp_path/'pretend.ipynb'
    parameters = "lr = 1e-4\nrank = 8\nnap = 0.0\ndie = 0\nfail_above = 9.0\nout = 'run'"
    cells = [new_cell(parameters, metadata=dict(tags=['parameters'])), new_cell(PRETEND)]
    spec = dict(name='python3', display_name='Python 3', language='python')
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=spec)), file)
    return str(file)


def write(tmp_path, kernel, **more):
    import yaml
    kernel = more.pop('other', kernel)
    file = tmp_path/'sweep.yaml'
    file.write_text(yaml.safe_dump(dict(kernel=kernel, trials=4, space=LOG_LR) | more))
    return file


def start(file, out, **kwargs):
    "A process that runs the sweep."
    command = [sys.executable, '-c', CODE, str(file), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def silent(line): pass


def ends(table): return {r['trial']: round(r['loss'], 9) for _, r in table.iterrows() if r['state'] == 'complete'}


def test_killed_anywhere_it_ends_as_if_it_had_not_been(tmp_path, kernel):
    file = write(tmp_path, kernel, fixed=dict(nap=.4))
    whole = run_sweep(read_sweep(file), tmp_path/'whole', say=silent)
    for after, kill in ((3.5, os.kill), (4., os.killpg)):   # the sweep alone, whose trial must end by itself; all of it
        process = start(file, tmp_path/'killed', start_new_session=True)
        time.sleep(after)
        kill(process.pid, signal.SIGKILL)
        process.wait()
    table = run_sweep(read_sweep(file), tmp_path/'killed', say=silent)
    assert ends(table) == ends(whole) and len(table) == 4 and table['trial'].is_unique


def test_two_processes_share_one_sweep(tmp_path, kernel):
    file = write(tmp_path, kernel, trials=6, search='random', fixed=dict(nap=.3))
    both = [start(file, tmp_path/'out') for _ in range(2)]
    outputs = [p.communicate(timeout=120)[0] for p in both]
    assert all(p.returncode == 0 for p in both) and all('complete' in text for text in outputs), outputs   # both worked
    table = trials_table(study_of(read_sweep(file), tmp_path/'out'))
    assert (table['state'] == 'complete').sum() >= 6 and table['trial'].is_unique
    # nothing was done twice
    assert sum(text.count(': complete') for text in outputs) == (table['state'] == 'complete').sum()


def test_what_a_killed_process_leaves_is_taken_up_by_the_other(tmp_path, kernel):
    file = write(tmp_path, kernel, trials=3, search='random', fixed=dict(nap=.7))
    doomed = start(file, tmp_path/'out')
    while not list(tmp_path.glob('out/*/run/metrics.jsonl')): time.sleep(.1)
    other = start(file, tmp_path/'out')
    while len(list(tmp_path.glob('out/*/run/metrics.jsonl'))) < 2: time.sleep(.1)
    doomed.kill()
    assert other.wait(timeout=120) == 0, other.communicate()[0]
    table = trials_table(study_of(read_sweep(file), tmp_path/'out'))
    assert list(table['state']) == ['complete']*3 and list(table['evaluations']) == [3]*3
    assert table['trial'].is_unique


def test_a_journal_torn_anywhere_in_its_last_lines_ends_the_same(tmp_path, kernel):
    "Without trainings: a trial is told its loss at once; the journal is cut as a killed writer or a full disk cuts it."
    sweep = Sweep(LOG_LR | dict(rank=[4, 8, 16]), trials=4)
    def go_on(out):
        study = study_of(sweep, out)
        abandon(study, out)
        while trial := suggest(sweep, study):
            trial.set_user_attr('state', 'complete')
            study.tell(trial, trial.params['lr']*trial.params['rank'])
        return {folder_of(t.params): t.value for t in trials_of(study) if t.state.name == 'COMPLETE'}
    whole = go_on(tmp_path/'whole')
    journal = (tmp_path/'whole'/'journal.log').read_bytes()
    for cut in range(len(journal) - 1, 0, -307):
        (tmp_path/str(cut)).mkdir()
        (tmp_path/str(cut)/'journal.log').write_bytes(journal[:cut])
        assert go_on(tmp_path/str(cut)) == whole, cut
    assert len(whole) == 4 and cut < 400


def asked(out):
    sweep = Sweep(dict(rank=[4, 8, 16]))
    study = study_of(sweep, out)
    return study, suggest(sweep, study)


def states(study): return [t.state.name for t in study.get_trials()]


def test_a_trial_that_ends_while_another_process_looks_keeps_its_loss(tmp_path, monkeypatch):
    study, trial = asked(tmp_path)
    @contextmanager
    def late(folder, wait=0.):   # its owner ends it and lets go of it, between our look and our turn
        study.tell(trial, .9)
        yield
    monkeypatch.setattr('underdog.search.trials.locked', late)
    abandon(study, tmp_path)
    assert states(study) == ['COMPLETE'] and study.best_value == .9


def test_what_runs_on_another_machine_is_not_waited_for(tmp_path):
    study, trial = asked(tmp_path)
    turn, messages = tmp_path/folder_of(trial.params)/'.turn', []
    with locked(turn):
        (turn/'.lock').write_text(f'{2**22 + 1} on another')   # no process here has this number
        abandon(study, tmp_path, messages.append)
    assert states(study) == ['RUNNING'] and not messages
    abandon(study, tmp_path, messages.append)
    assert states(study) == ['FAIL'] and not messages   # let go of, wherever it was


def test_a_writer_killed_within_a_line_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)   # a relative folder, as on the command line
    study, trial = asked('out')
    assert subprocess.run([sys.executable, '-c', TORN]).returncode == -signal.SIGKILL
    trial.set_user_attr('seen', 1)   # by one who had the journal open
    again, second = asked('out')
    assert states(again) == ['RUNNING', 'RUNNING'] and again.trials[0].user_attrs == dict(seen=1) and second.number == 1
    assert all(json.loads(line) for line in (tmp_path/'out'/'journal.log').read_text().splitlines())


def test_a_journal_of_an_earlier_build_is_read(tmp_path):
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage
    sweep = Sweep(dict(rank=[4, 8]))
    storage = JournalStorage(JournalFileBackend(str(tmp_path/'journal.log')))
    # it does not know the names of its parameters
    optuna.create_study(study_name='sweep', storage=storage).set_user_attr('key', sweep.key)
    assert len(trials_table(study_of(sweep, tmp_path))) == 0
    assert suggest(sweep, study_of(sweep, tmp_path)).params['rank'] in (4, 8)


def test_a_grid_is_walked_once_and_failures_are_kept_and_not_repeated(tmp_path, kernel):
    space = dict(lr=['1e-5', 1e-4, 1e-2], rank=[4, 8])
    file = write(tmp_path, kernel, trials=20, search='grid', fixed=dict(fail_above=5e-3), space=space)
    table = run_sweep(read_sweep(file), tmp_path/'out', say=silent)
    assert len(table) == 6 and table['state'].value_counts().to_dict() == dict(complete=4, failed=2)
    assert 'the loss is not finite' in table[table['state'] == 'failed']['why'].iloc[0]
    again = run_sweep(read_sweep(file), tmp_path/'out', say=lambda s: pytest.fail(s))
    assert len(again) == 6
    first = tmp_path/'out'/table['trial'][0]
    assert (first/'pretend.ipynb').is_file() and eval_losses(RunFolder(first/'run'))


@pytest.mark.parametrize('die,states', [(1, ['complete']), (2, ['failed'])])
def test_a_trial_that_was_killed_is_tried_once_more(tmp_path, kernel, die, states):
    "Out of memory, or somebody's kill: no fault of the settings, unless it happens again."
    said = []
    file = write(tmp_path, kernel, trials=1, search='grid', fixed=dict(die=die), space=dict(lr=[1e-4]))
    table = run_sweep(read_sweep(file), tmp_path/'out', say=said.append)
    assert table['state'].tolist() == states and len(said) == 2 and 'killed' in said[0]
    # what a trial says at its end has words, whatever is drawn around them
    if die > 1: assert 'died' in table['why'][0] or 'code' in table['why'][0]


def test_a_limit_ends_it_and_the_next_session_goes_on(tmp_path, kernel):
    file = write(tmp_path, kernel, fixed=dict(nap=.8))
    first = run_sweep(read_sweep(file), tmp_path/'out', hours=2e-3, say=silent)
    assert 0 < len(first) < 4
    assert len(run_sweep(read_sweep(file), tmp_path/'out', say=silent)) == 4


@pytest.mark.parametrize('change,message', [
    (dict(space=dict(learning_rate=[1])), "no parameter 'learning_rate'"),
    (dict(space=dict(lr=dict(low=1e-2, high=1e-4))), 'is empty'),
    (dict(space=dict(lr=[])), 'the list is empty'),
    (dict(space={}), 'space is empty'),
    (dict(space=None), 'no space'),
    (dict(space=dict(lr=dict(low=0, high=1, log=True))), 'begins above 0'),
    (dict(space=dict(lr=dict(low=1e-4, most=1))), "unknown key 'most'"),
    (dict(space=dict(lr=dict(low=1e-4))), 'low and high are both wanted'),
    (dict(space=dict(out=dict(low='a', high='b'))), 'a range needs numbers'),
    (dict(space=dict(lr='fast')), 'belongs under fixed'),
    (dict(spaces={}), 'did you mean space'),
    (dict(search='bayes'), 'search='),
    (dict(trials=0), 'trials=0'),
    (dict(search='grid'), 'is a range'),
    (dict(fixed=dict(lr=1.)), 'fixed and searched'),
    (dict(other='nothing'), "no kernel 'nothing'"),
])
def test_mistakes_in_the_file_are_one_message_that_names_it(tmp_path, kernel, change, message):
    with pytest.raises(UserError, match=message) as e: read_sweep(write(tmp_path, kernel, **change))
    assert 'sweep.yaml' in str(e.value)


def test_texts_that_yaml_made_of_numbers_are_numbers(tmp_path, kernel):
    lines = [f'kernel: {kernel}', 'space:', '  lr: {low: 1e-5, high: 1e-3, log: true}', 'fixed: {fail_above: 1e+1}']
    (tmp_path/'sweep.yaml').write_text('\n'.join(lines))
    sweep = read_sweep(tmp_path/'sweep.yaml')
    assert sweep.space['lr'] == dict(low=1e-5, high=1e-3, log=True) and sweep.fixed == dict(fail_above=10.)


def test_the_journal_of_another_sweep_or_of_nothing_is_refused(tmp_path, kernel):
    study_of(Sweep(dict(lr=[1., 2.]), kernel=kernel), tmp_path/'out')
    other = Sweep(dict(lr=[1., 3.]), kernel=kernel)
    with pytest.raises(UserError, match='of another sweep'): study_of(other, tmp_path/'out')
    (tmp_path/'bad').mkdir()
    (tmp_path/'bad'/'journal.log').write_text('this is not a journal\n{"x": 1}\n')
    with pytest.raises(UserError, match='not a journal'): study_of(other, tmp_path/'bad')


def test_the_command(tmp_path, kernel):
    file = write(tmp_path, kernel, trials=2)
    out, code = tmp_path/'out', '# warm\nfrom underdog.console.main import main; main()'
    command = [sys.executable, '-c', code, 'sweep', str(file), '--out', str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and 'best first' in done.stdout, done.stderr
    assert (out/'sweep.png').stat().st_size > 5000 and len((out/'trials.csv').read_text().splitlines()) == 3
    for record in out.glob('trial-*/trial.json'): assert list(json.loads(record.read_text())['params']) == ['lr']


@slow
def test_the_sweep_kernel_goes_on_in_the_next_session(tmp_path, kernel, monkeypatch):
    "Under papermill, as on Kaggle; the second session has only the output of the first, which it does not touch."
    from underdog.kernels import run_kernel
    # four trials take longer than the first session, on however fast a machine
    file, first, second = write(tmp_path, kernel, fixed=dict(nap=1.2)), tmp_path/'first', tmp_path/'second'
    content = lambda folder: {p: p.read_bytes() for p in folder.rglob('*') if p.is_file()}
    run_kernel('sweep', dict(sweep=str(file), out=str(first), time_limit='0.004'), tmp_path/'nb')
    before = content(first)
    assert 0 < len(list(first.glob('trial-*'))) < 4
    run_kernel('sweep', dict(sweep=str(file), out=str(second), resume_from=str(first)), tmp_path/'nb')
    table = trials_table(study_of(read_sweep(file), second))
    assert (table['state'] == 'complete').sum() == 4 and table['trial'].is_unique
    assert before == content(first)


def test_early_stops_are_successive_halving():
    known = {k: [.9 + i/10, .8 + i/10, .7 + i/10] for i, k in enumerate('abcd')}
    # the better half of five goes on
    assert falls_behind(known, 'x', [1.15]) and not falls_behind(known, 'x', [1.05])
    # rungs are 1, 2, 4, … evaluations
    assert falls_behind(known, 'x', [.9, 1.05]) and not falls_behind(known, 'x', [.9, 1., 2.])
    # a setting is not its own rival; three say nothing
    assert not falls_behind(known, 'a', [9.]) and not falls_behind({k: known[k] for k in 'abc'}, 'x', [9.])


def test_the_score_is_the_last_evaluation_which_has_all_rows(tmp_path, kernel):
    "One on the way may be on fewer rows, and lower by chance."
    lucky = PRETEND.replace("eval_loss=loss)", "eval_loss=loss - .5*(i == 1), eval_rows=2 + i)")
    file = tmp_path/'lucky.ipynb'
    nb = nbformat.read(kernel, 4)
    nb.cells[1].source = lucky
    nbformat.write(nb, file)
    sweep = read_sweep(write(tmp_path, kernel, other=str(file), trials=1, search='random'))
    table = run_sweep(sweep, tmp_path/'out', say=silent)
    curve = table['curve'].iloc[0]
    assert min(curve) == curve[1] < curve[2] == table['loss'].iloc[0]
    assert study_of(sweep, tmp_path/'out').best_value == curve[2]


def test_figures_of_every_kind_of_parameter(tmp_path, kernel):
    "Logarithmic, linear, and a list; the importance is that of the parameter that matters."
    space = LOG_LR | dict(rank=[4, 8], fail_above=dict(low=1., high=2.))
    file = write(tmp_path, kernel, trials=7, search='random', space=space)
    sweep = read_sweep(file)
    table = run_sweep(sweep, tmp_path/'out', say=silent)
    weights = importances(study_of(sweep, tmp_path/'out'))
    assert list(weights)[0] == 'lr' and sum(weights.values()) == pytest.approx(1) and (table['cpu_s'] > .2).all()
    figure = write_figures(sweep, tmp_path/'out')
    labels = {ax.get_xlabel() for part in figure.subfigs for ax in part.axes}
    assert labels >= {'lr', 'rank', 'fail_above', 'importance', 'seconds of CPU', 'evaluation'}
    assert axis_of([1e-6, 1e-4, 1e-2], sweep.space['lr']).places == pytest.approx([0, .5, 1])
    assert axis_of([8, 4], [4, 8]).places == [1, 0]


def test_figures_do_not_grow_with_what_is_drawn(tmp_path):
    "Thousands of evaluations, hundreds of values and long names get as many labels as a person reads."
    from underdog.search.sweep_figures import _plot_sweep
    names = [f'/models/{i}/${"x"*5000}' for i in range(300)]
    table = pd.DataFrame(dict(model=names[:4], state='complete', loss=[.9, .8, .85, .95], cpu_s=1., gpu_s=0.,
                              curve=[[1.]*3000]*4))
    figure = _plot_sweep(table, dict(model=names), {})
    figure.canvas.draw()
    axes = [ax for part in figure.subfigs for ax in part.axes]
    assert max(len(ax.get_xticklabels()) for ax in axes) <= 20
    assert max(len(label.get_text()) for ax in axes for label in ax.get_xticklabels()) < 30


def test_the_table_of_a_sweep_of_three_settings_fits_a_terminal(monkeypatch, capsys):
    "As a table, not as a list of blocks; the verdict on a trial that did not come to its end is what became of it."
    from underdog.console.searching import _best_first
    from underdog.console.tables import print_frame
    monkeypatch.setenv('COLUMNS', '80')
    trials = pd.DataFrame(dict(trial=['trial-a12566b8b0', 'trial-8642d9791e', 'trial-84411d97ae'],
                               lr=[.000416, 1.21e-3, 5.74e-5], head_lr=[7.06e-4, 5e-3, 1e-2], rank=[8, 64, 16],
                               state=['complete', 'complete', 'pruned'], loss=[1.0856, 1.0843, 1.0921],
                               seconds=[1106.63, 99.3, 7.], cpu_s=[20.1, 19.4, None], gpu_s=0.))
    verdicts = {'trial-a12566b8b0': 'tie', 'trial-8642d9791e': 'best'}
    settings = ['lr', 'head_lr', 'rank']
    print_frame('sweep.yaml: best first', _best_first(trials, settings, verdicts))
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split('│')[1:-1]] for line in lines if line.startswith('│')]
    assert rows == [['trial-8642d9791e', '0.0012', '0.0050', '64', '1.0843', 'best', '19'],
                    ['trial-a12566b8b0', '0.000416', '0.000706', '8', '1.0856', 'tie', '20'],
                    ['trial-84411d97ae', '5.74e-05', '0.0100', '16', '1.0921', 'pruned', '']]
    # without verdicts, as after a single trial
    assert _best_first(trials, settings, {})['verdict'].tolist() == ['', '', 'pruned']
    assert 'verdict' not in _best_first(trials[:2], settings, {})
