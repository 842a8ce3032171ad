"A model that starts from a baseline says as much as it has earned on rows that it had not learned from."
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fixtures import small_run
from test_probe import TIE, stand_in
from test_resume import beginner

from underdog.core import UserError
from underdog.data.competition import LMSYS
from underdog.data.metrics import log_loss, softmax
from underdog.model.head import make_head
from underdog.model.settings import ModelConfig
from underdog.runfolder import columns
from underdog.data.floors import floor_folds, start_floor
from underdog.training.loop import Silent, fit, rehearse
from underdog.training.probe import fit_probe, start_from_probe
from underdog.training.settings import TrainConfig
from underdog.training.unseen import Unseen, scaled, share_shown


def draw(n, strength, seed):
    "(labels, log-probabilities of a baseline, logits of a model of which the share `strength` is true)."
    rng = np.random.default_rng(seed)
    offset, own = np.log(rng.dirichlet([4, 4, 4], n)), rng.normal(size=(n, 3))*.4
    return np.eye(3)[[rng.choice(3, p=p) for p in softmax(offset + strength*own)]], offset, own


def gains(n, strength, seeds=40):
    "Gains on the baseline in 2,000 other rows, of a share that `n` rows have shown: of each seed."
    for seed in range(seeds):
        share = share_shown(*draw(n, strength, seed))
        y, offset, own = draw(2000, strength, 1000 + seed)
        yield log_loss(y, softmax(offset)) - log_loss(y, softmax(offset + share*own))


# ---- how much has been shown
@pytest.mark.parametrize('n', [100, 400, 1600])
def test_a_model_that_knows_nothing_costs_next_to_nothing(n):
    noise = np.array(list(gains(n, 0)))
    y, offset, own = draw(4000, 0, 1)
    whole = log_loss(y, softmax(offset)) - log_loss(y, softmax(offset + own))
    assert whole < -.03 and noise.mean() > -.0015 and noise.min() > -.01 and (noise == 0).mean() > .65


def test_a_model_that_knows_something_keeps_it():
    "Of few rows nearly as much as of many, as what is usual is not far off."
    y, offset, own = draw(20000, .5, 1)
    best = log_loss(y, softmax(offset)) - log_loss(y, softmax(offset + .5*own))
    assert best > .01 and np.mean(list(gains(1600, .5))) > .9*best and np.mean(list(gains(100, .5))) > .7*best


def test_many_rows_speak_for_themselves_and_few_for_what_is_usual():
    few, many = ([share_shown(*draw(n, 2., seed)) for seed in range(5)] for n in (10, 20000))
    assert many == [1]*5 and max(few) < .5
    y, offset, own = draw(20000, .05, 1)
    assert share_shown(y, offset, own) < .1


def test_copies_of_a_prompt_are_no_evidence():
    y, offset, own = draw(12, 0, 5)
    some = [share_shown(*draw(12, 0, seed)) for seed in range(40)]
    copied, told = [], []
    for seed in range(40):
        y, offset, own = (np.repeat(v, 50, 0) for v in draw(12, 0, seed))
        copied.append(share_shown(y, offset, own))
        told.append(share_shown(y, offset, own, np.repeat(np.arange(12), 50)))
    assert told == some and np.std(copied) > 1.2*np.std(told)
    assert share_shown(y, offset, own, np.zeros(len(y))) == 0 == share_shown(y[:0], offset[:0], own[:0])


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('n', [1, 2, 9])
def test_a_few_prompts_tell_nothing(n):
    y, offset, own = draw(n, 1, 0)
    copies = [np.repeat(v, 30, 0) for v in (y, offset, 5*y, np.arange(n))]
    assert share_shown(y, offset, 5*y) == 0 == share_shown(*copies)


@pytest.mark.filterwarnings('error')
def test_rows_that_are_all_alike_and_logits_without_measure_are_taken():
    a, even = np.tile([1., 0, 0], (40, 1)), np.log(np.full((40, 3), 1/3))
    y = np.eye(3)[np.arange(40) % 3]
    assert .3 <= share_shown(a, even, np.tile([1., -1, 0], (40, 1))) <= 1
    assert .3 <= share_shown(y, even, 1e6*y) <= 1
    assert share_shown(y, even, -1e6*y) == 0


# ---- what is kept of a run
def test_each_row_tells_what_was_said_of_it_before_it_was_learned_from(world):
    "The first step's are those of the model as it began; a second pass changes none; a rehearsal leaves no trace."
    training = beginner(world, offset=True, epochs=2.)()
    training.model.eval()
    rehearse(training)
    training.model.eval()
    rows, unseen = training.plan[0], training.unseen
    with torch.no_grad():
        batch = training.data.source.batch([(row, False) for row in rows])
        expected = dict(zip(batch.rows.tolist(), training.model(batch).numpy()))
    assert not unseen.logits.any() and training.earned == 0
    # no dropout, so that both are the same
    training.model.train = lambda on=True: training.model
    steps = {}

    class Watch(Silent):
        def look(self, step, **figures): steps[step] = unseen.logits.copy()
    fit(training, Watch())
    np.testing.assert_allclose(unseen.logits[rows], np.stack([expected[row] for row in rows]), atol=1e-5)
    assert not steps[1][training.plan[1]].any() and steps[2][training.plan[1]].any()
    np.testing.assert_array_equal(steps[4], unseen.logits)


def test_the_rows_of_a_prompt_are_no_judges_once_it_was_learned_from():
    data = SimpleNamespace(y=np.eye(3), offset=np.zeros((3, 3)), groups=np.array([7, 7, 9]))
    assert Unseen(data, [np.array([0]), np.array([2, 1])]).step.tolist() == [0, -1, 1]
    assert Unseen(data, [np.array([2]), np.array([0, 1])]).step.tolist() == [1, 1, 0]


def test_a_resumed_run_has_earned_the_same(world):
    begin = beginner(world, offset=True)
    whole = begin()
    fit(whole)
    half, second = begin(), begin()
    for _ in range(2): half.step()
    second.load(half.state())
    fit(second)
    np.testing.assert_array_equal(whole.unseen.logits, second.unseen.logits)
    # a checkpoint of a build that did not keep it
    old = half.state()
    del old['unseen']
    begin().load(old)


def test_who_starts_from_nothing_or_wants_all_says_all(world):
    assert beginner(world)().earned == 1 == beginner(world, offset=True, shrink='none')().earned
    with pytest.raises(UserError, match='known: earned, none'): TrainConfig(shrink='yes')


def test_held_out_predictions_and_adapter_are_those_of_the_earned_share(world, tmp_path, monkeypatch):
    "With nothing earned both are the baseline's, and a share of what was learned is that share of the logits."
    from safetensors.torch import load_file
    probabilities = lambda run, prefix: run.oof()[columns(prefix, LMSYS)].to_numpy()
    own, heads = {}, {}
    for kind in ('none', 'earned'):
        run = small_run(world, tmp_path/kind, start='floors', shrink=kind, evaluations=1)
        baseline = np.log(probabilities(run, f"floor_{run.config['best_floor']}"))
        z = np.log(probabilities(run, 'p')) - baseline
        own[kind] = z - z.mean(1, keepdims=True)
        heads[kind] = load_file(run.adapter/'head.safetensors')
        share = run.metrics()['eval_earned'].dropna().iloc[-1]
        assert (share == 1) == (kind == 'none') and 0 <= share <= 1
    np.testing.assert_allclose(own['earned'], share*own['none'], atol=1e-4)
    for name, tensor in heads['none'].items(): torch.testing.assert_close(heads['earned'][name], share*tensor)
    assert np.abs(own['none']).max() > 1e-3


# ---- the probe
def test_a_probe_is_not_believed_on_the_rows_it_was_fitted_on():
    "Of noise it says much that fits its own rows; without the gap that would be taken for a gain."
    features = np.random.default_rng(0).normal(size=(200, 2, 60))
    y = np.eye(3)[np.random.default_rng(1).integers(3, size=200)]
    offset = np.log(np.full((200, 3), 1/3))
    x = features[:, 0] - features[:, 1]
    fitted = fit_probe(x, y, offset=offset, tie=TIE, strengths=(.01,))   # a ridge that is far too weak
    s = x @ fitted.weights.double().numpy()
    said = np.stack([s/2, -s/2, 0*s], 1)
    assert share_shown(y, offset, said) > .5 and share_shown(y, offset, said + fitted.gap.numpy()) < .2
    # the head that starts from a probe tells what it keeps for later
    head = make_head(ModelConfig(''), 60)
    model, data = stand_in(features, y, head, offset=offset)
    data.groups = np.arange(200)
    unseen = Unseen(data, [np.arange(200)])
    start_from_probe(model, data, data.groups, 150, unseen=unseen)
    assert (unseen.gap.any(1).sum() == 150) == bool(head.score.weight.any())


def test_weights_of_noise_are_seldom_taken():
    "Weights that gain less than a standard error out of fold are none."
    taken = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        y = np.eye(3)[rng.integers(3, size=150)]
        fitted = fit_probe(rng.normal(size=(150, 20)), y, offset=np.log(np.full((150, 3), 1/3)), tie=TIE)
        taken += bool(fitted.weights.any())
    assert taken <= 6


# ---- the baseline
def test_it_starts_from_the_stack_unless_another_is_surely_better():
    rng = np.random.default_rng(0)
    y = np.eye(3)[rng.integers(3, size=400)]
    stack = softmax(rng.normal(size=(400, 3))*.1)
    surer = np.where(np.arange(400) < 212, .3, -.3)[:, None]   # better in 53 % of the rows, worse in the others
    alike = softmax(np.log(stack) + surer*y)
    better = softmax(np.log(stack) + y)
    assert log_loss(y, alike) < log_loss(y, stack)
    assert start_floor(y, dict(traits=alike, stack=stack)) == 'stack'
    assert start_floor(y, dict(traits=better, stack=stack)) == 'traits'
    assert start_floor(y, dict(prior=stack, tfidf=better)) == 'tfidf'   # the quick ones have no stack


def test_baselines_of_training_rows_do_not_depend_on_the_number_of_folds():
    "With two folds they came from fits to half of the training rows, and the prior looked best."
    n = 60
    df = pd.DataFrame(dict(prompt=[[f'question {i}'] for i in range(n)], **{
        c: (np.arange(n) % 3 == j).astype(float) for j, c in enumerate(('a', 'b', 'tie'))}))
    folds = floor_folds(df, np.arange(n), 1)
    assert sorted(np.unique(folds)) == [0, 1, 2, 3, 4]
    # as many as have every class
    few = df.iloc[:9]
    assert len(np.unique(floor_folds(few, np.arange(9), 1))) == 3


def test_a_scaled_head_is_itself_again():
    head = make_head(ModelConfig(''), 8)
    before = {name: p.clone() for name, p in head.state_dict().items()}
    with pytest.raises(KeyError):
        with scaled(head, 0.):
            assert not any(p.any() for p in head.parameters())
            raise KeyError
    for name, p in head.state_dict().items(): assert torch.equal(p, before[name])
