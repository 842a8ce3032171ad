"Checkpoints: a broken one is found, a full disk costs no safe one, leftovers of killed writers are removed."
import errno
import os
import subprocess
from types import SimpleNamespace

import pytest
import torch

from underdog.core import UserError, file_hash, remove_temporaries, write_json
from underdog.training.checkpoint import Checkpoints


def states(tmp_path, *steps):
    "Checkpoints after these steps."
    kept = Checkpoints(tmp_path/'checkpoint')
    for step in steps: assert kept.save(step, dict(step=step, w=torch.full((500,), float(step))))
    return kept


@pytest.mark.parametrize('position', range(0, 100, 9))
def test_a_flipped_bit_or_a_lost_end_is_found_wherever_it_is(tmp_path, capsys, position):
    kept = states(tmp_path, 1, 2)
    file = kept._file(2)
    whole = file.read_bytes()
    at = len(whole)*position//100
    # a flipped bit
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1:])
    assert kept.load()['step'] == 1 and f'{file}: broken' in capsys.readouterr().out
    # a lost end
    file.write_bytes(whole[:at])
    assert kept.load()['step'] == 1
    # whole again, with half a note
    file.write_bytes(whole)
    assert kept.load()['step'] == 2
    file.with_suffix('.json').write_text('{"step": 2')
    assert kept.load()['step'] == 1


class Program:
    def __reduce__(self): return os.mkdir, ('it_ran',)


def test_a_program_in_a_checkpoint_does_not_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    kept = states(tmp_path, 1, 2)
    torch.save(dict(step=2, w=Program()), kept._file(2))
    write_json(kept._file(2).with_suffix('.json'), dict(step=2, sha256=file_hash(kept._file(2))))
    assert kept.load()['step'] == 1 and 'broken' in capsys.readouterr().out
    assert not (tmp_path/'it_ran').exists()


def full_disk(fails, save):
    "A `torch.save` for which the disk is full the first `fails` times."
    calls = []
    def saving(state, path):
        calls.append(path)
        if len(calls) > fails: return save(state, path)
        path.write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'full')
    return saving, calls


def test_a_full_disk_costs_the_older_checkpoint_then_this_one_but_never_the_newest(tmp_path, monkeypatch, capsys):
    kept, save = states(tmp_path, 1, 2), torch.save
    # full whatever is dropped
    monkeypatch.setattr(torch, 'save', full_disk(99, save)[0])
    assert kept.save(3, dict(step=3)) is False
    assert kept.steps() == [2] and kept.load()['step'] == 2
    printed = capsys.readouterr().out
    assert 'the disk is full, step 3 was not saved' in printed and 'step 2 is safe' in printed
    assert not list(kept.folder.glob('.*'))
    # full until the older one is dropped
    monkeypatch.setattr(torch, 'save', save)
    kept.save(4, dict(step=4))
    saving, calls = full_disk(1, save)
    monkeypatch.setattr(torch, 'save', saving)
    assert kept.save(5, dict(step=5)) is True
    assert kept.steps() == [5, 4] and len(calls) == 2


def test_a_really_full_disk(tmp_path):
    "Checkpoints on a file system of 64 kB: what does not fit is said and costs nothing that was safe."
    small = tmp_path/'small'
    small.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=64k', 'none', small]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no right to mount a small file system')
    # states of 16, 32 and 160 kB
    try:
        kept = Checkpoints(small/'checkpoint')
        assert kept.save(1, dict(step=1, w=torch.zeros(4000)))
        assert kept.save(2, dict(step=2, w=torch.zeros(8000))) is False or kept.steps()[0] == 2
        assert kept.save(3, dict(step=3, w=torch.zeros(40000))) is False
        assert kept.load()['step'] in (1, 2) and not list(kept.folder.glob('.*'))
        with pytest.raises(UserError, match='free some space'): kept.check_room(1e6)
    finally: subprocess.run(['umount', small], check=True)


def test_leftovers_of_killed_writers_are_swept(tmp_path):
    (tmp_path/'.adapter.tmp').mkdir()
    (tmp_path/'.adapter.tmp'/'x').touch()
    for name in ('.a.json.abc.tmp', 'keep.tmp', '.lock'): (tmp_path/name).touch()
    remove_temporaries(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['.lock', 'keep.tmp']


@pytest.mark.parametrize('each, said', [(6e5, '2 checkpoints of 0.6 MB want more than the 1 MB'),
                                        (12e9, '2 checkpoints of 12.00 GB want more than the 1 MB')])
def test_sizes_are_said_so_that_they_say_something(tmp_path, monkeypatch, each, said):
    monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=1e6))
    with pytest.raises(UserError, match=said): Checkpoints(tmp_path).check_room(each)
