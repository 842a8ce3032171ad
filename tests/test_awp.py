"Adversarial weight perturbation: there and back to the last bit, the formula, resume, bad numbers, processes, plans."
import copy
from dataclasses import replace

import numpy as np
import pytest
import test_full
import test_resume
import torch
from hypothesis import given
from hypothesis import strategies as st
from fixtures import by_two_processes
from test_bad_rows import spoil
from test_resume import Losses, check_resume

from underdog.core import UserError
from underdog.model.memory import workspace
from underdog.model.settings import ModelConfig
from underdog.training.awp import passes, perturbed, plan_tokens
from underdog.training.budget import plan_memory
from underdog.training.loop import fit, rehearse
from underdog.training.settings import TrainConfig
from underdog.training.worker import LOSS_SCALE, _outlook

ON = dict(awp_lr=1., awp_eps=.05)


def full(world, **options): return test_full.beginner(world, **ON | options)


def lora(world, **options): return test_resume.beginner(world, **ON | options)


def weights_of(training): return {n: p.detach().clone() for n, p in training.trained().items()}


def equal(one, other): return all(torch.equal(p, other[n]) for n, p in one.items())


def matrices(seed, scale=1.):
    "Parameters of all kinds with gradients: matrices, with zeros and without a gradient, and vectors."
    g = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(*shape, generator=g)) for shape in ((3, 4), (5, 2), (4, 4), (6,), (2, 3))]
    with torch.no_grad(): params[1][0] = 0
    for p in params[:4]: p.grad = scale*torch.randn(p.shape, generator=g)
    params[2].grad.zero_()
    return params


# ---- there and back
@given(st.integers(0, 10**6), st.floats(1e-4, 100), st.floats(1e-4, 1), st.sampled_from([1e-12, 1., 2.**16, 1e12]))
def test_weights_come_back_and_move_by_no_more_than_their_share(seed, lr, eps, scale):
    params = matrices(seed, scale)
    before, grads = [p.detach().clone() for p in params], [copy.deepcopy(p.grad) for p in params]
    with perturbed(params, lr, eps):
        delta = [p.detach() - q for p, q in zip(params, before)]
        assert all(p.grad is None for p in params)
    for p, q, d, g in zip(params, before, delta, grads):
        assert torch.equal(p, q)
        # the last digit is that of the sum
        assert (d.abs() <= (eps + 3e-7)*q.abs()).all()
        if g is None or p.dim() < 2: assert not d.any()
        # nowhere against the gradient
        else: assert (d*g >= 0).all()
    # not clipped: a step of `lr` times the matrix along the gradient; the formula, written once more
    w, g = before[0].double(), grads[0].double()
    along = lr*g/g.norm()*w.norm()
    expected = torch.where(along.abs() <= eps*w.abs(), along, along.sign()*eps*w.abs())
    torch.testing.assert_close(delta[0].double(), expected, rtol=1e-3, atol=float(w.abs().max())*3e-7)


def test_weights_come_back_whatever_happens_there():
    params = matrices(0)
    before = [p.detach().clone() for p in params]
    with pytest.raises(KeyboardInterrupt), perturbed(params, 1., .1):
        with torch.no_grad():
            for p in params[:3]: p.fill_(float('nan'))
        raise KeyboardInterrupt
    assert all(torch.equal(p, q) for p, q in zip(params, before))


# ---- a step
@pytest.mark.parametrize('begin', [full, lora], ids=['full', 'lora'])
@pytest.mark.parametrize('scaled', [False, True], ids=['', 'loss scale'])
def test_the_gradient_of_a_step_is_that_at_worse_weights(world, begin, scaled):
    "Over several micro-batches, written once more; a loss scale changes nothing."
    training = begin(world, awp_start=0.)()
    if scaled: give_scale(training)
    training.model.eval()   # no dropout, which differs from pass to pass
    rows, left, weights = training.plan[0], [], []
    shown = [(row, False) for row in rows]
    assert len(list(training.data.source.micro_batches(shown, training.at.budget))) > 1
    # LoRA's B begins at 0, and stays there
    with torch.no_grad():
        for p in training.params: p.add_(.01*torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    before = weights_of(training)

    def gradients():
        training.optimizer.zero_grad()
        losses = training.backward(shown, 1/len(rows))
        scale = training.accelerator.scaler.get_scale() if scaled else 1.
        return losses, {n: p.grad/scale for n, p in training.trained().items()}
    first, at_here = gradients()
    with torch.no_grad():
        for name, p in training.trained().items():
            if p.dim() < 2: continue
            g = at_here[name]
            most = .05*p.abs()
            p.add_(torch.clamp(p.norm()*g/(g.norm() + 1e-30), -most, most))
    worse, expected = gradients()
    training.optimizer.zero_grad()
    for name, p in training.trained().items(): p.data.copy_(before[name])
    # the step
    update = training._update
    def watched(nothing):
        scale = training.accelerator.scaler.get_scale() if scaled else 1.
        left.append({n: p.grad/scale for n, p in training.trained().items()})
        weights.append(weights_of(training))
        return update(nothing)
    training._update = watched
    figures = training.make_step(1, rows)
    assert equal(weights[0], before) and worse.loss > first.loss + 1e-3
    assert figures['loss'] == pytest.approx(first.loss, rel=1e-6) and figures['tokens'] == 2*first.tokens
    for name, g in left[0].items(): torch.testing.assert_close(g, expected[name], rtol=1e-3, atol=1e-6)
    assert any(not torch.allclose(g, at_here[name], rtol=1e-2) for name, g in left[0].items())


def losses_of(training):
    recorder = Losses()
    fit(training, recorder)
    return recorder.losses, weights_of(training)


@pytest.mark.parametrize('begin', [full, lora], ids=['full', 'lora'])
def test_without_it_nothing_changes_and_before_it_begins_neither(world, begin):
    plain, weights = losses_of(begin(world, awp_lr=0., awp_eps=.01)())
    other, same = losses_of(begin(world, awp_lr=0., awp_eps=.9, awp_start=.1)())
    assert plain == other and equal(weights, same)
    # four steps, the last of them with it: its loss is of its first pass
    late, moved = losses_of(begin(world, awp_start=.75)())
    assert late == plain and not equal(weights, moved)


def give_scale(training, **options):
    "A loss scale, as a T4 has one."
    scaler = torch.amp.GradScaler('cpu', **LOSS_SCALE | options)
    training.accelerator.scaler = training.optimizer.scaler = scaler
    training.optimizer.__init__(training.optimizer.optimizer, scaler=scaler)
    # without autocast: what accelerate's own `backward` does with a scale
    training.accelerator.backward = lambda loss: scaler.scale(loss).backward()
    unscale = lambda: scaler.unscale_(training.optimizer.optimizer)
    def clip(params, limit):
        unscale()
        return torch.nn.utils.clip_grad_norm_(params, limit)
    training.accelerator.clip_grad_norm_ = clip
    return scaler


@pytest.mark.parametrize('scaled', [False, True], ids=['', 'loss scale'])
@pytest.mark.parametrize('when', [1, 2], ids=['first pass', 'second pass'])
def test_a_gradient_that_is_not_finite_costs_its_step_and_no_weight(world, scaled, when):
    training = full(world, family='llama', awp_start=0.)()
    scaler = give_scale(training) if scaled else None
    before, calls, backward = weights_of(training), [], training.backward
    weight = training.model.head.score.weight
    def overflow(shown, share):
        calls.append(1)
        computed = backward(shown, share)
        if len(calls) == when: weight.grad[0, 0] = float('inf')
        return computed
    training.backward = overflow
    figures = training.step()
    assert figures['skipped'] and equal(weights_of(training), before) and len(calls) == when
    if scaled: assert scaler.get_scale() == LOSS_SCALE['init_scale']/2
    assert not training.step()['skipped'] and not equal(weights_of(training), before)
    assert all(p.isfinite().all() for p in training.params)


def test_rows_that_are_lost_at_worse_weights_are_counted_and_all_of_them_cost_the_step(world):
    training = full(world, family='llama', awp_start=0., epochs=2.)()
    give_scale(training)   # without a gradient torch's scaler would raise an error
    before, forward = weights_of(training), training.model.forward
    worse, rows = [], [int(row) for row in training.plan[0]]
    score = training.model.head.score.weight

    def lost(batch):
        bad = torch.isin(batch.rows, torch.tensor(worse)) & (not torch.equal(score, before['head.score.weight']))
        return forward(batch)*torch.where(bad, float('nan'), 1.)[:, None]
    training.model.forward = lost
    worse[:] = rows
    figures = training.make_step(1, rows)
    assert figures['skipped'] and figures['not_finite'] == 8 and np.isfinite(figures['loss'])
    assert equal(weights_of(training), before)
    worse[:] = rows[:2]
    figures = training.make_step(1, rows)
    assert not figures['skipped'] and figures['not_finite'] == 2 and not equal(weights_of(training), before)
    # rows that are lost everywhere: no direction, and no second pass
    training.model.forward = forward
    spoil(training, range(40))
    before = weights_of(training)
    assert training.make_step(2, rows)['skipped'] and equal(weights_of(training), before)


def test_memory_that_runs_out_at_worse_weights_costs_no_weight(world):
    begin = full(world, awp_start=0., batch_tokens=512)
    whole, short = begin(), begin()
    calls, backward = [], short.backward
    def once(shown, weight):
        calls.append(short.at.budget)
        if len(calls) == 2: raise torch.OutOfMemoryError('as a GPU would')
        return backward(shown, weight)
    short.backward = once
    whole.step(), short.step()
    assert calls == [512, 512, 256]
    for name, p in whole.trained().items(): torch.testing.assert_close(p, short.trained()[name], rtol=0, atol=2e-5)


def test_what_is_said_at_worse_weights_is_no_forecast(world):
    off, on = (lora(world, offset=True, awp_start=0., awp_lr=lr)() for lr in (0., 1.))
    for training in (off, on): training.step()
    assert off.unseen.logits.any() and np.array_equal(off.unseen.logits, on.unseen.logits)
    assert on.unseen.heard == []


# ---- resume
KINDS = {
    'full': (full, dict(awp_start=.25)),
    'full, with a baseline': (full, dict(family='llama', awp_start=0., layer_decay=.8, smoothing=.1)),
    'lora': (lora, dict(awp_start=.25, offset=True)),
    'lora, both orders': (lora, dict(awp_start=.5, head='joint', orders='both')),
}


@pytest.mark.parametrize('begin, options', KINDS.values(), ids=KINDS)
def test_resume_is_bit_equal(world, tmp_path, begin, options):
    check_resume(begin(world, **options), tmp_path)


def test_a_run_of_a_build_without_it_is_still_the_same_run():
    from dataclasses import asdict
    from underdog.training.prepare import differences
    new = dict(train=asdict(TrainConfig(lr=1e-4)), model=asdict(ModelConfig('base')))
    old = copy.deepcopy(new)
    for name in ('awp_lr', 'awp_eps', 'awp_start'): del old['train'][name]
    assert differences(old, new) == []
    new['train']['awp_lr'] = 1.
    assert differences(old, new) == ['awp_lr']


# ---- two processes
TWO = '''
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from accelerate import Accelerator
from accelerate.utils import gather_object
from test_awp import full, weights_of
accelerator = Accelerator(cpu=True)
training = full(Path(sys.argv[2]), family='llama', awp_start=.5)()
training.model.eval()
losses = [training.step()['loss'] for _ in training.plan]
sums = {n: float(p.double().abs().sum()) for n, p in weights_of(training).items()}
both = gather_object([sums])
if accelerator.is_main_process: Path(sys.argv[3]).write_text(json.dumps(dict(losses=losses, both=both)))
'''


def test_two_processes_move_to_the_same_place(world, tmp_path):
    out = by_two_processes(TWO, world, tmp_path)
    assert out['both'][0] == out['both'][1]
    # and it is the run of one process
    one = full(world, family='llama', awp_start=.5)()
    one.model.eval()
    np.testing.assert_allclose([one.step()['loss'] for _ in one.plan], out['losses'], atol=2e-4)
    for name, p in weights_of(one).items():
        assert float(p.double().abs().sum()) == pytest.approx(out['both'][0][name], rel=1e-3, abs=1e-2), name


# ---- what is known before
def test_time_and_memory_count_it(world):
    begin = lambda **options: full(world, awp_start=.5, **options)()
    training, off = begin(), begin(awp_lr=0.)
    lengths = [float(off.data.source.lengths[rows].sum()) for rows in off.plan]
    assert plan_tokens(off).tolist() == lengths
    assert plan_tokens(training).tolist() == [*lengths[:2], *(2*x for x in lengths[2:])]
    # the first step that takes twice as long is known before it is made
    training.at.step = 1
    training.recent.extend([1., 2.])
    assert training.next_s() == 3
    training.at.step = 2
    assert training.next_s() == 6
    # the rehearsal makes such a step, leaves no trace, and tells the rate of a token
    fresh, calls = begin(), []
    before, backward = weights_of(fresh), fresh.backward
    fresh.backward = lambda shown, weight: calls.append(1) or backward(shown, weight)
    rehearse(fresh)
    assert len(calls) == 3 and equal(weights_of(fresh), before)
    from underdog.session import Clock
    seconds = lambda t: float(_outlook(t, 1., Clock(float('inf'))).split('about ')[1].split(' ')[0])
    assert '4 steps to go' in _outlook(fresh, 1., Clock(float('inf'))) and seconds(fresh) >= seconds(off)
    # a copy of what is trained
    trained = sum(p.numel() for p in training.model.parameters())
    assert workspace(training.model, copies=1)[0] - workspace(training.model)[0] == 4*trained
    plans = [plan_memory(t.model, t.data.source, t.data.train, t.cfg, free=1e9) for t in (off, training)]
    assert plans[0].room - plans[1].room == 4*trained


@pytest.mark.parametrize('start, expected', [(0., [2, 2, 2, 2]), (.25, [1, 2, 2, 2]), (.5, [1, 1, 2, 2]),
                                             (.99, [1, 1, 1, 2])])
def test_it_begins_after_its_share_of_the_steps(start, expected):
    cfg = TrainConfig(awp_lr=1., awp_start=start)
    assert [passes(cfg, n, 4) for n in range(1, 5)] == expected
    assert {passes(replace(cfg, awp_lr=0.), n, 4) for n in range(1, 5)} == {1}


def test_a_plan_counts_it():
    gib, off, on = 2**30, test_full.lines_of('deberta-v3-base'), test_full.lines_of('deberta-v3-base', awp=.5)
    assert 'awp' not in off and on['awp'].value == pytest.approx(off['gradients'].value)
    assert on['memory'].value >= off['memory'].value and on['awp'].value*gib == off['checkpoint'].value*1e9/3
    assert '50% of the steps twice' in on['training'].formula
    # steps cost half as much again, evaluations what they cost before
    floors = [test_full.lines_of('deberta-v3-base', evaluations=0, awp=awp)['floor'].value for awp in (0., .5, 1.)]
    assert floors[1]/floors[0] == pytest.approx(1.5) and floors[2]/floors[0] == pytest.approx(2)
    # LoRA: a copy of the adapters
    lora = test_full.lines_of('gemma-2-2b', quantization='nf4', tuning='lora', awp=1.)
    assert lora['awp'].value == lora['adapters'].value


def test_what_does_not_fit_with_it_may_without():
    from underdog.search.estimate import make_plan
    from underdog.search.recipe import Recipe
    from underdog.search.shapes import accelerator, model_shape
    shape, recipe = model_shape('deberta-v3-base'), Recipe(quantization='none', tuning='full', awp=.5)
    # between what the two need at least
    need = lambda recipe: min(room for room in np.arange(2, 12, .1) if fits(recipe, room))
    card = lambda room: replace(accelerator('T4'), memory_gib=float(room))

    def fits(recipe, room):
        try: make_plan(shape, card(room), recipe)
        except UserError: return False
        return True
    most, least = need(recipe), need(replace(recipe, awp=0.))
    assert most > least + .4
    with pytest.raises(UserError, match='it would with: .*awp=0'): make_plan(shape, card(most - .15), recipe)


def test_the_recipe_is_that_of_the_training():
    from underdog.search.recipe import Recipe
    model = ModelConfig('base')
    assert Recipe.of_training(model, cfg=TrainConfig()).awp == 0
    recipe = Recipe.of_training(model, cfg=TrainConfig(awp_lr=1., awp_start=.7))
    assert recipe.awp == pytest.approx(.3) and recipe.awp_settings == dict(awp_lr=1., awp_start=.7)
    assert Recipe().awp_settings == {}
    with pytest.raises(UserError, match='awp=1.5: a share from 0 to 1 is wanted'): Recipe(awp=1.5)


@pytest.mark.parametrize('wrong, match', [
    (dict(awp_lr=-1.), 'awp_lr=-1.0: must not be negative'),
    (dict(awp_lr=1000.), 'awp_lr=1000.*1 is usual'),
    (dict(awp_eps=0.), 'awp_eps=0.*.01 is usual'),
    (dict(awp_start=1.), 'awp_start=1.*awp_lr=0 is none')])
def test_what_cannot_be_is_refused(wrong, match):
    with pytest.raises(UserError, match=match): TrainConfig(**wrong)
