"""Full fine-tuning: what moves and how far, resume, save, merge, export; fp32 weights under fp16; what a plan says."""
import copy
import math

import numpy as np
import pytest
import torch
from fixtures import predictions
from test_model import config, logits_of, make_batch
from test_packing import both_ways, equal_both_ways
from test_resume import check_resume

from underdog.core import UserError
from underdog.machine import cache_folder
from underdog.runfolder import RunFolder
from underdog.data.competition import LMSYS
from underdog.data.folds import labels_of
from underdog.data.rows import read_rows, write_rows
from underdog.text.heads import HEADS
from underdog.text.prompt import PromptConfig, Prompter
from underdog.text.source import RowSource
from underdog.text.tokens import tokenize_rows
from underdog.model.memory import recompute_only, workspace
from underdog.model.merge import load_adapter, load_merged, merge, save_adapter
from underdog.model.model import load_model
from underdog.model.settings import ModelConfig
from underdog.training import objective
from underdog.training.budget import plan_memory
from underdog.training.checkpoint import Checkpoints
from underdog.training.loop import rehearse
from underdog.training.objective import row_losses, smooth
from underdog.training.prepare import differences
from underdog.training.run import train
from underdog.training.rates import usual_lr
from underdog.training.settings import TrainConfig
from underdog.training.step import FitData, Training

FAMILIES = ('deberta', 'bert', 'llama', 'gemma2')


def full(base, **settings): return config(base, **dict(tuning='full') | settings)


def beginner(world, family='deberta', head='pair', labels=None, model=None, **cfg):
    "A function that begins the same small run of a fully tuned model anew; `labels`: (40, 3)."
    from accelerate import Accelerator
    df = read_rows(world/'train.csv')[0].iloc[:40]
    prompter = Prompter(PromptConfig(max_length=96, min_keep=4), str(world/family), head)
    tokens, y = tokenize_rows(df, prompter, cache_folder()), labels_of(df, LMSYS) if labels is None else labels
    cfg = TrainConfig(**dict(batch_rows=8, batch_tokens=256, lr=1e-3, head_lr=1e-2, evaluations=2) | cfg)

    def begin():
        loaded = load_model(full(world/family, head=head, **(model or {})))
        source, rows = RowSource(tokens, prompter, loaded.packing), np.arange(40)
        return Training(loaded, FitData(source, y, None, train=rows[:32], held=rows[32:]), cfg, Accelerator(cpu=True))
    return begin


def backbone_of(training): return {n: p.detach().clone() for n, p in training.model.backbone.named_parameters()}


# ---- what moves
@pytest.mark.parametrize('family', ['deberta', 'bert', 'llama'])
@pytest.mark.parametrize('model, frozen', [
    (dict(), lambda name: False),
    (dict(tuning='layers'), lambda name: '0.' not in name and '1.' not in name),
    (dict(tuning='layers', lora_layers='1:'), lambda name: '1.' not in name)], ids=['full', 'layers', 'layers 1:'])
def test_every_weight_moves_but_the_frozen_ones(world, family, model, frozen):
    training = beginner(world, family, model=model)()
    before = backbone_of(training)
    for _ in range(2): training.step()
    moved = {name for name, p in backbone_of(training).items() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if not frozen(name)}
    of_head = {'head.score.weight', 'head.tie_score.weight', 'head.tie'}
    assert moved | of_head >= {n.removeprefix('backbone.') for n in training.trained()}


def test_words_that_no_row_has_keep_their_values(world):
    "Adam does not move what has no gradient; nor does weight decay, as the hidden test has other words."
    training = beginner(world, weight_decay=.5, head_lr=1e-9)()
    table = training.model.backbone.get_input_embeddings().weight
    before = table.detach().clone()
    for _ in range(4): training.step()
    read = set(training.data.source.batch([(i, False) for i in range(32)]).input_ids.flatten().tolist())
    unread = [i for i in range(len(table)) if i not in read]
    assert len(unread) > 50 and torch.equal(table[unread], before[unread]) and not torch.equal(table, before)


@pytest.mark.parametrize('family, layers', [('deberta', 2), ('llama', 2)])
def test_layer_decay_gives_the_rates_promised(world, family, layers):
    "Adam's first step moves a weight by its learning rate: here the largest move in each layer."
    lr, decay = 1e-3, .5
    training = beginner(world, family, layer_decay=decay, weight_decay=0., warmup=0.)()
    before = backbone_of(training)
    training.make_step(1, training.plan[0])
    moved = {}
    for name, p in backbone_of(training).items():
        block = next((i for i in range(layers) if f'.{i}.' in name), -1)
        moved[block] = max(moved.get(block, 0.), float((p - before[name]).abs().max()))
    for block in range(-1, layers): assert moved[block] == pytest.approx(lr*decay**(layers - 1 - block), rel=1e-3)
    # with no decay all move alike, and the rate of the top layer is that without decay
    assert moved[layers - 1] == pytest.approx(lr, rel=1e-3)


def test_ties_do_not_throttle_the_others(world):
    "Their gradient is that of whole states: in the norm that is clipped it would outweigh all others."
    begin = beginner(world, 'llama')
    training, without = begin(), begin()
    for p in without.optimizer.param_groups: p['params'] = [q for q in p['params'] if p['what'] != 'ties']
    without.model.head.tie_score.weight.requires_grad_(False)
    assert any(g['what'] == 'ties' for g in training.optimizer.param_groups)
    assert training.step()['grad_norm'] == pytest.approx(without.step()['grad_norm'], rel=1e-6)


def test_the_usual_rate_is_a_tenth_of_loras(world):
    assert 10*usual_lr('full') == pytest.approx(usual_lr())
    training = beginner(world, lr=0.)()
    assert training.cfg.lr == usual_lr('full')
    assert {g['peak'] for g in training.optimizer.param_groups if g['what'] == 'adapter'} == {usual_lr('full')}


# ---- smoothing
def test_the_loss_of_smoothed_labels_is_the_formula(world):
    rng = np.random.default_rng(0)
    y, logits = rng.dirichlet(np.ones(3), 40), torch.tensor(rng.normal(size=(40, 3)))
    hard, even = torch.tensor(y), torch.full((40, 3), 1/3)
    expected = .9*row_losses(logits, hard) + .1*row_losses(logits, even)
    torch.testing.assert_close(row_losses(logits, torch.tensor(smooth(y, .1))), expected, rtol=1e-5, atol=1e-6)
    assert np.array_equal(smooth(y, 0.), y) and np.allclose(smooth(y, .3).sum(1), 1)
    # in a run: the loss, and the class prior's, to which its health is compared
    plain, smoothed = beginner(world, labels=y)(), beginner(world, labels=smooth(y, .1))()
    by_setting = beginner(world, labels=y, smoothing=.1)()
    a, b, c = (t.make_step(1, t.plan[0]) for t in (plain, smoothed, by_setting))
    assert b['loss'] == c['loss'] != a['loss'] and b['prior_loss'] == pytest.approx(c['prior_loss'])


# ---- resume
KINDS = {
    'deberta': dict(layer_decay=.8, smoothing=.1),
    'deberta, its layers': dict(model=dict(tuning='layers')),
    'llama, both orders': dict(family='llama', head='joint', orders='both'),
}


@pytest.mark.parametrize('options', KINDS.values(), ids=KINDS)
def test_resume_is_bit_equal(world, tmp_path, options):
    check_resume(beginner(world, **options), tmp_path, stops=(1, 3))


def test_a_rehearsal_leaves_no_trace(world):
    training = beginner(world)()
    before = copy.deepcopy(training.state())
    rehearse(training)
    assert all(torch.equal(p, before['weights'][n]) for n, p in training.trained().items())
    assert not training.optimizer.state_dict()['state']


def test_a_run_of_an_earlier_build_is_still_the_same_run():
    "Settings that it did not know have had their defaults."
    from dataclasses import asdict
    new = dict(train=asdict(TrainConfig().with_lr(ModelConfig('base'))), model=asdict(ModelConfig('base')))
    old = copy.deepcopy(new)
    for part, names in dict(train=('layer_decay', 'smoothing'), model=('tuning',)).items():
        for name in names: del old[part][name]
    assert differences(old, new) == []
    new['train']['smoothing'] = .1
    assert differences(old, new) == ['smoothing']


# ---- checkpoints and messages
def test_where_the_disk_holds_no_more_one_checkpoint_is_kept(tmp_path, monkeypatch):
    from types import SimpleNamespace
    kept = Checkpoints(tmp_path/'checkpoint')
    free = lambda n: monkeypatch.setattr('shutil.disk_usage', lambda path: SimpleNamespace(free=n))
    for gigabytes, keep in ((100, 2), (16, 2), (14, 1)):
        free(gigabytes*1e9)
        kept.check_room(5.2e9)
        assert kept.keep == keep
    # Kaggle's disk counts, however much is free
    free(100e9)
    monkeypatch.setenv('KAGGLE_KERNEL_RUN_TYPE', 'Batch')
    kept.check_room(7e9)
    assert kept.keep == 1
    with pytest.raises(UserError, match='train fewer weights'): kept.check_room(11e9)
    # kept: the newest
    for number in (1, 2, 3): kept.save(number, dict(step=number))
    assert kept.steps() == [3]


def test_gradients_are_summed_in_messages_that_hold_each_once(monkeypatch):
    monkeypatch.setattr(objective, 'MESSAGE', 100)
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (30, 60, 11, 250, 1, 99, 1)]
    lists = objective._messages(params)
    assert [[p.numel() for p in params] for params in lists] == [[30, 60], [11], [250], [1, 99], [1]]
    assert all(a is b for a, b in zip(params, (p for params in lists for p in params)))


# ---- packed, saved, merged
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('head', ['pair', 'joint'])
def test_packed_equals_padded(bases, family, head):
    model = load_model(full(bases[family], head=head))
    read = 'first' if family in ('bert', 'deberta') else 'last'
    equal_both_ways(model, *both_ways(model, head, HEADS[head].orders, read))


@pytest.mark.parametrize('family', FAMILIES)
def test_computed_twice_gives_equal_gradients(bases, family):
    def gradients(layers):
        model = load_model(full(bases[family]))
        recompute_only(model, layers)
        model.train()
        torch.manual_seed(0)
        model(make_batch())[:, 0].sum().backward()
        return {n: p.grad for n, p in model.named_parameters()}
    once, twice = gradients(()), gradients((0, 1))
    for name, grad in once.items(): torch.testing.assert_close(grad, twice[name], rtol=1e-5, atol=1e-7)


def moved(cfg, seed=1):
    "A fully tuned model as if trained: every weight a little away from where it was."
    model, g = load_model(cfg), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad: p.add_(.05*torch.randn(p.shape, generator=g))
    return model.eval()


@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('settings', [dict(), dict(tuning='layers', lora_layers='1:'), dict(layers=1)], ids=str)
def test_saved_is_reloaded_and_merged_is_a_plain_folder(bases, tmp_path, family, settings):
    from transformers import AutoModel
    model, batch = moved(full(bases[family], **settings)), make_batch()
    save_adapter(model, tmp_path/'adapter')
    expected = logits_of(model, batch)
    assert torch.equal(logits_of(load_adapter(tmp_path/'adapter'), batch), expected)
    # merged: it loads as any other model, and can be quantized
    cfg = merge(tmp_path/'adapter', tmp_path/'merged')
    assert cfg.tuning == 'lora' and torch.equal(logits_of(load_merged(cfg), batch), expected)
    plain, info = AutoModel.from_pretrained(tmp_path/'merged', output_loading_info=True)
    assert not [name for name in info['missing_keys'] if 'pooler' not in name] and not info['unexpected_keys']
    tuned = dict(model.backbone.named_parameters())
    for name, p in plain.named_parameters(): assert 'pooler' in name or torch.equal(p, tuned[name]), name
    small = load_merged(merge(tmp_path/'adapter', tmp_path/'small', quantization='int8'))
    torch.testing.assert_close(logits_of(small, batch), expected, rtol=.1, atol=.05)


# ---- mistakes
@pytest.mark.parametrize('wrong, match', [
    (dict(quantization='nf4'), 'set quantization=none, or tuning=lora'),
    (dict(quantization='int8', tuning='layers'), 'merge=True'),
    (dict(lora_layers='1:'), 'set tuning=layers'),
    (dict(tuning='ful'), 'did you mean full')])
def test_what_cannot_be_trained_is_refused(bases, wrong, match):
    with pytest.raises(UserError, match=match): full(bases['llama'], **wrong)


def test_a_base_stored_in_4_bit_is_refused(bases, tmp_path):
    from transformers import AutoModel, BitsAndBytesConfig
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4')
    stored = AutoModel.from_pretrained(bases['llama'], quantization_config=bits, device_map={'': 'cpu'})
    stored.save_pretrained(tmp_path/'base')
    with pytest.raises(UserError, match='take the unquantized model'): load_model(full(tmp_path/'base'))


def test_an_inference_in_few_bits_wants_merge(bases, tmp_path):
    save_adapter(moved(full(bases['llama'])), tmp_path/'adapter')
    with pytest.raises(UserError, match='merge=True'): load_adapter(tmp_path/'adapter', quantization='int8')
    with pytest.raises(UserError, match='layers'): load_model(full(bases['llama'], tuning='layers', lora_layers='5:'))


# ---- precision and memory
@pytest.mark.parametrize('family', ['deberta', 'llama', 'gemma2'])
def test_fp16_arithmetic_on_fp32_weights(bases, family):
    "Weights, gradients and moments in fp32; packed rows are those of fp32 but for fp16's digits."
    exact, half = (load_model(full(bases[family], dtype=dtype)) for dtype in ('float32', 'float16'))
    assert {p.dtype for p in half.parameters()} == {torch.float32} and half.dtype == torch.float16
    packed, _ = both_ways(half, 'pair', read='first' if family == 'deberta' else 'last')
    results = []
    for model in (exact, half):
        model.eval()
        hidden = model.features(packed)
        hidden.square().sum().backward()
        results.append([hidden.detach(), *(p.grad for p in model.backbone.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) and {g.dtype for g in results[1]} == {torch.float32}
    for a, b in zip(*results): assert float((a - b).norm()/a.norm()) < .02


def test_memory_of_the_copies_moments_and_gradients_is_counted(world):
    training = beginner(world, 'llama', model=dict(dtype='bfloat16'))()
    model, source, rows = training.model, training.data.source, training.data.train
    assert workspace(model)[0] == 16*sum(p.numel() for p in model.parameters())
    # what autocast copies is kept whatever the batch: two bytes for each weight of a linear layer
    linear = sum(m.weight.numel() for m in model.backbone.modules() if isinstance(m, torch.nn.Linear))
    needs = plan_memory(model, source, rows, training.cfg, free=1e9).needs
    assert 2*linear <= needs.kept.fixed.sum() < 2.2*linear and needs.entering == 4*64


# ---- a whole run
def test_from_train_csv_to_submission_and_export(world, tmp_path):
    from underdog.console.export import export_run
    from underdog.console.judge import _about
    from transformers import AutoModel
    model = ModelConfig(str(world/'deberta'), tuning='full', quantization='none')
    cfg = TrainConfig(n_folds=3, batch_rows=8, smoothing=.05, layer_decay=.9)
    run = train(world/'train.csv', model, tmp_path/'run', PromptConfig(max_length=128, min_keep=4), cfg=cfg)
    assert run.status['state'] == 'finished' and run.config['train']['lr'] == usual_lr('full')
    assert 'every weight trained' in _about(run)
    sizes = sum(p.numel() for p in load_model(model).parameters())
    assert f'{sizes:,} of {sizes:,} parameters are trained' in run.log_file.read_text()
    # inference, with the weights that were trained: those of the last evaluation answer the held-out rows as there
    oof, held = run.oof(), read_rows(world/'train.csv')[0]
    write_rows(tmp_path/'held.csv', held[held['id'].isin(oof['id'])], LMSYS)
    again = predictions(run.path, tmp_path/'held.csv', tmp_path/'again').set_index('id').loc[oof['id']]
    columns = [c for c in oof if c.startswith('p_')]
    np.testing.assert_allclose(again[columns], oof[columns], atol=1e-6)
    # for others: a plain folder, asked for or not
    export_run(run.path, tmp_path/'export')
    tuned = dict(load_adapter(RunFolder.open(run.path).adapter).backbone.named_parameters())
    plain = dict(AutoModel.from_pretrained(tmp_path/'export').named_parameters())
    assert plain.keys() == tuned.keys() and all(torch.equal(plain[n], tuned[n]) for n in plain)


# ---- what a plan says
def lines_of(model, **settings):
    from underdog.search.estimate import make_plan
    from underdog.search.recipe import Recipe
    from underdog.search.shapes import accelerator, model_shape
    recipe = Recipe(**dict(quantization='none', tuning='full') | settings)
    return {line.what: line for line in make_plan(model_shape(model), accelerator('2xT4'), recipe)}


def test_a_plan_counts_16_bytes_and_a_copy():
    gib, plan = 2**30, lines_of('deberta-v3-large')
    weights = 302e6 + 128_100*1024
    assert plan['gradients'].value == pytest.approx(4*weights/gib, rel=.02)
    assert plan['optimizer'].value == 2*plan['gradients'].value
    assert plan['weights'].value + plan['embedding'].value == pytest.approx(plan['gradients'].value)
    assert plan['copies'].value == pytest.approx(2*302e6/gib, rel=.02)
    assert plan['checkpoint'].value == pytest.approx(12*weights/1e9, rel=.02)
    # its layers alone: less of everything, and less time
    layers = lines_of('deberta-v3-large', tuning='layers')
    for what in ('gradients', 'optimizer', 'checkpoint', 'memory', 'training'):
        assert layers[what].value < plan[what].value or layers['memory'].value > 14 and what == 'memory'
    assert layers['floor'].value < plan['floor'].value


@pytest.mark.parametrize('family', ['llama', 'deberta'])
@pytest.mark.parametrize('dtype, size', [('float32', 4), ('bfloat16', 2)])
def test_bytes_kept_are_those_that_are_counted(tmp_path, family, dtype, size):
    import datasets
    from fixtures import make_backbone
    from test_packing import prompter
    from underdog.model.memory import saved_bytes
    from underdog.search.cost import kept_bytes
    from underdog.search.shapes import model_shape
    sizes = dict(vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
                 max_position_embeddings=512)
    make_backbone(tmp_path, family, **sizes | (dict(position_buckets=256) if family == 'deberta' else {}))
    row = {k: list(range(4, 4 + n)) for k, n in dict(prompt=30, a=60, b=60).items()}
    model = load_model(full(tmp_path, dtype=dtype))
    source = RowSource(datasets.Dataset.from_list([row]*3), prompter('pair'), model.packing)
    # what two more rows add, as the copies of the weights are there whatever the batch
    one, three = (source.batch([(i, False) for i in range(n)]) for n in (1, 3))
    counted = (saved_bytes(model, three)[1] - saved_bytes(model, one)[1])/(three.tokens - one.tokens)
    assert kept_bytes(model_shape(tmp_path), 8, 94, size, own=True)/counted == pytest.approx(1, abs=.1)


def test_the_backward_pass_of_own_weights_is_two_passes():
    "One for what enters a layer, one for its weights; a run on one card sums no gradients."
    from underdog.search.cost import Setup, train_operations, update_hours, work_of
    from underdog.search.lengths import lmsys_lengths
    from underdog.search.recipe import Recipe
    from underdog.search.shapes import accelerator, model_shape
    shape, recipe = model_shape('deberta-v3-large'), Recipe(quantization='none', tuning='full')
    work = work_of(shape, lmsys_lengths(500), recipe)
    linear = 2*shape.linear*work.tokens
    assert train_operations(shape, work, recipe) == pytest.approx(3*(linear + work.attention))
    upper = Recipe(quantization='none', tuning='layers', lora_layers=12)
    assert train_operations(shape, work, upper) == pytest.approx(2*(linear + work.attention))
    one, two = (update_hours(Setup(shape, recipe, accelerator(name)), 1000) for name in ('T4', '2xT4'))
    assert 0 < one < two


def test_a_plan_says_before_the_run_what_cannot_fit():
    with pytest.raises(UserError, match='mistral-7b does not fit on 2xT4.*tuning=full.*it would with: .*tuning=lora'):
        lines_of('mistral-7b')
    with pytest.raises(UserError, match='set quantization=none, or tuning=lora'):
        lines_of('deberta-v3-base', quantization='nf4')
    with pytest.raises(UserError, match='set tuning=layers'): lines_of('deberta-v3-base', lora_layers=4)
    assert 'two on disk' in lines_of('qwen3-0.6b')['checkpoint'].formula
    assert math.isfinite(lines_of('deberta-v3-base')['training'].value)
