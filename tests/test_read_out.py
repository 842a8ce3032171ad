"A head that answers a question starts from the language model's own words, where it has such words and they tell."
import shutil

import datasets
import numpy as np
import pytest
import torch
from fixtures import CHATML, family_config, make_base, make_tokenizer, predictions, small_run

from underdog.core import UserError
from underdog.data.answers import davidson
from underdog.data.metrics import log_loss
from underdog.inference.settings import InferConfig
from underdog.model.backbone import host_embedding
from underdog.model.folder import word_rows
from underdog.model.merge import load_adapter, save_adapter
from underdog.model.model import load_model
from underdog.model.settings import ModelConfig
from underdog.text.layout import sequences
from underdog.text.prompt import PromptConfig, Prompter
from underdog.text.source import RowSource
from underdog.text.words import label_ids
from underdog.training.probe import pair_features, start_from_probe
from underdog.training.read_out import find_words
from underdog.training.step import FitData

N = 300


def language_model(folder, tied):
    "A tiny language model with a tokenizer in `folder`; it says words with some decision."
    from transformers import AutoModelForCausalLM
    torch.manual_seed(0)
    config = family_config('llama', vocab_size=512, max_position_embeddings=512, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data.normal_()
    model.save_pretrained(folder)
    make_tokenizer(folder, CHATML)
    return str(folder)


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp('words')
    return {tied: language_model(folder/str(tied)/'llama', tied) for tied in (False, True)}


def loaded(base, head='joint', n=N, **settings):
    "(model, source of `n` rows of random letters) with that head on the folder `base`."
    model = load_model(ModelConfig(base, head=head, quantization='none', rank=4, **settings)).eval()
    prompter, rng = Prompter(PromptConfig(max_length=256, min_keep=4), base, head), np.random.default_rng(0)
    text = lambda: [''.join(rng.choice(list('abcdefgh '), 12))]
    rows = [dict(prompt=text(), response_a=text(), response_b=text()) for _ in range(n)]
    return model, RowSource(datasets.Dataset.from_list([prompter.segments(r) for r in rows]), prompter, model.packing)


def said(model, source, n=N):
    "((n, 2) of the first answer over the second in both orders, (n, 2) of a tie over both) by the head over words."
    words, reason = find_words(model, source.prompter)
    assert not reason
    z = (pair_features(model, source, np.arange(n)) @ words.T).double().numpy()
    return z[..., 0] - z[..., 1], z[..., 2] - z[..., :2].mean(-1)


def started(model, source, y, offset=None):
    "The line of `start_from_probe` on all rows, each a prompt of its own."
    data = FitData(source, y, offset, np.arange(len(y)))
    return start_from_probe(model, data, np.arange(len(y)), 2000)


def logits(model, source, swapped=False):
    "(N, C) logits of the model, of the answers A and B."
    batch = source.batch([(row, swapped) for row in range(N)])
    with torch.no_grad(): z = model(batch).double().numpy()
    return z[np.argsort(batch.rows)]


def labels(x, ties, seed=0):
    "Labels of the law that the words tell."
    p = davidson(x/2, -x/2, ties)
    rng = np.random.default_rng(seed)
    return np.eye(3)[[rng.choice(3, p=row) for row in p]], p


@pytest.mark.parametrize('tied', [False, True])
def test_the_words_are_those_that_transformers_own_model_says(bases, tied):
    from transformers import AutoModelForCausalLM
    model, source = loaded(bases[tied], n=4)
    whole, prompter = AutoModelForCausalLM.from_pretrained(bases[tied]).eval(), source.prompter
    assert (whole.lm_head.weight is whole.model.embed_tokens.weight) == tied
    x, ties = said(model, source, n=4)
    for row in range(4):
        for order, swapped in enumerate((False, True)):
            sequence, = sequences(prompter.frame, source.tokens[row], 'joint', swapped)
            with torch.no_grad(): z = whole(torch.tensor([sequence.ids])).logits[0, -1]
            first, second, tie = (float(z[ids].mean()) for ids in label_ids(prompter))
            assert x[row, order] == pytest.approx(first - second, abs=1e-4)
            assert ties[row, order] == pytest.approx(tie - (first + second)/2, abs=1e-4)


@pytest.mark.parametrize('offset', [False, True])
@pytest.mark.parametrize('head', ['joint', 'symmetric'])
def test_logits_at_the_start_are_the_words_own_times_a_scale(bases, head, offset, tmp_path):
    model, source = loaded(bases[False], head)
    x, ties = said(model, source)
    better, equal = (x[:, 0] - x[:, 1])/2, ties.mean(1)
    better, equal = better/better.std()*2, (equal - equal.mean())/equal.std()*2
    y, p = labels(better, equal)
    log_prior = np.log(np.tile(y.mean(0), (N, 1)))
    line = started(model, source, y, log_prior if offset else None)
    assert 'starts from' in line and f'on {N} rows' in line and ('baseline alone' in line) == offset
    told = float(line.split('training ')[1].split()[0])
    assert log_loss(y, p) - .02 < told < log_loss(y, np.exp(log_prior)) - .1
    # each order says its own, or both say one thing; of the order, what is in all rows alike is taken away
    if head == 'symmetric': shown = [(logits(model, source), (x[:, 0] - x[:, 1])/2, ties.mean(1))]
    else: shown = [(logits(model, source), x[:, 0], ties[:, 0]), (logits(model, source, True), -x[:, 1], ties[:, 1])]
    for z, of_order, of_tie in shown:
        for ours, words in ((z[:, 0] - z[:, 1], of_order), (z[:, 2] - z[:, :2].mean(1), of_tie)):
            scale, shift = np.polyfit(words, ours, 1)
            assert scale > 0
            np.testing.assert_allclose(ours, scale*words + shift, atol=2e-3)   # of numbers up to 10, in fp32
    # no place is preferred: over both orders, what is shown first is as good as what is shown second
    if head == 'joint': assert abs((shown[0][0] + shown[1][0][:, [1, 0, 2]]).mean(0) @ [1, -1, 0]) < 1e-3
    # saved equals reloaded
    save_adapter(model, tmp_path/'adapter')
    again = load_adapter(tmp_path/'adapter')
    np.testing.assert_array_equal(logits(again, source), logits(model, source))


@pytest.mark.parametrize('head', ['joint', 'symmetric'])
def test_words_that_tell_nothing_or_the_contrary_are_not_taken(bases, head):
    model, source = loaded(bases[False], head)
    before = {name: p.clone() for name, p in model.head.state_dict().items()}
    line = started(model, source, np.eye(3)[np.random.default_rng(1).integers(3, size=N)])
    assert 'starts without' in line and 'class prior' in line
    x, _ = said(model, source)
    contrary = (x[:, 1] - x[:, 0])/np.std(x[:, 0] - x[:, 1])*3
    line = started(model, source, labels(contrary, 0*contrary)[0])
    assert 'starts without' in line and 'times 0 and, of ties, 0:' in line
    for name, p in model.head.state_dict().items(): assert torch.equal(p, before[name])


def test_two_classes(bases):
    model, source = loaded(bases[False], n_classes=2)
    words, _ = find_words(model, source.prompter)
    x = (pair_features(model, source, np.arange(N)) @ (words[0] - words[1])).double().numpy()
    better = x[:, 0] - x[:, 1]
    p = 1/(1 + np.exp(-better/better.std()*2))
    first = np.random.default_rng(0).random(N) < p
    line = started(model, source, np.stack([first, ~first], 1).astype(float))
    z = logits(model, source)
    assert 'starts from' in line and np.corrcoef(z[:, 0] - z[:, 1], x[:, 0])[0, 1] > .9999


def test_an_embedding_on_the_host_changes_nothing(bases):
    model, source = loaded(bases[True])
    words, _ = find_words(model, source.prompter)
    host_embedding(model.backbone.get_input_embeddings())
    assert torch.equal(find_words(model, source.prompter)[0], words)


@pytest.mark.parametrize('family, settings, why', [
    ('bert', {}, 'an encoder says no next word'),
    ('llama', {}, 'holds no head over words'),
    ('llama', dict(pooling='mean'), 'pooling=mean'),
])
def test_a_model_without_words_says_why(family, settings, why, tmp_path):
    model, source = loaded(make_base(tmp_path/'base', family, max_position_embeddings=512), **settings)
    before = {name: p.clone() for name, p in model.head.state_dict().items()}
    assert why in started(model, source, np.eye(3)[np.arange(N) % 3])
    for name, p in model.head.state_dict().items(): assert torch.equal(p, before[name])


def test_a_run_tells_and_is_inferred_with(world, bases, tmp_path):
    for name in ('train.csv', 'test.csv'): (tmp_path/name).symlink_to(world/name)
    (tmp_path/'llama').symlink_to(bases[False])
    run = small_run(tmp_path, tmp_path/'run', head='joint', epochs=.5)
    assert run.status['state'] == 'finished' and "the language model's own words, times" in run.log_file.read_text()
    plain, merged = (predictions(run.path, tmp_path/'test.csv', tmp_path/str(merge), InferConfig(merge=merge))
                     for merge in (False, True))
    columns = ['p_a', 'p_b', 'p_tie']
    np.testing.assert_allclose(plain[columns], merged[columns], rtol=1e-3, atol=1e-3)


def test_broken_weights_are_one_message(bases, tmp_path):
    broken = tmp_path/'broken'
    shutil.copytree(next(iter(bases.values())), broken)
    (broken/'model.safetensors').write_bytes(b'no weights')
    with pytest.raises(UserError, match='model.safetensors: cannot be read'): word_rows(broken, [0])
