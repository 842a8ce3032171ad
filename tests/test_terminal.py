"A real process at a real terminal: Ctrl-C ends everything in a line, and names need not be UTF-8."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import bad_inputs
import pytest

from underdog.console.report import write_report
from underdog.core import read_json, write_json
from underdog.runfolder import RunFolder
from underdog.session import alive
from underdog.training.checkpoint import Checkpoints

COMMAND = [sys.executable, '-m', 'underdog']
# as from a terminal, also where the tests run in the background and SIGINT is ignored
CODE = 'import signal\nsignal.signal(2, signal.default_int_handler)\nfrom underdog.console.main import main; main()'
TOLD = 'underdog: stopping in order; Ctrl-C once more stops at once'
LATE = """kernel = get_ipython().kernel
execute = kernel.shell_handlers['execute_request']
async def late(*args):
    await execute(*args)
    print('interrupted')
    raise KeyboardInterrupt
kernel.shell_handlers['execute_request'] = late"""
SLEEPS = 'import os, time\nopen("pid", "w").write(str(os.getpid()))\ntime.sleep(300)'


def until(what, process, limit_s=600):
    "Wait for what `what` finds."
    end = time.monotonic() + limit_s
    while not what():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(.05)


@pytest.fixture
def started(tmp_path):
    "A function that starts a command in a process group of its own."
    processes = []

    def start(*args, code=CODE):
        command = [sys.executable, '-c', code, *map(str, args)]
        processes.append(subprocess.Popen(command, cwd=tmp_path, start_new_session=True, text=True,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        return processes[-1]
    yield start
    for process in processes: process.kill()


@pytest.fixture
def sleeping(tmp_path):
    "A notebook that sleeps."
    notebook = bad_inputs.notebook()
    notebook['cells'][1]['source'] = SLEEPS
    (tmp_path/'k.ipynb').write_text(json.dumps(notebook))
    return 'k.ipynb'


@pytest.mark.parametrize('times', [1, 2])
def test_ctrl_c_is_one_line_and_leaves_no_kernel(started, sleeping, tmp_path, times):
    process, pid = started('run', sleeping), tmp_path/'pid'
    until(lambda: pid.is_file() and pid.read_text(), process)
    for _ in range(times):
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(.3)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and err.strip() == TOLD, (process.returncode, err)
    assert 'Traceback' not in out and 'ZMQError' not in out
    assert not alive(int(pid.read_text()))


def test_ctrl_c_while_the_kernel_starts(started, sleeping):
    process = started('run', sleeping)
    until(lambda: process.stdout.readline(), process)   # == k ==
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=600)
    # before the kernel is there, nothing has to stop in order
    assert process.returncode == 130 and err.strip() in (TOLD, 'underdog: stopped by Ctrl-C'), (process.returncode, err)


def test_an_interrupt_at_the_end_of_a_cell_says_nothing(started, sleeping, tmp_path):
    "Jupyter interrupts a kernel before it ends it; where the cell has only just ended, ipykernel calls that an error."
    notebook = json.loads((tmp_path/sleeping).read_text())
    notebook['cells'][1]['source'] = LATE
    notebook['cells'].append(dict(notebook['cells'][1], id='last', source='print("went on")'))
    (tmp_path/sleeping).write_text(json.dumps(notebook))
    out, err = started('run', sleeping).communicate(timeout=600)
    assert 'interrupted' in out and 'went on' in out and not err, err


def test_ctrl_c_lets_a_training_save(started, world, tmp_path):
    settings = dict(train_csv=world/'train.csv', model=world/'llama', quantization='none', rank=4, max_length=128,
                    n_folds=3, epochs=500., evaluations=1, probe_rows=0, processes=1, save_minutes=1000.)
    given = [x for name, value in settings.items() for x in ('-p', f'{name}={value}')]
    process = started('run', 'train', *given, '--out', tmp_path, code=f'# warm\n{CODE}')
    run = RunFolder(tmp_path/'run')
    until(lambda: len(run.metrics()), process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 130 and TOLD in err and 'Traceback' not in out + err, err
    assert run.status['state'] == 'paused' and Checkpoints(run.checkpoint).steps() == [run.status['step']]


# ---- names of files are bytes
ODD = 'caf\udce9'   # the byte of é in Latin-1


@pytest.fixture
def odd(tmp_path, monkeypatch):
    "A folder of such a name, in which such files lie."
    (tmp_path/ODD).mkdir()
    monkeypatch.chdir(tmp_path/ODD)
    return tmp_path/ODD


def said(args, encoding='utf-8'):
    "(exit code, output, errors) of a command whose output goes to something that takes `encoding`."
    env = dict(os.environ, PYTHONIOENCODING=encoding)
    done = subprocess.run([*COMMAND, *args], env=env, capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_a_terminal_need_not_know_every_letter(odd):
    (odd/f'{ODD}.csv').write_text(bad_inputs.csv_text(random.Random(0)))
    for encoding in ('utf-8', 'ascii'):
        code, out, err = said(['check', f'{ODD}.csv'], encoding)
        assert code == 0 and 'caf\\udce9.csv' in out and not err, err


@pytest.mark.parametrize('name, out, value', [(ODD, 'out', 'run'), ('k', ODD, 'run'), ('k', 'out', ODD)])
def test_what_a_notebook_cannot_hold_is_refused_before_it_runs(odd, name, out, value):
    (odd/f'{name}.ipynb').write_text(json.dumps(bad_inputs.notebook()))
    args = ['run', f'{name}.ipynb', '-p', f'out={value}', '--out', out]
    kind, text, left = bad_inputs.outcome(bad_inputs.Case(odd, args), limit=600)
    assert kind == 'message' and 'not UTF-8' in text and not left


@pytest.mark.parametrize('args', [
    ['check', f'{ODD}.csv', '--json'], ['submission', f'{ODD}.csv', '--sample', f'{ODD}.csv'], ['floors', ODD],
    ['show', f'{ODD}.csv', '--model', ODD], ['plan', ODD], ['plan', '--accelerators', f'{ODD}.csv'],
    ['run', f'{ODD}.ipynb', '--list'], ['run', 'train', '-p', f'train_csv={ODD}.csv', '-p', f'model={ODD}'],
    ['run', 'infer', '-p', f'run={ODD}', '-p', f'test_csv={ODD}.csv'], ['run', 'blend', '-p', f'runs={ODD},{ODD}'],
    ['doctor', f'{ODD}.ipynb'], ['doctor', ODD], ['doctor', f'{ODD}.json', '--json'], ['compare', ODD, ODD],
    ['try', ODD, '--prompt', ODD, '--a', ODD, '--b', ODD], ['export', ODD, '--out', ODD], ['scale', ODD, '--out', ODD],
    ['sweep', f'{ODD}.yaml', '--out', ODD], ['demo', '--train', ODD, '--out', ODD],
    ['push', f'{ODD}.ipynb', '--dry-run', '--folder', ODD], ['push', 'train', '-p', f'model={ODD}'],
    ['bundle', '--dry-run', '--folder', '.'], ['bundle', '--image', ODD, '--dry-run'], ['status', ODD], ['logs', ODD],
    ['pull', 'x', '--out', ODD], ['relay', f'{ODD}.ipynb', '--name', ODD], ['submit', '--sample', ODD, '-m', ODD],
    ['probe', '--out', ODD, '-p', f'model={ODD}'], ['check-account', '--model', ODD]], ids=lambda args: args[0])
def test_no_command_trips_over_a_name(odd, args):
    (odd/f'{ODD}.csv').write_text(bad_inputs.csv_text(random.Random(0)))
    (odd/f'{ODD}.ipynb').write_text(json.dumps(bad_inputs.notebook()))
    (odd/f'{ODD}.json').write_text(json.dumps(bad_inputs.PROBE))
    (odd/f'{ODD}.yaml').write_text('trials: 1\n')
    (odd/ODD).mkdir()
    (odd/ODD/'config.json').write_text(json.dumps(bad_inputs.CONFIG))
    with bad_inputs.stand_ins():
        kind, text, left = bad_inputs.outcome(bad_inputs.Case(odd, args), limit=600)
    assert not bad_inputs.wrong(kind, text, left), text


def test_a_report_names_its_files(odd):
    page = write_report(odd/f'{ODD}.html', ODD, [(ODD, [f'{ODD} and\nmore'])])
    assert page.read_bytes().count(b'caf\\udce9') == 5   # title and heading twice, text
    write_json(odd/f'{ODD}.json', {ODD: [ODD]})
    assert read_json(odd/f'{ODD}.json') == {ODD: [ODD]}


@pytest.mark.parametrize('args', [
    ['compare', ODD, '[b]$x$', '--out', f'{ODD}.html', '--json'], ['compare', '[b]$x$', ODD], ['scale', ODD],
    ['try', ODD, '--prompt', 'x', '--a', 'y', '--b', 'z'], ['export', ODD, '--out', 'out'],
    ['export', '[b]$x$', '--out', ODD]], ids=lambda args: args[0])
def test_a_run_whose_name_parquet_does_not_take_ends_in_a_line(finished, odd, args):
    "It says that the name is to blame, not the files in it."
    for name in (ODD, '[b]$x$'): shutil.copytree(finished.path, odd/name)
    kind, text, left = bad_inputs.outcome(bad_inputs.Case(odd, args), limit=600)
    assert kind == 'message' and 'caf\\udce9: this name is not UTF-8' in text and 'rename' in text and not left, text


@pytest.mark.parametrize('args', [
    ['show', 't.csv', '--model', ODD], ['try', 'run', '--prompt', 'x', '--a', 'y', '--b', 'z', '--base', ODD],
    ['export', 'run', '--out', 'out', '--base', ODD], ['run', 'train', '-p', 'train_csv=t.csv', '-p', f'model={ODD}']],
    ids=lambda args: args[0])
def test_a_base_whose_name_safetensors_does_not_take_ends_in_a_line(finished, odd, args):
    shutil.copytree(finished.path, odd/'run')
    shutil.copytree(finished.config['model']['path'], odd/ODD)
    (odd/'t.csv').write_text(bad_inputs.csv_text(random.Random(0)))
    kind, text, left = bad_inputs.outcome(bad_inputs.Case(odd, args), limit=600)
    assert kind == 'message' and 'not UTF-8' in text and 'rename' in text and not left, text
