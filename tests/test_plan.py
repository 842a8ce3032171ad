"The plan obeys its laws: more to do never takes less, more memory never takes longer, its choice is the best there is."
import ast
import inspect
import json
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from fixtures import make_backbone
from hypothesis import given, settings
from hypothesis import strategies as st

from underdog.core import UserError
from underdog.text.heads import HEADS
from underdog.text.prompt import PromptConfig
from underdog.model.settings import ModelConfig
from underdog.training.settings import TrainConfig
from underdog.inference.settings import InferConfig
from underdog.search import recipe as recipe_module
from underdog.search.cost import GIB, Setup, kept_bytes, train_hours, work_of
from underdog.search.estimate import BATCHES, PUBLISHED, best_fit, implied, make_plan, needed
from underdog.search.lengths import lmsys_lengths
from underdog.search.recipe import Recipe
from underdog.search.shapes import accelerator, accelerators, model_shape

ROWS = lmsys_lengths(2000)
MODELS = ['deberta-v3-base', 'deberta-v3-large', 'mistral-7b', 'llama-3-8b', 'gemma-2-2b', 'gemma-2-9b', 'qwen2.5-7b']
CARDS = ['2xT4', 'L4', 'A10G', 'RTX4090', 'A100-40', 'H100']
recipes = st.builds(
    Recipe,
    head=st.sampled_from(['pair', 'joint', 'symmetric']),
    max_length=st.sampled_from([256, 512, 1024, 2048]),
    rank=st.sampled_from([4, 16, 64]),
    quantization=st.sampled_from(['nf4', 'int8']),
    epochs=st.sampled_from([.5, 1., 3.]))


def setup_of(model, card, recipe): return Setup(model_shape(model), recipe, accelerator(card))


def hours_of(model, card, recipe, rows=ROWS):
    setup = setup_of(model, card, recipe)
    fit = best_fit(setup, work_of(setup.shape, rows, recipe))
    return np.inf if fit is None else fit.hours


def bytes_of(setup, work, batch_tokens, recomputed): return sum(needed(setup, work, batch_tokens, recomputed).values())


# ---- laws of the estimate
@given(st.sampled_from(MODELS), st.sampled_from(CARDS), recipes)
@settings(max_examples=60)
def test_more_to_do_never_takes_less(model, card, recipe):
    least = hours_of(model, card, recipe) - 1e-9
    for change in (dict(max_length=2*recipe.max_length), dict(rank=2*recipe.rank), dict(epochs=2*recipe.epochs)):
        assert hours_of(model, card, replace(recipe, **change)) >= least, change
    assert hours_of(model, card, recipe, np.concatenate([ROWS, ROWS[:500]])) >= least


@given(st.sampled_from(MODELS), st.sampled_from(CARDS), recipes, st.sampled_from([1.2, 2., 4.]))
@settings(max_examples=60)
def test_memory_never_makes_it_slower_and_never_less_is_needed_for_more(model, card, recipe, more):
    setup = setup_of(model, card, recipe)
    work = work_of(setup.shape, ROWS, recipe)
    room = setup.accelerator.memory_gib
    larger = replace(setup.accelerator, memory_gib=room*more)
    small, large = best_fit(setup, work), best_fit(replace(setup, accelerator=larger), work)
    if small is None: return
    assert large is not None and large.hours <= small.hours + 1e-9
    assert bytes_of(setup, work, small.batch_tokens, small.recomputed) <= room*GIB
    doubled = replace(setup, recipe=replace(recipe, rank=2*recipe.rank))
    assert bytes_of(doubled, work, 2048, 0) > bytes_of(setup, work, 2048, 0)


@given(st.sampled_from(MODELS), st.sampled_from(CARDS), recipes)
@settings(max_examples=40)
def test_the_choice_is_the_one_that_brute_force_finds(model, card, recipe):
    setup = setup_of(model, card, recipe)
    work = work_of(setup.shape, ROWS, recipe)
    room = setup.accelerator.memory_gib*GIB
    every = [(batch, layers) for batch in BATCHES for layers in range(setup.shape.layers + 1)]
    fitting = [train_hours(setup, work, *choice) for choice in every if bytes_of(setup, work, *choice) <= room]
    fit = best_fit(setup, work)
    assert (fit is None) == (not fitting) and (fit is None or abs(fit.hours - min(fitting)) < 1e-12)


@pytest.mark.parametrize('change', [
    dict(hidden_size=512),
    dict(intermediate_size=1024),
    dict(num_key_value_heads=4),
    dict(num_attention_heads=8, num_key_value_heads=2),
])
@pytest.mark.parametrize('dtype,size', [('float32', 4), ('bfloat16', 2)])
def test_bytes_kept_are_those_that_are_counted(tmp_path, change, dtype, size, family='llama'):
    import torch

    from underdog.model.memory import saved_bytes
    from underdog.model.model import load_model
    from underdog.text.layout import row_layout
    from underdog.text.pack import pack
    sizes = dict(vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=64)
    if family == 'phi3': del sizes['head_dim']   # it follows from the others
    make_backbone(tmp_path, family, **sizes | change)
    seg = {k: torch.randint(4, 256, (n,)).tolist() for k, n in dict(prompt=120, a=300, b=300).items()}
    batch = pack([row_layout(dict(start=[1], middle=[2], end=[3]), seg, 'pair')]*3, range(3), [False]*3)
    model = load_model(ModelConfig(str(tmp_path), rank=8, alpha=8., dtype=dtype, quantization='none'))
    counted = saved_bytes(model, batch)[1]/batch.tokens
    assert abs(kept_bytes(model_shape(tmp_path), 8, 420, size)/counted - 1) < .06


@pytest.mark.parametrize('family', ['qwen3', 'gemma3', 'olmo2', 'phi3'])
def test_norms_of_heads_and_fused_matrices_are_counted(tmp_path, family):
    window = dict(sliding_window=1000) if family in ('gemma3', 'phi3') else {}
    test_bytes_kept_are_those_that_are_counted(tmp_path, window, 'bfloat16', 2, family)


@pytest.mark.parametrize('name,billions', [
    ('qwen3-0.6b', .44), ('qwen3-4b', 3.6), ('qwen3-8b', 6.95), ('qwen3-14b', 13.2), ('qwen3-32b', 31.2),
    ('gemma-3-1b', .698), ('mistral-nemo-12b', 10.9)])
def test_sizes_give_the_parameters_that_the_makers_tell(name, billions):
    "Without embeddings."
    assert model_shape(name).linear/1e9 == pytest.approx(billions, rel=.012)


@pytest.mark.parametrize('name,billions', [
    ('llama-3.2-1b', 1.24), ('llama-3.2-3b', 3.21), ('phi-4-mini', 3.84), ('smollm3-3b', 3.08),
    ('granite-3.3-8b', 8.17), ('granite-3.3-2b', 2.53), ('modernbert-base', .149), ('modernbert-large', .395),
    ('xlm-roberta-large', .559), ('mdeberta-v3-base', .279)])
def test_sizes_give_all_parameters(name, billions):
    "With the embedding, which is also the language models' last layer."
    shape = model_shape(name)
    assert (shape.linear + shape.vocab*shape.hidden)/1e9 == pytest.approx(billions, rel=.012)


@pytest.mark.parametrize('change', [dict(), dict(hidden_size=512), dict(num_attention_heads=8)])
@pytest.mark.parametrize('dtype,size', [('float32', 4), ('bfloat16', 2)])
def test_bytes_kept_by_deberta_are_those_that_are_counted(tmp_path, change, dtype, size):
    import datasets
    import torch
    from test_packing import prompter

    from underdog.model.memory import saved_bytes
    from underdog.model.model import load_model
    from underdog.text.source import RowSource
    sizes = dict(vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                 max_position_embeddings=512, position_buckets=256)
    make_backbone(tmp_path, 'deberta', **sizes | change)
    row = {k: torch.randint(4, 256, (n,)).tolist() for k, n in dict(prompt=120, a=300, b=300).items()}
    source = RowSource(datasets.Dataset.from_list([row]*3), prompter('pair'), 'bidirectional')
    batch = source.batch([(i, False) for i in range(3)])
    model = load_model(ModelConfig(str(tmp_path), rank=8, alpha=8., dtype=dtype, quantization='none'))
    counted = saved_bytes(model, batch)[1]/batch.tokens
    assert abs(kept_bytes(model_shape(tmp_path), 8, 424, size)/counted - 1) < .06


def test_published_runs_imply_a_sane_efficiency():
    for run in PUBLISHED:
        _, efficiency, ratio = implied(run)
        assert 0 < efficiency < 1 and abs(ratio*.55/efficiency - 1) < 1e-6, run.what


# ---- settings are written once
OF_ITS_OWN = dict(   # fields of a recipe that have the name of a setting and another meaning, and why
    lora_layers='a number of layers, not a slice', orders='how many, not which', batch_tokens='0: what is fastest')


def test_a_recipe_has_the_defaults_of_the_configs_and_writes_none_again():
    "A field with the name of a setting takes its default from the config; `Config.name` stands there, no value."
    # ModelConfig last: its quantization is that of training, InferConfig's an exception to it
    known = (InferConfig, TrainConfig, PromptConfig, ModelConfig)
    configs = {name: config for config in known for name in config.parameters().values()}
    tree = ast.parse(inspect.getsource(recipe_module))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == 'Recipe').body
    defaults = {node.target.id: ast.unparse(node.value) for node in body if isinstance(node, ast.AnnAssign)}
    shared = set(defaults) & set(configs) - set(OF_ITS_OWN)
    assert shared >= {'head', 'max_length', 'epochs', 'rank', 'quantization', 'tta', 'evaluations'}
    assert set(OF_ITS_OWN) <= set(defaults)
    for name in shared: assert defaults[name] == f'{configs[name].__name__}.{name}'
    assert defaults['held_out'] == '1 / TrainConfig.n_folds'
    assert Recipe.of_training(ModelConfig('base')) == Recipe()


def test_a_recipe_of_a_training_has_its_settings():
    model = ModelConfig('base', head='joint', rank=4, quantization='int8', lora_layers='-8:')
    cfg = TrainConfig(epochs=2., evaluations=3, eval_rows=500, n_folds=4, orders='both')
    wanted = dict(head='joint', max_length=512, epochs=2., rank=4, quantization='int8', evaluations=3, eval_rows=500)
    recipe = Recipe.of_training(model, PromptConfig(max_length=512), cfg, layers=24)
    assert recipe == Recipe(**wanted, lora_layers=8, orders=2, held_out=.25)
    of = lambda **changes: Recipe.of_training(model, cfg=replace(cfg, **changes), layers=24)
    assert of(fold=-1).held_out == 0 and of(share=.1).epochs == .2 and of(orders='random').orders == 1
    for head in set(HEADS) - {'joint'}:
        assert Recipe.of_training(replace(model, head=head), cfg=cfg, layers=24).orders == 1, 'both orders are one'


def test_evaluations_on_the_way_cost_their_sample():
    assert Recipe(evaluations=3, held_out=.2, eval_rows=500).evaluated(10_000) == pytest.approx(.2 + 2*.05)
    # few held-out rows are taken whole; 0: all of them each time; none without evaluations
    assert Recipe(evaluations=3, held_out=.2, eval_rows=500).evaluated(1_000) == pytest.approx(.6)
    assert Recipe(evaluations=3, held_out=.2, eval_rows=0).evaluated(10_000) == pytest.approx(.6)
    assert Recipe(evaluations=0, held_out=.2).evaluated(10_000) == 0


@pytest.mark.parametrize('text,reached', [('', 0), (':', 24), ('8:', 16), ('-8:', 8), ('2:6', 22), (':6', 24)])
def test_a_slice_of_layers_is_what_the_gradient_reaches(text, reached):
    "From the lowest layer with LoRA to the top: autograd goes through the layers above it, adapted or not."
    assert Recipe.of_training(ModelConfig('base', lora_layers=text), layers=24).lora_layers == reached


# ---- the plan
@pytest.mark.parametrize('do,message', [
    (lambda: model_shape('gemma2-9b'), 'did you mean gemma-2-9b'),
    (lambda: accelerator('H200'), 'did you mean'),
    (lambda: Recipe(head='pairs'), 'did you mean pair'),
    (lambda: Recipe(quantization='nf8'), 'nf4'),
    (lambda: Recipe(max_length=32), 'max_length=32: at least 64 is wanted'),
    (lambda: Recipe.of_training(ModelConfig('base', lora_layers='8:')), 'number of layers'),
    (lambda: make_plan(model_shape('gemma-2-27b'), accelerator('2xT4')), 'it would with'),
    (lambda: make_plan(model_shape('mistral-7b'), accelerator('TPUv5e-8')), 'does not run on TPUs'),
    (lambda: make_plan(model_shape('mistral-7b'), accelerator('2xT4'), lengths=[]), 'no rows'),
])
def test_mistakes_are_said(do, message):
    with pytest.raises(UserError, match=message): do()


def test_a_plan_is_called_with_a_shape_a_card_a_recipe_and_lengths():
    lines = make_plan(model_shape('mistral-7b'), accelerator('2xT4'), Recipe(head='joint'), ROWS)
    value = {line.what: line.value for line in lines}
    assert value['inference with TTA'] == pytest.approx(2*value['inference'], rel=.01)
    assert value['sessions'] == np.ceil(value['training']/11.5) and value['weeks of quota'] == value['training']/30


def test_a_config_and_a_table_of_ones_own(tmp_path):
    config = dict(model_type='mistral', hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                  num_attention_heads=32, num_key_value_heads=8, vocab_size=32000)
    file = tmp_path/'config.json'
    file.write_text(json.dumps(config))
    assert model_shape(tmp_path) == model_shape(file) == replace(model_shape('mistral-7b'), name='mistral')
    file.write_text('{"model_type": "mistral"}')
    with pytest.raises(UserError, match='lacks layers'): model_shape(tmp_path)
    # accelerators
    cards, header = tmp_path/'cards.csv', ','.join(f.name for f in fields(accelerator('T4')))
    cards.write_text(f'# ours\n{header}\nmine,1,12,400,50,3e1,no,,,yes,\n')
    assert accelerator('mine', cards).sustained_tflops == 30 and list(accelerators(cards)) == ['mine']
    few = ['name,cards\nmine,many\n', 'name,cards\nmine,2\n', f'{header}\nmine,1\n']
    for text in (*few, f'{header},more\n' + '1,'*11 + '1\n'):
        cards.write_text(text)
        with pytest.raises(UserError, match='row 1'): accelerator('mine', cards)
    with pytest.raises(UserError, match='no such file'): accelerator('mine', tmp_path/'nothing.csv')


def test_the_command_prints_a_table_and_json(tmp_path):
    code = 'from underdog.console.main import main; main()'
    run = lambda *args: subprocess.run([sys.executable, '-c', code, 'plan', *args], capture_output=True, text=True)
    done = run('gemma-2-9b', '--json')
    lines = {x['what']: x for x in json.loads(done.stdout)['lines']}
    assert lines['floor']['value'] < lines['training']['value'] and all(x['formula'] for x in lines.values())
    assert lines['memory']['value'] <= 14.7
    assert 'layers' in run('mistral-7b', '--on', 'A10G').stdout
    wrong = run('gemma-2-9b', '--on', 'T9')
    assert wrong.returncode == 1 and 'Traceback' not in wrong.stderr


# ---- the command
def planned(*args):
    "What `underdog plan` prints on 80 columns."
    from typer.testing import CliRunner

    from underdog.console.main import app
    done = CliRunner().invoke(app, ['plan', *args], env=dict(COLUMNS='80'))
    return done.output + str(done.exception or '')


@pytest.mark.parametrize('tuning', ['full', 'layers'])
def test_weights_that_are_trained_are_not_quantized_unless_that_is_asked_for(tuning):
    output = planned('qwen3-0.6b', '--tuning', tuning)
    assert f'-p tuning={tuning} -p quantization=none' in output and 'pair head, none' in output, output
    assert 'cannot be trained; set quantization=none' in planned('qwen3-0.6b', '--tuning', tuning,
                                                                 '--quantization', 'nf4')
    usual = planned('qwen3-0.6b')
    assert 'pair head, nf4' in usual and '-p quantization' not in usual


def test_a_model_has_one_line_in_the_ranking():
    "On 80 columns, changes of the recipe included."
    output = planned()
    lines = [line for line in output.splitlines() if line.startswith('│')]
    assert len(lines) > 20 and all(line.split('│')[1].strip() for line in lines), output
