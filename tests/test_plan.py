"The plan obeys its laws: more to do never takes less, more memory never takes longer, and its choice is the best there is."
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from underdog.core import UserError
from underdog.search.estimate import BATCHES, GIB, PUBLISHED, Recipe, accelerator, best_fit, implied, kept_bytes, lmsys_lengths, make_plan, model_shape, needed, train_hours, work_of

ROWS = lmsys_lengths(2000)
MODELS = ['deberta-v3-base', 'deberta-v3-large', 'mistral-7b', 'llama-3-8b', 'gemma-2-2b', 'gemma-2-9b', 'qwen2.5-7b']
CARDS = ['2xT4', 'L4', 'A10G', 'RTX4090', 'A100-40', 'H100']
recipes = st.builds(Recipe, head=st.sampled_from(['pair', 'joint', 'symmetric']), max_length=st.sampled_from([256, 512, 1024, 2048]), rank=st.sampled_from([4, 16, 64]), quantization=st.sampled_from(['nf4', 'int8']), epochs=st.sampled_from([.5, 1., 3.]))


def hours_of(model, card, recipe, rows=ROWS):
    shape, acc = model_shape(model), accelerator(card)
    fit = best_fit(shape, recipe, acc, work_of(shape, rows, recipe))
    return np.inf if fit is None else fit.hours


@given(st.sampled_from(MODELS), st.sampled_from(CARDS), recipes)
@settings(max_examples=60)
def test_more_to_do_never_takes_less(model, card, recipe):
    base = hours_of(model, card, recipe)
    assert hours_of(model, card, replace(recipe, max_length=2*recipe.max_length)) >= base - 1e-9
    assert hours_of(model, card, replace(recipe, rank=2*recipe.rank)) >= base - 1e-9
    assert hours_of(model, card, replace(recipe, epochs=2*recipe.epochs)) >= base - 1e-9
    assert hours_of(model, card, recipe, np.concatenate([ROWS, ROWS[:500]])) >= base - 1e-9


@given(st.sampled_from(MODELS), st.sampled_from(CARDS), recipes, st.sampled_from([1.2, 2., 4.]))
@settings(max_examples=60)
def test_memory_never_makes_it_slower_and_never_less_is_needed_for_more(model, card, recipe, more):
    shape, acc = model_shape(model), accelerator(card)
    work = work_of(shape, ROWS, recipe)
    small, large = (best_fit(shape, recipe, replace(acc, memory_gib=acc.memory_gib*m), work) for m in (1, more))
    if small is None: return
    assert large is not None and large.hours <= small.hours + 1e-9
    assert sum(needed(shape, recipe, acc, work, small.batch_tokens, small.recomputed).values()) <= acc.memory_gib*GIB
    assert sum(needed(shape, replace(recipe, rank=2*recipe.rank), acc, work, 2048, 0).values()) > sum(needed(shape, recipe, acc, work, 2048, 0).values())


@given(st.sampled_from(MODELS), st.sampled_from(CARDS), recipes)
@settings(max_examples=40)
def test_the_choice_is_the_one_that_brute_force_finds(model, card, recipe):
    shape, acc = model_shape(model), accelerator(card)
    work = work_of(shape, ROWS, recipe)
    every = [(train_hours(shape, recipe, acc, work, b, k), b, k) for b in BATCHES for k in range(shape.layers + 1) if sum(needed(shape, recipe, acc, work, b, k).values()) <= acc.memory_gib*GIB]
    fit = best_fit(shape, recipe, acc, work)
    assert (fit is None) == (not every) and (fit is None or abs(fit.hours - min(every)[0]) < 1e-12)


@pytest.mark.parametrize('change', [dict(hidden_size=512), dict(intermediate_size=1024), dict(num_key_value_heads=4), dict(num_attention_heads=8, num_key_value_heads=2)])
@pytest.mark.parametrize('dtype,size', [('float32', 4), ('bfloat16', 2)])
def test_bytes_kept_are_those_that_are_counted(tmp_path, change, dtype, size):
    import torch
    from transformers import LlamaConfig, LlamaModel

    from underdog.text.layout import row_layout
    from underdog.model.memory import saved_bytes
    from underdog.model.model import ModelConfig, load_model
    from underdog.text.pack import pack
    torch.manual_seed(0)
    LlamaModel(LlamaConfig(**dict(vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=64) | change)).save_pretrained(tmp_path)
    seg = {k: torch.randint(4, 256, (n,)).tolist() for k, n in dict(prompt=120, a=300, b=300).items()}
    batch = pack([row_layout(dict(start=[1], middle=[2], end=[3]), seg, 'pair')]*3, range(3), [False]*3)
    counted = saved_bytes(load_model(ModelConfig(str(tmp_path), rank=8, alpha=8., dtype=dtype, quantization='none')), batch)[1]/batch.tokens
    assert abs(kept_bytes(model_shape(tmp_path), 8, 420, size)/counted - 1) < .06


def test_published_runs_imply_a_sane_efficiency():
    for entry in PUBLISHED:
        rate, efficiency, ratio = implied(entry)
        assert 0 < efficiency < 1 and abs(ratio*.55/efficiency - 1) < 1e-6, entry[0]


@pytest.mark.parametrize('do,message', [
    (lambda: model_shape('gemma2-9b'), 'did you mean gemma-2-9b'), (lambda: accelerator('H200'), 'did you mean'), (lambda: Recipe(head='pairs'), 'did you mean pair'), (lambda: Recipe(quantization='nf8'), 'nf4'),
    (lambda: make_plan(model_shape('gemma-2-27b'), accelerator('2xT4')), 'it would with'), (lambda: make_plan(model_shape('mistral-7b'), accelerator('TPUv5e-8')), 'does not run on TPUs'), (lambda: make_plan(model_shape('mistral-7b'), accelerator('2xT4'), lengths=[]), 'no rows')])
def test_mistakes_are_said(do, message):
    with pytest.raises(UserError, match=message): do()


def test_a_config_and_a_table_of_ones_own(tmp_path):
    (tmp_path/'config.json').write_text(json.dumps(dict(model_type='mistral', hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000)))
    assert replace(model_shape(tmp_path), name='mistral-7b') == model_shape('mistral-7b') == replace(model_shape(tmp_path/'config.json'), name='mistral-7b')
    (tmp_path/'config.json').write_text('{"model_type": "mistral"}')
    with pytest.raises(UserError, match='lacks layers'): model_shape(tmp_path)
    (tmp_path/'cards.csv').write_text('name,cards,memory_gib,bandwidth_gbs,nominal_tflops,sustained_tflops,bf16,price_usd,priced,supported,note\nmine,1,12,400,50,3e1,no,,,yes,\n')
    assert accelerator('mine', tmp_path/'cards.csv').sustained_tflops == 30
    (tmp_path/'cards.csv').write_text('name,cards\nmine,many\n')
    with pytest.raises(UserError, match='row 1'): accelerator('mine', tmp_path/'cards.csv')


def test_the_command_prints_a_table_and_json(tmp_path):
    run = lambda *a: subprocess.run([sys.executable, '-c', 'from underdog.console.main import main; main()', 'plan', *a], capture_output=True, text=True)
    done = run('gemma-2-9b', '--json')
    lines = {x['what']: x for x in json.loads(done.stdout)['lines']}
    assert lines['floor']['value'] < lines['training']['value'] and all(x['formula'] for x in lines.values()) and lines['memory']['value'] <= 14.7
    assert 'layers computed twice' in run('mistral-7b', '--on', 'A10G').stdout
    wrong = run('gemma-2-9b', '--on', 'T9')
    assert wrong.returncode == 1 and 'Traceback' not in wrong.stderr


