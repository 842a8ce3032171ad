"A sweep comes to the same end however often it is killed, by one process or two, and never tries the same twice."
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import nbformat
import pytest

from underdog.core import UserError
from underdog.session import locked
from underdog.search.sweep import Sweep, abandon, curve, falls_behind, folder_of, read_sweep, run_sweep, study_of, suggest, trials_of, trials_table
from underdog.search.trials import importances, positions, write_figures

PRETEND = '''import json, math, time
from pathlib import Path
run = Path(out)
run.mkdir(parents=True, exist_ok=True)
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
CODE = 'import sys\nfrom underdog.search.sweep import read_sweep, run_sweep\nrun_sweep(read_sweep(sys.argv[1]), sys.argv[2], say=lambda s: print(s, flush=True))'


@pytest.fixture
def kernel(tmp_path):
    cells = [nbformat.v4.new_code_cell("lr = 1e-4\nrank = 8\nnap = 0.0\nfail_above = 9.0\nout = 'run'", metadata=dict(tags=['parameters'])), nbformat.v4.new_code_cell(PRETEND)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))), tmp_path/'pretend.ipynb')
    return str(tmp_path/'pretend.ipynb')


def write(tmp_path, kernel, **more):
    import yaml
    kernel = more.pop('other', kernel)
    file = tmp_path/'sweep.yaml'
    file.write_text(yaml.safe_dump(dict(kernel=kernel, trials=4, space=dict(lr=dict(low=1e-6, high=1e-2, log=True))) | more))
    return file


def ends(table): return {r['trial']: round(r['loss'], 9) for _, r in table.iterrows() if r['state'] == 'complete'}


def test_killed_anywhere_it_ends_as_if_it_had_not_been(tmp_path, kernel):
    file = write(tmp_path, kernel, fixed=dict(nap=.4))
    whole = run_sweep(read_sweep(file), tmp_path/'whole', say=lambda s: None)
    for after, kill in ((3.5, os.kill), (4., os.killpg)):   # the sweep alone, whose trial must end by itself; all of it
        process = subprocess.Popen([sys.executable, '-c', CODE, str(file), str(tmp_path/'killed')], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        time.sleep(after)
        kill(process.pid, signal.SIGKILL)
        process.wait()
    table = run_sweep(read_sweep(file), tmp_path/'killed', say=lambda s: None)
    assert ends(table) == ends(whole) and len(table) == 4 and table['trial'].is_unique


def test_two_processes_share_one_sweep(tmp_path, kernel):
    file = write(tmp_path, kernel, trials=6, search='random', fixed=dict(nap=.3))
    both = [subprocess.Popen([sys.executable, '-c', CODE, str(file), str(tmp_path/'out')], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [p.communicate(timeout=120)[0] for p in both]
    assert all(p.returncode == 0 for p in both) and all('complete' in s for s in said), said   # both worked
    table = trials_table(study_of(read_sweep(file), tmp_path/'out'))
    assert (table['state'] == 'complete').sum() >= 6 and table['trial'].is_unique
    assert sum(s.count(': complete') for s in said) == (table['state'] == 'complete').sum()   # nothing was done twice


def test_what_a_killed_process_leaves_is_taken_up_by_the_other(tmp_path, kernel):
    file = write(tmp_path, kernel, trials=3, search='random', fixed=dict(nap=.7))
    start = lambda: subprocess.Popen([sys.executable, '-c', CODE, str(file), str(tmp_path/'out')], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    doomed = start()
    while not list(tmp_path.glob('out/*/run/metrics.jsonl')): time.sleep(.1)
    other = start()
    while len(list(tmp_path.glob('out/*/run/metrics.jsonl'))) < 2: time.sleep(.1)
    doomed.kill()
    assert other.wait(timeout=120) == 0, other.communicate()[0]
    table = trials_table(study_of(read_sweep(file), tmp_path/'out'))
    assert list(table['state']) == ['complete']*3 and list(table['evaluations']) == [3]*3 and table['trial'].is_unique


def test_a_journal_torn_anywhere_in_its_last_lines_ends_the_same(tmp_path, kernel):
    "Without trainings: a trial is told its loss at once, and the journal is cut where a killed writer, or a full disk, would have cut it."
    sweep = Sweep(dict(lr=dict(low=1e-6, high=1e-2, log=True), rank=[4, 8, 16]), trials=4)
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
    monkeypatch.setattr('underdog.search.sweep.locked', late)
    abandon(study, tmp_path)
    assert states(study) == ['COMPLETE'] and study.best_value == .9


def test_what_runs_on_another_machine_is_not_waited_for(tmp_path):
    study, trial = asked(tmp_path)
    turn, said = tmp_path/folder_of(trial.params)/'.turn', []
    with locked(turn):
        (turn/'.lock').write_text(f'{2**22 + 1} on another')   # no process here has this number
        abandon(study, tmp_path, said.append)
    assert states(study) == ['RUNNING'] and not said
    abandon(study, tmp_path, said.append)
    assert states(study) == ['FAIL'] and not said   # let go of, wherever it was


def test_a_writer_killed_within_a_line_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)   # a relative folder, as on the command line
    study, trial = asked('out')
    code = "import os\nfrom underdog.search.sweep import JournalLock\nlock = JournalLock('out/journal.log')\nlock.acquire()\nlock.file.write(b'{\"op_code\": 8, \"wor')\nlock.file.flush()\nos.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
    trial.set_user_attr('seen', 1)   # by one who had the journal open
    (again, second), whole = asked('out'), open('out/journal.log').read()
    assert states(again) == ['RUNNING', 'RUNNING'] and again.trials[0].user_attrs == dict(seen=1) and second.number == 1
    assert all(json.loads(line) for line in whole.splitlines())


def test_a_journal_of_an_earlier_build_is_read(tmp_path):
    import optuna
    from optuna.storages.journal import JournalFileBackend, JournalStorage
    sweep = Sweep(dict(rank=[4, 8]))
    optuna.create_study(study_name='sweep', storage=JournalStorage(JournalFileBackend(str(tmp_path/'journal.log')))).set_user_attr('key', sweep.key)   # without the names of its parameters
    assert len(trials_table(study_of(sweep, tmp_path))) == 0
    assert suggest(sweep, study_of(sweep, tmp_path)).params['rank'] in (4, 8)


def test_a_grid_is_walked_once_and_failures_are_kept_and_not_repeated(tmp_path, kernel):
    file = write(tmp_path, kernel, trials=20, search='grid', fixed=dict(fail_above=5e-3), space=dict(lr=['1e-5', 1e-4, 1e-2], rank=[4, 8]))
    table = run_sweep(read_sweep(file), tmp_path/'out', say=lambda s: None)
    assert len(table) == 6 and table['state'].value_counts().to_dict() == dict(complete=4, failed=2)
    assert 'the loss is not finite' in table[table['state'] == 'failed']['why'].iloc[0]
    again = run_sweep(read_sweep(file), tmp_path/'out', say=lambda s: pytest.fail(s))
    assert len(again) == 6
    assert (tmp_path/'out'/table['trial'][0]/'pretend.ipynb').is_file() and curve(tmp_path/'out'/table['trial'][0]/'run')


def test_a_limit_ends_it_and_the_next_session_goes_on(tmp_path, kernel):
    file = write(tmp_path, kernel, fixed=dict(nap=.8))
    first = run_sweep(read_sweep(file), tmp_path/'out', hours=2e-3, say=lambda s: None)
    assert 0 < len(first) < 4
    assert len(run_sweep(read_sweep(file), tmp_path/'out', say=lambda s: None)) == 4


@pytest.mark.parametrize('change,message', [
    (dict(space=dict(learning_rate=[1])), "no parameter 'learning_rate'"), (dict(space=dict(lr=dict(low=1e-2, high=1e-4))), 'is empty'), (dict(space=dict(lr=[])), 'the list is empty'), (dict(space={}), 'space is empty'), (dict(space=dict(lr=dict(low=0, high=1, log=True))), 'begins above 0'),
    (dict(space=dict(lr='fast')), 'belongs under fixed'), (dict(spaces={}), 'did you mean space'), (dict(search='bayes'), 'search='), (dict(trials=0), 'trials=0'), (dict(search='grid'), 'is a range'), (dict(fixed=dict(lr=1.)), 'fixed and searched'), (dict(other='nothing'), "no kernel 'nothing'")])
def test_mistakes_in_the_file_are_one_message_that_names_it(tmp_path, kernel, change, message):
    with pytest.raises(UserError, match=message) as e: read_sweep(write(tmp_path, kernel, **change))
    assert 'sweep.yaml' in str(e.value)


def test_texts_that_yaml_made_of_numbers_are_numbers(tmp_path, kernel):
    (tmp_path/'sweep.yaml').write_text(f'kernel: {kernel}\nspace:\n  lr: {{low: 1e-5, high: 1e-3, log: true}}\nfixed: {{fail_above: 1e+1}}\n')
    sweep = read_sweep(tmp_path/'sweep.yaml')
    assert sweep.space['lr'] == dict(low=1e-5, high=1e-3, log=True) and sweep.fixed == dict(fail_above=10.)


def test_the_journal_of_another_sweep_or_of_nothing_is_refused(tmp_path, kernel):
    study_of(Sweep(dict(lr=[1., 2.]), kernel=kernel), tmp_path/'out')
    with pytest.raises(UserError, match='of another sweep'): study_of(Sweep(dict(lr=[1., 3.]), kernel=kernel), tmp_path/'out')
    (tmp_path/'bad').mkdir()
    (tmp_path/'bad'/'journal.log').write_text('this is not a journal\n{"x": 1}\n')
    with pytest.raises(UserError, match='not a journal'): study_of(Sweep(dict(lr=[1.]), kernel=kernel), tmp_path/'bad')


def test_the_command(tmp_path, kernel):
    file = write(tmp_path, kernel, trials=2)
    done = subprocess.run([sys.executable, '-c', 'from underdog.console.main import main; main()', 'sweep', str(file), '--out', str(tmp_path/'out')], capture_output=True, text=True)
    assert done.returncode == 0 and 'best first' in done.stdout, done.stderr
    assert (tmp_path/'out'/'sweep.png').stat().st_size > 5000 and len((tmp_path/'out'/'trials.csv').read_text().splitlines()) == 3
    assert len(json.loads((tmp_path/'out'/next(p.name for p in (tmp_path/'out').glob('trial-*'))/'trial.json').read_text())['params']) == 1


def test_the_sweep_kernel_goes_on_in_the_next_session(tmp_path, kernel, monkeypatch):
    "Under papermill, as on Kaggle; the second session has only the output of the first, which it does not touch."
    from underdog.kernels import run_kernel
    file = write(tmp_path, kernel, fixed=dict(nap=1.2))   # four trials take longer than the first session, on however fast a machine
    run_kernel('sweep', dict(sweep=str(file), out=str(tmp_path/'first'), time_limit='0.004'), tmp_path/'nb')
    before = {p: p.read_bytes() for p in (tmp_path/'first').rglob('*') if p.is_file()}
    assert 0 < len(list((tmp_path/'first').glob('trial-*'))) < 4
    run_kernel('sweep', dict(sweep=str(file), out=str(tmp_path/'second'), resume_from=str(tmp_path/'first')), tmp_path/'nb')
    table = trials_table(study_of(read_sweep(file), tmp_path/'second'))
    assert (table['state'] == 'complete').sum() == 4 and table['trial'].is_unique
    assert before == {p: p.read_bytes() for p in (tmp_path/'first').rglob('*') if p.is_file()}


def test_early_stops_are_successive_halving():
    known = {k: [.9 + i/10, .8 + i/10, .7 + i/10] for i, k in enumerate('abcd')}
    assert falls_behind(known, 'x', [1.15]) and not falls_behind(known, 'x', [1.05])   # the better half of five goes on
    assert falls_behind(known, 'x', [.9, 1.05]) and not falls_behind(known, 'x', [.9, 1., 2.])   # rungs are 1, 2, 4, … evaluations
    assert not falls_behind(known, 'a', [9.]) and not falls_behind({k: known[k] for k in 'abc'}, 'x', [9.])   # a setting is not its own rival; three say nothing


def test_figures_of_every_kind_of_parameter(tmp_path, kernel):
    "Logarithmic, linear, and a list; the importance is that of the parameter that matters."
    file = write(tmp_path, kernel, trials=7, search='random', space=dict(lr=dict(low=1e-6, high=1e-2, log=True), rank=[4, 8], fail_above=dict(low=1., high=2.)))
    sweep = read_sweep(file)
    table = run_sweep(sweep, tmp_path/'out', say=lambda s: None)
    weights = importances(study_of(sweep, tmp_path/'out'))
    assert list(weights)[0] == 'lr' and sum(weights.values()) == pytest.approx(1) and (table['cpu_s'] > .2).all()
    figure = write_figures(sweep, tmp_path/'out')
    labels = {ax.get_xlabel() for part in figure.subfigs for ax in part.axes}
    assert labels >= {'lr', 'rank', 'fail_above', 'importance', 'seconds of CPU', 'evaluation'}
    assert positions([1e-6, 1e-4, 1e-2], sweep.space['lr'])[0] == pytest.approx([0, .5, 1]) and positions([8, 4], [4, 8])[0] == [1, 0]
