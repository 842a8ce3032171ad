"A short siege (`python -m benchmarks.siege` is the long one): generated attacks on the library are answered well."
import sys
import time

import pytest
from conftest import REPO, slow
from test_benchmarks import run

sys.path.insert(0, str(REPO))
from benchmarks.siege_fork import do   # noqa: E402
from benchmarks.siege_world import COUNTS, Kind, World   # noqa: E402

FAULTS = COUNTS[3:]


def check(kind, tried):
    assert kind['tried'] >= tried and kind['answered_well'] == kind['tried']
    assert not any(kind[name] for name in FAULTS)


def test_folders_with_keys_and_pickles_stay_and_harmless_ones_leave(tmp_path):
    from benchmarks import siege_folders
    kind = Kind('folders')
    siege_folders.attack(World(tmp_path), kind, n=40, seed=0)
    check(kind.figures(), 70)


def test_a_fault_is_counted_and_shown(capsys):
    kind = Kind('kills')
    kind.note('first', [])
    kind.note('second', ['lost_runs', 'orphans'])
    figures = kind.figures()
    assert (figures['tried'], figures['answered_well'], figures['lost_runs'], figures['orphans']) == (2, 1, 1, 1)
    assert capsys.readouterr().out == 'kills 2: lost_runs, orphans: second\n'


@pytest.mark.parametrize('name,code,traceback', [('UserError', 1, False), ('KeyError', 70, True), ('exit', 3, False)])
def test_a_forked_job_ends_as_a_process_does(tmp_path, monkeypatch, name, code, traceback):
    from benchmarks import siege_fork

    from underdog.core import UserError
    monkeypatch.setattr(siege_fork, 'start_warm', lambda: None)
    def work():
        print('at work')
        if name == 'exit': raise SystemExit(3)
        raise dict(UserError=UserError, KeyError=KeyError)[name]('no')
    ended = do(work, tmp_path/'log.txt')
    assert (ended.code, ended.traceback) == (code, traceback) and ended.text.startswith('at work')


def test_who_only_waits_hangs_and_who_works_does_not(tmp_path, monkeypatch):
    "What waits for another looks every now and then whether that one lives."
    from benchmarks import siege_fork
    monkeypatch.setattr(siege_fork, 'start_warm', lambda: None)
    monkeypatch.setattr(siege_fork, 'STILL_S', 3.)
    def work():
        end = time.process_time() + 4
        while time.process_time() < end: pass
    def wait():
        while True: time.sleep(.2)
    assert do(work, tmp_path/'log.txt', limit_s=600.).code == 0
    ended = do(wait, tmp_path/'log.txt', limit_s=600.)
    assert ended.code is None and '3 s without work' in ended.text


def test_the_siege_asks_for_options_that_there_are():
    "Else a command ends at its command line, and what was damaged is never looked at."
    import typer
    from benchmarks.siege_inputs import OF_A_BASE, OF_A_RUN, OPTIONS

    from underdog.console.main import app
    known = {name: {option for p in command.params for option in p.opts}
             for name, command in typer.main.get_command(app).commands.items()}
    for name, options in OPTIONS.items(): assert set(options) <= known[name]
    for args in (*OF_A_RUN, *OF_A_BASE): assert {x for x in args if x.startswith('-')} <= known[args[0]], args


@slow
def test_damage_kills_and_full_disks_cost_nothing():
    figures = run('siege', '--only', 'scored', '--only', 'kills', '--only', 'disks', '--cases', '3')
    for kind in figures['kinds'].values(): check(kind, 1)
