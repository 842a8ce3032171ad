"A reward model as base: it reads what it was trained to read, its row starts the head, and what has no row is refused."
import json
from pathlib import Path

import pytest
import torch
from fixtures import family_config, make_base, predictions, small_run
from safetensors.torch import load_file, save_file

from underdog.core import UserError
from underdog.inference.settings import InferConfig
from underdog.model.model import load_model
from underdog.model.settings import ModelConfig
from underdog.text.prompt import PromptConfig, Prompter
from underdog.text.source import RowSource
from underdog.text.template import scores_answers
from underdog.text.tokenizer import tokenizer_hash
from underdog.training.prepare import describe


@pytest.fixture(scope='module')
def reward(world, tmp_path_factory):
    "A folder as `world` with a tiny reward model in `llama`."
    from transformers import AutoModelForSequenceClassification
    folder = tmp_path_factory.mktemp('reward')
    base = Path(make_base(folder/'llama'))
    torch.manual_seed(0)
    config = family_config('llama', num_labels=1, vocab_size=512, max_position_embeddings=256)
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.score.weight.data.normal_()
    classifier.save_pretrained(base)
    for name in ('train.csv', 'test.csv'): (folder/name).symlink_to(world/name)
    return folder


def test_a_config_of_any_shape_says_whether_it_scores(tmp_path):
    for content in (dict(architectures=3, id2label={'0': 'x'}), dict(architectures={}, id2label=1),
                    dict(architectures=[None], id2label=[1]), dict(architectures=None), {}):
        (tmp_path/'config.json').write_text(json.dumps(content))
        assert not scores_answers(tmp_path)
    for content in ('[]', 'x', '3'):
        (tmp_path/'config.json').write_text(content)
        with pytest.raises(UserError, match='config.json: '): scores_answers(tmp_path)
        (tmp_path/'tokenizer_config.json').write_text(content)
        with pytest.raises(UserError, match='tokenizer_config.json: '): tokenizer_hash(tmp_path)


def test_the_head_gives_the_rewards_of_the_whole_template(reward):
    "Of texts that the reward model's own tokenizer and template have read, down to the newline behind the last token."
    import datasets
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    base = reward/'llama'
    tok, classifier = AutoTokenizer.from_pretrained(base), AutoModelForSequenceClassification.from_pretrained(base)
    question, answers = 'What is the capital of France?', ['It is Paris.', 'user assistant model']
    rewards = []
    for answer in answers:
        messages = [dict(role='user', content=question), dict(role='assistant', content=answer)]
        ids = tok(tok.apply_chat_template(messages, tokenize=False), add_special_tokens=False, return_tensors='pt')
        with torch.no_grad(): rewards.append(float(classifier.eval()(**ids).logits))
    # ours
    assert scores_answers(base)
    model = load_model(ModelConfig(str(base), quantization='none', rank=4)).eval()
    prompter = Prompter(PromptConfig(max_length=128, min_keep=4), str(base))
    assert model.cfg.pooling == 'last' and model.head_source == 'checkpoint'
    row = dict(prompt=[question], response_a=answers[:1], response_b=answers[1:])
    source = RowSource(datasets.Dataset.from_list([prompter.segments(row)]), prompter, model.packing)
    with torch.no_grad(): a, b, tie = model(source.batch([(0, False)]))[0].tolist()
    assert [a, b] == pytest.approx(rewards, abs=1e-4) and tie == pytest.approx(sum(rewards)/2, abs=1e-4)
    assert abs(a - b) > 1e-2


def test_a_run_starts_from_the_reward_and_is_inferred_with(reward, tmp_path):
    run = small_run(reward, tmp_path/'run', epochs=.5)
    assert run.status['state'] == 'finished'
    told = run.log_file.read_text()
    assert "the head is the reward model's own, times" in told and 'the baseline alone' in told
    # inference reads by the same template, merged or not
    plain, merged = (predictions(run.path, reward/'test.csv', tmp_path/str(merge), InferConfig(merge=merge))
                     for merge in (False, True))
    columns = ['p_a', 'p_b', 'p_tie']
    torch.testing.assert_close(torch.tensor(plain[columns].to_numpy()), torch.tensor(merged[columns].to_numpy()),
                               rtol=1e-3, atol=1e-3)


def test_several_objectives_are_refused_before_anything_is_written(reward, tmp_path):
    for name in ('train.csv', 'test.csv'): (tmp_path/name).symlink_to(reward/name)
    base = Path(make_base(tmp_path/'llama'))
    weights = load_file(base/'model.safetensors') | {'gating.logit_scale': torch.ones(1)}
    save_file(weights, base/'model.safetensors', metadata=dict(format='pt'))
    with pytest.raises(UserError, match='ArmoRM.*gating.logit_scale.*Skywork-Reward-V2'):
        small_run(tmp_path, tmp_path/'run')
    assert not (tmp_path/'run'/'config.json').exists()
    # a head that sees both answers begins with its own values
    model = ModelConfig(str(base), head='joint', quantization='none')
    assert describe(tmp_path/'train.csv', model, PromptConfig(max_length=128, min_keep=4)).config['base_hash']
