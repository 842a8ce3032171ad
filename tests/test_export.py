"What is exported loads with PEFT or transformers alone, and says the same; a card says what it is worth."
import json
import shutil

import pytest
import torch
from test_doctor import damage
from typer.testing import CliRunner

from underdog.console.export import export_run
from underdog.console.main import app
from underdog.core import UserError
from underdog.model.merge import load_adapter


@pytest.fixture(scope='module')
def ids(): return torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))


def states(model, ids):
    with torch.no_grad(): return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state


def test_an_adapter_loads_with_peft_alone(finished, world, ids, tmp_path):
    from peft import PeftModel
    from transformers import AutoModel
    files = export_run(finished.path, tmp_path/'out')
    wanted = {'adapter_config.json', 'adapter_model.safetensors', 'head.safetensors', 'README.md'}
    assert {f.name for f in files} >= wanted
    base = AutoModel.from_pretrained(world/'llama').eval()
    untrained, ours = states(base, ids), states(load_adapter(finished.adapter).backbone, ids)
    assert (ours - untrained).abs().max() > 1e-3
    theirs = PeftModel.from_pretrained(base, tmp_path/'out').eval()
    torch.testing.assert_close(states(theirs, ids), ours, atol=1e-5, rtol=1e-5)


def test_merged_weights_load_with_transformers_alone(finished, ids, tmp_path):
    from transformers import AutoModel, AutoTokenizer
    export_run(finished.path, tmp_path/'out', merged=True)
    theirs = AutoModel.from_pretrained(tmp_path/'out').eval()
    ours = load_adapter(finished.adapter).backbone
    torch.testing.assert_close(states(theirs, ids), states(ours, ids), atol=1e-4, rtol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path/'out')('a word')['input_ids']
    assert 'AutoModel.from_pretrained' in (tmp_path/'out'/'README.md').read_text()


def test_the_card_says_what_it_is_worth(finished, world, tmp_path):
    from huggingface_hub import ModelCard
    shutil.copytree(finished.path, tmp_path/'run')
    shutil.copytree(world/'llama', tmp_path/'llama')
    (tmp_path/'llama'/'README.md').write_text('---\nlicense: apache-2.0\n---\n# a model\n')
    export_run(tmp_path/'run', tmp_path/'out', base=str(tmp_path/'llama'))
    card = ModelCard.load(tmp_path/'out'/'README.md')
    assert card.data.to_dict()['license_name'] == 'apache-2.0' and card.data.base_model == 'llama'
    best = finished.config['best_floor']
    for words in ('95 %', f'baseline: {best}', 'baseline: prior', 'were cut', finished.config['template_hash'],
                  finished.config['data']['hash'], 'starts from the baseline'):
        assert words in card.text, words
    # no path of this machine
    assert str(tmp_path) not in card.text and str(world) not in card.text
    note = json.loads((tmp_path/'out'/'underdog_export.json').read_text())
    assert note['base_hash'] == finished.config['base_hash']


def test_what_cannot_be_exported_is_refused_and_nothing_is_left(finished, world, tmp_path):
    (tmp_path/'mine').mkdir()
    with pytest.raises(UserError, match='not written by'): export_run(finished.path, tmp_path/'mine')
    with pytest.raises(UserError, match='no config.json'): export_run(tmp_path/'mine', tmp_path/'out')
    for merged in (True, False):
        with pytest.raises(UserError, match='not the base model'):
            export_run(finished.path, tmp_path/'out', merged, base=str(world/'bert'))
    shutil.copytree(finished.path, tmp_path/'unfinished')
    shutil.rmtree(tmp_path/'unfinished'/'adapter')
    with pytest.raises(UserError, match='finish the training'): export_run(tmp_path/'unfinished', tmp_path/'out')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['mine', 'unfinished']


@pytest.mark.parametrize('name', ['adapter', 'head'])
def test_damaged_weights_are_not_passed_on(finished, tmp_path, name):
    for how in ('empty', 'cut', 'name', 'nan', 'gone'):
        shutil.copytree(finished.path, tmp_path/'run')
        damage(tmp_path/'run'/'adapter'/f'{name}.safetensors', how)
        for merged in (False, True):
            with pytest.raises(UserError, match=f'{name}.safetensors: '):
                export_run(tmp_path/'run', tmp_path/'out', merged)
        shutil.rmtree(tmp_path/'run')
        assert not list(tmp_path.iterdir()), how


@pytest.mark.parametrize('content', ['', '[]', '{}', '{"model": 3, "base_hash": "x"}',
                                     '{"model": {}, "base_hash": "x"}'])
def test_an_adapter_without_its_settings_is_not_passed_on(finished, tmp_path, content):
    shutil.copytree(finished.path, tmp_path/'run')
    (tmp_path/'run'/'adapter'/'model.json').write_text(content)
    for merged in (False, True):
        with pytest.raises(UserError): export_run(tmp_path/'run', tmp_path/'out', merged)
    assert [p.name for p in tmp_path.iterdir()] == ['run']


def test_the_command_writes_over_its_own_export(finished, tmp_path):
    for _ in range(2):
        done = CliRunner().invoke(app, ['export', str(finished.path), '--out', str(tmp_path/'out')])
        assert done.exit_code == 0 and 'adapter_model.safetensors' in done.output, done.output
