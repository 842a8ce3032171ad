"Bad inputs of the command end in a message: no traceback, no half-written file."
import json
import random

import bad_inputs
import pytest
from kaggle_server import QUOTA

from underdog.console.main import main
from underdog.core import UserError
from underdog.data.csvfile import read_cells
from underdog.data.rows import read_rows
from underdog.kaggle.ship import LIBRARY, library_bundle, ship
from underdog.model.settings import ModelConfig
from underdog.training.run import train


def besieged(tmp_path, kind, seeds):
    for seed in seeds:
        (tmp_path/f'{seed}').mkdir()
        case = bad_inputs.attack(random.Random(seed), tmp_path/f'{seed}', kind)
        assert not bad_inputs.wrong(*bad_inputs.outcome(case, limit=120)), (seed, case.args)


@pytest.mark.parametrize('kind', ['check', 'submission', 'sweep', 'run', 'plan', 'doctor', 'remote'])
def test_generated_bad_inputs_end_in_a_message(tmp_path, kind):
    with bad_inputs.stand_ins(): besieged(tmp_path, kind, range(12))


def test_bad_inputs_end_in_a_message_where_kaggle_answers(server, hub, tmp_path):
    "It has the library, and refuses every push."
    library_bundle(tmp_path/'library')
    ship(hub, tmp_path/'library', LIBRARY)
    server.refuse = QUOTA
    with bad_inputs.stand_ins(account=True): besieged(tmp_path, 'remote', range(40))


@pytest.mark.parametrize('setting, said', [(dict(targets='q_prj'), "no linear layer 'q_prj'"),
                                           (dict(lora_layers='9:'), 'has 2 layers'),
                                           (dict(rank=0, lora_layers='9:'), 'has 2 layers')])
def test_layers_that_the_model_has_not_are_refused_before_a_worker_begins(world, tmp_path, monkeypatch, setting, said):
    monkeypatch.setattr('underdog.training.run.launch', lambda *args, **more: pytest.fail('a worker began'))
    model = ModelConfig(str(world/'llama'), quantization='none', **setting)
    with pytest.raises(UserError, match=said): train(world/'train.csv', model, tmp_path/'run')
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('cell', bad_inputs.CELLS[1:])
def test_any_parameters_cell_is_read_or_refused(tmp_path, monkeypatch, cell):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'k.ipynb').write_text(json.dumps(bad_inputs.notebook(cell)))
    case = bad_inputs.Case(tmp_path, ['run', 'k.ipynb', '--list'])
    assert not bad_inputs.wrong(*bad_inputs.outcome(case, limit=120))


@pytest.mark.parametrize('cell', ['0_1', '１', 'nan', '1e999', ''])
def test_a_label_is_a_number_as_files_have_it(tmp_path, cell):
    text = bad_inputs.csv_text(random.Random(0), rows=6).replace(',1,0,0', f',{cell},0,0', 1)
    (tmp_path/'t.csv').write_text(text)
    with pytest.raises(UserError, match='row 1 .*winner_model_a'): read_rows(tmp_path/'t.csv')


@pytest.mark.parametrize('encoding', ['utf-32', 'utf-32-le', 'utf-32-be', 'utf-16', 'utf-16-le', 'utf-16-be'])
def test_an_encoding_is_called_by_its_name(tmp_path, encoding):
    (tmp_path/'t.csv').write_bytes('id,prompt\n1,x\n'.encode(encoding))
    with pytest.raises(UserError, match=encoding[:6].upper()): read_cells(tmp_path/'t.csv')


@pytest.mark.parametrize('command', ['check', 'sweep', 'run', 'submission'])
def test_a_pipe_is_called_a_pipe_and_nobody_waits_for_it(tmp_path, monkeypatch, command, capsys):
    import os
    monkeypatch.chdir(tmp_path)
    os.mkfifo('p.ipynb')
    more = ['--sample', 'p.ipynb'] if command == 'submission' else []
    with pytest.raises(SystemExit, match='1'): main([command, 'p.ipynb', *more])
    said = 'no such notebook' if command == 'run' else 'a pipe or a device'
    assert said in capsys.readouterr().err
