"""The benchmarks' own rules: lengths within the cut, even samples, paired ratios. A short run of each, whose noise-free
figures hold."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from transformers import TrainingArguments
import torch
from conftest import REPO, slow

sys.path.insert(0, str(REPO))
from benchmarks import common, gpu   # noqa: E402
from benchmarks.train import epoch_batches, padded_sizes   # noqa: E402


@pytest.mark.parametrize('real', [True, False])
def test_lengths_are_cut_scaled_and_seeded(real, monkeypatch):
    if real and not common.shared_file(): pytest.skip('no real rows beside the checkout')
    if not real: monkeypatch.setattr(common, 'shared_file', lambda: None)
    (a, source), (b, _), (c, _) = common.row_lengths(2000), common.row_lengths(2000), common.row_lengths(2000, seed=1)
    assert a.shape == (2000, 3) and (a >= 1).all() and a.sum(1).max() <= common.CUT/common.SCALE + 2
    assert np.array_equal(a, b) and not np.array_equal(a, c) and ('real' in source) == real
    assert 80 < a.sum(1).mean()*common.SCALE/8 < 110   # LMSYS: about 700 tokens a row


def test_a_sample_is_even():
    sizes = np.random.default_rng(0).lognormal(5, 1, 5000)
    for seed in range(5):
        at = common.spread(sizes, 40, np.random.default_rng(seed))
        assert len(set(at)) == 40
        distance = abs(np.log(sizes[at]).mean() - np.log(sizes).mean())
        assert distance < .1   # of a random sample, .16 on average


def test_ratios_are_paired_by_round():
    # the machine slows down; the ratio stays
    results = dict(ours=[(10, 1), (10, 2), (10, 4)], peer=[(10, 2), (10, 4), (10, 8)])
    assert common.ratios(results, 'ours', 'peer') == common.Ratio(median=2, best=2, min=2, max=2)
    seen = common.paired_rounds(dict(a=lambda i: (i + 1, 1.), b=lambda i: (2, 1.)), 3)
    assert seen == dict(a=[(1, 1.), (2, 1.), (3, 1.)], b=[(2, 1.)]*3)


def test_batches_of_an_epoch():
    lengths = np.arange(30).reshape(10, 3)
    batches = epoch_batches(np.arange(10)[::-1])
    assert batches.tolist() == [[9, 8, 7, 6, 5, 4, 3, 2]]
    assert padded_sizes(lengths, batches).tolist() == [8*(27 + 28 + 29 + 4)]


def run(name, *args):
    "The JSON at the end of a benchmark's output."
    command = [sys.executable, '-m', f'benchmarks.{name}', *args]
    env = dict(os.environ, OMP_NUM_THREADS='1')
    done = subprocess.run(command, cwd=REPO, stdout=subprocess.PIPE, text=True, env=env)
    assert done.returncode == 0, done.stdout[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@slow
@pytest.mark.skipif(
    'train_sampling_strategy' not in TrainingArguments.__dataclass_fields__,
    reason="the peer's samplers are those of later versions of transformers",
)
def test_train_computes_the_same_with_less():
    got = run('train', '--quick')
    assert {'vs_trainer_default', 'vs_kbit_recipe', 'vs_kbit_recipe_grouped', 'vs_flattened'} <= set(got)
    assert {'vs_group_by_length', 'vs_group_by_length_32_layers', 'vs_group_by_length_42_layers'} <= set(got)
    assert got['max_logit_diff'] < 1e-5
    assert got['min_gradient_cosine'] > .9999
    assert got['token_efficiency'] >= .995
    assert got['attention_share'] < .15
    assert abs(got['flops_predicted_over_measured'] - 1) < .01
    assert 1.1 < got['last_layer_saving'] < 1.15
    operations = got['operations_over_ours']
    assert operations['Trainer, default'] > 2
    assert operations['Trainer, group_by_length'] > 1.1
    assert operations['Trainer, k-bit recipe'] > 3.5


@slow
def test_infer_computes_the_same_with_less():
    got = run('infer', '--rounds', '1', '--rows', '16')
    assert {'vs_file_order', 'vs_sorted', 'vs_sorted_42_layers', 'vs_flattened'} <= set(got)
    assert {'both_orders_cost', 'symmetric_cost', 'two_worker_speedup'} <= set(got)
    operations = got['operations']
    assert got['max_logit_diff'] < 1e-5 and operations['padded, sorted'] > 1 and operations['padded, file order'] > 1.8
    assert operations['underdog, both orders'] < 1.95 and operations['underdog, symmetric'] < 1.1


@slow
def test_faults_lose_nothing():
    "The short form: a few kills, each followed by a run to the end."
    got = run('faults', '--kills', '2', '--rows', '40')
    assert got['kills'] == 2
    assert got['lost_runs'] == got['invalid_submissions'] == got['torn_files'] == 0
    assert got['runs'] >= 2
    assert 'max_steps_redone' in got


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a card: the benchmark would run')
def test_gpu_says_why_it_is_skipped(): assert run('gpu') == dict(skipped='no CUDA device')


@pytest.mark.parametrize('name,kind', [('mistral-7b', 'nf4'), ('gemma-2-9b', 'int8'), ('deberta-v3-large', 'none')])
def test_gpu_measures_what_it_says_on_a_cpu(name, kind, monkeypatch):
    "The same code with small shapes: packed logits of the built model equal padded ones, and every job has a rate."
    small = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    model_type, shape = gpu.SHAPES[name]
    heads = dict(num_key_value_heads=2, head_dim=16) if 'head_dim' in shape else {}
    monkeypatch.setitem(gpu.SHAPES, name, (model_type, shape | small | heads))
    lengths = np.array([[3, 9, 4], [5, 2, 8], [1, 1, 1], [6, 12, 20]])
    place = gpu.Place('cpu', torch.float32, 1e12)
    model = gpu.build(name, kind, 'joint', place).eval()

    def logits(how):
        "The logits of each row, by its number."
        batches = gpu.batches_of(lengths, how, 'joint', model)
        return {int(r): z for b in batches for r, z in zip(b.rows, model(b))}

    packed, padded = logits('underdog'), logits('random')
    for r in packed: torch.testing.assert_close(packed[r], padded[r], rtol=1e-3, atol=3e-2 if kind == 'int8' else 1e-4)
    rows = gpu.measure(name, kind, lengths, rounds=1, place=place)
    jobs = {(r['job'], r['how']) for r in rows}
    assert all(r['useful_tokens_per_s'] > 0 and r['share_of_ceiling'] > 0 for r in rows)
    assert ('infer', 'underdog') in jobs
    assert (('train', 'underdog') in jobs) == (kind != 'int8')
    assert (('train, k-bit recipe', 'random') in jobs) == (kind == 'nf4')
