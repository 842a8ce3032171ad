"""The laws on a card: packed equals padded, float16 trains and predicts as it was evaluated, a stop loses nothing.

Skipped where there is none."""
import numpy as np
import pandas as pd
import pytest
import torch
from fixtures import DECODERS, FAMILIES, predictions, small_run
from test_model import trained
from test_packing import both_ways, equal_both_ways

from underdog.runfolder import columns
from underdog.data.competition import LMSYS
from underdog.data.rows import read_rows
from underdog.data.sample import write_rows
from underdog.model.settings import ModelConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device here')
CUDA = 'cuda:0'


@pytest.fixture
def exact_products():
    "fp32 products in fp32, not in TF32."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize('family', FAMILIES)
def test_packed_equals_padded_on_a_card(bases, family, exact_products):
    model = trained(ModelConfig(str(bases[family]), rank=4, quantization='none', dtype='float32'), device=CUDA)
    batches = [batch.to(CUDA) for batch in both_ways(model, 'pair', read='last' if family in DECODERS else 'first')]
    equal_both_ways(model, *batches, rtol=1e-3, atol=5e-4)


@pytest.mark.parametrize('quantization', ['none', 'nf4', 'int8'])
@pytest.mark.parametrize('family', ['llama', 'gemma2'])
def test_half_precision_on_a_card(bases, family, quantization):
    "Packed and padded rows in float16 have the logits that a CPU computes in float32."
    name = str(bases[family])
    cfg = ModelConfig(name, rank=4, quantization=quantization, dtype='float16', int8_threshold=0.)
    half = trained(cfg, device=CUDA)
    batches = both_ways(half, 'pair')
    with torch.no_grad(): packed, padded = (half(batch.to(CUDA)).float().cpu() for batch in batches)
    torch.testing.assert_close(packed, padded, rtol=2e-2, atol=2e-2)
    if quantization == 'none':
        whole = trained(ModelConfig(name, rank=4, quantization='none', dtype='float32'))
        with torch.no_grad(): torch.testing.assert_close(packed, whole(batches[0]), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize('quantization', ['none', 'nf4'])
def test_a_float16_run_predicts_as_it_was_evaluated(world, tmp_path, quantization):
    "Trained with a loss scale; held-out rows predicted as a test file give their held-out probabilities."
    run = small_run(world, tmp_path/'run', quantization=quantization, dtype='float16')
    assert run.status['state'] == 'finished'
    rows, p = read_rows(world/'train.csv')[0], columns('p', LMSYS)
    held = rows[run.rows()['held'].to_numpy()].reset_index(drop=True)
    write_rows(tmp_path/'held.csv', held, LMSYS)
    expected = pd.read_parquet(run.oof_file).set_index('id').loc[held['id'], p]
    predicted = predictions(run.path, tmp_path/'held.csv', tmp_path/'out').set_index('id').loc[held['id'], p]
    np.testing.assert_allclose(predicted, expected, atol=5e-3)
